"""Attention of a draft tree's nodes, in the target's verification, over buffers of fixed size with the lengths on the
device.

Keys and values lie in slots: the committed tokens of a row first, then the row's nodes. A node attends to every
committed token and, among the nodes, to what the tree says. Shapes depend on nothing that the host does not know, and
nothing waits for the device, so that a captured CUDA graph serves texts of every length. On a GPU two Triton kernels
compute it, elsewhere its definition.

Shapes: B batch, N tree nodes, H query heads, G key-value heads, K slots, d and dv widths of a head's keys and values.
"""

import torch
from torch import Tensor

from .kernels import can_run_kernels

# Wider heads do not fit into the shared memory of a multiprocessor.
MAX_HEAD_DIM = 256


def attend_tree(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    first_slots: Tensor,
    attends: Tensor,
    depths: Tensor,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """
    Softmax attention of the nodes to the committed tokens and to each other, in float32 or wider.

    Where the Triton kernels do not run (no GPU, no Triton, double precision, heads wider than 256) this is
    [`attend_tree_by_definition`].

    Args:
        query (`torch.Tensor` of shape `(B, H, N, d)`): Of each node.
        keys (`torch.Tensor` of shape `(B, G, K, d)`): Slots of which the first ones are filled; a view may do.
        values (`torch.Tensor` of shape `(B, G, K, dv)`): Their values.
        lengths (integer `torch.Tensor` of shape `(B,)`): Committed tokens of each row, padding included; node i lies
            in slot `lengths + i`. At most `K - N`.
        first_slots (integer `torch.Tensor` of shape `(B,)`): The first slot of each row that is not padding.
        attends (boolean `torch.Tensor` of shape `(B, N, N)`): Whether a node (row) attends to a node (column).
        depths (integer `torch.Tensor` of shape `(B, N)`): Steps of each node from the root. Parents come
            before their children, so that a node's depth is at most its index.
        scaling (`float`): Of the scores.
        window (`int`, *optional*): A query sees what lies less than so many positions before it. A committed token's
            position is its slot, a node's is `lengths + depths`.
        softcap (`float`, *optional*): Scores become `softcap * tanh(score / softcap)`.
        sinks (`torch.Tensor` of shape `(H,)`, *optional*): A logit per head that takes part in the softmax only.

    Returns:
        `torch.Tensor` of shape `(B, H, N, dv)` in the type of the query: zeros for a node that sees nothing.
    """
    arguments = query, keys, values, lengths, first_slots, attends, depths, scaling, window, softcap, sinks
    if not runs_on_triton(query, values):
        return attend_tree_by_definition(*arguments)
    from .tree_attention_triton import attend

    return attend(*arguments)


def runs_on_triton(query: Tensor, values: Tensor) -> bool:
    is_narrow = max(query.shape[-1], values.shape[-1]) <= MAX_HEAD_DIM
    is_supported = query.is_cuda and query.dtype != torch.float64 and is_narrow
    return is_supported and can_run_kernels(query.device)


def attend_tree_by_definition(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    first_slots: Tensor,
    attends: Tensor,
    depths: Tensor,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[`attend_tree`] by a mask over all slots."""
    num_groups, num_slots = keys.shape[1:3]
    dtype = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(dtype).unflatten(1, (num_groups, -1))  # (B, G, H/G, N, d)
    scores = torch.einsum("bghnd,bgkd->bghnk", grouped, keys.to(dtype)) * scaling
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    visible = visible_slots(num_slots, lengths, first_slots, attends, depths, window)
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    lse = scores.logsumexp(dim=-1, keepdim=True)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(dtype).view(num_groups, -1, 1, 1))
    probs = (scores - lse.masked_fill(lse.isneginf(), 0.0)).exp()
    # Slots that hold no text may hold anything, and a product of zero and NaN is NaN.
    is_text = filled_slots(num_slots, lengths, first_slots, depths.shape[1])
    values = values.to(dtype).masked_fill(~is_text[:, None, :, None], 0.0)
    output = torch.einsum("bghnk,bgkd->bghnd", probs, values)
    return output.flatten(1, 2).to(query.dtype)


def visible_slots(
    num_slots: int, lengths: Tensor, first_slots: Tensor, attends: Tensor, depths: Tensor, window: int | None
) -> Tensor:
    """Whether a node sees a slot, `(B, N, K)`."""
    num_nodes = depths.shape[1]
    slot = torch.arange(num_slots, device=lengths.device)
    node = slot - lengths[:, None]  # (B, K)
    nearest_node = node.clamp(0, num_nodes - 1)
    sees_node = attends.gather(2, nearest_node[:, None].expand(-1, num_nodes, -1))  # (B, N, K)
    visible = sees_node | (node < 0)[:, None]
    if window is not None:
        node_position = lengths[:, None] + depths
        position = torch.where(node < 0, slot, node_position.gather(1, nearest_node))
        visible = visible & (node_position[:, :, None] - position[:, None] < window)
    return visible & filled_slots(num_slots, lengths, first_slots, num_nodes)[:, None]


def filled_slots(num_slots: int, lengths: Tensor, first_slots: Tensor, num_nodes: int) -> Tensor:
    """Whether a slot holds a committed token or a node, `(B, K)`."""
    slot = torch.arange(num_slots, device=lengths.device)
    return (slot >= first_slots[:, None]) & (slot < lengths[:, None] + num_nodes)
