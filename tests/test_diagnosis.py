"""The diagnosis: a healthy case passes every check, and each planted fault fails its own check and no other."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference_runs import run, training_flags
from reference_ttt import ATTENTION, tiny_config, tiny_target, tiny_tokenizer
from rich.console import Console
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GptOssConfig, Qwen3Config

from eagle3_mla.training import diagnosis
from eagle3_mla.training.arguments import Eagle3TrainingArguments
from eagle3_mla.training.batching import PaddingCollator
from eagle3_mla.training.diagnosis_case import FAILED, OK, WARNING, Case
from eagle3_mla.training.diagnosis_data import answer_spans, check_masks, check_vocabulary
from eagle3_mla.training.diagnosis_draft import check_feedback, check_overfitting, check_parity
from eagle3_mla.training.diagnosis_layers import check_layers, recompute_states
from eagle3_mla.training.target import Teacher
from eagle3_mla.training.ttt import TTTDraftModel

NUM_ROWS = 24
NUM_PROMPT_TOKENS = 4
NUM_ANSWER_TOKENS = 18
NUM_TTT_STEPS = 3
ROOT = Path(__file__).resolve().parents[1]
NANO_TARGET = ROOT / "examples" / "nano-target"


class ShiftedEmbeddings(TTTDraftModel):
    """Trains with the embedding of the token after the one that decoding reads."""

    def unroll(self, inputs_embeds, *others):
        return super().unroll(inputs_embeds.roll(-1, dims=1), *others)


class ShiftedLayers(TTTDraftModel):
    """Captures the output of each layer in the place of its input."""

    def capture_aux_hidden_states(self, target):
        captured = super().capture_aux_hidden_states(target)
        captured.layer_ids = [layer_id + 1 for layer_id in captured.layer_ids]
        return captured


class ExplodingFeedback(TTTDraftModel):
    """Feeds back ten times its state, in training and in decoding."""

    def predict(self, states):
        logits, fed_back = super().predict(states)
        return logits, 10 * fed_back

    def step(self, *inputs):
        fed_back, predicting, memories = super().step(*inputs)
        return 10 * fed_back, predicting, memories


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def target(tokenizer):
    """Surer of its choices than random weights are: between near ties, no draft hits the first one."""
    model = tiny_target(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, max_position_embeddings=64)
    model.requires_grad_(False).lm_head.weight.mul_(3)
    return model


@pytest.fixture(scope="module")
def rows(target, tokenizer) -> list[dict]:
    """Conversations whose answers are the target's own greedy choices, and an end."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(5, len(tokenizer), (NUM_ROWS, NUM_PROMPT_TOKENS), generator=generator)
    prompts[:, -1] = tokenizer.eos_token_id
    texts = target.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=NUM_ANSWER_TOKENS - 1,
        do_sample=False,
        suppress_tokens=[tokenizer.eos_token_id],
        eos_token_id=None,
    )
    loss_mask = [0] * NUM_PROMPT_TOKENS + [1] * NUM_ANSWER_TOKENS
    return [{"input_ids": [*text, tokenizer.eos_token_id], "loss_mask": loss_mask} for text in texts.tolist()]


def make_draft(target, draft_class=TTTDraftModel, tokens=None, **fields) -> TTTDraftModel:
    """A draft for `target` that knows `tokens`, or all of them."""
    vocab_size = target.config.vocab_size
    tokens = torch.arange(vocab_size) if tokens is None else tokens
    torch.manual_seed(0)
    config = tiny_config(
        **{
            "vocab_size": vocab_size,
            "draft_vocab_size": len(tokens),
            "hidden_size": 32,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
            "initializer_range": 0.1,
        }
        | fields
    )
    draft = draft_class(config)
    draft.set_draft_vocabulary(tokens)
    return draft


def make_case(target, draft, rows, tokenizer, **fields) -> Case:
    args = Eagle3TrainingArguments(
        output_dir="unused", use_cpu=True, num_ttt_steps=NUM_TTT_STEPS, learning_rate=1e-2, report_to="none"
    )
    args.set_default_rates(draft.config.hidden_size, is_adapter=False)
    defaults = {"max_length": 64, "end_ids": [tokenizer.eos_token_id], "is_trained": False}
    return Case(draft, target, Teacher(target, draft), tokenizer, rows, PaddingCollator(0), args, **defaults | fields)


@pytest.fixture(scope="module")
def healthy(target, rows, tokenizer) -> Case:
    return make_case(target, make_draft(target), rows, tokenizer)


@pytest.fixture(scope="module")
def trained(target, rows, tokenizer) -> Case:
    """A head that has learnt these rows from the layers that its configuration names."""
    case = make_case(target, make_draft(target), rows, tokenizer, is_trained=True, trained_length=22)
    batch = case.study(rows)
    optimizer = torch.optim.AdamW(case.draft.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        case.unroll(case.draft, batch, batch.lesson.aux_hidden_states, NUM_TTT_STEPS).loss.backward()
        optimizer.step()
    return case


def verdicts(case: Case) -> dict[str, str]:
    findings = diagnosis.diagnose(case, Console(quiet=True))
    diagnosis.print_findings(Console(), findings)  # shown where a test fails
    return {finding.check: finding.verdict for finding in findings}


def failed(case: Case) -> list[str]:
    return [check for check, verdict in verdicts(case).items() if verdict == FAILED]


def with_masks(case: Case, change) -> Case:
    return replace(case, rows=[row | {"loss_mask": change(row["loss_mask"])} for row in case.rows])


def with_draft(case: Case, draft: TTTDraftModel, **fields) -> Case:
    return replace(case, draft=draft, teacher=Teacher(case.target, draft), **fields)


def with_foreign_answers(case: Case) -> Case:
    generator = torch.Generator().manual_seed(2)
    rows = []
    for row in case.rows:
        noise = torch.randint(5, case.target.config.vocab_size, (NUM_ANSWER_TOKENS - 1,), generator=generator)
        rows.append(row | {"input_ids": [*row["input_ids"][:NUM_PROMPT_TOKENS], *noise.tolist(), case.end_ids[0]]})
    return replace(case, rows=rows)


def with_few_tokens(case: Case) -> Case:
    counts = torch.bincount(torch.tensor([token for row in case.rows for token in row["input_ids"]]))
    return with_draft(case, make_draft(case.target, tokens=counts.argsort(descending=True)[:12].sort().values))


FAULTS = {
    "end of turn not supervised": ("mask and template", lambda case: with_masks(case, lambda mask: [*mask[:-1], 0])),
    "everything supervised": ("mask and template", lambda case: with_masks(case, lambda mask: [1] * len(mask))),
    "mask one token early": ("mask and template", lambda case: with_masks(case, lambda mask: [*mask[1:], 0])),
    "tiny vocabulary": ("draft vocabulary", with_few_tokens),
    "foreign data": ("data against target", with_foreign_answers),
    "too few positions": (
        "length",
        lambda case: with_draft(case, make_draft(case.target, max_position_embeddings=32)),
    ),
    "trained on short rows": ("length", lambda case: replace(case, is_trained=True, trained_length=8)),
    "other layers captured": (
        "feature layers",
        lambda case: with_draft(case, make_draft(case.target, ShiftedLayers)),
    ),
    "embeddings one token off": (
        "training against decoding",
        lambda case: with_draft(case, make_draft(case.target, ShiftedEmbeddings)),
    ),
    "exploding feedback": ("feedback norm", lambda case: with_draft(case, make_draft(case.target, ExplodingFeedback))),
    "vanishing learning rate": (
        "overfitting one batch",
        lambda case: replace(case, args=replace(case.args, learning_rate=1e-9, muon_learning_rate=1e-9)),
    ),
}


def test_a_healthy_case_passes_every_check(healthy):
    assert set(verdicts(healthy).values()) == {OK}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails_its_own_check_and_no_other(fault, healthy):
    check, plant = FAULTS[fault]
    assert failed(plant(healthy)) == [check]


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_head_whose_layer_ids_are_one_off_is_told_the_right_ones(shift, trained, monkeypatch):
    """A head trained with the other engine's convention runs, and is accepted less."""
    assert FAILED not in verdicts(trained).values()
    right = trained.draft.config.eagle_aux_hidden_state_layer_ids
    monkeypatch.setattr(
        trained.draft.config, "eagle_aux_hidden_state_layer_ids", [layer_id + shift for layer_id in right]
    )
    case = replace(trained)
    assert failed(case) == ["feature layers"]
    assert str(right) in check_layers(case).remedy


@pytest.mark.parametrize("attention", ATTENTION)
def test_parity_holds_for_every_attention(attention, target, rows, tokenizer):
    finding = check_parity(make_case(target, make_draft(target, **ATTENTION[attention]), rows, tokenizer))
    assert finding.verdict == OK
    assert finding.measured["largest_relative_difference"] < 1e-4
    assert finding.measured["num_compared"] == 3 * 2 * NUM_TTT_STEPS


def test_overfitting_changes_nothing_in_the_draft(healthy):
    before = {name: weight.clone() for name, weight in healthy.draft.state_dict().items()}
    check_overfitting(healthy, num_steps=2)
    assert all(torch.equal(before[name], weight) for name, weight in healthy.draft.state_dict().items())
    assert healthy.draft.fc.weight.grad is None


@pytest.mark.parametrize(("of_adamw", "of_muon"), [(1e-2, 1e-9), (1e-9, 3e-2)], ids=["AdamW", "Muon"])
def test_overfitting_is_by_both_optimizers_of_the_run(of_adamw, of_muon, healthy):
    """Each alone learns something: Muon moves the matrices, AdamW the head and the norms."""
    rates = replace(healthy.args, learning_rate=of_adamw, muon_learning_rate=of_muon)
    before, after = (check_overfitting(replace(healthy, args=rates), num_steps).measured for num_steps in (0, 20))
    assert (after["learning_rate"], after["muon_learning_rate"]) == (of_adamw, of_muon)
    assert after["loss"] < 0.8 * before["loss"]


def test_a_token_that_the_draft_cannot_say_does_not_count_against_its_learning(healthy):
    finding = check_overfitting(with_few_tokens(healthy))
    assert finding.measured["accuracy_of_reachable_tokens"][0] > 0.95
    assert finding.measured["simulated_acceptance_length"] < 1 + NUM_TTT_STEPS


def test_states_that_are_no_numbers_fail(healthy):
    """A maximum over Python numbers forgets them."""
    draft = make_draft(healthy.target)
    draft.lm_head.weight.data[3] = float("nan")
    draft.norm.weight.data[0] = float("nan")
    case = with_draft(healthy, draft)
    assert check_parity(case).verdict == FAILED
    draft.fc.weight.data.zero_()
    assert check_feedback(case).verdict == FAILED


def test_a_vocabulary_without_any_token_of_the_target_is_a_matter_of_the_vocabulary(healthy):
    spoken = set(healthy.answers.target_tokens.tolist()) | set(healthy.answers.tokens.tolist())
    silent = torch.tensor([token for token in range(len(healthy.tokenizer)) if token not in spoken])
    case = with_draft(healthy, make_draft(healthy.target, tokens=silent))
    assert failed(case) == ["draft vocabulary"]


def test_recomputed_states_are_the_streams_between_the_layers(target):
    """Against `output_hidden_states`, whose entry i is the stream before layer i, but for the last one."""
    input_ids = torch.arange(8)[None]
    published = target(input_ids, output_hidden_states=True).hidden_states
    states = recompute_states(target, input_ids, list(range(7)))
    for layer_id in range(6):
        torch.testing.assert_close(states[layer_id], published[layer_id])
    torch.testing.assert_close(target.model.norm(states[6]), published[6])


FAMILY_FIELDS = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "gemma2": lambda: Gemma2Config(**FAMILY_FIELDS, sliding_window=4),
    "gpt2": lambda: GPT2Config(
        vocab_size=64, n_embd=32, n_layer=5, n_head=4, pad_token_id=0, bos_token_id=1, eos_token_id=2
    ),
    "gpt_oss": lambda: GptOssConfig(**FAMILY_FIELDS, num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
    "qwen3": lambda: Qwen3Config(**FAMILY_FIELDS),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_every_family_can_be_recomputed(family):
    """With scaled embeddings, tuples of outputs, sliding windows, experts."""
    model = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    input_ids = torch.arange(3, 13)[None]
    published = model(input_ids, output_hidden_states=True).hidden_states
    for layer_id, states in enumerate(recompute_states(model, input_ids, list(range(5)))):
        torch.testing.assert_close(states, published[layer_id])


def test_a_missing_end_of_turn_token_is_named_in_the_vocabulary_check(healthy):
    all_but_end = torch.tensor([token for token in range(len(healthy.tokenizer)) if token != healthy.end_ids[0]])
    finding = check_vocabulary(with_draft(healthy, make_draft(healthy.target, tokens=all_but_end)))
    assert finding.verdict == FAILED
    assert finding.measured["unknown_end_of_turn_tokens"] == ["<end>"]


def test_a_cut_answer_needs_no_end(healthy):
    cut = [{name: values[:20] for name, values in row.items()} for row in healthy.rows]
    assert check_masks(replace(healthy, rows=cut, max_length=20)).verdict == WARNING
    assert check_masks(replace(healthy, rows=cut, max_length=21)).verdict == FAILED


def test_rows_without_an_answer_are_counted_whether_they_were_dropped_or_not(healthy):
    silent = [row | {"loss_mask": [0] * len(row["loss_mask"])} for row in healthy.rows[:6]]
    finding = check_masks(replace(healthy, rows=healthy.rows[6:] + silent, num_dropped_rows=8))
    assert finding.measured["rows_without_supervision"] == (8 + 6) / (8 + 24)
    assert finding.verdict == WARNING


def test_plain_text_is_not_taken_for_answers_without_an_end(healthy):
    text = [{"input_ids": row["input_ids"][4:20], "loss_mask": [1] * 16} for row in healthy.rows]
    finding = check_masks(replace(healthy, rows=text))
    assert (finding.verdict, finding.measured["plain_text_rows"]) == (WARNING, 1.0)


def test_spans_are_the_runs_of_ones():
    assert answer_spans([0, 1, 1, 0, 0, 1]) == [(1, 3), (5, 6)]
    assert answer_spans([0, 0]) == []


@pytest.fixture
def command(own_dataset_cache, tmp_path) -> dict[str, str]:
    return training_flags(tmp_path)


def test_the_command_writes_its_findings_and_trains_nothing(command, tmp_path, capsys):
    assert run(command, "--diagnose") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == [diagnosis.DIAGNOSIS_FILE]
    report = json.loads((tmp_path / "out" / diagnosis.DIAGNOSIS_FILE).read_text())
    assert report["failed"]
    assert report["versions"]["torch"] == torch.__version__
    found = {finding["check"]: finding["verdict"] for finding in report["findings"]}
    assert len(found) == len(diagnosis.CHECKS)
    # Conversations made up by people, for a target of random weights.
    assert found["data against target"] == FAILED
    assert found["mask and template"] == OK
    assert "scripts/regenerate_dataset.py" in capsys.readouterr().out.replace("\n", " ")


def test_the_command_diagnoses_rows_that_training_would_pad(command, tmp_path):
    """Nothing is read at the padding, so that there is nothing to compare either."""
    run(command, "--diagnose", "--pad-to-multiple-of", "64")
    report = json.loads((tmp_path / "out" / diagnosis.DIAGNOSIS_FILE).read_text())
    assert {finding["check"]: finding["verdict"] for finding in report["findings"]}["feature layers"] == OK


def test_the_command_diagnoses_a_trained_head_with_its_own_training_length(command, tmp_path):
    assert run(command | {"--max-steps": "1", "--output-dir": str(tmp_path / "head")}) == 0
    run(command, "--diagnose", "--draft-checkpoint", str(tmp_path / "head"))
    report = json.loads((tmp_path / "out" / diagnosis.DIAGNOSIS_FILE).read_text())
    measured = {finding["check"]: finding["measured"] for finding in report["findings"]}
    assert measured["length"]["trained_length"] == measured["length"]["longest_row"]
    assert set(measured["feature layers"]["shifts"]) == {"-1", "0", "+1"}


def test_the_command_diagnoses_an_adapter_by_the_one_optimizer_that_trains_it(command, tmp_path):
    assert run(command | {"--max-steps": "1", "--output-dir": str(tmp_path / "head")}) == 0
    run(command, "--diagnose", "--draft-checkpoint", str(tmp_path / "head"), "--lora-rank", "2")
    report = json.loads((tmp_path / "out" / diagnosis.DIAGNOSIS_FILE).read_text())
    measured = {finding["check"]: finding["measured"] for finding in report["findings"]}
    assert measured["overfitting one batch"]["muon_learning_rate"] is None


@pytest.mark.slow
def test_the_nano_target_is_diagnosed_within_a_minute(command, tmp_path):
    script = [sys.executable, NANO_TARGET / "stdlib_conversations.py", "--output-dir", tmp_path / "data"]
    subprocess.run(script, check=True)
    flags = {"--model-path": str(NANO_TARGET), "--num-ttt-steps": "7"}
    flags["--dataset"] = str(tmp_path / "data" / "heldout.jsonl")
    for head in ([], ["--draft-checkpoint", str(ROOT)]):
        start = time.monotonic()
        assert run(command | flags, "--diagnose", *head) == 0
        assert time.monotonic() - start < 60
