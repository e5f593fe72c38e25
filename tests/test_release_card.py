"""The card of a result: what a run writes into it, and the numbers that an evaluation adds."""

import json
import sys

import pytest
import yaml
from huggingface_hub import ModelCard
from reference_runs import run, training_flags

from eagle3_mla.evaluation import cli as evaluation
from eagle3_mla.training import card, cli
from eagle3_mla.training.arguments import DataArguments, Eagle3TrainingArguments
from eagle3_mla.training.release import all_arguments, command_line

SETTINGS = {
    "target_model_path": "owner/target",
    "draft_checkpoint": "out",
    "dataset": "owner/prompts",
    "num_assistant_tokens": 7,
    "max_new_tokens": 128,
    "do_sample": False,
    "temperature": 1.0,
    "dtype": "float32",
    "device": "cpu",
}
RESULTS = {
    "acceptance_length": 3.456,
    "acceptance_by_depth": [0.81, 0.72],
    "plain_tokens_per_second": 100.0,
    "assisted_tokens_per_second": 215.0,
    "speedup": 2.15,
    "num_texts": 20,
    "num_divergent": 0,
    "draft_cache_bytes_per_token": 128.0,
    "standard_cache_bytes_per_token": 1024.0,
    "settings": SETTINGS,
}
ORIGIN = {
    "command": "python scripts/eval_eagle.py --draft-checkpoint out",
    "commit": "0123456789abcdef",
    "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0"},
    "hardware": "a machine",
}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """What the smallest run writes."""
    directory = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(directory / "datasets-cache"))
        assert run(training_flags(directory, max_steps="1", logging_steps="1", seed="13")) == 0
    return directory / "out"


@pytest.fixture
def directory(tmp_path):
    """A directory with a fresh card."""
    section = f"## Measured\n\n{card.evaluation_section([])}"
    text = f"---\nlibrary_name: transformers\n---\n\n# A head\n\n{section}\n\n## Training\n\nLong.\n"
    (tmp_path / card.CARD_FILE).write_text(text)
    return tmp_path


def metadata(directory) -> dict:
    return yaml.safe_load((directory / card.CARD_FILE).read_text().split("---\n")[1])


def test_provenance_holds_every_argument_and_the_hardware(result):
    provenance = json.loads((result / "provenance.json").read_text())
    arguments = provenance["arguments"]
    assert set(arguments) == {"DataArguments", "DraftArguments", "Eagle3TrainingArguments"}
    assert arguments["Eagle3TrainingArguments"]["seed"] == 13
    assert arguments["Eagle3TrainingArguments"]["learning_rate"] == 1 / 16  # the default, as it was used
    assert arguments["Eagle3TrainingArguments"]["loss"] == "forward_kl"
    assert arguments["DraftArguments"]["attention_backend"] == "sdpa_mla"
    assert arguments["DataArguments"]["max_length"] == 2048
    assert provenance["hardware"]["num_processes"] == 1
    assert 3 < provenance["longest_row"] < 100


def test_a_fresh_card_says_that_held_out_prompts_were_not_measured(result):
    text = (result / card.CARD_FILE).read_text()
    assert "not measured" in text
    assert "[More Information Needed]" not in text
    assert "model-index" not in metadata(result)


def test_an_evaluation_becomes_a_row_and_metadata(directory):
    card.add_evaluation(directory, RESULTS, ORIGIN)
    text = (directory / card.CARD_FILE).read_text()
    row = next(line for line in text.splitlines() if "owner/prompts |" in line)
    for value in (
        "**3.46**",
        "0.81 0.72",
        "100.0",
        "215.0 (2.15x)",
        "20 of 20",
        "128; standard head 1024",
        "a machine",
    ):
        assert value in row
    assert "0123456789ab |" in row
    assert f"    {ORIGIN['command']}" in text
    assert "not measured" not in text
    assert text.rstrip().endswith("## Training\n\nLong.")
    (index,) = metadata(directory)["model-index"]
    metrics = {metric["type"]: metric["value"] for result in index["results"] for metric in result["metrics"]}
    assert metrics == {"acceptance_length": 3.456, "speedup": 2.15, "draft_cache_bytes_per_token": 128.0}
    assert metadata(directory)["library_name"] == "transformers"


def test_the_same_evaluation_replaces_its_row_and_another_one_adds_a_row(directory):
    card.add_evaluation(directory, RESULTS, ORIGIN)
    card.add_evaluation(directory, RESULTS | {"acceptance_length": 3.6}, ORIGIN)
    sampled = RESULTS | {"acceptance_length": 2.5, "settings": SETTINGS | {"do_sample": True, "temperature": 0.7}}
    card.add_evaluation(directory, sampled, ORIGIN)
    text = (directory / card.CARD_FILE).read_text()
    rows = [line for line in text.splitlines() if "owner/prompts |" in line]
    assert ["3.60" in rows[0], "| 0 |" in rows[0], "2.50" in rows[1], "| 0.7 |" in rows[1]] == [True] * 4
    assert len(rows) == 2
    assert text.count(card.SECTION_START) == 1
    assert len(json.loads((directory / card.EVALUATIONS_FILE).read_text())) == 2


def test_the_hub_library_reads_the_metadata_back(directory):
    card.add_evaluation(directory, RESULTS, ORIGIN)
    loaded = ModelCard.load(directory / card.CARD_FILE)
    assert {result.metric_type for result in loaded.data.eval_results} >= {"acceptance_length", "speedup"}


def test_a_card_without_the_section_gets_one_at_its_end(directory):
    (directory / card.CARD_FILE).write_text("---\nlicense: apache-2.0\n---\n\n# By hand\n")
    card.add_evaluation(directory, RESULTS, ORIGIN)
    text = (directory / card.CARD_FILE).read_text()
    assert text.index("# By hand") < text.index("## Measured") < text.index(card.SECTION_START)
    assert metadata(directory)["license"] == "apache-2.0"


def test_retraining_forgets_the_numbers_of_the_head_that_was_there(result):
    (result / card.EVALUATIONS_FILE).write_text("[]")
    argv = ["--model-path", str(result.parent / "target"), "--dataset", str(result.parent / "train.jsonl")]
    argv += ["--output-dir", str(result), "--max-steps", "1", "--use-cpu", "True", "--report-to", "none"]
    assert cli.main([*argv, "--disable-tqdm", "True", "--attention-backend", "sdpa_mla"]) == 0
    assert not (result / card.EVALUATIONS_FILE).exists()


def test_the_evaluation_command_writes_the_card(result, tmp_path):
    argv = ["--draft-checkpoint", str(result), "--target-model-path", str(result.parent / "target")]
    argv += ["--dataset", str(result.parent / "train.jsonl"), "--num-samples", "2", "--max-new-tokens", "8"]
    assert evaluation.main([*argv, "--output-dir", str(tmp_path / "eval"), "--write-card"]) == 0
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    text = (result / card.CARD_FILE).read_text()
    assert f"**{results['acceptance_length']:.2f}**" in text
    assert "| train.jsonl |" in text
    assert json.loads((result / card.EVALUATIONS_FILE).read_text())[0]["results"] == results


def test_a_checkpoint_without_a_card_is_refused_before_anything_is_measured(result, tmp_path, caplog):
    argv = ["--draft-checkpoint", str(result / "checkpoint-1"), "--target-model-path", str(result.parent / "target")]
    assert evaluation.main([*argv, "--output-dir", str(tmp_path / "eval"), "--write-card"]) == 2
    assert "`--write-card` needs a local directory with a README.md in it" in caplog.text
    assert not (tmp_path / "eval").exists()


@pytest.mark.parametrize("flags", [["--hub-token", "hf_abc"], ["--hub-token=hf_abc"], ["--hub_token", "hf_abc"]])
def test_secrets_are_masked_in_the_recorded_command(flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/train_eagle3.py", *flags, "--seed", "1"])
    command = command_line()
    assert "hf_abc" not in " ".join(command)
    assert command[0] == "train_eagle3.py"
    assert command[-2:] == ["--seed", "1"]


def test_secrets_are_masked_in_the_recorded_arguments(tmp_path):
    args = Eagle3TrainingArguments(output_dir=str(tmp_path), hub_token="hf_abc", use_cpu=True, report_to="none")
    recorded = all_arguments(DataArguments(dataset=["d"]), args)
    assert "hf_abc" not in json.dumps(recorded)
    assert recorded["DataArguments"]["dataset"] == ["d"]
