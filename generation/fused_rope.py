"""RoPE of queries and keys in one kernel, in the place of the ten that a model's own code launches.

The models of transformers call a function of their module, `apply_rotary_pos_emb(q, k, cos, sin)`. Where that computes
the usual rotation (arXiv:2104.09864, Eq. 34, half against half as in Llama), which is tried on random heads, another
function stands in its place for a while. It rounds where the original does, so that the results have the same bits.
Angles are given for all columns of a head, or for one half, because both are alike (GPT-OSS).

Shapes: B batch, H heads, G key-value heads, N positions, d width of a head.
"""

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from itertools import product
from types import ModuleType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .kernels import HALF_PRECISION, can_run_kernels

ROPE_FUNCTION = "apply_rotary_pos_emb"
TRIED_WIDTH = 64


@contextmanager
def fused_rope(target: PreTrainedModel) -> Iterator[None]:
    """
    While the context is open, the usual rotation of `target`'s queries and keys is one kernel, in this thread.

    **Effects**: replaces a function in the modules of the target's code; other threads get the original.
    """
    with ExitStack() as stack:
        for module in modules_with_rope(target):
            original = vars(module)[ROPE_FUNCTION]
            num_columns = columns_per_angle(original, target.device, target.dtype)
            if num_columns is not None:
                setattr(module, ROPE_FUNCTION, rope_of_this_thread(original, num_columns))
                stack.callback(setattr, module, ROPE_FUNCTION, original)
        yield


@contextmanager
def fused_draft_rope(draft) -> Iterator[None]:
    """While the context is open, the draft's angles and its rotations are one kernel each, in half precision."""
    with ExitStack() as stack:
        is_half = draft.dtype in HALF_PRECISION
        attentions = [layer.self_attn for layer in draft.layers] if is_half else []
        if is_half:
            draft.rotary_emb.forward = partial(cos_sin_at, draft.rotary_emb)
            stack.callback(delattr, draft.rotary_emb, "forward")
        for attention, name in product(attentions, ("ask", "remember")):
            setattr(attention, name, partial(getattr(attention, name), rotate=rotate_alone))
            stack.callback(delattr, attention, name)
        yield


def modules_with_rope(target: nn.Module) -> list[ModuleType]:
    """The modules that hold the code of `target` and a function that rotates."""
    classes = {kind for module in target.modules() for kind in type(module).__mro__}
    modules = {sys.modules[name] for name in {kind.__module__ for kind in classes} if name in sys.modules}
    return [module for module in modules if callable(vars(module).get(ROPE_FUNCTION))]


def columns_per_angle(function: Callable, device: torch.device, dtype: torch.dtype) -> int | None:
    """
    The share of a head's columns to which a function takes one angle, 1 or 2; `None`: it is no usual rotation.

    A usual one computes what [`rotate_by_definition`] does, in half precision; that is tried on random heads.
    """
    parameters = list(inspect.signature(function).parameters.values())
    names = [parameter.name for parameter in parameters[:4]]
    are_optional = all(parameter.default is not parameter.empty for parameter in parameters[4:])
    if names != ["q", "k", "cos", "sin"] or not are_optional or dtype not in HALF_PRECISION:
        return None
    return next((num for num in (1, 2) if computes_rotation(function, num, device, dtype)), None)


def computes_rotation(function: Callable, num_columns: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a function computes what [`rotate_by_definition`] does with an angle for so many columns."""
    generator = torch.Generator(device).manual_seed(0)  # nobody's random numbers are used up
    random = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    query, key = random(2, 4, 3, TRIED_WIDTH), random(2, 2, 3, TRIED_WIDTH)
    cos_sin = random(2, 3, TRIED_WIDTH // num_columns), random(2, 3, TRIED_WIDTH // num_columns)
    tolerance = 4 * torch.finfo(dtype).eps
    try:
        rotated = function(query, key, *cos_sin)
    except Exception:  # it takes angles of another shape, and says so in its own way
        return False
    return all(
        torch.allclose(found, expected, rtol=tolerance, atol=tolerance)
        for found, expected in zip(rotate_heads(query, key, *cos_sin), rotated, strict=True)
    )


def rope_of_this_thread(original: Callable, num_columns: int) -> Callable:
    """A function that does what `original` does: for the thread that asks for it now as one kernel, where it can."""
    thread = threading.get_ident()

    @wraps(original)
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if threading.get_ident() != thread or args or kwargs or not is_usual_call(q, k, cos, sin, num_columns):
            return original(q, k, cos, sin, *args, **kwargs)
        return rotate_heads(q, k, cos, sin)

    return apply


def is_usual_call(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, num_columns: int) -> bool:
    """Whether whole heads of half precision are to be rotated, `(B, H or G, N, d)`; see [`columns_per_angle`]."""
    if query.dim() != 4 or key.dim() != 4 or cos.dim() != 3 or query.dtype not in HALF_PRECISION:
        return False
    batch_size, _, num_positions, width = query.shape
    are_alike = len({query.dtype, key.dtype, cos.dtype, sin.dtype}) == 1 and cos.shape == sin.shape
    fits = key.shape[0] == batch_size and key.shape[2:] == query.shape[2:] and cos.shape[0] in (1, batch_size)
    return are_alike and fits and cos.shape[1:] == (num_positions, width // num_columns) and width % 2 == 0


def rotate_heads(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """
    Queries and keys, rotated.

    Args:
        query (`torch.Tensor` of shape `(B, H, N, d)`), key (`torch.Tensor` of shape `(B, G, N, d)`): Heads.
        cos, sin (`torch.Tensor` of shape `(B or 1, N, d or d / 2)`): Of the angles, of both halves or for both.
    """
    if not query.is_cuda or not can_run_kernels(query.device):
        return rotate_by_definition(query, key, cos, sin)
    from .fused_kernels_triton import rotate

    return rotate(query, key, cos, sin)


def cos_sin_at(rotary: nn.Module, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines `(B, N, d)` at `position_ids (B, N)` of a draft's `rotary`."""
    if not position_ids.is_cuda or not can_run_kernels(position_ids.device):
        return type(rotary).forward(rotary, position_ids, dtype)
    from .fused_kernels_triton import cos_sin

    return cos_sin(position_ids, *rotary.frequencies(position_ids.device), dtype)


def rotate_alone(heads: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """As [`rotate_heads`], of one tensor `(B, H, N, d)`."""
    return rotate_heads(heads, heads[:, :0], *cos_sin)[0]


def rotate_by_definition(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As [`rotate_heads`]."""
    if cos.shape[-1] < query.shape[-1]:
        cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    halves = (heads.chunk(2, dim=-1) for heads in (query, key))
    turned = [torch.cat([-second, first], dim=-1) for first, second in halves]
    return query * cos + turned[0] * sin, key * cos + turned[1] * sin
