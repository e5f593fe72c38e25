"""Attention to a row's own keys against softmax over a matrix that shows every row its own keys only."""

import pytest
import torch
from torch.autograd import gradcheck

from eagle3_mla.training import own_attention as module
from eagle3_mla.training.own_attention import attend_by_sums, differentiate_by_sums, own_attention

# Batch, query heads, key-value heads, tokens, head dimension, rope dimension, own keys.
SHAPES = {
    "B2-H4-G2-T5-d3-R0-k3": (2, 4, 2, 5, 3, 0, 3),
    "B1-H3-G1-T4-d4-R2-k1": (1, 3, 1, 4, 4, 2, 1),
    "B1-H8-G2-T19-d8-R6-k6": (1, 8, 2, 19, 8, 6, 6),
}


def random_inputs(shape, dtype=torch.float64, device="cpu") -> list[torch.Tensor]:
    batch_size, num_heads, num_groups, num_tokens, head_dim, rope_dim, num_own = shape
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (batch_size, num_heads, num_tokens, head_dim + rope_dim),
        (num_own, batch_size, num_groups, num_tokens, head_dim + rope_dim),
        (num_own, batch_size, num_groups, num_tokens, head_dim),
    ]
    tensors = [torch.randn(*size, dtype=torch.float64, generator=generator) for size in shapes]
    return [tensor.to(device, dtype).requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("shape", SHAPES)
def test_own_attention_is_softmax_over_the_own_keys(shape):
    query, own_keys, own_values = random_inputs(SHAPES[shape])
    output, lse = own_attention(query, own_keys, own_values, 0.7)
    group = query.shape[1] // own_keys.shape[2]
    for head in range(query.shape[1]):
        keys, values = own_keys[:, :, head // group], own_values[:, :, head // group]  # (k, B, T, ...)
        scores = torch.einsum("btd,kbtd->kbt", query[:, head], keys) * 0.7
        expected = torch.einsum("kbt,kbtd->btd", scores.softmax(dim=0), values)
        torch.testing.assert_close(output[:, head], expected, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(lse[:, head], scores.logsumexp(dim=0), atol=1e-12, rtol=1e-12)


def random_base(shape, dtype=torch.float64, device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
    batch_size, num_heads, _, num_tokens, head_dim, _, _ = shape
    generator = torch.Generator().manual_seed(2)
    output = torch.randn(batch_size, num_heads, num_tokens, head_dim, dtype=torch.float64, generator=generator)
    lse = torch.randn(batch_size, num_heads, num_tokens, dtype=torch.float64, generator=generator)
    lse_dtype = torch.promote_types(dtype, torch.float32)
    return output.to(device, dtype).requires_grad_(), lse.to(device, lse_dtype).requires_grad_()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_base_counts_as_one_more_key(shape):
    query, own_keys, own_values = random_inputs(SHAPES[shape])
    base_output, base_lse = random_base(SHAPES[shape])
    joined, joined_lse = own_attention(query, own_keys, own_values, 0.7, (base_output, base_lse))
    own, own_lse = own_attention(query, own_keys, own_values, 0.7)
    weights = torch.stack([base_lse, own_lse]).softmax(dim=0).unsqueeze(-1)
    torch.testing.assert_close(joined, weights[0] * base_output + weights[1] * own, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(joined_lse, torch.logaddexp(base_lse, own_lse), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("has_base", [False, True])
@pytest.mark.parametrize("shape", list(SHAPES)[:2])
def test_gradients_of_own_attention_are_its_differences(shape, has_base):
    base = random_base(SHAPES[shape]) if has_base else ()
    assert gradcheck(
        lambda query, keys, values, *base: own_attention(query, keys, values, 0.7, base or None),
        [*random_inputs(SHAPES[shape]), *base],
    )


def compare_with_triton(shape, dtype: torch.dtype, device: str, tolerance: float, has_base: bool) -> None:
    """Kernels against fp64, inputs in the order in which the model's projections leave them."""
    from eagle3_mla.training import own_attention_triton

    inputs = [
        tensor.detach().transpose(-2, -3).contiguous().transpose(-2, -3)
        for tensor in random_inputs(shape, dtype, device)
    ]
    base = tuple(tensor.detach() for tensor in random_base(shape, dtype, device)) if has_base else None
    exact, exact_base = [tensor.double() for tensor in inputs], base and tuple(tensor.double() for tensor in base)
    output, lse = own_attention_triton.attend(*inputs, 0.7, base)
    exact_output, exact_lse = attend_by_sums(*exact, 0.7, exact_base)
    generator = torch.Generator().manual_seed(1)
    gradients = [
        torch.randn(tensor.shape, dtype=torch.float64, generator=generator).to(device) for tensor in (output, lse)
    ]
    for lse_gradient in (None, gradients[1]):
        exact_gradients = exact_output, exact_lse, 0.7, gradients[0], lse_gradient, exact_base
        expected = differentiate_by_sums(*exact, *exact_gradients)
        rounded = None if lse_gradient is None else lse_gradient.float()
        actual = own_attention_triton.differentiate(*inputs, output, lse, 0.7, gradients[0].to(dtype), rounded, base)
        for result, reference in zip((output, lse, *actual), (exact_output, exact_lse, *expected), strict=True):
            if reference is None:
                assert result is None
                continue
            error = (result.double() - reference).abs().max() / reference.abs().max().clamp(min=1)
            assert error <= tolerance


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_base", [False, True])
def test_triton_kernels_compute_own_attention_in_the_interpreter(shape, has_base):
    pytest.importorskip("triton")
    compare_with_triton(SHAPES[shape], torch.float32, "cpu", 1e-5, has_base)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES.values(), (2, 32, 8, 300, 128, 64, 6)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("has_base", [False, True])
def test_triton_kernels_compute_own_attention_on_a_gpu(shape, dtype, tolerance, has_base):
    compare_with_triton(shape, dtype, "cuda", tolerance, has_base)


def test_double_precision_never_goes_through_float32_kernels():
    assert not module.runs_on_triton(torch.zeros(1, dtype=torch.float64))
