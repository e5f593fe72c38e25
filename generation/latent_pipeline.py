"""When attention to latents runs as the pipeline of `latent_pipeline_gluon.py`: on what GPUs, with what compilers."""

import torch
import triton
from torch import Tensor

from .latent_parts import Parts, sm_count

HOPPER = (9, 0)
# Gluon is experimental: other versions of Triton may compile the kernel to something else, or not at all.
TRITON_VERSIONS = ("3.6.",)
LATENT_DIMS = (64, 128, 256)
LEAST_HEAD_DIM = 64
# What the device copies by itself begins at a multiple of so many bytes.
ALIGNMENT = 16


def pipeline_takes(query: Tensor, c_kv: Tensor) -> bool:
    """
    Whether the pipeline computes attention of `query (B, H, W, d)` to `c_kv (B, 1, T, C)`, without padding, where
    R = 0.
    """
    if not query.is_cuda or torch.cuda.get_device_capability(query.device) != HOPPER:
        return False
    if not triton.__version__.startswith(TRITON_VERSIONS):
        return False
    return c_kv.shape[3] in LATENT_DIMS and query.shape[3] >= LEAST_HEAD_DIM and can_be_copied(c_kv)


def can_be_copied(c_kv: Tensor) -> bool:
    """Whether the device can see the slots of all sequences of `c_kv (B, 1, T, C)` as the rows of one matrix."""
    batch_stride, _, slot_stride, _ = c_kv.stride()
    is_aligned = c_kv.data_ptr() % ALIGNMENT == 0 and slot_stride * c_kv.element_size() % ALIGNMENT == 0
    return is_aligned and (len(c_kv) == 1 or batch_stride % slot_stride == 0)


def pipelined_parts(
    query: Tensor, c_kv: Tensor, w_uk: Tensor, inv_freq: Tensor, lengths: Tensor, scaling: float, drafted: tuple
) -> Parts:
    """
    See `launch_parts`.

    Args:
        w_uk (`torch.Tensor` of shape `(G, d, C)`), inv_freq (`torch.Tensor` of shape `(d / 2,)`), lengths
            (`torch.Tensor` of shape `(B,)`): As for `attend_latents`.
        scaling (`float`): Factor of the scores, which are logarithms to base 2.
        drafted (`tuple`): What `drafted_inputs` gives.
    """
    from .latent_pipeline_gluon import BLOCK_ROWS, BLOCK_SLOTS, launch_parts  # not every Triton has Gluon

    (batch_size, num_heads, num_rows, _), num_groups = query.shape, w_uk.shape[0]
    num_row_tiles = triton.cdiv(num_heads // num_groups * num_rows, BLOCK_ROWS)
    parts = Parts.empty(query, c_kv, batch_size * num_groups * num_row_tiles, BLOCK_SLOTS, sm_count(query.device))
    launch_parts(query, c_kv, w_uk, inv_freq, lengths, scaling, drafted, parts)
    return parts
