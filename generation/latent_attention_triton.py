"""Triton kernels of `attend_latents`: attention split over the slots (flash-decoding), over latents.

A program takes the rows of all heads that share keys, up to 64 of them, and a contiguous part of the slots of a
sequence. It reads a tile of latents once, for scores and for values. A second kernel joins the parts. Everything is
transposed, slots or latent entries first and query rows last: a matrix product on the device wants at least 64 of the
first and is content with 16 of the last.

The number of parts is fixed by the cache's capacity, their bounds by the lengths on the device: a part that has
nothing to do writes nothing, and the joining kernel knows it by the same arithmetic.

The latent width is never padded: it is taken in chunks of the largest power of two that divides it. Rows, slots, head
width and R are masked.

Shapes: L slots of a tile, N query rows of a tile, E entries of a chunk of the latent, P parts.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

MIN_BLOCK = 16  # of a dimension of a matrix product
MAX_ROWS = 64
# Entries of the float32 accumulator, latent width times rows, that fit into the registers of eight warps.
MAX_ACCUMULATOR = 16384
CPU_PROGRAMS = 12
JOINED_PARTS = 16


def attend(
    query: Tensor, c_kv: Tensor, k_rope: Tensor, lengths: Tensor, scaling: float, drafted, first, keys
) -> Tensor:
    """See `attend_latents`."""
    query, c_kv, k_rope = (rows_contiguous(tensor) for tensor in (query, c_kv, k_rope))
    batch_size, num_heads, num_rows, _ = query.shape
    num_slots, latent_dim = c_kv.shape[2:]
    num_groups = 1 if keys is None else keys.w_uk.shape[0]
    heads_per_group = num_heads // num_groups
    tile = tile_sizes(heads_per_group * num_rows, latent_dim, query.element_size(), is_rotated=keys is not None)
    num_row_tiles = triton.cdiv(heads_per_group * num_rows, tile["BLOCK_ROWS"])
    max_parts = triton.cdiv(num_slots, tile["BLOCK_SLOTS"])
    programs = batch_size * num_groups * num_row_tiles
    # Not one program more than run at once: the last few would double the time.
    num_parts = max(1, min(max_parts, num_programs(query.device, tile["num_warps"]) // programs))
    partial = query.new_empty(batch_size, num_parts, num_heads, num_rows, latent_dim, dtype=torch.float32)
    lse = query.new_empty(batch_size, num_parts, num_heads, num_rows, dtype=torch.float32)
    lengths, first = lengths.contiguous(), lengths if first is None else first.contiguous()
    sees, positions, num_drafted = drafted_inputs(drafted, lengths)
    w_uk, inv_freq, attention_scaling = key_inputs(keys, query)
    shared = {"BLOCK_SLOTS": tile["BLOCK_SLOTS"], "CHUNK": tile["CHUNK"]}
    _part_kernel[num_row_tiles * num_groups, num_parts, batch_size](
        query,
        c_kv,
        k_rope,
        w_uk,
        inv_freq,
        sees,
        positions,
        lengths,
        first,
        partial,
        lse,
        scaling,
        attention_scaling,
        *query.stride()[:3],
        c_kv.stride(0),
        c_kv.stride(2),
        k_rope.stride(0),
        k_rope.stride(2),
        num_slots,
        num_heads,
        num_rows,
        num_drafted,
        NUM_GROUPS=num_groups,
        LATENT_DIM=latent_dim,
        KEY_DIM=k_rope.shape[-1] if keys is None else query.shape[-1] // 2,
        BLOCK_KEY=block_of(k_rope.shape[-1] if keys is None else query.shape[-1] // 2),
        IS_ROTATED=keys is not None,
        HAS_FIRST=first is not lengths,
        PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32",
        **tile,
    )
    output = query.new_empty(batch_size, num_heads, num_rows, latent_dim)
    _join_kernel[num_heads * num_rows, latent_dim // tile["CHUNK"], batch_size](
        partial,
        lse,
        lengths,
        output,
        num_slots,
        num_parts,
        LATENT_DIM=latent_dim,
        BLOCK_PARTS=JOINED_PARTS,
        **shared,
    )
    return output


def rows_contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where its last axis is not contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 0 else tensor.contiguous()


def tile_sizes(num_rows: int, latent_dim: int, element_size: int, is_rotated: bool) -> dict[str, int]:
    """Sizes of a tile, and its warps; shared memory holds the tile, its queries and the key matrix of its group."""
    chunk = latent_dim & -latent_dim
    most = min(MAX_ROWS, max(MIN_BLOCK, MAX_ACCUMULATOR // triton.next_power_of_2(latent_dim)))
    block_rows = min(most, block_of(num_rows))
    is_small = element_size == 4 or latent_dim > 256
    block_slots = 32 if element_size == 4 else 64
    num_warps = 8 if is_rotated or block_rows * latent_dim > MAX_ACCUMULATOR // 2 else 4
    num_stages = 1 if is_small else 2
    return {
        "CHUNK": chunk,
        "BLOCK_ROWS": block_rows,
        "BLOCK_SLOTS": block_slots,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def block_of(size: int) -> int:
    return max(MIN_BLOCK, triton.next_power_of_2(size))


def num_programs(device: torch.device, num_warps: int) -> int:
    """How many programs run at once; eight warps fill the registers of a multiprocessor, four half of them."""
    return sm_count(device) * 8 // num_warps if device.type == "cuda" else CPU_PROGRAMS


@functools.cache
def sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def drafted_inputs(drafted, lengths: Tensor) -> tuple[Tensor, Tensor, int]:
    """Masks and positions of drafted slots, and how many slots these are; without any, something that is not read."""
    if drafted is None:
        return lengths, lengths, 0
    positions = lengths if drafted.positions is None else drafted.positions.to(torch.int32).contiguous()
    return drafted.sees.contiguous().view(torch.int8), positions, drafted.sees.shape[2]


def key_inputs(keys, query: Tensor) -> tuple[Tensor, Tensor, float]:
    if keys is None:
        return query, query, 1.0
    return keys.w_uk.to(query.dtype).contiguous(), keys.inv_freq.contiguous(), keys.attention_scaling


@triton.jit
def _tiles_of_part(length, num_parts, BLOCK_SLOTS: tl.constexpr):
    """Number of tiles of a sequence, and how many each part takes."""
    num_tiles = tl.cdiv(length, BLOCK_SLOTS)
    return num_tiles, tl.cdiv(num_tiles, num_parts)


@triton.jit
def _load_transposed(pointer, row_offset, is_row, column, is_column):
    """`(columns, rows)` of a matrix whose rows begin at `row_offset`, zeros outside."""
    mask = is_row[None, :] & is_column[:, None]
    return tl.load(pointer + row_offset[None, :] + column[:, None], mask=mask, other=0.0)


@triton.jit
def _load_chunks(pointer, row_offset, is_row, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """All columns of these rows, transposed, as a tuple of `NUM_CHUNKS` tensors `(E, rows)`."""
    chunks = ()
    for chunk in tl.static_range(NUM_CHUNKS):
        address = pointer + row_offset[None, :] + (chunk * CHUNK + tl.arange(0, CHUNK))[:, None]
        chunks = chunks + (tl.load(address, mask=is_row[None, :], other=0.0),)  # noqa: RUF005
    return chunks


@triton.jit
def _cos_sin(angle):
    """Cosine and sine of float32 angles up to 1e6; those of the library take too many registers for larger ones."""
    quarters = tl.floor(angle * 0.6366197723675814 + 0.5)
    # A quarter turn in three parts, of which the first two have few enough bits for exact products.
    rest = angle - quarters * 1.5625 - quarters * 0.0081787109375 - quarters * 0.000117615857396558
    square = rest * rest
    cos = 1 + square * (-1 / 2 + square * (1 / 24 + square * (-1 / 720 + square * (1 / 40320))))
    sin = rest * (1 + square * (-1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square * (1 / 362880)))))
    quarter = quarters.to(tl.int32)
    is_odd = (quarter & 1) != 0
    turned_cos, turned_sin = tl.where(is_odd, sin, cos), tl.where(is_odd, cos, sin)
    return (
        tl.where(((quarter + 1) & 2) != 0, -turned_cos, turned_cos),
        tl.where((quarter & 2) != 0, -turned_sin, turned_sin),
    )


@triton.jit
def _angles(position, inv_freq):
    """Cosines and sines of RoPE at `position (L,)`, `(L, d / 2)` each."""
    return _cos_sin(position.to(tl.float32)[:, None] * inv_freq[None, :])


@triton.jit
def _turned(angles, turn):
    """Cosines and sines of the sums of two angles: from tile to tile all angles grow by the same."""
    cos, sin = angles
    turn_cos, turn_sin = turn
    return cos * turn_cos - sin * turn_sin, sin * turn_cos + cos * turn_sin


@triton.jit
def _keys(tiles, matrices, PRECISION: tl.constexpr):
    """Both halves of the keys of a tile before they are rotated, `(L, d / 2)` each, float32."""
    NUM_CHUNKS: tl.constexpr = len(tiles)
    first = tl.dot(tiles[0], matrices[0], input_precision=PRECISION)
    second = tl.dot(tiles[0], matrices[NUM_CHUNKS], input_precision=PRECISION)
    for chunk in tl.static_range(1, NUM_CHUNKS):
        first = tl.dot(tiles[chunk], matrices[chunk], first, input_precision=PRECISION)
        second = tl.dot(tiles[chunk], matrices[NUM_CHUNKS + chunk], second, input_precision=PRECISION)
    return first, second


@triton.jit
def _add_to_softmax(sums, maximum, total, scores, tiles, PRECISION: tl.constexpr):
    """Adds a tile to the running softmax; `scores (L, N)` are logarithms to base 2."""
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
    # A row that has seen nothing yet: any finite number does.
    reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights, shrink = tl.exp2(scores - reference[None, :]), tl.exp2(maximum - reference)
    total = total * shrink + tl.sum(weights, axis=0)
    weights = weights.to(tiles[0].dtype)
    new_sums = ()
    for chunk in tl.static_range(len(tiles)):
        shrunk = sums[chunk] * shrink[None, :]
        new_sums = new_sums + (tl.dot(tl.trans(tiles[chunk]), weights, shrunk, input_precision=PRECISION),)  # noqa: RUF005
    return new_sums, new_maximum, total


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
    k_rope_ptr,
    sees_ptr,
    positions_ptr,
    c_kv_slot,
    k_rope_slot,
    first_slot,
    length,
    num_drafted,
    row,
    is_row,
    scaling,
    attention_scaling,
    IS_LAST: tl.constexpr,
    IS_ROTATED: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    KEY_DIM: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the attention to one tile; only with `IS_LAST` it may hold drafted slots or reach beyond the length."""
    NUM_CHUNKS: tl.constexpr = len(sums)
    slot = tile * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    is_held = slot >= first_slot
    if IS_LAST:
        is_held = is_held & (slot < length)
    c_kv_address = c_kv_ptr + slot.to(tl.int64)[:, None] * c_kv_slot + tl.arange(0, CHUNK)[None, :]
    tiles = ()
    for chunk in tl.static_range(NUM_CHUNKS):
        if IS_LAST or HAS_FIRST:
            latents = tl.load(c_kv_address + chunk * CHUNK, mask=is_held[:, None], other=0.0)
        else:
            latents = tl.load(c_kv_address + chunk * CHUNK)
        tiles = tiles + (latents,)  # noqa: RUF005
    drafted = slot - (length - num_drafted)
    is_drafted = is_held & (drafted >= 0)
    if IS_ROTATED:
        cos, sin = angles
        if IS_LAST:
            drafted_position = tl.load(positions_ptr + drafted, mask=is_drafted, other=0)
            position = tl.where(is_drafted, drafted_position, slot - first_slot)
            cos, sin = _angles(position, inv_freq)
        first, second = _keys(tiles, matrices, PRECISION)
        cos, sin = cos * attention_scaling, sin * attention_scaling
        first, second = first * cos - second * sin, second * cos + first * sin
        scores = tl.dot(first.to(queries[0].dtype), queries[0], input_precision=PRECISION)
        scores = tl.dot(second.to(queries[1].dtype), queries[1], scores, input_precision=PRECISION)
    else:
        key_entry = tl.arange(0, BLOCK_KEY)
        k_rope_address = k_rope_ptr + slot.to(tl.int64)[:, None] * k_rope_slot + key_entry[None, :]
        if IS_LAST or HAS_FIRST or KEY_DIM != BLOCK_KEY:
            is_entry = is_held[:, None] & (key_entry < KEY_DIM)[None, :]
            ropes = tl.load(k_rope_address, mask=is_entry, other=0.0)
        else:
            ropes = tl.load(k_rope_address)
        scores = tl.dot(ropes, queries[NUM_CHUNKS], input_precision=PRECISION)
        for chunk in tl.static_range(NUM_CHUNKS):
            scores = tl.dot(tiles[chunk], queries[chunk], scores, input_precision=PRECISION)
    scores = scores * scaling
    if IS_LAST:
        is_asked = is_drafted[:, None] & is_row[None, :]
        sees_address = sees_ptr + row[None, :] * num_drafted + drafted[:, None]
        is_seen = (drafted < 0)[:, None] | (tl.load(sees_address, mask=is_asked, other=0) != 0)
        scores = tl.where(is_held[:, None] & is_seen, scores, float("-inf"))
    elif HAS_FIRST:
        scores = tl.where(is_held[:, None], scores, float("-inf"))
    return _add_to_softmax(sums, maximum, total, scores, tiles, PRECISION)


@triton.jit
def _part_kernel(
    query_ptr,
    c_kv_ptr,
    k_rope_ptr,
    w_uk_ptr,
    inv_freq_ptr,
    sees_ptr,
    positions_ptr,
    lengths_ptr,
    first_ptr,
    partial_ptr,
    lse_ptr,
    scaling,
    attention_scaling,
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
    KEY_DIM: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    IS_ROTATED: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    NUM_CHUNKS: tl.constexpr = LATENT_DIM // CHUNK
    group, row_tile = tl.program_id(0) % NUM_GROUPS, tl.program_id(0) // NUM_GROUPS
    part, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.minimum(tl.load(lengths_ptr + batch), num_slots)
    num_tiles, tiles_per_part = _tiles_of_part(length, tl.num_programs(1), BLOCK_SLOTS)
    begin, end = part * tiles_per_part, tl.minimum((part + 1) * tiles_per_part, num_tiles)
    if begin >= end:
        return
    first_slot = 0
    if HAS_FIRST:
        first_slot = tl.load(first_ptr + batch)

    # Rows of a group: all new rows of its first head, then those of the next.
    heads_per_group = num_heads // NUM_GROUPS
    in_group = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = in_group < heads_per_group * num_rows
    head, row = group * heads_per_group + in_group // num_rows, in_group % num_rows
    query_offset = batch * query_batch + head.to(tl.int64) * query_head + row.to(tl.int64) * query_row
    entry, key_entry = tl.arange(0, CHUNK), tl.arange(0, BLOCK_KEY)
    is_key_entry = key_entry < KEY_DIM
    matrices = ()
    inv_freq, angles, turn = 0.0, (), ()
    if IS_ROTATED:
        queries = (
            _load_transposed(query_ptr, query_offset, is_row, key_entry, is_key_entry),
            _load_transposed(query_ptr + KEY_DIM, query_offset, is_row, key_entry, is_key_entry),
        )
        w_offset = (group * 2 * KEY_DIM + key_entry) * LATENT_DIM
        matrices = _load_chunks(w_uk_ptr, w_offset, is_key_entry, NUM_CHUNKS, CHUNK)
        w_offset += KEY_DIM * LATENT_DIM
        matrices = matrices + _load_chunks(w_uk_ptr, w_offset, is_key_entry, NUM_CHUNKS, CHUNK)
        inv_freq = tl.load(inv_freq_ptr + key_entry, mask=is_key_entry, other=0.0)
        angles = _angles(begin * BLOCK_SLOTS - first_slot + tl.arange(0, BLOCK_SLOTS), inv_freq)
        turn = _cos_sin(BLOCK_SLOTS * inv_freq[None, :])
    else:
        rope = _load_transposed(query_ptr + LATENT_DIM, query_offset, is_row, key_entry, is_key_entry)
        queries = _load_chunks(query_ptr, query_offset, is_row, NUM_CHUNKS, CHUNK) + (rope,)  # noqa: RUF005

    c_kv_ptr += batch * c_kv_batch
    k_rope_ptr += batch * k_rope_batch
    sees_ptr += batch * num_rows * num_drafted
    positions_ptr += batch * num_drafted
    # Exponentials are powers of two.
    scaling = scaling * 1.4426950408889634
    sums = ()
    for _chunk in tl.static_range(NUM_CHUNKS):
        sums = sums + (tl.zeros([CHUNK, BLOCK_ROWS], tl.float32),)  # noqa: RUF005
    maximum = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    last = tl.maximum(tl.maximum(length - num_drafted, 0) // BLOCK_SLOTS, begin)
    for tile in range(begin, tl.minimum(last, end)):
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
            k_rope_ptr,
            sees_ptr,
            positions_ptr,
            c_kv_slot,
            k_rope_slot,
            first_slot,
            length,
            num_drafted,
            row,
            is_row,
            scaling,
            attention_scaling,
            False,
            IS_ROTATED,
            HAS_FIRST,
            KEY_DIM,
            BLOCK_KEY,
            CHUNK,
            BLOCK_SLOTS,
            PRECISION,
        )
        if IS_ROTATED:
            angles = _turned(angles, turn)
    for tile in tl.range(last, end, num_stages=1):
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
            k_rope_ptr,
            sees_ptr,
            positions_ptr,
            c_kv_slot,
            k_rope_slot,
            first_slot,
            length,
            num_drafted,
            row,
            is_row,
            scaling,
            attention_scaling,
            True,
            IS_ROTATED,
            HAS_FIRST,
            KEY_DIM,
            BLOCK_KEY,
            CHUNK,
            BLOCK_SLOTS,
            PRECISION,
        )

    divisor = tl.where(total > 0, total, 1.0)
    out_row = ((batch * tl.num_programs(1) + part) * num_heads + head) * num_rows + row
    for chunk in tl.static_range(NUM_CHUNKS):
        address = partial_ptr + out_row[None, :] * LATENT_DIM + (chunk * CHUNK + entry)[:, None]
        tl.store(address, sums[chunk] / divisor[None, :], mask=is_row[None, :])
    tl.store(lse_ptr + out_row, tl.where(total > 0, maximum + tl.log2(divisor), float("-inf")), mask=is_row)


@triton.jit
def _join_kernel(
    partial_ptr,
    lse_ptr,
    lengths_ptr,
    output_ptr,
    num_slots,
    num_parts,
    LATENT_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    row, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    rows = tl.num_programs(0)
    entry = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    length = tl.minimum(tl.load(lengths_ptr + batch), num_slots)
    num_tiles, tiles_per_part = _tiles_of_part(length, num_parts, BLOCK_SLOTS)
    num_written = tl.cdiv(num_tiles, tl.maximum(tiles_per_part, 1))
    maximum = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    output = tl.zeros([CHUNK], tl.float32)
    for begin in range(0, num_written, BLOCK_PARTS):
        part = begin + tl.arange(0, BLOCK_PARTS)
        is_written = part < num_written
        in_row = (batch * num_parts + part) * rows + row
        lse = tl.load(lse_ptr + in_row, mask=is_written, other=float("-inf"))
        address = partial_ptr + in_row[:, None] * LATENT_DIM + entry[None, :]
        partial = tl.load(address, mask=is_written[:, None], other=0.0)
        new_maximum = tl.maximum(maximum, tl.max(lse, axis=0))
        reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weight, shrink = tl.exp2(lse - reference), tl.exp2(maximum - reference)
        output = output * shrink + tl.sum(partial * weight[:, None], axis=0)
        total = total * shrink + tl.sum(weight, axis=0)
        maximum = new_maximum
    output = output / tl.where(total > 0, total, 1.0)
    out_row = batch * rows + row
    tl.store(output_ptr + out_row * LATENT_DIM + entry, output.to(output_ptr.dtype.element_ty))
