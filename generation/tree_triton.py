"""Triton kernels of `tree`: one program a sequence.

Which candidates are kept is found without sorting them: the lowest score that is kept is the largest number that
enough scores reach, and its bits are found one after the other. Only what is kept is put in order, by comparing all
with all.

Shapes: B batch, N nodes, M candidates.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .top_tokens_triton import NOTHING, keys_of
from .tree import DraftTree


def build(
    root: Tensor, token_ids: Tensor, parents: Tensor, scores: Tensor, num_nodes: int, max_depth: int | None
) -> DraftTree:
    """See [`tree.build_tree`]."""
    batch_size, num_candidates = scores.shape
    num_kept = min(num_nodes, num_candidates)
    tree = DraftTree(
        token_ids=token_ids.new_empty(batch_size, 1 + num_kept),
        parents=parents.new_empty(batch_size, 1 + num_kept),
        max_depth=max_depth,
        preferred=parents.new_empty(batch_size, num_kept),
    )
    with torch.cuda.device_of(scores):
        _build_kernel[(batch_size,)](
            root.contiguous(),
            token_ids.contiguous(),
            parents.contiguous(),
            scores.contiguous(),
            tree.token_ids,
            tree.parents,
            tree.preferred,
            num_candidates,
            num_kept,
            BLOCK=triton.next_power_of_2(num_candidates),
            BLOCK_KEPT=triton.next_power_of_2(num_kept),
            num_warps=4,
        )
    return tree


def attends(parents: Tensor, deepest: int) -> Tensor:
    """See [`DraftTree.attends`]."""
    batch_size, num_nodes = parents.shape
    sees = parents.new_empty(batch_size, num_nodes, num_nodes, dtype=torch.bool)
    with torch.cuda.device_of(parents):
        _attends_kernel[(batch_size,)](
            parents.contiguous(),
            sees.view(torch.int8),
            num_nodes,
            deepest,
            BLOCK=triton.next_power_of_2(num_nodes),
            num_warps=8,
        )
    return sees


@triton.jit(do_not_specialize=["num_candidates", "num_kept"])
def _build_kernel(
    root_ptr,
    token_ids_ptr,
    parents_ptr,
    scores_ptr,
    to_token_ids_ptr,
    to_parents_ptr,
    preferred_ptr,
    num_candidates,
    num_kept,
    BLOCK: tl.constexpr,
    BLOCK_KEPT: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    begin, index = batch * num_candidates, tl.arange(0, BLOCK)
    is_candidate = index < num_candidates
    order = (_keys(scores_ptr + begin, index, is_candidate) >> 32).to(tl.int32)
    lowest = _lowest_kept(order, is_candidate, num_kept)
    is_better, is_lowest = is_candidate & (order > lowest), is_candidate & (order == lowest)
    num_lowest = num_kept - tl.sum(is_better.to(tl.int32), axis=0)
    is_kept = is_better | (is_lowest & (tl.cumsum(is_lowest.to(tl.int32), axis=0) <= num_lowest))
    place = tl.cumsum(is_kept.to(tl.int32), axis=0) - 1
    preferred_ptr += batch * num_kept  # holds the kept candidates meanwhile
    tl.store(preferred_ptr + place, index.to(tl.int64), mask=is_kept)
    tl.debug_barrier()
    node = tl.arange(0, BLOCK_KEPT)
    is_node = node < num_kept
    kept = tl.load(preferred_ptr + node, mask=is_node, other=0).to(tl.int32)
    tl.debug_barrier()

    key = _keys(scores_ptr + begin, kept, is_node)
    num_preferred = tl.sum((key[None, :] > key[:, None]).to(tl.int32), axis=1)
    tl.store(preferred_ptr + node, num_preferred.to(tl.int64), mask=is_node)

    parent = tl.load(parents_ptr + begin + kept, mask=is_node, other=-1).to(tl.int32)
    is_before = is_node[None, :] & (kept[None, :] < parent[:, None])
    parent = tl.where(parent < 0, 0, tl.sum(is_before.to(tl.int32), axis=1) + 1)
    to = batch * (num_kept + 1)
    tl.store(to_parents_ptr + to, tl.zeros([], tl.int64))
    tl.store(to_parents_ptr + to + 1 + node, parent.to(tl.int64), mask=is_node)
    tl.store(to_token_ids_ptr + to, tl.load(root_ptr + batch))
    token_id = tl.load(token_ids_ptr + begin + kept, mask=is_node, other=0)
    tl.store(to_token_ids_ptr + to + 1 + node, token_id, mask=is_node)


@triton.jit
def _keys(scores_ptr, place, is_score):
    """Keys of scores, with those that are not a number as the lowest."""
    score = tl.load(scores_ptr + place, mask=is_score, other=float("-inf"))
    score = tl.where(score != score, float("-inf"), score)
    return tl.where(is_score, keys_of(score, place), NOTHING)


@triton.jit
def _lowest_kept(order, is_candidate, num_kept):
    """The largest int32 that at least `num_kept` of the candidates reach."""
    lowest = tl.full([], -(2**31), tl.int64)
    for bit in range(32):
        tried = lowest + (tl.full([], 2**31, tl.int64) >> bit)
        num_reached = tl.sum((is_candidate & (order >= tried.to(tl.int32))).to(tl.int32), axis=0)
        lowest = tl.where(num_reached >= num_kept, tried, lowest)
    return lowest.to(tl.int32)


@triton.jit(do_not_specialize=["num_nodes", "deepest"])
def _attends_kernel(parents_ptr, sees_ptr, num_nodes, deepest, BLOCK: tl.constexpr):
    batch = tl.program_id(0).to(tl.int64)
    node = tl.arange(0, BLOCK)
    is_node = node < num_nodes
    ancestor = node
    sees = node[None, :] == node[:, None]
    for _ in range(deepest):
        ancestor = tl.load(parents_ptr + batch * num_nodes + ancestor, mask=is_node, other=0).to(tl.int32)
        sees = sees | (node[None, :] == ancestor[:, None])
    to = sees_ptr + batch * num_nodes * num_nodes + node[:, None] * num_nodes + node[None, :]
    tl.store(to, sees.to(tl.int8), mask=is_node[:, None] & is_node[None, :])
