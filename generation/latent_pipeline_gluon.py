"""Attention to latents where R = 0 on Hopper: keys are made by one group of warps while another attends to them.

The kernel takes the place of `rotated_part_kernel` of `latent_rotated_triton.py`, whose parts and results it has. A
program belongs to a group of heads, keeps its W_uk in shared memory and goes through tiles of latents, which the
device copies there by itself, three at a time:

    make_keys    RoPE(W_uk c_j), the angles turned from tile to tile by those of 64 slots    -> a ring of two tiles
    attend       softmax(q . key) . c_j for up to 64 rows                                    <- the same ring

so that products, of keys and of attention, fill the time in which the other group turns keys or weighs. Written in
Gluon, the part of Triton that says which warps do what and where data lies.

Shapes: L = 64 slots of a tile, N = 64 query rows, C latent, F frequencies; the two entries of a head that RoPE mixes
lie side by side, 2F in all.
"""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .latent_parts import Parts, sm_count
from .latent_tiles_gluon import (
    BLOCK_SLOTS,
    clear_behind,
    kernel_arguments,
    load_query,
    load_tile,
    load_w_uk,
    own_angles,
    places_and_frequencies,
    product_of,
    tiles_in_part,
    turned_keys,
)
from .latent_tiles_triton import angles_at, cos_sin, turned

BLOCK_ROWS = 64
NUM_STAGES, NUM_KEY_TILES = 3, 2
# Of a thread that makes keys: the angles of a tile, and its keys, take half of them.
KEY_REGISTERS = 216


def pipelined_parts(
    query: Tensor,
    c_kv: Tensor,
    w_uk: Tensor,
    inv_freq: Tensor,
    lengths: Tensor,
    scaling: float,
    drafted: tuple[Tensor, Tensor, int],
) -> Parts:
    """Starts the pipeline, which fills the parts that are returned; for its arguments see `kernel_arguments`."""
    batch_size, num_heads, num_rows, _ = query.shape
    num_groups = len(w_uk)
    num_row_tiles = triton.cdiv(num_heads // num_groups * num_rows, BLOCK_ROWS)
    parts = Parts.empty(query, c_kv, batch_size * num_groups * num_row_tiles, BLOCK_SLOTS, sm_count(query.device))
    arguments, sizes = kernel_arguments(query, c_kv, w_uk, inv_freq, lengths, scaling, drafted, parts)
    pipelined_part_kernel[num_row_tiles * num_groups, parts.sums.shape[1], batch_size](
        *arguments, **sizes, NUM_STAGES=NUM_STAGES, NUM_KEY_TILES=NUM_KEY_TILES, KEY_REGISTERS=KEY_REGISTERS
    )
    return parts


@gluon.jit
def _make_keys(
    tiles,
    keys,
    c_full,
    k_full,
    k_empty,
    begin,
    num_tiles,
    length,
    num_drafted,
    w_uk,
    inv_freq_ptr,
    positions_ptr,
    KEY_DIM: gl.constexpr,
    BLOCK_KEY: gl.constexpr,
    LATENT_DIM: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    NUM_KEY_TILES: gl.constexpr,
):
    """Turned keys of every tile; drafted slots have positions of their own."""
    place, inv_freq = places_and_frequencies(inv_freq_ptr, KEY_DIM, BLOCK_KEY)
    angles = angles_at(begin * 64 + place, inv_freq)
    step_cos, step_sin = cos_sin(64 * inv_freq)
    for index in range(num_tiles):
        tile = tiles.index(index % NUM_STAGES)
        mbarrier.wait(c_full.index(index % NUM_STAGES), index // NUM_STAGES & 1)
        first = (begin + index) * 64
        if first + 64 > length - num_drafted:
            angles = own_angles(first + place, length, num_drafted, positions_ptr, inv_freq)
            if first + 64 > length:
                clear_behind(tile, length - first, LATENT_DIM)
        made = turned_keys(tile, w_uk, angles, keys.dtype, BLOCK_KEY)
        angles = turned(angles, (step_cos[None, :], step_sin[None, :]))
        place_in_ring = index % NUM_KEY_TILES
        mbarrier.wait(k_empty.index(place_in_ring), (index // NUM_KEY_TILES & 1) ^ 1)
        keys.index(place_in_ring).store(made)
        fence_async_shared()
        mbarrier.arrive(k_full.index(place_in_ring), count=1)


@gluon.jit
def _begin_scores(query, keys, no_scores):
    return warpgroup_mma(query, keys.permute((1, 0)), no_scores, use_acc=False, is_async=True)


@gluon.jit
def _weigh(scores, maximum, total, sees_ptr, row, is_row, first, length, num_drafted, scaling):
    """Of a tile: weights `(N, L)`, the new maximum and total, and the factor of what was summed before."""
    if first + 64 > length - num_drafted:
        slot = first + gl.arange(0, 64, layout=gl.SliceLayout(0, scores.type.layout))
        drafted, is_held = slot - (length - num_drafted), slot < length
        is_asked = (is_held & (drafted >= 0))[None, :] & is_row[:, None]
        sees = gl.load(sees_ptr + row[:, None] * num_drafted + drafted[None, :], mask=is_asked, other=1)
        scores = gl.where(is_held[None, :] & (sees != 0), scores, float("-inf"))
    new_maximum = gl.maximum(maximum, gl.max(scores, axis=1) * scaling)
    # A row that has seen nothing yet: any finite number does.
    reference = gl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights, shrink = gl.exp2(scores * scaling - reference[:, None]), gl.exp2(maximum - reference)
    return weights, new_maximum, total * shrink + gl.sum(weights, axis=1), shrink


@gluon.jit
def _attend(
    tiles,
    keys,
    c_full,
    k_full,
    k_empty,
    begin,
    num_tiles,
    length,
    num_drafted,
    c_kv,
    query,
    sees_ptr,
    partial_ptr,
    maxima_ptr,
    totals_ptr,
    first_row,
    scaling,
    num_rows,
    num_group_rows,
    row_tile,
    out_base,
    LATENT_DIM: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    NUM_KEY_TILES: gl.constexpr,
):
    """
    The running softmax over all tiles. The scores of a tile are multiplied while the one before is weighed.

    A tile of latents is free as soon as its values are summed: whoever made keys of it was done before.
    """
    SCORES: gl.constexpr = product_of(64)
    SUMS: gl.constexpr = product_of(LATENT_DIM)
    SUMS_ROW: gl.constexpr = gl.SliceLayout(1, SUMS)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    in_group = row_tile * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    is_row, row = in_group < num_group_rows, in_group % num_rows
    no_scores = gl.zeros([64, 64], gl.float32, SCORES)
    sums = gl.zeros([64, LATENT_DIM], gl.float32, SUMS)
    maximum = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, SCORES))
    for stage in gl.static_range(NUM_STAGES):
        load_tile(c_kv, tiles, c_full, first_row, stage, num_tiles, NUM_STAGES)
    if num_tiles > 0:
        mbarrier.wait(k_full.index(0), 0)
        coming = _begin_scores(query, keys.index(0), no_scores)
        scores = warpgroup_mma_wait(0, deps=(coming,))
        mbarrier.arrive(k_empty.index(0), count=1)
        for index in range(num_tiles - 1):
            next_place = (index + 1) % NUM_KEY_TILES
            mbarrier.wait(k_full.index(next_place), (index + 1) // NUM_KEY_TILES & 1)
            coming = _begin_scores(query, keys.index(next_place), no_scores)
            first = (begin + index) * 64
            weights, maximum, total, shrink = _weigh(
                scores, maximum, total, sees_ptr, row, is_row, first, length, num_drafted, scaling
            )
            sums = sums * gl.convert_layout(shrink, SUMS_ROW)[:, None]
            weights = gl.convert_layout(weights.to(keys.dtype), WEIGHTS)
            adding = warpgroup_mma(weights, tiles.index(index % NUM_STAGES), sums, is_async=True)
            scores = warpgroup_mma_wait(1, deps=(coming,))
            mbarrier.arrive(k_empty.index(next_place), count=1)
            sums = warpgroup_mma_wait(0, deps=(adding,))
            load_tile(c_kv, tiles, c_full, first_row, index + NUM_STAGES, num_tiles, NUM_STAGES)
        last = num_tiles - 1
        weights, maximum, total, shrink = _weigh(
            scores, maximum, total, sees_ptr, row, is_row, (begin + last) * 64, length, num_drafted, scaling
        )
        sums = sums * gl.convert_layout(shrink, SUMS_ROW)[:, None]
        weights = gl.convert_layout(weights.to(keys.dtype), WEIGHTS)
        sums = warpgroup_mma(weights, tiles.index(last % NUM_STAGES), sums)
    out_row, is_stored = out_base + in_group, is_row & (num_tiles > 0)
    gl.store(maxima_ptr + out_row, maximum, mask=is_stored)
    gl.store(totals_ptr + out_row, total, mask=is_stored)
    out_row, is_stored = gl.convert_layout(out_row, SUMS_ROW), gl.convert_layout(is_stored, SUMS_ROW)
    entry = gl.arange(0, LATENT_DIM, layout=gl.SliceLayout(0, SUMS))
    gl.store(partial_ptr + out_row[:, None] * LATENT_DIM + entry[None, :], sums, mask=is_stored[:, None])


@gluon.jit
def pipelined_part_kernel(
    query_ptr,
    c_kv,
    w_uk_ptr,
    inv_freq_ptr,
    sees_ptr,
    positions_ptr,
    lengths_ptr,
    partial_ptr,
    maxima_ptr,
    totals_ptr,
    scaling,
    query_batch,
    query_head,
    query_row,
    rows_per_sequence,
    num_slots,
    num_heads,
    num_rows,
    num_drafted,
    NUM_GROUPS: gl.constexpr,
    LATENT_DIM: gl.constexpr,
    KEY_DIM: gl.constexpr,
    BLOCK_KEY: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    NUM_KEY_TILES: gl.constexpr,
    KEY_REGISTERS: gl.constexpr,
):
    dtype: gl.constexpr = c_kv.dtype
    batch = gl.program_id(2)
    length = gl.minimum(gl.load(lengths_ptr + batch), num_slots)
    begin, num_tiles = tiles_in_part(gl.program_id(1), gl.num_programs(1), length)
    group, row_tile = gl.program_id(0) % NUM_GROUPS, gl.program_id(0) // NUM_GROUPS
    heads_per_group = num_heads // NUM_GROUPS
    num_group_rows = heads_per_group * num_rows

    HEADS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 2 * BLOCK_KEY], dtype)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    tiles = gl.allocate_shared_memory(dtype, [NUM_STAGES, 64, LATENT_DIM], c_kv.layout)
    keys = gl.allocate_shared_memory(dtype, [NUM_KEY_TILES, 64, 2 * BLOCK_KEY], HEADS)
    c_full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [NUM_KEY_TILES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [NUM_KEY_TILES, 1], BARRIER)
    for stage in gl.static_range(NUM_STAGES):
        mbarrier.init(c_full.index(stage), count=1)
    for place_in_ring in gl.static_range(NUM_KEY_TILES):
        mbarrier.init(k_full.index(place_in_ring), count=1)
        mbarrier.init(k_empty.index(place_in_ring), count=1)

    WIDE_ROWS: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
    w_uk = load_w_uk(w_uk_ptr, group, KEY_DIM, BLOCK_KEY, LATENT_DIM)
    query = load_query(
        query_ptr + batch.to(gl.int64) * query_batch,
        group * heads_per_group,
        row_tile * 64 + gl.arange(0, 64, layout=WIDE_ROWS),
        num_group_rows,
        num_rows,
        query_head,
        query_row,
        KEY_DIM,
        BLOCK_KEY,
    )
    fence_async_shared()

    out_base = ((batch * gl.num_programs(1) + gl.program_id(1)) * num_heads + group * heads_per_group) * num_rows
    sees_ptr += batch * num_rows * num_drafted
    positions_ptr += batch * num_drafted
    first_row = batch * rows_per_sequence + begin * 64
    gl.warp_specialize(
        [
            (
                _attend,
                (
                    tiles,
                    keys,
                    c_full,
                    k_full,
                    k_empty,
                    begin,
                    num_tiles,
                    length,
                    num_drafted,
                    c_kv,
                    query,
                    sees_ptr,
                    partial_ptr,
                    maxima_ptr,
                    totals_ptr,
                    first_row,
                    scaling,
                    num_rows,
                    num_group_rows,
                    row_tile,
                    out_base,
                    LATENT_DIM,
                    NUM_STAGES,
                    NUM_KEY_TILES,
                ),
            ),
            (
                _make_keys,
                (
                    tiles,
                    keys,
                    c_full,
                    k_full,
                    k_empty,
                    begin,
                    num_tiles,
                    length,
                    num_drafted,
                    w_uk,
                    inv_freq_ptr,
                    positions_ptr,
                    KEY_DIM,
                    BLOCK_KEY,
                    LATENT_DIM,
                    NUM_STAGES,
                    NUM_KEY_TILES,
                ),
            ),
        ],
        [4],
        [KEY_REGISTERS],
    )
