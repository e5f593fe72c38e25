"""Triton kernel of `steps`: one program for all sequences, because the frozen ones follow the furthest of the others.

They walk together, one node a step, and each looks among all nodes of its tree for the child that holds the choice.

Shapes: B batch, N nodes, P nodes on the longest path, E tokens that end a sequence.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .steps import Standing, Steps
from .tree import DraftTree


def take(tree: DraftTree, choices: Tensor, standing: Standing, steps: Steps) -> Tensor:
    """See [`steps.take_steps`]."""
    num_rows, num_nodes = choices.shape
    longest, ends, pad = steps.path.shape[1], standing.eos_token_ids, standing.pad_token_id
    report = choices.new_empty(num_rows, 4 + 2 * longest)
    num_ends = 0 if ends is None else ends.numel()
    block_rows, block_nodes = triton.next_power_of_2(num_rows), triton.next_power_of_2(num_nodes)
    with torch.cuda.device_of(choices):
        _take_kernel[(1,)](
            tree.token_ids.contiguous(),
            tree.parents.contiguous(),
            choices.contiguous(),
            choices if tree.preferred is None else tree.preferred.contiguous(),
            standing.lengths,
            standing.limit,
            standing.is_frozen.view(torch.int8),
            choices if ends is None else ends,
            choices if pad is None else pad,
            steps.path,
            steps.tokens,
            steps.num_new,
            report,
            num_rows,
            num_nodes,
            longest,
            num_ends,
            HAS_PREFERRED=tree.preferred is not None,
            HAS_PAD=pad is not None,
            BLOCK_ROWS=block_rows,
            BLOCK_NODES=block_nodes,
            BLOCK_ENDS=triton.next_power_of_2(max(num_ends, 1)),
            num_warps=min(max(block_rows * block_nodes // 256, 1), 16),
        )
    return report


@triton.jit(do_not_specialize=["num_rows", "num_nodes", "longest", "num_ends"])
def _take_kernel(
    token_ids_ptr,
    parents_ptr,
    choices_ptr,
    preferred_ptr,
    lengths_ptr,
    limit_ptr,
    is_frozen_ptr,
    ends_ptr,
    pad_ptr,
    path_ptr,
    tokens_ptr,
    num_new_ptr,
    report_ptr,
    num_rows,
    num_nodes,
    longest,
    num_ends,
    HAS_PREFERRED: tl.constexpr,
    HAS_PAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_NODES: tl.constexpr,
    BLOCK_ENDS: tl.constexpr,
):
    row, column, end = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_NODES), tl.arange(0, BLOCK_ENDS)
    is_row = row < num_rows
    is_frozen = tl.load(is_frozen_ptr + row, mask=is_row, other=1) != 0
    ends = tl.load(ends_ptr + end, mask=end < num_ends, other=-1).to(tl.int32)
    place = row[:, None] * num_nodes + column[None, :]
    may_follow = is_row[:, None] & ((column > 0) & (column < num_nodes))[None, :]
    token_id = tl.load(token_ids_ptr + place, mask=may_follow, other=-1).to(tl.int32)
    parent = tl.load(parents_ptr + place, mask=may_follow, other=-1).to(tl.int32)

    report = report_ptr + row * (4 + 2 * longest)
    node, num_reached, is_walking = row * 0, row * 0, is_row
    num_until_end = row * 0 + longest + 1  # more than there are
    for step in range(longest):
        token = tl.load(choices_ptr + row * num_nodes + node, mask=is_row, other=0).to(tl.int32)
        if HAS_PAD:
            token = tl.where(is_frozen, tl.load(pad_ptr).to(tl.int32), token)
        if HAS_PREFERRED:
            before = preferred_ptr + row * (num_nodes - 1) + node - 1
            rank = tl.load(before, mask=is_row & (node > 0), other=0)
        else:
            rank = tl.maximum(node - 1, 0).to(tl.int64)
        tl.store(path_ptr + row * longest + step, node.to(tl.int64), mask=is_row)
        tl.store(tokens_ptr + row * longest + step, token.to(tl.int64), mask=is_row)
        tl.store(report + 4 + step, token.to(tl.int64), mask=is_row)
        tl.store(report + 4 + longest + step, rank, mask=is_row)
        num_reached += is_walking.to(tl.int32)
        is_end = tl.max((token[:, None] == ends[None, :]).to(tl.int32), axis=1) > 0
        num_until_end = tl.where(is_walking & is_end & ~is_frozen, tl.minimum(num_until_end, step + 1), num_until_end)
        is_next = may_follow & (parent == node[:, None]) & (token_id == token[:, None])
        child = tl.min(tl.where(is_next, column[None, :], BLOCK_NODES), axis=1)
        is_walking = child < BLOCK_NODES  # who has stopped stays where no child is
        node = tl.where(is_walking, child, node)

    num_tokens = tl.load(lengths_ptr + row, mask=is_row, other=0) + 1
    room = tl.load(limit_ptr) - num_tokens
    num_new = tl.minimum(tl.minimum(num_reached, room), num_until_end)
    furthest = tl.max(tl.where(is_row, num_tokens + tl.where(is_frozen, 0, num_new), 0), axis=0)
    num_new = tl.where(is_frozen, tl.minimum(num_new, furthest - num_tokens), num_new)
    has_ended = (num_new == num_until_end) & (num_new > 0)
    num_drafted = tl.minimum(num_new, num_reached - 1)
    has_children = tl.max((may_follow & (parent == node[:, None])).to(tl.int32), axis=1)
    num_tried = tl.maximum(num_drafted, 0) + tl.where(num_new == num_reached, has_children, 0)
    tl.store(num_new_ptr + row, num_new.to(tl.int64), mask=is_row)
    tl.store(report, num_new.to(tl.int64), mask=is_row)
    tl.store(report + 1, has_ended.to(tl.int64), mask=is_row)
    tl.store(report + 2, num_drafted.to(tl.int64), mask=is_row)
    tl.store(report + 3, num_tried.to(tl.int64), mask=is_row)
    if HAS_PAD:
        tl.debug_barrier()  # all have read what is overwritten
        tl.store(is_frozen_ptr + row, (is_frozen | has_ended).to(tl.int8), mask=is_row)
