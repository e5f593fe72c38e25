"""The model card of a result: what it is, how it was trained, and what was measured with it.

The card is written after training with the metrics of the training data. Evaluations on held-out prompts are added
later, each a row of the table between two markers and an entry of the `model-index` metadata; `evaluations.json` keeps
them, so that another evaluation adds a row and the same one replaces its own.
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..configuration_eagle3_mla import Eagle3MLAConfig
from .files import replace_file
from .plots import CURVES_FILE

CARD_FILE = "README.md"
EVALUATIONS_FILE = "evaluations.json"
SECTION_START, SECTION_END = "<!-- evaluations -->", "<!-- end of evaluations -->"
# Two evaluations that agree in all of these are the same one, made again.
CONDITIONS = (
    "dataset",
    "do_sample",
    "temperature",
    "num_assistant_tokens",
    "tree_top_k",
    "tree_depth",
    "max_new_tokens",
    "dtype",
    "device",
)


def model_card(config: Eagle3MLAConfig, facts, log_history: list[dict], has_curves: bool) -> str:
    """
    `README.md` of a result.

    Args:
        config ([`Eagle3MLAConfig`]): Of the draft.
        facts ([`RunFacts`]): Of the run.
        log_history (`list[dict]`): Of the Trainer.
        has_curves (`bool`): Whether `training_curves.png` lies beside the card.
    """
    # A local path is no model id; the Hub would refuse it.
    base_model = None if Path(facts.target).exists() else facts.target
    metadata = ModelCardData(
        base_model=base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["eagle3", "speculative-decoding", config.attention_type],
    )
    return CARD.format(
        metadata=metadata.to_yaml(),
        target_name=base_model or Path(facts.target).resolve().name,
        target=facts.target,
        repo_id=facts.repo_id or "<this repository>",
        attention=_attention_sentence(config),
        num_steps=facts.num_steps,
        num_rows=facts.num_rows,
        num_supervised_tokens=facts.num_supervised_tokens,
        dataset=public_name(facts.dataset),
        num_ttt_steps=facts.num_ttt_steps,
        draft_vocab_size=config.draft_vocab_size,
        vocab_size=config.vocab_size,
        device=facts.device,
        seconds=facts.seconds,
        metrics=_metrics_table(log_history),
        curves=f"![Training curves]({CURVES_FILE})\n\n" if has_curves else "",
        command=shlex.join(facts.argv),
        evaluations=evaluation_section([]),
    )


def check_card(directory: str) -> Path:
    """
    The directory whose card can be written to.

    Raises:
        ValueError: If there is no directory of that name with a card in it.
    """
    if not (Path(directory) / CARD_FILE).is_file():
        raise ValueError(f"`--write-card` needs a local directory with a {CARD_FILE} in it, got {directory}.")
    return Path(directory)


def add_evaluation(directory: Path, results: dict[str, Any], origin: dict[str, Any]) -> None:
    """
    Puts an evaluation into a card and its `model-index`.

    Args:
        directory (`Path`): Of the draft, with its `README.md`.
        results (`dict`): What scripts/eval_eagle.py writes to `results.json`.
        origin (`dict`): What it writes to `provenance.json`.

    Raises:
        ValueError: If there is no card.

    **Effects**: `evaluations.json` and `README.md` of the directory are replaced, each at once.
    """
    directory = check_card(str(directory))
    stored = directory / EVALUATIONS_FILE
    evaluations = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else []
    conditions = [results["settings"].get(name) for name in CONDITIONS]
    evaluations = [
        entry for entry in evaluations if [entry["results"]["settings"].get(name) for name in CONDITIONS] != conditions
    ]
    evaluations.append({"results": results, "origin": origin})
    card = ModelCard((directory / CARD_FILE).read_text(encoding="utf-8"), ignore_metadata_errors=False)
    card.text = replace_section(card.text, evaluation_section(evaluations))
    card.data.model_name = card.data.model_name or directory.resolve().name
    card.data.eval_results = [result for entry in evaluations for result in index_entries(entry["results"])]
    replace_file(stored, json.dumps(evaluations, indent=2) + "\n")
    replace_file(directory / CARD_FILE, str(card))


def replace_section(text: str, section: str) -> str:
    """The card's text with a new section of evaluations, at its end where it had none."""
    pattern = re.compile(re.escape(SECTION_START) + ".*?" + re.escape(SECTION_END), flags=re.DOTALL)
    if not pattern.search(text):
        return f"{text.rstrip()}\n\n## Measured\n\n{section}\n"
    return pattern.sub(lambda match: section, text, count=1)


def evaluation_section(evaluations: list[dict[str, Any]]) -> str:
    """Everything between the two markers, the markers included."""
    if not evaluations:
        text = "On held-out prompts: not measured. `scripts/eval_eagle.py --write-card` puts its numbers here."
        return f"{SECTION_START}\n{text}\n{SECTION_END}"
    columns = [evaluation_columns(entry["results"], entry["origin"]) for entry in evaluations]
    rows = [columns[0].keys(), ("---" for _ in columns[0]), *(row.values() for row in columns)]
    table = "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
    commands = "\n".join(f"    {entry['origin']['command']}" for entry in evaluations)
    explanation = "Acceptance length counts the bonus token. Lossless: assisted texts equal to the plain ones."
    return "\n\n".join([SECTION_START, explanation, table, commands, SECTION_END])


def evaluation_columns(results: dict[str, Any], origin: dict[str, Any]) -> dict[str, Any]:
    """One row of the table."""
    settings, versions = results["settings"], origin["versions"]
    draft_bytes, standard_bytes = results["draft_cache_bytes_per_token"], results["standard_cache_bytes_per_token"]
    return {
        "dataset": public_name(settings["dataset"]),
        "temperature": settings["temperature"] if settings["do_sample"] else 0,
        "draft tokens": settings["num_assistant_tokens"],
        "tree top-k": settings.get("tree_top_k", 1),
        "acceptance length": f"**{results['acceptance_length']:.2f}**",
        "by depth": " ".join(f"{share:.2f}" for share in results["acceptance_by_depth"]),
        "tokens/s, plain": f"{results['plain_tokens_per_second']:.1f}",
        "tokens/s, assisted": f"{results['assisted_tokens_per_second']:.1f} ({results['speedup']:.2f}x)",
        "lossless": f"{results['num_texts'] - results['num_divergent']} of {results['num_texts']}",
        "cache, bytes per token": f"{draft_bytes:g}; standard head {standard_bytes:g}",
        "dtype": settings["dtype"],
        "hardware": origin["hardware"],
        "torch, transformers": f"{versions['torch']}, {versions['transformers']}",
        "commit": (origin["commit"] or "unknown")[:12],
    }


def index_entries(results: dict[str, Any]) -> list[EvalResult]:
    """The evaluation as `model-index` metadata."""
    settings = results["settings"]
    dataset = public_name(settings["dataset"])
    temperature = settings["temperature"] if settings["do_sample"] else 0
    metrics = {
        "acceptance_length": (results["acceptance_length"], "Acceptance length, bonus token included"),
        "speedup": (results["speedup"], "Speedup over plain generate()"),
        "draft_cache_bytes_per_token": (results["draft_cache_bytes_per_token"], "Draft cache, bytes per token"),
    }
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_args={"temperature": temperature, "num_assistant_tokens": settings["num_assistant_tokens"]},
            metric_type=metric,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for metric, (value, name) in metrics.items()
    ]


def public_name(path_or_id: str) -> str:
    """A Hub id as it is; of a local path, which says nothing elsewhere, the last part."""
    return Path(path_or_id).resolve().name if Path(path_or_id).exists() else path_or_id


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
draft = AutoModel.from_pretrained("{repo_id}", trust_remote_code=True)
inputs = tokenizer("...", return_tensors="pt")
print(tokenizer.decode(target.generate(**inputs, assistant_model=draft, max_new_tokens=128)[0]))
```

## Measured

{evaluations}

## Training

{num_steps} steps on `{dataset}` ({num_rows} conversations, {num_supervised_tokens} tokens of the assistant per epoch),
{num_ttt_steps} steps of training-time test, draft vocabulary {draft_vocab_size} of {vocab_size};
{seconds:.0f} seconds on {device}.

    {command}

{curves}Metrics of the last logged steps, on the training data. The simulated acceptance length counts the bonus token.

{metrics}

`provenance.json` holds all arguments, versions, hardware, commit and the hash of the data, `training_log.jsonl` the
course of the training.
"""
