"""The benchmark of a draft step: all variants of one attention type compute the same."""

import pytest
import torch
from reference_benchmarks import benchmark

from eagle3_mla.configuration_eagle3_mla import Eagle3MLAConfig
from eagle3_mla.modeling_eagle3_mla import Eagle3MLADecoderLayer


@pytest.fixture
def draft_step():
    with benchmark("draft_step") as module:
        yield module


def make_step(draft_step, rope_dim: int, width: int):
    config = Eagle3MLAConfig(
        vocab_size=40,
        draft_vocab_size=30,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        mla_latent_dim=16,
        mla_rope_dim=rope_dim,
        attn_implementation="sdpa",
    )
    layer = Eagle3MLADecoderLayer(config, layer_idx=0)
    memory = torch.randn(1, 1, 20 + width, 16), torch.randn(1, 1, 20 + width, rope_dim)
    return draft_step.Step(layer, memory, torch.randn(1, width, 32))


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("rope_dim", [0, 8])
@torch.no_grad()
def test_kernel_and_model_run_the_same_layer(draft_step, rope_dim, width):
    step = make_step(draft_step, rope_dim, width)
    torch.testing.assert_close(step.run(step.attend_by_kernel), step.run(step.attend_plain), atol=1e-5, rtol=1e-5)


def test_flops_are_those_of_the_formulas(draft_step):
    assert draft_step.flops_per_slot(make_step(draft_step, 8, 3).layer, 3) == 2 * 4 * 3 * (2 * 16 + 8)
    rotated = 2 * 4 * 3 * (8 + 16) + 2 * 16 * 2 * 8
    assert draft_step.flops_per_slot(make_step(draft_step, 0, 3).layer, 3) == rotated
