"""CUDA graphs: a sequence of stages, recorded once and replayed with one launch each.

A stage is a function without arguments whose tensors stay where they are. Recording runs it without doing its work,
so stages run twice before, which also lets libraries allocate what they need.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

Stage = Callable[[], Tensor | None]
NUM_WARM_UPS = 2


class CapturedStage:
    """
    A stage as a graph.

    Args:
        stage (`Callable`): What to record.
        pool: Memory that the stages of a sequence share.
        stream (`torch.cuda.Stream`): Where to record.
    """

    def __init__(self, stage: Stage, pool, stream: torch.cuda.Stream):
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.output = stage()

    def __call__(self) -> Tensor | None:
        """Runs the stage; what it returns is overwritten by the next run."""
        self.graph.replay()
        return self.output


def capture(stages: Sequence[Stage], device: torch.device) -> list[Stage]:
    """
    Records stages that always run in this order.

    Raises:
        RuntimeError: If one of them asks something of the device, or allocates other than through PyTorch.

    **Effects**: runs the stages.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(NUM_WARM_UPS):
            for stage in stages:
                stage()
    torch.cuda.current_stream(device).wait_stream(stream)
    pool = torch.cuda.graph_pool_handle()
    with current_stays(device):
        try:
            return [CapturedStage(stage, pool, stream) for stage in stages]
        except BaseException:
            free_random_numbers(device)
            raise


@contextmanager
def current_stays(device: torch.device) -> Iterator[None]:
    """After it, stream and device are those of before: a recording that breaks off leaves its own behind."""
    with torch.cuda.device(torch.cuda.current_device()), torch.cuda.stream(torch.cuda.current_stream(device)):
        yield


def free_random_numbers(device: torch.device) -> None:
    """
    Lets random numbers be drawn after a recording that broke off, which PyTorch's generator takes for going on.

    **Effects**: records something that cannot fail; the generator's state stays what it is.
    """
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
        torch.zeros(1, device=device)
