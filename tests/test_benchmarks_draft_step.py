"""The benchmark of a draft step: all variants of one attention type compute the same."""

import pytest
import torch
from reference_benchmarks import benchmark

from eagle3_mla.configuration_eagle3_mla import Eagle3MLAConfig
from eagle3_mla.generation.fused_target import fused_draft_operations
from eagle3_mla.modeling_eagle3_mla import Eagle3MLADraftModel


@pytest.fixture
def draft_step():
    with benchmark("draft_step") as module:
        yield module


def make_config(rope_dim: int) -> Eagle3MLAConfig:
    return Eagle3MLAConfig(
        vocab_size=40,
        draft_vocab_size=30,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        mla_latent_dim=16,
        mla_rope_dim=rope_dim,
        initializer_range=0.2,
        attn_implementation="sdpa",
    )


def make_step(draft_step, rope_dim: int, width: int, dtype: torch.dtype = torch.float32):
    draft = Eagle3MLADraftModel(make_config(rope_dim)).to(dtype)
    memory = tuple(torch.randn(1, 1, 20 + width, size).to(dtype) for size in (16, rope_dim))
    return draft_step.Step(draft, memory, torch.randn(1, width, 32).to(dtype))


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("rope_dim", [0, 8])
@torch.no_grad()
def test_kernel_and_model_run_the_same_layer(draft_step, rope_dim, width):
    step = make_step(draft_step, rope_dim, width)
    torch.testing.assert_close(step.run(step.attend_by_kernel), step.run(step.attend_plain), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rope_dim", [0, 8])
@torch.no_grad()
def test_fused_operations_run_the_same_layer(draft_step, rope_dim):
    step = make_step(draft_step, rope_dim, 3, torch.bfloat16)
    expected = step.run(step.attend_by_kernel)
    with fused_draft_operations(step.draft):
        torch.testing.assert_close(step.run(step.attend_by_kernel), expected)


@torch.no_grad()
def test_new_rows_enter_the_cache_behind_the_context(draft_step):
    step = make_step(draft_step, 8, 3)
    before = [part.clone() for part in step.memory]
    step.run(step.attend_by_kernel)
    for part, old in zip(step.memory, before, strict=True):
        assert (part != old).any(dim=-1)[0, 0].nonzero().flatten().tolist() == [20, 21, 22]


def test_flops_are_those_of_the_formulas(draft_step):
    assert draft_step.flops_per_slot(make_config(8), 3) == 2 * 4 * 3 * (2 * 16 + 8)
    rotated = 2 * 4 * 3 * (8 + 16) + 2 * 16 * 2 * 8
    assert draft_step.flops_per_slot(make_config(0), 3) == rotated
