"""What the draft remembers of new rows, computed beside what they ask, on a second stream of the GPU.

`ask` reads most of the weights before the attention; `remember` reads few of them, in several small kernels one after
the other that leave a GPU idle. Neither needs anything of the other:

    current stream   ... fork -------- ask -------- join ... attention
    side stream             \\---- remember ----/

A graph that records the two streams has two branches, which the device runs at once.

Memory needs no further care. PyTorch gives what was freed on a stream to that stream again, in the order of the host:

- What the side stream reads (`attention_input`, angles, weights) the caller holds until `remember` returns, thus until
  the current stream waits for the side: nobody writes there before.
- What it allocated may be read by the current stream and freed at any time. The side gets it again in a later
  `remember` only, which waits for a later fork, thus for all reads that the current stream began before that `ask`;
  and `ask` itself is given nothing but its inputs.

Libraries have a workspace for each stream, so that the products of two branches do not meet in one.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .streams import side_stream

METHODS = ("ask", "remember")


@dataclass(frozen=True)
class Fork:
    """
    Where the branches part.

    Args:
        event (`torch.cuda.Event`): On the current stream, before `ask`.
        inputs (`tuple`): What `ask` was given, and what therefore was there: input and angles.
    """

    event: torch.cuda.Event
    inputs: tuple


class Branches:
    """
    `ask` and `remember` of an attention, the second beside the first, with nothing else between them.

    Only in the thread that made them; on the CPU, for a compiler, and for other inputs than `ask` had, `remember` runs
    where it always does.

    Args:
        attention (`nn.Module`): Of the draft.
    """

    def __init__(self, attention: nn.Module):
        self.plain_ask: Callable[..., Tensor] = attention.ask
        self.plain_remember: Callable[..., tuple[Tensor, Tensor]] = attention.remember
        self.thread = threading.get_ident()
        self.fork: Fork | None = None

    def ask(self, attention_input: Tensor, cos_sin: tuple[Tensor, Tensor], **kwargs) -> Tensor:
        """See [`LatentAttention.ask`]. **Effects**: the branches part here."""
        if self.may_part(attention_input):
            event = torch.cuda.current_stream(attention_input.device).record_event()
            self.fork = Fork(event, (attention_input, cos_sin))
        return self.plain_ask(attention_input, cos_sin, **kwargs)

    def remember(self, attention_input: Tensor, cos_sin: tuple[Tensor, Tensor], **kwargs) -> tuple[Tensor, Tensor]:
        """See [`LatentAttention.remember`]. **Effects**: the current stream waits for what is returned."""
        event = self.take_fork(attention_input, cos_sin)
        if event is None:
            return self.plain_remember(attention_input, cos_sin, **kwargs)
        current, side = torch.cuda.current_stream(attention_input.device), side_stream(attention_input.device)
        side.wait_event(event)
        try:
            with torch.cuda.stream(side):
                return self.plain_remember(attention_input, cos_sin, **kwargs)
        finally:  # a recording that ends with a loose branch would hide the error behind its own
            current.wait_stream(side)

    def take_fork(self, *inputs) -> torch.cuda.Event | None:
        """Where the branches have parted, if they did so for these inputs."""
        if not self.may_part(inputs[0]) or self.fork is None:
            return None
        fork, self.fork = self.fork, None
        is_same = all(given is asked for given, asked in zip(inputs, fork.inputs, strict=True))
        return fork.event if is_same else None

    def may_part(self, attention_input: Tensor) -> bool:
        is_seen = not torch.compiler.is_compiling() and attention_input.is_cuda
        return is_seen and threading.get_ident() == self.thread


@contextmanager
def parallel_branches(draft: nn.Module) -> Iterator[None]:
    """
    While the context is open, each attention of `draft` computes its new rows' memory beside their query.

    **Effects**: replaces two methods of each; others that stood in their place are put back.
    """
    with ExitStack() as stack:
        for attention in (layer.self_attn for layer in draft.layers):
            replaced, branches = dict(vars(attention)), Branches(attention)
            for name in METHODS:
                setattr(attention, name, getattr(branches, name))
            stack.callback(put_back, attention, {name: replaced[name] for name in METHODS if name in replaced})
        yield


def put_back(attention: nn.Module, replaced: dict[str, Callable]) -> None:
    """Gives an attention the methods of its class again, or what `replaced` them."""
    for name in METHODS:
        delattr(attention, name)
    vars(attention).update(replaced)
