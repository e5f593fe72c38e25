"""Evaluates a draft head: plain and assisted generation on the same prompts, compared token for token.

Without `--dataset` the prompts are ten built-in programming requests. Exit code: 0 if every assisted text equals the
plain one, 1 if one differs, 2 if the command cannot be run.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import datasets
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..generation.support import tree_plan
from ..training.card import add_evaluation, check_card
from ..training.conversations import parse_conversation, parse_tools
from ..training.sources import load_conversations
from .loading import add_model_arguments, check_writable, load_models, positive_int
from .measure import (
    Comparison,
    Decoding,
    cache_bytes_per_token,
    compare_all,
    describe_texts,
    standard_head_like,
    summarise,
)
from .prompts import Prompt, built_in_conversations, choose_evenly, render_prompts
from .report import print_report, provenance, write_report

logger = logging.getLogger(__name__)

# What a shell reports for a process that Ctrl-C ended.
INTERRUPTED = 130


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--dataset", help="JSONL of conversations; each is cut before its last answer")
    parser.add_argument("--num-samples", type=positive_int, default=10, help="prompts, at most (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the texts when sampling (default: 0)")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/eval"), help="(default: %(default)s)")
    parser.add_argument(
        "--write-card", action="store_true", help="put the numbers into the README.md of the --draft-checkpoint folder"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        `int`: The exit code.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    arguments = parse_arguments(argv)
    try:
        check_writable(arguments.output_dir)
        if arguments.write_card:
            check_card(arguments.draft_checkpoint)
        rows = read_rows(arguments)
        target, draft, tokenizer = load_models(arguments)
        prompts = make_prompts(rows, target, tokenizer, arguments)
    except (ValueError, OSError, NotImplementedError) as error:
        logger.error("error: %s", error)
        return 2
    try:
        results, texts = evaluate(target, draft, prompts, arguments)
    except KeyboardInterrupt:
        logger.error("interrupted; no result was written")
        return INTERRUPTED
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    command = sys.argv if argv is None else ["scripts/eval_eagle.py", *argv]
    origin = provenance(command, target.device)
    write_report(arguments.output_dir, results, texts, origin)
    if arguments.write_card:
        add_evaluation(Path(arguments.draft_checkpoint), results, origin)
    print_report(Console(), results)
    return 0 if results["lossless"] else 1


def read_rows(arguments: argparse.Namespace) -> list[dict]:
    """Conversations with `id`, `messages` and perhaps `tools`, `--num-samples` of them at most."""
    if arguments.dataset is None:
        return choose_evenly(built_in_conversations(), arguments.num_samples)
    numbered = list(enumerate(load_conversations(arguments.dataset), start=1))
    return [
        {"id": row.get("id", number), "messages": parse_conversation(row, number), "tools": parse_tools(row, number)}
        for number, row in choose_evenly(numbered, arguments.num_samples)
    ]


def make_prompts(
    rows: list[dict], target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace
) -> list[Prompt]:
    """Prompts that leave room for the answer within the target's positions."""
    max_positions = target.config.get_text_config(decoder=True).max_position_embeddings
    if arguments.max_new_tokens >= max_positions:
        raise ValueError(
            f"`--max-new-tokens` must be below {max_positions}, the positions of the target, got "
            f"{arguments.max_new_tokens}."
        )
    return render_prompts(rows, tokenizer, max_positions - arguments.max_new_tokens)


def evaluate(
    target: PreTrainedModel, draft: PreTrainedModel, prompts: list[Prompt], arguments: argparse.Namespace
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Everything that `results.json` and `texts.jsonl` hold."""
    decoding = Decoding(
        arguments.max_new_tokens, arguments.do_sample, arguments.temperature, tuple(dict.fromkeys(arguments.seeds))
    )
    plan = tree_plan(draft)
    comparisons = compare_with_progress(target, draft, prompts, decoding)
    results = summarise(comparisons) | {
        "draft_cache_bytes_per_token": cache_bytes_per_token(draft),
        "standard_cache_bytes_per_token": cache_bytes_per_token(standard_head_like(draft)),
        "settings": {
            "target_model_path": arguments.target_model_path,
            "draft_checkpoint": arguments.draft_checkpoint,
            "attention_type": draft.config.attention_type,
            "attention_kernel": draft.config._attn_implementation,
            "dataset": arguments.dataset or "built-in",
            "max_new_tokens": decoding.max_new_tokens,
            "num_assistant_tokens": plan.num_nodes,
            "tree_top_k": plan.top_k,
            "tree_depth": plan.depth,
            "do_sample": decoding.do_sample,
            "temperature": decoding.temperature,
            "seeds": list(decoding.seeds) if decoding.do_sample else [],
            "dtype": arguments.dtype,
            "device": str(target.device),
        },
    }
    return results, describe_texts(comparisons)


def compare_with_progress(
    target: PreTrainedModel, draft: PreTrainedModel, prompts: list[Prompt], decoding: Decoding
) -> list[Comparison]:
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("acceptance length {task.fields[acceptance]:.2f}"),
    ]
    num_texts = len(prompts) * (len(decoding.seeds) if decoding.do_sample else 1)
    comparisons = []
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("evaluating", total=num_texts, acceptance=0.0)
        for comparison in compare_all(target, draft, prompts, decoding):
            comparisons.append(comparison)
            progress.update(task, advance=1, acceptance=summarise(comparisons)["acceptance_length"])
    return comparisons
