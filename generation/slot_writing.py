"""New keys and values into the slots of a fixed cache, on a GPU by one kernel for both.

A compiler gets PyTorch's own operations, which it fuses itself. Inductor writes in place into what comes into its
graph from outside, but copies all slots to write into a view of that.

Shapes: B batch, G key-value heads, K slots, N new positions.
"""

import torch
from torch import Tensor

from .kernels import can_run_kernels


def write_to_slots(keys: Tensor, values: Tensor, slots: Tensor, key_states: Tensor, value_states: Tensor) -> None:
    """
    Writes new positions at their slots.

    Args:
        keys, values (`torch.Tensor` of shape `(B, G, K, width)`): The buffers.
        slots (`torch.LongTensor` of shape `(B, N)`): Where each position of a sequence goes.
        key_states, value_states (`torch.Tensor` of shape `(B, G, N, width)`): What is written.

    **Effects**: overwrites slots of `keys` and `values`.
    """
    if torch.compiler.is_compiling() or not keys.is_cuda or not can_run_kernels(keys.device):
        return write_by_definition(keys, values, slots, key_states, value_states)
    from .fused_kernels_triton import write

    return write(keys, values, slots, key_states, value_states)


def write_by_definition(keys: Tensor, values: Tensor, slots: Tensor, key_states: Tensor, value_states: Tensor) -> None:
    """As [`write_to_slots`]."""
    rows = torch.arange(keys.shape[0], device=keys.device)[:, None, None]
    heads = torch.arange(keys.shape[1], device=keys.device)[:, None]
    keys.index_put_((rows, heads, slots[:, None]), key_states)
    values.index_put_((rows, heads, slots[:, None]), value_states)
