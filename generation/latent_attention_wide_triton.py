"""The first kernel of `latent_attention_triton.py` for many rows of R = 0: levels of trees.

There a tile holds up to 64 rows, so that its keys are made once for all of them. Keys and sums then leave no registers
for the angles of a query, and what turns is the keys alone: by cosines and sines of their positions, which from tile
to tile all grow by the same angle.

Shapes: L slots of a tile, N query rows of a tile, E entries of a chunk of the latent, F frequencies.
"""

import triton
import triton.language as tl

from .latent_tiles_triton import (
    MIN_BLOCK,
    add_to_softmax,
    angles_at,
    block_of,
    cos_sin,
    empty_softmax,
    own_tiles,
    rows_of_group,
    store_part,
    turned,
)

MAX_ROWS = 64
# Entries of the float32 accumulator, latent width times rows, that fit into the registers of eight warps.
MAX_ACCUMULATOR = 16384


def wide_tile_sizes(num_rows: int, latent_dim: int, element_size: int) -> dict[str, int]:
    """Sizes of a tile, its warps and stages; shared memory holds the tile, its queries and its group's key matrix."""
    most = min(MAX_ROWS, max(MIN_BLOCK, MAX_ACCUMULATOR // triton.next_power_of_2(latent_dim)))
    is_small = element_size == 4 or latent_dim > 256
    return {
        "CHUNK": latent_dim & -latent_dim,
        "BLOCK_ROWS": min(most, block_of(num_rows)),
        "BLOCK_SLOTS": 32 if element_size == 4 else 64,
        "num_warps": 8,
        "num_stages": 1 if is_small else 2,
    }


@triton.jit
def _load_transposed(pointer, row_offset, is_row, column, is_column):
    """`(columns, rows)` of a matrix whose rows begin at `row_offset`, zeros outside."""
    mask = is_row[None, :] & is_column[:, None]
    return tl.load(pointer + row_offset[None, :] + column[:, None], mask=mask, other=0.0)


@triton.jit
def _load_chunks_transposed(pointer, row_offset, is_row, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """All columns of these rows, as a tuple of `NUM_CHUNKS` tensors `(E, rows)`."""
    chunks = ()
    for chunk in tl.static_range(NUM_CHUNKS):
        address = pointer + row_offset[None, :] + (chunk * CHUNK + tl.arange(0, CHUNK))[:, None]
        chunks = chunks + (tl.load(address, mask=is_row[None, :], other=0.0),)  # noqa: RUF005
    return chunks


@triton.jit
def _both_halves(tiles, matrices, PRECISION: tl.constexpr):
    """Both halves of the keys of a tile before they are turned, `(L, F)` each, float32."""
    NUM_CHUNKS: tl.constexpr = len(tiles)
    first = tl.dot(tiles[0], matrices[0], input_precision=PRECISION)
    second = tl.dot(tiles[0], matrices[NUM_CHUNKS], input_precision=PRECISION)
    for chunk in tl.static_range(1, NUM_CHUNKS):
        first = tl.dot(tiles[chunk], matrices[chunk], first, input_precision=PRECISION)
        second = tl.dot(tiles[chunk], matrices[NUM_CHUNKS + chunk], second, input_precision=PRECISION)
    return first, second


@triton.jit
def _attend_tile(
    sums,
    maximum,
    total,
    tile,
    queries,
    matrices,
    inv_freq,
    angles,
    c_kv_ptr,
    sees_ptr,
    positions_ptr,
    c_kv_slot,
    first_slot,
    length,
    num_drafted,
    row,
    is_row,
    scaling,
    IS_LAST: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds one tile to a softmax; only with `IS_LAST` it may hold drafted slots or reach beyond the length."""
    slot = tile * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    is_held = slot >= first_slot
    if IS_LAST:
        is_held = is_held & (slot < length)
    address = c_kv_ptr + slot.to(tl.int64)[:, None] * c_kv_slot + tl.arange(0, CHUNK)[None, :]
    tiles = ()
    for chunk in tl.static_range(len(sums)):
        if IS_LAST or HAS_FIRST:
            latents = tl.load(address + chunk * CHUNK, mask=is_held[:, None], other=0.0)
        else:
            latents = tl.load(address + chunk * CHUNK)
        tiles = tiles + (latents,)  # noqa: RUF005
    drafted = slot - (length - num_drafted)
    is_drafted = is_held & (drafted >= 0)
    if IS_LAST:
        drafted_position = tl.load(positions_ptr + drafted, mask=is_drafted, other=0)
        angles = angles_at(tl.where(is_drafted, drafted_position, slot - first_slot), inv_freq)
    first, second = turned(_both_halves(tiles, matrices, PRECISION), angles)
    scores = tl.dot(first.to(queries[0].dtype), queries[0], input_precision=PRECISION)
    scores = tl.dot(second.to(queries[1].dtype), queries[1], scores, input_precision=PRECISION) * scaling
    if IS_LAST:
        is_asked = is_drafted[:, None] & is_row[None, :]
        sees_address = sees_ptr + row[None, :] * num_drafted + drafted[:, None]
        is_seen = (drafted < 0)[:, None] | (tl.load(sees_address, mask=is_asked, other=0) != 0)
        scores = tl.where(is_held[:, None] & is_seen, scores, float("-inf"))
    elif HAS_FIRST:
        scores = tl.where(is_held[:, None], scores, float("-inf"))
    return add_to_softmax(sums, maximum, total, scores, tiles, PRECISION)


@triton.jit
def wide_part_kernel(
    query_ptr,
    c_kv_ptr,
    w_uk_ptr,
    inv_freq_ptr,
    sees_ptr,
    positions_ptr,
    lengths_ptr,
    first_ptr,
    partial_ptr,
    maxima_ptr,
    totals_ptr,
    scaling,
    query_batch,
    query_head,
    query_row,
    c_kv_batch,
    c_kv_slot,
    num_slots,
    num_heads,
    num_rows,
    num_drafted,
    NUM_GROUPS: tl.constexpr,
    LATENT_DIM: tl.constexpr,
    KEY_DIM: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    NUM_CHUNKS: tl.constexpr = LATENT_DIM // CHUNK
    batch = tl.program_id(2).to(tl.int64)
    length = tl.minimum(tl.load(lengths_ptr + batch), num_slots)
    first_slot = tl.load(first_ptr + batch) if HAS_FIRST else 0
    begin, end = own_tiles(length, BLOCK_SLOTS)
    if begin >= end:
        return

    group, head, row, is_row = rows_of_group(num_heads, num_rows, NUM_GROUPS, BLOCK_ROWS)
    query_offset = batch * query_batch + head.to(tl.int64) * query_head + row.to(tl.int64) * query_row
    key_entry = tl.arange(0, BLOCK_KEY)
    is_key_entry = key_entry < KEY_DIM
    queries = (
        _load_transposed(query_ptr, query_offset, is_row, key_entry, is_key_entry),
        _load_transposed(query_ptr + KEY_DIM, query_offset, is_row, key_entry, is_key_entry),
    )
    w_offset = (group * 2 * KEY_DIM + key_entry) * LATENT_DIM
    matrices = _load_chunks_transposed(w_uk_ptr, w_offset, is_key_entry, NUM_CHUNKS, CHUNK)
    w_offset += KEY_DIM * LATENT_DIM
    matrices = matrices + _load_chunks_transposed(w_uk_ptr, w_offset, is_key_entry, NUM_CHUNKS, CHUNK)
    inv_freq = tl.load(inv_freq_ptr + key_entry, mask=is_key_entry, other=0.0)
    angles = angles_at(begin * BLOCK_SLOTS - first_slot + tl.arange(0, BLOCK_SLOTS), inv_freq)
    step_angles = cos_sin(BLOCK_SLOTS * inv_freq[None, :])

    c_kv_ptr += batch * c_kv_batch
    sees_ptr, positions_ptr = sees_ptr + batch * num_rows * num_drafted, positions_ptr + batch * num_drafted
    sums, maximum, total = empty_softmax(NUM_CHUNKS, CHUNK, BLOCK_ROWS, 1)
    last = tl.minimum(tl.maximum(tl.maximum(length - num_drafted, 0) // BLOCK_SLOTS, begin), end)
    for is_last in tl.static_range(2):
        begin, behind = (last, end) if is_last else (begin, last)
        for tile in tl.range(begin, behind, num_stages=1 if is_last else None):
            sums, maximum, total = _attend_tile(
                sums,
                maximum,
                total,
                tile,
                queries,
                matrices,
                inv_freq,
                angles,
                c_kv_ptr,
                sees_ptr,
                positions_ptr,
                c_kv_slot,
                first_slot,
                length,
                num_drafted,
                row,
                is_row,
                scaling,
                is_last,
                HAS_FIRST,
                CHUNK,
                BLOCK_SLOTS,
                PRECISION,
            )
            if not is_last:
                angles = turned(angles, step_angles)

    out_row = ((batch * tl.num_programs(1) + tl.program_id(1)) * num_heads + head) * num_rows + row
    store_part(partial_ptr, maxima_ptr, totals_ptr, sums, maximum, total, out_row, is_row)
