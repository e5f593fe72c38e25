"""Acceptance length in a chat's second turn, by what the draft knows of the first.

Greedy, means over the sources that the prompts name. The target answers a held-out question, then another one of the
same source; with --again also the first one once more. "Anew": the whole text is read again, without a cache.
"Remembered": the cache of the first, assisted call is passed on, and the draft goes on with what it knows.
"Forgotten": a cache that a plain forward filled is passed on, so that the draft knows only what the target reads in
the second call. Every text is compared with that of plain `generate()`, which reads everything anew.

    python benchmarks/second_turn.py --target <target> --draft <head> --prompts <held-out.jsonl>

What is measured is kept in --work-dir, one file for each source, and not measured again; with --only several processes
share the sources, and the same command without it then makes the table.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from draft_window import Tally
from harness import write_table
from held_out import CHAIN, Notebook, Shape, load_models, make_parser, read_chats, request_of, set_shape
from torch import Tensor
from transformers import AutoTokenizer, Cache, DynamicCache

from eagle3_mla.evaluation.prompts import choose_evenly, render

TREE = (16, 4, 7)
TURNS = FIRST, ANEW, REMEMBERED, FORGOTTEN = "first", "second, anew", "second, remembered", "second, forgotten"
OTHER, SAME = "another", "the same"


@dataclass(frozen=True)
class Chat:
    """
    The questions of one chat.

    Args:
        first (`torch.LongTensor` of shape `(1, T)`): The prompt of the first turn.
        later (`dict[str, torch.LongTensor]`): What follows its answer, from the end of the turn, by kind of question.
    """

    first: Tensor
    later: dict[str, Tensor]

    def second(self, kind: str, answered: Tensor) -> Tensor:
        """The prompt of the second turn, after a first text `(1, T)` that may hold the end of its turn already."""
        later = self.later[kind]
        answered = answered.to(later.device)
        is_ended = answered[0, -1] == later[0, 0]
        return torch.cat([answered, later[:, int(is_ended) :]], dim=1)


def make_chats(rows: list[list[dict]], tokenizer, num_chats: int, device: str) -> list[Chat]:
    """Chats whose other question is that of the next conversation."""
    questions = [row[:-1] for row in rows]
    pairs = zip(questions, questions[1:] + questions[:1], strict=True)
    chats = []
    for first, other in choose_evenly(list(pairs), num_chats):
        later = {kind: what_follows(each, tokenizer).to(device) for kind, each in ((OTHER, other), (SAME, first))}
        chats.append(Chat(render(first, tokenizer).to(device), later))
    return chats


def what_follows(question: list[dict], tokenizer) -> Tensor:
    """Tokens from the end of an answer to the beginning of the next one, `(1, T)`."""
    answer = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}]
    return render([*answer, *question], tokenizer)[:, render(answer[:1], tokenizer).shape[1] :]


def generate(target, input_ids: Tensor, max_new_tokens: int, cache: Cache, draft=None) -> Tensor:
    """Text `(1, T)`; the cache is filled."""
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "past_key_values": cache}
    return target.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, assistant_model=draft)


@dataclass(frozen=True)
class Benchmark:
    """Everything that the rows of the table have in common; chats and notebooks by source."""

    target: torch.nn.Module
    draft: torch.nn.Module
    chats: dict[str, list[Chat]]
    notebooks: dict[str, Notebook]
    max_new_tokens: int

    def plain_texts(self, source: str, kind: str) -> list[list[list[int]]]:
        """Of each chat the text `(1, T)` of its first turn, or of its second after a question of that kind."""

        def measure():
            prompts = [chat.first for chat in self.chats[source]]
            if kind != FIRST:
                answered = map(torch.tensor, self.plain_texts(source, FIRST))
                prompts = [chat.second(kind, text) for chat, text in zip(self.chats[source], answered, strict=True)]
            return [generate(self.target, ids, self.max_new_tokens, DynamicCache()).tolist() for ids in prompts]

        return self.notebooks[source].recall(f"plain, {kind}", measure)

    def tallies(self, shape: Shape, kind: str, source: str) -> dict[str, Tally]:
        """Both turns of all chats of a source."""

        def measure():
            found = {turn: Tally() for turn in TURNS}
            set_shape(self.draft, shape)
            texts = self.plain_texts(source, FIRST), self.plain_texts(source, kind)
            for chat, first, second in zip(self.chats[source], *texts, strict=True):
                self._add_chat(chat, kind, first, second, found)
            return {turn: vars(tally) for turn, tally in found.items()}

        tallies = self.notebooks[source].recall(f"{shape}, {kind}", measure)
        return {turn: Tally(**tally) for turn, tally in tallies.items()}

    def _add_chat(self, chat: Chat, kind: str, first: list, second: list, found: dict[str, Tally]) -> None:
        answered, remembered = torch.tensor(first, device=self.target.device), DynamicCache()
        found[FIRST].add(*self._assisted(chat.first, first, remembered))
        with torch.no_grad():
            forgotten = self.target(answered[:, :-1], use_cache=True).past_key_values
        prompt = chat.second(kind, answered)
        for turn, cache in {ANEW: DynamicCache(), REMEMBERED: remembered, FORGOTTEN: forgotten}.items():
            found[turn].add(*self._assisted(prompt, second, cache))

    def _assisted(self, input_ids: Tensor, expected: list[list[int]], cache: Cache) -> tuple:
        """Statistics of an assisted call, and whether its text is the expected one."""
        text = generate(self.target, input_ids, self.max_new_tokens, cache, self.draft)
        return self.draft.speculation_stats, text.tolist() == expected

    def rows(self, name: str, shape: Shape, kind: str) -> list[list[str]]:
        tallies = {source: self.tallies(shape, kind, source) for source in self.notebooks}
        return [table_row([name, kind, turn], [each[turn] for each in tallies.values()]) for turn in TURNS]


def table_row(labels: list[str], tallies: list[Tally]) -> list[str]:
    lengths = [tally.acceptance_length for tally in tallies]
    return [
        *labels,
        f"**{sum(lengths) / len(lengths):.2f}**",
        *(f"{length:.2f}" for length in lengths),
        f"{sum(tally.num_tokens for tally in tallies):,}",
        f"{sum(tally.num_equal for tally in tallies)} of {sum(tally.num_texts for tally in tallies)}",
    ]


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, "benchmarks/results/second_turn.md", num_samples=12, max_new_tokens=64)
    parser.add_argument("--again", action="store_true", help="also ask the first question once more, with chains")
    parser.add_argument("--only", nargs="+", help="measure these sources and make no table")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work-dir", type=Path, default=Path("outputs/second_turn"))
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    request = request_of(arguments, "only", "again")
    rows = read_chats(arguments.prompts)
    rows = {source: chats for source, chats in rows.items() if source in (arguments.only or rows)}
    notebooks = {source: Notebook(arguments.work_dir / f"{source}.json", request) for source in rows}
    target, draft = load_models(arguments, arguments.device)
    tokenizer = AutoTokenizer.from_pretrained(arguments.target)
    chats = {
        source: make_chats(each, tokenizer, arguments.num_samples, arguments.device) for source, each in rows.items()
    }
    benchmark, table = Benchmark(target, draft, chats, notebooks, arguments.max_new_tokens), []
    cases = [("chain of 7", CHAIN, OTHER), ("tree of 16", TREE, OTHER), ("chain of 7", CHAIN, SAME)]
    for case in cases[: 3 if arguments.again else 2]:
        for row in benchmark.rows(*case):
            table.append(row)
            print(*row, flush=True)
    if arguments.only is None:
        columns = ["drafts", "second question", "turn", "acceptance length", *rows, "tokens", "equal texts"]
        write_table(arguments.output, "A chat's second turn", columns, table, __doc__.split("\n\n")[1])


if __name__ == "__main__":
    main()
