"""New keys and values into the slots of a fixed cache, on a GPU by one kernel for both.

A compiler gets PyTorch's own operations, which it fuses itself.

Shapes: B batch, G key-value heads, K slots, N new positions.
"""

import torch
from torch import Tensor

from .latent_attention import has_triton


def write_to_slots(keys: Tensor, values: Tensor, slots: Tensor, key_states: Tensor, value_states: Tensor) -> None:
    """
    Writes new positions at their slots.

    Args:
        keys, values (`torch.Tensor` of shape `(B, G, K, width)`): The buffers.
        slots (`torch.LongTensor` of shape `(B, N)`): Where each position of a sequence goes.
        key_states, value_states (`torch.Tensor` of shape `(B, G, N, width)`): What is written.

    **Effects**: overwrites slots of `keys` and `values`.
    """
    if torch.compiler.is_compiling() or not keys.is_cuda or not has_triton():
        return write_by_definition(keys, values, slots, key_states, value_states)
    from .fused_kernels_triton import write

    return write(keys, values, slots, key_states, value_states)


def write_by_definition(keys: Tensor, values: Tensor, slots: Tensor, key_states: Tensor, value_states: Tensor) -> None:
    """As [`write_to_slots`]."""
    rows = torch.arange(len(slots), device=slots.device)[:, None].expand_as(slots)
    keys.transpose(1, 2).index_put_((rows, slots), key_states.transpose(1, 2))
    values.transpose(1, 2).index_put_((rows, slots), value_states.transpose(1, 2))
