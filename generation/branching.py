"""Branches in the target's forward: masks and positions with which one forward reads a whole tree.

A node stands where it would stand if its path were the text: at the root's position plus its depth. It sees the
committed tokens and its own ancestors, in a sliding-window layer those that are within the window of its position.

Not every target takes such a mask, and few say so: `probing.py` tries it.

Shapes: B batch, N nodes, T committed tokens in the cache, K keys of a layer.
"""

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from .memory import additive_mask
from .tree import DraftTree


def branching_inputs(
    target: PreTrainedModel,
    tree: DraftTree,
    inputs: dict,
    model_kwargs: dict,
    lengths: list[int] | None = None,
    max_length: int | None = None,
) -> dict:
    """
    The inputs of a forward over `tree` that differ from those of a chain.

    Args:
        target (`PreTrainedModel`): The target.
        tree ([`DraftTree`]): Any tree.
        inputs (`dict`): What the target would get if the nodes were one chain.
        model_kwargs (`dict`): The target's generation state, with the cache and the 2D mask of the committed tokens.
        lengths (`list[int]`, *optional*): Slots of the cache that hold each sequence's tokens, the first ones; `None`:
            all of them.
        max_length (`int`, *optional*): No node needs a place beyond so many tokens.

    Returns:
        `dict`: `attention_mask`, additive and 4D, one for each kind of layer where there are several, and
        `position_ids`.
    """
    cache, mask = model_kwargs["past_key_values"], model_kwargs.get("attention_mask")
    num_committed = cache.get_seq_length()
    is_token = torch.ones(len(tree.token_ids), num_committed, dtype=torch.bool, device=tree.token_ids.device)
    if mask is not None:
        is_token = mask[:, :num_committed].to(is_token)
    slots = num_committed + tree.depths
    if lengths is not None:
        lengths = torch.tensor(lengths, device=is_token.device)[:, None]
        is_token = is_token & (torch.arange(num_committed, device=is_token.device) < lengths)
        slots = (lengths + tree.depths).clamp(max=max_length - 1)
    # The inputs' first position is that of the first new slot.
    positions = inputs["position_ids"][..., :1] + (slots - num_committed).to(inputs["position_ids"].device)
    return {"attention_mask": tree_masks(target, cache, tree, is_token, slots), "position_ids": positions}


def tree_masks(
    target: PreTrainedModel, cache: Cache, tree: DraftTree, is_token: Tensor, slots: Tensor
) -> Tensor | dict[str, Tensor]:
    """One mask `(B, 1, N, K)`, or one for each of the target's layer types."""
    config = target.config.get_text_config(decoder=True)
    kinds, masks = layer_kinds(config), {}
    for kind in dict.fromkeys(kinds):
        layer = cache.layers[kinds.index(kind)]
        masks[kind] = tree_mask(layer, window_of(layer, kind, config), tree, is_token, slots, target.dtype)
    return masks if len(masks) > 1 else next(iter(masks.values()))


def layer_kinds(config) -> list[str]:
    """The kind of each layer, by which transformers chooses its mask; one and the same where there is one for all."""
    return getattr(config, "layer_types", None) or ["the only one"] * config.num_hidden_layers


def window_of(layer, kind: str, config) -> int | None:
    """The sliding window of a kind of layers, also where the cache was made without knowing of it."""
    if layer.is_sliding:
        return layer.sliding_window
    return None if kind == "full_attention" else getattr(config, "sliding_window", None)


def tree_mask(
    layer, window: int | None, tree: DraftTree, is_token: Tensor, slots: Tensor, dtype: torch.dtype
) -> Tensor:
    """
    Who sees which key of a cache layer, `(B, 1, N, K)`, added to the scores.

    Args:
        layer (`CacheLayerMixin`): Before the nodes are appended.
        window (`int`, *optional*): How many tokens are seen, itself included; `None`: all.
        tree ([`DraftTree`]): Any tree.
        is_token (`torch.BoolTensor` of shape `(B, T)`): Whether a slot of the cache holds a token of its sequence.
        slots (`torch.LongTensor` of shape `(B, N)`): Where each node would stand if its path were the text.
        dtype (`torch.dtype`): Of the mask.
    """
    num_keys, first_key = layer.get_mask_sizes(len(tree))
    sees = torch.cat([is_token[:, None].expand(-1, len(tree), -1), tree.attends], dim=2)  # (B, N, T + N)
    if window is not None:
        committed = torch.arange(is_token.shape[1], device=slots.device).expand_as(is_token)
        key_slots = torch.cat([committed, slots], dim=1)
        sees &= slots[..., None] - key_slots[:, None] < window
    return additive_mask(sees[..., first_key : first_key + num_keys], dtype)
