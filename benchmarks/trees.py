"""Acceptance length of chains and trees of one head, greedy and at temperature 1, with and without the noise.

Means over the sources that the prompts name. At temperature 1 trees are noise-coupled (tokens ranked by q / e, with
the noise e that the target will draw with) or noise-blind (ranked by q); both are exact, and both see the same seeds.
Every text is compared with the one of plain `generate()`.

    python benchmarks/trees.py --target <target> --draft <head> --prompts <held-out.jsonl>
"""

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from harness import write_table
from transformers import AutoModelForCausalLM, AutoTokenizer

from eagle3_mla.evaluation.measure import sum_by_depth
from eagle3_mla.generation import decoder
from eagle3_mla.modeling_eagle3_mla import Eagle3MLADraftModel

SHAPES = [(7, 1, 7), (16, 4, 7), (32, 8, 7), (60, 10, 7)]  # nodes, top-k, depth
GREEDY, COUPLED, BLIND = "greedy", "T = 1, noise-coupled", "T = 1, noise-blind"


@dataclass
class Tally:
    """What the texts of one source add up to."""

    lengths: list[int]
    tried: list[int]
    accepted: list[int]
    num_equal: int = 0
    num_texts: int = 0

    def add(self, stats, is_equal: bool) -> None:
        self.lengths += stats.acceptance_lengths
        self.tried = sum_by_depth([self.tried, stats.drafted_by_depth])
        self.accepted = sum_by_depth([self.accepted, stats.accepted_by_depth])
        self.num_equal += is_equal
        self.num_texts += 1

    @property
    def acceptance_length(self) -> float:
        return sum(self.lengths) / len(self.lengths)


def read_prompts(path: Path, tokenizer, num_samples: int) -> dict[str, list[torch.Tensor]]:
    """At most `num_samples` prompts of each source, `(1, T)` each, cut before their last answer."""
    prompts = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        chat = row.get("conversations") or row["messages"]
        if len(prompts[row.get("source", "prompts")]) < num_samples:
            ids = tokenizer.apply_chat_template(
                chat[:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
            prompts[row.get("source", "prompts")].append(ids)
    return prompts


def ignore_noise(*arguments):
    """`draft_tree` without the last of its arguments, the noise."""
    return draft_tree(*arguments[:-1], None)


draft_tree = decoder.draft_tree


def generate(target, input_ids: torch.Tensor, do_sample: bool, max_new_tokens: int, draft=None) -> list[int]:
    torch.manual_seed(0)
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0} if do_sample else {"do_sample": False}
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    return target.generate(**inputs, **sampling, max_new_tokens=max_new_tokens, assistant_model=draft)[0].tolist()


def evaluate(target, draft, prompts: dict[str, list], plain: dict[str, list], mode: str, limit: int) -> list[Tally]:
    """A tally for each source."""
    tallies = []
    with patch.object(decoder, "draft_tree", ignore_noise if mode == BLIND else draft_tree):
        for source, rows in prompts.items():
            tallies.append(Tally([], [], []))
            for input_ids, expected in zip(rows, plain[source], strict=True):
                text = generate(target, input_ids, mode != GREEDY, limit, draft)
                tallies[-1].add(draft.speculation_stats, text == expected)
    return tallies


def table_row(mode: str, shape: tuple[int, int, int], tallies: list[Tally]) -> list[str]:
    by_depth = [
        [hits / tried for hits, tried in zip(tally.accepted, tally.tried, strict=True) if tried] for tally in tallies
    ]
    lengths = [tally.acceptance_length for tally in tallies]
    return [
        mode,
        *map(str, shape),
        f"**{sum(lengths) / len(lengths):.2f}**",
        " ".join(f"{sum(shares) / len(shares):.2f}" for shares in zip(*by_depth, strict=False)),
        *(f"{length:.2f}" for length in lengths),
        f"{sum(tally.num_equal for tally in tallies)} of {sum(tally.num_texts for tally in tallies)}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--prompts", required=True, type=Path, help="JSONL of held-out conversations")
    parser.add_argument("--num-samples", type=int, default=40, help="prompts of each source")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/trees.md"))
    arguments = parser.parse_args()
    target = AutoModelForCausalLM.from_pretrained(arguments.target, dtype=torch.float32).eval()
    draft = Eagle3MLADraftModel.from_pretrained(arguments.draft, dtype=torch.float32).eval()
    prompts = read_prompts(arguments.prompts, AutoTokenizer.from_pretrained(arguments.target), arguments.num_samples)
    limit, rows = arguments.max_new_tokens, []
    columns = ["decoding", "nodes", "top-k", "depth", "acceptance length", "by depth", *prompts, "equal texts"]
    for mode in (GREEDY, COUPLED, BLIND):
        plain = {
            source: [generate(target, input_ids, mode != GREEDY, limit) for input_ids in each]
            for source, each in prompts.items()
        }
        for shape in SHAPES:
            names = ("num_assistant_tokens", "assistant_tree_top_k", "assistant_tree_depth")
            for name, value in zip(names, shape, strict=True):
                setattr(draft.generation_config, name, value)
            rows.append(table_row(mode, shape, evaluate(target, draft, prompts, plain, mode, limit)))
            print(*rows[-1], flush=True)
            write_table(arguments.output, "Chains and trees", columns, rows, __doc__.split("\n\n")[1])


if __name__ == "__main__":
    main()
