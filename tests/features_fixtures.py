"""The smallest stored features: five conversations of a tiny bfloat16 target in a few shards."""

import os
import signal
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import torch
from reference_runs import command_line
from reference_ttt import tiny_target, tiny_tokenizer

from eagle3_mla.training import feature_preparation

TOKENS_PER_SHARD = 40
UNTIMED = "provenance.json"


def save_target(directory: Path, dtype: torch.dtype = torch.bfloat16, **overrides) -> Path:
    """A tiny target in `dtype` with its tokenizer."""
    tokenizer = tiny_tokenizer()
    fields = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id} | overrides
    tiny_target(**fields).to(dtype).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def preparation_flags(target_path: Path, dataset_path: Path, output_dir: Path) -> dict[str, str]:
    return {
        "--model-path": str(target_path),
        "--dataset": str(dataset_path),
        "--output-dir": str(output_dir),
        "--target-dtype": "bfloat16",
        "--tokens-per-shard": str(TOKENS_PER_SHARD),
        "--use-cpu": "True",
    }


def prepare_features(flags: dict[str, str]) -> Path:
    feature_preparation.main(command_line(flags))
    return Path(flags["--output-dir"])


def stored_bytes(directory: Path) -> dict[str, bytes]:
    """All files but the one that holds times."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != UNTIMED]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_until_killed(flags: dict[str, str], arm: Callable[[], None]) -> None:
    """Runs the command in a process of its own, where `arm` has laid a mine, and requires that it went off."""

    def run() -> None:
        arm()
        feature_preparation.main(command_line(flags))

    process = get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
