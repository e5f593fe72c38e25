"""Streams of a GPU for what runs beside the current one."""

import functools

import torch

NUM_SIDES = 3


def side_stream(device: torch.device, index: int = 0) -> torch.cuda.Stream:
    """
    The same for all captures of this copy of the package, which take turns: libraries keep a workspace for every
    stream that they have seen.

    Of high priority, so that its few programs do not queue behind the many of the current stream.
    """
    return side_streams(device)[index]


@functools.cache
def side_streams(device: torch.device) -> list[torch.cuda.Stream]:
    """All at once: PyTorch has 32 streams and hands them out in turn, so that later ones could be one of these."""
    return [torch.cuda.Stream(device, priority=-1) for _ in range(NUM_SIDES)]
