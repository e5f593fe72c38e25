"""Attention of the training unroll: one softmax over a row's document and over the row's own drafted keys.

At TTT step k a row attends to the step-0 keys of its document, up to its own, and to the k keys that it produced
itself at steps 1 to k. The step-0 part is ordinary causal attention with many queries per key; the own part has k keys
per query and no two rows share one. Both stand under one softmax,

    output = (sum_j exp(s_j) v_j + sum_m exp(s_m) v_m) / (sum_j exp(s_j) + sum_m exp(s_m)).

`eager` writes this down. `flex_attention` normalises the parts apart and merges them by their log-sum-exp. `sdpa` does
the same where no log-sum-exp can be had: the own keys enter as one virtual key, whose score is their log-sum-exp and
whose value reports the probability that it received.

Documents are numbered from 1 in `document_ids (B, T)`; padding is document 0. A row attends within its document, so
that padding rows see padding and no row is ever left without a key. An attention mask of zeros and ones is the case
of one document.

Shapes: B batch, T tokens, H heads, G key-value heads, d head dimension, R rope dimension, k own keys per row.
"""

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

logger = logging.getLogger(__name__)


def is_plain_causal(document_ids: Tensor) -> bool:
    """True when every row holds one document from its first token on, so that causality alone is the mask."""
    one_document = (document_ids == document_ids[:, :1]) | (document_ids == 0)
    return bool((one_document.all() & (document_ids.diff(dim=1) <= 0).all()).item())


def document_visibility(document_ids: Tensor) -> Tensor:
    """True where a row `i` (third axis) sees the step-0 key `j` (last axis), `(B, 1, T, T)`."""
    num_tokens = document_ids.shape[1]
    causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=document_ids.device).tril()
    return (causal & (document_ids[:, :, None] == document_ids[:, None, :])).unsqueeze(1)


def own_scores(query: Tensor, own_keys: list[Tensor], scaling: float) -> Tensor:
    """Scores of a row against its own keys, `(B, H, T, k)`, in float32 or wider.

    Products and sums instead of matrix products: one query per key leaves nothing to reuse, and a batched product of
    that shape is ten times slower on a CPU.
    """
    grouped = _group_heads(query, own_keys[0].shape[1])  # (B, G, H/G, T, d + R)
    dtype = _softmax_dtype(query)
    scores = [(grouped * key.unsqueeze(2)).sum(dim=-1, dtype=dtype) for key in own_keys]
    return torch.stack(scores, dim=-1).flatten(1, 2) * scaling


def own_output(probs: Tensor, own_values: list[Tensor]) -> Tensor:
    """Sum of a row's own values, weighted by `probs (B, H, T, k)`: `(B, H, T, d)`."""
    grouped = _group_heads(probs, own_values[0].shape[1])  # (B, G, H/G, T, k)
    pairs = zip(grouped.unbind(-1), own_values, strict=True)
    terms = [weight.unsqueeze(-1) * value.unsqueeze(2) for weight, value in pairs]
    return sum(terms).flatten(1, 2)


def eager_joint_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    own_keys: list[Tensor],
    own_values: list[Tensor],
    mask: Tensor,
    scaling: float,
) -> Tensor:
    """The definition: all scores side by side, one softmax. See `joint_attention`."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(-1, -2)).to(_softmax_dtype(query)) * scaling
    scores = scores.masked_fill(~mask, float("-inf"))  # (B, H, T, T)
    if own_keys:
        scores = torch.cat([scores, own_scores(query, own_keys, scaling)], dim=-1)  # (B, H, T, T + k)
    probs = scores.softmax(dim=-1).to(query.dtype)
    num_tokens = key.shape[2]
    output = probs[..., :num_tokens] @ value
    if own_keys:
        output = output + own_output(probs[..., num_tokens:], own_values)
    return output


def sdpa_joint_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    own_keys: list[Tensor],
    own_values: list[Tensor],
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """Exact joint softmax by one call of `scaled_dot_product_attention`, `(k + 1)T x T` scores never materialised.

    The own keys become one virtual key. Two more components of the query carry its score, log-sum-exp of the own
    scores, which the virtual key reads with ones and every other key with zeros; two, because a half-precision
    component holds 8 or 11 bits of the score and the second one holds the rest. One more component of the value is 1
    at the virtual key and 0 elsewhere, so that the output tells the probability p of the own keys together:

        output = sum_j p_j v_j + p * sum_m softmax(s)_m v_m.

    The virtual key comes first, and so does a query row that nobody reads: the plain causal mask then shows the
    virtual key to every row.
    """
    if not own_keys:
        document_mask = None if mask is None else mask[:, :, 1:, 1:]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=document_mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
    key_dim, head_dim = key.shape[-1], value.shape[-1]
    width = -(-max(key_dim + 2, head_dim + 1) // 8) * 8  # the fast kernels want one width, a multiple of 8
    scores = own_scores(query, own_keys, scaling)  # (B, H, T, k)
    virtual_score = scores.logsumexp(dim=-1, keepdim=True) / scaling
    high = virtual_score.to(query.dtype)
    low = (virtual_score - high).detach().to(query.dtype)  # `high` alone carries the gradient
    query = F.pad(torch.cat([query, high, low], dim=-1), (0, width - key_dim - 2, 1, 0))  # (B, H, 1 + T, width)
    key = F.pad(key, (0, width - key_dim, 1, 0))
    key[:, :, 0, key_dim : key_dim + 2] = 1
    value = F.pad(value, (0, width - head_dim, 1, 0))
    value[:, :, 0, head_dim] = 1
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
    )[:, :, 1:]  # (B, H, T, width)
    own = own_output(scores.softmax(dim=-1).to(value.dtype), own_values)
    return output[..., :head_dim] + output[..., head_dim : head_dim + 1] * own


def flex_joint_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    own_keys: list[Tensor],
    own_values: list[Tensor],
    mask: BlockMask,
    scaling: float,
) -> Tensor:
    """FlexAttention over the step-0 keys, merged with the own keys by log-sum-exp. See `joint_attention`."""
    attend = _compiled_flex_attention() if query.is_cuda else flex_attention
    output, aux = attend(
        query,
        key,
        value,
        block_mask=mask,
        scale=scaling,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
        kernel_options={"BACKEND": "TRITON"},  # the decoding kernel, chosen below 128 queries, has no backward
    )
    if not own_keys:
        return output
    scores = own_scores(query, own_keys, scaling)  # (B, H, T, k)
    own_share = torch.sigmoid(scores.logsumexp(dim=-1) - aux.lse).unsqueeze(-1).to(value.dtype)
    own = own_output(scores.softmax(dim=-1).to(value.dtype), own_values)
    return torch.lerp(output, own, own_share)


JOINT_ATTENTION = {
    "eager": eager_joint_attention,
    "sdpa": sdpa_joint_attention,
    "flex_attention": flex_joint_attention,
}


def joint_attention(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    own_keys: list[Tensor],
    own_values: list[Tensor],
    mask: Tensor | BlockMask | None,
    scaling: float,
) -> Tensor:
    """Attention of every row to the step-0 keys of its document and to its own keys, under one softmax.

    Args:
        backend (`str`): `"eager"`, `"sdpa"` or `"flex_attention"`.
        query (`torch.Tensor` of shape `(B, H, T, d + R)`): Queries, rotated.
        key (`torch.Tensor` of shape `(B, G, T, d + R)`): Step-0 keys, rotated.
        value (`torch.Tensor` of shape `(B, G, T, d)`): Step-0 values.
        own_keys (`list[torch.Tensor]`): One `(B, G, T, d + R)` per later step; entry `i` is seen by row `i` only.
        own_values (`list[torch.Tensor]`): Their values, `(B, G, T, d)` each.
        mask: What `step_zero_mask` returned for this backend.
        scaling (`float`): Factor on the scores.

    Returns:
        `torch.Tensor` of shape `(B, H, T, d)`.
    """
    dtype = _attention_dtype(query)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    own_keys, own_values = [own.to(dtype) for own in own_keys], [own.to(dtype) for own in own_values]
    return JOINT_ATTENTION[backend](query, key, value, own_keys, own_values, mask, scaling)


def step_zero_mask(backend: str, document_ids: Tensor) -> Tensor | BlockMask | None:
    """Who sees which step-0 key, in the form the backend wants; built once per batch, shared by all steps and layers.

    `eager`: `(B, 1, T, T)` of bool. `sdpa`: `None` where causality says it all, else `(B, 1, 1 + T, 1 + T)` of bool
    with the virtual key and the unread query in front. `flex_attention`: a `BlockMask`.
    """
    if backend == "flex_attention":
        return _document_block_mask(document_ids)
    if backend == "eager":
        return document_visibility(document_ids)
    if is_plain_causal(document_ids):
        return None
    return F.pad(F.pad(document_visibility(document_ids), (0, 0, 1, 0)), (1, 0), value=True)


def trainable_backend(backend: str, device: torch.device) -> str:
    """The backend that can compute gradients on `device`: FlexAttention has no backward on a CPU, SDPA does."""
    if backend == "flex_attention" and device.type == "cpu":
        _log_flex_fallback()
        return "sdpa"
    return backend


@functools.cache
def _log_flex_fallback() -> None:
    logger.warning("FlexAttention has no backward on the CPU; training uses the sdpa backend of the same attention.")


@functools.cache
def _compiled_flex_attention():
    return torch.compile(flex_attention)


def _document_block_mask(document_ids: Tensor) -> BlockMask:
    def sees(batch, head, row, column):
        return (column <= row) & (document_ids[batch, row] == document_ids[batch, column])

    batch_size, num_tokens = document_ids.shape
    return create_block_mask(sees, batch_size, None, num_tokens, num_tokens, device=document_ids.device)


def _attention_dtype(query: Tensor) -> torch.dtype:
    """The autocast type inside autocast (rotary embeddings leave float32 behind), otherwise the query's own."""
    device_type = query.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else query.dtype


def _softmax_dtype(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


def _group_heads(tensor: Tensor, num_groups: int) -> Tensor:
    """`(B, H, ...)` as `(B, G, H/G, ...)`: the query heads that share a key-value head, side by side."""
    return tensor.unflatten(1, (num_groups, -1))
