"""The draft trees: the tokens of one round and which continues which, one tree for each sequence of the batch.

Node 0 is the root, the last committed token, which the target has not read yet; every other node continues its parent.
A parent always comes before its children. A chain is the tree in which node i continues node i - 1. All rows have the
same number of nodes.

Shapes: B batch, N nodes, M candidates.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .kernels import can_run_kernels

# The kernels hold all candidates of a sequence at once, and of what is kept all pairs.
MOST_CANDIDATES = 1024
MOST_NODES = 128


@dataclass(frozen=True)
class DraftTree:
    """
    The nodes of one round.

    Args:
        token_ids (`torch.LongTensor` of shape `(B, N)`): Target ids; the root's first.
        parents (`torch.LongTensor` of shape `(B, N)`): Index of the parent; the root's is 0.
        is_chain (`bool`): Whether every node is known to continue the one before it.
        max_depth (`int`, *optional*): Where it is known that no node is deeper.
        preferred (`torch.LongTensor` of shape `(B, N - 1)`, *optional*): See `ranks`; `None`: each node to the next.
    """

    token_ids: Tensor
    parents: Tensor
    is_chain: bool = False
    max_depth: int | None = None
    preferred: Tensor | None = None

    def __len__(self) -> int:
        return self.token_ids.shape[1]

    @cached_property
    def attends(self) -> Tensor:
        """Who sees whom, bool `(B, N, N)`: a node sees itself and whatever its parent sees."""
        num_nodes = len(self)
        if self.is_chain:
            nodes = torch.arange(num_nodes, device=self.token_ids.device)
            return (nodes <= nodes[:, None]).expand(len(self.token_ids), -1, -1)
        deepest = num_nodes - 1 if self.max_depth is None else min(self.max_depth, num_nodes - 1)
        if runs_on_triton(self.parents, num_nodes):
            from .tree_triton import attends

            return attends(self.parents, deepest)
        return attends_by_definition(self.parents, deepest)

    @cached_property
    def depths(self) -> Tensor:
        """Steps from the root, `(B, N)`."""
        return self.attends.sum(dim=-1) - 1

    @property
    def deepest(self) -> int:
        """Depth of the deepest node, or a bound on it."""
        if self.is_chain:
            return len(self) - 1
        return min(self.max_depth, len(self) - 1) if self.max_depth is not None else int(self.depths.max())

    @property
    def ranks(self) -> Tensor:
        """How many nodes the draft preferred to each, `(B, N)`, the root aside: the best n nodes are a tree too."""
        if self.preferred is None:
            ranks = torch.arange(len(self), device=self.parents.device) - 1
            return ranks.clamp(min=0).expand_as(self.parents)
        return torch.cat([torch.zeros_like(self.parents[:, :1]), self.preferred], dim=1)

    @cached_property
    def has_children(self) -> Tensor:
        """Which nodes are continued, bool `(B, N)`."""
        nodes = torch.arange(len(self), device=self.parents.device)
        return (self.parents[:, None, 1:] == nodes[:, None]).any(dim=-1)

    def children(self, nodes: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """
        The children that hold given tokens.

        Args:
            nodes (`torch.LongTensor` of shape `(B,)`): A node of each row.
            token_ids (`torch.LongTensor` of shape `(B,)`): A token after each.

        Returns:
            Which of the nodes have such a child, bool `(B,)`, and the first one, `(B,)`; 0 where there is none.
        """
        is_child = (self.parents == nodes[:, None]) & (self.token_ids == token_ids[:, None])  # (B, N)
        is_child[:, 0] = False
        return is_child.any(dim=1), is_child.int().argmax(dim=1)

    def with_pads(self, is_frozen: Tensor, pad_token_id: Tensor, depth: int) -> "DraftTree":
        """
        The same trees, except where a row gets nothing but padding: there they are chains of it.

        Args:
            is_frozen (`torch.BoolTensor` of shape `(B,)`): The rows that get padding.
            pad_token_id (`torch.LongTensor` of shape `()`): Its token.
            depth (`int`): Length of the chains; nodes beyond hang under the root with another token.
        """
        nodes = torch.arange(len(self), device=self.parents.device)
        pads = torch.where(nodes <= depth, pad_token_id, (pad_token_id == 0).long())
        pads = torch.where(nodes > 0, pads, self.token_ids)
        chain = torch.where(nodes <= depth, nodes - 1, 0).clamp(min=0)
        is_frozen = is_frozen[:, None]
        return DraftTree(
            torch.where(is_frozen, pads, self.token_ids),
            torch.where(is_frozen, chain, self.parents),
            self.is_chain,
            depth,
            self.preferred,
        )

    def with_roots(self, roots: Tensor) -> "DraftTree":
        """The same trees after other tokens `(B, 1)`."""
        return replace(self, token_ids=torch.cat([roots, self.token_ids[:, 1:]], dim=1))


def runs_on_triton(tensor: Tensor, num_nodes: int) -> bool:
    return tensor.is_cuda and num_nodes <= MOST_NODES and can_run_kernels(tensor.device)


def attends_by_definition(parents: Tensor, deepest: int) -> Tensor:
    """[`DraftTree.attends`] of trees with these parents `(B, N)`, no node of which is deeper than `deepest`."""
    nodes = torch.arange(parents.shape[1], device=parents.device)
    sees = (nodes == nodes[:, None]) | (nodes == parents[..., None])
    num_generations = 1
    while num_generations <= deepest:  # each product doubles how far up a node sees
        sees = sees.float() @ sees.float() > 0
        num_generations *= 2
    return sees


def build_chain(token_ids: Tensor) -> DraftTree:
    """The trees in which every node continues the one before it, `(B, N)`."""
    nodes = torch.arange(token_ids.shape[1], device=token_ids.device)
    return DraftTree(token_ids, parents=(nodes - 1).clamp(min=0).expand_as(token_ids), is_chain=True)


def build_tree(
    root: Tensor, token_ids: Tensor, parents: Tensor, scores: Tensor, num_nodes: int, max_depth: int | None = None
) -> DraftTree:
    """
    The root and the best of its candidate descendants (EAGLE-2, arXiv:2406.16858, Section 4.2).

    A score never exceeds the parent's, and of equal ones the earlier candidate is taken, so that a node comes with all
    its ancestors. Scores that are not a number, as of a head that overflows, are the lowest.

    Args:
        root (`torch.LongTensor` of shape `(B, 1)`): Target id of the newest committed token.
        token_ids (`torch.LongTensor` of shape `(B, M)`): Target ids of the candidates, parents before children.
        parents (`torch.LongTensor` of shape `(B, M)`): Index of the parent among them; -1 is the root.
        scores (`torch.Tensor` of shape `(B, M)`): Log-probability of the path to each, fp32.
        num_nodes (`int`): Candidates that are kept, at most.
        max_depth (`int`, *optional*): Depth of the deepest candidate.
    """
    is_supported = scores.dtype == torch.float32 and scores.shape[1] <= MOST_CANDIDATES
    if is_supported and runs_on_triton(scores, 1 + min(num_nodes, scores.shape[1])):
        from .tree_triton import build

        return build(root, token_ids, parents, scores, num_nodes, max_depth)
    return build_by_definition(root, token_ids, parents, scores, num_nodes, max_depth)


def build_by_definition(
    root: Tensor, token_ids: Tensor, parents: Tensor, scores: Tensor, num_nodes: int, max_depth: int | None = None
) -> DraftTree:
    """As [`build_tree`]."""
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)  # NaN would come before all others
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :num_nodes]
    kept, preferred = best.sort(dim=1)  # (B, N - 1)
    parents = parents.gather(1, kept)
    parents = torch.where(parents < 0, 0, torch.searchsorted(kept, parents) + 1)
    return DraftTree(
        torch.cat([root, token_ids.gather(1, kept)], dim=1),
        torch.cat([torch.zeros_like(root), parents], dim=1),
        max_depth=max_depth,
        preferred=preferred,
    )
