"""The Triton kernels as operators of PyTorch, so that a compiler takes a call for one operation and looks no further.

Shapes: B batch, N nodes, H heads, G key-value heads, K slots, W rows, S newest slots, C latent, R decoupled RoPE.
"""

import re

import torch
from torch import Tensor

from .latent_attention import DraftedSlots, UpProjections, attend_latents
from .tree_attention import attend_tree

# Operators are global, and two versions of this package may be loaded.
NAMESPACE = re.sub(r"\W", "_", __name__)


@torch.library.custom_op(f"{NAMESPACE}::tree_attention", mutates_args=())
def tree_attention_op(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    first: Tensor,
    attends: Tensor,
    depths: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """As [`attend_tree`], `(B, H, N, d)` -> `(B, N, H, dv)`."""
    arguments = lengths, first, attends, depths, scaling, window, softcap, sinks
    return attend_tree(query, keys, values, *arguments).transpose(1, 2).contiguous()


@tree_attention_op.register_fake
def _(query, keys, values, lengths, first, attends, depths, scaling, window, softcap, sinks):
    batch_size, num_heads, num_nodes, _ = query.shape
    return query.new_empty(batch_size, num_nodes, num_heads, values.shape[-1])


@torch.library.custom_op(f"{NAMESPACE}::latent_attention", mutates_args=())
def latent_attention_op(
    query: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    lengths: Tensor,
    sees: Tensor,
    positions: Tensor,
    scaling: float,
    w_uk: Tensor,
    w_uv: Tensor,
    inv_freq: Tensor,
    attention_scaling: float,
) -> Tensor:
    """As [`attend_latents`], `-> (B, W, H, d)`."""
    projections = UpProjections(w_uk, w_uv, inv_freq, attention_scaling)
    heads = attend_latents(query, c_kv, k_rope, projections, lengths, scaling, DraftedSlots(sees, positions))
    return heads.transpose(1, 2).contiguous()


@latent_attention_op.register_fake
def _(query, c_kv, k_rope, lengths, sees, positions, scaling, w_uk, w_uv, inv_freq, attention_scaling):
    batch_size, num_heads, num_rows, _ = query.shape
    return query.new_empty(batch_size, num_rows, num_heads, w_uv.shape[1])
