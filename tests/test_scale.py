"""Training in other shapes: accumulated, averaged, interrupted, on several processes, with the target elsewhere."""

import copy
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.utils import DeepSpeedPlugin
from reference_scale import ONE_PLAIN_STEP, gradients_of_run, packed_rows, packed_trainer
from reference_ttt import CONVERSATIONS, save_tiny_target, tiny_target, write_conversations
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from eagle3_mla.training import cli, placement
from eagle3_mla.training.arguments import DraftArguments, Eagle3TrainingArguments
from eagle3_mla.training.averaging import AVERAGE_FILE
from eagle3_mla.training.trainer import Eagle3Trainer

ROOT = Path(__file__).parents[1]
LAUNCH = [sys.executable, "-m", "torch.distributed.run"]
TRAIN = str(ROOT / "scripts" / "train_eagle3.py")
# Audit events that change what is on the disk; `open` counts when it opens for writing.
CHANGES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink"}


@pytest.fixture(scope="module")
def target_path(tmp_path_factory) -> Path:
    return save_tiny_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def dataset_path(tmp_path_factory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("data") / "four.jsonl", CONVERSATIONS[:4])


@pytest.fixture(autouse=True)
def own_dataset_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))


@pytest.fixture
def command(target_path, dataset_path, tmp_path) -> dict[str, str]:
    """Four conversations in one batch, 4 steps, saved after 2 and 4."""
    return {
        "--model-path": str(target_path),
        "--dataset": str(dataset_path),
        "--output-dir": str(tmp_path / "out"),
        "--attention-backend": "sdpa_mla",
        "--num-ttt-steps": "3",
        "--per-device-train-batch-size": "4",
        "--max-steps": "4",
        "--save-steps": "2",
        "--logging-steps": "1",
        "--use-cpu": "True",
        "--disable-tqdm": "True",
    }


@pytest.fixture(scope="module")
def head(target_path, dataset_path, tmp_path_factory) -> Path:
    """A head to train adapters on."""
    directory = tmp_path_factory.mktemp("head")
    flags = {"--model-path": str(target_path), "--dataset": str(dataset_path), "--output-dir": str(directory)}
    run(flags | {"--attention-backend": "sdpa_mla", "--max-steps": "1", "--save-strategy": "no", "--use-cpu": "True"})
    return directory


def words(flags: dict[str, str]) -> list[str]:
    return [part for flag in flags.items() for part in flag]


def run(flags: dict[str, str], *more: str) -> None:
    cli.main(words(flags) + list(more))


def launch(*command: str, **options) -> None:
    subprocess.run(command, check=True, **options)


def error_of(flags: dict[str, str], capsys) -> str:
    with pytest.raises(SystemExit) as exit_info:
        run(flags)
    assert exit_info.value.code == 2
    return capsys.readouterr().err


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint that training goes on with: weights, averages, optimizer."""
    files = sorted(checkpoint.glob("*.safetensors"))
    tensors = {f"{file.name}: {name}": tensor for file in files for name, tensor in load_file(file).items()}
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    return tensors | {f"{index}: {name}": tensor for index in state for name, tensor in state[index].items()}


def assert_same_bits(checkpoint: Path, expected: Path) -> None:
    tensors, others = tensors_of(checkpoint), tensors_of(expected)
    assert tensors.keys() == others.keys()
    assert [name for name, tensor in tensors.items() if not torch.equal(tensor, others[name])] == []


# The global batch.


@pytest.mark.parametrize("batch_size", [1, 2, 4], ids=lambda size: f"{size}x{8 // size}")
def test_accumulated_packed_rows_have_the_gradient_of_one_batch(batch_size, tmp_path):
    """Documents that share a row with others count once, whatever micro-batch their row is in."""
    whole = gradients_of_run(packed_trainer(tmp_path, per_device_train_batch_size=8, **ONE_PLAIN_STEP))
    pieces = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 8 // batch_size}
    accumulated = gradients_of_run(packed_trainer(tmp_path, **ONE_PLAIN_STEP | pieces))
    torch.testing.assert_close(accumulated, whole, atol=1e-10, rtol=1e-7)
    assert all(gradient.abs().max() > 0 for gradient in whole.values())


@pytest.mark.parametrize("batch_size", [1, 2, 4], ids=lambda size: f"{size}x{8 // size}")
def test_accumulated_rows_of_an_incomplete_last_batch_have_the_gradient_of_one_batch(batch_size, tmp_path):
    """11 rows are a batch of 8 and one of 3, which leaves whole micro-batches empty."""
    epoch = ONE_PLAIN_STEP | {"num_rows": 11, "max_steps": 2}
    whole = gradients_of_run(packed_trainer(tmp_path, per_device_train_batch_size=8, **epoch))
    pieces = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 8 // batch_size}
    accumulated = gradients_of_run(packed_trainer(tmp_path, **epoch | pieces))
    torch.testing.assert_close(accumulated, whole, atol=1e-10, rtol=1e-7)


@pytest.mark.parametrize("drop_last", [False, True], ids=["filled", "dropped"])
def test_every_row_is_learnt_from_once_in_an_epoch(drop_last, tmp_path):
    """The last batch is filled with rows that supervise nothing, or dropped as a whole."""
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 3.0}
    trainer = packed_trainer(tmp_path, num_rows=11, dataloader_drop_last=drop_last, **sizes)
    batches = list(trainer.get_train_dataloader())
    supervised = [int(batch["loss_mask"].sum()) for batch in batches]
    rows = [sum(row["loss_mask"]) for row in packed_rows(11)]
    assert len(batches) == (4 if drop_last else 6)
    assert all(len(batch["input_ids"]) == 2 for batch in batches)
    assert sum(supervised) == sum(rows) or drop_last
    trainer.train()
    assert trainer.state.global_step == (6 if drop_last else 9)


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", [8, 11, 13], ids="{} rows".format)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_have_losses_and_gradient_of_one_on_packed_rows(accumulation, num_rows, tmp_path):
    """11 and 13 rows end with an incomplete batch, of which one process has less than the other, or nothing."""
    results = []
    for num_processes in (1, 2):
        directory = tmp_path / str(num_processes)
        directory.mkdir()
        arguments = {
            "per_device_train_batch_size": 8 // num_processes // accumulation,
            "gradient_accumulation_steps": accumulation,
            "num_rows": num_rows,
            "max_steps": -(-num_rows // 8),
        }
        worker = str(ROOT / "tests" / "reference_scale.py")
        launch(*LAUNCH, "--nproc-per-node", str(num_processes), worker, str(directory), json.dumps(arguments))
        results.append(load_file(directory / "gradients.safetensors"))
    torch.testing.assert_close(results[1], results[0], atol=1e-10, rtol=1e-7)


# Optimizer and averages.


def test_muon_steps_matrices_along_the_orthogonal_factor_of_their_gradients(tmp_path):
    """The first step of `U S V'` is `-lr * 0.2 * sqrt(longer side) * U V'`. Five Newton-Schulz steps leave singular
    values between 0.5 and 1.5 or so: directions are compared closely, sizes are not."""
    gradients = gradients_of_run(packed_trainer(tmp_path, **ONE_PLAIN_STEP))
    muon = packed_trainer(tmp_path, **ONE_PLAIN_STEP, muon_learning_rate=1e-3)
    before = {name: weight.detach().clone() for name, weight in muon.draft.named_parameters()}
    muon.train()
    after = dict(muon.draft.named_parameters())
    for name in ("fc.weight", "layers.0.self_attn.W_dkv.weight", "layers.0.mlp.down_proj.weight"):
        left, singular, right = torch.linalg.svd(gradients[name], full_matrices=False)
        rank = int((singular > 0.05 * singular.norm()).sum())  # smaller ones are not blown up to 1 in five steps
        step = (before[name] - after[name]) / (1e-3 * 0.2 * max(after[name].shape) ** 0.5)
        along = (left.T @ step @ right.T)[:rank, :rank]
        assert along.diagonal().min() > 0.4
        assert along.diagonal().max() < 1.6
        assert (along - along.diagonal().diag()).abs().max() < 0.1


def test_muon_leaves_token_matrices_and_norms_to_the_other_optimizer(tmp_path):
    trainer = packed_trainer(tmp_path, weight_decay=0.1, muon_learning_rate=2e-3)
    *others, muon = trainer.create_optimizer().param_groups
    names = {weight: name for name, weight in trainer.draft.named_parameters()}
    by_others = {names[weight] for group in others for weight in group["params"]}
    assert {name for name in names.values() if "norm" in name or "lm_head" in name} == by_others
    assert len(names) == len(by_others) + len(muon["params"])
    assert (muon["lr"], muon["weight_decay"]) == (2e-3, 0.1)
    assert trainer.create_scheduler(num_training_steps=10).base_lrs == [1e-3, 1e-3, 2e-3]
    assert trainer.create_optimizer() is trainer.optimizer


RESUMED_OTHERWISE = {
    "with Muon": ("--muon-learning-rate", "0", "2e-3", "`--muon-learning-rate` must be 0"),
    "without Muon": ("--muon-learning-rate", "2e-3", "0", "`--muon-learning-rate` must be above 0"),
    "with an average": ("--ema-decay", None, "0.9", "holds no average"),
}


@pytest.mark.parametrize("case", RESUMED_OTHERWISE)
def test_a_run_does_not_resume_as_another_one(case, command, capsys):
    flag, first, then, message = RESUMED_OTHERWISE[case]
    run(command | ({} if first is None else {flag: first}))
    error = error_of(command | {flag: then, "--resume-from-checkpoint": "True"}, capsys)
    assert message in error
    assert "Traceback" not in error


def test_recomputing_steps_changes_no_bit_of_a_run(command, tmp_path):
    run(command)
    run(command | {"--output-dir": str(tmp_path / "recomputed"), "--gradient-checkpointing": "True"})
    assert_same_bits(tmp_path / "recomputed" / "checkpoint", tmp_path / "out" / "checkpoint")


RATES = {
    "defaults": ({}, (1 / 16, 3 / 16)),
    "a rate": ({"learning_rate": 0.5}, (0.5, 1.5)),
    "a rate of Muon": ({"muon_learning_rate": 0.5}, (1 / 16, 0.5)),
    "no Muon": ({"muon_learning_rate": 0.0}, (1 / 16, 0.0)),
    "another optimizer": ({"optim": "sgd"}, (1 / 16, None)),
}


@pytest.mark.parametrize("case", RATES)
def test_the_rate_of_muon_follows_that_of_the_other_optimizer(case, tmp_path):
    given, expected = RATES[case]
    args = Eagle3TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **given)
    args.set_default_rates(hidden_size=16, is_adapter=False)
    assert (args.learning_rate, args.muon_learning_rate) == expected


@pytest.mark.parametrize("schedule", ["polynomial", "cosine_with_min_lr", "warmup_stable_decay"])
def test_schedules_know_an_optimizer_with_muon(schedule, tmp_path):
    """Some of them read the rate from the optimizer's defaults."""
    kwargs = {"cosine_with_min_lr": {"min_lr": 1e-4}, "warmup_stable_decay": {"num_decay_steps": 2}}.get(schedule, {})
    trainer = packed_trainer(
        tmp_path, muon_learning_rate=2e-3, lr_scheduler_type=schedule, lr_scheduler_kwargs=kwargs, max_steps=4
    )
    trainer.train()
    assert all(group["lr"] < 1e-3 for group in trainer.optimizer.param_groups)


@pytest.mark.parametrize("launcher", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_sharded_draft_is_trained_by_one_optimizer(launcher, tmp_path, monkeypatch):
    args = Eagle3TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    monkeypatch.setenv(launcher, "true")
    args.set_default_rates(hidden_size=16, is_adapter=False)
    assert args.muon_learning_rate is None


def test_an_adapter_is_trained_by_one_optimizer_unless_told_otherwise(tmp_path):
    args = Eagle3TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    args.set_default_rates(hidden_size=16, is_adapter=True)
    assert args.muon_learning_rate is None


def test_an_optimizer_with_muon_is_restored_with_its_schedule(tmp_path):
    """The groups that a schedule changes are those that the parts step with, also after loading."""
    trainer = packed_trainer(tmp_path, muon_learning_rate=2e-3)
    optimizer = trainer.create_optimizer()
    for weight in trainer.draft.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    optimizer.load_state_dict(saved)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3, 2e-3]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [weight.detach().clone() for weight in trainer.draft.parameters()]
    optimizer.step()
    assert all(map(torch.equal, before, trainer.draft.parameters()))


class WeightsAfterEachStep(TrainerCallback):
    def __init__(self):
        self.weights: list[torch.Tensor] = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.keep(model)

    def on_step_end(self, args, state, control, model, **kwargs):
        self.keep(model)

    def keep(self, model):
        self.weights.append(model.fc.weight.detach().double().clone())


def test_the_average_follows_the_weights_by_its_formula(tmp_path):
    trainer = packed_trainer(tmp_path, dtype=torch.bfloat16, ema_decay=0.3, max_steps=6, learning_rate=0.1)
    course = WeightsAfterEachStep()
    trainer.add_callback(course)
    trainer.train()
    expected, *later = course.weights
    for step, weight in enumerate(later, start=1):
        kept = min(0.3, step / (step + 9))
        expected = kept * expected + (1 - kept) * weight
    average = trainer.averaging.averages["fc.weight"]
    assert average.dtype == torch.float32
    torch.testing.assert_close(average.double(), expected, atol=1e-6, rtol=1e-5)
    assert (expected - later[-1]).abs().max() > 1e-3


def test_the_result_is_the_average_and_a_checkpoint_has_both(command, tmp_path):
    run(command, "--ema-decay", "0.9")
    out = tmp_path / "out"
    released = load_file(out / "model.safetensors")
    weights, averages = (load_file(out / "checkpoint" / name) for name in ("model.safetensors", AVERAGE_FILE))
    assert released.keys() == weights.keys()
    assert weights.keys() - averages.keys() == {"d2t", "t2d"}
    assert all(torch.equal(released[name], average) for name, average in averages.items())
    assert (weights["fc.weight"] - averages["fc.weight"]).abs().max() > 0


@pytest.mark.parametrize("decay", ["0", "1", "1.5"])
def test_a_decay_outside_of_its_range_is_refused(decay, command, capsys):
    assert "`--ema-decay` must be between 0 and 1" in error_of(command | {"--ema-decay": decay}, capsys)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the processes would take the GPUs together")
def test_processes_that_would_train_side_by_side_are_refused(command):
    """torchrun on a CPU: accelerate takes each process for a run of its own, and all would write to one place."""
    del command["--use-cpu"]
    started = subprocess.run(
        [*LAUNCH, "--nproc-per-node", "2", TRAIN, *words(command)], capture_output=True, text=True, cwd=ROOT
    )
    assert started.returncode != 0
    assert "The launcher started 2 processes" in started.stderr


# Trackers.


class Tracker(TrainerCallback):
    def __init__(self):
        self.logged: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append(dict(logs))


METRICS = {"loss", "learning_rate", "grad_norm", "accuracy_0", "accuracy_2", "simulated_acceptance_length"}


def test_trackers_get_the_metrics_of_every_logged_step(tmp_path):
    trainer, tracker = packed_trainer(tmp_path, max_steps=3), Tracker()
    trainer.add_callback(tracker)
    trainer.train()
    assert [logs.keys() >= METRICS for logs in tracker.logged] == [True, True, True, False]


def test_tensorboard_gets_the_metrics(command, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    run(command, "--report-to", "tensorboard")
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    assert {f"train/{name}" for name in METRICS} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("train/simulated_acceptance_length")) == 4


# Kills.


def train_in_a_child(flags: dict[str, str], kill_at: int | None = None) -> int:
    """
    Trains in a process of its own that is killed at its `kill_at`-th change in the output directory.

    Returns:
        `int`: Changes that it made.
    """
    seen = mmap.mmap(-1, 8)
    child = os.fork()
    if child == 0:
        count = 0

        def watch(event: str, arguments: tuple) -> None:
            nonlocal count
            if event not in CHANGES or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
                return
            if not any(str(argument).startswith(flags["--output-dir"]) for argument in arguments):
                return
            count += 1
            seen[:8] = count.to_bytes(8, "little")
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        try:
            run(flags)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) == (kill_at is not None)
    return int.from_bytes(seen[:8], "little")


VARIANTS = {
    "plain": {},
    "averaged": {"--ema-decay": "0.9"},
    "adapter": {"--lora-rank": "2"},
    "averaged adapter, workers": {"--lora-rank": "2", "--ema-decay": "0.9", "--dataloader-num-workers": "2"},
    "packed": {"--packing": "True", "--max-length": "40", "--ema-decay": "0.9"},
    "by Muon, accumulated": {
        "--muon-learning-rate": "2e-3",
        "--gradient-accumulation-steps": "2",
        "--per-device-train-batch-size": "1",
    },
}
# Shares of the changes; the last tenth writes the result.
MOMENTS = [0.1, 0.4, 0.55, 0.65, 0.7, 0.8, 0.97]


def check_kill(flags: dict[str, str], moments: list[float], tmp_path: Path) -> None:
    num_changes = train_in_a_child(flags)
    whole = tmp_path / "out"
    for moment in moments:
        killed = tmp_path / f"killed-{moment}"
        again = flags | {"--output-dir": str(killed)}
        train_in_a_child(again, kill_at=int(moment * num_changes))
        resume = ["--resume-from-checkpoint"] if (killed / "checkpoint").exists() else []
        run(again, *resume)
        assert_same_bits(killed / "checkpoint", whole / "checkpoint")
        name = "adapter_model.safetensors" if "--lora-rank" in flags else "model.safetensors"
        released, expected = load_file(killed / name), load_file(whole / name)
        assert all(torch.equal(tensor, released[key]) for key, tensor in expected.items())


def variant_flags(variant: str, command: dict[str, str], head: Path) -> dict[str, str]:
    more = {"--draft-checkpoint": str(head)} if "--lora-rank" in VARIANTS[variant] else {}
    return command | {"--per-device-train-batch-size": "2", "--max-steps": "5"} | VARIANTS[variant] | more


@pytest.mark.parametrize(
    ("variant", "moments"), [("plain", [0.5, 0.75]), ("averaged adapter, workers", [0.6])], ids=str
)
def test_a_run_killed_at_a_change_in_its_directory_resumes_to_the_bits_of_a_whole_one(
    variant, moments, command, head, tmp_path
):
    check_kill(variant_flags(variant, command, head), moments, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_killed_at_any_change_in_its_directory_resumes_to_the_bits_of_a_whole_one(
    variant, command, head, tmp_path
):
    check_kill(variant_flags(variant, command, head), MOMENTS, tmp_path)


# Several machines.


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.mark.slow
def test_machines_without_shared_storage_save_and_resume_on_their_own_disks(command, tmp_path):
    """Two launches on one machine, each in its own directory, are two machines with local disks.

    Five rows are two steps, the second one incomplete: they resume between the two.
    """
    flags = command | {"--output-dir": "out", "--per-device-train-batch-size": "2", "--save-total-limit": "5"}
    flags |= {"--save-on-each-node": "True", "--save-steps": "1"}
    flags["--dataset"] = str(write_conversations(tmp_path / "five.jsonl", CONVERSATIONS))

    def train_on_both(*more: str) -> None:
        port = free_port()
        machines = []
        for rank in ("0", "1"):
            directory = tmp_path / f"machine-{rank}"
            directory.mkdir(exist_ok=True)
            topology = ["--nnodes", "2", "--node-rank", rank, "--master-addr", "127.0.0.1", "--master-port", port]
            machines.append(subprocess.Popen([*LAUNCH, *topology, TRAIN, *words(flags), *more], cwd=directory))
        assert [machine.wait(timeout=200) for machine in machines] == [0, 0]

    train_on_both()
    outputs = [tmp_path / f"machine-{rank}" / "out" for rank in (0, 1)]
    whole = [tensors_of(output / "checkpoint-4") for output in outputs]
    for output in outputs:
        assert (output / "checkpoint").resolve().name == "checkpoint-4"
        assert not (output / ".incomplete-checkpoint").exists()
        (output / "checkpoint").unlink()
        (output / "checkpoint").symlink_to("checkpoint-3")
    assert all(torch.equal(tensor, whole[1][name]) for name, tensor in whole[0].items())
    train_on_both("--resume-from-checkpoint")
    for output, expected in zip(outputs, whole, strict=True):
        again = tensors_of(output / "checkpoint")
        assert all(torch.equal(tensor, again[name]) for name, tensor in expected.items())


# The target elsewhere.


def test_a_device_map_changes_nothing_where_there_is_one_device(command, tmp_path):
    run(command)
    run(command | {"--output-dir": str(tmp_path / "mapped"), "--target-device-map": "auto"})
    assert_same_bits(tmp_path / "mapped" / "checkpoint", tmp_path / "out" / "checkpoint")


def test_a_target_that_would_be_read_from_the_disk_is_refused(tmp_path):
    tiny_target().save_pretrained(tmp_path / "target")
    device_map = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {"model.rotary_emb": "cpu"}
    target = AutoModelForCausalLM.from_pretrained(
        tmp_path / "target", device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    with pytest.raises(ValueError, match=r"no device memory for model\.layers: it would be read from the disk"):
        placement.check_nothing_is_offloaded(target)


@pytest.mark.parametrize(
    ("device_map", "refused"),
    [
        ({"": "cpu"}, False),
        ({"a": 0, "b": 1}, False),
        ({"a": 0, "b": "cpu"}, True),
        ({"a": "cpu", "b": "cpu"}, False),
        ({}, False),
    ],
    ids=str,
)
def test_the_host_counts_as_a_device_only_where_it_is_the_only_one(device_map, refused):
    target = tiny_target()
    target.hf_device_map = device_map
    if refused:
        with pytest.raises(ValueError, match="no device memory for b: it would be read from the cpu"):
            placement.check_nothing_is_offloaded(target)
    else:
        placement.check_nothing_is_offloaded(target)


def test_a_placement_needs_the_processes_that_it_is_for(command, capsys, monkeypatch):
    assert "`--shard-target` needs at least 2 processes, got 1" in error_of(
        command | {"--shard-target": "True"}, capsys
    )
    both = command | {"--shard-target": "True", "--target-device-map": "auto"}
    assert "give one of them" in error_of(both, capsys)
    monkeypatch.setattr(placement.PartialState, "num_processes", property(lambda self: 2), raising=False)
    settings = DraftArguments(model_path="target", target_device_map="auto")
    with pytest.raises(ValueError, match="`--target-device-map` needs a single process, got 2"):
        placement.check_placement(settings)


def test_with_a_device_map_one_process_may_see_several_gpus(tmp_path):
    args = Eagle3TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert args.n_gpu == 0
    args._n_gpu = 4
    placement.claim_devices(DraftArguments(model_path="target"), args)
    assert args.n_gpu == 4
    placement.claim_devices(DraftArguments(model_path="target", target_device_map="auto"), args)
    assert args.n_gpu == 1


@pytest.mark.slow
def test_processes_that_pack_differently_share_a_sharded_target(tmp_path):
    """One row of one document, one of two: without agreement one process alone would try how the target packs."""
    results = []
    for num_processes in (1, 2):
        directory = tmp_path / str(num_processes)
        directory.mkdir()
        arguments = {"num_rows": 2, "per_device_train_batch_size": 2 // num_processes}
        arguments["is_sharded"] = num_processes == 2
        command = [*LAUNCH, "--nproc-per-node", str(num_processes), str(ROOT / "tests" / "reference_scale.py")]
        launch(*command, str(directory), json.dumps(arguments), timeout=200)
        results.append(load_file(directory / "gradients.safetensors"))
    torch.testing.assert_close(results[1], results[0], atol=1e-10, rtol=1e-7)


@pytest.mark.gpu
def test_a_target_on_two_devices_teaches_what_it_teaches_on_one(command, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    del command["--use-cpu"]
    program = [sys.executable, TRAIN, "--bf16", "False", "--target-dtype", "float32"]
    one = os.environ | {"CUDA_VISIBLE_DEVICES": "0"}
    launch(*program, *words(command), env=one)
    spread = command | {"--output-dir": str(tmp_path / "spread"), "--target-device-map": "balanced"}
    launch(*program, *words(spread))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "spread"))
    torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-3)


# Sharded.


SHARDED = {
    "FSDP1": (SimpleNamespace(fsdp_version=1), False, 0.0, "set `fsdp_version: 2`"),
    "ZeRO-3": (None, True, 0.0, "use stage 2"),
    "Muon under FSDP2": (SimpleNamespace(fsdp_version=2), False, 2e-3, "`--muon-learning-rate` needs whole matrices"),
}


@pytest.mark.parametrize("case", SHARDED)
def test_a_way_of_sharding_that_is_not_known_is_one_message(case, command, tmp_path, monkeypatch, capsys):
    fsdp_plugin, is_deepspeed, muon_learning_rate, message = SHARDED[case]

    def check(trainer):
        trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled = fsdp_plugin is not None, is_deepspeed
        plugins = SimpleNamespace(fsdp_plugin=fsdp_plugin, deepspeed_plugin=SimpleNamespace(zero_stage=3))
        trainer.accelerator = SimpleNamespace(state=plugins)
        check_sharding(trainer)

    check_sharding = Eagle3Trainer.check_sharding
    monkeypatch.setattr(Eagle3Trainer, "check_sharding", check)
    error = error_of(command | {"--muon-learning-rate": str(muon_learning_rate)}, capsys)
    assert message in error
    assert "Traceback" not in error


FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    **{
        name.upper(): str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in yaml.safe_load((ROOT / "examples" / "accelerate" / "fsdp.yaml").read_text())[
            "fsdp_config"
        ].items()
    },
}


@pytest.mark.slow
def test_a_sharded_target_and_a_sharded_draft_train_what_one_process_trains(command, tmp_path):
    """FSDP2 on both, with averages, resumed once: the bits of an uninterrupted run, the numbers of one process."""
    averaged = command | {"--ema-decay": "0.9", "--save-total-limit": "5", "--muon-learning-rate": "0"}
    run(averaged)
    sharded = averaged | {"--per-device-train-batch-size": "2", "--shard-target": "True", "--bf16": "False"}
    del sharded["--use-cpu"]
    program = [*LAUNCH, "--nproc-per-node", "2", str(ROOT / "tests" / "fsdp_on_cpu.py")]
    whole, resumed = tmp_path / "sharded", tmp_path / "resumed"
    launch(*program, *words(sharded | {"--output-dir": str(whole)}), env=os.environ | FSDP)
    assert (whole / "checkpoint" / "pytorch_model_fsdp.bin").exists()
    more = ["--resume-from-checkpoint", str(whole / "checkpoint-2")]
    launch(*program, *words(sharded | {"--output-dir": str(resumed)}), *more, env=os.environ | FSDP)
    for name in ("model.safetensors", "checkpoint/model.safetensors", f"checkpoint/{AVERAGE_FILE}"):
        one, two, again = (load_file(tmp_path / run_name / name) for run_name in ("out", "sharded", "resumed"))
        torch.testing.assert_close(two, one, atol=2e-4, rtol=1e-3)
        assert all(torch.equal(tensor, two[key]) for key, tensor in again.items())


@pytest.mark.parametrize("name", ["ddp", "fsdp", "deepspeed_zero2"])
def test_accelerate_knows_every_key_of_a_configuration(name):
    from accelerate.commands.config.config_args import ClusterConfig

    config = ClusterConfig.from_yaml_file(ROOT / "examples" / "accelerate" / f"{name}.yaml")
    assert config.num_processes == 8
    if name == "fsdp":
        from accelerate.commands.launch import launch_command_parser

        options = vars(launch_command_parser().parse_args(["script.py"]))
        assert config.fsdp_config.keys() <= options.keys()


def test_the_deepspeed_configuration_is_one_of_stage_2(monkeypatch):
    monkeypatch.setattr("accelerate.utils.dataclasses.is_deepspeed_available", lambda: True, raising=False)
    plugin = DeepSpeedPlugin(hf_ds_config=str(ROOT / "examples" / "accelerate" / "deepspeed_zero2.json"))
    assert plugin.zero_stage == 2
    assert plugin.get_value("gradient_accumulation_steps") == "auto"
