"""Twins: the large models compute what the small ones compute, in fp64, and their matrices are not empty."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from eagle3_mla.configuration_eagle3_mla import Eagle3MLAConfig
from eagle3_mla.modeling_eagle3_mla import Eagle3MLADraftModel

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-2,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
TWIN_SHAPE = {
    "hidden_size": 60,
    "intermediate_size": 100,
    "num_hidden_layers": 9,
    "num_attention_heads": 12,
    "num_key_value_heads": 3,
    "head_dim": 16,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
TARGETS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3-rope": {"rope_parameters": LLAMA3_ROPE},
    "groups-larger-than-the-twin's": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "two-layers": {"num_hidden_layers": 2},
    "eight-layers": {"num_hidden_layers": 8},
}
TWINS = {
    "all-larger": {},
    "groups-of-two": {"num_attention_heads": 12, "num_key_value_heads": 6},
    "same-heads": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "deeper-only": {**{name: SHAPE[name] for name in TWIN_SHAPE}, "num_hidden_layers": 12},
    "eight-layers": {"num_hidden_layers": 8},
}
DECOUPLED = {"mla_rope_dim": 4, "mla_latent_dim": 6}
DRAFTS = {
    "mla": ({"mla_latent_dim": 6}, {}),
    "rms-norm": ({"mla_latent_dim": 6, "mla_kv_norm_type": "rms_norm"}, {}),
    "no-norm": ({"mla_latent_dim": 6, "mla_use_kv_norm": False}, {}),
    "decoupled": (DECOUPLED, {"mla_rope_dim": 12}),
    "decoupled-same-size": (DECOUPLED, {"mla_latent_dim": 6}),
    "query-compression": ({"mla_latent_dim": 6, "mla_q_lora_rank": 5}, {"mla_q_lora_rank": 15}),
    "engine": ({**DECOUPLED, "mla_q_lora_rank": 5, "mla_kv_norm_type": "rms_norm"}, {"mla_rope_dim": 8}),
    "gqa": ({"attention_type": "gqa"}, {}),
    "embed-residual-and-fc-norm": ({"mla_latent_dim": 6, "embed_residual": True, "fc_norm": True}, {}),
    "norm-output": ({"mla_latent_dim": 6, "norm_output": True}, {}),
    "own-embeddings": ({"mla_latent_dim": 6, "has_own_embeddings": True}, {}),
    "two-layers": ({"mla_latent_dim": 6, "num_hidden_layers": 2}, {}),
    "own-heads": ({"mla_latent_dim": 6, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4}, {}),
    "other-places": ({"mla_latent_dim": 6, "eagle_aux_hidden_state_layer_ids": [0, 1, 3]}, {}),
    "llama3-rope": ({"mla_latent_dim": 6, "rope_parameters": LLAMA3_ROPE}, {}),
}


@pytest.fixture
def twin(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("twin")
    for name in ("twin", "widening", "widening_layers"):
        sys.modules.pop(name)


@pytest.fixture(autouse=True)
def exact_norms(monkeypatch):
    """Llama's norm computes in fp32 whatever its input is, which would hide everything below 1e-7."""

    def forward(self, hidden_states):
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@torch.no_grad()
def randomise(model):
    """In fp64 and ready, with norms and biases that are no ones and zeros."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double().eval()


def make_target(**fields) -> LlamaForCausalLM:
    return randomise(LlamaForCausalLM(LlamaConfig(**SHAPE | fields)))


def make_draft(target, **fields) -> Eagle3MLADraftModel:
    fields = {"draft_vocab_size": 29, "initializer_range": 0.2, **fields}
    draft = randomise(Eagle3MLADraftModel(Eagle3MLAConfig.from_target(target.config, **fields)))
    draft.set_draft_vocabulary(torch.arange(2, 31))
    return draft


def make_prompt(length: int = 40) -> torch.Tensor:
    return torch.randint(1, SHAPE["vocab_size"], (2, length))


def assert_padded(states, small_states):
    """Equal up to rounding in fp64, and nothing but zeros beside."""
    width = small_states.shape[-1]
    torch.testing.assert_close(states[..., :width], small_states, rtol=1e-10, atol=1e-10)
    assert not states[..., width:].any()


@torch.no_grad()
def read(target, draft, input_ids):
    """The target's logits and auxiliary states, the draft's logits and states."""
    with draft.capture_aux_hidden_states(target) as captured:
        logits = target(input_ids).logits
        aux_hidden_states = captured.take()
    outputs = draft(draft.embed(input_ids, target), aux_hidden_states=aux_hidden_states)
    again = draft(draft.embed(input_ids, target), fused_states=outputs.states)
    return logits, aux_hidden_states.unflatten(-1, (3, -1)), outputs, again


def assert_same_function(models, twins):
    input_ids = make_prompt()
    logits, aux_hidden_states, *outputs = read(*models, input_ids)
    twin_logits, twin_aux_hidden_states, *twin_outputs = read(*twins, input_ids)
    torch.testing.assert_close(twin_logits, logits, rtol=1e-10, atol=1e-10)
    assert_padded(twin_aux_hidden_states, aux_hidden_states)
    for twin_output, output in zip(twin_outputs, outputs, strict=True):
        torch.testing.assert_close(twin_output.logits, output.logits, rtol=1e-10, atol=1e-10)
        assert_padded(twin_output.states, output.states)


def generate(target, draft, **settings):
    """Texts, and what each round accepted."""
    torch.manual_seed(3)
    texts = target.generate(make_prompt(7), assistant_model=draft, max_new_tokens=40, **settings)
    return texts.tolist(), draft.speculation_stats.acceptance_lengths


def make_twins(twin, target, draft, shape=None, mla_sizes=None):
    twin_target = twin.widen_target(target, twin.TwinShape(**TWIN_SHAPE | (shape or {})))
    return twin_target, twin.widen_draft(draft, twin_target.config, **mla_sizes or {})


@pytest.mark.parametrize("shape", TWINS.values(), ids=TWINS)
@pytest.mark.parametrize("fields", TARGETS.values(), ids=TARGETS)
def test_a_twin_of_any_target_computes_the_same(twin, fields, shape):
    target = make_target(**fields)
    draft = make_draft(target)
    assert_same_function((target, draft), make_twins(twin, target, draft, shape))


def test_a_twin_may_be_tied_as_the_small_target(twin):
    target = make_target(tie_word_embeddings=True)
    draft = make_draft(target)
    twins = make_twins(twin, target, draft, {"tie_word_embeddings": True})
    assert twins[0].lm_head.weight is twins[0].model.embed_tokens.weight
    assert_same_function((target, draft), twins)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("fields", "mla_sizes"), DRAFTS.values(), ids=DRAFTS)
def test_a_twin_of_any_head_computes_the_same(twin, fields, mla_sizes, attention):
    target = make_target()
    draft = make_draft(target, **fields)
    draft.set_attn_implementation(attention)
    twins = make_twins(twin, target, draft, mla_sizes=mla_sizes)
    assert twins[1].config._attn_implementation == attention
    assert_same_function((target, draft), twins)


@pytest.mark.parametrize("rope_dim", [0, 4])
@pytest.mark.parametrize("rope_type", ["yarn", "dynamic"])
def test_rope_that_cannot_be_widened_may_stay(twin, rope_type, rope_dim):
    """Each of these makes frequencies depend on the width itself."""
    target = make_target(rope_parameters=YARN_ROPE | {"rope_type": rope_type})
    draft = make_draft(target, mla_latent_dim=6, mla_rope_dim=rope_dim)
    assert_same_function((target, draft), make_twins(twin, target, draft, {"head_dim": 8}))
    with pytest.raises(ValueError, match=rf"`head_dim` of the twin must be 8 with RoPE of the type '{rope_type}'"):
        make_twins(twin, target, draft, {"head_dim": 16})
