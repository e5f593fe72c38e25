"""Attention to latents where R = 0 on Hopper, for few rows: two groups of warps do the same, each for its own part.

The kernel takes the place of `pipelined_part_kernel` of `latent_pipeline_gluon.py`, whose products have 64 rows, asked
for or not. Here slots come first: scores are `(L, N)`, sums `(C, N)`, and N = 8 is enough. What a group goes through,

    keys       RoPE(W_uk c_j), which stay in registers: there they are the left side of the next product
    scores     keys . q
    weights    their exponentials, to shared memory
    sums       c_j . weights

is one thing after another, each waiting for the one before. So there are two groups, which share W_uk and queries and
wait for nothing of each other: while one turns keys or weighs, the other multiplies. Only the last tiles of a text
hold drafted slots, or end within: all others have a loop of their own, which asks for neither.

Shapes: L = 64 slots of a tile, N = 8 query rows, C latent, F frequencies; the two entries of a head that RoPE mixes
lie side by side, 2F in all.
"""

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

BLOCK_ROWS = 8
PARTS_PER_PROGRAM = 2
NUM_STAGES = 2
# Of a thread of the second group: angles of a tile, its keys and the sums take nearly all.
REGISTERS = 240


def twin_parts(
    query: Tensor,
    c_kv: Tensor,
    w_uk: Tensor,
    inv_freq: Tensor,
    lengths: Tensor,
    scaling: float,
    drafted: tuple[Tensor, Tensor, int],
) -> Parts:
    """
    Starts the kernel, which fills the parts that are returned; for its arguments see `kernel_arguments`.

    There are `BLOCK_ROWS` rows of heads that share keys at most.
    """
    batch_size, num_heads, num_rows, _ = query.shape
    assert num_heads // len(w_uk) * num_rows <= BLOCK_ROWS
    num_programs = batch_size * len(w_uk)
    parts = Parts.empty(query, c_kv, num_programs, BLOCK_SLOTS, sm_count(query.device), PARTS_PER_PROGRAM)
    arguments, sizes = kernel_arguments(query, c_kv, w_uk, inv_freq, lengths, scaling, drafted, parts)
    twin_part_kernel[len(w_uk), parts.sums.shape[1] // PARTS_PER_PROGRAM, batch_size](
        *arguments, **sizes, BLOCK_ROWS=BLOCK_ROWS, NUM_STAGES=NUM_STAGES, REGISTERS=REGISTERS
    )
    return parts


@gluon.jit
def _own_memory(c_kv, BLOCK_KEY: gl.constexpr, BLOCK_ROWS: gl.constexpr, NUM_STAGES: gl.constexpr):
    """What a group of warps has of shared memory for itself: tiles, weights, the angles of a step, and barriers."""
    dtype: gl.constexpr = c_kv.dtype
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    WEIGHTS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_ROWS], dtype)
    tiles = gl.allocate_shared_memory(dtype, [NUM_STAGES, 64, c_kv.block_shape[1]], c_kv.layout)
    weights = gl.allocate_shared_memory(dtype, [64, BLOCK_ROWS], WEIGHTS)
    step = gl.allocate_shared_memory(gl.float32, [2, BLOCK_KEY], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    c_full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], BARRIER)
    c_empty = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    for stage in gl.static_range(NUM_STAGES):
        mbarrier.init(c_full.index(stage), count=1)
    mbarrier.init(c_empty, count=1)
    return tiles, weights, step, c_full, c_empty


@gluon.jit
def _empty_softmax(LATENT_DIM: gl.constexpr, BLOCK_ROWS: gl.constexpr):
    """Sums `(C, N)`, maximum `(N,)` and totals `(L, N)` of no slots; only maxima have to cross from warp to warp."""
    SUMS: gl.constexpr = product_of(BLOCK_ROWS)
    sums = gl.zeros([LATENT_DIM, BLOCK_ROWS], gl.float32, SUMS)
    maximum = gl.full([BLOCK_ROWS], float("-inf"), gl.float32, gl.SliceLayout(0, SUMS))
    return sums, maximum, gl.zeros([64, BLOCK_ROWS], gl.float32, SUMS)


@gluon.jit
def _begin_scores(keys, query):
    """`(L, N)`, under way."""
    NUM_ROWS: gl.constexpr = query.shape[0]
    SCORES: gl.constexpr = product_of(NUM_ROWS)
    keys = gl.convert_layout(keys, gl.DotOperandLayout(0, SCORES, 2))
    no_scores = gl.zeros([64, NUM_ROWS], gl.float32, SCORES)
    return warpgroup_mma(keys, query.permute((1, 0)), no_scores, use_acc=False, is_async=True)


@gluon.jit
def _shown(scores, sees_ptr, row, is_row, first, length, num_drafted):
    """Minus infinity where a row does not see a slot: those not held, and drafted ones that are not its own."""
    slot = first + gl.arange(0, 64, layout=gl.SliceLayout(1, scores.type.layout))
    drafted, is_held = slot - (length - num_drafted), slot < length
    is_asked = (is_held & (drafted >= 0))[:, None] & is_row[None, :]
    sees = gl.load(sees_ptr + row[None, :] * num_drafted + drafted[:, None], mask=is_asked, other=1)
    return gl.where(is_held[:, None] & (sees != 0), scores, float("-inf"))


@gluon.jit
def _add_to_softmax(softmax, scores, tile, weights_buffer, scaling):
    """Adds a tile, whose weights pass through shared memory."""
    sums, maximum, total = softmax
    new_maximum = gl.maximum(maximum, gl.max(scores, axis=0) * scaling)
    # A row that has seen nothing yet: any finite number does.
    reference = gl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights, shrink = gl.exp2(scores * scaling - reference[None, :]), gl.exp2(maximum - reference)
    total = total * shrink[None, :] + weights
    weights_buffer.store(weights.to(tile.dtype))
    fence_async_shared()
    sums = warpgroup_mma(tile.permute((1, 0)), weights_buffer, sums * shrink[None, :])
    return sums, new_maximum, total


@gluon.jit
def _wait_for_all(c_empty, index):
    """Until every warp of the group is done with tile `index`, whose place the device may then fill."""
    mbarrier.arrive(c_empty, count=1)
    mbarrier.wait(c_empty, index & 1)


@gluon.jit
def _store_part(softmax, out_row, is_stored, partial_ptr, maxima_ptr, totals_ptr):
    sums, maximum, total = softmax
    total = gl.sum(total, axis=0)
    gl.store(maxima_ptr + out_row, maximum, mask=is_stored)
    gl.store(totals_ptr + out_row, total, mask=is_stored)
    LATENT_DIM: gl.constexpr = sums.shape[0]
    entry = gl.arange(0, LATENT_DIM, layout=gl.SliceLayout(1, sums.type.layout))
    gl.store(partial_ptr + out_row[None, :] * LATENT_DIM + entry[:, None], sums, mask=is_stored[None, :])


@gluon.jit
def _attend_part(
    memory,
    part,
    text,
    heads,
    rows,
    pointers,
    KEY_DIM: gl.constexpr,
    BLOCK_KEY: gl.constexpr,
    NUM_STAGES: gl.constexpr,
):
    """The running softmax over all tiles of a part."""
    tiles, weights, step, c_full, c_empty = memory
    begin, num_tiles, out_base = part
    c_kv, first_row, length, num_drafted = text
    w_uk, query, scaling = heads
    num_rows, num_group_rows = rows
    inv_freq_ptr, positions_ptr, sees_ptr, partial_ptr, maxima_ptr, totals_ptr = pointers
    LATENT_DIM: gl.constexpr = c_kv.block_shape[1]
    BLOCK_ROWS: gl.constexpr = query.shape[0]
    first_row += begin * 64
    place, inv_freq = places_and_frequencies(inv_freq_ptr, KEY_DIM, BLOCK_KEY)
    FREQUENCIES: gl.constexpr = inv_freq.type.layout
    angles = angles_at(begin * 64 + place, inv_freq)
    step_cos, step_sin = cos_sin(64 * inv_freq)
    # Every tile wants them again, but beside keys, angles and sums there are no registers left.
    step.index(0).store(step_cos)
    step.index(1).store(step_sin)
    softmax = _empty_softmax(LATENT_DIM, BLOCK_ROWS)
    for stage in gl.static_range(NUM_STAGES):
        load_tile(c_kv, tiles, c_full, first_row, stage, num_tiles, NUM_STAGES)
    # Tiles without drafted slots.
    num_plain = gl.maximum(gl.minimum((length - num_drafted) // 64 - begin, num_tiles), 0)
    for index in range(num_plain):
        tile = tiles.index(index % NUM_STAGES)
        mbarrier.wait(c_full.index(index % NUM_STAGES), index // NUM_STAGES & 1)
        scores = _begin_scores(turned_keys(tile, w_uk, angles, tile.dtype, BLOCK_KEY), query)
        step_cos, step_sin = step.index(0).load(FREQUENCIES), step.index(1).load(FREQUENCIES)
        angles = turned(angles, (step_cos[None, :], step_sin[None, :]))
        scores = warpgroup_mma_wait(0, deps=(scores,))
        softmax = _add_to_softmax(softmax, scores, tile, weights, scaling)
        _wait_for_all(c_empty, index)
        load_tile(c_kv, tiles, c_full, first_row, index + NUM_STAGES, num_tiles, NUM_STAGES)
    in_group = gl.arange(0, BLOCK_ROWS, layout=gl.SliceLayout(0, product_of(BLOCK_ROWS)))
    is_row, row = in_group < num_group_rows, in_group % num_rows
    for index in range(num_plain, num_tiles):
        tile = tiles.index(index % NUM_STAGES)
        mbarrier.wait(c_full.index(index % NUM_STAGES), index // NUM_STAGES & 1)
        first = (begin + index) * 64
        if first + 64 > length:
            clear_behind(tile, length - first, LATENT_DIM)
        angles = own_angles(first + place, length, num_drafted, positions_ptr, inv_freq)
        scores = _begin_scores(turned_keys(tile, w_uk, angles, tile.dtype, BLOCK_KEY), query)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        scores = _shown(scores, sees_ptr, row, is_row, first, length, num_drafted)
        softmax = _add_to_softmax(softmax, scores, tile, weights, scaling)
        _wait_for_all(c_empty, index)
        load_tile(c_kv, tiles, c_full, first_row, index + NUM_STAGES, num_tiles, NUM_STAGES)
    _store_part(softmax, out_base + in_group, is_row & (num_tiles > 0), partial_ptr, maxima_ptr, totals_ptr)


@gluon.jit
def twin_part_kernel(
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
    BLOCK_ROWS: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    batch, group = gl.program_id(2), gl.program_id(0)
    length = gl.minimum(gl.load(lengths_ptr + batch), num_slots)
    heads_per_group = num_heads // NUM_GROUPS
    num_group_rows = heads_per_group * num_rows
    memory = _own_memory(c_kv, BLOCK_KEY, BLOCK_ROWS, NUM_STAGES)
    second_memory = _own_memory(c_kv, BLOCK_KEY, BLOCK_ROWS, NUM_STAGES)
    WIDE_ROWS: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
    w_uk = load_w_uk(w_uk_ptr, group, KEY_DIM, BLOCK_KEY, LATENT_DIM)
    query = load_query(
        query_ptr + batch.to(gl.int64) * query_batch,
        group * heads_per_group,
        gl.arange(0, BLOCK_ROWS, layout=WIDE_ROWS),
        num_group_rows,
        num_rows,
        query_head,
        query_row,
        KEY_DIM,
        BLOCK_KEY,
    )
    fence_async_shared()

    sees_ptr += batch * num_rows * num_drafted
    positions_ptr += batch * num_drafted
    index, num_parts = 2 * gl.program_id(1), 2 * gl.num_programs(1)
    out_base = ((batch * num_parts + index) * num_heads + group * heads_per_group) * num_rows
    begin, num_tiles = tiles_in_part(index, num_parts, length)
    part = begin, num_tiles, out_base
    begin, num_tiles = tiles_in_part(index + 1, num_parts, length)
    second_part = begin, num_tiles, out_base + num_heads * num_rows
    text = c_kv, batch * rows_per_sequence, length, num_drafted
    heads = w_uk, query, scaling
    rows = num_rows, num_group_rows
    pointers = inv_freq_ptr, positions_ptr, sees_ptr, partial_ptr, maxima_ptr, totals_ptr
    gl.warp_specialize(
        [
            (_attend_part, (memory, part, text, heads, rows, pointers, KEY_DIM, BLOCK_KEY, NUM_STAGES)),
            (
                _attend_part,
                (second_memory, second_part, text, heads, rows, pointers, KEY_DIM, BLOCK_KEY, NUM_STAGES),
            ),
        ],
        [4],
        [REGISTERS],
    )
