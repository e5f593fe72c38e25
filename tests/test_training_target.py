"""The frozen target as a teacher, and what the draft takes over from it."""

import copy

import pytest
import torch
from reference_ttt import TARGET_SIZES, tiny_config, tiny_draft, tiny_target
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from eagle3_mla.training.arguments import DraftArguments
from eagle3_mla.training.batching import PaddingCollator
from eagle3_mla.training.documents import count_supervised_rows
from eagle3_mla.training.feature_training import choose_teacher
from eagle3_mla.training.initialization import initialize_from_target, is_plain_rms_norm
from eagle3_mla.training.target import Teacher, check_logits_can_be_chunked, keeps_documents_apart
from eagle3_mla.training.ttt import TTTDraftModel

SIZES = TARGET_SIZES | {"pad_token_id": 0}
FAMILIES = {
    "softcapped": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=4, final_logit_softcapping=2.0)),
    "divided": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)),
    "multiplied": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
    "projected": lambda: OPTForCausalLM(
        OPTConfig(vocab_size=40, hidden_size=16, ffn_dim=24, num_hidden_layers=6, num_attention_heads=4, init_std=0.3)
    ),
}


# Targets whose RoPE has other factors for texts of more than so many tokens.
FIXED_LENGTH = 10
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [4.0, 9.0], "rope_theta": 1e4}
LENGTH_DEPENDENT = {
    "longrope": lambda: Phi3ForCausalLM(
        Phi3Config(
            **SIZES,
            rope_parameters=LONGROPE,
            original_max_position_embeddings=FIXED_LENGTH,
            max_position_embeddings=80,
        )
    ),
    "dynamic": lambda: tiny_target(
        max_position_embeddings=FIXED_LENGTH,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    ),
}

# Targets with a table of positions that ends with the longest document.
LEARNED_POSITIONS = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=16, n_layer=6, n_head=4, n_positions=FIXED_LENGTH, initializer_range=0.3)
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=40,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=6,
            num_attention_heads=4,
            init_std=0.3,
            max_position_embeddings=FIXED_LENGTH,
        )
    ),
}

LAYOUTS = {
    "right-padded": [[1] * 11, [1] * 7 + [0] * 4],
    "left-padded": [[1] * 11, [0] * 4 + [1] * 7],
    "packed": [[1] * 4 + [2] * 5 + [0] * 2, [1] * 3 + [2] * 1 + [3] * 7],
}


def batch(layout: str = "right-padded") -> dict[str, torch.Tensor]:
    document_ids = torch.tensor(LAYOUTS[layout])
    input_ids = torch.randint(1, 40, document_ids.shape, generator=torch.Generator().manual_seed(1))
    return {"input_ids": input_ids, "document_ids": document_ids}


def documents(batch: dict[str, torch.Tensor]):
    """Index of every document in the batch, as `(row, columns)`."""
    for row, document_ids in enumerate(batch["document_ids"]):
        for document in range(1, int(document_ids.max()) + 1):
            yield row, (document_ids == document).nonzero().squeeze(1)


@torch.no_grad()
def check_lesson(teacher: Teacher, target, batch: dict[str, torch.Tensor]) -> None:
    """Every document is read as if it were alone."""
    lesson, layer_ids = teacher.lesson(batch), teacher.draft.config.eagle_aux_hidden_state_layer_ids
    for row, columns in documents(batch):
        alone = copy.deepcopy(target)  # a target may remember what it read
        expected = alone(input_ids=batch["input_ids"][row, columns][None], output_hidden_states=True)
        states = torch.cat([expected.hidden_states[i] for i in layer_ids], dim=-1)[0]
        torch.testing.assert_close(lesson.aux_hidden_states[row, columns], states, atol=1e-10, rtol=1e-10)
        logits = teacher.logits(lesson.last_hidden_states[row, columns])
        torch.testing.assert_close(logits, expected.logits[0], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_lesson_is_what_the_target_says(layout):
    target = tiny_target().double()
    check_lesson(Teacher(target, tiny_draft()), target, batch(layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_target_that_mixes_packed_documents_reads_them_one_by_one(layout, monkeypatch, caplog):
    target = FAMILIES["projected"]().eval().double()  # OPT counts positions by its attention mask
    monkeypatch.setattr("eagle3_mla.training.target.keeps_documents_apart", lambda target: False)
    check_lesson(Teacher(target, tiny_draft()), target, batch(layout))
    assert ("reads them one by one" in caplog.text) == (layout != "right-padded")


def test_a_target_is_tried_before_documents_are_packed_for_it(monkeypatch):
    target = tiny_target().double()
    assert keeps_documents_apart(target)
    forward = type(target.model).forward
    monkeypatch.setattr(
        type(target.model), "forward", lambda self, position_ids=None, **kwargs: forward(self, **kwargs)
    )
    assert not keeps_documents_apart(target)


@pytest.mark.parametrize("family", LENGTH_DEPENDENT)
@pytest.mark.parametrize("layout", ["right-padded", "packed"])
def test_padding_does_not_count_towards_the_length_that_chooses_the_factors(layout, family):
    """A target has other factors for longer texts: read with those, a short one would teach something else."""
    layouts = {"right-padded": [[1] * 9 + [0] * 11, [1] * 4 + [0] * 16], "packed": [[1] * 4 + [2] * 5 + [0] * 12]}
    document_ids = torch.tensor(layouts[layout])
    target = LENGTH_DEPENDENT[family]().eval().double()
    inputs = {"input_ids": torch.randint(1, 40, document_ids.shape), "document_ids": document_ids}
    check_lesson(Teacher(copy.deepcopy(target), tiny_draft()), target, inputs)


@pytest.mark.parametrize("family", LEARNED_POSITIONS)
@pytest.mark.parametrize("layout", ["right-padded", "packed"])
def test_padding_stands_at_no_position_that_the_target_has_not_learnt(layout, family):
    """`--pad-to-multiple-of 16` for a target of 10 positions: documents fit, their padding would not."""
    target = LEARNED_POSITIONS[family]().eval().double()
    shapes = {"right-padded": [(10,), (4,)], "packed": [(4, 5, 1), (3,), (2, 10)]}
    rows = [
        joined([{"input_ids": torch.randint(1, 40, (length,)).tolist(), "loss_mask": [1] * length} for length in row])
        for row in shapes[layout]
    ]
    check_lesson(Teacher(target, tiny_draft()), target, PaddingCollator(0, multiple_of=16)(rows))


def unrolled(draft, teacher, rows: list[dict]) -> dict[str, torch.Tensor]:
    """Loss and gradients of `rows` in one batch, as the trainer computes them."""
    batch = PaddingCollator(0, multiple_of=8)(rows)
    num_supervised = count_supervised_rows(batch["loss_mask"], batch["document_ids"], 3)
    lesson = teacher.lesson(batch)
    draft.zero_grad()
    output = draft(
        **batch,
        inputs_embeds=teacher.embed(batch["input_ids"]),
        aux_hidden_states=lesson.aux_hidden_states,
        last_hidden_states=lesson.last_hidden_states,
        target_logits=teacher.logits,
        step_weights=1 / num_supervised.double(),
    )
    output.loss.backward()
    return {name: weight.grad.clone() for name, weight in draft.named_parameters()} | {"loss": output.loss.detach()}


def joined(rows: list[dict]) -> dict:
    """Documents as one packed row."""
    document_ids = [index for index, row in enumerate(rows, start=1) for _ in row["input_ids"]]
    parts = {name: [value for row in rows for value in row[name]] for name in ("input_ids", "loss_mask")}
    return parts | {"document_ids": document_ids}


@pytest.mark.parametrize("lengths", [(9, 6, 5, 10), (14, 6, 20, 10, 12)], ids=str)
@pytest.mark.parametrize("family", [*LENGTH_DEPENDENT, "plain"])
def test_packed_rows_have_loss_and_gradient_of_padded_ones_whatever_the_factors_depend_on(family, lengths):
    target = (LENGTH_DEPENDENT | {"plain": tiny_target})[family]().eval().double()
    draft = tiny_draft(attention_type="gqa")
    settings = DraftArguments(model_path="target")
    teacher = choose_teacher(target, draft, settings, max(lengths))
    rows = [
        {"input_ids": torch.randint(1, 40, (length,)).tolist(), "loss_mask": [0, 0] + [1] * (length - 2)}
        for length in lengths
    ]
    padded = unrolled(draft, teacher, rows)
    assert padded["loss"] > 0
    for packs in ([rows[:2], rows[2:]], [rows[::-1]], [rows[:1], rows[1:3], rows[3:]]):
        packed = unrolled(draft, teacher, [joined(pack) for pack in packs])
        torch.testing.assert_close(packed, padded, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("family", LENGTH_DEPENDENT)
def test_documents_longer_than_the_fixed_factors_reach_are_read_alone(family, caplog):
    target = LENGTH_DEPENDENT[family]().eval().double()
    fresh, settings = copy.deepcopy(target), DraftArguments(model_path="target")
    assert type(choose_teacher(target, tiny_draft(), settings, FIXED_LENGTH)) is Teacher
    teacher = choose_teacher(target, tiny_draft(), settings, 16)
    assert "more than 10 tokens" in caplog.text
    document_ids = torch.tensor([[1] * 16 + [0] * 4, [1] * 11 + [2] * 9, [1] * 3 + [0] * 17])
    inputs = {"input_ids": torch.randint(1, 40, document_ids.shape), "document_ids": document_ids}
    check_lesson(teacher, fresh, inputs)
    with pytest.raises(ValueError, match="`--shard-target` needs documents of at most 10 tokens"):
        choose_teacher(target, tiny_draft(), DraftArguments(model_path="target", shard_target=True), 16)


def test_no_gradient_flows_into_the_target():
    lesson = Teacher(tiny_target().double(), tiny_draft()).lesson(batch())
    assert not any(tensor.requires_grad for tensor in (lesson.aux_hidden_states, lesson.last_hidden_states))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_that_a_family_transforms_are_chunked_rightly(family):
    torch.manual_seed(0)
    target = FAMILIES[family]().eval()
    inputs = batch()
    check_logits_can_be_chunked(target)
    teacher = Teacher(target, TTTDraftModel(tiny_config(draft_vocab_size=40)))
    valid = inputs["document_ids"].bool()
    expected = target(input_ids=inputs["input_ids"], attention_mask=valid.long()).logits
    actual = teacher.logits(teacher.lesson(inputs).last_hidden_states)
    torch.testing.assert_close(actual[valid], expected[valid], atol=1e-5, rtol=1e-4)


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
        memory = attention.remember(attention_input, cos_sin)
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
