"""The steps that sequences take at fixed shapes, once the target has chosen a token at every node.

Where they lead is in `choice.py`: as far as the tree holds the choices and the text may go on. On a GPU all of it is
one Triton kernel, unless the choices were drawn: then there is more to look at.

Shapes: B batch, N nodes, P nodes on the longest path, E tokens, V the target's vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .choice import limit_walk, report_walk, walk_along
from .kernels import can_run_kernels
from .tree import DraftTree

# One program holds the nodes of all sequences, and compares each token with all that end a sequence.
MOST_PLACES = 4096
MOST_ENDS = 32


@dataclass(frozen=True)
class Standing:
    """
    How far the sequences have come, and how they end.

    Args:
        lengths (`torch.LongTensor` of shape `(B,)`): Tokens of each before the root.
        limit (`torch.LongTensor` of shape `()`): How many they may have in the end.
        is_frozen (`torch.BoolTensor` of shape `(B,)`): The sequences that have ended; they follow the furthest one.
        eos_token_ids (`torch.LongTensor` of shape `(E,)`, *optional*): Tokens that end a sequence.
        pad_token_id (`torch.LongTensor` of shape `()`, *optional*): What frozen ones get whatever the target says;
            `None`: none becomes frozen.
    """

    lengths: Tensor
    limit: Tensor
    is_frozen: Tensor
    eos_token_ids: Tensor | None
    pad_token_id: Tensor | None


@dataclass(frozen=True)
class Steps:
    """
    What is taken. Of `path` and `tokens` that is what the first `num_new` columns say; the others hold any nodes, and
    the choices there.

    Args:
        path (`torch.LongTensor` of shape `(B, P)`): The nodes, root first.
        tokens (`torch.LongTensor` of shape `(B, P)`): The token after each.
        num_new (`torch.LongTensor` of shape `(B,)`): How many tokens each sequence gets.
    """

    path: Tensor
    tokens: Tensor
    num_new: Tensor


def take_steps(
    tree: DraftTree, choices: Tensor, standing: Standing, steps: Steps, scores: Tensor | None = None
) -> Tensor:
    """
    Lets every sequence go as far as its own tree holds the target's choices.

    Args:
        tree ([`DraftTree`]): Trees in which no two children of a node hold the choice after it.
        choices (`torch.LongTensor` of shape `(B, N)`): The target's, after each node.
        standing ([`Standing`]): Of the sequences.
        steps ([`Steps`]): Where to put what is taken.
        scores (`torch.Tensor` of shape `(B, N, V)`, *optional*): Those from which choices were drawn; `None`: greedy.

    Returns:
        What `report_walk` says of it, `(B, 4 + 2P)`; of nodes and tokens that are not taken it says anything.

    **Effects**: overwrites `steps`, and freezes the sequences that end.
    """
    if scores is not None or not runs_on_triton(tree, standing):
        return take_by_definition(tree, choices, standing, steps, scores)
    from .steps_triton import take

    return take(tree, choices, standing, steps)


def runs_on_triton(tree: DraftTree, standing: Standing) -> bool:
    num_ends = 0 if standing.eos_token_ids is None else standing.eos_token_ids.numel()
    is_supported = tree.token_ids.is_cuda and num_ends <= MOST_ENDS
    return is_supported and block_size(tree) <= MOST_PLACES and can_run_kernels(tree.token_ids.device)


def block_size(tree: DraftTree) -> int:
    """Nodes of all sequences, both counts rounded up to powers of two."""
    num_rows, num_nodes = tree.token_ids.shape
    return 1 << ((num_rows - 1).bit_length() + (num_nodes - 1).bit_length())


def take_by_definition(
    tree: DraftTree, choices: Tensor, standing: Standing, steps: Steps, scores: Tensor | None = None
) -> Tensor:
    """As [`take_steps`]."""
    if standing.pad_token_id is not None:
        choices = torch.where(standing.is_frozen[:, None], standing.pad_token_id, choices)
    walk, num_tokens = walk_along(tree, choices, scores), standing.lengths + 1
    room, is_sampled = standing.limit - num_tokens, scores is not None
    num_new, has_ended = limit_walk(walk, num_tokens, room, standing.eos_token_ids, standing.is_frozen, is_sampled)
    for taken, value in zip((steps.path, steps.tokens, steps.num_new), (walk.path, walk.tokens, num_new), strict=True):
        taken.copy_(value)
    if standing.pad_token_id is not None:
        standing.is_frozen.logical_or_(has_ended)
    return report_walk(tree, walk, num_new, has_ended)
