"""The frozen target as a teacher, and what the draft takes over from it."""

import pytest
import torch
from reference_ttt import tiny_config, tiny_draft, tiny_target
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from eagle3_mla.training import target as target_module
from eagle3_mla.training.initialization import initialize_from_target, is_plain_rms_norm
from eagle3_mla.training.target import Teacher, check_logits_can_be_chunked
from eagle3_mla.training.ttt import TTTDraftModel, taught_positions

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
FAMILIES = {
    "softcapped": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=4, final_logit_softcapping=2.0)),
    "divided": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)),
    "multiplied": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
    "projected": lambda: OPTForCausalLM(
        OPTConfig(vocab_size=40, hidden_size=16, ffn_dim=24, num_hidden_layers=6, num_attention_heads=4, init_std=0.3)
    ),
}


def batch(side: str = "right"):
    torch.manual_seed(1)
    input_ids = torch.randint(1, 40, (3, 11))
    document_ids = torch.ones_like(input_ids)
    document_ids[1, 7:] = 0
    if side == "left":
        document_ids = document_ids.flip(1)
    loss_mask = document_ids.clone()
    loss_mask[:, :3] = 0
    return input_ids, document_ids, taught_positions(loss_mask, document_ids)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("chunk_rows", [4, 1024])
def test_the_lesson_is_what_the_target_says(side, chunk_rows, monkeypatch):
    monkeypatch.setattr(target_module, "CHUNK_ROWS", chunk_rows)
    target, draft = tiny_target().double(), tiny_draft()
    input_ids, document_ids, taught = batch(side)
    lesson = Teacher(target, draft).teach(input_ids, document_ids, taught)
    expected = target(input_ids=input_ids, attention_mask=document_ids, output_hidden_states=True)
    logits = expected.logits[taught]
    torch.testing.assert_close(lesson.logits, logits[:, draft.t2d], atol=1e-10, rtol=1e-10)
    assert torch.equal(lesson.tokens, logits.argmax(dim=-1))
    states = torch.cat([expected.hidden_states[i] for i in draft.config.eagle_aux_hidden_state_layer_ids], dim=-1)
    valid = document_ids.bool()
    torch.testing.assert_close(lesson.aux_hidden_states[valid], states[valid], atol=1e-10, rtol=1e-10)


def test_no_gradient_flows_into_the_target():
    lesson = Teacher(tiny_target().double(), tiny_draft()).teach(*batch())
    assert not any(tensor.requires_grad for tensor in (lesson.aux_hidden_states, lesson.logits))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_that_a_family_transforms_are_chunked_rightly(family):
    torch.manual_seed(0)
    target = FAMILIES[family]().eval()
    input_ids, document_ids, taught = batch()
    check_logits_can_be_chunked(target)
    draft = TTTDraftModel(tiny_config(draft_vocab_size=40))
    lesson = Teacher(target, draft).teach(input_ids, document_ids, taught)
    expected = target(input_ids=input_ids, attention_mask=document_ids).logits[taught]
    torch.testing.assert_close(lesson.logits, expected, atol=1e-5, rtol=1e-4)


def test_a_transformation_that_is_not_known_is_refused(monkeypatch):
    """Trained against wrong logits, a draft looks fine in training and is rejected in decoding."""
    target = tiny_target()
    target.lm_head.register_forward_hook(lambda module, args, output: output)
    forward = type(target).forward

    def squashing_forward(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits.sign()
        return output

    monkeypatch.setattr(type(target), "forward", squashing_forward)
    with pytest.raises(ValueError, match="transforms them in a way that training does not know"):
        check_logits_can_be_chunked(target)


def test_a_draft_of_another_target_is_refused():
    with pytest.raises(ValueError, match="its `vocab_size` is 40, the target's is 48"):
        Teacher(tiny_target(vocab_size=48), tiny_draft())


def test_the_draft_starts_with_the_output_space_of_its_target():
    target, draft = tiny_target().double(), tiny_draft()
    assert initialize_from_target(draft, target) == ["lm_head.weight", "norm.weight"]
    assert torch.equal(draft.lm_head.weight, target.lm_head.weight[draft.t2d])
    assert torch.equal(draft.norm.weight, target.model.norm.weight)


def test_keys_and_values_start_as_large_as_those_of_a_standard_head():
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "head_dim": 32, "initializer_range": 0.02}
    attention_input = torch.randn(1, 200, 256)
    values = {}
    for attention_type in ("mla", "gqa"):
        draft = TTTDraftModel(tiny_config(attention_type=attention_type, mla_latent_dim=16, **sizes))
        initialize_from_target(draft, tiny_target())
        attention, cos_sin = draft.layers[0].self_attn, draft.rotary_emb(torch.arange(200)[None], torch.float32)
        _, memory = attention.project(attention_input, cos_sin)
        values[attention_type] = [part.std().item() for part in attention.expand(memory, cos_sin)]
    assert values["mla"] == pytest.approx(values["gqa"], rel=0.15)


def test_a_norm_that_multiplies_by_one_plus_its_weight_is_left_alone():
    torch.manual_seed(0)
    gemma = FAMILIES["softcapped"]()
    torch.nn.init.normal_(gemma.model.norm.weight)
    assert not is_plain_rms_norm(gemma.model.norm, 16)
    assert not is_plain_rms_norm(torch.nn.LayerNorm(16), 16)
    draft = TTTDraftModel(tiny_config(draft_vocab_size=40))
    assert initialize_from_target(draft, gemma) == ["lm_head.weight"]


def test_output_embeddings_of_another_width_are_left_alone():
    draft = TTTDraftModel(tiny_config(hidden_size=24, target_hidden_size=16))
    assert initialize_from_target(draft, tiny_target()) == []
