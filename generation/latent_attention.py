"""Attention of a few new rows to a cache of latents, as drafting needs it at every depth of a tree.

The latents are keys and values at once: they are never expanded in memory. Both forms of RoPE are here:

    decoupled (R > 0)   score = (W_uk^T q_nope) . c_j + q_rope . k_rope_j   W_uk moves into the query
    rotated (R = 0)     score = q . RoPE(W_uk c_j, position_j)              keys are made again where they are read

and both return W_uv sum_j p_j c_j. On a GPU kernels do it (`latent_attention_triton.py`); elsewhere the definition
below does.

Of a sequence's slots the first `length` are held. The last S of these may be drafted slots, of which each row sees its
own; every row sees all slots before them, from the first one behind the padding on. Lengths are read on the device,
so that a CUDA graph that was captured once serves a growing cache.

Shapes: B batch, W new rows, T slots of the cache (its capacity), S drafted slots, H heads, G key-value heads, d head
width, C latent, R decoupled RoPE.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import logging

from .kernels import HALF_PRECISION, can_run_kernels

logger = logging.get_logger(__name__)

# Shared memory of a multiprocessor of an H100, and the sizes that were checked against it.
MIN_SHARED_MEMORY = 228 * 1024
MAX_LATENT_DIM, MAX_KEY_DIM = 512, 128


@dataclass(frozen=True)
class UpProjections:
    """
    How keys and values are made from latents.

    Args:
        w_uk (`torch.Tensor` of shape `(G, d, C)`), w_uv (`torch.Tensor` of shape `(G, d, C)`): Of keys and of values.
        inv_freq (`torch.Tensor` of shape `(d / 2,)`, *optional*): Frequencies of RoPE, float32; needed where R = 0.
        attention_scaling (`float`, *optional*, defaults to 1.0): Factor on cosines and sines where R = 0.
    """

    w_uk: Tensor
    w_uv: Tensor
    inv_freq: Tensor | None = None
    attention_scaling: float = 1.0


@dataclass(frozen=True)
class DraftedSlots:
    """
    The last S of the slots that are held.

    Args:
        sees (`torch.Tensor` of shape `(B, W, S)`): Which of them each new row sees, bool or int8.
        positions (`torch.Tensor` of shape `(B, S)`, *optional*): Their RoPE positions, int32; needed where R = 0.
    """

    sees: Tensor
    positions: Tensor | None = None


def attend_latents(
    query: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    projections: UpProjections,
    lengths: Tensor,
    scaling: float,
    drafted: DraftedSlots | None = None,
    first_slots: Tensor | None = None,
) -> Tensor:
    """
    Attention of new rows to cached latents.

    Args:
        query (`torch.Tensor` of shape `(B, H, W, d + R)`): `[q_nope; q_rope]`; where R = 0, the rotated query.
        c_kv (`torch.Tensor` of shape `(B, 1, T, C)`): Latents; what lies beyond a sequence's length is not read.
        k_rope (`torch.Tensor` of shape `(B, 1, T, R)`): Rotated keys.
        projections ([`UpProjections`]): Of the latents.
        lengths (`torch.Tensor` of shape `(B,)`): Slots that each sequence holds, drafted ones included, int32; what is
            beyond T counts as T.
        scaling (`float`): Factor of the scores, positive.
        drafted ([`DraftedSlots`], *optional*): The last slots; `None`: every row sees all slots.
        first_slots (`torch.Tensor` of shape `(B,)`, *optional*): Those behind the padding, of RoPE position 0, int32.

    Returns:
        `torch.Tensor` of shape `(B, H, W, d)`: Weighted sums of values; zeros for a row that sees nothing.

    Raises:
        ValueError: Where shapes or types do not fit together.
    """
    check_inputs(query, c_kv, k_rope, projections, lengths, drafted, first_slots)
    attend = _triton().attend if runs_on_triton(query, c_kv, k_rope) else attend_by_definition
    return attend(query, c_kv, k_rope, projections, lengths, scaling, drafted, first_slots)


def attend_by_definition(
    query: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    projections: UpProjections,
    lengths: Tensor,
    scaling: float,
    drafted: DraftedSlots | None = None,
    first_slots: Tensor | None = None,
) -> Tensor:
    """`attend_latents`, written out over all T slots, in float32 or wider."""
    slots = torch.arange(c_kv.shape[2], device=c_kv.device)
    lengths = lengths.clamp(max=len(slots))  # before drafted slots are counted from the end
    first_slots = torch.zeros_like(lengths) if first_slots is None else first_slots
    is_held = (slots >= first_slots[:, None]) & (slots < lengths[:, None])  # (B, T)
    dtype = torch.promote_types(query.dtype, torch.float32)
    # Slots that are not held may contain anything, which would survive a weight of zero.
    latents, ropes = (part[:, 0].to(dtype).masked_fill(~is_held[..., None], 0) for part in (c_kv, k_rope))
    w_uk, w_uv = projections.w_uk.to(dtype), projections.w_uv.to(dtype)
    grouped = query.to(dtype).unflatten(1, (w_uk.shape[0], -1))  # (B, G, H / G, W, d + R)
    if k_rope.shape[-1] == 0:
        keys = rotated_keys(projections, latents, slot_positions(slots, lengths, first_slots, drafted))  # (B, G, T, d)
    else:
        q_nope, q_rope = grouped.split([w_uk.shape[1], k_rope.shape[-1]], dim=-1)
        grouped = torch.cat([torch.einsum("bgnwd,gdc->bgnwc", q_nope, w_uk), q_rope], dim=-1)
        keys = torch.cat([latents, ropes], dim=-1)[:, None]  # (B, 1, T, C + R)
    scores = torch.einsum("bgnwe,bgte->bgnwt", grouped, keys.expand(-1, grouped.shape[1], -1, -1)) * scaling
    is_seen = (is_held[:, None] & shown_slots(slots, lengths, drafted))[:, None, None]  # (B, 1, 1, W or 1, T)
    probs = scores.masked_fill(~is_seen, float("-inf")).softmax(dim=-1).masked_fill(~is_seen, 0)
    attended = torch.einsum("bgnwt,btc->bgnwc", probs, latents)
    return torch.einsum("bgnwc,gdc->bgnwd", attended, w_uv).flatten(1, 2).to(query.dtype)


def rotated_keys(projections: UpProjections, latents: Tensor, positions: Tensor) -> Tensor:
    """Keys `(B, G, T, d)` of `latents (B, T, C)` at `positions (B, T)`, turned half against half as in Llama."""
    first, second = torch.einsum("btc,gdc->bgtd", latents, projections.w_uk.to(latents.dtype)).chunk(2, dim=-1)
    angles = positions[:, None, :, None].float() * projections.inv_freq  # (B, 1, T, d / 2)
    cos, sin = ((part * projections.attention_scaling).to(latents.dtype) for part in (angles.cos(), angles.sin()))
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def slot_positions(slots: Tensor, lengths: Tensor, first_slots: Tensor, drafted: DraftedSlots | None) -> Tensor:
    """RoPE positions `(B, T)`: those of the text, and what `drafted` says."""
    positions = slots - first_slots[:, None]
    if drafted is None or drafted.positions.shape[1] == 0:
        return positions
    index = drafted_index(slots, lengths, drafted)
    return torch.where(index >= 0, drafted.positions.gather(1, index.clamp(min=0)).to(positions.dtype), positions)


def shown_slots(slots: Tensor, lengths: Tensor, drafted: DraftedSlots | None) -> Tensor:
    """Which slots `drafted` lets a row see, `(B or 1, W or 1, T)`."""
    if drafted is None or drafted.sees.shape[2] == 0:
        return torch.ones_like(slots, dtype=torch.bool)[None, None]
    index = drafted_index(slots, lengths, drafted)[:, None].expand(-1, drafted.sees.shape[1], -1)
    return (index < 0) | drafted.sees.bool().gather(2, index.clamp(min=0))


def drafted_index(slots: Tensor, lengths: Tensor, drafted: DraftedSlots) -> Tensor:
    """Number of each slot among the drafted ones, `(B, T)`; negative before them."""
    num_drafted = drafted.sees.shape[2]
    return (slots - (lengths[:, None] - num_drafted)).clamp(max=num_drafted - 1)


def check_inputs(
    query: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    projections: UpProjections,
    lengths: Tensor,
    drafted: DraftedSlots | None,
    first_slots: Tensor | None,
) -> None:
    """Raises `ValueError` where shapes or types do not fit together; looks at no value, so that nothing waits."""
    batch_size, num_heads, num_rows, query_dim = query.shape
    num_slots, latent_dim = c_kv.shape[2:]
    num_groups, head_dim = projections.w_uk.shape[:2]
    rope_dim, is_rotated = k_rope.shape[-1], k_rope.shape[-1] == 0
    expect("query", "width", query_dim, head_dim + rope_dim)
    expect("query", "number of heads modulo key-value heads", num_heads % num_groups, 0)
    expect("c_kv", "shape", tuple(c_kv.shape), (batch_size, 1, num_slots, latent_dim))
    expect("k_rope", "shape", tuple(k_rope.shape), (batch_size, 1, num_slots, rope_dim))
    for name in ("w_uk", "w_uv"):
        shape = tuple(getattr(projections, name).shape)
        expect(f"projections.{name}", "shape", shape, (num_groups, head_dim, latent_dim))
    for name, tensor in (("lengths", lengths), ("first_slots", first_slots)):
        if tensor is not None:
            expect(name, "shape", tuple(tensor.shape), (batch_size,))
            expect(name, "type", tensor.dtype, torch.int32)
    if is_rotated:
        check_frequencies(projections.inv_freq, head_dim)
    if drafted is not None:
        check_drafted(drafted, batch_size, num_rows, is_rotated)


def check_frequencies(inv_freq: Tensor | None, head_dim: int) -> None:
    if inv_freq is None:
        raise ValueError("`projections.inv_freq` must be given where R = 0, got `None`.")
    expect("projections.inv_freq", "shape", tuple(inv_freq.shape), (head_dim // 2,))
    expect("projections.inv_freq", "type", inv_freq.dtype, torch.float32)


def check_drafted(drafted: DraftedSlots, batch_size: int, num_rows: int, is_rotated: bool) -> None:
    num_drafted = drafted.sees.shape[-1]
    expect("drafted.sees", "shape", tuple(drafted.sees.shape), (batch_size, num_rows, num_drafted))
    expect("drafted.sees", "size of an element", drafted.sees.element_size(), 1)
    if is_rotated:
        if drafted.positions is None:
            raise ValueError("`drafted.positions` must be given where R = 0, got `None`.")
        expect("drafted.positions", "shape", tuple(drafted.positions.shape), (batch_size, num_drafted))


def expect(name: str, what: str, actual, expected) -> None:
    if actual != expected:
        raise ValueError(f"The {what} of `{name}` must be {expected}, got {actual}.")


def runs_on_triton(query: Tensor, c_kv: Tensor, k_rope: Tensor) -> bool:
    """Whether the kernels take these tensors; says so once where they do not, though the tensors are on a GPU."""
    if not query.is_cuda:
        return False
    obstacle = kernel_obstacle(query, c_kv, k_rope)
    if obstacle is not None:
        logger.warning_once(f"Attention to latents runs without its kernels, which is slower: {obstacle}.")
        return False
    return can_run_kernels(query.device)


def kernel_obstacle(query: Tensor, c_kv: Tensor, k_rope: Tensor) -> str | None:
    """Why the kernels do not take these tensors of a GPU, if so."""
    latent_dim, key_dim = c_kv.shape[-1], k_rope.shape[-1] or query.shape[-1]
    if query.dtype not in HALF_PRECISION:  # tiles of float32 would not fit into shared memory
        return f"they take float16 and bfloat16, not {query.dtype}"
    if latent_dim % 16 != 0 or latent_dim > MAX_LATENT_DIM:
        return f"they take latents of a multiple of 16 up to {MAX_LATENT_DIM}, not of {latent_dim}"
    if key_dim > MAX_KEY_DIM:
        return f"they take heads and R up to {MAX_KEY_DIM}, not {key_dim}"
    if shared_memory(query.device) < MIN_SHARED_MEMORY:
        return f"they need {MIN_SHARED_MEMORY} bytes of shared memory, and this GPU has {shared_memory(query.device)}"
    return None


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of one multiprocessor; a block of threads may have all but 1024 of them."""
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


def _triton():
    # Triton is imported where a kernel runs: it is missing on some platforms.
    from . import latent_attention_triton

    return latent_attention_triton
