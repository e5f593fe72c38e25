"""Pushing: what a stranger loads from the Hub after training is the head that was trained, with its code and card."""

import json
import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub import constants
from loopback_hub import LoopbackHub
from reference_runs import run, training_flags
from transformers import AutoModelForCausalLM

from eagle3_mla.training import cli
from eagle3_mla.training.trainer import Eagle3Trainer

REPO = "user/pushed-draft"
GENERATE = """
import json, sys
sys.modules["eagle3_mla"] = None
import torch
from transformers import AutoModel, AutoModelForCausalLM

target = AutoModelForCausalLM.from_pretrained({target!r})
draft = AutoModel.from_pretrained({repo!r}, trust_remote_code=True)
prompt = torch.tensor([[3, 4, 5, 6]])
assisted = target.generate(prompt, max_new_tokens=24, do_sample=False, assistant_model=draft)
print(json.dumps({{"tokens": assisted.tolist(), "rounds": draft.speculation_stats.rounds}}))
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A running Hub that everything in this process, and in processes with its environment, talks to."""
    (tmp_path / "storage").mkdir()
    loopback = LoopbackHub({}, storage=tmp_path / "storage")
    with loopback.serve() as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_TOKEN", LoopbackHub.token)
        yield loopback


@pytest.fixture
def command(own_dataset_cache, tmp_path) -> dict[str, str]:
    steps = {"max_steps": "2", "save_steps": "1", "logging_steps": "1"}
    return training_flags(tmp_path, output_dir=str(tmp_path / "pushed-draft"), push_to_hub="True", **steps)


def test_a_stranger_loads_what_was_pushed_and_gets_the_plain_text(hub, command, tmp_path):
    assert run(command) == 0
    script = GENERATE.format(target=str(tmp_path / "target"), repo=REPO)
    finished = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    loaded = json.loads(finished.stdout.strip().splitlines()[-1])
    target = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    plain = target.generate(torch.tensor([[3, 4, 5, 6]]), max_new_tokens=24, do_sample=False)
    assert loaded["tokens"] == plain.tolist()
    assert loaded["rounds"] > 0


def test_the_result_is_pushed_in_one_commit_without_checkpoints(hub, command, tmp_path):
    """Remote code loads code and weights of one commit: a head pushed in parts would not load in between."""
    assert run(command, "--hub-private-repo", "True") == 0
    assert hub.visibilities == {REPO: "private"}
    assert len(hub.commits(REPO)) == 2  # the empty one that made the repository
    pushed = hub.repos[REPO][-1]
    names = {path.relative_to(pushed).as_posix() for path in pushed.rglob("*") if path.is_file()}
    assert {
        "README.md",
        "config.json",
        "generation/decoder.py",
        "model.safetensors",
        "modeling_eagle3_mla.py",
        "provenance.json",
        "training_curves.png",
        "training_log.jsonl",
    } < names
    assert f'AutoModel.from_pretrained("{REPO}", trust_remote_code=True)' in (pushed / "README.md").read_text()
    assert not any("checkpoint" in name or name.startswith(".") for name in names)
    result = tmp_path / "pushed-draft"
    assert (result / "checkpoint-2").is_dir()
    assert all((result / name).read_bytes() == (pushed / name).read_bytes() for name in names)


def test_pushing_again_replaces_the_head(hub, command):
    assert run(command, "--hub-model-id", "user/other") == 0
    first = (hub.repos["user/other"][-1] / "model.safetensors").read_bytes()
    assert run(command | {"--seed": "7"}, "--hub-model-id", "user/other") == 0
    assert (hub.repos["user/other"][-1] / "model.safetensors").read_bytes() != first
    assert len(hub.commits("user/other")) == 3


def test_a_failed_push_keeps_the_result_and_says_how_to_push_later(hub, command, tmp_path, caplog):
    hub.refuses_commits = True
    assert run(command) == 1
    result = tmp_path / "pushed-draft"
    assert (result / "model.safetensors").is_file()
    assert "could not be pushed" in caplog.text
    later = next(line.strip() for line in caplog.text.splitlines() if line.strip().startswith("hf upload"))
    assert later.startswith(f"hf upload {REPO} {result} .")
    assert "--include model.safetensors" in later
    assert "--include 'generation/*'" in later
    assert "checkpoint" not in later.replace(str(result), "")


WRONG_DESTINATIONS = {
    "a wrong token": ({"--hub-token": "hf_wrong"}, "`--push-to-hub` cannot write to pushed-draft"),
    "a foreign namespace": ({"--hub-model-id": "somebody/draft"}, "`--push-to-hub` cannot write to somebody/draft"),
    "a missing branch": ({"--hub-revision": "nowhere"}, "`--push-to-hub` cannot write to user/pushed-draft"),
}


@pytest.mark.parametrize("destination", WRONG_DESTINATIONS)
def test_what_cannot_be_pushed_is_not_trained(destination, hub, command, capsys, monkeypatch):
    """Before the first step, not after hours of them."""
    monkeypatch.setattr(Eagle3Trainer, "train", lambda *args, **kwargs: pytest.fail("training began"))
    flags, message = WRONG_DESTINATIONS[destination]
    with pytest.raises(SystemExit) as exit_info:
        run(command | flags)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "hf auth login" in error


def test_who_is_not_logged_in_learns_it_before_the_data_are_read(hub, command, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    monkeypatch.setattr(cli, "prepare_rows", lambda *args: pytest.fail("the data were read"))
    with pytest.raises(SystemExit):
        run(command)
    assert "hf auth login" in capsys.readouterr().err


def test_a_token_on_the_command_line_is_not_pushed(hub, command, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    flags = command | {"--hub-token": LoopbackHub.token}
    monkeypatch.setattr(sys, "argv", ["train_eagle3.py", *(part for flag in flags.items() for part in flag)])
    assert run(flags) == 0
    pushed = hub.repos[REPO][-1]
    leaks = [path for path in pushed.rglob("*") if path.is_file() and LoopbackHub.token.encode() in path.read_bytes()]
    assert leaks == []
    assert "--hub-token ***" in " ".join(json.loads((pushed / "provenance.json").read_text())["argv"])
