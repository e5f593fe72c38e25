"""The draft head again, slow and obvious: one query at a time, keys and values expanded, written from the equations.

Everything is fp64 and reads a plain dictionary of weights, so that nothing of the model's code takes part.

Letters: T rows, H heads, G key-value heads, d head width, R decoupled RoPE.
"""

import torch
from torch import Tensor


def reference_head(config, weights: dict[str, Tensor], embeds: Tensor, aux=None, fused=None):
    """
    Logits and fed-back states of rows 0 ... T - 1 at positions 0 ... T - 1, each seeing itself and earlier rows.

    `embeds (T, D)`, `aux (T, 3 * Dt)` or `fused (T, D)` -> `(T, Vd)`, `(T, D)`.
    """
    states = fuse(config, weights, aux) if fused is None else fused
    for layer in range(config.num_hidden_layers):
        states = reference_layer(config, weights, f"layers.{layer}.", embeds, states, is_first=layer == 0)
    normed = rms_norm(states, weights["norm.weight"], config.rms_norm_eps)
    return normed @ weights["lm_head.weight"].T, normed if config.norm_output else states


def fuse(config, weights, aux):
    parts = list(aux.chunk(3, dim=-1))
    if config.fc_norm:
        parts = [rms_norm(part, weights[f"fc_norm.{i}.weight"], config.rms_norm_eps) for i, part in enumerate(parts)]
    return torch.cat(parts, dim=-1) @ weights["fc.weight"].T


def reference_layer(config, weights, prefix, embeds, states, is_first):
    eps = config.rms_norm_eps
    if is_first:
        normed_embeds = rms_norm(embeds, weights[prefix + "input_layernorm.weight"], eps)
        normed_states = rms_norm(states, weights[prefix + "hidden_norm.weight"], eps)
        attention_input = torch.cat([normed_embeds, normed_states], dim=-1)
    else:
        attention_input = rms_norm(states, weights[prefix + "input_layernorm.weight"], eps)
    if is_first and config.embed_residual:
        states = states + normed_embeds @ weights[prefix + "embed_proj.weight"].T
    project = project_mla if config.attention_type == "mla" else project_gqa
    queries, keys, values = project(config, weights, prefix + "self_attn.", attention_input)
    states = states + causal_heads(queries, keys, values) @ weights[prefix + "self_attn.o_proj.weight"].T
    normed = rms_norm(states, weights[prefix + "post_attention_layernorm.weight"], eps)
    gate = torch.nn.functional.silu(normed @ weights[prefix + "mlp.gate_proj.weight"].T)
    up = normed @ weights[prefix + "mlp.up_proj.weight"].T
    return states + (gate * up) @ weights[prefix + "mlp.down_proj.weight"].T


def project_mla(config, weights, prefix, attention_input):
    """Queries `(H, T, d + R)`, keys `(H, T, d + R)` and values `(H, T, d)` of an MLA head."""
    num_heads, groups = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    query_input, name = attention_input, "q_proj"
    if config.mla_q_lora_rank is not None:
        query_input = attention_input @ weights[prefix + "q_a_proj.weight"].T
        query_input = rms_norm(query_input, weights[prefix + "q_a_layernorm.weight"], config.rms_norm_eps)
        name = "q_b_proj"
    queries = heads(query_input @ weights[f"{prefix}{name}.weight"].T, num_heads)
    latents = attention_input @ weights[prefix + "W_dkv.weight"].T
    if config.mla_use_kv_norm and config.mla_kv_norm_type == "rms_norm":
        latents = rms_norm(latents, weights[prefix + "kv_norm.weight"], config.rms_norm_eps)
    elif config.mla_use_kv_norm:
        weight, bias = weights[prefix + "kv_norm.weight"], weights[prefix + "kv_norm.bias"]
        latents = layer_norm(latents, weight, bias, config.rms_norm_eps)
    keys = heads(latents @ weights[prefix + "W_uk.weight"].T, config.num_key_value_heads)
    values = heads(latents @ weights[prefix + "W_uv.weight"].T, config.num_key_value_heads)
    keys, values = keys.repeat_interleave(groups, dim=0), values.repeat_interleave(groups, dim=0)
    theta = config.rope_parameters["rope_theta"]
    if config.mla_rope_dim == 0:
        return rope(queries, theta), rope(keys, theta), values
    q_rope = rope(heads(query_input @ weights[prefix + "W_qr.weight"].T, num_heads), theta)
    k_rope = rope((attention_input @ weights[prefix + "W_kr.weight"].T)[None], theta).expand(num_heads, -1, -1)
    return torch.cat([queries, q_rope], dim=-1), torch.cat([keys, k_rope], dim=-1), values


def project_gqa(config, weights, prefix, attention_input):
    """Queries, keys and values, each `(H, T, d)`, of a standard head."""
    groups = config.num_attention_heads // config.num_key_value_heads
    theta = config.rope_parameters["rope_theta"]
    queries = heads(attention_input @ weights[prefix + "q_proj.weight"].T, config.num_attention_heads)
    keys = heads(attention_input @ weights[prefix + "k_proj.weight"].T, config.num_key_value_heads)
    values = heads(attention_input @ weights[prefix + "v_proj.weight"].T, config.num_key_value_heads)
    keys, values = keys.repeat_interleave(groups, dim=0), values.repeat_interleave(groups, dim=0)
    return rope(queries, theta), rope(keys, theta), values


def causal_heads(queries, keys, values):
    """Attention of every row over itself and earlier ones, heads side by side, `(T, H * d)`."""
    num_heads, num_rows, width = queries.shape
    outputs = torch.zeros(num_rows, num_heads, values.shape[-1], dtype=queries.dtype)
    for head in range(num_heads):
        for row in range(num_rows):
            scores = keys[head, : row + 1] @ queries[head, row] / width**0.5
            outputs[row, head] = scores.softmax(dim=0) @ values[head, : row + 1]
    return outputs.flatten(1)


def heads(states, num_heads):
    return states.unflatten(-1, (num_heads, -1)).transpose(0, 1)


def rope(states, theta):
    """Rotates the pairs (i, i + width / 2) of `(H, T, width)` by position * theta^(-2 i / width)."""
    half = states.shape[-1] // 2
    rotated = states.clone()
    for position in range(states.shape[1]):
        for pair in range(half):
            # The frequencies are fp32, as every implementation keeps them.
            frequency = torch.tensor(theta, dtype=torch.float32) ** -(torch.tensor(2.0 * pair) / (2 * half))
            angle = (position * frequency).float()
            cos, sin = angle.cos().double(), angle.sin().double()
            first, second = states[:, position, pair], states[:, position, pair + half]
            rotated[:, position, pair] = first * cos - second * sin
            rotated[:, position, pair + half] = second * cos + first * sin
    return rotated


def rms_norm(states, weight, eps):
    return states / (states.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def layer_norm(states, weight, bias, eps):
    centred = states - states.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight + bias
