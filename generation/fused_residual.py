"""The residual stream of a target's layers: each sum and the norm behind it in one kernel.

    sums = residual + states        rounded, as it goes on
    normed = RMSNorm(sums)          of the rounded sums, as in `fused_norm.py`

That takes another forward of the layer, for the sum after the attention, and the next layer's first norm, for the sum
after the MLP, which is handed to it with its layer's output. Whether a layer is wired in the usual way (`h = x +
attention(norm(x))`, `h + mlp(norm(h))`) is tried with stand-ins for its parts, its norms and MLP on random states.

Shapes: D hidden.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .fused_mlp import activation_of
from .fused_norm import UsualNorm, usual_norm

LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
# What a layer hands to its attention.
ATTENTION_INPUTS = ("attention_mask", "position_ids", "past_key_values", "use_cache", "position_embeddings")


class NormAhead:
    """
    What a norm will be asked for.

    Args:
        norm ([`UsualNorm`]): The norm.
    """

    def __init__(self, norm: UsualNorm):
        self.norm = norm
        # Of which states, how often they have been written to, and the answer; one field, read and written at once,
        # because other threads may run the target, too.
        self.expected: tuple[Tensor, int, Tensor] | None = None

    def expect(self, states: Tensor, normed: Tensor) -> None:
        self.expected = states, states._version, normed

    def answer(self, states: Tensor) -> Tensor:
        """The norm's forward; the answer is given once."""
        expected, self.expected = self.expected, None
        if expected is None or states is not expected[0] or states._version != expected[1]:
            return self.norm(states)
        return expected[2]


class StandIn(nn.Module):
    """
    A function in the place of a part of a layer.

    Args:
        function (`Callable`): The function.
    """

    def __init__(self, function: Callable):
        super().__init__()
        self.forward = function


@contextmanager
def fused_residuals(target: PreTrainedModel) -> Iterator[None]:
    """While the context is open, the layers of `target` that are usual ones run as [`run_layer`]."""
    with ExitStack() as stack:
        lists = [module for module in target.modules() if isinstance(module, nn.ModuleList)]
        for layers in [layers for layers in lists if len(layers) > 0 and all(map(is_usual_layer, layers))]:
            middle = [usual_norm(layer.post_attention_layernorm) for layer in layers]
            following = [NormAhead(usual_norm(layer.input_layernorm)) for layer in layers[1:]]
            for layer, norm, ahead in zip(layers, middle, [*following, None], strict=True):
                layer.forward = partial(run_layer, layer, norm, ahead)
                stack.callback(delattr, layer, "forward")
            for layer, ahead in zip(layers[1:], following, strict=True):
                layer.input_layernorm.forward = ahead.answer
                stack.callback(delattr, layer.input_layernorm, "forward")
        yield


def run_layer(layer: nn.Module, norm: UsualNorm, ahead: NormAhead | None, hidden_states: Tensor, **kwargs) -> Tensor:
    """
    The forward of a usual layer.

    Args:
        norm ([`UsualNorm`]): The one after the attention.
        ahead ([`NormAhead`], *optional*): What the output goes through next.
    """
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
    return finish_layer(layer.mlp, norm, ahead, hidden_states, attended)


def finish_layer(
    mlp: nn.Module, norm: UsualNorm, ahead: NormAhead | None, residual: Tensor, attended: Tensor
) -> Tensor:
    """
    What a layer does behind its attention, `(..., D)` -> `(..., D)`.

    Args:
        mlp (`nn.Module`): Of the layer.
        norm ([`UsualNorm`]), ahead ([`NormAhead`], *optional*): As for [`run_layer`].
        residual (`torch.Tensor`), attended (`torch.Tensor`): What is added up.
    """
    sums, normed = add_and_normalise(residual, attended, norm)
    states = mlp(normed)
    if ahead is None or sums.is_inference():  # such tensors do not tell whether somebody has written to them
        return sums + states
    sums, normed = add_and_normalise(sums, states, ahead.norm)
    ahead.expect(sums, normed)
    return sums


def is_usual_layer(layer: nn.Module) -> bool:
    """Whether [`run_layer`] computes what `layer` does, in half precision."""
    if dict(layer.named_children()).keys() != LAYER_PARTS or "forward" in vars(layer):
        return False
    if not inspect.signature(layer.forward).parameters.keys() >= {"hidden_states", *ATTENTION_INPUTS}:
        return False
    if usual_norm(layer.input_layernorm) is None or usual_norm(layer.post_attention_layernorm) is None:
        return False
    return activation_of(layer.mlp) is not None and is_wired_as_usual(layer)


def is_wired_as_usual(layer: nn.Module) -> bool:
    """Whether `layer` adds up its parts as [`run_layer`] does; tried with functions in the place of the parts."""
    states, handed_on, received = (
        torch.linspace(-1, 1, 12).view(1, 3, 4),
        {name: name for name in ATTENTION_INPUTS},
        {},
    )

    def attend(hidden_states: Tensor, **kwargs) -> tuple[Tensor, None]:
        received.update(kwargs)
        return torch.cos(3 * hidden_states), None

    def first_norm(states: Tensor) -> Tensor:
        return torch.exp(states)

    stand_ins = {
        "self_attn": attend,
        "mlp": torch.sin,
        "input_layernorm": first_norm,
        "post_attention_layernorm": torch.atan,
    }
    tried = copy.copy(layer)  # the layer itself may be in use by another thread
    tried._modules = {name: StandIn(function) for name, function in stand_ins.items()}
    found = type(layer).forward(tried, states, **handed_on)
    sums = states + attend(first_norm(states))[0]
    is_equal = torch.is_tensor(found) and torch.allclose(found, sums + torch.atan(sums).sin(), rtol=1e-6, atol=1e-6)
    return is_equal and received == handed_on


def add_and_normalise(residual: Tensor, states: Tensor, norm: UsualNorm) -> tuple[Tensor, Tensor]:
    """The sum `(..., D)` of two tensors, and what a norm makes of it."""
    are_alike = residual.dtype == states.dtype and residual.shape == states.shape
    if not are_alike or not norm.runs_on_triton(residual):
        return add_and_normalise_by_definition(residual, states, norm)
    from .fused_kernels_triton import add_and_normalise

    return add_and_normalise(residual, states, norm.weight, norm.eps, norm.rounds_first, norm.adds_one)


def add_and_normalise_by_definition(residual: Tensor, states: Tensor, norm: UsualNorm) -> tuple[Tensor, Tensor]:
    """As [`add_and_normalise`]."""
    sums = residual + states
    return sums, norm(sums)
