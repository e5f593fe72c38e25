"""Steps that the kernels of latent attention share: parts of the slots, tiles, angles of RoPE, the running softmax.

A tile of latents is a tuple of chunks: its width is never padded, but taken in pieces of the largest power of two that
divides it. Sums of latents are kept transposed, entries first: a matrix product on the device wants at least 64 of the
first dimension and is content with 16 of the last. Scores and weights have rows first, so that what is reduced lies
within a warp.

Shapes: L slots of a tile, N query rows of a tile, E entries of a chunk of the latent, F frequencies.
"""

import triton
import triton.language as tl

MIN_BLOCK = 16  # of a dimension of a matrix product


def block_of(size: int) -> int:
    return max(MIN_BLOCK, triton.next_power_of_2(size))


@triton.jit
def tiles_of_part(length, num_parts, BLOCK_SLOTS: tl.constexpr):
    """Number of tiles of a sequence, and how many each part takes."""
    num_tiles = tl.cdiv(length, BLOCK_SLOTS)
    return num_tiles, tl.cdiv(num_tiles, num_parts)


@triton.jit
def own_tiles(length, BLOCK_SLOTS: tl.constexpr):
    """First tile of this program's part, and the one behind its last."""
    num_tiles, tiles_per_part = tiles_of_part(length, tl.num_programs(1), BLOCK_SLOTS)
    begin = tl.program_id(1) * tiles_per_part
    return begin, tl.minimum(begin + tiles_per_part, num_tiles)


@triton.jit
def rows_of_group(num_heads, num_rows, NUM_GROUPS: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Of this program: its group, and heads and rows; all rows of a group's first head, then those of the next."""
    group, row_tile = tl.program_id(0) % NUM_GROUPS, tl.program_id(0) // NUM_GROUPS
    in_group = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = in_group < num_heads // NUM_GROUPS * num_rows
    return group, group * (num_heads // NUM_GROUPS) + in_group // num_rows, in_group % num_rows, is_row


@triton.jit
def cos_sin(angle):
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
def angles_at(position, inv_freq):
    """Cosines and sines of RoPE at `position (L,)`, `(L, F)` each."""
    return cos_sin(position.to(tl.float32)[:, None] * inv_freq[None, :])


@triton.jit
def turned(pairs, angles):
    """Turns pairs, such as the halves of keys, by angles; two angles are added this way too."""
    first, second = pairs
    cos, sin = angles
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def load_rows(pointer, row_offset, is_row, column, is_column):
    """`(rows, columns)` of a matrix whose rows begin at `row_offset`, zeros outside."""
    mask = is_row[:, None] & is_column[None, :]
    return tl.load(pointer + row_offset[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def load_chunks(pointer, row_offset, is_row, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr, IS_MASKED: tl.constexpr):
    """All columns of these rows, as a tuple of `NUM_CHUNKS` tensors `(rows, E)`; without `IS_MASKED` all are rows."""
    chunks = ()
    for chunk in tl.static_range(NUM_CHUNKS):
        address = pointer + (row_offset[:, None] + (chunk * CHUNK + tl.arange(0, CHUNK))[None, :])
        loaded = tl.load(address, mask=is_row[:, None], other=0.0) if IS_MASKED else tl.load(address)
        chunks = chunks + (loaded,)  # noqa: RUF005
    return chunks


@triton.jit
def shown(scores, sees_ptr, row, is_row, drafted, is_held, num_drafted):
    """
    Minus infinity where a row does not see a slot: those not held, and drafted ones that are not its own.

    Kernels do this for every tile, also where no slot is drafted: the load, of slots next to each other, decides how
    the compiler lays out the weights in shared memory. Laid out with fewer than 64 rows next to each other, they are
    read wrongly by the product with the latents (Triton 3.6).
    """
    is_asked = (is_held & (drafted >= 0))[None, :] & is_row[:, None]
    sees = tl.load(sees_ptr + row[:, None] * num_drafted + drafted[None, :], mask=is_asked, other=1)
    return tl.where(is_held[None, :] & (sees != 0), scores, float("-inf"))


@triton.jit
def empty_softmax(NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Sums `(E, N)`, maximum `(N,)` and total `(N,)` of no slots."""
    sums = ()
    for _chunk in tl.static_range(NUM_CHUNKS):
        sums = sums + (tl.zeros([CHUNK, BLOCK_ROWS], tl.float32),)  # noqa: RUF005
    return sums, tl.full([BLOCK_ROWS], float("-inf"), tl.float32), tl.zeros([BLOCK_ROWS], tl.float32)


@triton.jit
def add_to_softmax(softmax, scores, tiles, PRECISION: tl.constexpr):
    """Adds a tile to a running softmax; `scores (N, L)` are logarithms to base 2."""
    sums, maximum, total = softmax
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
    # A row that has seen nothing yet: any finite number does.
    reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights, shrink = tl.exp2(scores - reference[:, None]), tl.exp2(maximum - reference)
    total = total * shrink + tl.sum(weights, axis=1)
    weights = tl.trans(weights.to(tiles[0].dtype))  # (L, N)
    new_sums = ()
    for chunk in tl.static_range(len(tiles)):
        shrunk = sums[chunk] * shrink[None, :]
        new_sums = new_sums + (tl.dot(tl.trans(tiles[chunk]), weights, shrunk, input_precision=PRECISION),)  # noqa: RUF005
    return new_sums, new_maximum, total


@triton.jit
def store_part(partial_ptr, maxima_ptr, totals_ptr, softmax, out_row, is_row):
    sums, maximum, total = softmax
    CHUNK: tl.constexpr = sums[0].shape[0]
    for chunk in tl.static_range(len(sums)):
        entry = chunk * CHUNK + tl.arange(0, CHUNK)
        address = partial_ptr + out_row[None, :] * (len(sums) * CHUNK) + entry[:, None]
        tl.store(address, sums[chunk], mask=is_row[None, :])
    tl.store(maxima_ptr + out_row, maximum, mask=is_row)
    tl.store(totals_ptr + out_row, total, mask=is_row)
