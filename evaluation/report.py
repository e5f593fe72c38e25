"""What an evaluation leaves behind: a table on the screen, and four files.

| file | content |
|---|---|
| `results.json` | every number, and the settings that it depends on |
| `texts.jsonl` | of each text prompt, seed, number of tokens, acceptance lengths, and where it leaves the plain one |
| `report.md` | one row in the form of the README's table, acceptance by depth, divergences, the cache, the command |
| `provenance.json` | command line, commit, versions, hardware |

Keys of `results.json`: `acceptance_length` (tokens committed per round, bonus token included), `acceptance_by_depth`
(of the drafted tokens of a depth whose parent was accepted, the share that was accepted; counts in `drafted_by_depth`
and `accepted_by_depth`), `target_calls_per_token`, `plain_tokens_per_second`, `assisted_tokens_per_second`, `speedup`
(their ratio), `prefill_seconds`, `draft_seconds`, `target_seconds`, `host_seconds` (of the assisted calls: the
prompts, then in the rounds the draft's forwards, the target's, and the rest), `host_share` (of the rest in the
rounds), `lossless` (every text equal to the plain one), `num_divergent` and `first_divergence`, `num_prompts`,
`num_texts`, `num_rounds`, `num_tokens`, `draft_cache_bytes_per_token`, `standard_cache_bytes_per_token` (of a standard
head of the same shape), `settings`.
"""

import json
import platform
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..training.files import replace_file
from ..training.release import code_commit

PACKAGES = ("eagle3-mla", "torch", "transformers")


def provenance(argv: list[str], device: torch.device) -> dict[str, Any]:
    """Command line, commit, versions and hardware of an evaluation on `device`."""
    return {
        "argv": argv,
        "command": shlex.join(["python", *argv]),
        "commit": code_commit(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "hardware": hardware(device),
    }


def hardware(device: torch.device) -> str:
    """The GPU, or the processor and the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, torch threads: {torch.get_num_threads()}"


def processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def write_report(
    output_dir: Path, results: dict[str, Any], texts: list[dict[str, Any]], origin: dict[str, Any]
) -> None:
    """Writes the four files, each complete or not at all.

    Args:
        output_dir (`Path`): An existing folder.
        results (`dict`): From `summarise`, with cache sizes and settings.
        texts (`list[dict]`): From `describe_texts`.
        origin (`dict`): From `provenance`.
    """
    replace_file(output_dir / "provenance.json", json.dumps(origin, indent=2) + "\n")
    replace_file(output_dir / "report.md", markdown(results, texts, origin))
    replace_file(output_dir / "texts.jsonl", "".join(json.dumps(text) + "\n" for text in texts))
    replace_file(output_dir / "results.json", json.dumps(results, indent=2) + "\n")


def markdown(results: dict[str, Any], texts: list[dict[str, Any]], origin: dict[str, Any]) -> str:
    """The report: a row as in the README's table, then what stands behind it."""
    settings, versions = results["settings"], origin["versions"]
    columns = {
        "target": settings["target_model_path"],
        "draft": settings["draft_checkpoint"],
        "dataset": settings["dataset"],
        "temperature": settings["temperature"] if settings["do_sample"] else 0,
        "draft tokens": settings["num_assistant_tokens"],
        "tree top-k": settings["tree_top_k"],
        "acceptance length": f"{results['acceptance_length']:.2f}",
        "tokens/s, plain": f"{results['plain_tokens_per_second']:.1f}",
        "tokens/s, assisted": f"{results['assisted_tokens_per_second']:.1f}",
        "hardware": origin["hardware"],
        "torch": versions["torch"],
        "transformers": versions["transformers"],
        "commit": (origin["commit"] or "unknown")[:12],
    }
    by_depth = {depth: f"{share:.3f}" for depth, share in enumerate(results["acceptance_by_depth"], start=1)}
    return "\n\n".join(
        [
            "# Evaluation",
            markdown_table(columns),
            verdict(results),
            "## Acceptance by depth",
            markdown_table({"depth": "accepted"} | by_depth),
            *divergences(texts),
            "## Everything measured",
            "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in table_rows(results))]),
            "## Command",
            f"```\n{origin['command']}\n```\n",
        ]
    )


def divergences(texts: list[dict[str, Any]]) -> list[str]:
    """Heading and table of the texts that leave the plain ones, if there are any."""
    found = [text["divergence"] for text in texts if text["divergence"] is not None]
    if not found:
        return []
    columns = list(found[0])
    rows = [columns, ["---"] * len(columns), *(each.values() for each in found)]
    return ["## Divergences", "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in rows)]


def cell(value: Any) -> str:
    """Gaps with three digits; where a text had ended, "none"."""
    return "none" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown_table(columns: dict[Any, Any]) -> str:
    """A table of one row."""
    rows = [columns.keys(), ("---" for _ in columns), columns.values()]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def verdict(results: dict[str, Any]) -> str:
    """One sentence: are the assisted texts the target's own?"""
    num_texts, divergence = results["num_texts"], results["first_divergence"]
    if results["lossless"]:
        return f"Lossless: all {num_texts} assisted texts equal the plain ones token for token."
    gap = "a text had ended"
    if divergence["logit_gap"] is not None:
        gap = f"logit gap {divergence['logit_gap']:.3g} (spacing {divergence['logit_spacing']:.3g})"
    return (
        f"Not lossless: {results['num_divergent']} of {num_texts} texts differ, the first on prompt "
        f"{divergence['prompt']} (seed {divergence['seed']}) at new token {divergence['position']}: plain "
        f"{divergence['plain_token']}, assisted {divergence['assisted_token']}, {gap}."
    )


def table_rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of each line of the printed table."""
    draft_bytes, standard_bytes = results["draft_cache_bytes_per_token"], results["standard_cache_bytes_per_token"]
    return [
        ("acceptance length", f"{results['acceptance_length']:.2f}"),
        ("acceptance by depth", " ".join(f"{share:.2f}" for share in results["acceptance_by_depth"])),
        ("target calls per token", f"{results['target_calls_per_token']:.3f}"),
        ("tokens per second, plain", f"{results['plain_tokens_per_second']:.1f}"),
        ("tokens per second, assisted", f"{results['assisted_tokens_per_second']:.1f}"),
        ("speedup", f"{results['speedup']:.2f}x"),
        ("a round: draft, target, rest", round_milliseconds(results)),
        ("lossless", "yes" if results["lossless"] else "no"),
        ("prompts, texts, tokens", f"{results['num_prompts']}, {results['num_texts']}, {results['num_tokens']}"),
        ("draft cache, bytes per token", f"{draft_bytes:g}"),
        ("standard head's cache, bytes per token", f"{standard_bytes:g} ({standard_bytes / draft_bytes:.1f}x)"),
    ]


def round_milliseconds(results: dict[str, Any]) -> str:
    """Mean milliseconds of a round's parts."""
    parts = (results[name] for name in ("draft_seconds", "target_seconds", "host_seconds"))
    texts = (f"{1000 * seconds / max(results['num_rounds'], 1):.2f}" for seconds in parts)
    return f"{', '.join(texts)} ms (rest {results['host_share']:.0%})"


def print_report(console: Console, results: dict[str, Any]) -> None:
    settings = results["settings"]
    title = f"{settings['draft_checkpoint']} for {settings['target_model_path']}"
    console.print(title, highlight=False, soft_wrap=True)
    table = Table()
    table.add_column("measured")
    table.add_column("value", justify="right")
    for row in table_rows(results):
        table.add_row(*row)
    console.print(table)
    console.print(verdict(results), style="green" if results["lossless"] else "red", highlight=False)
