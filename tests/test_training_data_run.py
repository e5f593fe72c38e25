"""The training command on prepared data: packed rows, several sources, the whole vocabulary."""

import json

import pytest
import torch
from reference_ttt import CONVERSATIONS, save_tiny_target, write_conversations
from safetensors.torch import load_file
from transformers import TrainerCallback

from eagle3_mla.training import cli


@pytest.fixture(autouse=True)
def own_dataset_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")


@pytest.fixture
def command(tmp_path) -> dict[str, str]:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"say the letters {n}"}) + "\n" for n in range(6)), encoding="utf-8")
    return {
        "--model-path": str(save_tiny_target(tmp_path / "target")),
        "--dataset": str(write_conversations(tmp_path / "train.jsonl", CONVERSATIONS * 3)),
        "--attention-backend": "sdpa_mla",
        "--output-dir": str(tmp_path / "out"),
        "--draft-vocab-size": "100",
        "--num-ttt-steps": "3",
        "--per-device-train-batch-size": "2",
        "--max-steps": "6",
        "--max-length": "64",
        "--save-steps": "2",
        "--use-cpu": "True",
        "--disable-tqdm": "True",
    }


class InterruptAfter(TrainerCallback):
    """What a kill looks like from inside: training stops between two steps and nothing is cleaned up."""

    def __init__(self, num_steps: int):
        self.num_steps = num_steps

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.num_steps:
            raise KeyboardInterrupt


def run(flags: dict[str, str], *more: str) -> int:
    return cli.main([part for flag, value in flags.items() for part in (flag, *value.split())] + list(more))


def weights_in(directory) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def test_a_packed_run_that_was_interrupted_ends_as_an_uninterrupted_one(command, tmp_path, monkeypatch):
    run(command, "--packing")
    straight = weights_in(tmp_path / "out")
    command["--output-dir"] = str(tmp_path / "resumed")
    prepare = cli.prepare

    def prepare_interrupted(*args):
        prepared = prepare(*args)
        prepared.trainer.add_callback(InterruptAfter(3))
        return prepared

    with monkeypatch.context() as patched:
        patched.setattr(cli, "prepare", prepare_interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(command, "--packing")
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
