"""Training from stored features: the bits of training online, and requests that do not fit the features."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from features_fixtures import preparation_flags, prepare_features, save_target
from reference_runs import command_line, error_of, run
from reference_ttt import CONVERSATIONS, write_conversations
from safetensors.torch import load_file

from eagle3_mla.training import cli, target
from eagle3_mla.training.trainer import Eagle3Trainer

pytestmark = pytest.mark.usefixtures("own_dataset_cache")

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_eagle3.py"
ONLINE = {"--max-length": "64", "--target-forward": "document"}


@pytest.fixture(scope="module")
def target_path(tmp_path_factory) -> Path:
    return save_target(tmp_path_factory.mktemp("target"))


@pytest.fixture
def dataset_path(tmp_path) -> Path:
    return write_conversations(tmp_path / "train.jsonl", CONVERSATIONS * 2)


@pytest.fixture
def prepare(target_path, dataset_path, tmp_path):
    """Stores features of ten conversations."""

    def prepare(**changes: str) -> Path:
        flags = preparation_flags(target_path, dataset_path, tmp_path / "features") | {"--max-length": "64"}
        return prepare_features(flags | {f"--{name.replace('_', '-')}": value for name, value in changes.items()})

    return prepare


@pytest.fixture
def command(target_path, tmp_path) -> dict[str, str]:
    """A run of two epochs, five batches of two conversations each; the draft's own weights stay in float32."""
    return {
        "--model-path": str(target_path),
        "--output-dir": str(tmp_path / "out"),
        "--attention-backend": "sdpa_mla",
        "--draft-vocab-size": "100",
        "--num-ttt-steps": "3",
        "--per-device-train-batch-size": "2",
        "--num-train-epochs": "2",
        "--learning-rate": "0.01",
        "--save-strategy": "no",
        "--logging-steps": "1",
        "--use-cpu": "True",
        "--disable-tqdm": "True",
    }


def train(flags: dict[str, str]) -> tuple[dict[str, torch.Tensor], list[tuple[float, float]]]:
    """Trained weights, and loss and gradient norm of every step."""
    assert run(flags) == 0
    output_dir = Path(flags["--output-dir"])
    log = [json.loads(line) for line in (output_dir / "training_log.jsonl").read_text().splitlines()]
    steps = [(entry["loss"], entry["grad_norm"]) for entry in log if "loss" in entry]
    return load_file(output_dir / "model.safetensors"), steps


def train_both(command, dataset_path, features, tmp_path, **online):
    """The same run online and from features."""
    online_flags = (
        {"--dataset": str(dataset_path)} | ONLINE | {f"--{n.replace('_', '-')}": v for n, v in online.items()}
    )
    trained_online = train(command | online_flags)
    trained_offline = train(command | {"--features": str(features), "--output-dir": str(tmp_path / "offline")})
    return trained_online, trained_offline


def assert_same_training(first, second) -> None:
    (weights, steps), (other_weights, other_steps) = first, second
    assert steps == other_steps
    assert weights.keys() == other_weights.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, other_weights[name]), name


@pytest.mark.parametrize(
    ("dtype", "batch_size"), [("bfloat16", "1"), ("bfloat16", "2"), ("bfloat16", "4"), ("float32", "2")]
)
def test_features_train_the_bits_that_a_target_read_by_document_trains(
    dtype, batch_size, prepare, command, dataset_path, tmp_path
):
    """Two epochs with different batches: states that depend on the batch would show in the second at the latest."""
    command |= {"--per-device-train-batch-size": batch_size}
    features = prepare(target_dtype=dtype)
    online, offline = train_both(command, dataset_path, features, tmp_path, target_dtype=dtype)
    assert_same_training(online, offline)
    assert len(online[1]) >= 6
    provenances = [json.loads((tmp_path / name / "provenance.json").read_text()) for name in ("out", "offline")]
    for fact in ("data_sha256", "num_supervised_tokens", "dataset", "num_rows"):
        assert provenances[0][fact] == provenances[1][fact], fact


def test_features_train_the_bits_of_any_online_run_with_one_document_a_batch(prepare, command, dataset_path, tmp_path):
    """Then a batch is a document, whichever way the target reads."""
    command |= {"--per-device-train-batch-size": "1", "--gradient-accumulation-steps": "2"}
    online, offline = train_both(
        command, dataset_path, prepare(), tmp_path, target_dtype="bfloat16", target_forward="batch"
    )
    assert_same_training(online, offline)


def test_a_target_that_reads_batches_trains_the_same_up_to_its_rounding(prepare, command, dataset_path, tmp_path):
    features = prepare(target_dtype="float32")
    (_, online), (_, offline) = train_both(
        command, dataset_path, features, tmp_path, target_dtype="float32", target_forward="batch"
    )
    torch.testing.assert_close(torch.tensor(online), torch.tensor(offline), rtol=1e-3, atol=1e-4)


def test_packed_documents_train_the_same_bits_from_features(prepare, command, dataset_path, tmp_path):
    command |= {"--packing": "True"}
    online, offline = train_both(command, dataset_path, prepare(), tmp_path, target_dtype="bfloat16")
    assert_same_training(online, offline)


def test_mixed_precision_is_the_same_from_features(prepare, command, dataset_path, tmp_path):
    command |= {"--bf16": "True"}
    online, offline = train_both(command, dataset_path, prepare(), tmp_path, target_dtype="bfloat16")
    assert_same_training(online, offline)


@pytest.mark.parametrize("backend", ["flex_attention_mla", "eager"])
def test_other_backends_and_heads_train_from_features(backend, prepare, command, dataset_path, tmp_path):
    command |= {"--attention-backend": backend}
    online, offline = train_both(command, dataset_path, prepare(), tmp_path, target_dtype="bfloat16")
    assert_same_training(online, offline)


def test_eight_bits_change_the_loss_of_a_given_draft_by_less_than_a_hundredth(
    prepare, command, dataset_path, tmp_path
):
    """At learning rate 0, so that every batch of both epochs meets the same draft."""
    features = prepare(storage_dtype="int8")
    command |= {"--learning-rate": "0"}
    (_, online), (_, offline) = train_both(command, dataset_path, features, tmp_path, target_dtype="bfloat16")
    losses, stored_losses = torch.tensor(online)[:, 0], torch.tensor(offline)[:, 0]
    assert (losses != stored_losses).all()
    torch.testing.assert_close(stored_losses, losses, rtol=1e-2, atol=0)


def test_the_target_is_not_loaded(prepare, command, target_path, tmp_path, monkeypatch):
    features = prepare()
    bare = shutil.copytree(target_path, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(cli, "load_target", lambda *args: pytest.fail("the target was loaded"))
    monkeypatch.setattr(target, "run_decoder", lambda *args, **kwargs: pytest.fail("the target was run"))
    train(command | {"--model-path": str(bare), "--features": str(features)})


def test_an_interrupted_run_from_features_resumes_with_its_bits(prepare, command, tmp_path, monkeypatch):
    command |= {"--features": str(prepare()), "--save-strategy": "steps", "--save-steps": "2"}
    whole = train(command)
    resumed = command | {"--output-dir": str(tmp_path / "resumed")}
    training_step = Eagle3Trainer.training_step

    def interrupt_at_5(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Eagle3Trainer, "training_step", interrupt_at_5)
        with pytest.raises(KeyboardInterrupt):
            train(resumed)
    weights, _ = train(resumed | {"--resume-from-checkpoint": "True"})
    for name, weight in whole[0].items():
        assert torch.equal(weight, weights[name]), name


def test_damaged_features_end_the_command_before_the_output_directory_exists(prepare, command, tmp_path, capsys):
    features = prepare()
    shard = min(features.glob("features-*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    error = error_of(command | {"--features": str(features)}, capsys)
    assert f"{shard.name} is damaged" in error
    assert not (tmp_path / "out").exists()


def test_features_of_another_target_are_refused_by_key(prepare, command, tmp_path, capsys):
    features = prepare()
    deeper = save_target(tmp_path / "deeper", num_hidden_layers=7)
    error = error_of(command | {"--features": str(features), "--model-path": str(deeper)}, capsys)
    assert "The features are of another target: its `num_hidden_layers` is 6" in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--dataset": "train.jsonl"}, "Exactly one of `--dataset` and `--features`"),
        ({"--max-length": "32"}, "`--max-length` was settled when the features were prepared"),
        ({"--dataset-split": "test"}, "`--dataset-split` was settled when the features were prepared"),
        ({"--target-dtype": "float32"}, "`--target-dtype` must be bfloat16"),
        ({"--target-device-map": "auto"}, "need the target, which is not loaded"),
        ({"--diagnose": "True"}, "need the target, which is not loaded"),
        ({"--features": "./nowhere"}, "nowhere holds no stored features"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_arguments_that_contradict_the_features_are_refused(changes, message, prepare, command, tmp_path, capsys):
    error = error_of(command | {"--features": str(prepare())} | changes, capsys)
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_neither_data_nor_features_is_a_wrong_request(command, capsys):
    assert "Exactly one of `--dataset` and `--features`" in error_of(command, capsys)


@pytest.mark.slow
def test_two_processes_train_from_features_what_they_train_online(prepare, command, dataset_path, tmp_path):
    sources = {
        "online": ONLINE | {"--dataset": str(dataset_path), "--target-dtype": "bfloat16"},
        "offline": {"--features": str(prepare())},
    }
    for name, source in sources.items():
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(SCRIPT)]
        flags = command | source | {"--output-dir": str(tmp_path / name)}
        subprocess.run([*launch, *command_line(flags)], check=True, timeout=200)
    online, offline = (load_file(tmp_path / name / "model.safetensors") for name in sources)
    for name, weight in online.items():
        assert torch.equal(weight, offline[name]), name
