"""The part kernel of `latent_attention_triton.py` where R = 0: keys are made again in every step, tile by tile.

    score = q . RoPE(W_uk c_j, j) = RoPE(q, -b) . RoPE(W_uk c_j, j - b)     b: position of the tile's first slot

so that the angles that turn keys never change, and what is turned from tile to tile is the query. W_uk is read so that
the halves of a head take turns: the two entries that RoPE mixes (half against half as in Llama) then lie side by side.
Tiles that may hold drafted slots, whose positions are their own, or reach beyond the length come last, in a loop with
angles of their own.

Up to 32 rows the tiles are small, so that two programs share a multiprocessor: one multiplies while the other turns or
waits. More rows, as levels of trees have, take keys made once for 64 rows, where the text is long enough for that to
pay.

Shapes: L slots of a tile, N query rows of a tile, E entries of a chunk of the latent, F frequencies.
"""

import triton
import triton.language as tl

from .latent_tiles_triton import (
    add_to_softmax,
    angles_at,
    cos_sin,
    empty_softmax,
    load_chunks,
    load_rows,
    own_tiles,
    rows_of_group,
    shown,
    store_part,
    turned,
)

SMALL_ROWS, LARGE_ROWS = 32, 64
# From here on, keys made once for 64 rows are faster than twice for 32 (10 rows of 4 heads, C = 256, H200).
LONG_CAPACITY = 16384
# Where the sums of more than 16 rows find room in registers.
MAX_LARGE_LATENT = 256


def rotated_tile_sizes(num_rows: int, latent_dim: int, num_slots: int) -> dict[str, int]:
    """Sizes of a tile, its warps and stages."""
    sizes = {"CHUNK": latent_dim & -latent_dim}
    if num_rows > SMALL_ROWS and num_slots > LONG_CAPACITY and latent_dim <= MAX_LARGE_LATENT:
        return {**sizes, "BLOCK_ROWS": LARGE_ROWS, "BLOCK_SLOTS": 128, "num_warps": 8, "num_stages": 2}
    block_rows = 16 if num_rows <= 16 or latent_dim > MAX_LARGE_LATENT else SMALL_ROWS
    return {**sizes, "BLOCK_ROWS": block_rows, "BLOCK_SLOTS": 64, "num_warps": 4, "num_stages": 1}


def rotated_tile_bytes(tile: dict[str, int], latent_dim: int, head_dim: int) -> int:
    """Of shared memory in half precision: tiles, a group's key matrix, queries and weights."""
    num_rows, num_slots = tile["BLOCK_ROWS"], tile["BLOCK_SLOTS"]
    return 2 * ((tile["num_stages"] * num_slots + head_dim) * latent_dim + num_rows * (head_dim + num_slots))


@triton.jit
def _load_sides(
    w_uk_ptr, row, KEY_DIM: tl.constexpr, BLOCK_KEY: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr
):
    """W_uk of a head that begins at `row`, rows of its two halves taking turns, as chunks `(2F, E)`."""
    side, pair = tl.arange(0, 2 * BLOCK_KEY) % 2, tl.arange(0, 2 * BLOCK_KEY) // 2
    row_offset = (row + side * KEY_DIM + pair) * (NUM_CHUNKS * CHUNK)
    return load_chunks(w_uk_ptr, row_offset, pair < KEY_DIM, NUM_CHUNKS, CHUNK, True)


@triton.jit
def _sides_joined(pairs, dtype: tl.constexpr):
    """`(X, F)` twice -> `(X, 2F)`, entries taking turns."""
    first, second = pairs
    return tl.reshape(tl.join(first, second), (first.shape[0], 2 * first.shape[1])).to(dtype)


@triton.jit
def _keys(tiles, matrices, angles, BLOCK_KEY: tl.constexpr, PRECISION: tl.constexpr):
    """Keys of a tile, turned by `angles (L, F)`, `(L, 2F)`."""
    keys = tl.dot(tiles[0], tl.trans(matrices[0]), input_precision=PRECISION)
    for chunk in tl.static_range(1, len(tiles)):
        keys = tl.dot(tiles[chunk], tl.trans(matrices[chunk]), keys, input_precision=PRECISION)
    halves = tl.split(tl.reshape(keys, (keys.shape[0], BLOCK_KEY, 2)))
    return _sides_joined(turned(halves, angles), tiles[0].dtype)


@triton.jit
def _turned_back(queries, angles, dtype: tl.constexpr):
    """Queries `(N, F)` twice, turned back by the same `angles (F,)` for all rows, `(N, 2F)`."""
    cos, sin = angles
    return _sides_joined(turned(queries, (cos[None, :], -sin[None, :])), dtype)


@triton.jit
def rotated_part_kernel(
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
    num_slots,
    num_heads,
    num_rows,
    num_drafted,
    NUM_GROUPS: tl.constexpr,
    LATENT_DIM: tl.constexpr,
    C_KV_SLOT: tl.constexpr,
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
    query_offset = batch * query_batch + head * query_head + row * query_row
    place, key_entry = tl.arange(0, BLOCK_SLOTS), tl.arange(0, BLOCK_KEY)
    is_key_entry = key_entry < KEY_DIM
    queries = (
        load_rows(query_ptr, query_offset, is_row, key_entry, is_key_entry),
        load_rows(query_ptr + KEY_DIM, query_offset, is_row, key_entry, is_key_entry),
    )
    dtype: tl.constexpr = queries[0].dtype
    matrices = _load_sides(w_uk_ptr, group * 2 * KEY_DIM, KEY_DIM, BLOCK_KEY, NUM_CHUNKS, CHUNK)
    inv_freq = tl.load(inv_freq_ptr + key_entry, mask=is_key_entry, other=0.0)
    angles, step_angles = angles_at(place, inv_freq), cos_sin(BLOCK_SLOTS * inv_freq)
    tile_angles = cos_sin((begin * BLOCK_SLOTS - first_slot).to(tl.float32) * inv_freq)

    # Of the first tile; from there on offsets have 32 bits.
    c_kv_ptr += batch * c_kv_batch + begin.to(tl.int64) * (BLOCK_SLOTS * C_KV_SLOT)
    sees_ptr, positions_ptr = sees_ptr + batch * num_rows * num_drafted, positions_ptr + batch * num_drafted
    softmax = empty_softmax(NUM_CHUNKS, CHUNK, BLOCK_ROWS)
    last = tl.minimum(tl.maximum(tl.maximum(length - num_drafted, 0) // BLOCK_SLOTS, begin), end)
    for tile in tl.range(begin, last):
        slot = tile * BLOCK_SLOTS + place
        is_held = slot >= first_slot
        offset = (tile - begin) * (BLOCK_SLOTS * C_KV_SLOT) + place * C_KV_SLOT
        tiles = load_chunks(c_kv_ptr, offset, is_held, NUM_CHUNKS, CHUNK, HAS_FIRST)
        query = _turned_back(queries, tile_angles, dtype)
        keys = _keys(tiles, matrices, angles, BLOCK_KEY, PRECISION)
        scores = tl.trans(tl.dot(keys, tl.trans(query), input_precision=PRECISION) * scaling)
        if BLOCK_ROWS < 64:  # with more, weights are read rightly either way
            scores = shown(scores, sees_ptr, row, is_row, slot - (length - num_drafted), is_held, num_drafted)
        elif HAS_FIRST:
            scores = tl.where(is_held[None, :], scores, float("-inf"))
        softmax = add_to_softmax(softmax, scores, tiles, PRECISION)
        tile_angles = turned(tile_angles, step_angles)

    for tile in tl.range(last, end, num_stages=1):
        slot = tile * BLOCK_SLOTS + place
        drafted, is_held = slot - (length - num_drafted), (slot >= first_slot) & (slot < length)
        drafted_position = tl.load(positions_ptr + drafted, mask=is_held & (drafted >= 0), other=0)
        own_angles = angles_at(tl.where(drafted >= 0, drafted_position, slot - first_slot), inv_freq)
        offset = (tile - begin) * (BLOCK_SLOTS * C_KV_SLOT) + place * C_KV_SLOT
        tiles = load_chunks(c_kv_ptr, offset, is_held, NUM_CHUNKS, CHUNK, True)
        keys = _keys(tiles, matrices, own_angles, BLOCK_KEY, PRECISION)
        query = _sides_joined(queries, dtype)
        scores = tl.trans(tl.dot(keys, tl.trans(query), input_precision=PRECISION) * scaling)
        scores = shown(scores, sees_ptr, row, is_row, drafted, is_held, num_drafted)
        softmax = add_to_softmax(softmax, scores, tiles, PRECISION)

    out_row = ((batch * tl.num_programs(1) + tl.program_id(1)) * num_heads + head) * num_rows + row
    store_part(partial_ptr, maxima_ptr, totals_ptr, softmax, out_row, is_row)
