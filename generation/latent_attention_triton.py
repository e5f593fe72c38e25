"""Triton kernels of `attend_latents`: attention split over the slots (flash-decoding), over latents.

With R > 0 a first kernel moves W_uk into the query. The next splits: a program takes some rows of heads that share
keys and a contiguous part of the slots of a sequence, and reads a tile of latents once, for scores and for values. The
last joins the parts and applies W_uv. Each starts while the one before ends, and then waits for what that has written.

In the second kernel everything is transposed, slots or latent entries first and query rows last: a matrix product on
the device wants at least 64 of the first and is content with 16 of the last.

The number of parts is fixed by the cache's capacity, their bounds by the lengths on the device: a part that has
nothing to do writes nothing, and the joining kernel knows it by the same arithmetic.

With R = 0 keys are turned by their place in a tile, by angles that never change, and the query back by the place of
the tile. W_uk is read so that the halves of a head take turns: the two entries that RoPE mixes then lie side by side.
That takes registers: many rows, or wide latents, have a kernel of their own (`latent_attention_wide_triton.py`).

The latent width is never padded where attention is computed: it is taken in chunks of the largest power of two that
divides it. Rows, slots, head width and R are masked.

Shapes: L slots of a tile, N query rows of a tile, E entries of a chunk of the latent, F frequencies, P parts.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .latent_attention_wide_triton import wide_part_kernel, wide_tile_sizes
from .latent_tiles_triton import (
    add_to_softmax,
    angles_at,
    block_of,
    cos_sin,
    empty_softmax,
    own_tiles,
    rows_of_group,
    store_part,
    tiles_of_part,
    turned,
)

ROTATED_ROWS = 16  # of a group, for which keys are turned by tiles
ABSORBED_ENTRIES = 64
JOINED_PARTS = 16
# Of W_uv in the registers of a program.
JOINED_ELEMENTS = 128 * 256
# Of a multiprocessor of an H100, less what each of two programs needs besides.
SHARED_BYTES = 220 * 1024
CPU_PROGRAMS = 12
LOG2_E = 1.4426950408889634  # exponentials are powers of two


def attend(
    query: Tensor, c_kv: Tensor, k_rope: Tensor, projections, lengths: Tensor, scaling: float, drafted, first
) -> Tensor:
    """See `attend_latents`."""
    query, c_kv, k_rope = (rows_contiguous(tensor) for tensor in (query, c_kv, k_rope))
    w_uk, w_uv = (matrix.to(query.dtype).contiguous() for matrix in (projections.w_uk, projections.w_uv))
    batch_size, num_heads, num_rows, _ = query.shape
    num_slots, latent_dim = c_kv.shape[2:]
    (num_groups, head_dim, _), rope_dim = w_uk.shape, k_rope.shape[-1]
    num_key_groups = num_groups if rope_dim == 0 else 1
    group_rows = num_heads // num_key_groups * num_rows
    is_wide = rope_dim == 0 and (group_rows > ROTATED_ROWS or latent_dim > 256 or query.dtype == torch.float32)
    sizes = (group_rows, latent_dim)
    tile = wide_tile_sizes(*sizes, query.element_size()) if is_wide else tile_sizes(*sizes, rope_dim)
    num_row_tiles = triton.cdiv(group_rows, tile["BLOCK_ROWS"])
    # Not one program more than run at once: the last few would double the time.
    max_programs = num_programs(query.device, programs_per_sm(tile, latent_dim, rope_dim))
    max_parts = max_programs // (batch_size * num_key_groups * num_row_tiles)
    num_parts = max(1, min(triton.cdiv(num_slots, tile["BLOCK_SLOTS"]), max_parts))
    partial = query.new_empty(batch_size, num_parts, num_heads, num_rows, latent_dim, dtype=torch.float32)
    maxima, totals = query.new_empty(2, *partial.shape[:-1], dtype=torch.float32)
    lengths = lengths.contiguous()
    sees, positions, num_drafted = drafted_inputs(drafted, lengths)
    overlap = {"launch_pdl": True} if query.is_cuda else {}
    latent_query, inv_freq = query, projections.inv_freq
    if rope_dim > 0:
        latent_query, inv_freq = absorb_keys(query, w_uk), lengths
    shapes = {
        "num_slots": num_slots,
        "num_heads": num_heads,
        "num_rows": num_rows,
        "num_drafted": num_drafted,
        "NUM_GROUPS": num_key_groups,
        "LATENT_DIM": latent_dim,
        "BLOCK_KEY": block_of(head_dim // 2 if rope_dim == 0 else rope_dim),
        "HAS_FIRST": first is not None,
        "PRECISION": "tf32x3" if query.dtype == torch.float32 else "tf32",
    }
    # Arguments of both kernels, from the masks of drafted slots on.
    arguments = (
        sees,
        positions,
        lengths,
        lengths if first is None else first.contiguous(),
        partial,
        maxima,
        totals,
        LOG2_E * scaling * (projections.attention_scaling if rope_dim == 0 else 1.0),
        *query.stride()[:3],
        c_kv.stride(0),
        c_kv.stride(2),
    )
    grid = num_row_tiles * num_key_groups, num_parts, batch_size
    if is_wide:
        wide_part_kernel[grid](
            query, c_kv, w_uk, inv_freq.contiguous(), *arguments, KEY_DIM=head_dim // 2, **shapes, **tile
        )
    else:
        _part_kernel[grid](
            query,
            latent_query,
            c_kv,
            k_rope,
            w_uk,
            inv_freq.contiguous(),
            *arguments,
            k_rope.stride(0),
            k_rope.stride(2),
            HEAD_DIM=head_dim,
            ROPE_DIM=rope_dim,
            OVERLAPS=bool(overlap),
            **shapes,
            **tile,
            **(overlap if rope_dim > 0 else {}),
        )
    output = query.new_empty(batch_size, num_rows, num_heads, head_dim)
    block_entries = min(block_of(head_dim), JOINED_ELEMENTS // block_of(latent_dim))
    _join_kernel[num_heads * num_rows, triton.cdiv(head_dim, block_entries), batch_size](
        partial,
        maxima,
        totals,
        lengths,
        w_uv,
        output,
        num_slots,
        num_parts,
        num_heads,
        num_rows,
        NUM_GROUPS=num_groups,
        LATENT_DIM=latent_dim,
        BLOCK_LATENT=block_of(latent_dim),
        HEAD_DIM=head_dim,
        BLOCK_ENTRIES=block_entries,
        BLOCK_SLOTS=tile["BLOCK_SLOTS"],
        MAX_PARTS=triton.next_power_of_2(max_programs),
        BLOCK_PARTS=JOINED_PARTS,
        OVERLAPS=bool(overlap),
        num_warps=8,
        **overlap,
    )
    return output.transpose(1, 2)


def absorb_keys(query: Tensor, w_uk: Tensor) -> Tensor:
    """The query of the latents themselves, `(B, H, W, C)`."""
    batch_size, num_heads, num_rows, _ = query.shape
    num_groups, head_dim, latent_dim = w_uk.shape
    latent_query = query.new_empty(batch_size, num_heads, num_rows, latent_dim)
    block_rows = min(64, block_of(num_heads // num_groups * num_rows))
    num_row_tiles = triton.cdiv(num_heads // num_groups * num_rows, block_rows)
    _absorb_kernel[num_row_tiles * num_groups, triton.cdiv(latent_dim, ABSORBED_ENTRIES), batch_size](
        query,
        w_uk,
        latent_query,
        *query.stride()[:3],
        num_heads,
        num_rows,
        NUM_GROUPS=num_groups,
        LATENT_DIM=latent_dim,
        HEAD_DIM=head_dim,
        BLOCK_HEAD=block_of(head_dim),
        BLOCK_ROWS=block_rows,
        BLOCK_ENTRIES=ABSORBED_ENTRIES,
        OVERLAPS=query.is_cuda,
        PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32",
    )
    return latent_query


def rows_contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where its last axis is not contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 0 else tensor.contiguous()


def tile_sizes(num_rows: int, latent_dim: int, rope_dim: int) -> dict[str, int]:
    """Sizes of a tile, its warps and stages; shared memory holds tiles, their queries and a group's key matrix."""
    # With 32 rows registers do not suffice for wide latents.
    block_rows = 16 if num_rows <= 32 or rope_dim == 0 or latent_dim > 256 else 32
    return {
        "CHUNK": latent_dim & -latent_dim,
        "BLOCK_ROWS": block_rows,
        "BLOCK_SLOTS": 128 if rope_dim == 0 else 64,
        "num_warps": 8 if rope_dim == 0 else 4,
        "num_stages": 3 if rope_dim > 0 and latent_dim <= 256 and block_rows == 16 else 2,
    }


def programs_per_sm(tile: dict[str, int], latent_dim: int, rope_dim: int) -> int:
    """How many programs share a multiprocessor; two where both find room."""
    num_bytes = 2 * (latent_dim + rope_dim) * (tile["num_stages"] * tile["BLOCK_SLOTS"] + tile["BLOCK_ROWS"])
    return 2 if rope_dim > 0 and 2 * num_bytes <= SHARED_BYTES else 1


def num_programs(device: torch.device, per_sm: int) -> int:
    """How many programs run at once."""
    return per_sm * sm_count(device) if device.type == "cuda" else CPU_PROGRAMS


@functools.cache
def sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def drafted_inputs(drafted, lengths: Tensor) -> tuple[Tensor, Tensor, int]:
    """Masks and positions of drafted slots, and how many slots these are; without any, something that is not read."""
    if drafted is None:
        return lengths, lengths, 0
    positions = lengths if drafted.positions is None else drafted.positions.to(torch.int32).contiguous()
    return drafted.sees.contiguous().view(torch.int8), positions, drafted.sees.shape[2]


@triton.jit
def _load_rows(pointer, row_offset, is_row, column, is_column):
    """`(rows, columns)` of a matrix whose rows begin at `row_offset`, zeros outside."""
    mask = is_row[:, None] & is_column[None, :]
    return tl.load(pointer + row_offset[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def _load_chunks(pointer, row_offset, is_row, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """All columns of these rows, as a tuple of `NUM_CHUNKS` tensors `(rows, E)`."""
    chunks = ()
    for chunk in tl.static_range(NUM_CHUNKS):
        address = pointer + row_offset[:, None] + (chunk * CHUNK + tl.arange(0, CHUNK))[None, :]
        chunks = chunks + (tl.load(address, mask=is_row[:, None], other=0.0),)  # noqa: RUF005
    return chunks


@triton.jit
def _load_sides(
    w_uk_ptr, row, KEY_DIM: tl.constexpr, BLOCK_KEY: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr
):
    """W_uk of a head that begins at `row`, rows of its two halves taking turns, as chunks `(2F, E)`."""
    side, pair = tl.arange(0, 2 * BLOCK_KEY) % 2, tl.arange(0, 2 * BLOCK_KEY) // 2
    row_offset = (row + side * KEY_DIM + pair) * (NUM_CHUNKS * CHUNK)
    return _load_chunks(w_uk_ptr, row_offset, pair < KEY_DIM, NUM_CHUNKS, CHUNK)


@triton.jit
def _back(angles):
    cos, sin = angles
    return cos, -sin


@triton.jit
def _columns(angles):
    """Angles of frequencies, `(F,)`, as those of all rows, `(1, F)`."""
    cos, sin = angles
    return cos[None, :], sin[None, :]


@triton.jit
def _moved(keys, place, position_address, is_drafted, inv_freq):
    """Keys so turned that what will turn them to `place (L,)` turns drafted ones to their own position."""
    position = tl.load(position_address, mask=is_drafted, other=0)
    position = tl.where(is_drafted, position, place)
    return turned(turned(keys, angles_at(position, inv_freq)), _back(angles_at(place, inv_freq)))


@triton.jit
def _sides_joined(pairs):
    """`(X, F)` twice -> `(X, 2F)`, entries taking turns."""
    first, second = pairs
    return tl.reshape(tl.join(first, second), (first.shape[0], 2 * first.shape[1]))


@triton.jit
def _keys(tiles, matrices, BLOCK_KEY: tl.constexpr, PRECISION: tl.constexpr):
    """Both halves of the keys of a tile before they are turned, `(L, F)` each, float32."""
    keys = tl.dot(tiles[0], tl.trans(matrices[0]), input_precision=PRECISION)
    for chunk in tl.static_range(1, len(tiles)):
        keys = tl.dot(tiles[chunk], tl.trans(matrices[chunk]), keys, input_precision=PRECISION)
    return tl.split(tl.reshape(keys, (keys.shape[0], BLOCK_KEY, 2)))


@triton.jit
def _rotated_scores(keys, angles, queries, tile_angles, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Of keys turned by their place in the tile and queries turned back by the place of the tile."""
    keys = _sides_joined(turned(keys, angles)).to(dtype)
    query = _sides_joined(turned(queries, _back(_columns(tile_angles)))).to(dtype)
    return tl.dot(keys, tl.trans(query), input_precision=PRECISION)


@triton.jit
def _absorbed_scores(tiles, ropes, queries, rope_query, PRECISION: tl.constexpr):
    scores = tl.dot(ropes, tl.trans(rope_query), input_precision=PRECISION)
    for chunk in tl.static_range(len(tiles)):
        scores = tl.dot(tiles[chunk], tl.trans(queries[chunk]), scores, input_precision=PRECISION)
    return scores


@triton.jit
def _shown(scores, sees_ptr, row, is_row, drafted, is_held, is_drafted, num_drafted):
    """Minus infinity where a row does not see a slot: those not held, and drafted ones that are not its own."""
    address = sees_ptr + row[None, :] * num_drafted + drafted[:, None]
    sees = tl.load(address, mask=is_drafted[:, None] & is_row[None, :], other=1)
    return tl.where(is_held[:, None] & (sees != 0), scores, float("-inf"))


@triton.jit
def _part_kernel(
    query_ptr,
    latent_query_ptr,
    c_kv_ptr,
    k_rope_ptr,
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
    k_rope_batch,
    k_rope_slot,
    num_slots,
    num_heads,
    num_rows,
    num_drafted,
    NUM_GROUPS: tl.constexpr,
    LATENT_DIM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    OVERLAPS: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    NUM_CHUNKS: tl.constexpr = LATENT_DIM // CHUNK
    IS_ROTATED: tl.constexpr = ROPE_DIM == 0
    KEY_DIM: tl.constexpr = HEAD_DIM // 2 if IS_ROTATED else ROPE_DIM
    if OVERLAPS:
        gdc_launch_dependents()
    batch = tl.program_id(2).to(tl.int64)
    length = tl.minimum(tl.load(lengths_ptr + batch), num_slots)
    first_slot = tl.load(first_ptr + batch) if HAS_FIRST else 0
    begin, end = own_tiles(length, BLOCK_SLOTS)
    if OVERLAPS and not IS_ROTATED:
        gdc_wait()
    if begin >= end:
        return

    group, head, row, is_row = rows_of_group(num_heads, num_rows, NUM_GROUPS, BLOCK_ROWS)
    query_offset = batch * query_batch + head * query_head + row * query_row
    place, key_entry = tl.arange(0, BLOCK_SLOTS), tl.arange(0, BLOCK_KEY)
    is_key_entry = key_entry < KEY_DIM
    if IS_ROTATED:
        inv_freq = tl.load(inv_freq_ptr + key_entry, mask=is_key_entry, other=0.0)
        queries = (
            _load_rows(query_ptr, query_offset, is_row, key_entry, is_key_entry),
            _load_rows(query_ptr + KEY_DIM, query_offset, is_row, key_entry, is_key_entry),
        )
        matrices = _load_sides(w_uk_ptr, group * HEAD_DIM, KEY_DIM, BLOCK_KEY, NUM_CHUNKS, CHUNK)
        angles, step_angles = angles_at(place, inv_freq), cos_sin(BLOCK_SLOTS * inv_freq)
        tile_angles = cos_sin((begin * BLOCK_SLOTS - first_slot).to(tl.float32) * inv_freq)
    else:
        rope_query = _load_rows(query_ptr + HEAD_DIM, query_offset, is_row, key_entry, is_key_entry)
        query_offset = ((batch * num_heads + head) * num_rows + row) * LATENT_DIM
        queries = _load_chunks(latent_query_ptr, query_offset, is_row, NUM_CHUNKS, CHUNK)

    # Of the first tile; only from tile to tile an offset may need 64 bits.
    c_kv_ptr += batch * c_kv_batch + begin.to(tl.int64) * BLOCK_SLOTS * c_kv_slot
    k_rope_ptr += batch * k_rope_batch + begin.to(tl.int64) * BLOCK_SLOTS * k_rope_slot
    sees_ptr, positions_ptr = sees_ptr + batch * num_rows * num_drafted, positions_ptr + batch * num_drafted
    sums, maximum, total = empty_softmax(NUM_CHUNKS, CHUNK, BLOCK_ROWS, BLOCK_SLOTS)
    for tile in range(begin, end):
        slot = tile * BLOCK_SLOTS + place
        drafted, is_held = slot - (length - num_drafted), (slot >= first_slot) & (slot < length)
        is_drafted = is_held & (drafted >= 0)
        tiles = _load_chunks(c_kv_ptr, place * c_kv_slot, is_held, NUM_CHUNKS, CHUNK)
        c_kv_ptr += BLOCK_SLOTS * c_kv_slot
        if IS_ROTATED:
            keys = _keys(tiles, matrices, BLOCK_KEY, PRECISION)
            if (tile + 1) * BLOCK_SLOTS > length - num_drafted:
                keys = _moved(keys, slot - first_slot, positions_ptr + drafted, is_drafted, inv_freq)
            scores = _rotated_scores(keys, angles, queries, tile_angles, tiles[0].dtype, PRECISION)
            tile_angles = turned(tile_angles, step_angles)
        else:
            ropes = _load_rows(k_rope_ptr, place * k_rope_slot, is_held, key_entry, is_key_entry)
            k_rope_ptr += BLOCK_SLOTS * k_rope_slot
            scores = _absorbed_scores(tiles, ropes, queries, rope_query, PRECISION)
        scores = _shown(scores * scaling, sees_ptr, row, is_row, drafted, is_held, is_drafted, num_drafted)
        sums, maximum, total = add_to_softmax(sums, maximum, total, scores, tiles, PRECISION)

    out_row = ((batch * tl.num_programs(1) + tl.program_id(1)) * num_heads + head) * num_rows + row
    store_part(partial_ptr, maxima_ptr, totals_ptr, sums, maximum, total, out_row, is_row)


@triton.jit
def _absorb_kernel(
    query_ptr,
    w_uk_ptr,
    output_ptr,
    query_batch,
    query_head,
    query_row,
    num_heads,
    num_rows,
    NUM_GROUPS: tl.constexpr,
    LATENT_DIM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    OVERLAPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if OVERLAPS:
        gdc_launch_dependents()
    batch = tl.program_id(2).to(tl.int64)
    group, head, row, is_row = rows_of_group(num_heads, num_rows, NUM_GROUPS, BLOCK_ROWS)
    entry, head_entry = tl.program_id(1) * BLOCK_ENTRIES + tl.arange(0, BLOCK_ENTRIES), tl.arange(0, BLOCK_HEAD)
    is_entry, is_head_entry = entry < LATENT_DIM, head_entry < HEAD_DIM
    w_uk = _load_rows(w_uk_ptr, (group * HEAD_DIM + head_entry) * LATENT_DIM, is_head_entry, entry, is_entry)
    query_offset = batch * query_batch + head * query_head + row * query_row
    query = _load_rows(query_ptr, query_offset, is_row, head_entry, is_head_entry)
    latent_query = tl.dot(tl.trans(w_uk), tl.trans(query), input_precision=PRECISION).to(query.dtype)
    out_offset = ((batch * num_heads + head) * num_rows + row) * LATENT_DIM
    mask = is_row[None, :] & is_entry[:, None]
    tl.store(output_ptr + out_offset[None, :] + entry[:, None], latent_query, mask=mask)


@triton.jit(do_not_specialize=["num_parts"])
def _join_kernel(
    partial_ptr,
    maxima_ptr,
    totals_ptr,
    lengths_ptr,
    w_uv_ptr,
    output_ptr,
    num_slots,
    num_parts,
    num_heads,
    num_rows,
    NUM_GROUPS: tl.constexpr,
    LATENT_DIM: tl.constexpr,
    BLOCK_LATENT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    head, row, batch = tl.program_id(0) // num_rows, tl.program_id(0) % num_rows, tl.program_id(2).to(tl.int64)
    latent, entry = tl.arange(0, BLOCK_LATENT), tl.program_id(1) * BLOCK_ENTRIES + tl.arange(0, BLOCK_ENTRIES)
    is_latent, is_entry = latent < LATENT_DIM, entry < HEAD_DIM
    group = head // (num_heads // NUM_GROUPS)
    w_uv = _load_rows(w_uv_ptr, (group * HEAD_DIM + entry) * LATENT_DIM, is_entry, latent, is_latent)
    length = tl.minimum(tl.load(lengths_ptr + batch), num_slots)
    num_tiles, tiles_per_part = tiles_of_part(length, num_parts, BLOCK_SLOTS)
    num_written = tl.cdiv(num_tiles, tl.maximum(tiles_per_part, 1))
    if OVERLAPS:
        gdc_wait()

    first_row = batch * num_parts * num_heads * num_rows + tl.program_id(0)
    part = tl.arange(0, MAX_PARTS)
    statistic = first_row + part * num_heads * num_rows
    maxima = tl.load(maxima_ptr + statistic, mask=part < num_written, other=float("-inf"))
    maximum = tl.max(maxima, axis=0)
    maximum = tl.where(maximum == float("-inf"), 0.0, maximum)
    totals = tl.load(totals_ptr + statistic, mask=part < num_written, other=0.0)
    total = tl.sum(totals * tl.exp2(maxima - maximum), axis=0)
    sums = tl.zeros([BLOCK_PARTS, BLOCK_LATENT], tl.float32)
    for begin in range(0, num_written, BLOCK_PARTS):
        some = begin + tl.arange(0, BLOCK_PARTS)
        in_row = first_row + some * num_heads * num_rows
        partial = _load_rows(partial_ptr, in_row * LATENT_DIM, some < num_written, latent, is_latent)
        some_maxima = tl.load(maxima_ptr + in_row, mask=some < num_written, other=float("-inf"))
        sums += partial * tl.exp2(some_maxima - maximum)[:, None]
    latents = tl.sum(sums, axis=0) / tl.where(total > 0, total, 1.0)
    values = tl.sum(w_uv.to(tl.float32) * latents[None, :], axis=1)
    out_offset = ((batch * num_rows + row) * num_heads + head) * HEAD_DIM
    tl.store(output_ptr + out_offset + entry, values.to(output_ptr.dtype.element_ty), mask=is_entry)
