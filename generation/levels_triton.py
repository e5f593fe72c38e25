"""Triton kernel of `levels`: one program a sequence."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .levels import Candidates, Frontier
from .top_tokens_triton import NOTHING, keys_of, place_of, score_of

BLOCK_COLUMNS = 128


def grow(
    frontier: Frontier, log_probs: Tensor, draft_ids: Tensor, d2t: Tensor, num_columns: int
) -> tuple[Candidates, Frontier]:
    """See [`levels.grow`]."""
    batch_size, width, top_k = log_probs.shape
    candidates = Candidates(
        token_ids=draft_ids.new_empty(batch_size, width * top_k),
        parents=draft_ids.new_empty(batch_size, width * top_k),
        scores=log_probs.new_empty(batch_size, width * top_k),
    )
    following = Frontier(
        candidates=draft_ids.new_empty(batch_size, top_k),
        scores=log_probs.new_empty(batch_size, top_k),
        sees=frontier.sees.new_empty(batch_size, top_k, num_columns),
        num_candidates=frontier.num_candidates + width * top_k,
        num_drafted=frontier.num_drafted + top_k,
        token_ids=draft_ids.new_empty(batch_size, top_k),
        rows=draft_ids.new_empty(batch_size, top_k),
    )
    with torch.cuda.device_of(log_probs):
        _grow_kernel[(batch_size,)](
            log_probs.contiguous(),
            draft_ids.contiguous(),
            d2t,
            frontier.candidates.contiguous(),
            frontier.scores.contiguous(),
            frontier.sees.contiguous().view(torch.int8),
            candidates.token_ids,
            candidates.parents,
            candidates.scores,
            following.candidates,
            following.scores,
            following.sees.view(torch.int8),
            following.token_ids,
            following.rows,
            frontier.num_candidates,
            frontier.num_drafted,
            frontier.sees.shape[2],
            num_columns,
            WIDTH=width,
            TOP_K=top_k,
            BLOCK=triton.next_power_of_2(width * top_k),
            BLOCK_TOP=triton.next_power_of_2(top_k),
            BLOCK_COLUMNS=BLOCK_COLUMNS,
            num_warps=4,
        )
    return candidates, following


@triton.jit(do_not_specialize=["num_candidates", "num_drafted", "num_columns_before", "num_columns"])
def _grow_kernel(
    log_probs_ptr,
    draft_ids_ptr,
    d2t_ptr,
    candidates_ptr,
    scores_ptr,
    sees_ptr,
    to_token_ids_ptr,
    to_parents_ptr,
    to_scores_ptr,
    next_candidates_ptr,
    next_scores_ptr,
    next_sees_ptr,
    next_token_ids_ptr,
    next_rows_ptr,
    num_candidates,
    num_drafted,
    num_columns_before,
    num_columns,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_TOP: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    is_candidate = index < WIDTH * TOP_K
    node, place = batch * WIDTH + index // TOP_K, batch * WIDTH * TOP_K + index
    draft_id = tl.load(draft_ids_ptr + place, mask=is_candidate, other=0)
    offset = tl.load(d2t_ptr + draft_id, mask=is_candidate, other=0)
    tl.store(to_token_ids_ptr + place, draft_id + offset, mask=is_candidate)
    tl.store(to_parents_ptr + place, tl.load(candidates_ptr + node, mask=is_candidate, other=0), mask=is_candidate)
    score = tl.load(scores_ptr + node, mask=is_candidate, other=0.0)
    score += tl.load(log_probs_ptr + place, mask=is_candidate, other=0.0)
    tl.store(to_scores_ptr + place, score, mask=is_candidate)

    key = tl.where(is_candidate, keys_of(score, index), NOTHING)
    top = tl.arange(0, BLOCK_TOP)
    best = tl.full([BLOCK_TOP], NOTHING, tl.int64)
    for rank in range(TOP_K):
        best_key = tl.max(key, axis=0)
        best = tl.where(top == rank, best_key, best)
        key = tl.where(key == best_key, NOTHING, key)
    is_chosen = top < TOP_K
    chosen = tl.where(is_chosen, place_of(best), 0)
    row, to = chosen // TOP_K, batch * TOP_K + top
    draft_id = tl.load(draft_ids_ptr + batch * WIDTH * TOP_K + chosen, mask=is_chosen, other=0)
    offset = tl.load(d2t_ptr + draft_id, mask=is_chosen, other=0)
    tl.store(next_token_ids_ptr + to, draft_id + offset, mask=is_chosen)
    tl.store(next_candidates_ptr + to, num_candidates + chosen, mask=is_chosen)
    tl.store(next_scores_ptr + to, score_of(best), mask=is_chosen)
    tl.store(next_rows_ptr + to, row, mask=is_chosen)

    for begin in range(0, num_columns, BLOCK_COLUMNS):
        column = begin + tl.arange(0, BLOCK_COLUMNS)
        of_row = sees_ptr + ((batch * WIDTH + row) * num_columns_before)[:, None] + column[None, :]
        sees = tl.load(of_row, mask=is_chosen[:, None] & (column < num_drafted)[None, :], other=0)
        is_itself = column[None, :] == num_drafted + top[:, None]
        mask = is_chosen[:, None] & (column < num_columns)[None, :]
        tl.store(
            next_sees_ptr + (to * num_columns)[:, None] + column[None, :], sees | is_itself.to(tl.int8), mask=mask
        )
