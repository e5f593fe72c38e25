"""Projections of the same states, computed beside each other on several streams of the GPU.

Queries, keys and values are three matrix products of one input, and a gated MLP begins with two. For few rows each is
over in microseconds, of which the first and the last do not fill the memory's bus:

    current stream   ... fork -- q_proj -- join ...
    a side stream          \\---- k_proj ----/
    another                 \\--- v_proj ---/

The first of them that is called computes all; the others find their output if they are asked about the same states.
One that is never asked has computed in vain, but nothing wrong.

For memory holds what `parallel_branches.py` says: a side stream waits for an event behind all reads of what it is
given again.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .streams import side_stream


@dataclass(frozen=True)
class Family:
    """
    Projections that a module gives the same states.

    Args:
        names (`tuple[str, ...]`): Of its children.
        first_side (`int`, *optional*, defaults to 1): Number of the side stream of the second that is computed; others
            follow. Families that are at work at the same time have different ones.
    """

    names: tuple[str, ...]
    first_side: int = 1


MLP = Family(("gate_proj", "up_proj"))
TARGET_FAMILIES = (
    Family(("q_proj", "k_proj", "v_proj")),
    Family(("q_a_proj", "kv_a_proj_with_mqa")),  # DeepSeek's latent attention
    Family(("q_proj", "kv_a_proj_with_mqa")),
    MLP,
)
# What a draft remembers is computed beside what it asks, on side stream 0.
DRAFT_FAMILIES = (
    Family(("q_proj", "W_qr")),
    Family(("q_b_proj", "W_qr")),
    Family(("W_dkv", "W_kr"), 2),
    Family(("k_proj", "v_proj"), 2),
    MLP,
)


@dataclass
class Computed:
    """
    Outputs that nobody has asked for yet.

    Args:
        states (`torch.Tensor`): Of what.
        version (`int`): How often these had been written to.
        stream (`torch.cuda.Stream`): Which waits for them.
        outputs (`dict[str, torch.Tensor]`): By the name of the projection.
    """

    states: Tensor
    version: int
    stream: torch.cuda.Stream
    outputs: dict[str, Tensor]

    def take(self, name: str, states: Tensor, stream: torch.cuda.Stream) -> Tensor | None:
        """The output of a projection, once, if it is of these states as they are."""
        is_same = states is self.states and states._version == self.version and stream == self.stream
        return self.outputs.pop(name, None) if is_same else None


class Siblings:
    """
    Projections of one module that get the same states.

    Only in the thread that made them; on the CPU and for a compiler each computes its own output, and so it does for
    tensors that do not tell whether somebody has written to them.

    Args:
        projections (`dict[str, nn.Linear]`): By name.
        first_side (`int`): As in [`Family`].
    """

    def __init__(self, projections: dict[str, nn.Linear], first_side: int):
        self.plain = {name: projection.forward for name, projection in projections.items()}
        self.first_side = first_side
        self.thread = threading.get_ident()
        self.computed: Computed | None = None

    def forward(self, name: str, input: Tensor) -> Tensor:  # named as in `nn.Linear`, for calls by keyword
        """The forward of one of them. **Effects**: the first computes all."""
        if not self.may_part(input):
            return self.plain[name](input)
        current = torch.cuda.current_stream(input.device)
        output = None if self.computed is None else self.computed.take(name, input, current)
        if output is None:
            return self.compute_all(name, input, current)
        if not self.computed.outputs:
            self.computed = None  # or the states of every layer would stay in memory
        return output

    def may_part(self, states: Tensor) -> bool:
        is_seen = not torch.compiler.is_compiling() and states.is_cuda and not states.is_inference()
        return is_seen and threading.get_ident() == self.thread

    def compute_all(self, name: str, states: Tensor, current: torch.cuda.Stream) -> Tensor:
        """The output of one of them. **Effects**: those of the others are there, too, and `current` waits for them."""
        self.computed = None
        fork, outputs = current.record_event(), {}
        others = {other: plain for other, plain in self.plain.items() if other != name}
        sides = [side_stream(states.device, self.first_side + index) for index in range(len(others))]
        for side in sides:  # all before the first computes: none that did not part can join after an error
            side.wait_event(fork)
        try:
            for (other, plain), side in zip(others.items(), sides, strict=True):
                with torch.cuda.stream(side):
                    outputs[other] = plain(states)
            output = self.plain[name](states)
        finally:  # a recording that ends with a loose branch would hide the error behind its own
            for side in sides:
                current.wait_stream(side)
        self.computed = Computed(states, states._version, current, outputs)
        return output


@contextmanager
def sibling_projections(model: nn.Module, families: tuple[Family, ...]) -> Iterator[None]:
    """While the context is open, projections of `model` that belong to one of `families` run beside each other."""
    with ExitStack() as stack:
        for module in model.modules():
            children = dict(module.named_children())
            for family in families:
                projections = {name: children[name] for name in family.names if is_plain(children.get(name))}
                if len(projections) < len(family.names) or len(set(map(takes, projections.values()))) > 1:
                    continue
                siblings = Siblings(projections, family.first_side)
                for name, projection in projections.items():
                    projection.forward = partial(siblings.forward, name)
                    stack.callback(delattr, projection, "forward")
        yield


def is_plain(module: nn.Module | None) -> bool:
    """Whether a module is a matrix product and nothing else: no adapter, no quantised weights, no fetching of any."""
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter:
        return False
    return "forward" not in vars(module) and not module._forward_pre_hooks  # these may change the weights


def takes(projection: nn.Linear) -> tuple[int, torch.dtype, torch.device]:
    """Which states a projection can be given."""
    return projection.in_features, projection.weight.dtype, projection.weight.device
