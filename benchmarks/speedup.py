"""Tokens per second of a trained target and its head in the shape of Llama-3.1-8B, against plain compiled generation.

Target and head are twins (twin.py): what they say and accept is what the trained small models do, what a round costs
is what large ones cost. "Sizes by measurement" is `num_assistant_tokens_schedule="heuristic"`, which knows in the
beginning what it has learned in the warm-up. Greedy, on the same held-out prompts, all padded on the left to one
length, so that plain generation with a static cache compiles once. Counted are emitted tokens, end of sequence
included, padding not; seconds are those of `generate()`, prompt included, after a warm-up. In brackets: the ratio to
plain generation, static and compiled; the ratio of a row is their mean. In half precision a forward over one token and
one over a tree round differently, so that texts may part; "equal texts" are those that did not. The last column is
what the warm-up before took, compilation and captures included: one batch for plain generation, all of them for ours,
whose buffers have several sizes. The twin's vocabulary is small: the rows that say "computed" add the time of reading
what a vocabulary of 128256 (head: 32000) adds to `lm_head` of target and head, at the measured bandwidth of a copy, to
the measured seconds; nothing else in them differs.

    python benchmarks/speedup.py --target <target> --draft <head> --prompts <held-out.jsonl>
"""

import argparse
import gc
import sys
import time
import traceback
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from statistics import mean

import torch
from harness import BYTES_PER_GB, copy_bandwidth, wait, write_table
from held_out import load_models, make_parser, read_prompts
from pairs import (
    COMPILED,
    OURS,
    OURS_ADAPTIVE,
    OURS_CAPTURED,
    OURS_COMPILED,
    OURS_EAGER,
    PLAIN_EAGER,
    PLAIN_STATIC,
    WAYS,
    TreeShape,
    add_arguments,
    at_least,
    check_captured,
    forget_compiled,
    set_way,
    tree_of,
)
from transformers import AutoTokenizer, LlamaConfig, PreTrainedModel
from twin import TwinShape, widen_draft, widen_target

from eagle3_mla.modeling_eagle3_mla import Eagle3MLADraftModel

VOCAB_SIZE, DRAFT_VOCAB_SIZE = 128256, 32000
COMPUTED = "with the `lm_head` of a vocabulary of 128256 (computed)"
TRIED = (PLAIN_STATIC, OURS_CAPTURED, OURS_ADAPTIVE, OURS_COMPILED, OURS_EAGER, PLAIN_EAGER)
Texts = list[list[int]]


@dataclass
class Tally:
    """
    What the texts of one source add up to.

    Args:
        tokens (`int`): Emitted.
        seconds (`float`): Of all calls.
        calls (`int`): Of the target.
        lengths (`list[int]`): Tokens of each round; empty for plain generation.
        texts (`list[list[int]]`): What was emitted.
    """

    tokens: int = 0
    seconds: float = 0.0
    calls: int = 0
    lengths: list[int] = field(default_factory=list)
    texts: Texts = field(default_factory=list)

    def speed(self, extra_seconds: float = 0.0) -> float:
        """Tokens per second, if each call of the target took so much longer."""
        return self.tokens / (self.seconds + self.calls * extra_seconds)


Tallies = dict[str, Tally]  # by source


@dataclass(frozen=True)
class Pair:
    """
    Target and head, and what all rows have in common.

    Args:
        target (`PreTrainedModel`), draft ([`Eagle3MLADraftModel`]): The twins.
        tree ([`TreeShape`]): Of our ways.
        max_new_tokens (`int`): Of each text.
        pad_token_id (`int`): Of prompts and texts.
    """

    target: PreTrainedModel
    draft: Eagle3MLADraftModel
    tree: TreeShape
    max_new_tokens: int
    pad_token_id: int

    def run(self, way: str, prompts: list[torch.Tensor], length: int) -> Tally:
        """One batch."""
        input_ids, mask = pad_left(prompts, length, self.pad_token_id)
        input_ids, mask = input_ids.to(self.target.device), mask.to(self.target.device)
        extra = {"cache_implementation": "static"} if way == PLAIN_STATIC else {}
        if way in OURS:
            set_way(self.draft, way, self.tree)
            extra = {"assistant_model": self.draft}
        wait()
        began = time.perf_counter()
        text = self.target.generate(
            input_ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self.pad_token_id,
            **extra,
        )
        wait()
        seconds = time.perf_counter() - began
        texts = [emitted(row, self.end_token_ids) for row in text[:, length:].tolist()]
        tokens, num_steps = sum(map(len, texts)), text.shape[1] - length
        if way not in OURS:
            return Tally(tokens, seconds, num_steps, [], texts)
        stats = self.draft.speculation_stats
        if stats.rounds > 0:
            check_captured(self.draft, way)
        return Tally(tokens, seconds, stats.target_calls, stats.acceptance_lengths, texts)

    @property
    def end_token_ids(self) -> list[int]:
        ends = self.target.generation_config.eos_token_id
        return ends if isinstance(ends, list) else [] if ends is None else [ends]

    def measure(self, way: str, batches: dict[str, list[list[torch.Tensor]]], length: int) -> tuple[Tallies, float]:
        """All batches of all sources, and the seconds of a warm-up before: of all, too, for ours."""
        every = [batch for each in batches.values() for batch in each]
        warm_up = add(self.run(way, batch, length) for batch in (every if way in OURS else every[:1]))
        tallies = {source: add(self.run(way, batch, length) for batch in each) for source, each in batches.items()}
        return tallies, warm_up.seconds

    def extra_bytes(self, way: str) -> int:
        """Bytes that a call of the target would read more with large vocabularies, the drafting before it included."""
        missing = max(VOCAB_SIZE - self.target.config.vocab_size, 0)
        if way in OURS:
            missing += self.tree.depth * max(DRAFT_VOCAB_SIZE - self.draft.config.draft_vocab_size, 0)
        return missing * self.target.config.hidden_size * self.target.dtype.itemsize


def add(tallies) -> Tally:
    """The sum of batches."""
    total = Tally()
    for tally in tallies:
        for name, value in vars(tally).items():
            setattr(total, name, getattr(total, name) + value)
    return total


def pad_left(prompts: list[torch.Tensor], length: int, pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts `(1, T)` each as a batch `(B, length)` and its attention mask."""
    ids = torch.full((len(prompts), length), pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - prompt.shape[1] :], mask[row, length - prompt.shape[1] :] = prompt[0], 1
    return ids, mask


def emitted(new_tokens: list[int], end_token_ids: list[int]) -> list[int]:
    """New tokens up to the first that ends the text, which counts, without the padding behind it."""
    ends = [place for place, token in enumerate(new_tokens) if token in end_token_ids]
    return new_tokens[: ends[0] + 1] if ends else new_tokens


def batches_of(prompts: dict[str, list[torch.Tensor]], batch_size: int, num_samples: int) -> dict[str, list]:
    """Full batches of each source, of `num_samples` prompts, or one batch of more; prompts repeat where they lack."""
    batches = {}
    for source, rows in prompts.items():
        num_batches = max(num_samples // batch_size, 1)
        chosen = [rows[index % len(rows)] for index in range(num_batches * batch_size)]
        batches[source] = [chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size)]
    return batches


def table_rows(
    way: str, batch_size: int, tallies: Tallies, plain: Tallies | None, extra: tuple[float, float]
) -> list[list[str]]:
    """
    A way's row, and the one with a large vocabulary, unless the number of drafting steps follows the texts.

    Args:
        plain (`dict[str, Tally]`, *optional*): What ratios refer to; `None` if it is not known.
        extra (`tuple[float, float]`): Seconds that large vocabularies add to a call of the target, here and there.
    """
    kinds = [("", (0.0, 0.0)), (f", {COMPUTED}", extra)]
    return [
        one_row(f"{WAYS[way]}{suffix}", batch_size, tallies, plain, seconds)
        for suffix, seconds in (kinds[:1] if way == OURS_ADAPTIVE else kinds)
    ]


def one_row(
    name: str, batch_size: int, tallies: Tallies, plain: Tallies | None, extra: tuple[float, float]
) -> list[str]:
    speeds = {source: tally.speed(extra[0]) for source, tally in tallies.items()}
    lengths = [mean(tally.lengths) for tally in tallies.values() if tally.lengths]
    ratios, num_equal = {}, ""
    if plain is not None:
        ratios = {source: speed / plain[source].speed(extra[1]) for source, speed in speeds.items()}
        pairs = [pair for source in tallies for pair in zip(tallies[source].texts, plain[source].texts, strict=True)]
        num_equal = f"{sum(text == other for text, other in pairs)} of {len(pairs)}"
    cells = [f"{speed:.0f}" + (f" ({ratios[source]:.2f}x)" if ratios else "") for source, speed in speeds.items()]
    return [
        *(name, str(batch_size), f"{mean(speeds.values()):.0f}"),
        f"**{mean(ratios.values()):.2f}x**" if ratios else "",
        f"{mean(lengths):.2f}" if lengths else "",
        *cells,
        num_equal,
    ]


def jobs_of(ways: list[str], batch_sizes: list[int]) -> list[tuple[int, str]]:
    """Batch sizes and ways, what says most first; what our ways are compared with always comes before them."""

    def urgency(job: tuple[int, str]) -> tuple:
        batch_size, way = job
        is_later = way in (OURS_EAGER, PLAIN_EAGER)
        compiles_again = way == OURS_COMPILED and batch_size != batch_sizes[0]
        return 2 * is_later + compiles_again, batch_sizes.index(batch_size), TRIED.index(way)

    return sorted(((batch_size, way) for batch_size in batch_sizes for way in ways), key=urgency)


def small_shape(config: LlamaConfig) -> TwinShape:
    """Twice as wide as the small target, for trying the command."""
    sizes = {name: getattr(config, name) for name in asdict(TwinShape()) if name != "tie_word_embeddings"}
    return TwinShape(**sizes | {"hidden_size": 2 * config.hidden_size})


def load_pair(arguments: argparse.Namespace, tokenizer) -> Pair:
    device, dtype = ("cpu", torch.float32) if arguments.small else ("cuda", torch.bfloat16)
    small, small_draft = load_models(arguments)
    shape = small_shape(small.config) if arguments.small else TwinShape()
    target = widen_target(small, shape, dtype, device)
    if arguments.random_head:
        small_draft = Eagle3MLADraftModel(small_draft.config).eval()
    draft = widen_draft(small_draft, target.config, dtype=dtype, device=device)
    tree = tree_of(arguments)
    return Pair(target, draft, tree, arguments.max_new_tokens, tokenizer.pad_token_id)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, "benchmarks/results/speedup.md", num_samples=8, max_new_tokens=256)
    default_ways = [PLAIN_STATIC, OURS_CAPTURED, OURS_ADAPTIVE, OURS_COMPILED]
    parser.add_argument("--ways", nargs="+", choices=TRIED, default=default_ways)
    parser.add_argument("--batch-sizes", nargs="+", type=at_least(1), default=[1, 8, 32])
    # With 256 new tokens and a tree of 60 nodes our buffers need not grow on the way, which would compile them anew.
    parser.add_argument("--prompt-length", type=int, default=400, help="longer prompts are left out")
    add_arguments(parser)
    parser.add_argument("--random-head", action="store_true", help="a head that knows nothing of the target")
    parser.add_argument("--small", action="store_true", help="a small twin in fp32 on the CPU")
    return parser.parse_args()


def fitting_prompts(arguments: argparse.Namespace, tokenizer) -> dict[str, list[torch.Tensor]]:
    """
    The prompts of each source that are short enough.

    Raises:
        SystemExit: If a source has none.
    """
    every = read_prompts(arguments.prompts, tokenizer, sys.maxsize)
    fitting = {
        source: [row for row in rows if row.shape[1] <= arguments.prompt_length] for source, rows in every.items()
    }
    if empty := [source for source, rows in fitting.items() if not rows]:
        raise SystemExit(
            f"`--prompt-length` must fit a prompt of each source, got {arguments.prompt_length}: {empty}."
        )
    return fitting


def describe(arguments: argparse.Namespace, tree: TreeShape, bandwidth: float) -> str:
    """How the table was made."""
    settings = f"Trees of {tree.num_nodes} nodes, top-{tree.top_k}, depth {tree.depth}"
    settings += ", a head with random weights" if arguments.random_head else ""
    settings += f"; prompts padded to {arguments.prompt_length} tokens, at most {arguments.max_new_tokens} new ones"
    what = __doc__.split("    python")[0].strip()
    return f"{what}\n\n{settings}; measured bandwidth {bandwidth / BYTES_PER_GB:.0f} GB/s."


@torch.no_grad()
def main() -> None:
    began, arguments = time.perf_counter(), parse_arguments()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.target)
    prompts = fitting_prompts(arguments, tokenizer)
    pair = load_pair(arguments, tokenizer)
    bandwidth = copy_bandwidth(2**24 if arguments.small else 2**31, str(pair.target.device))
    columns = ["way", "batch", "tokens/s", "ratio", "acceptance length", *prompts, "equal texts", "warm-up, s"]
    note = describe(arguments, pair.tree, bandwidth)
    found: dict[int, dict[str, Tallies]] = defaultdict(dict)
    rows: dict[tuple[int, str], list[list[str]]] = {}
    for batch_size, way in jobs_of(arguments.ways, arguments.batch_sizes):
        if time.perf_counter() - began > arguments.time_limit:
            print("time is up; the remaining rows are not measured", file=sys.stderr)
            break
        if way in COMPILED:
            forget_compiled(pair.target)
        gc.collect()
        torch.cuda.empty_cache()
        batches = batches_of(prompts, batch_size, arguments.num_samples)
        try:
            tallies, warm_up = pair.measure(way, batches, arguments.prompt_length)
        except RuntimeError as error:  # one way must not cost the others their rows
            traceback.print_exc()
            rows[batch_size, way] = [[WAYS[way], str(batch_size), f"failed: {type(error).__name__}"]]
        else:
            found[batch_size][way] = tallies
            extra = tuple(pair.extra_bytes(each) / bandwidth for each in (way, PLAIN_STATIC))
            plain = found[batch_size].get(PLAIN_STATIC)
            measured = table_rows(way, batch_size, tallies, plain, extra)
            rows[batch_size, way] = [[*row, f"{warm_up:.1f}"] for row in measured]
        for row in rows[batch_size, way]:
            print(*row, sep=" | ", flush=True)
        in_order = [row for job in sorted(rows, key=lambda job: (job[0], TRIED.index(job[1]))) for row in rows[job]]
        write_table(arguments.output, "Tokens per second on a twin", columns, in_order, note)


if __name__ == "__main__":
    main()
