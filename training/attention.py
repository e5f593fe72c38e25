"""Attention of the training unroll: one softmax over a row's document and over the row's own drafted keys.

At TTT step k a row attends to the step-0 keys of its document, up to its own, and to the k keys that it produced
itself at steps 1 to k. The step-0 part is ordinary causal attention with many queries per key; the own part has k keys
per query and no two rows share one. Both stand under one softmax,

    output = (sum_j exp(s_j) v_j + sum_m exp(s_m) v_m) / (sum_j exp(s_j) + sum_m exp(s_m)).

`eager` writes this down. `flex_attention` normalises the parts apart and merges them by their log-sum-exp. `sdpa` does
the same where no log-sum-exp can be had: the own keys enter as one virtual key, whose score is their log-sum-exp and
whose value reports the probability that it received.

Documents are numbered from 1 in `document_ids (B, T)`; padding is document 0. A row attends within its document, so
that padding rows see padding and no row is ever left without a key.

Shapes: B batch, T tokens, H heads, G key-value heads, d head dimension, R rope dimension, k own keys per row.
"""

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from .documents import document_starts
from .own_attention import own_attention, own_output, own_scores

logger = logging.getLogger(__name__)

# Rows and columns of the blocks that FlexAttention computes or skips.
BLOCK_SIZE = 128


def is_plain_causal(document_ids: Tensor) -> bool:
    """True when every row holds one document from its first token on, so that causality alone is the mask."""
    one_document = (document_ids == document_ids[:, :1]) | (document_ids == 0)
    return bool((one_document.all() & (document_ids.diff(dim=1) <= 0).all()).item())


def document_visibility(document_ids: Tensor) -> Tensor:
    """True where a row `i` (third axis) sees the step-0 key `j` (last axis), `(B, 1, T, T)`."""
    num_tokens = document_ids.shape[1]
    causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=document_ids.device).tril()
    starts = document_starts(document_ids).cumsum(dim=1)
    return (causal & (starts[:, :, None] == starts[:, None, :])).unsqueeze(1)


def document_block_mask(document_ids: Tensor) -> BlockMask:
    """The same as a `BlockMask`, from the first and last document of each block: no `(T, T)` tensor is made."""
    batch_size, num_tokens = document_ids.shape
    documents = document_starts(document_ids).cumsum(dim=1)  # rising by 1 from document to document

    def sees(batch, head, row, column):
        return (column <= row) & (documents[batch, row] == documents[batch, column])

    num_blocks = -(-num_tokens // BLOCK_SIZE)
    padded = F.pad(documents, (0, num_blocks * BLOCK_SIZE - num_tokens), value=-1).view(batch_size, num_blocks, -1)
    first, last = documents[:, ::BLOCK_SIZE], padded.amax(dim=-1)  # (B, blocks)
    before = torch.ones(num_blocks, num_blocks, dtype=torch.bool, device=documents.device).tril(diagonal=-1)
    diagonal = torch.eye(num_blocks, dtype=torch.bool, device=documents.device)
    # A block of keys is seen if its last document is the first one of a later block of rows, by all if there is one.
    shared = before & (last[:, None, :] == first[:, :, None])
    is_whole = (first == last) & (padded[..., -1] >= 0)
    whole = shared & is_whole[:, None, :] & is_whole[:, :, None]
    return BlockMask.from_kv_blocks(
        *_listed_blocks((shared & ~whole) | diagonal),
        *_listed_blocks(whole),
        BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=sees,
        seq_lengths=(num_tokens, num_tokens),
    )


def _listed_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of rows has, and which come first: `(B, 1, n)` and `(B, 1, n, n)`."""
    counts = blocks.sum(dim=-1, dtype=torch.int32)
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return counts.unsqueeze(1), order.unsqueeze(1).contiguous()


def eager_joint_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    own_keys: Tensor | None,
    own_values: Tensor | None,
    mask: Tensor,
    scaling: float,
) -> Tensor:
    """The definition: all scores side by side, one softmax. See `joint_attention`."""
    groups, num_tokens = query.shape[1] // key.shape[1], key.shape[2]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32)) * scaling
    scores = scores.masked_fill(~mask, float("-inf"))  # (B, H, T, T)
    if own_keys is None:
        return scores.softmax(dim=-1).to(query.dtype) @ value
    beside = own_scores(query, own_keys, scaling).flatten(2, 3).movedim(0, -1)  # (B, H, T, k)
    probs = torch.cat([scores, beside], dim=-1).softmax(dim=-1).to(query.dtype)  # (B, H, T, T + k)
    own_probs = probs[..., num_tokens:].movedim(-1, 0).unflatten(2, (-1, groups))  # (k, B, G, H/G, T)
    return probs[..., :num_tokens] @ value + own_output(own_probs, own_values)


def sdpa_joint_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    own_keys: Tensor | None,
    own_values: Tensor | None,
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
    if own_keys is None:
        document_mask = None if mask is None else mask[:, :, 1:, 1:]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=document_mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
    key_dim, head_dim = key.shape[-1], value.shape[-1]
    width = -(-max(key_dim + 2, head_dim + 1) // 8) * 8  # the fast kernels want one width, a multiple of 8
    own, own_lse = own_attention(query, own_keys, own_values, scaling)
    virtual_score = own_lse.unsqueeze(-1) / scaling
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
    return output[..., :head_dim] + output[..., head_dim : head_dim + 1] * own


def flex_joint_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    own_keys: Tensor | None,
    own_values: Tensor | None,
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
    if own_keys is None:
        return output
    return own_attention(query, own_keys, own_values, scaling, base=(output, aux.lse))[0]


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
    own_keys: Tensor | None,
    own_values: Tensor | None,
    mask: Tensor | BlockMask | None,
    scaling: float,
) -> Tensor:
    """Attention of every row to the step-0 keys of its document and to its own keys, under one softmax.

    Args:
        backend (`str`): `"eager"`, `"sdpa"` or `"flex_attention"`.
        query (`torch.Tensor` of shape `(B, H, T, d + R)`): Queries, rotated.
        key (`torch.Tensor` of shape `(B, G, T, d + R)`): Step-0 keys, rotated.
        value (`torch.Tensor` of shape `(B, G, T, d)`): Step-0 values.
        own_keys (`torch.Tensor` of shape `(k, B, G, T, d + R)`, *optional*): Of the later steps; entry `i` along T is
            seen by row `i` only.
        own_values (`torch.Tensor` of shape `(k, B, G, T, d)`, *optional*): Their values.
        mask: What `step_zero_mask` returned for this backend.
        scaling (`float`): Factor on the scores.

    Returns:
        `torch.Tensor` of shape `(B, H, T, d)`.
    """
    dtype = _attention_dtype(query)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if own_keys is not None:
        own_keys, own_values = own_keys.to(dtype), own_values.to(dtype)
    return JOINT_ATTENTION[backend](query, key, value, own_keys, own_values, mask, scaling)


def step_zero_mask(backend: str, document_ids: Tensor) -> Tensor | BlockMask | None:
    """Who sees which step-0 key, in the form the backend wants; built once per batch, shared by all steps and layers.

    `eager`: `(B, 1, T, T)` of bool. `sdpa`: `None` where causality says it all, else `(B, 1, 1 + T, 1 + T)` of bool
    with the virtual key and the unread query in front. `flex_attention`: a `BlockMask`.
    """
    if backend == "flex_attention":
        return document_block_mask(document_ids)
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


def _attention_dtype(query: Tensor) -> torch.dtype:
    """The autocast type inside autocast (rotary embeddings leave float32 behind), otherwise the query's own."""
    device_type = query.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else query.dtype
