"""Triton kernels of `top_tokens`: the best of each part of a row, then the best of these.

A score and its place make one integer: the score's bits, so changed that integers order as numbers do, above the place
counted from the end. The largest integer is then the best score, of equal ones the first, and there are no two alike,
so that the best is taken out by comparing. Sums of exponentials are float32.

Shapes: V scores of a row, P parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_SCORES = 1024
BLOCK_COMPARED = 4096
NOTHING = tl.constexpr(-(2**63))


def best(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """See `best_log_probs`."""
    rows = scores.reshape(-1, scores.shape[-1])
    num_rows, num_scores = rows.shape
    num_parts = triton.cdiv(num_scores, BLOCK_SCORES)
    keys = rows.new_empty(num_rows, num_parts, top_k, dtype=torch.int64)
    sums = rows.new_empty(2, num_rows, num_parts, dtype=torch.float32)
    values = rows.new_empty(num_rows, top_k, dtype=torch.float32)
    places = rows.new_empty(num_rows, top_k, dtype=torch.int64)
    with torch.cuda.device_of(rows):
        _best_of_part[num_parts, num_rows](
            rows, keys, sums, rows.stride(0), rows.stride(1), num_scores, TOP_K=top_k, BLOCK=BLOCK_SCORES
        )
        _best_of_parts[(num_rows,)](
            keys,
            sums,
            values,
            places,
            num_parts,
            TOP_K=top_k,
            BLOCK_PARTS=triton.next_power_of_2(num_parts),
            BLOCK_KEYS=triton.next_power_of_2(num_parts * top_k),
            num_warps=4 if num_parts * top_k > 512 else 1,
        )
    shape = *scores.shape[:-1], top_k
    return values.view(shape), places.view(shape)


def highest(scores: Tensor) -> Tensor:
    """See `top_tokens.highest`."""
    rows = scores.reshape(-1, scores.shape[-1])
    num_rows, num_scores = rows.shape
    num_parts = triton.cdiv(num_scores, BLOCK_COMPARED)
    keys = rows.new_empty(num_rows, num_parts, dtype=torch.int64)
    places = rows.new_empty(scores.shape[:-1], dtype=torch.int64)
    with torch.cuda.device_of(rows):
        _highest_of_part[num_rows, num_parts](rows, keys, *rows.stride(), num_scores, BLOCK=BLOCK_COMPARED)
        _highest_of_parts[(num_rows,)](
            keys, places, num_parts, BLOCK_PARTS=triton.next_power_of_2(num_parts), num_warps=1
        )
    return places


@triton.jit
def _highest_of_part(scores_ptr, keys_ptr, row_stride, score_stride, num_scores, BLOCK: tl.constexpr):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = part * BLOCK + tl.arange(0, BLOCK)
    is_score = place < num_scores
    score = _load_scores(scores_ptr + row * row_stride, place, is_score, score_stride)
    # All that are not numbers are alike, and above the numbers.
    score = tl.where(score != score, float("nan"), score)
    key = tl.where(is_score, keys_of(score, place), NOTHING)
    tl.store(keys_ptr + row * tl.num_programs(1) + part, tl.max(key, axis=0))


@triton.jit
def _highest_of_parts(keys_ptr, places_ptr, num_parts, BLOCK_PARTS: tl.constexpr):
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_PARTS)
    key = tl.load(keys_ptr + row * num_parts + part, mask=part < num_parts, other=NOTHING)
    tl.store(places_ptr + row, place_of(tl.max(key, axis=0)))


@triton.jit
def _best_of_part(
    scores_ptr, keys_ptr, sums_ptr, row_stride, score_stride, num_scores, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):
    part, row, num_parts = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    place = part * BLOCK + tl.arange(0, BLOCK)
    is_score = place < num_scores
    score = _load_scores(scores_ptr + row * row_stride, place, is_score, score_stride)
    highest = tl.max(score, axis=0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)  # a part may have nothing
    tl.store(sums_ptr + row * num_parts + part, highest)
    tl.store(sums_ptr + (tl.num_programs(1) + row) * num_parts + part, tl.sum(tl.exp(score - shift), axis=0))
    key = tl.where(is_score, keys_of(score, place), NOTHING)
    for rank in range(TOP_K):
        best_key = tl.max(key, axis=0)
        tl.store(keys_ptr + (row * num_parts + part) * TOP_K + rank, best_key)
        key = tl.where(key == best_key, NOTHING, key)


@triton.jit
def _best_of_parts(
    keys_ptr,
    sums_ptr,
    values_ptr,
    places_ptr,
    num_parts,
    TOP_K: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_PARTS)
    shifts = tl.load(sums_ptr + row * num_parts + part, mask=part < num_parts, other=float("-inf"))
    sums = tl.load(sums_ptr + (tl.num_programs(0) + row) * num_parts + part, mask=part < num_parts, other=0.0)
    highest = tl.max(shifts, axis=0)
    log_sum = tl.log(tl.sum(sums * tl.exp(shifts - highest), axis=0))
    index = tl.arange(0, BLOCK_KEYS)
    key = tl.load(keys_ptr + row * num_parts * TOP_K + index, mask=index < num_parts * TOP_K, other=NOTHING)
    for rank in range(TOP_K):
        best_key = tl.max(key, axis=0)
        tl.store(values_ptr + row * TOP_K + rank, score_of(best_key) - highest - log_sum)
        tl.store(places_ptr + row * TOP_K + rank, place_of(best_key))
        key = tl.where(key == best_key, NOTHING, key)


@triton.jit
def _load_scores(row_ptr, place, is_score, score_stride):
    return tl.load(row_ptr + place.to(tl.int64) * score_stride, mask=is_score, other=float("-inf")).to(tl.float32)


@triton.jit
def keys_of(score, place):
    """Integers that order as scores, of equal ones the first place highest."""
    score = tl.where(score == 0, 0.0, score)  # zeros of both signs are equal
    return (_ordered(score.to(tl.int32, bitcast=True)).to(tl.int64) << 32) | (0x7FFFFFFF - place).to(tl.int64)


@triton.jit
def score_of(key):
    """The score in a key."""
    return _ordered((key >> 32).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def place_of(key):
    """The place in a key."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF)


@triton.jit
def _ordered(bits):
    """Between the bits of a float32 and an integer that orders as it does; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
