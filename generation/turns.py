"""Who may use what a device's rounds share, when several threads generate.

Calls on a device take turns: they share buffers, and the graphs that work on them. Calls on different devices have
nothing in common but the moment of a capture: it replaces functions of modules and of models, counts on what this
thread has replaced, and empties the allocators of all devices, which must not happen while another graph is recorded.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Held while a graph is being recorded, or memory given back to any device.
capturing = threading.Lock()
_turns: dict[torch.device, threading.Lock] = {}
# When a device is done with the call before: it may have run on another stream. The next turn takes it out.
_last_uses: dict[torch.device, torch.cuda.Event] = {}


@contextmanager
def turn_on(device: torch.device) -> Iterator[bool]:
    """
    A turn on a device, unless another thread has it: nobody waits. The context's value says which.

    **Effects**: what comes on this stream begins after the turn before, which may have left work on another one.
    """
    lock = _turns.setdefault(device, threading.Lock())
    if not lock.acquire(blocking=False):
        yield False
        return
    try:
        if (event := _last_uses.pop(device, None)) is not None:
            torch.cuda.current_stream(device).wait_event(event)
        yield True
    finally:
        try:
            if device.type == "cuda":
                _last_uses[device] = torch.cuda.current_stream(device).record_event()
        finally:
            lock.release()
