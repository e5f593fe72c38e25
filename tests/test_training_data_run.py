"""The training command on prepared data: packed rows, several sources, the whole vocabulary."""

import json

import pytest
import torch
from reference_runs import run, run_interrupted, training_flags
from reference_ttt import CONVERSATIONS, write_conversations
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("own_dataset_cache")


@pytest.fixture
def command(tmp_path) -> dict[str, str]:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"say the letters {n}"}) + "\n" for n in range(6)), encoding="utf-8")
    dataset = str(write_conversations(tmp_path / "three-times.jsonl", CONVERSATIONS * 3))
    sizes = {"per_device_train_batch_size": "2", "draft_vocab_size": "100", "max_length": "64"}
    steps = {"num_ttt_steps": "3", "max_steps": "6", "save_steps": "2"}
    return training_flags(tmp_path, dataset=dataset, **sizes, **steps)


def weights_in(directory) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def test_a_packed_run_that_was_interrupted_ends_as_an_uninterrupted_one(command, tmp_path):
    run(command, "--packing")
    straight = weights_in(tmp_path / "out")
    command["--output-dir"] = str(tmp_path / "resumed")
    run_interrupted(command, 3, "--packing")
    assert (tmp_path / "resumed" / "checkpoint").resolve().name == "checkpoint-2"
    run(command, "--packing", "--resume-from-checkpoint")
    resumed = weights_in(tmp_path / "resumed")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_a_packed_epoch_has_fewer_steps_of_the_same_tokens(command, tmp_path):
    del command["--max-steps"]
    provenance = []
    for packing in ("False", "True"):
        run(command | {"--packing": packing, "--output-dir": str(tmp_path / packing)})
        provenance.append(json.loads((tmp_path / packing / "provenance.json").read_text()))
    apart, together = provenance
    assert together["num_steps"] < apart["num_steps"]
    for name in ("num_rows", "num_supervised_tokens", "data_sha256", "longest_row"):
        assert together[name] == apart[name]


def test_several_weighted_datasets_train_the_whole_vocabulary(command, tmp_path):
    command["--dataset"] += f" {tmp_path / 'texts.jsonl'}"
    flags = {"--dataset-weights": "1 0.5", "--draft-vocab-size": "full", "--pad-to-multiple-of": "64"}
    assert run(command | flags) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert config["draft_vocab_size"] == config["vocab_size"] == 280
    assert not weights_in(tmp_path / "out")["d2t"].any()
    assert provenance["num_rows"] == len(CONVERSATIONS) * 3 + 3
    assert provenance["dataset"] == ", ".join(command["--dataset"].split())
