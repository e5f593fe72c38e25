"""Attention of every row to the keys that it alone sees: those that it produced itself at earlier TTT steps.

One query meets k keys, and no two rows share one, so that there is no matrix product to make: the work is reading k
keys and values once. On a GPU kernels do it (`own_attention_triton.py`); elsewhere sums of products. The row's
attention to its document, made elsewhere, may join as `base`: an output o_0 whose log-sum-exp l_0 counts as one more
score. Forward and backward are written out,

    s_m = scaling q . k_m,  l = log(exp l_0 + sum_m exp s_m),  p_m = exp(s_m - l),  o = p_0 o_0 + sum_m p_m v_m
    ds_m = p_m (do . v_m - do . o + dl),  dq = scaling sum_m ds_m k_m,  dk_m = scaling ds_m q,  dv_m = p_m do
    dl_0 = p_0 (do . o_0 - do . o + dl),  do_0 = p_0 do

so that nothing but inputs, `o` and `l` is kept.

Shapes: B batch, T tokens, H heads, G key-value heads, d head dimension, R rope dimension, k own keys per row.
"""

import torch
from torch import Tensor

Base = tuple[Tensor, Tensor]


def own_attention(
    query: Tensor, own_keys: Tensor, own_values: Tensor, scaling: float, base: Base | None = None
) -> tuple[Tensor, Tensor]:
    """
    Attention of row i to the i-th entries of the own keys.

    Args:
        query (`torch.Tensor` of shape `(B, H, T, d + R)`): Queries.
        own_keys (`torch.Tensor` of shape `(k, B, G, T, d + R)`): Keys.
        own_values (`torch.Tensor` of shape `(k, B, G, T, d)`): Values.
        scaling (`float`): Factor on the scores.
        base (`tuple[torch.Tensor, torch.Tensor]`, *optional*): Output `(B, H, T, d)` and log-sum-exp of the scores
            `(B, H, T)` of an attention over other keys, with which this one shares its softmax.

    Returns:
        The output `(B, H, T, d)` and the log-sum-exp of all scores `(B, H, T)`, the latter in float32 or wider.
    """
    return _OwnAttention.apply(query, own_keys, own_values, scaling, *(base or (None, None)))


class _OwnAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, own_keys, own_values, scaling, base_output, base_lse):
        attend = _triton().attend if runs_on_triton(query) else attend_by_sums
        base = None if base_output is None else (base_output, base_lse)
        output, lse = attend(query, own_keys, own_values, scaling, base)
        ctx.save_for_backward(query, own_keys, own_values, output, lse, base_output, base_lse)
        ctx.scaling = scaling
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    def backward(ctx, output_gradient, lse_gradient):
        *saved, base_output, base_lse = ctx.saved_tensors
        base = None if base_output is None else (base_output, base_lse)
        differentiate = _triton().differentiate if runs_on_triton(saved[0]) else differentiate_by_sums
        if output_gradient is None:
            output_gradient = torch.zeros_like(saved[3])
        gradients = differentiate(*saved, ctx.scaling, output_gradient, lse_gradient, base)
        return *gradients[:3], None, *gradients[3:]


def runs_on_triton(query: Tensor) -> bool:
    return query.is_cuda and query.dtype != torch.float64


def own_scores(query: Tensor, own_keys: Tensor, scaling: float) -> Tensor:
    """Scores of every row against its own keys, `(k, B, G, H/G, T)`, in float32 or wider."""
    grouped = group_heads(query, own_keys.shape[2])
    dtype = torch.promote_types(query.dtype, torch.float32)
    # Products and sums: a batched product of one query and one key is ten times slower on a CPU.
    return torch.stack([(grouped * key.unsqueeze(2)).sum(dim=-1, dtype=dtype) for key in own_keys]) * scaling


def own_output(probs: Tensor, own_values: Tensor) -> Tensor:
    """Sum of a row's own values, weighted by `probs (k, B, G, H/G, T)`: `(B, H, T, d)`."""
    terms = [prob.unsqueeze(-1) * value.unsqueeze(2) for prob, value in zip(probs, own_values, strict=True)]
    return sum(terms).flatten(1, 2)


def attend_by_sums(
    query: Tensor, own_keys: Tensor, own_values: Tensor, scaling: float, base: Base | None = None
) -> tuple[Tensor, Tensor]:
    """`own_attention` by sums of products."""
    scores = own_scores(query, own_keys, scaling)
    output = own_output(scores.softmax(dim=0).to(own_values.dtype), own_values)
    lse = scores.logsumexp(dim=0).flatten(1, 2)
    if base is None:
        return output, lse
    base_output, base_lse = base
    own_share = torch.sigmoid(lse - base_lse).unsqueeze(-1).to(output.dtype)
    return torch.lerp(base_output, output, own_share), torch.logaddexp(lse, base_lse)


def differentiate_by_sums(
    query: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    output: Tensor,
    lse: Tensor,
    scaling: float,
    output_gradient: Tensor,
    lse_gradient: Tensor | None,
    base: Base | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, own keys, own values, base output and base log-sum-exp by sums of products."""
    num_groups = own_keys.shape[2]
    grouped = group_heads(query, num_groups)
    gradient = group_heads(output_gradient, num_groups)  # (B, G, H/G, T, d)
    offset = -(output_gradient * output).sum(dim=-1, dtype=lse.dtype)
    offset = offset if lse_gradient is None else offset + lse_gradient
    base_gradients = None, None
    if base is not None:
        prob = (base[1] - lse).exp()
        products = (output_gradient * base[0]).sum(dim=-1, dtype=lse.dtype)
        base_gradients = prob.unsqueeze(-1).to(output.dtype) * output_gradient, prob * (products + offset)
    lse, offset = group_heads(lse, num_groups), group_heads(offset, num_groups)  # (B, G, H/G, T)
    query_gradient = torch.zeros_like(grouped)
    key_gradients, value_gradients = torch.empty_like(own_keys), torch.empty_like(own_values)
    scores = own_scores(query, own_keys, scaling)
    for index, (key, value) in enumerate(zip(own_keys, own_values, strict=True)):
        probs = (scores[index] - lse).exp()
        value_products = (gradient * value.unsqueeze(2)).sum(dim=-1, dtype=lse.dtype)
        score_gradient = (probs * (value_products + offset) * scaling).to(query.dtype).unsqueeze(-1)
        query_gradient += score_gradient * key.unsqueeze(2)
        key_gradients[index] = (score_gradient * grouped).sum(dim=2)
        value_gradients[index] = (probs.to(gradient.dtype).unsqueeze(-1) * gradient).sum(dim=2)
    return query_gradient.flatten(1, 2), key_gradients, value_gradients, *base_gradients


def group_heads(tensor: Tensor, num_groups: int) -> Tensor:
    """`(B, H, ...)` as `(B, G, H/G, ...)`: the query heads that share a key-value head, side by side."""
    return tensor.unflatten(1, (num_groups, -1))


def _triton():
    """Imported late: Triton is there where CUDA is."""
    from . import own_attention_triton

    return own_attention_triton
