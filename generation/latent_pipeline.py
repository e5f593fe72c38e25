"""When attention to latents runs as the pipeline of `latent_pipeline_gluon.py`: on what GPUs, with what compilers.

And when `latent_twins_gluon.py` takes its place.
"""

import functools
import logging

import torch
import triton
from torch import Tensor

logger = logging.getLogger(__name__)

HOPPER = (9, 0)
# Gluon is experimental: other versions of Triton may compile the kernel to something else, or not at all.
TRITON_VERSIONS = ("3.6.",)
LATENT_DIMS = (64, 128, 256)
# Keys of wider heads, padded to 256 entries, have no room in registers, nor in shared memory beside wide latents.
HEAD_DIMS = range(64, 129)
# Up to so many rows of heads that share keys, only long texts of one sequence gain (H200).
FEW_ROWS, LONG_CAPACITY = 16, 8192
# Up to so many rows, which its products have, from this capacity on: at 32k slots 58 µs instead of 66, at 128k 161
# instead of 210, at 8k the same (4 rows, prototype, H200).
TWIN_ROWS, TWIN_CAPACITY = 8, 16384
# What the device copies by itself begins at a multiple of so many bytes.
ALIGNMENT = 16


def pipeline_takes(query: Tensor, c_kv: Tensor, num_groups: int) -> bool:
    """
    Whether the pipeline computes an attention without padding where R = 0.

    Args:
        query (`torch.Tensor` of shape `(B, H, W, d)`), c_kv (`torch.Tensor` of shape `(B, 1, T, C)`): As for
            `attend_latents`.
        num_groups (`int`): Key-value heads.
    """
    if not query.is_cuda or torch.cuda.get_device_capability(query.device) != HOPPER:
        return False
    if c_kv.shape[3] not in LATENT_DIMS or query.shape[3] not in HEAD_DIMS or not can_be_copied(c_kv):
        return False
    return is_worth_it(query, c_kv, num_groups) and is_known(triton.__version__)


def can_be_copied(c_kv: Tensor) -> bool:
    """Whether the device can see the slots of all sequences of `c_kv (B, 1, T, C)` as the rows of one matrix."""
    batch_size, _, num_slots, latent_dim = c_kv.shape
    batch_stride, _, slot_stride, _ = c_kv.stride()
    is_aligned = c_kv.data_ptr() % ALIGNMENT == 0 and slot_stride * c_kv.element_size() % ALIGNMENT == 0
    is_matrix = num_slots > 0 and slot_stride >= latent_dim and (batch_size == 1 or batch_stride % slot_stride == 0)
    return is_aligned and is_matrix


def is_worth_it(query: Tensor, c_kv: Tensor, num_groups: int) -> bool:
    """Whether the pipeline, whose products always have 64 rows, is the faster kernel."""
    batch_size, num_heads, num_rows, _ = query.shape
    has_many_rows = num_heads // num_groups * num_rows > FEW_ROWS
    return has_many_rows or (batch_size == 1 and c_kv.shape[2] >= LONG_CAPACITY)


def twins_are_faster(query: Tensor, c_kv: Tensor, num_groups: int) -> bool:
    """Whether two groups of warps with a part each are the faster kernel for what the pipeline takes, too."""
    batch_size, num_heads, num_rows, _ = query.shape
    has_few_rows = num_heads // num_groups * num_rows <= TWIN_ROWS
    return has_few_rows and batch_size == 1 and c_kv.shape[2] >= TWIN_CAPACITY


@functools.cache
def is_known(version: str) -> bool:
    """Whether the pipeline was tried with a version of Triton. If not, the log says so, once."""
    if version.startswith(TRITON_VERSIONS):
        return True
    known = ", ".join(f"{each}x" for each in TRITON_VERSIONS)
    logger.info(f"Attention to latents has a faster kernel for this GPU, tried with Triton {known}, not {version}.")
    return False
