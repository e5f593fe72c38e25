"""Triton kernels of `attend_latents`: attention split over the slots (flash-decoding), over latents.

With R > 0 a first kernel moves W_uk into the query. The next splits: a program takes some rows of heads that share
keys and a contiguous part of the slots of a sequence, and reads a tile of latents once, for scores and for values. The
last joins the parts and applies W_uv. Each starts while the one before ends, and then waits for what that has written.
With R = 0 the kernel that splits is that of `latent_rotated_triton.py`, or one of `latent_pipeline_gluon.py` and
`latent_twins_gluon.py`.

The number of parts is fixed by the cache's capacity, their bounds by the lengths on the device: a part that has
nothing to do writes nothing, and the joining kernel knows it by the same arithmetic.

The latent width is never padded where attention is computed. Rows, slots, head width and R are masked.

Shapes: L slots of a tile, N query rows of a tile, E entries of a chunk of the latent, P parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .latent_parts import Parts, sm_count
from .latent_pipeline import pipeline_takes, twins_are_faster
from .latent_rotated_triton import rotated_part_kernel, rotated_tile_bytes, rotated_tile_sizes
from .latent_tiles_triton import (
    add_to_softmax,
    block_of,
    empty_softmax,
    load_chunks,
    load_rows,
    own_tiles,
    rows_of_group,
    shown,
    store_part,
    tiles_of_part,
)

ABSORBED_ENTRIES = 64
JOINED_PARTS = 16
# Of W_uv in the registers of a program.
JOINED_ELEMENTS = 128 * 256
# Shared memory of a multiprocessor of an H100, less what the device takes of it for each of two programs; what a
# program takes beyond its tiles; and the warps of a program, with 255 registers a thread, of which two find room.
SHARED_BYTES, SCRATCH_BYTES, SHARING_WARPS = 226 * 1024, 4096, 4
CPU_PROGRAMS = 12
LOG2_E = 1.4426950408889634  # exponentials are powers of two


def attend(
    query: Tensor, c_kv: Tensor, k_rope: Tensor, projections, lengths: Tensor, scaling: float, drafted, first
) -> Tensor:
    """See `attend_latents`."""
    query, c_kv, k_rope = (rows_contiguous(tensor) for tensor in (query, c_kv, k_rope))
    w_uk, w_uv = (matrix.to(query.dtype).contiguous() for matrix in (projections.w_uk, projections.w_uv))
    lengths, scaling, inv_freq = lengths.contiguous(), LOG2_E * scaling, None
    drafted = drafted_inputs(drafted, lengths)
    if k_rope.shape[-1] == 0:
        inv_freq, scaling = projections.inv_freq.contiguous(), scaling * projections.attention_scaling
    if inv_freq is not None and first is None and pipeline_takes(query, c_kv, len(w_uk)):
        # Not every Triton has Gluon.
        if twins_are_faster(query, c_kv, len(w_uk)):
            from .latent_twins_gluon import twin_parts as gluon_parts
        else:
            from .latent_pipeline_gluon import pipelined_parts as gluon_parts

        parts = gluon_parts(query, c_kv, w_uk, inv_freq, lengths, scaling, drafted)
    else:
        parts = split_parts(query, c_kv, k_rope, w_uk, inv_freq, lengths, scaling, drafted, first)
    return join_parts(parts, lengths, w_uv, num_slots=c_kv.shape[2]).transpose(1, 2)


def split_parts(
    query: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    inv_freq: Tensor | None,
    lengths: Tensor,
    scaling: float,
    drafted: tuple,
    first: Tensor | None,
) -> Parts:
    """In all other cases; `inv_freq` where R = 0."""
    batch_size, num_heads, num_rows, _ = query.shape
    num_slots, latent_dim = c_kv.shape[2:]
    (num_groups, head_dim, _), rope_dim = w_uk.shape, k_rope.shape[-1]
    num_key_groups = num_groups if rope_dim == 0 else 1
    group_rows = num_heads // num_key_groups * num_rows
    if rope_dim == 0:
        tile = rotated_tile_sizes(group_rows, latent_dim, num_slots)
        shared_bytes = rotated_tile_bytes(tile, latent_dim, 2 * block_of(head_dim // 2))
    else:
        tile = absorbed_tile_sizes(group_rows, latent_dim)
        shared_bytes = absorbed_tile_bytes(tile, latent_dim, block_of(rope_dim))
    num_row_tiles = triton.cdiv(group_rows, tile["BLOCK_ROWS"])
    max_programs = num_programs(query.device, tile["num_warps"], shared_bytes)
    programs_per_part = batch_size * num_key_groups * num_row_tiles
    parts = Parts.empty(query, c_kv, programs_per_part, tile["BLOCK_SLOTS"], max_programs)
    sees, positions, num_drafted = drafted
    # What both kernels that split take, in their order.
    arguments = (
        lengths,
        lengths if first is None else first.contiguous(),
        parts.sums,
        parts.maxima,
        parts.totals,
        scaling,
        *query.stride()[:3],
        c_kv.stride(0),
    )
    sizes = {
        "num_slots": num_slots,
        "num_heads": num_heads,
        "num_rows": num_rows,
        "num_drafted": num_drafted,
        "NUM_GROUPS": num_key_groups,
        "LATENT_DIM": latent_dim,
        "C_KV_SLOT": c_kv.stride(2),
        "BLOCK_KEY": block_of(head_dim // 2 if rope_dim == 0 else rope_dim),
        "HAS_FIRST": first is not None,
        "PRECISION": "tf32x3" if query.dtype == torch.float32 else "tf32",
        **tile,
    }
    grid = num_row_tiles * num_key_groups, parts.sums.shape[1], batch_size
    if rope_dim == 0:
        rotated_part_kernel[grid](
            query, c_kv, w_uk, inv_freq, sees, positions, *arguments, KEY_DIM=head_dim // 2, **sizes
        )
        return parts
    latent_query = absorb_keys(query, w_uk)
    _absorbed_part_kernel[grid](
        query,
        latent_query,
        c_kv,
        k_rope,
        sees,
        *arguments,
        k_rope.stride(0),
        HEAD_DIM=head_dim,
        ROPE_DIM=rope_dim,
        K_ROPE_SLOT=k_rope.stride(2),
        OVERLAPS=query.is_cuda,
        **sizes,
        **({"launch_pdl": True} if query.is_cuda else {}),
    )
    return parts


def join_parts(parts: Parts, lengths: Tensor, w_uv: Tensor, num_slots: int) -> Tensor:
    """Values of all parts together, `(B, W, H, d)`."""
    batch_size, num_parts, num_heads, num_rows, latent_dim = parts.sums.shape
    num_groups, head_dim, _ = w_uv.shape
    output = w_uv.new_empty(batch_size, num_rows, num_heads, head_dim)
    block_entries = min(block_of(head_dim), JOINED_ELEMENTS // block_of(latent_dim))
    _join_kernel[num_heads * num_rows, triton.cdiv(head_dim, block_entries), batch_size](
        parts.sums,
        parts.maxima,
        parts.totals,
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
        BLOCK_SLOTS=parts.block_slots,
        MAX_PARTS=block_of(num_parts),
        BLOCK_PARTS=JOINED_PARTS,
        OVERLAPS=output.is_cuda,
        num_warps=8,
        **({"launch_pdl": True} if output.is_cuda else {}),
    )
    return output


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


def absorbed_tile_sizes(num_rows: int, latent_dim: int) -> dict[str, int]:
    """Sizes of a tile where R > 0, its warps and stages."""
    # With 32 rows registers do not suffice for wide latents.
    block_rows = 16 if num_rows <= 32 or latent_dim > 256 else 32
    num_stages = 3 if latent_dim <= 256 and block_rows == 16 else 2
    sizes = {"CHUNK": latent_dim & -latent_dim, "BLOCK_ROWS": block_rows, "BLOCK_SLOTS": 64}
    return {**sizes, "num_warps": 4, "num_stages": num_stages}


def absorbed_tile_bytes(tile: dict[str, int], latent_dim: int, rope_dim: int) -> int:
    """Of shared memory in half precision: tiles, queries and weights."""
    num_rows, num_slots = tile["BLOCK_ROWS"], tile["BLOCK_SLOTS"]
    return 2 * ((tile["num_stages"] * num_slots + num_rows) * (latent_dim + rope_dim) + num_rows * num_slots)


def num_programs(device: torch.device, num_warps: int, shared_bytes: int) -> int:
    """How many programs run at once; two share a multiprocessor where both find room."""
    if device.type != "cuda":
        return CPU_PROGRAMS
    has_room = num_warps == SHARING_WARPS and 2 * (shared_bytes + SCRATCH_BYTES) <= SHARED_BYTES
    return (2 if has_room else 1) * sm_count(device)


def drafted_inputs(drafted, lengths: Tensor) -> tuple[Tensor, Tensor, int]:
    """Masks and positions of drafted slots, and how many slots these are; without any, something that is not read."""
    if drafted is None:
        return lengths, lengths, 0
    positions = lengths if drafted.positions is None else drafted.positions.to(torch.int32).contiguous()
    return drafted.sees.contiguous().view(torch.int8), positions, drafted.sees.shape[2]


@triton.jit
def _absorbed_scores(tiles, ropes, queries, rope_query, PRECISION: tl.constexpr):
    """`(N, L)`."""
    scores = tl.dot(ropes, tl.trans(rope_query), input_precision=PRECISION)
    for chunk in tl.static_range(len(tiles)):
        scores = tl.dot(tiles[chunk], tl.trans(queries[chunk]), scores, input_precision=PRECISION)
    return tl.trans(scores)


@triton.jit
def _absorbed_part_kernel(
    query_ptr,
    latent_query_ptr,
    c_kv_ptr,
    k_rope_ptr,
    sees_ptr,
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
    k_rope_batch,
    num_slots,
    num_heads,
    num_rows,
    num_drafted,
    NUM_GROUPS: tl.constexpr,
    LATENT_DIM: tl.constexpr,
    C_KV_SLOT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    K_ROPE_SLOT: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    OVERLAPS: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    NUM_CHUNKS: tl.constexpr = LATENT_DIM // CHUNK
    if OVERLAPS:
        gdc_launch_dependents()
    batch = tl.program_id(2).to(tl.int64)
    length = tl.minimum(tl.load(lengths_ptr + batch), num_slots)
    first_slot = tl.load(first_ptr + batch) if HAS_FIRST else 0
    begin, end = own_tiles(length, BLOCK_SLOTS)
    _group, head, row, is_row = rows_of_group(num_heads, num_rows, NUM_GROUPS, BLOCK_ROWS)
    query_offset = batch * query_batch + head * query_head + row * query_row
    place, key_entry = tl.arange(0, BLOCK_SLOTS), tl.arange(0, BLOCK_KEY)
    is_key_entry = key_entry < ROPE_DIM
    rope_query = load_rows(query_ptr + HEAD_DIM, query_offset, is_row, key_entry, is_key_entry)
    if OVERLAPS:
        gdc_wait()
    if begin >= end:
        return

    query_offset = ((batch * num_heads + head) * num_rows + row) * LATENT_DIM
    queries = load_chunks(latent_query_ptr, query_offset, is_row, NUM_CHUNKS, CHUNK, True)
    # Of the first tile; from there on offsets have 32 bits.
    c_kv_ptr += batch * c_kv_batch + begin.to(tl.int64) * (BLOCK_SLOTS * C_KV_SLOT)
    k_rope_ptr += batch * k_rope_batch + begin.to(tl.int64) * (BLOCK_SLOTS * K_ROPE_SLOT)
    sees_ptr += batch * num_rows * num_drafted
    softmax = empty_softmax(NUM_CHUNKS, CHUNK, BLOCK_ROWS)
    for tile in range(begin, end):
        slot, in_part = tile * BLOCK_SLOTS + place, (tile - begin) * BLOCK_SLOTS + place
        is_held = (slot >= first_slot) & (slot < length)
        tiles = load_chunks(c_kv_ptr, in_part * C_KV_SLOT, is_held, NUM_CHUNKS, CHUNK, True)
        ropes = load_rows(k_rope_ptr, in_part * K_ROPE_SLOT, is_held, key_entry, is_key_entry)
        scores = _absorbed_scores(tiles, ropes, queries, rope_query, PRECISION) * scaling
        scores = shown(scores, sees_ptr, row, is_row, slot - (length - num_drafted), is_held, num_drafted)
        softmax = add_to_softmax(softmax, scores, tiles, PRECISION)

    out_row = ((batch * tl.num_programs(1) + tl.program_id(1)) * num_heads + head) * num_rows + row
    store_part(partial_ptr, maxima_ptr, totals_ptr, softmax, out_row, is_row)


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
    w_uk = load_rows(w_uk_ptr, (group * HEAD_DIM + head_entry) * LATENT_DIM, is_head_entry, entry, is_entry)
    query_offset = batch * query_batch + head * query_head + row * query_row
    query = load_rows(query_ptr, query_offset, is_row, head_entry, is_head_entry)
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
    w_uv = load_rows(w_uv_ptr, (group * HEAD_DIM + entry) * LATENT_DIM, is_entry, latent, is_latent)
    length = tl.minimum(tl.load(lengths_ptr + batch), num_slots)
    num_tiles, tiles_per_part = tiles_of_part(length, num_parts, BLOCK_SLOTS)
    num_written = tl.cdiv(num_tiles, tl.maximum(tiles_per_part, 1))
    if OVERLAPS:
        gdc_wait()

    first_row = batch * num_parts * num_heads * num_rows + tl.program_id(0)
    written = partial_ptr, maxima_ptr, first_row, num_heads * num_rows, num_written
    # The first parts are on their way while their maxima are compared.
    partial, some_maxima = _parts_from(0, written, latent, is_latent, LATENT_DIM, BLOCK_PARTS)
    part = tl.arange(0, MAX_PARTS)
    statistic = first_row + part * num_heads * num_rows
    maxima = tl.load(maxima_ptr + statistic, mask=part < num_written, other=float("-inf"))
    totals = tl.load(totals_ptr + statistic, mask=part < num_written, other=0.0)
    maximum = tl.max(maxima, axis=0)
    maximum = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(totals * tl.exp2(maxima - maximum), axis=0)
    sums = partial * tl.exp2(some_maxima - maximum)[:, None]
    for begin in range(BLOCK_PARTS, num_written, BLOCK_PARTS):
        partial, some_maxima = _parts_from(begin, written, latent, is_latent, LATENT_DIM, BLOCK_PARTS)
        sums += partial * tl.exp2(some_maxima - maximum)[:, None]
    latents = tl.sum(sums, axis=0) / tl.where(total > 0, total, 1.0)
    values = tl.sum(w_uv.to(tl.float32) * latents[None, :], axis=1)
    out_offset = ((batch * num_rows + row) * num_heads + head) * HEAD_DIM
    tl.store(output_ptr + out_offset + entry, values.to(output_ptr.dtype.element_ty), mask=is_entry)


@triton.jit
def _parts_from(begin, written, latent, is_latent, LATENT_DIM: tl.constexpr, BLOCK_PARTS: tl.constexpr):
    """Sums and maxima of a row in some parts; zeros and minus infinity behind those that were written."""
    partial_ptr, maxima_ptr, first_row, row_step, num_written = written
    some = begin + tl.arange(0, BLOCK_PARTS)
    in_row = first_row + some * row_step
    is_written = some < num_written
    partial = load_rows(partial_ptr, in_row * LATENT_DIM, is_written, latent, is_latent)
    return partial, tl.load(maxima_ptr + in_row, mask=is_written, other=float("-inf"))
