"""Branches in the target's forward: masks and positions with which one forward reads a whole tree.

A node stands where it would stand if its path were the text: at the root's position plus its depth. It sees the
committed tokens and its own ancestors, in a sliding-window layer those that are within the window of its position.

Not every target takes such a mask (FlashAttention has none, ALiBi reads positions off a 2D mask), and none says so:
`can_branch` tries it on four tokens.

Shapes: B batch, N nodes, T committed tokens in the cache, K keys of a layer.
"""

import logging
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from .memory import additive_mask
from .tree import DraftTree

logger = logging.getLogger(__name__)

LAYER_TYPES = {"full_attention", "sliding_attention"}
# Of the difference that a causal mask would make: rounding is far below, a mask that is not obeyed above.
TOLERATED_SHARE = {torch.float64: 1e-3, torch.float32: 1e-3}
TOLERATED_SHARE_IN_HALF_PRECISION = 0.1
_known_targets: WeakKeyDictionary[PreTrainedModel, dict] = WeakKeyDictionary()


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
    layer_types = getattr(config, "layer_types", None) or ["the only one"]
    masks = {}
    for kind in dict.fromkeys(layer_types):
        layer = cache.layers[layer_types.index(kind)]
        masks[kind] = tree_mask(layer, window_of(layer, kind, config), tree, is_token, slots, target.dtype)
    return masks if len(masks) > 1 else next(iter(masks.values()))


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


def can_branch(target: PreTrainedModel) -> bool:
    """
    Whether `target` reads a tree as it reads each of its paths; tried once and remembered.

    **Effects**: calls the target; where it cannot, the log says so, with the reason.
    """
    known = _known_targets.setdefault(target, {})
    settings = target.config._attn_implementation, target.dtype, target.training
    if settings not in known:
        known[settings] = reason = _why_not(target)
        if reason is not None:
            logger.warning("%s cannot read draft trees, chains are drafted: %s", type(target).__name__, reason)
    return known[settings] is None


@torch.no_grad()
def _why_not(target: PreTrainedModel) -> str | None:
    """Why `target` cannot read trees; `None` if it can."""
    config = target.config.get_text_config(decoder=True)
    # GPT-Neo calls them otherwise, and cuts its windows behind the mask, by places in the cache.
    layer_types = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or []
    if not LAYER_TYPES.issuperset(layer_types):
        return f"its layers are of the types {sorted(set(layer_types))}, known are {sorted(LAYER_TYPES)}"
    if target.training:
        return "it is in training mode"
    try:
        tokens = torch.arange(7, device=target.get_input_embeddings().weight.device)
        prompt, root, first, second, third = tokens[:3], *tokens[3:].split(1)
        tree = DraftTree(tokens[None, 3:], parents=torch.tensor([[0, 0, 0, 1]], device=tokens.device))
        branched = _read(target, prompt, tokens[3:], tree)
        causal = _read(target, prompt, tokens[3:], None)
        paths = [_read(target, prompt, torch.cat(path), None) for path in ([root, first, third], [root, second])]
    except Exception as error:  # whatever a target raises for a mask that it does not take
        return f"{type(error).__name__}: {error}"
    expected = torch.stack([*paths[0][:2], paths[1][1], paths[0][2]])
    error, mistake = (expected - branched).abs().max(), (expected - causal).abs().max()
    tolerated = TOLERATED_SHARE.get(target.dtype, TOLERATED_SHARE_IN_HALF_PRECISION)
    return None if error <= tolerated * mistake else "it does not obey the mask of a tree"


def _read(target: PreTrainedModel, prompt: Tensor, token_ids: Tensor, tree: DraftTree | None) -> Tensor:
    """The target's logits `(N, V)` of a chain or a tree after `prompt`, in fp32."""
    cache = DynamicCache(config=target.config)
    mask = torch.ones(1, len(prompt), dtype=torch.long, device=prompt.device)
    mask[:, 0] = 0  # padding: some targets (GIT) read a 2D mask otherwise than a 4D one
    target(input_ids=prompt[None], attention_mask=mask, past_key_values=cache, use_cache=True)
    position_ids = len(prompt) + torch.arange(len(token_ids), device=prompt.device)[None]
    read_mask = torch.cat([mask, mask.new_ones(1, len(token_ids))], dim=1)
    inputs = {"position_ids": position_ids, "attention_mask": read_mask}
    if tree is not None:
        inputs |= branching_inputs(target, tree, inputs, {"past_key_values": cache, "attention_mask": mask})
    return target(input_ids=token_ids[None], past_key_values=cache, use_cache=True, **inputs).logits[0].float()
