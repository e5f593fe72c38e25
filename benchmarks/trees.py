"""Acceptance length of chains and trees of one head, greedy and at temperature 1, with and without the noise.

Means over the sources that the prompts name. At temperature 1 trees are noise-coupled (tokens ranked by q / e, with
the noise e that the target will draw with) or noise-blind (ranked by q); both are exact, and both see the same seeds.
Every text is compared with the one of plain `generate()`. "EAGLE-2" is the reference algorithm of `eagle2.py`,
replayed on the same texts: 60 nodes and depth 7 as the paper counts, and 59 nodes, the deepest at depth 8, which is
what EAGLE's code drafts for `total_tokens=60, depth=7, top_k=10`. Nodes are drafted tokens, without the root.

    python benchmarks/trees.py --target <target> --draft <head> --prompts <held-out.jsonl>

What is measured is kept in --work-dir, source by source, and not measured again by the same command.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from eagle2 import TreeSize, replay
from harness import write_table
from held_out import Notebook, Shape, generate, load_models, make_parser, read_prompts, request_of, set_shape
from transformers import AutoTokenizer

from eagle3_mla.evaluation.measure import sum_by_depth
from eagle3_mla.generation import decoder

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


def ignore_noise(*arguments):
    """`draft_tree` without the last of its arguments, the noise."""
    return draft_tree(*arguments[:-1], None)


draft_tree = decoder.draft_tree


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
    parser = make_parser(__doc__, "benchmarks/results/trees.md", num_samples=40, max_new_tokens=128)
    parser.add_argument("--work-dir", type=Path, default=Path("outputs/trees"))
    arguments = parser.parse_args()
    notebook = Notebook(arguments.work_dir / "results.json", request_of(arguments))
    target, draft = load_models(arguments)
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
