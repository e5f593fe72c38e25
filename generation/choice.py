"""Choice: the target's own token after each node of a tree, and how far every sequence can go with it.

A sequence walks from the root to the child that holds the target's choice, as long as there is one. Where processors
look at scores alone, the target chooses at all nodes at once, and the walk is one comparison: a node is reached if
every node on its path holds the choice made at its parent. Where they look at the text, it is taken step by step.

Shapes: B batch, T tokens, N nodes, P nodes on the longest possible path, M nodes with scores, V the target's
vocabulary.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from .kernels import HALF_PRECISION
from .sampling import choose_token, is_distribution
from .tree import DraftTree


@dataclass(frozen=True)
class Walk:
    """
    The way of each sequence through its tree. What stands beyond a sequence's `num_steps` means nothing.

    Args:
        path (`torch.LongTensor` of shape `(B, P)`): The nodes, root first.
        tokens (`torch.LongTensor` of shape `(B, P)`): The target's choice after each.
        num_steps (`torch.LongTensor` of shape `(B,)`): How many nodes were reached, at least the root.
        processed (`torch.Tensor` of shape `(B, M, V)`, *optional*): Processed scores, of all nodes or of the path
            alone; `None` where nobody looks at them.
        places (`torch.LongTensor` of shape `(B, P)`): Where among them those of the path are.
    """

    path: Tensor
    tokens: Tensor
    num_steps: Tensor
    processed: Tensor | None
    places: Tensor

    @cached_property
    def scores(self) -> Tensor:
        """The processed scores along the path, `(B, P, V)`."""
        return self.processed.gather(1, self.places[..., None].expand(-1, -1, self.processed.shape[-1]))

    @cached_property
    def is_valid(self) -> Tensor:
        """Whether they are a distribution, bool `(B, P)`."""
        return is_distribution(self.scores)


def walk_at_once(
    tree: DraftTree, logits: Tensor, warpers: LogitsProcessorList, noise: Tensor | None, pads: Tensor
) -> Walk:
    """
    Chooses at all nodes, then looks which of them are reached; nothing is asked of the device.

    Args:
        tree ([`DraftTree`]): Any trees.
        logits (`torch.Tensor` of shape `(B, N, V)`): The target's, after each node.
        warpers (`LogitsProcessorList`): Processors that look at scores alone.
        noise (`torch.Tensor` of shape `(B, P, V)`, *optional*): Of each depth; `None` means greedy.
        pads (`torch.LongTensor` of shape `(B,)`): The token that a sequence gets whatever the target says, or -1.
    """
    scores, tokens = choose_at_once(tree, logits, warpers, noise)
    return walk_along(tree, torch.where(pads[:, None] >= 0, pads[:, None], tokens), scores)


def choose_at_once(
    tree: DraftTree, logits: Tensor, warpers: LogitsProcessorList, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The processed scores `(B, N, V)` and the token that is chosen `(B, N)` at all nodes; see [`walk_at_once`]."""
    batch_size, num_nodes, vocab_size = logits.shape
    scores = logits.flatten(0, 1)  # (B * N, V)
    # Best tokens are the same in half precision, not so in float64: what it tells apart may be equal in `generate()`.
    if len(warpers) > 0 or noise is not None or logits.dtype not in HALF_PRECISION:
        scores = warpers(None, scores.float())
    if noise is not None:
        rows = torch.arange(batch_size, device=logits.device)[:, None]
        noise = noise[rows, tree.depths].flatten(0, 1)
    tokens = choose_token(scores, noise).view(batch_size, num_nodes)
    return scores.view(batch_size, num_nodes, vocab_size), tokens


def walk_along(tree: DraftTree, tokens: Tensor, scores: Tensor | None) -> Walk:
    """How far each sequence comes with the `tokens (B, N)` that were chosen, from `scores (B, N, V)`."""
    is_chosen = tree.token_ids == tokens.gather(1, tree.parents)
    is_chosen[:, 0] = True
    if tree.is_chain:
        is_reached = is_chosen.cumprod(dim=1).bool()
    else:
        is_reached = ~(tree.attends & ~is_chosen[:, None]).any(dim=-1)
    path = (~is_reached).int().sort(dim=1, stable=True).indices[:, : tree.deepest + 1]
    return Walk(path, tokens.gather(1, path), is_reached.sum(dim=1), scores, places=path)


def limit_walk(
    walk: Walk,
    num_tokens: Tensor,
    room: Tensor,
    eos_token_ids: Tensor | None,
    is_frozen: Tensor,
    is_sampled: bool,
) -> tuple[Tensor, Tensor]:
    """
    How many of its chosen tokens each sequence gets: none after the one that ends it.

    Args:
        walk ([`Walk`]): How far each could go.
        num_tokens (`torch.LongTensor` of shape `(B,)`): Tokens of each before.
        room (`torch.LongTensor` of shape `(B,)`): How many each may still get.
        eos_token_ids (`torch.LongTensor`, *optional*): Tokens that end a sequence.
        is_frozen (`torch.BoolTensor` of shape `(B,)`): The sequences that have ended; they follow the furthest one.
        is_sampled (`bool`): Whether a choice needs scores that are a distribution.

    Returns:
        How many each gets, `(B,)`, and whether the last of them ends it, bool `(B,)`.
    """
    longest = walk.path.shape[1]
    ends = torch.zeros_like(walk.tokens, dtype=torch.bool)
    if eos_token_ids is not None:
        ends = torch.isin(walk.tokens, eos_token_ids) & ~is_frozen[:, None]
    num_new = torch.minimum(walk.num_steps, room)
    num_new = torch.minimum(num_new, first_true(ends, longest - 1) + 1)
    if is_sampled:
        num_new = torch.minimum(num_new, first_true(~walk.is_valid, longest))
    furthest = (num_tokens + num_new.masked_fill(is_frozen, 0)).max()
    num_new = torch.where(is_frozen, torch.minimum(num_new, furthest - num_tokens), num_new)
    has_ended = ends.gather(1, (num_new - 1).clamp(min=0)[:, None])[:, 0] & (num_new > 0)
    return num_new, has_ended


def first_true(is_true: Tensor, otherwise: int) -> Tensor:
    """Index of the first true entry of each row of `(B, P)`."""
    return torch.where(is_true.any(dim=1), is_true.int().argmax(dim=1), otherwise)


def report_walk(tree: DraftTree, walk: Walk, num_new: Tensor, has_ended: Tensor) -> Tensor:
    """
    What the host has to know of a round, in one tensor, `(B, 4 + 2P)`.

    The columns: how many tokens each sequence gets; whether the last one ends it; how many of them had been drafted;
    after how many something had been drafted; the tokens; to each of the path, how many nodes the draft had preferred.
    """
    steps = torch.arange(walk.path.shape[1], device=num_new.device)
    num_tried = (tree.has_children.gather(1, walk.path) & (steps < num_new[:, None])).sum(dim=1)
    num_drafted = torch.minimum(num_new, walk.num_steps - 1)
    counts = torch.stack([num_new, has_ended.long(), num_drafted, num_tried], dim=1)
    return torch.cat([counts, walk.tokens, tree.ranks.gather(1, walk.path)], dim=1)


def walk_step_by_step(
    tree: DraftTree,
    logits: Tensor,
    logits_processor: LogitsProcessorList,
    noise: Tensor | None,
    pads: Tensor,
    ids: Tensor,
    num_tokens: list[int],
) -> Walk:
    """
    Chooses along the path alone, with processors that look at the text.

    Args:
        tree, logits, noise, pads: As for [`walk_at_once`].
        logits_processor (`LogitsProcessorList`): Any that keep nothing from one call to the next.
        ids (`torch.LongTensor` of shape `(B, T)`): Each sequence's tokens, from the first column on.
        num_tokens (`list[int]`): How many there are of each.
    """
    rows, lengths = torch.arange(len(ids), device=ids.device), torch.tensor(num_tokens, device=ids.device)
    nodes, is_walking, num_steps = torch.zeros_like(rows), torch.ones_like(rows, dtype=torch.bool), 0
    ids = torch.cat([ids, ids.new_zeros(len(ids), tree.deepest + 1)], dim=1)
    path, tokens, scores = [], [], []
    while len(path) <= tree.deepest and (not path or bool(is_walking.any())):
        path.append(nodes)
        num_steps = num_steps + is_walking
        current = [count + len(tokens) for count in num_tokens]
        scores.append(process_by_length(logits_processor, ids, current, logits[rows, nodes]))
        chosen = choose_token(scores[-1], None if noise is None else noise[:, len(tokens)])
        tokens.append(torch.where(pads >= 0, pads, chosen))
        ids[rows, lengths + len(tokens) - 1] = tokens[-1]
        has_child, nodes = tree.children(nodes, tokens[-1])
        is_walking = is_walking & has_child
    path, tokens, scores = (torch.stack(each, dim=1) for each in (path, tokens, scores))
    return Walk(
        path, tokens, num_steps, scores, places=torch.arange(path.shape[1], device=path.device).expand_as(path)
    )


def process_by_length(
    logits_processor: LogitsProcessorList, ids: Tensor, num_tokens: list[int], logits: Tensor
) -> Tensor:
    """
    Processes `logits (B, V)` with texts of different lengths: one call for each length.

    A processor may know the rows of the batch, so every call has all of them; those of another length stand there
    with the text of one that has this length, and what comes out for them is not used.
    """
    scores = torch.empty_like(logits)
    for length in sorted(set(num_tokens)):
        own = [row for row, count in enumerate(num_tokens) if count == length]
        shown = torch.tensor([row if count == length else own[0] for row, count in enumerate(num_tokens)])
        shown = shown.to(ids.device)
        scores[own] = logits_processor(ids[shown, :length], logits[shown])[own]
    return scores
