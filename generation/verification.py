"""Verification: the target reads all nodes of a tree at once and chooses its own token after each accepted one.

The walk starts at the roots. At each node the target's choice is appended to the text; the walk goes to the child that
holds this token as long as there is one. So every emitted token is the target's own, whatever was drafted.

The sequences of a batch walk in step, each in its own tree: the round ends for all with the first one whose choice was
not drafted.

Shapes: B batch, T committed tokens, N nodes, P nodes on a path, V the target's vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .branching import branching_inputs
from .sampling import Noise
from .transcript import Transcript
from .tree import DraftTree


@dataclass(frozen=True)
class Walks:
    """
    How far the sequences came that were not finished before the round; a number for each.

    Args:
        num_emitted (`list[int]`): Tokens emitted, none of them padding.
        num_accepted (`list[int]`): How many of the emitted tokens had been drafted.
        num_tried (`list[int]`): After how many of these nodes something had been drafted.
        ranks (`list[list[int]]`): Of the accepted nodes of each, how many nodes of its tree had been preferred.
    """

    num_emitted: list[int]
    num_accepted: list[int]
    num_tried: list[int]
    ranks: list[list[int]]


@dataclass(frozen=True)
class Verdict:
    """
    What the target decided about the trees of one round.

    Args:
        path (`torch.LongTensor` of shape `(B, P)`): The nodes after which a token was emitted, root first.
        tokens (`torch.LongTensor` of shape `(B, P)`): These tokens.
        walks ([`Walks`]): How far each sequence came, padding not counted.
        lengths (`list[int]`): Where in the cache each sequence goes on.
        num_kept (`list[int]`): How much of its path each sequence keeps.
    """

    path: Tensor
    tokens: Tensor
    walks: Walks
    lengths: list[int]
    num_kept: list[int]


def read_tree(
    target: PreTrainedModel,
    tree: DraftTree,
    ids: Tensor,
    model_kwargs: dict,
    lengths: list[int] | None = None,
    max_length: int | None = None,
) -> tuple:
    """
    One forward of the target over the trees, appended to its cache.

    A chain needs no mask of its own: causal attention is what its nodes see of each other, unless sequences differ in
    length.

    Args:
        target (`PreTrainedModel`): The target.
        tree ([`DraftTree`]): The roots and their proposals.
        ids (`torch.LongTensor` of shape `(B, T)`): The texts, with the root of the longest.
        model_kwargs (`dict`): The target's generation state, that root's position included.
        lengths (`list[int]`, *optional*): Tokens of each sequence in the cache; `None`: all have as many.
        max_length (`int`, *optional*): Tokens that a sequence may have in the end, in the cache or not.

    Returns:
        The target's output, and logits `(B, N, V)` in fp32 on the text's device.
    """
    num_nodes = len(tree)
    candidate_ids = torch.cat([ids[:, :-1], tree.token_ids], dim=-1)  # (B, T + N - 1)
    inputs = target.prepare_inputs_for_generation(
        candidate_ids, next_sequence_length=num_nodes, **extend_inputs(model_kwargs, num_nodes - 1)
    )
    if not tree.is_chain or lengths is not None:
        inputs |= branching_inputs(target, tree, inputs, model_kwargs, lengths, max_length)
    if "logits_to_keep" in inputs:
        inputs["logits_to_keep"] = num_nodes
    outputs = target(**inputs, return_dict=True)
    logits = outputs.logits[:, -num_nodes:]
    return outputs, logits.to(dtype=torch.float32, device=candidate_ids.device, copy=True)


def extend_inputs(model_kwargs: dict, num_tokens: int) -> dict:
    """The target's inputs per position, continued by `num_tokens` positions of plain text."""
    extended = dict(model_kwargs)
    if (mask := model_kwargs.get("attention_mask")) is not None:
        extended["attention_mask"] = torch.cat([mask, mask.new_ones((mask.shape[0], num_tokens))], dim=-1)
    if (positions := model_kwargs.get("position_ids")) is not None:
        following = positions[..., -1:] + torch.arange(1, num_tokens + 1, device=positions.device)
        extended["position_ids"] = torch.cat([positions, following], dim=-1)
    if (types := model_kwargs.get("token_type_ids")) is not None:
        extended["token_type_ids"] = torch.cat([types, types[..., -1:].expand(*types.shape[:-1], num_tokens)], dim=-1)
    if (types := model_kwargs.get("mm_token_type_ids")) is not None:
        extended["mm_token_type_ids"] = torch.cat([types, types.new_zeros((*types.shape[:-1], num_tokens))], dim=-1)
    return extended


def accept_path(tree: DraftTree, logits: Tensor, transcript: Transcript) -> Verdict:
    """
    Walks from the roots to the children that hold the target's choices, as long as every sequence has one.

    Args:
        tree ([`DraftTree`]): Any trees; those of frozen sequences are chains of padding.
        logits (`torch.Tensor` of shape `(B, N, V)`): The target's, after each node.
        transcript ([`Transcript`]): The text up to and including the roots.

    Returns:
        [`Verdict`]

    **Effects**: appends the target's choices to `transcript`, up to those that end the text.
    """
    rows, nodes = torch.arange(len(logits), device=logits.device), logits.new_zeros(len(logits), dtype=torch.long)
    path, tokens, is_emitted, is_accepted = [], [], [], []
    num_read, goes_on = transcript.num_slots - 1, True
    while goes_on:
        path.append(nodes)
        is_emitted.append(~transcript.is_frozen)
        tokens.append(transcript.extend(logits[rows, nodes]))
        has_child, nodes = tree.children(nodes, tokens[-1])
        is_accepted.append(has_child)
        goes_on = not transcript.is_finished and bool(has_child.all())
    path, tokens, is_emitted = (torch.stack(each, dim=1) for each in (path, tokens, is_emitted))  # (B, P)
    is_accepted = torch.stack(is_accepted, dim=1) & is_emitted
    is_tried = tree.has_children.gather(1, path) & is_emitted
    counts = torch.stack([each.sum(dim=1) for each in (is_emitted, is_accepted, is_tried)], dim=1)
    rows = torch.cat([counts, tree.ranks.gather(1, path)], dim=1)[is_emitted[:, 0]].tolist()
    num_emitted, num_accepted, num_tried = (list(column) for column in list(zip(*rows, strict=True))[:3])
    ranks = [row[4 : 4 + row[1]] for row in rows]  # without the root's
    batch_size, num_steps = path.shape
    walks = Walks(num_emitted, num_accepted, num_tried, ranks)
    return Verdict(path, tokens, walks, [num_read] * batch_size, [num_steps] * batch_size)


class TextsInStep:
    """
    The texts of a batch that always have the same length: any processor, criterion and target will do.

    Args:
        transcript ([`Transcript`]): With the first new token.
    """

    lengths = None
    num_discarded = 0

    def __init__(self, transcript: Transcript):
        self.transcript = transcript

    @property
    def ids(self) -> Tensor:
        """The texts `(B, T)`."""
        return self.transcript.input_ids

    @property
    def noise(self) -> Noise | None:
        """Noise of the coming tokens."""
        return self.transcript.noise

    def fit(self, tree: DraftTree, depth: int) -> DraftTree:
        """`tree`, and a chain of padding, `depth` deep, for the sequences that are finished."""
        if not self.transcript.freezes or len(self.ids) == 1:
            return tree
        return tree.with_pads(self.transcript.is_frozen, self.transcript.pad_token_id, depth)

    def accept(self, tree: DraftTree, logits: Tensor) -> Verdict:
        """See [`accept_path`]."""
        return accept_path(tree, logits, self.transcript)
