"""Milliseconds of a round by stage, and of the peers' steps, against the time that reading the weights takes.

Target and head have random weights in the shape of Llama-3.1-8B (a head of MLA with C = 256 and R = 0, or as the
options say, and a draft vocabulary of 32000), so that nearly nothing is accepted: what is measured is a round, not a
speed-up. Decoding is greedy, in bfloat16. A time is the difference of a long
and a short call, divided by that of their calls of the target, so that the prompt does not count; median of several
pairs. "Per call" is a round of ours, a token of plain generation, a call of the target in the loops of transformers.
Draft, verify and accept are times of the device's stream, host is the rest of the round. The limit is what must be
read at the measured bandwidth of a copy: the target's weights without its embeddings, for each step of drafting the
head's, `fc` once, and both caches of the context as often. The small assistant of transformers' loop has the shape of
Llama-3.2-1B and proposes 5 tokens; these are not in its limit. Peak memory includes the prompt's pass.
The first call is a row's warm-up, in which graphs are captured and, where a row is compiled, models before them. What
Inductor finds in its cache on disk (`TORCHINDUCTOR_CACHE_DIR`) is not compiled again: an empty one shows what
compiling costs the first time, a second run what it costs later.
"""

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median

import torch
from harness import BYTES_PER_GB, OUT_OF_MEMORY, copy_bandwidth, wait, write_table
from pairs import (
    ASSISTED,
    COMPILED,
    LOOKUP,
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
    context_bytes,
    forget_compiled,
    fusion_bytes,
    set_way,
    step_bytes,
    target_bytes,
    tree_of,
)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from eagle3_mla.configuration_eagle3_mla import Eagle3MLAConfig
from eagle3_mla.modeling_eagle3_mla import Eagle3MLADraftModel

SHAPES = {
    "target": (128256, 4096, 14336, 32, 32, 8, 128),
    "assistant": (128256, 2048, 8192, 16, 32, 8, 64),
}
SMALL_SHAPES = {"target": (96, 64, 96, 4, 4, 2, 16), "assistant": (96, 32, 48, 2, 4, 2, 8)}
DRAFT_VOCAB_SIZE, SMALL_DRAFT_VOCAB_SIZE = 32000, 48
NUM_ASSISTANT_TOKENS, NUM_LOOKUP_TOKENS = 5, 10
# Where nothing is accepted, sizes that follow acceptance say nothing about a round.
MEASURED_WAYS = [way for way in WAYS if way != OURS_ADAPTIVE]
# Pairs of calls after the warm-up: as many as begin within these seconds, three at most.
PAIR_SECONDS, MAX_PAIRS = 4.0, 3
COLUMNS = [
    "way",
    "batch",
    "prompt",
    "ms per call",
    "draft, ms",
    "verify, ms",
    "accept, ms",
    "host, ms",
    "host's share",
]
COLUMNS += ["weights, GB", "caches, GB", "limit, ms", "multiple", "peak memory, GB", "tokens per call"]
COLUMNS += ["first call, s"]
Cell = tuple[int, int]  # batch size, prompt length


# Of a long call: a short one has two at least, because the first token is the prompt's.
LEAST_NEW_TOKENS = 3


class NoFurtherCallsError(RuntimeError):
    """A long call took no more calls of the target than a short one, so that there is nothing to divide by."""


@dataclass(frozen=True)
class Measured:
    """
    Sums over one call of `generate()`.

    Args:
        calls (`int`): Of the target, prompt included.
        tokens (`int`): New tokens of all sequences.
        seconds (`float`): Of the rounds (ours), of the whole call (others).
        stages (`tuple[float, ...]`): Seconds of draft, target, choice and host; empty for others.
    """

    calls: int
    tokens: int
    seconds: float
    stages: tuple[float, ...] = ()

    def per_call_after(self, short: "Measured") -> list[float]:
        """
        Of what this call does beyond a shorter one: milliseconds per call, of its stages, and tokens per call.

        Raises:
            NoFurtherCallsError: If it is not longer.
        """
        num_calls = self.calls - short.calls
        if num_calls <= 0:
            raise NoFurtherCallsError(
                f"The long call took {self.calls} calls of the target, the short one {short.calls}: raise "
                "`--max-new-tokens`."
            )
        stages = [after - before for after, before in zip(self.stages, short.stages, strict=True)]
        seconds = [self.seconds - short.seconds, *stages]
        return [*(1000 * each / num_calls for each in seconds), (self.tokens - short.tokens) / num_calls]


@dataclass(frozen=True)
class Costs:
    """
    What was measured for a row.

    Args:
        per_call (`list[float]`): Medians of what [`Measured.per_call_after`] gives.
        peak_bytes (`int`): Memory, but for the first call.
        first_seconds (`float`): Of the first call, which compiles and captures.
    """

    per_call: list[float]
    peak_bytes: int
    first_seconds: float


@dataclass(frozen=True)
class Reads:
    """
    Bytes that a round must read.

    Args:
        weights, caches (`int`): Of both models.
    """

    weights: int
    caches: int

    def milliseconds(self, bandwidth: float) -> float:
        return 1000 * (self.weights + self.caches) / bandwidth


def reads_of(way: str, target: PreTrainedModel, draft: Eagle3MLADraftModel, cell: Cell, depth: int) -> Reads:
    """What one round of ours, or one call of the target, must read."""
    batch_size, prompt_length = cell
    num_tokens = batch_size * prompt_length
    weights, caches = target_bytes(target), num_tokens * context_bytes(target)
    if way in OURS:
        weights += fusion_bytes(draft) + depth * step_bytes(draft)
        caches += depth * num_tokens * context_bytes(draft)
    return Reads(weights, caches)


@dataclass(frozen=True)
class Case:
    """
    One row: a way of decoding random prompts of one size.

    Args:
        target, draft, assistant (`PreTrainedModel`): The models.
        way (`str`): Of `WAYS`.
        input_ids (`torch.LongTensor` of shape `(B, T)`): The prompts.
        tree ([`TreeShape`]): Of our ways.
    """

    target: PreTrainedModel
    draft: Eagle3MLADraftModel
    assistant: PreTrainedModel
    way: str
    input_ids: torch.Tensor
    tree: TreeShape

    def generate(self, max_new_tokens: int) -> Measured:
        extra = {
            PLAIN_STATIC: {"cache_implementation": "static"},
            LOOKUP: {"prompt_lookup_num_tokens": NUM_LOOKUP_TOKENS},
            ASSISTED: {"assistant_model": self.assistant},
        }.get(self.way, {})
        if self.way in OURS:
            set_way(self.draft, self.way, self.tree)
            extra = {"assistant_model": self.draft}
        calls = []
        # A hook would keep a compiler from the whole model, and our loop from fixed shapes.
        counts = self.way in (LOOKUP, ASSISTED)
        hook = self.target.register_forward_pre_hook(lambda *_: calls.append(1)) if counts else None
        wait()
        began = time.perf_counter()
        try:
            text = self.target.generate(
                self.input_ids,
                attention_mask=torch.ones_like(self.input_ids),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                **extra,
            )
            wait()
        finally:
            if hook is not None:
                hook.remove()
        seconds, num_new = time.perf_counter() - began, text.shape[1] - self.input_ids.shape[1]
        if self.way not in OURS:
            return Measured(len(calls) if counts else num_new, text.shape[0] * num_new, seconds)
        check_captured(self.draft, self.way)
        stats = self.draft.speculation_stats
        stages = (stats.draft_seconds, stats.target_seconds, stats.choice_seconds, stats.host_seconds)
        return Measured(stats.target_calls, stats.new_tokens, stats.round_seconds, stages)

    def measure(self, short: int, long: int) -> Costs:
        """Of calls with so many new tokens, after a warm-up."""
        began = time.perf_counter()
        self.generate(long)
        first_seconds = time.perf_counter() - began
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        pairs, began = [], time.perf_counter()
        while not pairs or (len(pairs) < MAX_PAIRS and time.perf_counter() - began < PAIR_SECONDS):
            before = self.generate(short)
            pairs.append(self.generate(long).per_call_after(before))
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        return Costs([median(values) for values in zip(*pairs, strict=True)], peak, first_seconds)


def table_row(way: str, cell: Cell, costs: Costs, reads: Reads, bandwidth: float) -> list[str]:
    """Cells of a row."""
    milliseconds, *stages, tokens = costs.per_call
    limit = reads.milliseconds(bandwidth)
    of_stages = [*(f"{each:.2f}" for each in stages), f"{stages[-1] / milliseconds:.1%}"] if stages else [""] * 5
    return [
        *(WAYS[way], *map(str, cell), f"**{milliseconds:.2f}**"),
        *of_stages,
        *(f"{reads.weights / BYTES_PER_GB:.2f}", f"{reads.caches / BYTES_PER_GB:.2f}"),
        *(f"{limit:.2f}", f"{milliseconds / limit:.2f}", f"{costs.peak_bytes / BYTES_PER_GB:.1f}"),
        *(f"{tokens / cell[0]:.2f}", f"{costs.first_seconds:.1f}"),
    ]


def row_of(
    make_case: Callable[[], Case], way: str, cell: Cell, tokens: tuple[int, int], bandwidth: float
) -> list[str]:
    """A measured row, or one that says why there is none; the table goes on either way."""
    try:
        case = make_case()
        costs = case.measure(*tokens)
    except torch.OutOfMemoryError:
        return [WAYS[way], *map(str, cell), OUT_OF_MEMORY]
    except RuntimeError as error:
        traceback.print_exc()
        return [WAYS[way], *map(str, cell), f"failed: {type(error).__name__}"]
    reads = reads_of(way, case.target, case.draft, cell, case.tree.depth)
    return table_row(way, cell, costs, reads, bandwidth)


def jobs_of(ways: list[str], batch_sizes: list[int], prompt_lengths: list[int], crosses: bool) -> list[tuple]:
    """
    Cells and ways, what says most first: all of the first cell, then what compiles nothing, then the rest.

    Unless `crosses`, larger batches have the first prompt length and longer prompts the first batch size.
    """
    cells = [
        (size, length)
        for length, size in product(prompt_lengths, batch_sizes)
        if crosses or size == batch_sizes[0] or length == prompt_lengths[0]
    ]
    jobs = [(cell, way) for cell, way in product(cells, ways) if cell[0] == 1 or way not in (LOOKUP, ASSISTED)]
    fast_first = [OURS_CAPTURED, OURS_COMPILED, PLAIN_STATIC, OURS_EAGER, PLAIN_EAGER, LOOKUP, ASSISTED]

    def urgency(job: tuple) -> tuple:
        cell, way = job
        is_slow = way == ASSISTED or (way in COMPILED and cell != cells[0])
        return (2 if is_slow else int(cell != cells[0])), cells.index(cell), fast_first.index(way)

    return sorted(jobs, key=urgency)


def make_llama(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    """Random weights, made where they will be."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = dict(zip((*names, "num_key_value_heads", "head_dim"), shape, strict=True))
    config = LlamaConfig(
        **sizes,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def make_draft(target: PreTrainedModel, arguments: argparse.Namespace) -> Eagle3MLADraftModel:
    vocab_size = SMALL_DRAFT_VOCAB_SIZE if arguments.small else DRAFT_VOCAB_SIZE
    fields = {"mla_rope_dim": arguments.mla_rope_dim} if arguments.attention_type == "mla" else {}
    config = Eagle3MLAConfig.from_target(
        target.config, draft_vocab_size=vocab_size, attention_type=arguments.attention_type, **fields
    )
    with torch.device(target.device):
        return Eagle3MLADraftModel._from_config(config, dtype=target.dtype, attn_implementation="sdpa").eval()


def make_assistant(shape: tuple[int, ...], target: PreTrainedModel) -> LlamaForCausalLM:
    """A small model that always proposes as many tokens."""
    assistant = make_llama(shape, target.dtype, str(target.device))
    assistant.generation_config.num_assistant_tokens = NUM_ASSISTANT_TOKENS
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return assistant


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=MEASURED_WAYS, default=MEASURED_WAYS)
    parser.add_argument("--batch-sizes", nargs="+", type=at_least(1), default=[1, 4, 8, 32])
    parser.add_argument("--prompt-lengths", nargs="+", type=at_least(1), default=[512, 8192, 32768])
    parser.add_argument("--all-cells", action="store_true", help="every batch size with every prompt length")
    parser.add_argument("--attention-type", choices=("mla", "gqa"), default="mla", help="of the head")
    parser.add_argument("--mla-rope-dim", type=int, default=0)
    length_help = "of a long call; a short one has a quarter"
    parser.add_argument("--max-new-tokens", type=at_least(LEAST_NEW_TOKENS), default=48, help=length_help)
    add_arguments(parser)
    parser.add_argument("--small", action="store_true", help="tiny models in fp32 on the CPU")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/rounds_HEAD.md")
    arguments = parser.parse_args()
    if arguments.attention_type != "mla" and arguments.mla_rope_dim:
        parser.error(
            f"`--mla-rope-dim` must be 0 for `{arguments.attention_type}`, got {arguments.mla_rope_dim}: leave it "
            "out, or pass `--attention-type mla`"
        )
    return arguments


@torch.no_grad()
def main() -> None:
    began, arguments = time.perf_counter(), parse_arguments()
    device, dtype = ("cpu", torch.float32) if arguments.small else ("cuda", torch.bfloat16)
    shapes = SMALL_SHAPES if arguments.small else SHAPES
    torch.manual_seed(0)
    bandwidth = copy_bandwidth(2**24 if arguments.small else 2**31, device)
    target = make_llama(shapes["target"], dtype, device)
    assistant = make_assistant(shapes["assistant"], target) if ASSISTED in arguments.ways else None
    tree = tree_of(arguments)
    rope = f"-r{arguments.mla_rope_dim}" if arguments.mla_rope_dim else ""
    head = f"{arguments.attention_type}{rope}"
    output = arguments.output or Path(f"benchmarks/results/rounds_{head}.md")
    title = f"A round by stage: head {head}, trees of {tree.num_nodes} nodes, top-{tree.top_k}, depth {tree.depth}"
    note = f"{__doc__.strip()}\n\nMeasured bandwidth of a copy: {bandwidth / BYTES_PER_GB:.0f} GB/s."
    tokens = max(arguments.max_new_tokens // 4, LEAST_NEW_TOKENS - 1), arguments.max_new_tokens
    jobs = jobs_of(arguments.ways, arguments.batch_sizes, arguments.prompt_lengths, arguments.all_cells)
    rows = {job: [WAYS[job[1]], *map(str, job[0]), "not measured"] for job in jobs}
    in_order = sorted(jobs, key=lambda job: (job[0][1], job[0][0], MEASURED_WAYS.index(job[1])))
    for cell, way in jobs:
        if time.perf_counter() - began > arguments.time_limit:
            print("time is up; the remaining rows are not measured", file=sys.stderr)
            break
        forget_compiled(target)
        gc.collect()
        torch.cuda.empty_cache()
        input_ids = torch.randint(1, target.config.vocab_size, cell, device=device)

        def make_case(way: str = way, input_ids: torch.Tensor = input_ids) -> Case:
            # A head of its own for each row: buffers and graphs are kept as long as their head.
            return Case(target, make_draft(target, arguments), assistant, way, input_ids, tree)

        rows[cell, way] = row_of(make_case, way, cell, tokens, bandwidth)
        print(*rows[cell, way], sep=" | ", flush=True)
        write_table(output, title, COLUMNS, [rows[job] for job in in_order], note)


if __name__ == "__main__":
    main()
