"""Steps that the kernels of latent attention in Gluon share: tiles of the cache, weights and keys.

The device copies tiles of latents by itself. Keys are made of them by a product and turned in registers, where the two
entries of a head that RoPE mixes lie side by side.

Shapes: L = 64 slots of a tile, N query rows, C latent, F frequencies; 2F entries of a head.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .latent_parts import Parts
from .latent_tiles_triton import angles_at, block_of, tiles_of_part, turned

# The kernels are written for these sizes, and for groups of 4 warps.
BLOCK_SLOTS = 64
NUM_WARPS = 4
DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def kernel_arguments(
    query: Tensor,
    c_kv: Tensor,
    w_uk: Tensor,
    inv_freq: Tensor,
    lengths: Tensor,
    scaling: float,
    drafted: tuple[Tensor, Tensor, int],
    parts: Parts,
) -> tuple[list, dict]:
    """
    What every kernel takes, by position and by name, to fill the parts.

    Args:
        query (`torch.Tensor` of shape `(B, H, W, d)`), c_kv (`torch.Tensor` of shape `(B, 1, T, C)`), w_uk
            (`torch.Tensor` of shape `(G, d, C)`), inv_freq (`torch.Tensor` of shape `(d / 2,)`), lengths
            (`torch.Tensor` of shape `(B,)`): As for `attend_latents`.
        scaling (`float`): Positive factor of the scores, which are logarithms to base 2.
        drafted (`tuple`): What `drafted_inputs` gives.
        parts (`Parts`): To be filled.
    """
    (num_groups, head_dim, latent_dim), (sees, positions, num_drafted) = w_uk.shape, drafted
    arguments = [
        query,
        as_matrix(c_kv),
        w_uk,
        inv_freq,
        sees,
        positions,
        lengths,
        parts.sums,
        parts.maxima,
        parts.totals,
        scaling,
        *query.stride()[:3],
        rows_per_sequence(c_kv),
        c_kv.shape[2],
        *query.shape[1:3],
        num_drafted,
    ]
    sizes = {
        "NUM_GROUPS": num_groups,
        "LATENT_DIM": latent_dim,
        "KEY_DIM": head_dim // 2,
        "BLOCK_KEY": block_of(head_dim // 2),
        "num_warps": NUM_WARPS,
    }
    return arguments, sizes


def as_matrix(c_kv: Tensor) -> TensorDescriptor:
    """The slots of all sequences as rows, of which the device copies a tile at a time."""
    batch_size, _, num_slots, latent_dim = c_kv.shape
    shape = [(batch_size - 1) * rows_per_sequence(c_kv) + num_slots, latent_dim]
    tile = [BLOCK_SLOTS, latent_dim]
    layout = gl.NVMMASharedLayout.get_default_for(tile, DTYPES[c_kv.dtype])
    return TensorDescriptor(c_kv, shape, [c_kv.stride(2), 1], tile, layout)


def rows_per_sequence(c_kv: Tensor) -> int:
    """From a slot of one sequence to the same of the next, in rows."""
    return c_kv.stride(0) // c_kv.stride(2) if len(c_kv) > 1 else c_kv.shape[2]


@gluon.constexpr_function
def product_of(width):
    """How the 4 warps of a group hold a product of `width` columns: each has 16 of 64 rows."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])


@gluon.jit
def tiles_in_part(part, num_parts, length):
    """First tile of a part and number of its tiles, as the joining kernel counts them."""
    tiles_in_text, tiles_per_part = tiles_of_part(length, num_parts, 64)
    begin = part * tiles_per_part
    return begin, gl.maximum(gl.minimum(begin + tiles_per_part, tiles_in_text) - begin, 0)


@gluon.jit
def load_tile(c_kv, tiles, c_full, first_row, index, num_tiles, NUM_STAGES: gl.constexpr):
    """Begins to copy tile `index`, if there is one; `c_full` says when it is there."""
    stage, is_tile = index % NUM_STAGES, index < num_tiles
    mbarrier.expect(c_full.index(stage), c_kv.block_type.nbytes, pred=is_tile)
    row = first_row + index * 64
    tma.async_copy_global_to_shared(c_kv, [row, 0], c_full.index(stage), tiles.index(stage), pred=is_tile)


@gluon.jit
def clear_behind(tile, num_held, LATENT_DIM: gl.constexpr):
    """Zeros in the slots from `num_held` on, which may contain anything."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    is_held = gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS)) < num_held
    for chunk in gl.static_range(LATENT_DIM // 64):
        part = tile.slice(chunk * 64, 64, dim=1)
        latents = part.load(ROWS)
        part.store(gl.where(is_held[:, None], latents, gl.zeros_like(latents)))
    fence_async_shared()


@gluon.jit
def load_w_uk(w_uk_ptr, group, KEY_DIM: gl.constexpr, BLOCK_KEY: gl.constexpr, LATENT_DIM: gl.constexpr):
    """W_uk of a group in shared memory, `(2F, C)`; the entries that RoPE mixes are halves of a head, as in Llama."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    dtype: gl.constexpr = w_uk_ptr.dtype.element_ty
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([2 * BLOCK_KEY, LATENT_DIM], dtype)
    w_uk = gl.allocate_shared_memory(dtype, [2 * BLOCK_KEY, LATENT_DIM], SHARED)
    key_row = gl.arange(0, 2 * BLOCK_KEY, layout=gl.SliceLayout(1, WIDE))
    latent = gl.arange(0, 64, layout=gl.SliceLayout(0, WIDE))
    w_offset = (group * 2 * KEY_DIM + key_row % 2 * KEY_DIM + key_row // 2) * LATENT_DIM
    is_key_row = (key_row // 2 < KEY_DIM)[:, None]
    for chunk in gl.static_range(LATENT_DIM // 64):
        address = w_uk_ptr + w_offset[:, None] + (chunk * 64 + latent)[None, :]
        w_uk.slice(chunk * 64, 64, dim=1).store(gl.load(address, mask=is_key_row, other=0.0))
    return w_uk


@gluon.jit
def load_query(
    query_ptr,
    first_head,
    in_group,
    num_group_rows,
    num_rows,
    query_head,
    query_row,
    KEY_DIM: gl.constexpr,
    BLOCK_KEY: gl.constexpr,
):
    """Rows `in_group (N,)` of the heads from `first_head` on in shared memory, `(N, 2F)`, entries as in W_uk."""
    NUM_ROWS: gl.constexpr = in_group.shape[0]
    WIDE: gl.constexpr = in_group.type.layout.parent
    dtype: gl.constexpr = query_ptr.dtype.element_ty
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([NUM_ROWS, 2 * BLOCK_KEY], dtype)
    query = gl.allocate_shared_memory(dtype, [NUM_ROWS, 2 * BLOCK_KEY], SHARED)
    entry = gl.arange(0, 2 * BLOCK_KEY, layout=gl.SliceLayout(0, WIDE))
    query_offset = (first_head + in_group // num_rows) * query_head + in_group % num_rows * query_row
    is_entry = (in_group < num_group_rows)[:, None] & (entry // 2 < KEY_DIM)[None, :]
    address = query_ptr + query_offset[:, None] + (entry % 2 * KEY_DIM + entry // 2)[None, :]
    query.store(gl.load(address, mask=is_entry, other=0.0))
    return query


@gluon.jit
def places_and_frequencies(inv_freq_ptr, KEY_DIM: gl.constexpr, BLOCK_KEY: gl.constexpr):
    """Slots of a tile `(L,)` and frequencies `(F,)`, laid out as what is turned: halves of keys."""
    no_keys = gl.zeros([64, 2 * BLOCK_KEY], gl.float32, product_of(2 * BLOCK_KEY))
    half, _half = gl.split(gl.reshape(no_keys, [64, BLOCK_KEY, 2]))
    HALF: gl.constexpr = half.type.layout
    entry = gl.arange(0, BLOCK_KEY, layout=gl.SliceLayout(0, HALF))
    inv_freq = gl.load(inv_freq_ptr + entry, mask=entry < KEY_DIM, other=0.0)
    return gl.arange(0, 64, layout=gl.SliceLayout(1, HALF)), inv_freq


@gluon.jit
def own_angles(slot, length, num_drafted, positions_ptr, inv_freq):
    """Angles of slots `(L,)` of which some are drafted: these have positions of their own."""
    drafted = slot - (length - num_drafted)
    own = gl.load(positions_ptr + drafted, mask=(drafted >= 0) & (slot < length), other=0)
    return angles_at(gl.where(drafted >= 0, own, slot), inv_freq)


@gluon.jit
def turned_keys(tile, w_uk, angles, dtype: gl.constexpr, BLOCK_KEY: gl.constexpr):
    """`RoPE(W_uk c_j)` of a tile, `(L, 2F)`."""
    KEYS: gl.constexpr = product_of(2 * BLOCK_KEY)
    no_keys = gl.zeros([64, 2 * BLOCK_KEY], gl.float32, KEYS)
    made = warpgroup_mma(tile, w_uk.permute((1, 0)), no_keys, use_acc=False)
    first_half, second_half = turned(gl.split(gl.reshape(made, [64, BLOCK_KEY, 2])), angles)
    pairs = gl.join(first_half.to(dtype), second_half.to(dtype))
    return gl.convert_layout(gl.reshape(pairs, [64, 2 * BLOCK_KEY]), KEYS)
