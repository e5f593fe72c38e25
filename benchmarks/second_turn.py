"""Acceptance length in a chat's second turn, by what the draft knows of the first.

Greedy, means over the sources that the prompts name. The target answers a held-out question, then a second one, which
is either another conversation's of the same source or the first question once more. "Anew": the whole text is read
again, without a cache. "Remembered": the cache of the first, assisted call is passed on, and the draft goes on with
what it knows. "Forgotten": a cache that a plain forward filled is passed on, so that the draft knows only what the
target reads in the second call. Every text is compared with that of plain `generate()`, which reads everything anew.

    python benchmarks/second_turn.py --target <target> --draft <head> --prompts <held-out.jsonl>

What is measured is kept in --work-dir, one file for each source, and not measured again; with --only several processes
share the sources, and the same command without it then makes the table.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from draft_window import CHAIN, Tally, read_chats
from harness import write_table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trees import Notebook, Shape, set_shape

from eagle3_mla.evaluation.prompts import choose_evenly, render
from eagle3_mla.modeling_eagle3_mla import Eagle3MLADraftModel
from eagle3_mla.training.release import code_commit

TREE = (16, 4, 7)
SHAPES = {"chain of 7": CHAIN, "tree of 16": TREE}
FIRST, ANEW, REMEMBERED, FORGOTTEN = "first turn", "anew", "remembered", "forgotten"
OTHER, SAME = "another question", "the same question"
TURNS = [FIRST] + [f"{kind}, {way}" for kind in (OTHER, SAME) for way in (ANEW, REMEMBERED, FORGOTTEN)]


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


def generate(target, input_ids: Tensor, max_new_tokens: int, cache=None, draft=None):
    """Text and cache."""
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "past_key_values": cache}
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens, "return_dict_in_generate": True}
    return target.generate(**inputs, **settings, assistant_model=draft)


@dataclass(frozen=True)
class Benchmark:
    """Everything that the rows of the table have in common; chats and notebooks by source."""

    target: torch.nn.Module
    draft: torch.nn.Module
    chats: dict[str, list[Chat]]
    notebooks: dict[str, Notebook]
    max_new_tokens: int

    def plain_texts(self, source: str) -> list[dict[str, list[list[int]]]]:
        """The texts `(1, T)` of each chat: of its first turn, and of its second by kind of question."""
        return self.notebooks[source].recall("plain", lambda: [self._plain(chat) for chat in self.chats[source]])

    def _plain(self, chat: Chat) -> dict[str, list[list[int]]]:
        first = generate(self.target, chat.first, self.max_new_tokens).sequences
        prompts = {kind: chat.second(kind, first) for kind in chat.later}
        later = {kind: generate(self.target, ids, self.max_new_tokens).sequences for kind, ids in prompts.items()}
        return {turn: text.tolist() for turn, text in {FIRST: first, **later}.items()}

    def tallies(self, shape: Shape, source: str) -> dict[str, Tally]:
        """Both turns of all chats of a source."""

        def measure():
            found = {turn: Tally() for turn in TURNS}
            set_shape(self.draft, shape)
            for chat, texts in zip(self.chats[source], self.plain_texts(source), strict=True):
                found[FIRST].add(*self._assisted(chat.first, texts[FIRST]))
                for kind in chat.later:
                    self._add_second_turn(chat, kind, texts, found)
            return {turn: vars(tally) for turn, tally in found.items()}

        tallies = self.notebooks[source].recall(str(shape), measure)
        return {turn: Tally(**tally) for turn, tally in tallies.items()}

    def _add_second_turn(self, chat: Chat, kind: str, texts: dict, found: dict[str, Tally]) -> None:
        answered = torch.tensor(texts[FIRST], device=self.target.device)
        prompt = chat.second(kind, answered)
        remembered = generate(self.target, chat.first, self.max_new_tokens, draft=self.draft).past_key_values
        with torch.no_grad():
            forgotten = self.target(answered[:, :-1], use_cache=True).past_key_values
        for way, cache in {ANEW: None, REMEMBERED: remembered, FORGOTTEN: forgotten}.items():
            found[f"{kind}, {way}"].add(*self._assisted(prompt, texts[kind], cache))

    def _assisted(self, input_ids: Tensor, expected: list[list[int]], cache=None) -> tuple:
        """Statistics of an assisted call, and whether its text is the expected one."""
        text = generate(self.target, input_ids, self.max_new_tokens, cache, self.draft).sequences
        return self.draft.speculation_stats, text.tolist() == expected

    def rows(self, name: str, shape: Shape) -> list[list[str]]:
        tallies = {source: self.tallies(shape, source) for source in self.notebooks}
        return [table_row(name, turn, [each[turn] for each in tallies.values()]) for turn in TURNS]


def table_row(shape: str, turn: str, tallies: list[Tally]) -> list[str]:
    lengths = [tally.acceptance_length for tally in tallies]
    return [
        shape,
        turn,
        f"**{sum(lengths) / len(lengths):.2f}**",
        *(f"{length:.2f}" for length in lengths),
        f"{sum(tally.num_tokens for tally in tallies):,}",
        f"{sum(tally.num_equal for tally in tallies)} of {sum(tally.num_texts for tally in tallies)}",
    ]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--prompts", required=True, type=Path, help="JSONL of held-out conversations")
    parser.add_argument("--num-samples", type=int, default=15, help="chats of each source")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="of each turn")
    parser.add_argument("--only", nargs="+", help="measure these sources and make no table")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work-dir", type=Path, default=Path("outputs/second_turn"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/second_turn.md"))
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    varying = ("work_dir", "output", "only")
    request = {name: str(value) for name, value in vars(arguments).items() if name not in varying}
    request["commit"] = code_commit()
    rows = read_chats(arguments.prompts)
    rows = {source: chats for source, chats in rows.items() if source in (arguments.only or rows)}
    notebooks = {source: Notebook(arguments.work_dir / f"{source}.json", request) for source in rows}
    target = AutoModelForCausalLM.from_pretrained(arguments.target, dtype=torch.float32).to(arguments.device).eval()
    draft = Eagle3MLADraftModel.from_pretrained(arguments.draft, dtype=torch.float32).to(arguments.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.target)
    chats = {
        source: make_chats(each, tokenizer, arguments.num_samples, arguments.device) for source, each in rows.items()
    }
    benchmark, table = Benchmark(target, draft, chats, notebooks, arguments.max_new_tokens), []
    for name, shape in SHAPES.items():
        for row in benchmark.rows(name, shape):
            table.append(row)
            print(*row, flush=True)
    if arguments.only is None:
        columns = ["drafts", "turn", "acceptance length", *rows, "tokens", "equal texts"]
        write_table(arguments.output, "A chat's second turn", columns, table, __doc__.split("\n\n")[1])


if __name__ == "__main__":
    main()
