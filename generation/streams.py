"""Streams of a GPU for what runs beside the current one."""

import functools

import torch


@functools.cache
def side_stream(device: torch.device, index: int = 0) -> torch.cuda.Stream:
    """
    The same for all captures of this copy of the package, which take turns: libraries keep a workspace for every
    stream that they have seen.

    Of high priority, so that its few programs do not queue behind the many of the current stream.
    """
    return torch.cuda.Stream(device, priority=-1)
