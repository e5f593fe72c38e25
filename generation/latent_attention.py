"""Attention of a few new rows to a cache of latents, as drafting needs it at every depth of a tree.

The latents are keys and values at once: they are never expanded in memory. Both forms of RoPE are here:

    decoupled (R > 0)   score = q_latent . c_j + q_rope . k_rope_j        the caller moved W_uk into the query
    rotated (R = 0)     score = q . RoPE(W_uk c_j, position_j)            keys are made again where they are read

and both return sum_j p_j c_j, which the caller takes through W_uv. On a GPU kernels do it, with one read of the cache
(`latent_attention_triton.py`); elsewhere the definition below does.

Of a sequence's slots the first `length` are held. The last S of these may be drafted slots, of which each row sees its
own; every row sees all slots before them, from the first one behind the padding on. Lengths are read on the device,
so that a CUDA graph that was captured once serves a growing cache.

Shapes: B batch, W new rows, T slots of the cache (its capacity), S drafted slots, H heads, G key-value heads, d head
width, C latent, R decoupled RoPE.
"""

import functools
import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

# In float32 the tiles would not fit into shared memory.
KERNEL_DTYPES = (torch.float16, torch.bfloat16)
# Shared memory of a multiprocessor of an H100, and the sizes that were checked against it.
MIN_SHARED_MEMORY = 228 * 1024
MAX_LATENT_DIM, MAX_KEY_DIM = 512, 128


@dataclass(frozen=True)
class RotatedKeys:
    """
    How keys are made from latents where R = 0.

    Args:
        w_uk (`torch.Tensor` of shape `(G, d, C)`): The up-projection of the keys.
        inv_freq (`torch.Tensor` of shape `(d / 2,)`): Frequencies of RoPE, float32.
        attention_scaling (`float`, *optional*, defaults to 1.0): Factor on cosines and sines.
    """

    w_uk: Tensor
    inv_freq: Tensor
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
    lengths: Tensor,
    scaling: float,
    drafted: DraftedSlots | None = None,
    first: Tensor | None = None,
    keys: RotatedKeys | None = None,
) -> Tensor:
    """
    Attention of new rows to cached latents.

    Args:
        query (`torch.Tensor` of shape `(B, H, W, C + R)`): `[q_latent; q_rope]`, or the rotated query `(B, H, W, d)`
            where R = 0.
        c_kv (`torch.Tensor` of shape `(B, 1, T, C)`): Latents; what lies beyond a sequence's length is not read.
        k_rope (`torch.Tensor` of shape `(B, 1, T, R)`): Rotated keys; of width 0 with `keys`.
        lengths (`torch.Tensor` of shape `(B,)`): Slots that each sequence holds, drafted ones included, int32.
        scaling (`float`): Factor of the scores.
        drafted ([`DraftedSlots`], *optional*): The last slots; `None`: every row sees all slots.
        first (`torch.Tensor` of shape `(B,)`, *optional*): First slot behind the padding, of RoPE position 0, int32.
        keys ([`RotatedKeys`], *optional*): Says that R = 0, and how keys are made.

    Returns:
        `torch.Tensor` of shape `(B, H, W, C)`: Weighted sums of latents; zeros for a row that sees nothing.

    Raises:
        ValueError: Where shapes or types do not fit together.
    """
    check_inputs(query, c_kv, k_rope, lengths, drafted, first, keys)
    attend = _triton().attend if runs_on_triton(query, c_kv, k_rope, keys) else attend_by_definition
    return attend(query, c_kv, k_rope, lengths, scaling, drafted, first, keys)


def attend_by_definition(
    query: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    lengths: Tensor,
    scaling: float,
    drafted: DraftedSlots | None = None,
    first: Tensor | None = None,
    keys: RotatedKeys | None = None,
) -> Tensor:
    """`attend_latents`, written out over all T slots, in float32 or wider."""
    slots = torch.arange(c_kv.shape[2], device=c_kv.device)
    first = torch.zeros_like(lengths) if first is None else first
    is_held = (slots >= first[:, None]) & (slots < lengths[:, None])  # (B, T)
    dtype = torch.promote_types(query.dtype, torch.float32)
    # Slots that are not held may contain anything, which would survive a weight of zero.
    latents, ropes = (part[:, 0].to(dtype).masked_fill(~is_held[..., None], 0) for part in (c_kv, k_rope))
    if keys is None:
        cached = torch.cat([latents, ropes], dim=-1)[:, None]  # (B, 1, T, C + R)
    else:
        cached = rotated_keys(keys, latents, slot_positions(slots, lengths, first, drafted))  # (B, G, T, d)
    grouped = query.to(dtype).unflatten(1, (cached.shape[1], -1))  # (B, G, H / G, W, ...)
    scores = torch.einsum("bgnwe,bgte->bgnwt", grouped, cached).flatten(1, 2) * scaling  # (B, H, W, T)
    is_seen = (is_held[:, None] & shown_slots(slots, lengths, drafted))[:, None]  # (B, 1, W or 1, T)
    probs = scores.masked_fill(~is_seen, float("-inf")).softmax(dim=-1).masked_fill(~is_seen, 0)
    return torch.einsum("bhwt,btc->bhwc", probs, latents).to(query.dtype)


def rotated_keys(keys: RotatedKeys, latents: Tensor, positions: Tensor) -> Tensor:
    """Keys `(B, G, T, d)` of `latents (B, T, C)` at `positions (B, T)`, turned half against half as in Llama."""
    first, second = torch.einsum("btc,gdc->bgtd", latents, keys.w_uk.to(latents.dtype)).chunk(2, dim=-1)
    angles = positions[:, None, :, None].float() * keys.inv_freq  # (B, 1, T, d / 2)
    cos, sin = ((part * keys.attention_scaling).to(latents.dtype) for part in (angles.cos(), angles.sin()))
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def slot_positions(slots: Tensor, lengths: Tensor, first: Tensor, drafted: DraftedSlots | None) -> Tensor:
    """RoPE positions `(B, T)`: those of the text, and what `drafted` says."""
    positions = slots - first[:, None]
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
    lengths: Tensor,
    drafted: DraftedSlots | None,
    first: Tensor | None,
    keys: RotatedKeys | None,
) -> None:
    """Raises `ValueError` where shapes or types do not fit together; looks at no value, so that nothing waits."""
    batch_size, num_heads, num_rows, query_dim = query.shape
    latent_dim, rope_dim = c_kv.shape[-1], k_rope.shape[-1]
    num_groups, expected_dim = (1, latent_dim + rope_dim) if keys is None else keys.w_uk.shape[:2]
    expect("query", "width", query_dim, expected_dim)
    expect("query", "number of heads modulo key-value heads", num_heads % num_groups, 0)
    expect("c_kv", "shape", tuple(c_kv.shape), (batch_size, 1, c_kv.shape[2], latent_dim))
    expect("k_rope", "shape", tuple(k_rope.shape), (batch_size, 1, c_kv.shape[2], 0 if keys is not None else rope_dim))
    for name, tensor in (("lengths", lengths), ("first", first)):
        if tensor is not None:
            expect(name, "shape", tuple(tensor.shape), (batch_size,))
            expect(name, "type", tensor.dtype, torch.int32)
    if keys is not None:
        expect("keys.w_uk", "latent width", keys.w_uk.shape[-1], latent_dim)
        expect("keys.inv_freq", "shape", tuple(keys.inv_freq.shape), (query_dim // 2,))
        expect("keys.inv_freq", "type", keys.inv_freq.dtype, torch.float32)
    if drafted is not None:
        num_drafted = drafted.sees.shape[-1]
        expect("drafted.sees", "shape", tuple(drafted.sees.shape), (batch_size, num_rows, num_drafted))
        expect("drafted.sees", "size of an element", drafted.sees.element_size(), 1)
    if drafted is not None and keys is not None:
        if drafted.positions is None:
            raise ValueError("`drafted.positions` must be given where R = 0, got `None`.")
        expect("drafted.positions", "shape", tuple(drafted.positions.shape), (batch_size, num_drafted))


def expect(name: str, what: str, actual, expected) -> None:
    if actual != expected:
        raise ValueError(f"The {what} of `{name}` must be {expected}, got {actual}.")


def runs_on_triton(query: Tensor, c_kv: Tensor, k_rope: Tensor, keys: RotatedKeys | None) -> bool:
    """Whether the kernels take these tensors; says so once where they do not, though the tensors are on a GPU."""
    if not query.is_cuda:
        return False
    obstacle = kernel_obstacle(query, c_kv, k_rope, keys)
    if obstacle is not None:
        logger.warning_once(f"Attention to latents runs without its kernels, which is slower: {obstacle}.")
    return obstacle is None


def kernel_obstacle(query: Tensor, c_kv: Tensor, k_rope: Tensor, keys: RotatedKeys | None) -> str | None:
    """Why the kernels do not take these tensors of a GPU, if so."""
    latent_dim, key_dim = c_kv.shape[-1], k_rope.shape[-1] if keys is None else query.shape[-1]
    if query.dtype not in KERNEL_DTYPES:
        return f"they take float16 and bfloat16, not {query.dtype}"
    if latent_dim % 16 != 0 or latent_dim > MAX_LATENT_DIM:
        return f"they take latents of a multiple of 16 up to {MAX_LATENT_DIM}, not of {latent_dim}"
    if key_dim > MAX_KEY_DIM:
        return f"they take heads and R up to {MAX_KEY_DIM}, not {key_dim}"
    if shared_memory(query.device) < MIN_SHARED_MEMORY:
        return f"they need {MIN_SHARED_MEMORY} bytes of shared memory, and this GPU has {shared_memory(query.device)}"
    return None if has_triton() else "Triton is not installed"


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of one multiprocessor; a block of threads may have all but 1024 of them."""
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton():
    # Triton is imported where a kernel runs: it is missing on some platforms.
    from . import latent_attention_triton

    return latent_attention_triton
