"""Triton kernel of RoPE (arXiv:2104.09864, Eq. 34), half-split as in Llama.

Shapes: B batch, T tokens, H heads.
"""

import triton
import triton.language as tl
from torch import Tensor

from .own_attention_triton import heads_side_by_side, rows_contiguous

BLOCK_ROWS = 32


def rotate_heads(heads: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """Heads `(B, H, T, width)` turned by the angles, each `(B, T, width)`, or back by them; arithmetic in float32."""
    heads, cos, sin = rows_contiguous(heads), cos.contiguous(), sin.contiguous()
    batch_size, num_heads, num_tokens, width = heads.shape
    rotated = heads_side_by_side(heads, width)
    _rotate_kernel[triton.cdiv(num_tokens, BLOCK_ROWS), num_heads, batch_size](
        heads,
        cos,
        sin,
        rotated,
        num_tokens,
        *heads.stride()[:3],
        *rotated.stride()[:3],
        INVERSE=inverse,
        HALF=width // 2,
        BLOCK_HALF=triton.next_power_of_2(width // 2),
        BLOCK_ROWS=BLOCK_ROWS,
    )
    return rotated


@triton.jit
def _rotate_kernel(
    heads_ptr,
    cos_ptr,
    sin_ptr,
    rotated_ptr,
    num_tokens,
    heads_batch,
    heads_head,
    heads_row,
    rotated_batch,
    rotated_head,
    rotated_row,
    INVERSE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    column = tl.arange(0, BLOCK_HALF)
    mask = (row < num_tokens)[:, None] & (column < HALF)[None, :]
    # Cosines and sines repeat: their first half says it all.
    angle = (batch * num_tokens + row)[:, None] * (2 * HALF) + column[None, :]
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    address = heads_ptr + batch * heads_batch + head * heads_head + row[:, None] * heads_row + column[None, :]
    first = tl.load(address, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(address + HALF, mask=mask, other=0.0).to(tl.float32)
    address = rotated_ptr + batch * rotated_batch + head * rotated_head + row[:, None] * rotated_row + column[None, :]
    element = rotated_ptr.dtype.element_ty
    tl.store(address, (first * cos - second * sin).to(element), mask=mask)
    tl.store(address + HALF, (second * cos + first * sin).to(element), mask=mask)
