"""Triton kernels of `tree_attention`: flash-decoding in which the nodes and the query heads of a key head share tiles.

The first kernel: one program reads a share of one key head's text, tile by tile, for a block of (node, query head)
rows. The text's length is read on the device and dealt out over a fixed number of splits, so that the grid is the same
for every text and none of the buffer past it is touched; nor is what lies before the windows of all rows. The second
kernel weighs what the splits found by their log-sum-exp and adds the sinks. Softmax and sums are float32, exponentials
and their logarithms of base 2; as in every flash attention, probabilities enter the product with the values in the
values' type.

Shapes: B batch, N tree nodes, H query heads, G key-value heads, K slots, d and dv widths of a head's keys and values,
S splits.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .latent_attention_triton import rows_contiguous

LOG2_E = tl.constexpr(math.log2(math.e))
# Programs that together keep a device busy, per multiprocessor; more of them cost more partial results.
PROGRAMS_PER_PROCESSOR = 2
MAX_SPLITS = 128
# Fewer are not worth a partial result (H200, 61 nodes, 512 slots: 12.7 µs in 4 splits, 24 in 9).
TILES_PER_SPLIT = 6
# Without a device, that is in Triton's interpreter.
NUM_PROCESSORS_WITHOUT_DEVICE = 1
COMBINED_NODES = 4


class Tiling(NamedTuple):
    """How much one program takes at a time, and its warps and stages."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    first_slots: Tensor,
    attends: Tensor,
    depths: Tensor,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """See `attend_tree`; `num_splits` replaces the number of splits that fits the device."""
    query, keys, values = (rows_contiguous(tensor) for tensor in (query, keys, values))
    batch_size, num_heads, num_nodes, key_dim = query.shape
    num_groups, capacity = keys.shape[1:3]
    value_dim = values.shape[-1]
    group_size = num_heads // num_groups
    tiling = choose_tiling(num_nodes * group_size, max(key_dim, value_dim), query.element_size())
    num_blocks = triton.cdiv(num_nodes * group_size, tiling.rows)
    if num_splits is None:
        most_visible = capacity if window is None else min(capacity, window + num_nodes)
        num_splits = choose_num_splits(
            batch_size * num_groups * num_blocks, triton.cdiv(most_visible, tiling.keys), query.device
        )
    partial = query.new_empty(num_splits, batch_size, num_heads, num_nodes, value_dim, dtype=torch.float32)
    lse = query.new_empty(num_splits, batch_size, num_heads, num_nodes, dtype=torch.float32)
    # Heads of a token side by side, as the output projection reads them.
    output = query.new_empty(batch_size, num_nodes, num_heads, value_dim).transpose(1, 2)
    attends = attends.view(torch.uint8)
    block_value = padded_width(value_dim)
    # tanh(x) is 2 * sigmoid(2 * x) - 1.
    score_factor = scaling * LOG2_E.value if softcap is None else 2 * scaling / softcap
    with torch.cuda.device_of(query):
        _attend_kernel[num_blocks, num_splits, batch_size * num_groups](
            query,
            keys,
            values,
            lengths,
            first_slots,
            attends,
            depths,
            partial,
            lse,
            score_factor,
            0.0 if softcap is None else softcap * LOG2_E.value,
            0 if window is None else window,
            *query.stride()[:3],
            *keys.stride()[:3],
            *values.stride()[:3],
            lengths.stride(0),
            first_slots.stride(0),
            *attends.stride(),
            *depths.stride(),
            num_nodes,
            capacity,
            HAS_WINDOW=window is not None,
            HAS_SOFTCAP=softcap is not None,
            NUM_GROUPS=num_groups,
            GROUP_SIZE=group_size,
            KEY_DIM=key_dim,
            VALUE_DIM=value_dim,
            BLOCK_KEY_DIM=padded_width(key_dim),
            BLOCK_VALUE_DIM=block_value,
            BLOCK_ROWS=tiling.rows,
            BLOCK_SLOTS=tiling.keys,
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
        )
        _combine_kernel[triton.cdiv(num_nodes, COMBINED_NODES), num_heads, batch_size](
            partial,
            lse,
            lse if sinks is None else sinks,
            output,
            *output.stride()[:3],
            0 if sinks is None else sinks.stride(0),
            num_nodes,
            num_splits,
            HAS_SINKS=sinks is not None,
            VALUE_DIM=value_dim,
            BLOCK_VALUE_DIM=block_value,
            BLOCK_NODES=COMBINED_NODES,
            num_warps=2,
        )
    return output


def choose_tiling(num_rows: int, width: int, bytes_per_element: int) -> Tiling:
    """Tiles whose operands stay in registers and, in two stages, in the shared memory of a multiprocessor."""
    rows = max(triton.next_power_of_2(num_rows), 16)
    if bytes_per_element > 2:
        # Products of exact float32 take no tensor core and hold their operands in registers.
        return Tiling(min(rows, 32), keys=16, num_warps=8, num_stages=1)
    if padded_width(width) <= 128:
        return Tiling(min(rows, 64), keys=32, num_warps=4, num_stages=3)
    return Tiling(min(rows, 64), keys=32, num_warps=8, num_stages=2)


def choose_num_splits(num_programs: int, num_tiles: int, device: torch.device) -> int:
    """So many that the device is busy with a text that fills its buffer or window, out of what the host knows."""
    if device.type == "cuda":
        num_processors = torch.cuda.get_device_properties(device).multi_processor_count
    else:
        num_processors = NUM_PROCESSORS_WITHOUT_DEVICE
    wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * num_processors, num_programs)
    return max(1, min(wanted, num_tiles // TILES_PER_SPLIT, MAX_SPLITS))


def padded_width(width: int) -> int:
    """Ranges in Triton are powers of two, and its matrix products take 16 at least."""
    return max(triton.next_power_of_2(width), 16)


@triton.jit
def _attend_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    lengths_ptr,
    first_ptr,
    attends_ptr,
    depths_ptr,
    partial_ptr,
    lse_ptr,
    score_factor,
    cap,
    window,
    query_batch,
    query_head,
    query_node,
    key_batch,
    key_head,
    key_slot,
    value_batch,
    value_head,
    value_slot,
    lengths_batch,
    first_batch,
    attends_batch,
    attends_query,
    attends_key,
    depths_batch,
    depths_node,
    num_nodes,
    capacity,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_KEY_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    # Programs with the same text are neighbours, so that one of them reads it from memory.
    split = tl.program_id(1)
    batch, group = (tl.program_id(2) // NUM_GROUPS).to(tl.int64), (tl.program_id(2) % NUM_GROUPS).to(tl.int64)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < num_nodes * GROUP_SIZE
    node, head = (row // GROUP_SIZE).to(tl.int64), group * GROUP_SIZE + row % GROUP_SIZE
    key_ptr += batch * key_batch + group * key_head
    value_ptr += batch * value_batch + group * value_head
    attends_ptr += batch * attends_batch
    depths_ptr += batch * depths_batch
    length = tl.load(lengths_ptr + batch * lengths_batch).to(tl.int32)
    first = tl.maximum(tl.load(first_ptr + batch * first_batch).to(tl.int32), 0)
    depth = tl.load(depths_ptr + node * depths_node, mask=is_row, other=0).to(tl.int32)

    end = tl.minimum(length + num_nodes, capacity)
    begin = first
    if HAS_WINDOW:
        least_depth = tl.min(tl.where(is_row, depth, 2**30), axis=0)
        # Also right for nodes: none is deeper than its place in the tree, so no slot lies before its position.
        begin = tl.maximum(begin, length + least_depth - window + 1)
    begin_tile, end_tile = begin // BLOCK_SLOTS, tl.cdiv(end, BLOCK_SLOTS)
    share = tl.cdiv(tl.maximum(end_tile - begin_tile, 0), tl.num_programs(1))
    begin_tile += split * share
    end_tile = tl.minimum(begin_tile + share, end_tile)

    column = tl.arange(0, BLOCK_KEY_DIM)
    address = batch * query_batch + head[:, None] * query_head + node[:, None] * query_node + column[None, :]
    is_needed = is_row & (begin_tile < end_tile)
    query = tl.load(query_ptr + address, mask=is_needed[:, None] & (column < KEY_DIM)[None, :], other=0.0)
    maximum = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    output = tl.zeros([BLOCK_ROWS, BLOCK_VALUE_DIM], tl.float32)
    node_tile = length // BLOCK_SLOTS
    for sees_nodes in tl.static_range(2):
        tile = begin_tile if sees_nodes == 0 else tl.maximum(begin_tile, node_tile)
        stop = tl.minimum(end_tile, node_tile) if sees_nodes == 0 else end_tile
        maximum, total, output = _attend_tiles(
            maximum,
            total,
            output,
            query,
            key_ptr,
            value_ptr,
            attends_ptr,
            depths_ptr,
            score_factor,
            cap,
            window,
            key_slot,
            value_slot,
            attends_query,
            attends_key,
            depths_node,
            node,
            is_row,
            depth,
            first,
            length,
            end,
            tile,
            stop,
            sees_nodes,
            HAS_WINDOW,
            HAS_SOFTCAP,
            KEY_DIM,
            VALUE_DIM,
            BLOCK_KEY_DIM,
            BLOCK_VALUE_DIM,
            BLOCK_SLOTS,
        )
    saw_something = total > 0
    total = tl.where(saw_something, total, 1.0)
    num_batch = tl.num_programs(2) // NUM_GROUPS
    place = ((split * num_batch + batch) * (NUM_GROUPS * GROUP_SIZE) + head) * num_nodes + node
    tl.store(lse_ptr + place, tl.where(saw_something, maximum + tl.log2(total), float("-inf")), mask=is_row)
    column = tl.arange(0, BLOCK_VALUE_DIM)
    is_stored = (is_row & saw_something)[:, None] & (column < VALUE_DIM)[None, :]
    tl.store(partial_ptr + place[:, None] * VALUE_DIM + column[None, :], output / total[:, None], mask=is_stored)


@triton.jit
def _attend_tiles(
    maximum,
    total,
    output,
    query,
    key_ptr,
    value_ptr,
    attends_ptr,
    depths_ptr,
    score_factor,
    cap,
    window,
    key_slot,
    value_slot,
    attends_query,
    attends_key,
    depths_node,
    node,
    is_row,
    depth,
    first,
    length,
    end,
    begin_tile,
    end_tile,
    SEES_NODES: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_KEY_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """Softmax so far, gone on over some tiles: all of committed tokens, or also of nodes."""
    key_column, value_column = tl.arange(0, BLOCK_KEY_DIM), tl.arange(0, BLOCK_VALUE_DIM)
    for tile in range(begin_tile, end_tile):
        slot = tile * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
        is_filled = (slot >= first) & (slot < end)
        address = slot.to(tl.int64)[None, :] * key_slot + key_column[:, None]
        keys = tl.load(key_ptr + address, mask=is_filled[None, :] & (key_column < KEY_DIM)[:, None], other=0.0)
        scores = tl.dot(query, keys, input_precision="ieee") * score_factor
        if HAS_SOFTCAP:
            scores = cap * (2 * tl.sigmoid(scores) - 1)
        visible = is_row[:, None] & is_filled[None, :]
        position = slot
        if SEES_NODES:
            key_node = (slot - length).to(tl.int64)
            is_node = (key_node >= 0) & is_filled
            address = node[:, None] * attends_query + key_node[None, :] * attends_key
            visible &= tl.load(attends_ptr + address, mask=is_row[:, None] & is_node[None, :], other=1) != 0
            if HAS_WINDOW:
                key_depth = tl.load(depths_ptr + key_node * depths_node, mask=is_node, other=0).to(tl.int32)
                position = tl.where(is_node, length + key_depth, slot)
        if HAS_WINDOW:
            visible &= (length + depth)[:, None] - position[None, :] < window
        scores = tl.where(visible, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        shrink, weights = tl.exp2(maximum - base), tl.exp2(scores - base[:, None])
        address = slot.to(tl.int64)[:, None] * value_slot + value_column[None, :]
        values = tl.load(value_ptr + address, mask=is_filled[:, None] & (value_column < VALUE_DIM)[None, :], other=0.0)
        output = tl.dot(weights.to(values.dtype), values, output * shrink[:, None], input_precision="ieee")
        total = total * shrink + tl.sum(weights, axis=1)
        maximum = new_maximum
    return maximum, total, output


@triton.jit
def _combine_kernel(
    partial_ptr,
    lse_ptr,
    sinks_ptr,
    output_ptr,
    output_batch,
    output_head,
    output_node,
    sinks_head,
    num_nodes,
    num_splits,
    HAS_SINKS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    BLOCK_NODES: tl.constexpr,
):
    node = tl.program_id(0) * BLOCK_NODES + tl.arange(0, BLOCK_NODES)
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    num_heads, num_batch = tl.num_programs(1), tl.num_programs(2)
    column = tl.arange(0, BLOCK_VALUE_DIM)
    is_node, is_column = node < num_nodes, column < VALUE_DIM
    place = (batch * num_heads + head) * num_nodes + node
    places_per_split = num_batch.to(tl.int64) * num_heads * num_nodes
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head * sinks_head).to(tl.float32) * LOG2_E
        maximum = tl.zeros([BLOCK_NODES], tl.float32) + sink
        total = tl.full([BLOCK_NODES], 1.0, tl.float32)
    else:
        maximum = tl.full([BLOCK_NODES], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_NODES], tl.float32)
    output = tl.zeros([BLOCK_NODES, BLOCK_VALUE_DIM], tl.float32)
    for _ in range(num_splits):
        lse = tl.load(lse_ptr + place, mask=is_node, other=float("-inf"))
        is_found = lse > float("-inf")
        address = place[:, None] * VALUE_DIM + column[None, :]
        found = tl.load(partial_ptr + address, mask=is_found[:, None] & is_column[None, :], other=0.0)
        new_maximum = tl.maximum(maximum, lse)
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        shrink, weight = tl.exp2(maximum - base), tl.exp2(lse - base)
        output = output * shrink[:, None] + weight[:, None] * found
        total = total * shrink + weight
        maximum = new_maximum
        place += places_per_split
    output /= tl.where(total > 0, total, 1.0)[:, None]
    address = batch * output_batch + head * output_head + node.to(tl.int64)[:, None] * output_node + column[None, :]
    tl.store(output_ptr + address, output.to(output_ptr.dtype.element_ty), mask=is_node[:, None] & is_column[None, :])
