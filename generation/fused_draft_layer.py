"""Sums and norms of a draft's layers: three kernels instead of seven.

    attention input     both norms of the first layer, side by side
    after attention     the sum and its norm, as in `fused_residual.py`
    after the MLP       the sum and, behind the last layer, the draft's norm

Shapes: D hidden.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from .fused_norm import UsualNorm, usual_norm
from .fused_residual import NormAhead, finish_layer


@contextmanager
def fused_draft_layers(draft: nn.Module) -> Iterator[None]:
    """While the context is open, the layers of `draft` run as described above, in half precision."""
    with ExitStack() as stack:
        final = usual_norm(draft.norm)
        for layer in draft.layers:
            if layer.is_first:
                norms = usual_norm(layer.input_layernorm), usual_norm(layer.hidden_norm)
                if are_alike(*norms):
                    replace(stack, layer, "attention_input", partial(normalise_both, *norms))
            middle = usual_norm(layer.post_attention_layernorm)
            if middle is None:
                continue
            ahead = NormAhead(final) if layer is draft.layers[-1] and final is not None else None
            replace(stack, layer, "finish", partial(finish_layer, layer.mlp, middle, ahead))
            if ahead is not None:
                replace(stack, draft.norm, "forward", ahead.answer)
        yield


def replace(stack: ExitStack, module: nn.Module, name: str, function) -> None:
    """Puts `function` in the place of a method until `stack` ends, unless somebody has done so before."""
    if name in vars(module):
        return
    setattr(module, name, function)
    stack.callback(delattr, module, name)


def are_alike(first: UsualNorm | None, second: UsualNorm | None) -> bool:
    """Whether two norms are usual ones that differ in their weights alone."""
    if first is None or second is None:
        return False
    forms = [(norm.eps, norm.rounds_first, norm.adds_one, norm.weight.shape) for norm in (first, second)]
    return forms[0] == forms[1]


def normalise_both(first_norm: UsualNorm, second_norm: UsualNorm, first: Tensor, second: Tensor) -> Tensor:
    """Two norms of `(..., D)` each, side by side, `(..., 2D)`."""
    on_triton = first_norm.runs_on_triton(first) and second_norm.runs_on_triton(second)
    if not on_triton or first.shape != second.shape:
        return normalise_both_by_definition(first_norm, second_norm, first, second)
    from .fused_kernels_triton import normalise_both

    form = first_norm.eps, first_norm.rounds_first, first_norm.adds_one
    return normalise_both(first, second, first_norm.weight, second_norm.weight, *form)


def normalise_both_by_definition(
    first_norm: UsualNorm, second_norm: UsualNorm, first: Tensor, second: Tensor
) -> Tensor:
    """As [`normalise_both`]."""
    return torch.cat([first_norm(first), second_norm(second)], dim=-1)
