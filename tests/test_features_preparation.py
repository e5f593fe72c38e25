"""Storing features: what is in the shards, kills at any moment, other requests, disk space, several processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from features_fixtures import (
    kill_myself,
    preparation_flags,
    prepare_features,
    run_until_killed,
    save_target,
    stored_bytes,
)
from reference_ttt import CONVERSATIONS, write_conversations
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from eagle3_mla.training import feature_preparation, feature_shards
from eagle3_mla.training.feature_shards import is_taught

pytestmark = pytest.mark.usefixtures("own_dataset_cache")

SCRIPT = Path(__file__).parents[1] / "scripts" / "prepare_features.py"


@pytest.fixture(scope="module")
def target_path(tmp_path_factory) -> Path:
    return save_target(tmp_path_factory.mktemp("target"))


@pytest.fixture
def flags(target_path, tmp_path) -> dict[str, str]:
    dataset = write_conversations(tmp_path / "train.jsonl")
    return preparation_flags(target_path, dataset, tmp_path / "features")


def error_of(flags: dict[str, str], capsys) -> str:
    with pytest.raises(SystemExit) as exit_info:
        prepare_features(flags)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


def test_a_shard_holds_what_the_target_says_about_each_document_alone(flags, target_path):
    directory = prepare_features(flags)
    manifest = json.loads((directory / "manifest.json").read_text())
    target = AutoModelForCausalLM.from_pretrained(target_path, dtype=torch.bfloat16).eval()
    layer_ids = manifest["request"]["eagle_aux_hidden_state_layer_ids"]
    num_documents = 0
    for shard in manifest["shards"]:
        tensors = load_file(directory / shard["name"])
        assert tensors["input_ids"].shape == (shard["num_tokens"],)
        lengths = tensors["lengths"].tolist()
        columns = [tensors[name].split(lengths) for name in ("input_ids", "loss_mask", "aux_hidden_states")]
        taught_states = []
        for input_ids, loss_mask, aux_hidden_states in zip(*columns, strict=True):
            with torch.no_grad():
                output = target(input_ids=input_ids[None].long(), output_hidden_states=True)
            states = [output.hidden_states[layer_id][0] for layer_id in layer_ids]
            assert torch.equal(aux_hidden_states, torch.cat(states, dim=-1))
            taught_states.append(output.hidden_states[-1][0][is_taught(loss_mask)])
            num_documents += 1
        assert torch.equal(tensors["last_hidden_states"], torch.cat(taught_states))
    assert num_documents == len(CONVERSATIONS)
    assert len(manifest["shards"]) > 2
    assert not list(directory.glob(".*"))


def test_the_origin_of_the_features_is_beside_them(flags, target_path):
    provenance = json.loads((prepare_features(flags) / "provenance.json").read_text())
    assert provenance["versions"].keys() >= {"torch", "transformers"}
    assert len(provenance["request"]["data_sha256"]) == len(provenance["request"]["target_weights_sha256"]) == 64
    assert {"argv", "commit", "device", "num_tokens"} <= provenance.keys()


def test_a_kill_before_any_file_appears_costs_nothing_but_time(flags, tmp_path):
    """Every rename is a moment between two states of the directory; the run is killed before each of them in turn."""
    whole = stored_bytes(prepare_features(flags | {"--output-dir": str(tmp_path / "whole")}))
    num_shards = sum(name.endswith(".safetensors") for name in whole) - 1
    num_renames = 2 + 2 * num_shards + 2
    for fatal_rename in range(1, num_renames + 1):

        def arm(fatal_rename=fatal_rename):
            replace, count = os.replace, 0

            def replace_or_die(source, destination):
                nonlocal count
                count += 1
                if count == fatal_rename:
                    kill_myself()
                replace(source, destination)

            os.replace = replace_or_die

        shutil.rmtree(tmp_path / "features", ignore_errors=True)
        run_until_killed(flags, arm)
        assert stored_bytes(prepare_features(flags)) == whole


def test_a_kill_while_a_shard_is_written_leaves_no_shard_of_that_name(flags, tmp_path):
    whole = stored_bytes(prepare_features(flags | {"--output-dir": str(tmp_path / "whole")}))
    first = min(name for name in whole if name.startswith("features-"))

    def arm():
        save_file = feature_shards.save_file

        def save_half(tensors, path, metadata):
            save_file(tensors, path, metadata)
            if first in str(path):
                os.truncate(path, path.stat().st_size // 2)
                kill_myself()

        feature_shards.save_file = save_half

    run_until_killed(flags, arm)
    assert not (tmp_path / "features" / first).exists()
    assert stored_bytes(prepare_features(flags)) == whole


def test_shards_that_are_there_are_kept(flags, monkeypatch):
    directory = prepare_features(flags)
    times = {path: path.stat().st_mtime_ns for path in directory.glob("features-*")}
    monkeypatch.setattr(feature_preparation, "read_document", lambda *args: pytest.fail("a document was read again"))
    prepare_features(flags)
    assert {path: path.stat().st_mtime_ns for path in directory.glob("features-*")} == times


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "swapped", "head"])
def test_what_is_damaged_is_named_and_written_again(damage, flags, caplog):
    directory = prepare_features(flags)
    whole = stored_bytes(directory)
    first, second = sorted(directory.glob("features-*"))[:2]
    damaged = directory / "target_head.safetensors" if damage == "head" else first
    if damage in ("flipped", "head"):
        content = bytearray(damaged.read_bytes())
        content[-1] ^= 1
        damaged.write_bytes(content)
    elif damage == "truncated":
        os.truncate(damaged, damaged.stat().st_size - 1)
    elif damage == "swapped":
        shutil.copy(second, damaged)
    else:
        damaged.unlink()
    assert stored_bytes(prepare_features(flags)) == whole
    assert damaged.name in caplog.text
    assert second.name not in caplog.text


def test_an_interrupt_keeps_complete_shards_and_says_how_to_go_on(flags, monkeypatch, capsys):
    write_shard = feature_preparation.write_shard

    def interrupt_at_the_second(path, shard, *args):
        if shard.index == 1:
            raise KeyboardInterrupt
        return write_shard(path, shard, *args)

    with monkeypatch.context() as patch:
        patch.setattr(feature_preparation, "write_shard", interrupt_at_the_second)
        with pytest.raises(SystemExit) as exit_info:
            prepare_features(flags)
    assert exit_info.value.code == 130
    message = capsys.readouterr().err
    assert "1 of " in message
    assert "the same command continues" in message
    monkeypatch.setattr(
        feature_preparation,
        "write_shard",
        lambda path, shard, *args: (
            pytest.fail("the complete shard was written again")
            if shard.index == 0
            else write_shard(path, shard, *args)
        ),
    )
    prepare_features(flags)


@pytest.mark.parametrize(
    ("flag", "value", "field"),
    [
        ("--storage-dtype", "int8", "storage_dtype"),
        ("--target-dtype", "float32", "target_dtype"),
        ("--max-length", "16", "max_length"),
        ("--tokens-per-shard", "50", "tokens_per_shard"),
    ],
)
def test_another_request_in_the_same_directory_is_refused_by_field(flag, value, field, flags, capsys):
    whole = stored_bytes(prepare_features(flags))
    error = error_of(flags | {flag: value}, capsys)
    assert f"`{field}` is {json.loads(whole['manifest.json'])['request'][field]} for the features" in error
    assert value in error
    assert stored_bytes(Path(flags["--output-dir"])) == whole


def test_another_target_and_other_data_are_refused_by_field(flags, tmp_path, capsys):
    prepare_features(flags)
    deeper = save_target(tmp_path / "deeper", num_hidden_layers=7)
    assert "`target_config_sha256` is" in error_of(flags | {"--model-path": str(deeper)}, capsys)
    other_data = write_conversations(tmp_path / "other.jsonl", CONVERSATIONS[:4])
    assert "`data_sha256` is" in error_of(flags | {"--dataset": str(other_data)}, capsys)
    retrained = save_target(tmp_path / "retrained")
    weights = load_file(retrained / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(retrained, dtype=torch.bfloat16)
    model.load_state_dict(weights | {"model.norm.weight": weights["model.norm.weight"] * 2})
    model.save_pretrained(retrained)
    assert "`target_weights_sha256` is" in error_of(flags | {"--model-path": str(retrained)}, capsys)


def test_a_full_disk_is_found_before_the_target_is_loaded(flags, monkeypatch, capsys):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(feature_preparation, "load_target", lambda *args: pytest.fail("the target was loaded"))
    error = error_of(flags, capsys)
    assert "GB are free there" in error
    assert not Path(flags["--output-dir"]).exists()


def test_the_announced_size_is_the_size_of_the_files(flags):
    for storage_dtype in ("bfloat16", "int8", "float32"):
        directory = prepare_features(
            flags | {"--storage-dtype": storage_dtype, "--output-dir": f"{flags['--output-dir']}-{storage_dtype}"}
        )
        manifest = feature_preparation.Manifest.read(directory)
        for shard in manifest.shards:
            size = (directory / shard.name).stat().st_size
            assert 0 < size - manifest.shard_format.num_bytes(shard) < 4096


def test_a_directory_with_something_else_in_it_is_refused(flags, capsys):
    directory = Path(flags["--output-dir"])
    directory.mkdir()
    (directory / "thesis.txt").write_text("important")
    assert "holds something else (thesis.txt)" in error_of(flags, capsys)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--tokens-per-shard", "0", "`--tokens-per-shard` must be at least 1, got 0"),
        ("--storage-dtype", "int4", "invalid choice: 'int4'"),
        ("--model-path", "./nowhere", "The target ./nowhere cannot be loaded"),
        ("--dataset", "./nowhere.jsonl", "nowhere.jsonl does not exist"),
        ("--features", "./somewhere", "Exactly one of `--dataset` and `--features`"),
        ("--packing", "True", "`--packing` is for training"),
        ("--inspect-data", "1", "`--inspect-data` is for training"),
    ],
)
def test_a_wrong_request_is_one_message_and_leaves_nothing(flag, value, message, flags, capsys):
    assert message in error_of(flags | {flag: value}, capsys)
    assert not Path(flags["--output-dir"]).exists()


@pytest.mark.slow
def test_two_processes_store_what_one_stores(flags, tmp_path):
    whole = stored_bytes(prepare_features(flags | {"--output-dir": str(tmp_path / "whole")}))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", str(SCRIPT)]
    subprocess.run([*launch, *(part for flag in flags.items() for part in flag)], check=True, timeout=180)
    assert stored_bytes(Path(flags["--output-dir"])) == whole


@pytest.mark.slow
def test_a_process_killed_from_outside_is_continued(flags, tmp_path):
    """As the kernel's out-of-memory killer would: no code of ours runs afterwards."""
    dataset = write_conversations(tmp_path / "many.jsonl", CONVERSATIONS * 40)
    flags |= {"--dataset": str(dataset)}
    whole = stored_bytes(prepare_features(flags | {"--output-dir": str(tmp_path / "whole")}))
    command = [sys.executable, str(SCRIPT), *(part for flag in flags.items() for part in flag)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    directory = Path(flags["--output-dir"])
    while not list(directory.glob("features-*")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(list(directory.glob("features-*"))) < len(whole) - 2
    assert stored_bytes(prepare_features(flags)) == whole
