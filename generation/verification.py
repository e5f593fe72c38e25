"""Verification: the target reads all nodes of a tree at once and chooses its own token after each accepted one.

The walk starts at the root. At each node the target's choice is appended to the text; the walk goes to the child that
holds this token as long as there is one. So every emitted token is the target's own, whatever was drafted.

Shapes: B batch (1), T committed tokens, N nodes, V the target's vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .branching import branching_inputs
from .transcript import Transcript
from .tree import DraftTree


@dataclass(frozen=True)
class Verdict:
    """
    What the target decided about one tree.

    Args:
        path (`list[int]`): The nodes after which a token was emitted, root included.
        num_accepted (`int`): How many of the emitted tokens had been drafted.
        num_tried (`int`): After how many of these nodes something had been drafted.
    """

    path: list[int]
    num_accepted: int
    num_tried: int


def read_tree(target: PreTrainedModel, tree: DraftTree, transcript: Transcript, model_kwargs: dict) -> tuple:
    """
    One forward of the target over a tree, appended to its cache.

    A chain needs no mask of its own: causal attention is what its nodes see of each other.

    Args:
        target (`PreTrainedModel`): The target.
        tree ([`DraftTree`]): The root and its proposals.
        transcript ([`Transcript`]): The text up to and including the root.
        model_kwargs (`dict`): The target's generation state, the root's position included.

    Returns:
        The target's output, and logits `(N, V)` in fp32 on the text's device.
    """
    num_nodes = len(tree)
    candidate_ids = torch.cat([transcript.input_ids, tree.token_ids[None, 1:]], dim=-1)  # (1, T + N - 1)
    inputs = target.prepare_inputs_for_generation(
        candidate_ids, next_sequence_length=num_nodes, **extend_inputs(model_kwargs, num_nodes - 1)
    )
    if not tree.is_chain:
        inputs |= branching_inputs(target, tree, inputs, model_kwargs)
    if "logits_to_keep" in inputs:
        inputs["logits_to_keep"] = num_nodes
    outputs = target(**inputs, return_dict=True)
    logits = outputs.logits[0, -num_nodes:]
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
    Walks from the root to the child that holds the target's choice, as long as there is one.

    Args:
        tree ([`DraftTree`]): Any tree.
        logits (`torch.Tensor` of shape `(N, V)`): The target's, after each node.
        transcript ([`Transcript`]): The text up to and including the root.

    Returns:
        [`Verdict`]

    **Effects**: appends the target's choices to `transcript`, up to the one that ends the text.
    """
    children = tree.children()
    parents = {parent for parent, _ in children}
    path, num_accepted = [], 0
    node = 0
    while node is not None:
        path.append(node)
        token = transcript.extend(logits[node : node + 1])
        child = children.get((node, token))
        num_accepted += child is not None
        node = None if transcript.is_finished else child
    return Verdict(path, num_accepted, num_tried=len(parents.intersection(path)))
