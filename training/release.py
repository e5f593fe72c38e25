"""The result of a run: a directory that the Hub and `from_pretrained` take as it is, with its card and its origin."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from huggingface_hub import ModelCardData

from ..configuration_eagle3_mla import Eagle3MLAConfig
from .ttt import TTTDraftModel

STAGING_DIRECTORY = ".incomplete-result"
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


def write_release(draft: TTTDraftModel, output_dir: Path, facts: RunFacts, log_history: list[dict]) -> None:
    """
    Writes weights, config, code, `README.md`, `provenance.json` and `training_log.jsonl` to `output_dir`.

    **Effects**: files of an earlier result are replaced, each at once, after all of the new ones are complete.
    """
    staging = output_dir / STAGING_DIRECTORY
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    draft.save_pretrained(staging)
    (staging / "README.md").write_text(model_card(draft.config, facts, log_history), encoding="utf-8")
    (staging / "provenance.json").write_text(json.dumps(provenance(facts), indent=2) + "\n", encoding="utf-8")
    log_lines = "".join(json.dumps(entry) + "\n" for entry in log_history)
    (staging / "training_log.jsonl").write_text(log_lines, encoding="utf-8")
    for entry in staging.iterdir():
        published = output_dir / entry.name
        if published.is_dir():
            shutil.rmtree(published)
        os.replace(entry, published)
    staging.rmdir()


def provenance(facts: RunFacts) -> dict:
    """The run's facts with the versions and the commit of the code."""
    versions = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        versions[package] = importlib.metadata.version(package)
    return {**asdict(facts), "commit": code_commit(), "versions": versions}


def code_commit() -> str | None:
    """Commit of the checkout that this code runs from, `-dirty` if files were changed; `None` without one."""
    checkout = Path(__file__).resolve().parents[1]
    describe = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    if not (checkout / ".git").exists() or shutil.which("git") is None:
        return None
    finished = subprocess.run(describe, capture_output=True, text=True, check=False)
    return finished.stdout.strip() or None


def model_card(config: Eagle3MLAConfig, facts: RunFacts, log_history: list[dict]) -> str:
    """`README.md` of the result."""
    # A local path is no model id; the Hub would refuse it.
    base_model = None if Path(facts.target).exists() else facts.target
    metadata = ModelCardData(
        base_model=base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["eagle3", "speculative-decoding", config.attention_type],
    )
    target_name = base_model or Path(facts.target).resolve().name
    return CARD.format(
        metadata=metadata.to_yaml(),
        target_name=target_name,
        target=facts.target,
        attention=_attention_sentence(config),
        num_steps=facts.num_steps,
        num_rows=facts.num_rows,
        num_supervised_tokens=facts.num_supervised_tokens,
        dataset=facts.dataset if not Path(facts.dataset).exists() else Path(facts.dataset).name,
        num_ttt_steps=facts.num_ttt_steps,
        draft_vocab_size=config.draft_vocab_size,
        vocab_size=config.vocab_size,
        device=facts.device,
        seconds=facts.seconds,
        metrics=_metrics_table(log_history),
        command=" ".join(facts.argv),
    )


def device_name(device: torch.device) -> str:
    """The device in words, for people who want to compare times."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def command_line() -> list[str]:
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def _attention_sentence(config: Eagle3MLAConfig) -> str:
    cached = config.cached_elements_per_token
    if config.attention_type == "gqa":
        return f"standard attention; its cache holds {cached} numbers per token and layer"
    standard = 2 * config.num_key_value_heads * config.head_dim
    return (
        f"multi-head latent attention; its cache holds {cached} numbers per token and layer, "
        f"{standard / cached:.1f} times fewer than a standard head of this shape"
    )


def _metrics_table(log_history: list[dict]) -> str:
    """Metrics of the last logged steps, measured on the training data while it was trained on."""
    entries = [entry for entry in log_history if "simulated_acceptance_length" in entry]
    if not entries:
        return "not measured"
    last = entries[-1]
    accuracies = [(name, value) for name, value in last.items() if name.startswith("accuracy_")]
    lines = ["| | |", "|---|---|", f"| loss | {last['loss']:.3f} |"]
    lines.append(f"| simulated acceptance length | {last['simulated_acceptance_length']:.2f} |")
    lines += [f"| accuracy at step {name.removeprefix('accuracy_')} | {value:.3f} |" for name, value in accuracies]
    return "\n".join(lines)


CARD = """---
{metadata}
---

# EAGLE-3 draft head for {target_name}

A draft for speculative decoding with `{target_name}`: `generate()` gives the same output in fewer calls of the target.
It has {attention}.

```python
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

target = AutoModelForCausalLM.from_pretrained("{target}")
tokenizer = AutoTokenizer.from_pretrained("{target}")
draft = AutoModel.from_pretrained("<this repository>", trust_remote_code=True)
inputs = tokenizer("...", return_tensors="pt")
print(tokenizer.decode(target.generate(**inputs, assistant_model=draft)[0]))
```

## Training

{num_steps} steps on `{dataset}` ({num_rows} conversations, {num_supervised_tokens} tokens of the assistant per epoch),
{num_ttt_steps} steps of training-time test, draft vocabulary {draft_vocab_size} of {vocab_size};
{seconds:.0f} seconds on {device}.

    {command}

Metrics of the last logged steps, on the training data. The simulated acceptance length counts the bonus token; for the
acceptance length on held-out prompts run `scripts/eval_eagle.py`.

{metrics}

`provenance.json` holds versions, commit and the hash of the data, `training_log.jsonl` the course of the training.
"""
