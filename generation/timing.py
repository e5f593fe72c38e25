"""Where the time of a call goes: the prompt, then in the rounds the draft's forwards, the target's, and the rest.

Forwards are timed by hooks around them. On a CUDA device the clock is that of the stream: events are recorded before
and after a forward, and read when somebody asks. So timing never makes the host wait; the rounds as a whole are timed
on the host, which waits for the chosen tokens in every round anyhow.
"""

import threading
import time

import torch
from torch import nn


class Stopwatch:
    """
    Adds up how long one kind of work takes; a context manager around each piece of it.

    Args:
        device (`torch.device`, *optional*): Where the work is done; `None` is the CPU.
    """

    def __init__(self, device: torch.device | None = None):
        self.device = device
        self.started = None
        self.read_seconds = 0.0
        self.unread: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> "Stopwatch":
        self.started = self._now()
        return self

    def __exit__(self, *exception) -> None:
        stopped = self._now()
        if isinstance(stopped, float):
            self.read_seconds += stopped - self.started
        else:
            self.unread.append((self.started, stopped))

    @property
    def seconds(self) -> float:
        """Seconds so far. Waits, on a CUDA device, until the work is done."""
        while self.unread:
            started, stopped = self.unread.pop()
            stopped.synchronize()
            self.read_seconds += started.elapsed_time(stopped) / 1000
        return self.read_seconds

    def _now(self):
        if self.device is None or self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def __getstate__(self) -> dict:
        """For copies: the seconds alone, because an event belongs to its device."""
        return {"device": self.device, "started": None, "read_seconds": self.seconds, "unread": []}


class CallTimes:
    """
    The seconds of one call of `generate(assistant_model=draft)`.

    Args:
        target_device, draft_device (`torch.device`, *optional*): Where the models run; `None` is the CPU.
    """

    def __init__(self, target_device: torch.device | None = None, draft_device: torch.device | None = None):
        self.prefill, self.target = Stopwatch(target_device), Stopwatch(target_device)
        self.draft, self.choice = Stopwatch(draft_device), Stopwatch(target_device)
        self.capture = Stopwatch()
        self.rounds_began = self.rounds_ended = 0.0
        self.is_running = False
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []

    def begin_rounds(self) -> None:
        """The rounds begin now."""
        self.is_running, self.rounds_began = True, time.perf_counter()

    def time_forwards(self, target: nn.Module, draft: nn.Module) -> None:
        """Times the forwards of both models by this thread, until `end`."""
        self.hooks = [*time_forwards(target, self.target), *time_forwards(draft, self.draft)]

    def end(self) -> None:
        """The call is over, with or without an exception."""
        if self.is_running:
            self.is_running, self.rounds_ended = False, time.perf_counter()
        while self.hooks:
            self.hooks.pop().remove()

    @property
    def round_seconds(self) -> float:
        """Seconds of all rounds, of those so far while the call goes on."""
        return (time.perf_counter() if self.is_running else self.rounds_ended) - self.rounds_began

    def __getstate__(self) -> dict:
        return vars(self) | {
            "rounds_ended": self.rounds_began + self.round_seconds,
            "is_running": False,
            "hooks": [],
        }

    def __repr__(self) -> str:
        seconds = {"prefill": self.prefill, "draft": self.draft, "target": self.target}
        parts = [f"{name}_seconds={stopwatch.seconds:.4g}" for name, stopwatch in seconds.items()]
        return f"CallTimes({', '.join(parts)}, round_seconds={self.round_seconds:.4g})"


def time_forwards(model: nn.Module, stopwatch: Stopwatch) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks that time every forward of `model`; those of other threads, which may share the model, are left out."""
    thread = threading.get_ident()

    def before(module, args) -> None:
        if threading.get_ident() == thread:
            stopwatch.__enter__()

    def after(module, args, output) -> None:
        if threading.get_ident() == thread:
            stopwatch.__exit__()

    return [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
