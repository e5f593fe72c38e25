"""The EAGLE-3 draft head with multi-head latent attention (MLA), and the hook that lets `generate()` use it.

One row of the head pairs a target state with the token that follows it. From the states g that the target had at
position i and the embedding of token i + 1 it predicts token i + 2:

    h = fc(g)                                             fused_states; or the state that the previous row fed back
    a = [input_layernorm(embed(x)); hidden_norm(h)]       of width 2D, the input of queries and latents
    h = h + attention(a);  h = h + mlp(norm(h));  logits = lm_head(norm(h))

Only the latent is cached, c_kv = kv_norm(W_dkv a), and one rotated key per position where RoPE is decoupled (R > 0).

The file reads in dependency order: rotary embedding, attention kernels, the two attention types, the layer,
how a target's states are captured, the model, how its code travels with it, the hook.

Shapes: B batch, Q queries, K cached and new positions, T tokens, H heads, G key-value heads, d head width, D hidden,
Dt the target's hidden, C latent, R decoupled RoPE, V and Vd vocabularies of target and draft.
"""

import functools
import hashlib
import importlib
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention as flex_kernel
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import ModelOutput, logging

from .configuration_eagle3_mla import Eagle3MLAConfig

logger = logging.get_logger(__name__)

# Up to so many, a mask is repeated for the query heads of a group: it stays small beside keys and values.
MOST_FOLDED_QUERIES = 128

CosSin = tuple[Tensor, Tensor]
Rotate = Callable[[Tensor, CosSin], Tensor]


class Eagle3MLARotaryEmbedding(nn.Module):
    """
    Cosines and sines of RoPE for the width that this head rotates: R, or the head width where R = 0.

    The frequencies are neither parameters nor buffers: they are computed in fp32 at first use, so that casting the
    model cannot round them and loading it cannot leave them uninitialised.
    """

    def __init__(self, config: Eagle3MLAConfig):
        super().__init__()
        self.config = copy(config)
        self.config.head_dim = config.mla_rope_dim or config.head_dim
        self.inv_freq: Tensor | None = None
        self.attention_scaling = 1.0

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> CosSin:
        """`position_ids (B, T)` -> cosines and sines, each `(B, T, width)`."""
        inv_freq, attention_scaling = self.frequencies(position_ids.device)
        angles = position_ids[..., None].float() * inv_freq  # (B, T, width / 2)
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * attention_scaling).to(dtype), (angles.sin() * attention_scaling).to(dtype)

    def frequencies(self, device: torch.device) -> tuple[Tensor, float]:
        """Frequencies `(width / 2,)`, fp32, and the factor of cosines and sines."""
        if self.inv_freq is None or self.inv_freq.device != device:
            self.inv_freq, self.attention_scaling = self._frequencies(device)
        return self.inv_freq, self.attention_scaling

    def _frequencies(self, device: torch.device) -> tuple[Tensor, float]:
        rope = self.config.rope_parameters
        if rope["rope_type"] != "default":
            return ROPE_INIT_FUNCTIONS[rope["rope_type"]](self.config, device)
        exponents = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32, device=device) / self.config.head_dim
        return 1.0 / rope["rope_theta"] ** exponents, 1.0


def rotate(heads: Tensor, cos_sin: CosSin) -> Tensor:
    """RoPE (arXiv:2104.09864, Eq. 34), half-split as in Llama; heads `(B, H, T, width)`, angles `(B, T, width)`."""
    cos, sin = (part[:, None] for part in cos_sin)
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin


def eager_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """
    Attention with explicit scores, the reference of the other two kernels.

    Args:
        query (`torch.Tensor` of shape `(B, H, Q, E)`): Queries.
        key (`torch.Tensor` of shape `(B, G, K, E)`): Keys, one head for `H / G` query heads.
        value (`torch.Tensor` of shape `(B, G, K, F)`): Values.
        mask (`torch.Tensor` of shape `(B or 1, 1, Q, K)`, *optional*):
            Added to the scores. `None` means causal, the last query at the last key.
        scaling (`float`): Factor of the scores.

    Returns:
        `torch.Tensor` of shape `(B, H, Q, F)`.
    """
    mask = causal_mask(query, key) if mask is None else mask
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling + mask  # (B, H, Q, K)
    probs = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return torch.matmul(probs.to(value.dtype), value)


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """As `eager_attention`, by `torch.nn.functional.scaled_dot_product_attention`; no mask is built for a prompt."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    is_causal = mask is None and num_queries == num_keys and num_queries > 1
    if mask is None and not is_causal and num_queries > 1:
        mask = causal_mask(query, key)
    if mask is None or num_queries > MOST_FOLDED_QUERIES:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=is_causal, scale=scaling, enable_gqa=True
        )
    # No fused kernel takes grouped heads and a mask; the query heads of a group are more queries of one key head.
    num_groups = query.shape[1] // key.shape[1]
    query = query.unflatten(1, (key.shape[1], num_groups)).flatten(2, 3)  # (B, G, H / G * Q, E)
    mask = mask.repeat(1, 1, num_groups, 1)
    heads = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return heads.unflatten(2, (num_groups, num_queries)).flatten(1, 2)


def flex_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """As `eager_attention`, by FlexAttention, compiled for more than 128 queries on a GPU.

    It has no backward on the CPU: where one is needed there, `sdpa_attention` runs instead, which is logged once.
    """
    needs_backward = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    if needs_backward and query.device.type == "cpu":
        logger.warning_once("FlexAttention has no backward on the CPU: `sdpa` is used instead of `flex_attention`.")
        return sdpa_attention(query, key, value, mask, scaling)
    offset = key.shape[2] - query.shape[2]

    def add_mask(score, batch, head, query_index, key_index):
        return score + mask[batch, 0, query_index, key_index]

    def hide_future(score, batch, head, query_index, key_index):
        return torch.where(query_index + offset >= key_index, score, -float("inf"))

    if mask is not None:
        mask = mask.expand(query.shape[0], -1, -1, -1)
    kernel = compiled_flex_kernel() if query.is_cuda and query.shape[2] > 128 else flex_kernel
    score_mod = hide_future if mask is None else add_mask
    return kernel(query, key, value, score_mod=score_mod, scale=scaling, enable_gqa=True)


@functools.cache
def compiled_flex_kernel():
    """FlexAttention as one fused kernel, compiled at first use."""
    return torch.compile(flex_kernel)


def causal_mask(query: Tensor, key: Tensor) -> Tensor:
    """Additive mask `(1, 1, Q, K)`: the last query sits at the last key, nobody sees the future."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    hidden = torch.full((num_queries, num_keys), torch.finfo(query.dtype).min, dtype=query.dtype, device=query.device)
    return hidden.triu(diagonal=num_keys - num_queries + 1)[None, None]


ATTENTION_KERNELS = {"eager": eager_attention, "sdpa": sdpa_attention, "flex_attention": flex_attention}


class Eagle3MLARMSNorm(nn.RMSNorm):
    """RMSNorm (arXiv:1910.07467) in the type of its input: two types, as in mixed precision, have no fused kernel."""

    def forward(self, states: Tensor) -> Tensor:
        return F.rms_norm(states, self.normalized_shape, self.weight.to(states.dtype), self.eps)


@runtime_checkable
class AttendingCache(Protocol):
    """A cache that attends to its latents itself, by a kernel that reads on the device which slots are in use."""

    def attend_latents(
        self, query: Tensor, c_kv: Tensor, k_rope: Tensor, w_uk: Tensor, w_uv: Tensor, scaling: float
    ) -> Tensor:
        """
        The weighted sums of values, `(B, H, Q, d)`.

        Args:
            query (`torch.Tensor` of shape `(B, H, Q, d + R)`): From `ask`.
            c_kv (`torch.Tensor` of shape `(B, 1, K, C)`), k_rope (`torch.Tensor` of shape `(B, 1, K, R)`): All slots.
            w_uk (`torch.Tensor` of shape `(G, d, C)`), w_uv (`torch.Tensor` of shape `(G, d, C)`): Up-projections.
            scaling (`float`): Factor of the scores.
        """


class LatentAttention(nn.Module):
    """
    Multi-head latent attention (arXiv:2405.04434, Eq. 9-19), with grouped key-value heads.

    `ask` makes the query, `remember` what is cached, `expand` turns that into keys and values, `forward` attends over
    the cache. With R = 0 RoPE turns the up-projected keys, so they are expanded at every call; with R > 0 the
    up-projection of the keys moves to the query. That of the values can always move behind the attention.
    """

    def __init__(self, config: Eagle3MLAConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.latent_dim, self.rope_dim = config.head_dim, config.mla_latent_dim, config.mla_rope_dim
        self.scaling = (self.head_dim + self.rope_dim) ** -0.5
        input_size = attention_input_size(config, layer_idx)
        query_size, key_value_size = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim

        query_input_size = input_size
        if config.mla_q_lora_rank is None:
            self.q_proj = nn.Linear(input_size, query_size, bias=False)
        else:
            query_input_size = config.mla_q_lora_rank
            self.q_a_proj = nn.Linear(input_size, query_input_size, bias=False)
            self.q_a_layernorm = Eagle3MLARMSNorm(query_input_size, eps=config.rms_norm_eps)
            self.q_b_proj = nn.Linear(query_input_size, query_size, bias=False)
        self.W_dkv = nn.Linear(input_size, self.latent_dim, bias=False)
        if config.mla_use_kv_norm:
            self.kv_norm = kv_norm(config)
        self.W_uk = nn.Linear(self.latent_dim, key_value_size, bias=False)
        self.W_uv = nn.Linear(self.latent_dim, key_value_size, bias=False)
        if self.rope_dim > 0:
            self.W_qr = nn.Linear(query_input_size, self.num_heads * self.rope_dim, bias=False)
            self.W_kr = nn.Linear(input_size, self.rope_dim, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def ask(self, attention_input: Tensor, cos_sin: CosSin, rotate: Rotate = rotate) -> Tensor:
        """
        What a row asks.

        Args:
            attention_input (`torch.Tensor` of shape `(B, T, 2D)`): From the layer's `attention_input`.
            cos_sin (`tuple[torch.Tensor, torch.Tensor]`): RoPE at the rows' positions.
            rotate (`Callable`, *optional*): Another implementation of [`rotate`].

        Returns:
            `torch.Tensor` of shape `(B, H, T, d + R)`: The query, rotated.
        """
        query_input = attention_input
        if self.config.mla_q_lora_rank is not None:
            query_input = self.q_a_layernorm(self.q_a_proj(attention_input))
        up_projection = self.q_proj if self.config.mla_q_lora_rank is None else self.q_b_proj
        query = split_heads(up_projection(query_input), self.num_heads)  # (B, H, T, d)
        if self.rope_dim == 0:
            return rotate(query, cos_sin)
        q_rope = rotate(split_heads(self.W_qr(query_input), self.num_heads), cos_sin)  # (B, H, T, R)
        return torch.cat([query, q_rope], dim=-1)

    def remember(self, attention_input: Tensor, cos_sin: CosSin, rotate: Rotate = rotate) -> tuple[Tensor, Tensor]:
        """What is cached of a row: `c_kv (B, 1, T, C)` and, rotated, `k_rope (B, 1, T, R)`."""
        c_kv = self.W_dkv(attention_input)[:, None]
        if self.config.mla_use_kv_norm:
            c_kv = self.kv_norm(c_kv)
        if self.rope_dim == 0:
            return c_kv, c_kv[..., :0]
        return c_kv, rotate(self.W_kr(attention_input)[:, None], cos_sin)

    def expand(self, memory: tuple[Tensor, Tensor], cos_sin: CosSin, rotate: Rotate = rotate) -> tuple[Tensor, Tensor]:
        """Keys `(B, G, K, d + R)` and values `(B, G, K, d)` of cached positions; `cos_sin` is RoPE at these."""
        values = split_heads(self.W_uv(memory[0][:, 0]), self.num_key_value_heads)
        return self._keys(memory, cos_sin, rotate), values

    def forward(
        self,
        attention_input: Tensor,
        cos_sin: CosSin,
        key_cos_sin: CosSin,
        mask: Tensor | None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """Attention of new rows over the cache and themselves, `(B, Q, 2D)` -> `(B, Q, D)`.

        **Effects**: appends the rows' `c_kv` and `k_rope` to `past_key_values`.
        """
        query, memory = self.ask(attention_input, cos_sin), self.remember(attention_input, cos_sin)
        if past_key_values is not None:
            memory = past_key_values.update(*memory, self.layer_idx)
        if isinstance(past_key_values, AttendingCache):
            return self.output(self.attend_by_cache(query, memory, past_key_values))
        attend = self.attend_absorbed if self.absorbing_is_cheaper(query.shape[2]) else self.attend_expanded
        return self.output(attend(query, memory, key_cos_sin, mask))

    def absorbing_is_cheaper(self, num_queries: int) -> bool:
        """Compares multiply-adds per cached position: attending in latent width against expanding first."""
        saved_width = 2 * (self.head_dim - self.latent_dim) if self.rope_dim > 0 else self.head_dim - self.latent_dim
        num_expanded = 2 if self.rope_dim > 0 else 1
        expansion = num_expanded * self.latent_dim * self.num_key_value_heads * self.head_dim
        return num_queries * self.num_heads * saved_width + expansion >= 0

    def attend_expanded(self, query: Tensor, memory: tuple[Tensor, Tensor], key_cos_sin: CosSin, mask) -> Tensor:
        """Expands keys and values of every cached position, `-> (B, H, Q, d)`."""
        key, value = self.expand(memory, key_cos_sin)
        return self._kernel(query, key, value, mask, self.scaling)

    def attend_absorbed(self, query: Tensor, memory: tuple[Tensor, Tensor], key_cos_sin: CosSin, mask) -> Tensor:
        """
        Attends to the latents themselves, `-> (B, H, Q, d)`; equal to `attend_expanded` up to rounding.

        `sum_j p_j W_uv c_j = W_uv sum_j p_j c_j`, and with R > 0 also `q . (W_uk c_j) = (W_uk^T q) . c_j`: the
        attention is then multi-query on `[c_kv; k_rope]` with value `c_kv`.
        """
        c_kv, k_rope = memory
        if self.rope_dim == 0:
            key = self._keys(memory, key_cos_sin)  # (B, G, K, d)
        else:
            query = self._absorb_keys(query, c_kv)
            key = torch.cat([c_kv, k_rope], dim=-1)  # (B, 1, K, C + R)
        value = c_kv.expand(-1, key.shape[1], -1, -1)
        return self._expand_latents(self._kernel(query, key, value, mask, self.scaling))

    def attend_by_cache(self, query: Tensor, memory: tuple[Tensor, Tensor], cache: "AttendingCache") -> Tensor:
        """As `attend_absorbed`, over the slots of a cache that knows itself who sees which."""
        return cache.attend_latents(query, *memory, *self.up_projections(memory[0]), self.scaling)

    def up_projections(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """`w_uk (G, d, C)` and `w_uv (G, d, C)`, for tensors such as `like (..., C)`."""
        shape = self.num_key_value_heads, self.head_dim, self.latent_dim
        return matrix(self.W_uk, like).view(shape), matrix(self.W_uv, like).view(shape)

    def _absorb_keys(self, query: Tensor, c_kv: Tensor) -> Tensor:
        """The query of the latents themselves, `(B, H, Q, d + R)` -> `(B, H, Q, C + R)`."""
        q_nope, q_rope = query.split([self.head_dim, self.rope_dim], dim=-1)
        w_uk = matrix(self.W_uk, c_kv).view(self.num_key_value_heads, self.head_dim, self.latent_dim)
        q_latent = torch.einsum("bgnqd,gdc->bgnqc", self._by_group(q_nope), w_uk)
        return torch.cat([q_latent.flatten(1, 2), q_rope], dim=-1)

    def _expand_latents(self, latents: Tensor) -> Tensor:
        """Values of attended latents, `(B, H, Q, C)` -> `(B, H, Q, d)`."""
        w_uv = matrix(self.W_uv, latents).view(self.num_key_value_heads, self.head_dim, self.latent_dim)
        return torch.einsum("bgnqc,gdc->bgnqd", self._by_group(latents), w_uv).flatten(1, 2)

    def output(self, heads: Tensor) -> Tensor:
        """`(B, H, T, d)` -> `(B, T, D)`."""
        return self.o_proj(heads.transpose(1, 2).flatten(2))

    @property
    def _kernel(self):
        return ATTENTION_KERNELS[self.config._attn_implementation]

    def _keys(self, memory: tuple[Tensor, Tensor], cos_sin: CosSin, rotate: Rotate = rotate) -> Tensor:
        c_kv, k_rope = memory
        keys = split_heads(self.W_uk(c_kv[:, 0]), self.num_key_value_heads)  # (B, G, K, d)
        if self.rope_dim == 0:
            return rotate(keys, cos_sin)
        return torch.cat([keys, k_rope.expand(-1, self.num_key_value_heads, -1, -1)], dim=-1)

    def _by_group(self, heads: Tensor) -> Tensor:
        """`(B, H, ...)` -> `(B, G, H / G, ...)`."""
        return heads.unflatten(1, (self.num_key_value_heads, -1))


class GroupedQueryAttention(nn.Module):
    """The standard EAGLE-3 attention (arXiv:2305.13245), which caches rotated keys and values: the baseline of MLA."""

    def __init__(self, config: Eagle3MLAConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        input_size = attention_input_size(config, layer_idx)
        self.q_proj = nn.Linear(input_size, self.num_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(input_size, self.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(input_size, self.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * config.head_dim, config.hidden_size, bias=False)

    def ask(self, attention_input: Tensor, cos_sin: CosSin, rotate: Rotate = rotate) -> Tensor:
        """As [`LatentAttention.ask`]; the query is `(B, H, T, d)`."""
        return rotate(split_heads(self.q_proj(attention_input), self.num_heads), cos_sin)

    def remember(self, attention_input: Tensor, cos_sin: CosSin, rotate: Rotate = rotate) -> tuple[Tensor, Tensor]:
        """As [`LatentAttention.remember`]: `(key, value)`, each `(B, G, T, d)`."""
        key = rotate(split_heads(self.k_proj(attention_input), self.num_key_value_heads), cos_sin)
        return key, split_heads(self.v_proj(attention_input), self.num_key_value_heads)

    def expand(self, memory: tuple[Tensor, Tensor], cos_sin: CosSin, rotate: Rotate = rotate) -> tuple[Tensor, Tensor]:
        """The memory itself: it holds rotated keys and values."""
        return memory

    def forward(
        self,
        attention_input: Tensor,
        cos_sin: CosSin,
        key_cos_sin: CosSin,
        mask: Tensor | None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """As [`LatentAttention.forward`]. **Effects**: appends keys and values to `past_key_values`."""
        query, memory = self.ask(attention_input, cos_sin), self.remember(attention_input, cos_sin)
        if past_key_values is not None:
            memory = past_key_values.update(*memory, self.layer_idx)
        kernel = ATTENTION_KERNELS[self.config._attn_implementation]
        return self.output(kernel(query, *memory, mask, self.scaling))

    def output(self, heads: Tensor) -> Tensor:
        """`(B, H, T, d)` -> `(B, T, D)`."""
        return self.o_proj(heads.transpose(1, 2).flatten(2))


def attention_input_size(config: Eagle3MLAConfig, layer_idx: int) -> int:
    """The first layer reads embedding and state side by side, later ones the state alone."""
    return 2 * config.hidden_size if layer_idx == 0 else config.hidden_size


def kv_norm(config: Eagle3MLAConfig) -> nn.Module:
    """The norm on the latent."""
    if config.mla_kv_norm_type == "rms_norm":
        return Eagle3MLARMSNorm(config.mla_latent_dim, eps=config.rms_norm_eps)
    return nn.LayerNorm(config.mla_latent_dim, eps=config.rms_norm_eps)


def matrix(projection: nn.Module, like: Tensor) -> Tensor:
    """The matrix `(out, in)` by which `projection` multiplies tensors such as `like (..., in)`, adapters included.

    `weight` says it for a plain `nn.Linear` only: with an adapter around it, or packed into few bits, it is not what
    the module computes. So any other module is asked: the image of the identity is its matrix, transposed.
    """
    if type(projection) is nn.Linear:
        return projection.weight
    identity = torch.eye(like.shape[-1], device=like.device, dtype=like.dtype)
    return projection(identity).transpose(0, 1).contiguous()


def split_heads(states: Tensor, num_heads: int) -> Tensor:
    """`(B, T, heads * width)` -> `(B, heads, T, width)`."""
    return states.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class Eagle3MLAMLP(nn.Module):
    """SwiGLU (arXiv:2002.05202, Eq. 6)."""

    def __init__(self, config: Eagle3MLAConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, states: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(states)) * self.up_proj(states))


class Eagle3MLADecoderLayer(nn.Module):
    """
    One layer of the draft (arXiv:2503.01840, section 3.1); the residual is the raw state.

    With `embed_residual` the first layer adds `embed_proj(input_layernorm(embed))` to it, so that a row's own token
    need not pass through the latent.
    """

    def __init__(self, config: Eagle3MLAConfig, layer_idx: int):
        super().__init__()
        attention = LatentAttention if config.attention_type == "mla" else GroupedQueryAttention
        self.self_attn = attention(config, layer_idx)
        self.mlp = Eagle3MLAMLP(config)
        self.input_layernorm = Eagle3MLARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if layer_idx == 0:
            self.hidden_norm = Eagle3MLARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if layer_idx == 0 and config.embed_residual:
            self.embed_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.post_attention_layernorm = Eagle3MLARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.is_first = layer_idx == 0
        self.takes_embedding = self.is_first and config.embed_residual

    def attention_input(self, inputs_embeds: Tensor, states: Tensor) -> Tensor:
        """`(B, T, D)` twice -> `(B, T, 2D)` in the first layer, `(B, T, D)` in later ones."""
        if not self.is_first:
            return self.input_layernorm(states)
        return torch.cat([self.input_layernorm(inputs_embeds), self.hidden_norm(states)], dim=-1)

    def residual(self, attention_input: Tensor, states: Tensor) -> Tensor:
        """What the output of the attention is added to, `(B, T, D)`."""
        if not self.takes_embedding:
            return states
        return states + self.embed_proj(attention_input[..., : states.shape[-1]])

    def feed_forward(self, states: Tensor) -> Tensor:
        """The second half of the layer, residual included."""
        return states + self.mlp(self.post_attention_layernorm(states))

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """What the layer does behind its attention."""
        return self.feed_forward(residual + attended)

    def remember(self, inputs_embeds: Tensor, states: Tensor, cos_sin: CosSin, past_key_values: Cache) -> None:
        """
        What later rows need of these, and no more.

        **Effects**: appends to `past_key_values`, as `forward` does.
        """
        memory = self.self_attn.remember(self.attention_input(inputs_embeds, states), cos_sin)
        past_key_values.update(*memory, self.self_attn.layer_idx)

    def forward(self, inputs_embeds: Tensor, states: Tensor, **attention) -> Tensor:
        attention_input = self.attention_input(inputs_embeds, states)
        return self.finish(self.residual(attention_input, states), self.self_attn(attention_input, **attention))


class AuxHiddenStates:
    """
    The target's residual stream at the draft's three places, collected by forward hooks while the context is open.

    Hooks, because `output_hidden_states` keeps every layer and numbers them differently between versions. Several
    forwards (a chunked prefill) are joined along the length. The context can be entered again and again.

    Args:
        target (`PreTrainedModel`): A decoder-only model.
        layer_ids (`list[int]`): The residual stream before layer i; after the last layer for i = number of layers.
        device (`torch.device`), dtype (`torch.dtype`): Of what `take` returns.
    """

    def __init__(self, target: PreTrainedModel, layer_ids: list[int], device: torch.device, dtype: torch.dtype):
        self.layers = decoder_layers(target)
        self.layer_ids = layer_ids
        self.device, self.dtype = device, dtype
        self.chunks: list[list[Tensor]] = [[] for _ in layer_ids]  # of each place, one for each forward
        self.thread: int | None = threading.get_ident()  # None: whoever runs the target
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "AuxHiddenStates":
        if self.thread is not None:
            self.thread = threading.get_ident()
        for index, layer_id in enumerate(self.layer_ids):
            self.handles.append(self._hook(index, layer_id))
        return self

    def __exit__(self, *exception) -> None:
        while self.handles:
            self.handles.pop().remove()

    def take(self) -> Tensor:
        """
        The states of all forwards since the last call, `(B, T, 3 * Dt)`.

        Raises:
            NotImplementedError: If the target's layers cannot be listened to, or hold several streams.
        """
        self._check_chunks()
        states = [torch.cat([chunk.to(self.device) for chunk in chunks], dim=1) for chunks in self.chunks]
        for chunks in self.chunks:
            chunks.clear()
        return torch.cat(states, dim=-1).to(self.dtype)

    def receive(self, index: int, states: Tensor) -> None:
        """Keeps the states of the place `index`, `(B, T, Dt)`."""
        self.chunks[index].append(states)

    def _check_chunks(self) -> None:
        if not all(self.chunks):
            raise NotImplementedError(
                "The target's layers were not seen running, as under `target.compile()`. Use the target uncompiled, "
                "or wrapped as `torch.compile(target)`."
            )
        if self.chunks[0][0].dim() != 3:
            raise NotImplementedError(
                f"The target's residual stream must have the shape (B, T, Dt), got {tuple(self.chunks[0][0].shape)}."
            )

    def _hook(self, index: int, layer_id: int) -> torch.utils.hooks.RemovableHandle:
        def keep(states: Tensor) -> None:
            # Another thread may be running the same target for a draft of its own.
            if self.thread is None or threading.get_ident() == self.thread:
                self.receive(index, states)

        def before(module, args, kwargs):
            keep(args[0] if args else kwargs["hidden_states"])

        def after(module, args, output):
            keep(output[0] if isinstance(output, tuple) else output)

        if layer_id < len(self.layers):
            return self.layers[layer_id].register_forward_pre_hook(before, with_kwargs=True)
        return self.layers[-1].register_forward_hook(after)


class FusedStates(AuxHiddenStates):
    """
    As [`AuxHiddenStates`], but what `take` returns went through the draft's `fc`: one state of a position, not three.

    A forward over more than `max_unfused` tokens adds `fc`'s part for each place as soon as its layer has run
    (`fc [g1; g2; g3] = fc1 g1 + fc2 g2 + fc3 g3`, equal up to rounding), so that the states of one layer, which the
    target holds anyway, are the only ones. Shorter forwards are kept, at most one of them, and fused at once.

    Args:
        target (`PreTrainedModel`): A decoder-only model.
        draft ([`Eagle3MLADraftModel`]): The head.
    """

    max_unfused = 2048

    def __init__(self, target: PreTrainedModel, draft: "Eagle3MLADraftModel"):
        weight = draft.fc.weight
        super().__init__(target, draft.config.eagle_aux_hidden_state_layer_ids, weight.device, weight.dtype)
        self.draft = draft
        self.fused: list[Tensor] = []

    def take(self, path: Tensor | None = None) -> Tensor:
        """
        The fused states of all forwards since the last call, `(B, T, D)`.

        Args:
            path (`torch.LongTensor` of shape `(B, P)`, *optional*):
                The wanted positions of the only forward since then; `None`: all.

        Raises:
            NotImplementedError: If the target's layers cannot be listened to, or hold several streams.
        """
        is_unfused = any(self.chunks) or not self.fused
        if is_unfused:
            self._fuse_chunks(path)
        fused, self.fused = self.fused, []
        states = fused[0] if len(fused) == 1 else torch.cat(fused, dim=1)
        return states if path is None or is_unfused else states.gather(1, rows_of(path, states))

    def receive(self, index: int, states: Tensor) -> None:
        if index == 0 and all(self.chunks):
            self._fuse_chunks()
        if states.dim() == 3 and states.shape[1] > self.max_unfused:
            self._add_part(index, states)
        else:
            super().receive(index, states)

    def _fuse_chunks(self, path: Tensor | None = None) -> None:
        self._check_chunks()
        chunks = [chunks.pop() for chunks in self.chunks]
        if path is not None:
            chunks = [states.gather(1, rows_of(path, states)) for states in chunks]
        chunks = torch.cat([states.to(self.device) for states in chunks], dim=-1)
        self.fused.append(self.draft.fuse(chunks.to(self.dtype)))

    def _add_part(self, index: int, states: Tensor) -> None:
        batch_size, num_tokens, width = states.shape
        if index == 0:
            shape = batch_size, num_tokens, self.draft.config.hidden_size
            self.fused.append(torch.zeros(shape, dtype=self.dtype, device=self.device))
        sums = self.fused[-1]
        weight = matrix(self.draft.fc, sums.new_empty(1, 3 * width)).chunk(3, dim=1)[index]
        for rows, part in zip(sums.split(self.max_unfused, dim=1), states.split(self.max_unfused, dim=1), strict=True):
            part = part.to(device=self.device, dtype=self.dtype)
            if self.draft.config.fc_norm:
                part = self.draft.fc_norm[index](part)
            rows += F.linear(part, weight)


def rows_of(path: Tensor, states: Tensor) -> Tensor:
    """`path (B, P)` as the index that gathers its rows from `states (B, T, D)`."""
    return path.to(states.device)[..., None].expand(-1, -1, states.shape[-1])


def decoder_layers(target: PreTrainedModel) -> nn.ModuleList:
    """
    The target's decoder layers: the outermost module list of its decoder that has as many entries as layers.

    Raises:
        ValueError: If there is none.
    """
    num_layers = target.config.get_text_config(decoder=True).num_hidden_layers
    for module in target.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise ValueError(f"`target` ({type(target).__name__}) must hold its {num_layers} layers in one module list.")


@dataclass
class Eagle3MLAOutput(ModelOutput):
    """
    Output of [`Eagle3MLADraftModel`].

    Args:
        logits (`torch.Tensor` of shape `(B, T, Vd)`):
            Scores over the draft vocabulary; row i predicts the token after its own.
        states (`torch.Tensor` of shape `(B, T, D)`):
            What a row feeds back to the next one in the place of `fused_states`.
        past_key_values (`Cache`, *optional*):
            The cache that was passed, extended by the rows.
    """

    logits: torch.FloatTensor | None = None
    states: torch.FloatTensor | None = None
    past_key_values: Cache | None = None


class Eagle3MLADraftModel(PreTrainedModel, GenerationMixin):
    """
    An EAGLE-3 draft head with MLA, to be passed as `assistant_model` to the `generate()` of its target.

    It is a `GenerationMixin` for the sake of `generation_config`, where transformers keeps an assistant's settings.

    Weights: `fc`, optional `fc_norm.{0,1,2}`, `layers.{i}`, `norm`, `lm_head`, the draft vocabulary `d2t` and `t2d`,
    and `embed_tokens` only where the head does not use the target's embeddings. `d2t (Vd,)` holds **offsets**: the
    target's id is `draft_id + d2t[draft_id]`. `t2d (V,)` says which target ids the draft knows.

    Args:
        config ([`Eagle3MLAConfig`]): The configuration.
    """

    config_class = Eagle3MLAConfig
    base_model_prefix = ""
    main_input_name = "inputs_embeds"
    _no_split_modules = ["Eagle3MLADecoderLayer"]  # noqa: RUF012 (the base class reads a plain list)
    _supports_sdpa = True
    _supports_flex_attn = True
    # Draft tokens per round where neither the checkpoint nor the user says otherwise: the steps of EAGLE-3's training.
    default_num_assistant_tokens = 7

    def __init__(self, config: Eagle3MLAConfig):
        super().__init__(config)
        if os.path.isdir(config.name_or_path):
            # The decoding code is looked for there, perhaps after the working directory has changed.
            config.name_or_path = os.path.abspath(config.name_or_path)
        hidden_size = config.hidden_size
        if config.owns_embeddings:
            self.embed_tokens = nn.Embedding(config.vocab_size, hidden_size)
        if config.fc_norm:
            norms = [Eagle3MLARMSNorm(config.target_hidden_size, eps=config.rms_norm_eps) for _ in range(3)]
            self.fc_norm = nn.ModuleList(norms)
        self.fc = nn.Linear(3 * config.target_hidden_size, hidden_size, bias=False)
        self.layers = nn.ModuleList(Eagle3MLADecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = Eagle3MLARMSNorm(hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(hidden_size, config.draft_vocab_size, bias=False)
        self.rotary_emb = Eagle3MLARotaryEmbedding(config)
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))
        self.generation_config = GenerationConfig(num_assistant_tokens=self.default_num_assistant_tokens)
        self.speculation_stats = None
        self.generation_package: str | None = None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Random weights, through `transformers.initialization` only: it leaves alone what was loaded."""
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
            init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm):
                init.zeros_(module.bias)
        elif module is self:
            init.zeros_(self.d2t)
            init.copy_(self.t2d, torch.arange(self.config.vocab_size) < self.config.draft_vocab_size)

    def forward(
        self,
        inputs_embeds: Tensor,
        aux_hidden_states: Tensor | None = None,
        fused_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        key_position_ids: Tensor | None = None,
        logits_to_keep: int | None = 0,
        **kwargs,
    ) -> Eagle3MLAOutput:
        """
        Scores of the token after next, given a state of the target (or of the draft) and the next token.

        Args:
            inputs_embeds (`torch.Tensor` of shape `(B, T, D)`):
                Embeddings of the tokens that *follow* the states, from `embed`.
            aux_hidden_states (`torch.Tensor` of shape `(B, T, 3 * Dt)`, *optional*):
                The target's states, from `capture_aux_hidden_states`. Exclusive with `fused_states`.
            fused_states (`torch.Tensor` of shape `(B, T, D)`, *optional*):
                The states that earlier rows fed back.
            position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*):
                RoPE positions of the rows: those of the states. Defaults to counting on from the cache.
            attention_mask (`torch.Tensor` of shape `(B or 1, 1, T, K)`, *optional*):
                Added to the scores, over cached and new positions. Defaults to causal.
            past_key_values (`Cache`, *optional*):
                Latents of earlier rows; extended in place.
            key_position_ids (`torch.LongTensor` of shape `(B, K)`, *optional*):
                RoPE positions of all that the cache returns, cached and new rows. Defaults to cached rows that precede
                the first new one directly.
            logits_to_keep (`int`, *optional*, defaults to 0):
                Return only the last so many rows; 0 returns all. With `None` the rows are remembered alone: the output
                has no logits and no states.

        Returns:
            [`Eagle3MLAOutput`]

        Raises:
            ValueError: If not exactly one of the two kinds of states is given, or the mask is not an additive 4D one.
        """
        if (aux_hidden_states is None) == (fused_states is None):
            raise ValueError("Exactly one of `aux_hidden_states` and `fused_states` must be given.")
        if attention_mask is not None and (attention_mask.dim() != 4 or not attention_mask.is_floating_point()):
            raise ValueError(
                "`attention_mask` must be a floating-point tensor of shape (B, 1, T, K) that is added to the scores, "
                f"got {attention_mask.dtype} of shape {tuple(attention_mask.shape)}."
            )
        states = self.fuse(aux_hidden_states) if fused_states is None else fused_states
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = past_length + torch.arange(states.shape[1], device=states.device)[None]
        cos_sin = key_cos_sin = self.rotary_emb(position_ids, states.dtype)
        if key_position_ids is None and past_length > 0:
            preceding = torch.arange(-past_length, 0, device=states.device)
            key_position_ids = torch.cat([position_ids[:, :1] + preceding, position_ids], dim=1)  # (B, K)
        if key_position_ids is not None:
            key_cos_sin = self.rotary_emb(key_position_ids, states.dtype)
        attention = {
            "cos_sin": cos_sin,
            "key_cos_sin": key_cos_sin,
            "mask": attention_mask,
            "past_key_values": past_key_values,
        }
        *earlier, last = self.layers
        for layer in earlier:
            states = layer(inputs_embeds, states, **attention)
        if logits_to_keep is None:
            last.remember(inputs_embeds, states, cos_sin, past_key_values)
            return Eagle3MLAOutput(past_key_values=past_key_values)
        states = last(inputs_embeds, states, **attention)
        logits, states = self.predict(states[:, -logits_to_keep:] if logits_to_keep > 0 else states)
        return Eagle3MLAOutput(logits=logits, states=states, past_key_values=past_key_values)

    def fuse(self, aux_hidden_states: Tensor) -> Tensor:
        """The three auxiliary states of a position as one state, `(B, T, 3 * Dt)` -> `(B, T, D)`."""
        if self.config.fc_norm:
            parts = zip(self.fc_norm, aux_hidden_states.chunk(3, dim=-1), strict=True)
            aux_hidden_states = torch.cat([norm(states) for norm, states in parts], dim=-1)
        return self.fc(aux_hidden_states)

    def predict(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `(B, T, Vd)` of the last layer's states `(B, T, D)`, and the states to feed back."""
        normed = self.norm(states)
        return self.lm_head(normed), normed if self.config.norm_output else states

    def get_input_embeddings(self) -> nn.Embedding | None:
        """The draft's own token embeddings, `None` where it reads the target's."""
        return self.embed_tokens if self.config.owns_embeddings else None

    def get_output_embeddings(self) -> None:
        """None: the rows of `lm_head` are draft ids, which nobody may tie, resize or save with an adapter."""
        return None

    def embed(self, input_ids: Tensor, target: PreTrainedModel) -> Tensor:
        """Embeddings `(B, T, D)` of target ids `(B, T)`: the target's own, unless the draft carries some."""
        embedding = self.embed_tokens if self.config.owns_embeddings else target.get_input_embeddings()
        if not embedding.weight.is_meta:  # else accelerate fetches the weights, and moves the ids to them
            input_ids = input_ids.to(embedding.weight.device)
        return embedding(input_ids).to(self.fc.weight.device, self.fc.weight.dtype)

    def draft_to_target(self, draft_ids: Tensor) -> Tensor:
        """Target ids of draft ids; `d2t` holds offsets."""
        return draft_ids + self.d2t[draft_ids]

    def set_draft_vocabulary(self, draft_ids: Tensor) -> None:
        """
        Chooses the target ids that the draft can predict.

        Args:
            draft_ids (`torch.LongTensor` of shape `(Vd,)`): Target ids in rising order.

        Raises:
            ValueError: If they are not `draft_vocab_size` different ids of the target in rising order.
        """
        expected, vocab_size = self.config.draft_vocab_size, self.config.vocab_size
        if draft_ids.shape != (expected,) or draft_ids[0] < 0 or draft_ids[-1] >= vocab_size:
            raise ValueError(f"`draft_ids` must be {expected} ids between 0 and {vocab_size - 1}, got {draft_ids}.")
        if not (draft_ids[1:] > draft_ids[:-1]).all():
            raise ValueError("`draft_ids` must be different and in rising order.")
        draft_ids = draft_ids.to(self.d2t.device)
        self.d2t.copy_(draft_ids - torch.arange(expected, device=draft_ids.device))
        self.t2d.zero_()
        self.t2d[draft_ids] = True

    def capture_aux_hidden_states(self, target: PreTrainedModel) -> AuxHiddenStates:
        """A context in which every forward of `target` leaves the states that `forward` takes."""
        layer_ids = self.config.eagle_aux_hidden_state_layer_ids
        return AuxHiddenStates(target, layer_ids, self.fc.weight.device, self.fc.weight.dtype)

    def capture_fused_states(self, target: PreTrainedModel) -> FusedStates:
        """A context in which every forward of `target` leaves the `fused_states` that `forward` takes."""
        return FusedStates(target, self)

    def check_target(self, target: PreTrainedModel) -> None:
        """
        Refuses a target that this head was not made for.

        Raises:
            ValueError: If vocabulary, hidden size or number of layers do not fit.
        """
        text_config = target.config.get_text_config(decoder=True)
        expectations = [
            ("vocab_size", self.config.vocab_size, text_config.vocab_size),
            ("target_hidden_size", self.config.target_hidden_size, text_config.hidden_size),
        ]
        if self.config.target_num_hidden_layers is not None:
            num_layers = self.config.target_num_hidden_layers
            expectations.append(("target_num_hidden_layers", num_layers, text_config.num_hidden_layers))
        for name, expected, actual in expectations:
            if expected != actual:
                raise ValueError(
                    f"The draft was made for another target: its `{name}` is {expected}, the target's is {actual}. "
                    "Load the draft of this target, or train one with scripts/train_eagle3.py."
                )
        embedding_size = target.get_input_embeddings().weight.shape[-1]
        if not self.config.owns_embeddings and embedding_size != self.config.hidden_size:
            raise ValueError(
                f"The target's embeddings must have the draft's `hidden_size` ({self.config.hidden_size}), got "
                f"{embedding_size}. Give the draft its own with `has_own_embeddings=True`."
            )
        last_layer_id = self.config.eagle_aux_hidden_state_layer_ids[-1]
        if last_layer_id > text_config.num_hidden_layers:
            raise ValueError(
                f"`eagle_aux_hidden_state_layer_ids` must be at most {text_config.num_hidden_layers}, the number of "
                f"the target's layers, got {last_layer_id}."
            )

    def generate(self, *args, **kwargs):
        """A draft only assists.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "A draft head cannot generate by itself. Call `target.generate(..., assistant_model=draft)`."
        )

    def assisted_decoding(self, target: PreTrainedModel, input_ids: Tensor, **settings):
        """
        Decodes with `target`, this head drafting: what `target.generate(assistant_model=draft)` ends up calling.

        Args:
            target (`PreTrainedModel`): The model whose text is generated.
            input_ids (`torch.LongTensor` of shape `(B, T)`): The prompt.
            settings: As `GenerationMixin._assisted_decoding` gets them.

        Returns:
            `GenerateDecoderOnlyOutput` or `torch.LongTensor`: what `target.generate()` returns without a draft.
        """
        return generation_module(self).generate(target, self, input_ids, **settings)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """
        As `PreTrainedModel.from_pretrained`, but all or nothing.

        Raises:
            ValueError: If the checkpoint lacks a weight or holds one that this configuration has no place for.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        if pretrained_model_name_or_path is not None and os.path.isdir(pretrained_model_name_or_path):
            pretrained_model_name_or_path = os.path.abspath(pretrained_model_name_or_path)
        hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        draft, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        check_loading_info(draft.config, pretrained_model_name_or_path, info)
        check_draft_vocabulary(draft, pretrained_model_name_or_path)
        draft.generation_package = generation_package(draft.config, hub_options)
        return (draft, info) if wants_info else draft

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs) -> None:
        """As `PreTrainedModel.save_pretrained`, and with the code, so that the directory loads anywhere."""
        hub_options = {name: kwargs.pop(name) for name in PUSH_OPTIONS if name in kwargs}
        super().save_pretrained(save_directory, **kwargs)
        if kwargs.get("is_main_process", True):
            self.config.architectures = [Eagle3MLADraftModel.__name__]
            self.config.auto_map = dict(AUTO_MAP)
            self.config.save_pretrained(save_directory)
            copy_code(self, Path(save_directory))
        if push_to_hub:
            repo_id = hub_options.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id, **hub_options)


def check_loading_info(config: Eagle3MLAConfig, source, info: dict) -> None:
    """
    Refuses a checkpoint that filled the model only in part.

    Raises:
        ValueError: Names the two attention types where they are the reason, otherwise the weights.
    """
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if not missing and not unexpected and not info["mismatched_keys"]:
        return
    has_standard = any(name.endswith((".k_proj.weight", ".v_proj.weight")) for name in unexpected)
    has_latent = any(".W_dkv." in name for name in unexpected)
    if has_standard or has_latent:
        found, asked = ("gqa", "mla") if has_standard else ("mla", "gqa")
        raise ValueError(
            f'The checkpoint {source} holds a head with `attention_type="{found}"`, but "{asked}" was asked for. Set '
            f'`attention_type="{found}"` in config.json, or convert the weights: they cannot be opened as "{asked}".'
        )
    raise ValueError(
        f"The checkpoint {source} does not fit its configuration: missing {missing}, unexpected {unexpected}, of "
        f"another shape {sorted(map(str, info['mismatched_keys']))}. Correct config.json or use the checkpoint's own."
    )


def check_draft_vocabulary(draft: Eagle3MLADraftModel, source) -> None:
    """
    Refuses a `d2t` that is not a set of offsets to target ids in rising order, or a `t2d` that says something else.

    Raises:
        ValueError: If it is one of these.
    """
    if draft.d2t.is_meta:
        return
    target_ids = draft.draft_to_target(torch.arange(len(draft.d2t), device=draft.d2t.device))
    is_rising = bool((target_ids.diff() > 0).all())
    if not is_rising or target_ids[0] < 0 or target_ids[-1] >= draft.config.vocab_size:
        raise ValueError(
            f"`d2t` of the checkpoint {source} must hold offsets: draft id + d2t[draft id] must be target ids below "
            f"{draft.config.vocab_size} in rising order. If it holds target ids, subtract 0, 1, 2, ... from them."
        )
    if not torch.equal(draft.t2d.nonzero().flatten(), target_ids):
        raise ValueError(f"`t2d` of the checkpoint {source} must be true at exactly the target ids that `d2t` gives.")


# How the code travels. transformers copies the two files of the root with a model, and finds what they import by a
# regular expression over their text; it knows nothing of the folder `generation/`. So that folder is found beside the
# model (never of another commit), copied into the cache of remote code under the hash of its content, and imported
# from there; an installed package imports its own.

AUTO_MAP = {
    "AutoConfig": "configuration_eagle3_mla.Eagle3MLAConfig",
    "AutoModel": "modeling_eagle3_mla.Eagle3MLADraftModel",
    "AutoModelForCausalLM": "modeling_eagle3_mla.Eagle3MLADraftModel",
}
IS_REMOTE_CODE = __name__.split(".")[0] == "transformers_modules"
HUB_OPTIONS = ("cache_dir", "token", "local_files_only")
PUSH_OPTIONS = ("repo_id", "token", "private", "commit_message", "revision", "create_pr", "tags")


def generation_module(draft: Eagle3MLADraftModel) -> ModuleType:
    """
    The package `generation/` that belongs to `draft`.

    Raises:
        FileNotFoundError: If the place where the draft comes from has none.
    """
    if draft.generation_package is None:
        draft.generation_package = generation_package(draft.config, {})
    if draft.generation_package is None:
        raise FileNotFoundError(
            f"The folder `generation/` is missing beside the draft's weights ({draft.config.name_or_path!r}). Copy it "
            "there from the repository that the draft was made with, or write the draft with `save_pretrained`."
        )
    return importlib.import_module(draft.generation_package)


def generation_package(config: Eagle3MLAConfig, hub_options: dict) -> str | None:
    """Name under which `generation/` can be imported, `None` where the draft comes without it."""
    if not IS_REMOTE_CODE:
        return f"{__package__}.generation"
    if not config.name_or_path:
        return None
    source = generation_source(config, hub_options)
    return install_generation(source) if source.is_dir() else None


def generation_source(config: Eagle3MLAConfig, hub_options: dict) -> Path:
    """Where remote code finds `generation/`: in the model's directory, or in its repository at this code's commit."""
    if os.path.isdir(config.name_or_path):
        return Path(config.name_or_path) / "generation"
    # `auto_map` reads "repository--module.Class" where the code lives in another repository than the weights.
    code_repo, is_elsewhere, _ = getattr(config, "auto_map", AUTO_MAP)["AutoModel"].partition("--")
    repo_id = code_repo if is_elsewhere else config.name_or_path
    commit = __name__.split(".")[-2]
    snapshot = snapshot_download(repo_id, revision=commit, allow_patterns=["generation/*.py"], **hub_options)
    return Path(snapshot) / "generation"


def install_generation(source: Path) -> str:
    """Copies `source` beside this module under the hash of its content, unless it is there; returns its name."""
    files = sorted(source.glob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    name = f"_generation_{digest.hexdigest()[:16]}"
    installed = Path(__file__).parent / name
    if not installed.is_dir():
        with tempfile.TemporaryDirectory(dir=installed.parent) as staging:
            copied = Path(staging) / name
            copied.mkdir()
            for file in files:
                shutil.copyfile(file, copied / file.name)
            try:
                copied.rename(installed)
            except OSError:
                # Another process was faster; a name says what is behind it, so its copy is as good.
                assert installed.is_dir()
        importlib.invalidate_caches()
    return f"{__package__}.{name}"


def copy_code(draft: Eagle3MLADraftModel, directory: Path) -> None:
    """Writes the two root files and `generation/` into `directory`, which may be where they come from."""
    for module in (sys.modules[Eagle3MLAConfig.__module__], sys.modules[__name__]):
        copy_file(Path(module.__file__), directory / Path(module.__file__).name)
    (directory / "generation").mkdir(exist_ok=True)
    for file in Path(generation_module(draft).__file__).parent.glob("*.py"):
        copy_file(file, directory / "generation" / file.name)


def copy_file(source: Path, destination: Path) -> None:
    """Copies by way of a temporary name, so that nobody ever reads half a file."""
    if destination.exists() and destination.samefile(source):
        return
    partial = destination.with_name(destination.name + ".partial")
    shutil.copyfile(source, partial)
    partial.replace(destination)


def install_assistant_hook() -> None:
    """
    Lets `generate(assistant_model=draft)` hand decoding over to a draft that has a method `assisted_decoding`.

    `generate()` looks its decoding method up on the class, so it is wrapped there, once per process however many
    copies of this file are loaded. Assistants of any other kind go the way they always went.
    """
    original = GenerationMixin._assisted_decoding
    method = original
    while method is not None:
        if getattr(method, "hands_over_to_drafts", False):
            return
        method = getattr(method, "__wrapped__", None)

    @functools.wraps(original)
    def _assisted_decoding(self, input_ids, *args, assistant_model=None, **kwargs):
        hand_over = getattr(assistant_model, "assisted_decoding", None)
        if hand_over is None:
            return original(self, input_ids, *args, assistant_model=assistant_model, **kwargs)
        return hand_over(self, input_ids, *args, **kwargs)

    _assisted_decoding.hands_over_to_drafts = True
    GenerationMixin._assisted_decoding = _assisted_decoding


install_assistant_hook()

__all__ = ["Eagle3MLADraftModel", "Eagle3MLAOutput"]
