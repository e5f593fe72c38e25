"""Acceptance length of one head against `draft_window`: what the draft loses when it sees only the last rows.

Greedy chains of seven, means over the sources that the prompts name. "Held-out" prompts are conversations cut before
their last answer; "joined" ones are many conversations of one source in one chat, as many as fit into so many tokens,
the last of them cut. Every text is compared with the one of plain `generate()`. Cache: the most bytes that the draft's
cache had allocated after the last round of a text.

    python benchmarks/draft_window.py --target <target> --draft <head> --prompts <held-out.jsonl>

What is measured is kept in --work-dir, one file for each source, and not measured again; with --only several processes
share the sources, and the same command without it then makes the table.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import write_table
from held_out import CHAIN, Notebook, generate, load_models, make_parser, read_chats, request_of, set_shape
from transformers import AutoTokenizer

from eagle3_mla.evaluation.prompts import choose_evenly, render

WINDOWS = (None, 1024, 512, 256, 64)  # None: off
HELD_OUT = "held-out"


@dataclass
class Tally:
    """What the texts of one source add up to with one window."""

    num_rounds: int = 0
    num_tokens: int = 0
    cache_bytes: int = 0
    num_equal: int = 0
    num_texts: int = 0

    def add(self, stats, is_equal: bool) -> None:
        self.num_rounds += stats.rounds
        self.num_tokens += sum(stats.acceptance_lengths)
        self.cache_bytes = max(self.cache_bytes, stats.draft_cache_bytes)
        self.num_equal += is_equal
        self.num_texts += 1

    @property
    def acceptance_length(self) -> float:
        return self.num_tokens / self.num_rounds


def held_out(chats: list[list[dict]], tokenizer, num_prompts: int) -> list[torch.Tensor]:
    """Prompts `(1, T)`, each conversation by itself."""
    return [render(chat[:-1], tokenizer) for chat in choose_evenly(chats, num_prompts)]


def joined(chats: list[list[dict]], tokenizer, num_prompts: int, max_tokens: int) -> list[torch.Tensor]:
    """
    Prompts `(1, T)` of at most `max_tokens` tokens, none with a conversation twice.

    They start at equal distances in `chats` and go on from its beginning after its end, so they overlap where there is
    little text.
    """
    starts = choose_evenly(list(range(len(chats))), num_prompts)
    return [join(chats[start:] + chats[:start], tokenizer, max_tokens) for start in starts]


def join(chats: list[list[dict]], tokenizer, max_tokens: int) -> torch.Tensor:
    """
    As many of the first conversations as fit, in one chat.

    Raises:
        ValueError: If not even the first one does.
    """
    messages, longest = [], None
    for chat in chats:
        prompt = render([*messages, *chat[:-1]], tokenizer)
        if prompt.shape[1] > max_tokens:
            break
        messages, longest = [*messages, *chat], prompt
    if longest is None:
        raise ValueError(f"`--joined` must be at least {prompt.shape[1]}, the first conversation's, got {max_tokens}.")
    return longest


def set_window(draft, window: int | None) -> None:
    draft.generation_config.draft_window = window


@dataclass(frozen=True)
class Benchmark:
    """Everything that the rows of the table have in common; prompts and notebooks by source."""

    target: torch.nn.Module
    draft: torch.nn.Module
    prompts: dict[str, dict[str, list[torch.Tensor]]]
    notebooks: dict[str, Notebook]
    max_new_tokens: int

    def plain_texts(self, kind: str, source: str) -> list[list[int]]:
        def measure():
            return [generate(self.target, ids, False, self.max_new_tokens) for ids in self.prompts[kind][source]]

        return self.notebooks[source].recall(f"plain, {kind}", measure)

    def tally(self, kind: str, window: int | None, source: str) -> Tally:
        def measure():
            found = Tally()
            set_window(self.draft, window)
            plain = self.plain_texts(kind, source)
            for input_ids, expected in zip(self.prompts[kind][source], plain, strict=True):
                text = generate(self.target, input_ids, False, self.max_new_tokens, self.draft)
                found.add(self.draft.speculation_stats, text == expected)
            return vars(found)

        return Tally(**self.notebooks[source].recall(f"{kind}, {window}", measure))

    def row(self, kind: str, window: int | None) -> list[str]:
        tallies = {source: self.tally(kind, window, source) for source in self.notebooks}
        lengths = [ids.shape[1] for source in self.notebooks for ids in self.prompts[kind][source]]
        return table_row(f"{kind}, {min(lengths)} to {max(lengths)} tokens", window, list(tallies.values()))


def table_row(kind: str, window: int | None, tallies: list[Tally]) -> list[str]:
    lengths = [tally.acceptance_length for tally in tallies]
    return [
        kind,
        "off" if window is None else str(window),
        f"**{sum(lengths) / len(lengths):.2f}**",
        *(f"{length:.2f}" for length in lengths),
        f"{max(tally.cache_bytes for tally in tallies):,}",
        f"{sum(tally.num_equal for tally in tallies)} of {sum(tally.num_texts for tally in tallies)}",
    ]


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, "benchmarks/results/draft_window.md", num_samples=40, max_new_tokens=128)
    parser.add_argument("--joined", type=int, nargs="*", default=[800, 3800], help="tokens of the joined prompts")
    parser.add_argument("--num-joined", type=int, default=8, help="joined prompts of each source and length")
    parser.add_argument("--only", nargs="+", help="measure these sources and make no table")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work-dir", type=Path, default=Path("outputs/draft_window"))
    return parser.parse_args()


def make_prompts(chats: dict[str, list[list[dict]]], tokenizer, arguments: argparse.Namespace) -> dict[str, dict]:
    """Prompts on the device by kind and source; the longest first, which take the most time."""
    kinds = {
        f"joined to {length:,}": lambda rows, length=length: joined(rows, tokenizer, arguments.num_joined, length)
        for length in sorted(arguments.joined, reverse=True)
    }
    kinds[HELD_OUT] = lambda rows: held_out(rows, tokenizer, arguments.num_samples)
    return {
        kind: {source: [ids.to(arguments.device) for ids in make(rows)] for source, rows in chats.items()}
        for kind, make in kinds.items()
    }


def main() -> None:
    arguments = parse_arguments()
    request = request_of(arguments, "only")
    chats = read_chats(arguments.prompts)
    chats = {source: rows for source, rows in chats.items() if source in (arguments.only or chats)}
    notebooks = {source: Notebook(arguments.work_dir / f"{source}.json", request) for source in chats}
    target, draft = load_models(arguments, arguments.device)
    set_shape(draft, CHAIN)
    prompts = make_prompts(chats, AutoTokenizer.from_pretrained(arguments.target), arguments)
    benchmark, rows = Benchmark(target, draft, prompts, notebooks, arguments.max_new_tokens), []
    columns = ["prompts", "window", "acceptance length", *chats, "cache, bytes", "equal texts"]
    for kind in prompts:
        for window in WINDOWS:
            rows.append(benchmark.row(kind, window))
            print(*rows[-1], flush=True)
    if arguments.only is None:
        write_table(arguments.output, "The draft's window", columns, rows, __doc__.split("\n\n")[1])


if __name__ == "__main__":
    main()
