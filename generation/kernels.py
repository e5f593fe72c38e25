"""Whether there are Triton kernels to run: installed, for these numbers, and where they can be built; tried once."""

import functools
import importlib.util
import logging

import torch

logger = logging.getLogger(__name__)

HALF_PRECISION = (torch.float16, torch.bfloat16)


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def can_run_kernels() -> bool:
    """
    Whether Triton is installed and, where there is a GPU, can build a kernel: that takes a C compiler, too.

    **Effects**: where it cannot, the log says why, once.
    """
    if not has_triton() or not torch.cuda.is_available():
        return has_triton()
    from .fused_kernels_triton import gate

    sample = torch.ones(1, device="cuda", dtype=torch.float16)
    try:
        gate(sample, sample, "silu")
    except Exception as error:  # whatever a tool raises that is missing or too old
        logger.warning("Triton cannot build kernels, and PyTorch's are slower: %s: %s.", type(error).__name__, error)
        return False
    return True
