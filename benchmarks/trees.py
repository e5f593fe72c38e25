"""Acceptance length of chains and trees of one head, greedy and at temperature 1, with and without the noise.

Means over the sources that the prompts name. At temperature 1 trees are noise-coupled (tokens ranked by q / e, with
the noise e that the target will draw with) or noise-blind (ranked by q); both are exact, and both see the same seeds.
Every text is compared with the one of plain `generate()`. "EAGLE-2" is the reference algorithm of `eagle2.py`,
replayed on the same texts: 60 nodes and depth 7 as the paper counts, and 59 nodes, the deepest at depth 8, which is
what EAGLE's code drafts for `total_tokens=60, depth=7, top_k=10`. Nodes are drafted tokens, without the root.

    python benchmarks/trees.py --target <target> --draft <head> --prompts <held-out.jsonl>

What is measured is kept in --work-dir, source by source, and not measured again by the same command.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from eagle2 import TreeSize, replay
from harness import write_table
from transformers import AutoModelForCausalLM, AutoTokenizer

from eagle3_mla.evaluation.measure import sum_by_depth
from eagle3_mla.generation import decoder
from eagle3_mla.modeling_eagle3_mla import Eagle3MLADraftModel
from eagle3_mla.training.files import replace_file
from eagle3_mla.training.release import code_commit

Shape = tuple[int, int, int]  # nodes, top-k, depth
SHAPES = [(7, 1, 7), (16, 4, 7), (32, 8, 7), (60, 10, 7), (59, 10, 8)]
REFERENCE_SHAPES = [(60, 10, 7), (59, 10, 8)]
GREEDY, COUPLED, BLIND = "greedy", "T = 1, noise-coupled", "T = 1, noise-blind"
REFERENCES = {GREEDY: "greedy, EAGLE-2", BLIND: "T = 1, EAGLE-2"}


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


def set_shape(draft, shape: Shape) -> None:
    names = ("num_assistant_tokens", "assistant_tree_top_k", "assistant_tree_depth")
    for name, value in zip(names, shape, strict=True):
        setattr(draft.generation_config, name, value)


def ignore_noise(*arguments):
    """`draft_tree` without the last of its arguments, the noise."""
    return draft_tree(*arguments[:-1], None)


draft_tree = decoder.draft_tree


def generate(target, input_ids: torch.Tensor, do_sample: bool, max_new_tokens: int, draft=None) -> list[int]:
    torch.manual_seed(0)
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0} if do_sample else {"do_sample": False}
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    return target.generate(**inputs, **sampling, max_new_tokens=max_new_tokens, assistant_model=draft)[0].tolist()


class Notebook:
    """
    Results that were measured already, in a file that is complete after each of them.

    Args:
        path (`Path`): The file.
        request (`dict`): What all results depend on.

    Raises:
        RuntimeError: If the file was begun for another request: a table would then not say how it was made.
    """

    def __init__(self, path: Path, request: dict):
        self.path = path
        self.content = json.loads(path.read_text()) if path.exists() else {"request": request, "results": {}}
        if self.content["request"] != request:
            raise RuntimeError(f"{path} was begun for {self.content['request']}. Give another --work-dir.")

    def recall(self, name: str, measure: Callable):
        """The result of that name, measured if there is none yet."""
        results = self.content["results"]
        if name not in results:
            results[name] = measure()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.path, json.dumps(self.content))
        return results[name]


@dataclass(frozen=True)
class Benchmark:
    """Everything that the rows of the table have in common."""

    target: torch.nn.Module
    draft: torch.nn.Module
    prompts: dict[str, list[torch.Tensor]]
    max_new_tokens: int
    notebook: Notebook

    def plain_texts(self, source: str, do_sample: bool) -> list[list[int]]:
        def measure():
            rows = self.prompts[source]
            return [generate(self.target, input_ids, do_sample, self.max_new_tokens) for input_ids in rows]

        return self.notebook.recall(f"plain, {'T = 1' if do_sample else GREEDY}, {source}", measure)

    def tallies(self, mode: str, shape: Shape, tally: Callable[..., Tally]) -> list[Tally]:
        """What `tally` adds up for each source."""
        return [
            Tally(**self.notebook.recall(f"{mode}, {shape}, {source}", lambda source=source: vars(tally(source))))
            for source in self.prompts
        ]

    def row(self, mode: str, shape: Shape) -> list[str]:
        """Chains or trees of the draft's own."""
        set_shape(self.draft, shape)

        def tally(source: str) -> Tally:
            found = Tally([], [], [])
            with patch.object(decoder, "draft_tree", ignore_noise if mode == BLIND else draft_tree):
                plain = self.plain_texts(source, mode != GREEDY)
                for input_ids, expected in zip(self.prompts[source], plain, strict=True):
                    text = generate(self.target, input_ids, mode != GREEDY, self.max_new_tokens, self.draft)
                    found.add(self.draft.speculation_stats, text == expected)
            return found

        tallies = self.tallies(mode, shape, tally)
        num_equal, num_texts = (sum(getattr(each, name) for each in tallies) for name in ("num_equal", "num_texts"))
        return [*table_row(mode, shape, tallies), f"{num_equal} of {num_texts}"]

    def reference_row(self, mode: str, shape: Shape) -> list[str]:
        """Trees of the reference algorithm, of which EAGLE's sampling accepts as much as a noise-blind walk."""

        def tally(source: str) -> Tally:
            found = Tally([], [], [])
            plain = self.plain_texts(source, mode != GREEDY)
            for input_ids, text in zip(self.prompts[source], plain, strict=True):
                size, text = TreeSize(*shape), torch.tensor([text])
                found.add(replay(self.target, self.draft, text, input_ids.shape[1], size), is_equal=True)
            return found

        return [*table_row(REFERENCES[mode], shape, self.tallies(REFERENCES[mode], shape, tally)), "replayed"]


def table_row(mode: str, shape: Shape, tallies: list[Tally]) -> list[str]:
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
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--prompts", required=True, type=Path, help="JSONL of held-out conversations")
    parser.add_argument("--num-samples", type=int, default=40, help="prompts of each source")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--work-dir", type=Path, default=Path("outputs/trees"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/trees.md"))
    arguments = parser.parse_args()
    request = {name: str(value) for name, value in vars(arguments).items() if name not in ("work_dir", "output")}
    notebook = Notebook(arguments.work_dir / "results.json", request | {"commit": code_commit()})
    target = AutoModelForCausalLM.from_pretrained(arguments.target, dtype=torch.float32).eval()
    draft = Eagle3MLADraftModel.from_pretrained(arguments.draft, dtype=torch.float32).eval()
    prompts = read_prompts(arguments.prompts, AutoTokenizer.from_pretrained(arguments.target), arguments.num_samples)
    benchmark, rows = Benchmark(target, draft, prompts, arguments.max_new_tokens, notebook), []
    columns = ["decoding", "nodes", "top-k", "depth", "acceptance length", "by depth", *prompts, "equal texts"]
    cells = [(mode, shape, benchmark.row) for mode in (GREEDY, COUPLED, BLIND) for shape in SHAPES]
    cells += [(mode, shape, benchmark.reference_row) for mode in REFERENCES for shape in REFERENCE_SHAPES]
    for mode, shape, make_row in sorted(cells, key=lambda cell: (GREEDY, COUPLED, BLIND).index(cell[0])):
        rows.append(make_row(mode, shape))
        print(*rows[-1], flush=True)
        write_table(arguments.output, "Chains and trees", columns, rows, __doc__.split("\n\n")[1])


if __name__ == "__main__":
    main()
