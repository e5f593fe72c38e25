"""RoPE in one kernel, forward and backward: what `rotate` of the model computes by five.

The gradient of a rotation is the rotation by the negative angle, so that nothing but the angles is kept. On a GPU the
result has the heads of a token side by side, as the projection left them.

Shapes: B batch, T tokens, H heads.
"""

import torch
from torch import Tensor

from ..modeling_eagle3_mla import CosSin, rotate


def fused_rotate(heads: Tensor, cos_sin: CosSin) -> Tensor:
    """As [`rotate`]: heads `(B, H, T, width)`, angles `(B, T, width)`; the type of the heads is kept."""
    if not heads.is_cuda or heads.dtype == torch.float64:
        return rotate(heads, cos_sin).to(heads.dtype)
    return _Rotation.apply(heads, *cos_sin)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, heads, cos, sin):
        from .rotary_triton import rotate_heads

        ctx.save_for_backward(cos, sin)
        return rotate_heads(heads, cos, sin, inverse=False)

    @staticmethod
    def backward(ctx, gradient):
        from .rotary_triton import rotate_heads

        return rotate_heads(gradient, *ctx.saved_tensors, inverse=True), None, None
