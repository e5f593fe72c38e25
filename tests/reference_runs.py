"""The training command in tests: flags of the smallest run, its errors, and runs that are interrupted and resumed."""

from pathlib import Path

import pytest
import torch
from reference_ttt import save_tiny_target, write_conversations
from safetensors.torch import load_file
from transformers import TrainerCallback

from eagle3_mla.training import cli
from eagle3_mla.training.trainer import Eagle3Trainer


class InterruptAfter(TrainerCallback):
    """What a kill looks like from inside: training stops between two steps and nothing is cleaned up."""

    def __init__(self, num_steps: int):
        self.num_steps = num_steps

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.num_steps:
            raise KeyboardInterrupt


def training_flags(directory: Path, target_path: Path | None = None, **settings: str) -> dict[str, str]:
    """
    Flags of a run on the CPU in `directory`: five conversations, latent attention.

    Args:
        directory (`Path`): Gets the conversations, the result in `out`, and the target if there is none yet.
        target_path (`Path`, *optional*): The target.
        settings (`str`): More flags by their names, or other values.
    """
    target_path = save_tiny_target(directory / "target") if target_path is None else target_path
    flags = {
        "model_path": str(target_path),
        "dataset": str(write_conversations(directory / "train.jsonl")),
        "output_dir": str(directory / "out"),
        "attention_backend": "sdpa_mla",
        "num_ttt_steps": "2",
        "use_cpu": "True",
        "disable_tqdm": "True",
    }
    return {f"--{name.replace('_', '-')}": value for name, value in (flags | settings).items()}


def command_line(flags: dict[str, str]) -> list[str]:
    """A value with spaces is several."""
    return [part for flag, value in flags.items() for part in (flag, *value.split())]


def run(flags: dict[str, str], *more: str) -> int:
    return cli.main([*command_line(flags), *more])


def error_of(flags: dict[str, str], capsys, *more: str) -> str:
    """What a request says that ends with exit code 2."""
    with pytest.raises(SystemExit) as exit_info:
        run(flags, *more)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def run_interrupted(flags: dict[str, str], num_steps: int, *more: str) -> None:
    """Runs up to the beginning of the step behind the first `num_steps`."""
    train = Eagle3Trainer.train

    def train_interrupted(self, **kwargs):
        self.add_callback(InterruptAfter(num_steps))
        return train(self, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Eagle3Trainer, "train", train_interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(flags, *more)


def run_whole_and_joined(flags: dict[str, str], interruptions: list[int]) -> tuple[Path, list[Path]]:
    """Newest checkpoint of a run, and of the same one interrupted after each of these numbers of steps and resumed."""
    run(flags)
    joined_dirs = []
    for num_steps in interruptions:
        joined = flags | {"--output-dir": f"{flags['--output-dir']}-joined-{num_steps}"}
        run_interrupted(joined, num_steps)
        run(joined, "--resume-from-checkpoint")
        joined_dirs.append(Path(joined["--output-dir"]) / "checkpoint")
    return Path(flags["--output-dir"]) / "checkpoint", joined_dirs


def assert_same_bits(whole: Path, joined: Path, weights_name: str) -> None:
    """Requires that two checkpoints hold the same weights and the same state of the optimizer."""
    expected, weights = (load_file(checkpoint / weights_name) for checkpoint in (whole, joined))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name
    for tensor, other in zip(optimizer_tensors(joined), optimizer_tensors(whole), strict=True):
        assert torch.equal(tensor, other)


def optimizer_tensors(checkpoint: Path) -> list[torch.Tensor]:
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    return [tensor for entry in state.values() for tensor in entry.values()]
