"""Widening of whole layers: which layouts the projections of an attention and of an MLP connect.

In an added layer, which the small model has not, all heads and neurons are added ones and `output` is all zeros; the
layer then leaves the residual stream alone.
"""

from torch import nn
from widening import (
    HeadPlaces,
    Layout,
    Neurons,
    key_layout,
    norm_factor,
    output_layout,
    padded,
    query_layout,
    rotated,
    tiled,
    value_layout,
    write_linear,
    write_norm,
)


def write_mlp(mlp: nn.Module, small: nn.Module | None, neurons: Neurons, hidden: Layout, output: Layout) -> None:
    """A gated MLP that reads `hidden` and writes `output`."""
    write_part(mlp, small, "gate_proj", neurons.gate, hidden)
    write_part(mlp, small, "up_proj", neurons.up, hidden)
    write_part(mlp, small, "down_proj", output, neurons.product)


def write_grouped_attention(
    attention: nn.Module, small: nn.Module | None, places: HeadPlaces, attention_input: Layout, output: Layout
) -> None:
    """The attention of a Llama, or of a draft with `attention_type="gqa"`."""
    twin_width = attention.config.head_dim
    width = twin_width if small is None else small.config.head_dim
    query_factor = 1.0 if small is None else small.scaling / attention.scaling
    turned, plain = rotated(width, twin_width), padded(width, twin_width)
    write_part(attention, small, "q_proj", query_layout(places, turned), attention_input, query_factor)
    write_part(attention, small, "k_proj", key_layout(places, turned), attention_input)
    write_part(attention, small, "v_proj", value_layout(places, plain), attention_input)
    write_part(attention, small, "o_proj", output, output_layout(places, plain))


def write_latent_attention(
    attention: nn.Module, small: nn.Module, places: HeadPlaces, attention_input: Layout, hidden: Layout
) -> None:
    """The attention of a draft with `attention_type="mla"`; only what RoPE turns needs room for its pairs."""
    latent = tiled(small.latent_dim, attention.latent_dim)
    plain = padded(small.head_dim, attention.head_dim)
    head = plain if small.rope_dim > 0 else rotated(small.head_dim, attention.head_dim)
    write_queries(attention, small, places, head, attention_input, norm_factor(hidden))
    has_norm = small.config.mla_use_kv_norm
    write_part(attention, small, "W_dkv", latent, attention_input, norm_factor(hidden) if has_norm else 1.0)
    if has_norm:
        write_norm(attention.kv_norm, small.kv_norm, latent)
    if small.rope_dim > 0:
        write_part(attention, small, "W_kr", rotated(small.rope_dim, attention.rope_dim), attention_input)
    write_part(attention, small, "W_uk", key_layout(places, head), latent)
    write_part(attention, small, "W_uv", value_layout(places, plain), latent)
    write_part(attention, small, "o_proj", hidden, output_layout(places, plain))


def write_queries(
    attention: nn.Module,
    small: nn.Module,
    places: HeadPlaces,
    head: Layout,
    attention_input: Layout,
    compression_factor: float,
) -> None:
    """The queries of a latent attention, compressed or not, those of decoupled RoPE included."""
    factor = small.scaling / attention.scaling
    query_input, up_projection = attention_input, "q_proj"
    if small.config.mla_q_lora_rank is not None:
        query_input, up_projection = tiled(small.config.mla_q_lora_rank, attention.config.mla_q_lora_rank), "q_b_proj"
        write_part(attention, small, "q_a_proj", query_input, attention_input, compression_factor)
        write_norm(attention.q_a_layernorm, small.q_a_layernorm, query_input)
    write_part(attention, small, up_projection, query_layout(places, head), query_input, factor)
    if small.rope_dim > 0:
        turned = query_layout(places, rotated(small.rope_dim, attention.rope_dim))
        write_part(attention, small, "W_qr", turned, query_input, factor)


def write_part(
    module: nn.Module, small: nn.Module | None, name: str, rows: Layout, columns: Layout, factor: float = 1.0
) -> None:
    """The projection `name` of a module."""
    write_linear(getattr(module, name), None if small is None else getattr(small, name), rows, columns, factor)
