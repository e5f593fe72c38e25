"""Whether there are Triton kernels to run: installed, for these numbers, and where they can be built; tried once."""

import functools
import importlib.util

import torch

from .notices import warn_once

HALF_PRECISION = (torch.float16, torch.bfloat16)


@functools.cache
def can_run_kernels(device: torch.device) -> bool:
    """
    Whether Triton is installed and can build a kernel for `device`; that takes a C compiler, too.

    Asked wherever a kernel would run, so that PyTorch's operations stand in for all of them.

    **Effects**: where it cannot, the log says why, once.
    """
    obstacle = triton_obstacle(device)
    if obstacle is not None:
        warn_once(f"Triton cannot run kernels, and PyTorch's, which are slower, stand in for them: {obstacle}.")
    return obstacle is None


def triton_obstacle(device: torch.device) -> str | None:
    """Why no kernel runs on `device`, if so."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    sample = torch.ones(1, device=device, dtype=torch.float16)
    try:
        from .fused_kernels_triton import gate

        gate(sample, sample, "silu")
    except Exception as error:  # whatever a tool raises that is missing or too old
        return f"{type(error).__name__}: {error}"
    return None
