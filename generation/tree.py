"""The draft tree: the tokens of one round and which continues which.

Node 0 is the root, the last committed token, which the target has not read yet; every other node continues its parent.
A parent always comes before its children. A chain is the tree in which node i continues node i - 1.

Shapes: N nodes, M candidates.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class DraftTree:
    """
    The nodes of one round.

    Args:
        token_ids (`torch.LongTensor` of shape `(N,)`): Target ids; the root's first.
        parents (`torch.LongTensor` of shape `(N,)`): Index of the parent; the root's is 0.
        is_chain (`bool`): Whether every node is known to continue the one before it.
    """

    token_ids: Tensor
    parents: Tensor
    is_chain: bool = False

    def __len__(self) -> int:
        return self.token_ids.shape[0]

    @cached_property
    def attends(self) -> Tensor:
        """Who sees whom, bool `(N, N)`: a node sees itself and whatever its parent sees."""
        num_nodes, device = len(self), self.token_ids.device
        nodes = torch.arange(num_nodes, device=device)
        sees = (nodes == nodes[:, None]) | (nodes == self.parents[:, None])
        num_generations = 1
        while num_generations < num_nodes:  # each product doubles how far up a node sees
            sees = sees.float() @ sees.float() > 0
            num_generations *= 2
        return sees

    @cached_property
    def depths(self) -> Tensor:
        """Steps from the root, `(N,)`."""
        return self.attends.sum(dim=1) - 1

    @property
    def deepest(self) -> int:
        """Depth of the deepest node."""
        return len(self) - 1 if self.is_chain else int(self.depths.max())

    def children(self) -> dict[tuple[int, int], int]:
        """The node for every (parent, token)."""
        token_ids, parents = self.token_ids.tolist(), self.parents.tolist()
        return {(parents[node], token_ids[node]): node for node in range(1, len(token_ids))}


def build_chain(token_ids: Tensor) -> DraftTree:
    """The tree in which every node continues the one before it, `(N,)`."""
    nodes = torch.arange(token_ids.shape[0], device=token_ids.device)
    return DraftTree(token_ids, parents=(nodes - 1).clamp(min=0), is_chain=True)


def build_tree(root: Tensor, token_ids: Tensor, parents: Tensor, scores: Tensor, num_nodes: int) -> DraftTree:
    """
    The root and the best of its candidate descendants (EAGLE-2, arXiv:2406.16858, Section 4.2).

    A score never exceeds the parent's, and of equal ones the earlier candidate is taken, so that a node comes with all
    its ancestors.

    Args:
        root (`torch.LongTensor` of shape `(1,)`): Target id of the newest committed token.
        token_ids (`torch.LongTensor` of shape `(M,)`): Target ids of the candidates, parents before children.
        parents (`torch.LongTensor` of shape `(M,)`): Index of the parent among them; -1 is the root.
        scores (`torch.Tensor` of shape `(M,)`): Log-probability of the path to each, fp32.
        num_nodes (`int`): Candidates that are kept, at most.
    """
    kept = scores.sort(descending=True, stable=True).indices[:num_nodes].sort().values
    parents = parents[kept]
    parents = torch.where(parents < 0, 0, torch.searchsorted(kept, parents) + 1)
    return DraftTree(torch.cat([root, token_ids[kept]]), torch.cat([parents.new_zeros(1), parents]))
