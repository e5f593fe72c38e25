"""The gate of a gated MLP, `act(gate) * up`, in one kernel; the matrix products around it stay as they are.

Where a module computes `down_proj(act_fn(gate_proj(x)) * up_proj(x))` (SwiGLU or GeGLU, arXiv:2002.05202) is tried on
random states. The kernel rounds where the two operations do.

Shapes: D hidden, I intermediate.
"""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import HALF_PRECISION, can_run_kernels

MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
ACTIVATIONS = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
TRIED_ROWS = 8
# Some MLPs cut gates off where they are large, at 7 or 10: they are tried with such, too.
LARGE_GATE = 50


@contextmanager
def fused_mlps(*models: nn.Module) -> Iterator[None]:
    """While the context is open, each MLP of `models` that is a usual gated one has a gate of one kernel."""
    with ExitStack() as stack:
        for module in (module for model in models for module in model.modules()):
            activation = activation_of(module)
            if activation is not None:
                module.forward = partial(run_mlp, module, activation)
                stack.callback(delattr, module, "forward")
        yield


def activation_of(module: nn.Module) -> str | None:
    """Which of `ACTIVATIONS` makes [`run_mlp`] compute what `module` does, in half precision; `None`: none does."""
    if not dict(module.named_children()).keys() >= MLP_PARTS or "forward" in vars(module):
        return None
    width, like = getattr(module.gate_proj, "in_features", None), next(module.parameters(), None)
    takes_states_alone = len(inspect.signature(module.forward).parameters) == 1
    if width is None or like is None or like.dtype not in HALF_PRECISION or not takes_states_alone:
        return None
    generator = torch.Generator(like.device).manual_seed(0)  # nobody's random numbers are used up
    states = torch.randn(1, TRIED_ROWS, width, generator=generator, device=like.device, dtype=like.dtype)
    tried = states, states * (LARGE_GATE / module.gate_proj(states).abs().max())
    return next((name for name in ACTIVATIONS if all(computes(module, name, each) for each in tried)), None)


def computes(module: nn.Module, activation: str, states: Tensor) -> bool:
    """Whether [`run_mlp`] computes what `module` makes of `states`, up to rounding."""
    # By itself: behind the matrix product the exact GELU and the one by tanh look alike.
    gates = torch.linspace(-8, 8, 1 + 2**10, device=states.device).to(states.dtype)
    relative = 2 * torch.finfo(states.dtype).eps
    if not torch.allclose(module.act_fn(gates), ACTIVATIONS[activation](gates), rtol=relative, atol=relative / 100):
        return False
    expected = module(states)
    tolerance = 4 * torch.finfo(states.dtype).eps * expected.abs().max()
    return bool((run_mlp(module, activation, states) - expected).abs().max() <= tolerance)


def run_mlp(module: nn.Module, activation: str, states: Tensor) -> Tensor:
    """The forward of a gated MLP, `(..., D)` -> `(..., D)`."""
    return module.down_proj(gate(module.gate_proj(states), module.up_proj(states), activation))


def gate(gates: Tensor, values: Tensor, activation: str) -> Tensor:
    """
    `act(gates) * values`, both `(..., I)`.

    Args:
        activation (`str`): One of `ACTIVATIONS`.
    """
    if not gates.is_cuda or not can_run_kernels(gates.device):
        return gate_by_definition(gates, values, activation)
    from .fused_kernels_triton import gate

    return gate(gates, values, activation)


def gate_by_definition(gates: Tensor, values: Tensor, activation: str) -> Tensor:
    """As [`gate`]."""
    return ACTIVATIONS[activation](gates) * values
