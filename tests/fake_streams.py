"""Streams that write down what happens on which, and tensors of the CPU that take themselves for a GPU's."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from eagle3_mla.generation import parallel_branches, sibling_projections


class FakeStream:
    """
    Writes down what it is told.

    Args:
        name (`str`): As in the log.
        log (`list[str]`): The log.
    """

    def __init__(self, name: str, log: list[str]):
        self.name, self.log = name, log

    def record_event(self) -> str:
        event = f"event {1 + sum('records' in line for line in self.log)}"
        self.log.append(f"{self.name} records {event}")
        return event

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def wait_stream(self, other: "FakeStream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


class FakeStreams:
    """
    The current stream and those beside it.

    Args:
        monkeypatch (`pytest.MonkeyPatch`): What takes the place of PyTorch's streams while it lasts.

    Attributes:
        log (`list[str]`): What happened.
    """

    def __init__(self, monkeypatch):
        self.log: list[str] = []
        self.entered, self.sides = [FakeStream("current", self.log)], {}
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.entered[-1])
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        for module in parallel_branches, sibling_projections:
            monkeypatch.setattr(module, "side_stream", self.side)
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)

    def side(self, device: torch.device, index: int = 0) -> FakeStream:
        return self.sides.setdefault(index, FakeStream(f"side {index}", self.log))

    @contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        self.entered.append(stream)
        try:
            yield
        finally:
            self.entered.pop()

    def note(self, name: str) -> None:
        """Writes down that something is computed on the current stream."""
        self.log.append(f"{name} on {self.entered[-1].name}")
