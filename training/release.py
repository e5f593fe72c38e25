"""The result of a run: a directory that the Hub and `from_pretrained` take as it is, with its card and its origin."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from .adapters import adapter_card, is_adapter
from .card import CARD_FILE, EVALUATIONS_FILE, model_card
from .plots import CURVES_FILE, draw_curves, has_curves
from .ttt import TTTDraftModel

STAGING_DIRECTORY = ".incomplete-result"
PROVENANCE_FILE = "provenance.json"
SECRET_FLAGS = ("--hub-token", "--hub_token")
RECORDED_PACKAGES = ("eagle3-mla", "torch", "transformers", "datasets", "accelerate")


@dataclass(frozen=True)
class RunFacts:
    """
    What the card and `provenance.json` say about a run.

    Args:
        argv (`list[str]`): The command.
        target (`str`): As it was named in the command.
        dataset (`str`): As it was named in the command.
        dataset_split (`str`): Split of a Hub dataset.
        data_sha256 (`str`): Of the tokens and masks that were trained on.
        num_rows (`int`): Conversations per epoch.
        num_supervised_tokens (`int`): Tokens per epoch that the assistant produced.
        num_steps (`int`): Optimizer steps.
        num_ttt_steps (`int`): Steps of training-time test.
        seconds (`float`): Wall-clock time of the training loop of the last process that trained.
        device (`str`): What it ran on.
        longest_row (`int`): Tokens of the longest row that was trained on.
        hardware (`dict`): From `hardware_facts`.
        arguments (`dict`): All arguments, given or not, from `all_arguments`.
        repo_id (`str`, *optional*): Hub repository that the result is pushed to.
    """

    argv: list[str]
    target: str
    dataset: str
    dataset_split: str
    data_sha256: str
    num_rows: int
    num_supervised_tokens: int
    num_steps: int
    num_ttt_steps: int
    seconds: float
    device: str
    longest_row: int
    hardware: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    repo_id: str | None = None


def write_release(
    draft: TTTDraftModel,
    output_dir: Path,
    facts: RunFacts,
    log_history: list[dict],
    weights: dict[str, Tensor] | None = None,
) -> list[str]:
    """
    Writes weights, config, code, `README.md`, `training_curves.png`, `provenance.json` and `training_log.jsonl`.

    Args:
        draft ([`TTTDraftModel`] or `peft.PeftModel`): The trained head, or its adapter.
        output_dir (`Path`): An existing directory.
        facts ([`RunFacts`]): Of the run.
        log_history (`list[dict]`): Of the Trainer.
        weights (`dict[str, torch.Tensor]`, *optional*): To be written in the place of the draft's own.

    Returns:
        `list[str]`: Names of the files and folders that were written.

    **Effects**: files of an earlier result are replaced, each at once, after all of the new ones are complete.
    """
    staging = output_dir / STAGING_DIRECTORY
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    draft.save_pretrained(staging, state_dict=weights)
    is_logged = has_curves(log_history)
    if is_logged:
        draw_curves(log_history, staging / CURVES_FILE)
    card = model_card(draft.config, facts, log_history, is_logged)
    if is_adapter(staging):
        card = adapter_card(card, draft.active_peft_config.base_model_name_or_path)
    (staging / CARD_FILE).write_text(card, encoding="utf-8")
    (staging / PROVENANCE_FILE).write_text(json.dumps(provenance(facts), indent=2) + "\n", encoding="utf-8")
    log_lines = "".join(json.dumps(entry) + "\n" for entry in log_history)
    (staging / "training_log.jsonl").write_text(log_lines, encoding="utf-8")
    names = sorted(entry.name for entry in staging.iterdir())
    for name in names:
        published = output_dir / name
        if published.is_dir():
            shutil.rmtree(published)
        os.replace(staging / name, published)
    staging.rmdir()
    # Numbers of the head that was here before.
    (output_dir / EVALUATIONS_FILE).unlink(missing_ok=True)
    return names


def first_not_finite(weights: dict[str, Tensor]) -> str | None:
    """Name of the first weight that holds a number that is not finite."""
    return next((name for name, weight in weights.items() if not weight.isfinite().all()), None)


def provenance(facts: RunFacts) -> dict[str, Any]:
    """The run's facts with the versions and the commit of the code."""
    return asdict(facts) | code_facts()


def code_facts() -> dict[str, Any]:
    """Commit and versions of the code that runs."""
    versions = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        versions[package] = importlib.metadata.version(package)
    return {"commit": code_commit(), "versions": versions}


def code_commit() -> str | None:
    """Commit of the checkout that this code runs from, `-dirty` if files were changed; `None` without one."""
    checkout = Path(__file__).resolve().parents[1]
    describe = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    if not (checkout / ".git").exists() or shutil.which("git") is None:
        return None
    finished = subprocess.run(describe, capture_output=True, text=True, check=False)
    return finished.stdout.strip() or None


def device_name(device: torch.device) -> str:
    """The device in words, for people who want to compare times."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def hardware_facts(device: torch.device, num_processes: int) -> dict[str, Any]:
    """What a time or a memory figure of the run depends on."""
    facts: dict[str, Any] = {
        "device": device_name(device),
        "num_processes": num_processes,
        "machine": platform.machine(),
        "num_cpu_cores": os.cpu_count(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["device_memory_bytes"] = properties.total_memory
        facts["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
        facts["cuda"] = torch.version.cuda
    return facts


def all_arguments(*groups: Any) -> dict[str, Any]:
    """Every argument by the name of its group's class, as JSON knows it; tokens are masked."""
    return {type(group).__name__: as_json(group) for group in groups}


def as_json(group: Any) -> dict[str, Any]:
    """The fields of arguments; `TrainingArguments` masks its tokens itself."""
    assert is_dataclass(group)
    fields = group.to_dict() if isinstance(group, TrainingArguments) else asdict(group)
    return json.loads(json.dumps(fields, default=str))


def command_line() -> list[str]:
    """The command without secrets: it goes into the card."""
    argv = [Path(sys.argv[0]).name]
    hides_next = False
    for argument in sys.argv[1:]:
        flag, has_value, _ = argument.partition("=")
        is_secret = flag in SECRET_FLAGS
        argv.append("***" if hides_next else f"{flag}=***" if is_secret and has_value else argument)
        hides_next = is_secret and not has_value
    return argv
