"""Triton kernels of `own_attention`: one program reads a block of rows of one head, and their keys and values once.

The gradient takes two kernels, because the query sums over own keys and a key over the query heads that share it. Base
output and log-sum-exp, where given, enter as one more key. Arithmetic is float32. Tensors may lie in any order as long
as the last axis is contiguous; outputs have the heads of a token side by side, as the output projection reads them.

Shapes: B batch, T tokens, H heads, G key-value heads, d head dimension, R rope dimension, k own keys per row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS = 16


def attend(
    query: Tensor, own_keys: Tensor, own_values: Tensor, scaling: float, base: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """See `own_attention`."""
    query, own_keys, own_values = (rows_contiguous(tensor) for tensor in (query, own_keys, own_values))
    batch_size, num_heads, num_tokens, _ = query.shape
    output = heads_side_by_side(query, own_values.shape[-1])
    lse = query.new_empty(batch_size, num_heads, num_tokens, dtype=torch.float32)
    base_output, base_lse = (output, lse) if base is None else (rows_contiguous(base[0]), base[1].contiguous())
    _attend_kernel[triton.cdiv(num_tokens, BLOCK_ROWS), num_heads, batch_size](
        query,
        own_keys,
        own_values,
        base_output,
        base_lse,
        output,
        lse,
        scaling,
        *query.stride()[:3],
        *own_keys.stride()[:4],
        *own_values.stride()[:4],
        *base_output.stride()[:3],
        *output.stride()[:3],
        HAS_BASE=base is not None,
        **_sizes(query, own_keys, own_values),
    )
    return output, lse


def differentiate(
    query: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    output: Tensor,
    lse: Tensor,
    scaling: float,
    output_gradient: Tensor,
    lse_gradient: Tensor | None,
    base: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """See `differentiate_by_sums`."""
    query, own_keys, own_values = (rows_contiguous(tensor) for tensor in (query, own_keys, own_values))
    output_gradient = rows_contiguous(output_gradient)
    batch_size, num_heads, num_tokens, key_dim = query.shape
    sizes = _sizes(query, own_keys, own_values)
    query_gradient = heads_side_by_side(query, key_dim)
    offset = torch.empty_like(lse) if lse_gradient is None else lse_gradient.to(torch.float32).clone()
    base_output, base_lse = (output, lse) if base is None else (rows_contiguous(base[0]), base[1].contiguous())
    base_gradients = (output, lse) if base is None else (heads_side_by_side(output, output.shape[-1]), lse.clone())
    num_blocks = triton.cdiv(num_tokens, BLOCK_ROWS)
    _query_gradient_kernel[num_blocks, num_heads, batch_size](
        query,
        own_keys,
        own_values,
        base_output,
        base_lse,
        output,
        lse,
        output_gradient,
        offset,
        query_gradient,
        *base_gradients,
        scaling,
        *query.stride()[:3],
        *own_keys.stride()[:4],
        *own_values.stride()[:4],
        *base_output.stride()[:3],
        *output.stride()[:3],
        *output_gradient.stride()[:3],
        *query_gradient.stride()[:3],
        *base_gradients[0].stride()[:3],
        HAS_BASE=base is not None,
        HAS_LSE_GRADIENT=lse_gradient is not None,
        **sizes,
    )
    key_gradients = heads_side_by_side(own_keys, key_dim)
    value_gradients = heads_side_by_side(own_values, own_values.shape[-1])
    _key_gradient_kernel[num_blocks, own_keys.shape[2], batch_size](
        query,
        own_keys,
        own_values,
        lse,
        output_gradient,
        offset,
        key_gradients,
        value_gradients,
        scaling,
        *query.stride()[:3],
        *own_keys.stride()[:4],
        *own_values.stride()[:4],
        *output_gradient.stride()[:3],
        *key_gradients.stride()[:4],
        *value_gradients.stride()[:4],
        NUM_HEADS=num_heads,
        **sizes,
    )
    return query_gradient, key_gradients, value_gradients, *(base_gradients if base is not None else (None, None))


def rows_contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where its last axis is not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def heads_side_by_side(like: Tensor, width: int) -> Tensor:
    """An empty `(..., H, T, width)`, its other sizes those of `like`, that lies in memory as `(..., T, H, width)`."""
    *outer, num_heads, num_tokens, _ = like.shape
    return like.new_empty(*outer, num_tokens, num_heads, width).transpose(-2, -3)


def _sizes(query: Tensor, own_keys: Tensor, own_values: Tensor) -> dict[str, int]:
    num_heads, num_tokens, key_dim = query.shape[1:]
    head_dim = own_values.shape[-1]
    return {
        "num_tokens": num_tokens,
        "NUM_OWN": own_keys.shape[0],
        "GROUP": num_heads // own_values.shape[2],
        "KEY_DIM": key_dim,
        "HEAD_DIM": head_dim,
        "BLOCK_KEY": triton.next_power_of_2(key_dim),
        "BLOCK_HEAD": triton.next_power_of_2(head_dim),
        "BLOCK_ROWS": BLOCK_ROWS,
    }


@triton.jit
def _start(batch, head, batch_stride, head_stride):
    """Offset of the first row of a head."""
    return batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride


@triton.jit
def _load(pointer, row, row_stride, is_row, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Rows of a tensor in float32, zeros outside of it."""
    column = tl.arange(0, BLOCK_WIDTH)
    address = pointer + row.to(tl.int64)[:, None] * row_stride + column[None, :]
    return tl.load(address, mask=is_row[:, None] & (column < WIDTH)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, values, row, row_stride, is_row, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    column = tl.arange(0, BLOCK_WIDTH)
    address = pointer + row.to(tl.int64)[:, None] * row_stride + column[None, :]
    tl.store(address, values.to(pointer.dtype.element_ty), mask=is_row[:, None] & (column < WIDTH)[None, :])


@triton.jit
def _attend_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    base_ptr,
    base_lse_ptr,
    output_ptr,
    lse_ptr,
    scaling,
    query_batch,
    query_head,
    query_row,
    key_own,
    key_batch,
    key_head,
    key_row,
    value_own,
    value_batch,
    value_head,
    value_row,
    base_batch,
    base_head,
    base_row,
    output_batch,
    output_head,
    output_row,
    num_tokens,
    HAS_BASE: tl.constexpr,
    NUM_OWN: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    head, batch = tl.program_id(1), tl.program_id(2)
    is_row = row < num_tokens
    lse_start = (batch * tl.num_programs(1) + head).to(tl.int64) * num_tokens
    query_ptr += _start(batch, head, query_batch, query_head)
    key_ptr += _start(batch, head // GROUP, key_batch, key_head)
    value_ptr += _start(batch, head // GROUP, value_batch, value_head)
    query = _load(query_ptr, row, query_row, is_row, KEY_DIM, BLOCK_KEY)
    if HAS_BASE:
        base_ptr += _start(batch, head, base_batch, base_head)
        maximum = tl.load(base_lse_ptr + lse_start + row, mask=is_row, other=0.0)
        total = tl.full([BLOCK_ROWS], 1.0, tl.float32)
        output = _load(base_ptr, row, base_row, is_row, HEAD_DIM, BLOCK_HEAD)
    else:
        maximum = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_ROWS], tl.float32)
        output = tl.zeros([BLOCK_ROWS, BLOCK_HEAD], tl.float32)
    for own in tl.static_range(NUM_OWN):
        key = _load(key_ptr + own * key_own, row, key_row, is_row, KEY_DIM, BLOCK_KEY)
        value = _load(value_ptr + own * value_own, row, value_row, is_row, HEAD_DIM, BLOCK_HEAD)
        score = tl.sum(query * key, axis=1) * scaling
        new_maximum = tl.maximum(maximum, score)
        shrink, weight = tl.exp(maximum - new_maximum), tl.exp(score - new_maximum)
        output = output * shrink[:, None] + weight[:, None] * value
        total = total * shrink + weight
        maximum = new_maximum
    output_ptr += _start(batch, head, output_batch, output_head)
    _store(output_ptr, output / total[:, None], row, output_row, is_row, HEAD_DIM, BLOCK_HEAD)
    tl.store(lse_ptr + lse_start + row, maximum + tl.log(total), mask=is_row)


@triton.jit
def _query_gradient_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    base_ptr,
    base_lse_ptr,
    output_ptr,
    lse_ptr,
    gradient_ptr,
    offset_ptr,
    query_gradient_ptr,
    base_gradient_ptr,
    base_lse_gradient_ptr,
    scaling,
    query_batch,
    query_head,
    query_row,
    key_own,
    key_batch,
    key_head,
    key_row,
    value_own,
    value_batch,
    value_head,
    value_row,
    base_batch,
    base_head,
    base_row,
    output_batch,
    output_head,
    output_row,
    gradient_batch,
    gradient_head,
    gradient_row,
    query_gradient_batch,
    query_gradient_head,
    query_gradient_row,
    base_gradient_batch,
    base_gradient_head,
    base_gradient_row,
    num_tokens,
    HAS_BASE: tl.constexpr,
    HAS_LSE_GRADIENT: tl.constexpr,
    NUM_OWN: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    head, batch = tl.program_id(1), tl.program_id(2)
    is_row = row < num_tokens
    lse_start = (batch * tl.num_programs(1) + head).to(tl.int64) * num_tokens
    query_ptr += _start(batch, head, query_batch, query_head)
    key_ptr += _start(batch, head // GROUP, key_batch, key_head)
    value_ptr += _start(batch, head // GROUP, value_batch, value_head)
    output_ptr += _start(batch, head, output_batch, output_head)
    gradient_ptr += _start(batch, head, gradient_batch, gradient_head)
    query = _load(query_ptr, row, query_row, is_row, KEY_DIM, BLOCK_KEY)
    gradient = _load(gradient_ptr, row, gradient_row, is_row, HEAD_DIM, BLOCK_HEAD)
    output = _load(output_ptr, row, output_row, is_row, HEAD_DIM, BLOCK_HEAD)
    lse = tl.load(lse_ptr + lse_start + row, mask=is_row, other=0.0)
    offset = -tl.sum(gradient * output, axis=1)
    if HAS_LSE_GRADIENT:
        offset += tl.load(offset_ptr + lse_start + row, mask=is_row, other=0.0)
    tl.store(offset_ptr + lse_start + row, offset, mask=is_row)
    query_gradient = tl.zeros([BLOCK_ROWS, BLOCK_KEY], tl.float32)
    for own in tl.static_range(NUM_OWN):
        key = _load(key_ptr + own * key_own, row, key_row, is_row, KEY_DIM, BLOCK_KEY)
        value = _load(value_ptr + own * value_own, row, value_row, is_row, HEAD_DIM, BLOCK_HEAD)
        prob = tl.exp(tl.sum(query * key, axis=1) * scaling - lse)
        score_gradient = prob * (tl.sum(gradient * value, axis=1) + offset) * scaling
        query_gradient += score_gradient[:, None] * key
    query_gradient_ptr += _start(batch, head, query_gradient_batch, query_gradient_head)
    _store(query_gradient_ptr, query_gradient, row, query_gradient_row, is_row, KEY_DIM, BLOCK_KEY)
    if HAS_BASE:
        base_ptr += _start(batch, head, base_batch, base_head)
        base_gradient_ptr += _start(batch, head, base_gradient_batch, base_gradient_head)
        base = _load(base_ptr, row, base_row, is_row, HEAD_DIM, BLOCK_HEAD)
        prob = tl.exp(tl.load(base_lse_ptr + lse_start + row, mask=is_row, other=0.0) - lse)
        base_lse_gradient = prob * (tl.sum(gradient * base, axis=1) + offset)
        _store(base_gradient_ptr, prob[:, None] * gradient, row, base_gradient_row, is_row, HEAD_DIM, BLOCK_HEAD)
        tl.store(base_lse_gradient_ptr + lse_start + row, base_lse_gradient, mask=is_row)


@triton.jit
def _key_gradient_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    lse_ptr,
    gradient_ptr,
    offset_ptr,
    key_gradient_ptr,
    value_gradient_ptr,
    scaling,
    query_batch,
    query_head,
    query_row,
    key_own,
    key_batch,
    key_head,
    key_row,
    value_own,
    value_batch,
    value_head,
    value_row,
    gradient_batch,
    gradient_head,
    gradient_row,
    key_gradient_own,
    key_gradient_batch,
    key_gradient_head,
    key_gradient_row,
    value_gradient_own,
    value_gradient_batch,
    value_gradient_head,
    value_gradient_row,
    num_tokens,
    NUM_HEADS: tl.constexpr,
    NUM_OWN: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    group, batch = tl.program_id(1), tl.program_id(2)
    is_row = row < num_tokens
    key_ptr += _start(batch, group, key_batch, key_head)
    value_ptr += _start(batch, group, value_batch, value_head)
    key_gradient_ptr += _start(batch, group, key_gradient_batch, key_gradient_head)
    value_gradient_ptr += _start(batch, group, value_gradient_batch, value_gradient_head)
    for own in tl.static_range(NUM_OWN):
        key = _load(key_ptr + own * key_own, row, key_row, is_row, KEY_DIM, BLOCK_KEY)
        value = _load(value_ptr + own * value_own, row, value_row, is_row, HEAD_DIM, BLOCK_HEAD)
        key_gradient = tl.zeros([BLOCK_ROWS, BLOCK_KEY], tl.float32)
        value_gradient = tl.zeros([BLOCK_ROWS, BLOCK_HEAD], tl.float32)
        for member in tl.static_range(GROUP):
            head = group * GROUP + member
            lse_start = (batch * NUM_HEADS + head).to(tl.int64) * num_tokens
            query_start = _start(batch, head, query_batch, query_head)
            query = _load(query_ptr + query_start, row, query_row, is_row, KEY_DIM, BLOCK_KEY)
            gradient_start = _start(batch, head, gradient_batch, gradient_head)
            gradient = _load(gradient_ptr + gradient_start, row, gradient_row, is_row, HEAD_DIM, BLOCK_HEAD)
            lse = tl.load(lse_ptr + lse_start + row, mask=is_row, other=0.0)
            offset = tl.load(offset_ptr + lse_start + row, mask=is_row, other=0.0)
            prob = tl.exp(tl.sum(query * key, axis=1) * scaling - lse)
            score_gradient = prob * (tl.sum(gradient * value, axis=1) + offset) * scaling
            key_gradient += score_gradient[:, None] * query
            value_gradient += prob[:, None] * gradient
        target = key_gradient_ptr + own * key_gradient_own
        _store(target, key_gradient, row, key_gradient_row, is_row, KEY_DIM, BLOCK_KEY)
        target = value_gradient_ptr + own * value_gradient_own
        _store(target, value_gradient, row, value_gradient_row, is_row, HEAD_DIM, BLOCK_HEAD)
