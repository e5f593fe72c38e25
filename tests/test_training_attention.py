"""The three forms of the joint attention against each other, outputs and gradients."""

import logging

import pytest
import torch

from eagle3_mla.training.attention import (
    is_plain_causal,
    joint_attention,
    step_zero_mask,
    trainable_backend,
)

DOCUMENTS = {
    "plain": [[1] * 9, [1] * 9],
    "right-padded": [[1] * 7 + [0] * 2, [1] * 9],
    "left-padded": [[0] * 3 + [1] * 6, [1] * 9],
    "packed": [[1] * 4 + [2] * 3 + [0] * 2, [1] * 2 + [2] * 7],
    "one-row-all-padding": [[0] * 9, [1] * 9],
}
# Query heads, key-value heads, head dimension, rope dimension.
SHAPES = {"H4-G2-d8-R0": (4, 2, 8, 0), "H4-G4-d8-R4": (4, 4, 8, 4), "H3-G1-d6-R2": (3, 1, 6, 2)}


def random_inputs(shape, num_own_keys: int, batch_size=2, num_tokens=9, dtype=torch.float64, device="cpu") -> dict:
    num_heads, num_groups, head_dim, rope_dim = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int):
        tensor = torch.randn(*shape, dtype=torch.float64, generator=generator)
        return tensor.to(device, dtype).requires_grad_()

    inputs = {
        "query": normal(batch_size, num_heads, num_tokens, head_dim + rope_dim),
        "key": normal(batch_size, num_groups, num_tokens, head_dim + rope_dim),
        "value": normal(batch_size, num_groups, num_tokens, head_dim),
    }
    if num_own_keys == 0:
        return inputs | {"own_keys": None, "own_values": None}
    return inputs | {
        "own_keys": normal(num_own_keys, batch_size, num_groups, num_tokens, head_dim + rope_dim),
        "own_values": normal(num_own_keys, batch_size, num_groups, num_tokens, head_dim),
    }


def leaves(inputs: dict) -> list[torch.Tensor]:
    return [tensor for tensor in inputs.values() if tensor is not None]


def joint_output(backend: str, inputs: dict, document_ids: torch.Tensor) -> torch.Tensor:
    """Output of the rows that are not padding; what padding sees is nobody's business, as long as it is finite."""
    output = joint_attention(backend, **inputs, mask=step_zero_mask(backend, document_ids), scaling=0.3)
    assert output.isfinite().all()
    return output * (document_ids > 0)[:, None, :, None]


def output_and_gradients(backend: str, inputs: dict, document_ids: torch.Tensor) -> list[torch.Tensor]:
    output = joint_output(backend, inputs, document_ids)
    direction = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return [output, *torch.autograd.grad(output, leaves(inputs), direction.to(output))]


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_own_keys", [0, 1, 3])
def test_sdpa_is_eager_in_output_and_gradient(documents, shape, num_own_keys):
    inputs, document_ids = random_inputs(SHAPES[shape], num_own_keys), torch.tensor(DOCUMENTS[documents])
    eager = output_and_gradients("eager", inputs, document_ids)
    sdpa = output_and_gradients("sdpa", inputs, document_ids)
    assert all(tensor.isfinite().all() for tensor in sdpa)
    torch.testing.assert_close(sdpa, eager, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("shape", ["H4-G2-d8-R0", "H4-G4-d8-R4"])
@pytest.mark.parametrize("num_own_keys", [0, 3])
def test_flex_attention_is_eager_in_output(documents, shape, num_own_keys):
    inputs, document_ids = random_inputs(SHAPES[shape], num_own_keys), torch.tensor(DOCUMENTS[documents])
    for tensor in leaves(inputs):
        tensor.requires_grad_(False)
    eager, flex = (joint_output(backend, inputs, document_ids) for backend in ("eager", "flex_attention"))
    torch.testing.assert_close(flex, eager, atol=1e-6, rtol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [100, 256, 300])
@pytest.mark.parametrize("num_own_keys", [0, 6])
def test_flex_and_sdpa_are_as_exact_as_eager_on_a_gpu(dtype, num_tokens, num_own_keys):
    """Outputs and gradients against fp64, with padding on both sides, two documents in a row and odd lengths."""
    document_ids = torch.ones(3, num_tokens, dtype=torch.long, device="cuda")
    document_ids[0, -13:], document_ids[1, :17], document_ids[2, 40:] = 0, 0, 2
    inputs = random_inputs((8, 2, 64, 0), num_own_keys, 3, num_tokens, dtype, "cuda")
    exact_inputs = random_inputs((8, 2, 64, 0), num_own_keys, 3, num_tokens, torch.float64, "cuda")
    with torch.no_grad():
        for tensor, rounded in zip(leaves(exact_inputs), leaves(inputs), strict=True):
            tensor.copy_(rounded)
    exact = output_and_gradients("eager", exact_inputs, document_ids)
    # TF32 products, which the compiled kernel uses for float32, keep 10 bits.
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-3
    for backend in ("eager", "sdpa", "flex_attention"):
        for actual, expected in zip(output_and_gradients(backend, inputs, document_ids), exact, strict=True):
            error = (actual.double() - expected).abs().max() / expected.abs().max()
            assert error <= tolerance, backend


def test_half_precision_sdpa_is_as_exact_as_half_precision_eager():
    """Scores near 200 leave a bfloat16 component with an error near 1; the second component must carry the rest."""
    inputs = random_inputs((4, 2, 64, 0), 3, num_tokens=64)
    document_ids = torch.ones(2, 64, dtype=torch.long)
    with torch.no_grad():
        half = {name: tensor.bfloat16() for name, tensor in inputs.items()}
        exact_inputs = {name: tensor.double() for name, tensor in half.items()}
        mask = step_zero_mask("eager", document_ids)
        exact = joint_attention("eager", **exact_inputs, mask=mask, scaling=6.0)
        eager = joint_attention("eager", **half, mask=mask, scaling=6.0)
        sdpa = joint_attention("sdpa", **half, mask=None, scaling=6.0)
    assert (sdpa - exact).abs().mean() <= 1.5 * (eager - exact).abs().mean()


def test_only_a_document_from_the_first_token_on_needs_no_mask():
    plain = {name: is_plain_causal(torch.tensor(documents)) for name, documents in DOCUMENTS.items()}
    assert plain == {
        "plain": True,
        "right-padded": True,
        "left-padded": False,
        "packed": False,
        "one-row-all-padding": True,
    }
    assert step_zero_mask("sdpa", torch.tensor(DOCUMENTS["right-padded"])) is None
    assert not is_plain_causal(torch.tensor([[1, 0, 1]]))


def test_flex_attention_falls_back_to_sdpa_on_a_cpu_and_says_so_once(caplog):
    with caplog.at_level(logging.WARNING, logger="eagle3_mla.training.attention"):
        backends = [trainable_backend("flex_attention", torch.device("cpu")) for _ in range(3)]
    assert backends == ["sdpa"] * 3
    assert len(caplog.records) <= 1
    assert trainable_backend("flex_attention", torch.device("cuda")) == "flex_attention"
    assert trainable_backend("eager", torch.device("cpu")) == "eager"
