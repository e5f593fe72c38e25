"""RMSNorm (arXiv:1910.07467) in one kernel instead of the six of a target's own code.

There are three usual ones: most models of transformers round what they have normalised before they multiply by the
weight, PyTorch's own rounds at the end, and so does Gemma's, which adds one to the weight. Which of them a norm is, is
tried on random states; the kernel rounds where that one does, so that but for the order of a sum the results have the
same bits.

Shapes: D hidden.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .kernels import HALF_PRECISION, can_run_kernels

# One program reads a row.
MAX_WIDTH = 16384
# Whether a norm rounds first, and whether it adds one to its weight.
FORMS = [(True, False), (False, False), (False, True)]
TRIED_ROWS = 8


@dataclass(frozen=True)
class UsualNorm:
    """
    An RMSNorm.

    Args:
        weight (`torch.Tensor` of shape `(D,)`): In half precision.
        eps (`float`): Added to the mean of squares.
        rounds_first (`bool`): Whether the normalised states are rounded before they are multiplied by `weight`.
        adds_one (`bool`): Whether they are multiplied by `1 + weight` instead.
    """

    weight: Tensor
    eps: float
    rounds_first: bool
    adds_one: bool

    def __call__(self, states: Tensor) -> Tensor:
        """`(..., D)` normalised."""
        if not self.runs_on_triton(states):
            return normalise_by_definition(states, self.weight, self.eps, self.rounds_first, self.adds_one)
        from .fused_kernels_triton import normalise

        return normalise(states, self.weight, self.eps, self.rounds_first, self.adds_one)

    def runs_on_triton(self, states: Tensor) -> bool:
        fits = states.shape[-1] == len(self.weight) <= MAX_WIDTH and states.dtype == self.weight.dtype
        return states.is_cuda and fits and can_run_kernels(states.device)


@contextmanager
def fused_norms(*models: nn.Module) -> Iterator[None]:
    """While the context is open, each RMSNorm of `models` that is a usual one runs as one kernel."""
    with ExitStack() as stack:
        for module in (module for model in models for module in model.modules()):
            norm = usual_norm(module)
            if norm is not None:
                module.forward = norm
                stack.callback(delattr, module, "forward")
        yield


def usual_norm(module: nn.Module) -> UsualNorm | None:
    """What computes the same as `module`, in half precision; `None`: no usual norm does."""
    if not type(module).__name__.endswith("RMSNorm") or "forward" in vars(module):
        return None
    names = dict(module.named_parameters(recurse=False))
    eps = vars(module).get("variance_epsilon", vars(module).get("eps"))
    if set(names) != {"weight"} or eps is None or module.weight.dtype not in HALF_PRECISION:
        return None
    weight = module.weight
    generator = torch.Generator(weight.device).manual_seed(0)  # nobody's random numbers are used up
    states = torch.randn(TRIED_ROWS, len(weight), generator=generator, device=weight.device, dtype=weight.dtype)
    tried = copy.copy(module)  # the module itself may be in use by another thread
    # Weights that are all alike would not tell the forms apart.
    tried_weight = torch.rand(len(weight), generator=generator, device=weight.device, dtype=weight.dtype)
    tried._parameters = {"weight": nn.Parameter(tried_weight, requires_grad=False)}
    expected, tolerance = tried(states), 4 * torch.finfo(weight.dtype).eps
    norms = {form: UsualNorm(tried_weight, eps, *form)(states) for form in FORMS}
    form = min(FORMS, key=lambda form: (norms[form] != expected).sum().item())
    is_usual = torch.allclose(norms[form], expected, rtol=tolerance, atol=tolerance)
    return UsualNorm(weight, eps, *form) if is_usual else None


def normalise_by_definition(states: Tensor, weight: Tensor, eps: float, rounds_first: bool, adds_one: bool) -> Tensor:
    """As [`UsualNorm`]."""
    wide = states.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
    weight = 1 + weight.float() if adds_one else weight
    return weight * normed.to(states.dtype) if rounds_first else (weight.float() * normed).to(states.dtype)
