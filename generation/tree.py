"""The draft tree: the tokens of one round and which continues which.

Node 0 is the root, the last committed token, which the target has not read yet; every other node continues its parent.
A parent always comes before its children. A chain is the tree in which node i continues node i - 1.

Shapes: N nodes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DraftTree:
    """
    The nodes of one round.

    Args:
        token_ids (`torch.LongTensor` of shape `(N,)`): Target ids; the root's first.
        parents (`torch.LongTensor` of shape `(N,)`): Index of the parent; the root's is 0.
    """

    token_ids: Tensor
    parents: Tensor

    def __len__(self) -> int:
        return self.token_ids.shape[0]

    def children(self) -> dict[tuple[int, int], int]:
        """The node for every (parent, token)."""
        token_ids, parents = self.token_ids.tolist(), self.parents.tolist()
        return {(parents[node], token_ids[node]): node for node in range(1, len(token_ids))}


def build_chain(token_ids: Tensor) -> DraftTree:
    """The tree in which every node continues the one before it, `(N,)`."""
    nodes = torch.arange(token_ids.shape[0], device=token_ids.device)
    return DraftTree(token_ids, parents=(nodes - 1).clamp(min=0))
