"""The loop at fixed shapes.

On CUDA this is what makes a round cost little more than reading the weights: each stage of `fixed_rounds.py` is one
launch of a captured graph. Where shapes cannot be fixed (`obstacles.py`), or a model cannot be captured, the loop of
`decoder.py` runs, and the log says once why.
"""

import time
import traceback
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .fixed_rounds import FixedRounds, tree_size
from .memory import DraftMemory
from .metrics import SpeculationStats
from .obstacles import give_reason
from .prefill import Prefill
from .ragged import RaggedTexts
from .shelf import Shelf
from .sizing import FIXED_STEP, ConstantSize, TreeSizer, sizes_for
from .support import TreePlan
from .turns import turn_on
from .verification import TextsInStep, Walks


def decode_at_fixed_shapes(
    target: PreTrainedModel,
    draft,
    texts: RaggedTexts | TextsInStep,
    stats: SpeculationStats,
    plan: TreePlan,
    memory: DraftMemory,
    model_kwargs: dict,
) -> bool:
    """
    All rounds of a call, unless another thread is at them on this device: the log says so, once.

    Args:
        target, draft, texts, stats: As in `decoder.py`.
        plan ([`TreePlan`]): Size of the largest trees.
        memory ([`DraftMemory`]): The draft's, with the prompt's states.
        model_kwargs (`dict`): The target's generation state, with its cache, which has read the prompt.

    Returns:
        `bool`: Whether the text is finished. If not, the other loop can begin, or go on.

    **Effects**: fills `texts` and `stats`; the cache holds the whole text but its last token, `memory` all rows, and
    `model_kwargs` knows how long the text has become.
    """
    with turn_on(target.device) as is_free:
        if not is_free:
            give_reason(target, f"another call generates on {target.device} at this time")
            return False
        with stats.times.draft:
            memory.read_prompt(draft, target)
        prefill = Prefill.of_call(memory, model_kwargs)
        shelf = Shelf(target, draft, plan, texts.transcript, prefill, stats.times.capture)
        sizes = sizes_for(draft, target, plan, len(texts.ids), FIXED_STEP)
        num_read = prefill.cache.get_seq_length()
        if not shelf.make_room(num_read + 2 * tree_size(plan)) or shelf.rounds(sizes.choose()) is None:
            return False
        shelf.buffers.load(prefill, texts.transcript)
        go_on = follow_the_device if device_can_choose(texts) else choose_on_the_host
        try:
            is_finished = go_on(shelf, sizes, texts, stats)
            shelf.buffers.memory.give_back(memory)
        except BaseException as error:  # the cache may be the caller's
            if isinstance(error, torch.OutOfMemoryError):
                traceback.clear_frames(error.__traceback__)  # what they hold are the buffers
            give_back(shelf, prefill.cache, texts.transcript.num_kept_slots)
            raise
        if is_finished:
            give_back(shelf, prefill.cache, texts.transcript.num_kept_slots)
        else:
            give_back_unfinished(shelf, target, texts, num_read, model_kwargs)
        return is_finished


def give_back(shelf: Shelf, cache: Cache, num_tokens: int, num_least: int | None = None) -> None:
    """
    Fills the target's cache, see [`FixedCache.give_back`], the last thing for which the buffers are needed.

    Where the device has no room for the text beside them, it waits on the host until they are gone. Views would not
    do: the layers lie in one tensor, which the first to be copied, in the next forward, would find in memory, too.

    **Effects**: overwrites the layers of `cache`; `shelf` may have no buffers afterwards.
    """
    with suppress(torch.OutOfMemoryError):
        shelf.buffers.cache.give_back(cache, num_tokens, num_least)
        return
    shelf.buffers.cache.give_back(cache, num_tokens, num_least, torch.device("cpu"))
    shelf.let_go()
    for layer in cache.layers:
        layer.prefetch()  # to the device of before


def give_back_unfinished(
    shelf: Shelf, target: PreTrainedModel, texts: RaggedTexts | TextsInStep, num_before: int, model_kwargs: dict
) -> None:
    """
    Leaves a text, of which the target had read `num_before` slots, to the other loop, whose caches grow as needed.

    **Effects**: the target's cache and `model_kwargs` are those of the longest sequence.
    """
    cache, num_read = model_kwargs["past_key_values"], slots_of(texts) - 1
    give_back(shelf, cache, num_read, min(texts.lengths or [num_read]))
    outputs, num_new = CausalLMOutputWithPast(past_key_values=cache), num_read - num_before
    if num_new > 0:
        model_kwargs |= target._update_model_kwargs_for_generation(outputs, model_kwargs, num_new_tokens=num_new)


def device_can_choose(texts: RaggedTexts | TextsInStep) -> bool:
    """Whether a round needs nothing from the host."""
    if isinstance(texts, TextsInStep) or not texts.chooses_at_once or texts.scores.is_wanted or texts.logits.is_wanted:
        return False
    return not texts.stop_strings or len(texts.ids) == 1  # the host cuts texts where they end; one is then finished


def choose_on_the_host(
    shelf: Shelf, sizes: TreeSizer | ConstantSize, texts: RaggedTexts | TextsInStep, stats: SpeculationStats
) -> bool:
    """
    All rounds for which there is memory, in which processors see the text before the next token is chosen.

    Returns:
        `bool`: Whether the texts are finished.

    **Effects**: extends the texts and moves all buffers on.
    """
    transcript = texts.transcript
    while not transcript.is_finished and make_room_for_round(shelf, texts):
        size = sizes.choose()
        rounds, began = shelf.rounds_of_text(size), time.perf_counter()
        if rounds is None:
            break
        if transcript.do_sample:
            shelf.buffers.load_noise(texts.noise, size.depth)
        with stats.times.draft:
            rounds.draft_trees()
        tree = texts.fit(rounds.tree, size.depth)
        rounds.load_tree(tree)
        with stats.times.target:
            logits = rounds.verify().float()
        verdict = texts.accept(tree, logits)
        rounds.load_verdict(verdict)
        with stats.times.choice:
            rounds.keep()
        record_round(stats, shelf, rounds, verdict.walks, texts)
        sizes.record(size, verdict.walks.ranks, time.perf_counter() - began)
    return transcript.is_finished


def follow_the_device(
    shelf: Shelf, sizes: TreeSizer | ConstantSize, texts: RaggedTexts, stats: SpeculationStats
) -> bool:
    """
    All rounds for which there is memory, in which the device chooses and goes on by itself; the host reads what it has
    chosen.

    A greedy round begins before the host has taken over the one before, unless that one is seen to be the last.

    Returns:
        `bool`: Whether the texts are finished.

    **Effects**: extends the texts and moves all buffers on.
    """
    device, coming = texts.ids.device, None
    texts.move_to("cpu")
    while not texts.transcript.is_finished and (coming is not None or make_room_for_round(shelf, texts)):
        current = coming or begin_round(shelf, sizes, texts, stats)
        if current is None:
            break
        rows, seconds = current.wait()
        coming = begin_round(shelf, sizes, texts, stats) if may_begin_another(shelf, texts, rows) else None
        plan = current.rounds.plan
        walks, _, _ = texts.take(rows, torch.tensor([row[4 : 4 + plan.depth + 1] for row in rows]))
        record_round(stats, shelf, current.rounds, walks, texts)
        sizes.record(plan, walks.ranks, seconds)
    texts.move_to(device)
    return texts.transcript.is_finished


def make_room_for_round(shelf: Shelf, texts: RaggedTexts | TextsInStep) -> bool:
    """
    Changes to buffers for two more of the largest trees where those in use have no room for one.

    Returns:
        `bool`: Whether there is room. If not, the log says why.
    """
    num_nodes, num_slots = tree_size(shelf.largest), slots_of(texts)
    return num_slots + num_nodes <= shelf.buffers.capacity or shelf.grow(num_slots + 2 * num_nodes)


def may_begin_another(shelf: Shelf, texts: RaggedTexts, rows: list[list[int]]) -> bool:
    """
    Whether a round may begin before `texts` has taken what the one before has chosen, the `rows` of [`Report`].

    Not with noise, which goes on with the texts, and not where the buffers would have to grow first.
    """
    longest = max(count + row[0] for count, row in zip(texts.num_tokens, rows, strict=True))
    num_slots = texts.transcript.num_omitted + longest + tree_size(shelf.largest)
    return not texts.transcript.do_sample and num_slots <= shelf.buffers.capacity and texts.may_go_on(rows)


def slots_of(texts: RaggedTexts | TextsInStep) -> int:
    """Slots of the longest sequence in the target's cache, as soon as its newest token has been read."""
    return texts.transcript.num_omitted + texts.ids.shape[1]


def begin_round(
    shelf: Shelf, sizes: TreeSizer | ConstantSize, texts: RaggedTexts, stats: SpeculationStats
) -> "RoundUnderWay | None":
    """
    Begins a round of the size that pays; on CUDA it goes on while the host does something else.

    Returns:
        [`RoundUnderWay`], or `None` if there is no memory for it.

    **Effects**: moves all buffers on.
    """
    rounds, began = shelf.rounds_of_text(sizes.choose()), time.perf_counter()
    if rounds is None:
        return None
    if texts.transcript.do_sample:
        rounds.buffers.load_noise(texts.noise, rounds.plan.depth)
    with stats.times.draft:
        rounds.draft_trees()
    with stats.times.target:
        rounds.verify()
    with stats.times.choice:
        report = Report(rounds.choose())
        rounds.keep()
    return RoundUnderWay(rounds, report, began)


class Report:
    """
    What a round has chosen, on its way to the host.

    Args:
        rows (`torch.Tensor`): On the device.
    """

    def __init__(self, rows: Tensor):
        self.rows, self.has_arrived = rows, None
        if rows.is_cuda:
            self.rows = torch.empty_like(rows, device="cpu", pin_memory=True)
            self.rows.copy_(rows, non_blocking=True)
            self.has_arrived = torch.cuda.Event()
            self.has_arrived.record(torch.cuda.current_stream(rows.device))

    def wait(self) -> list[list[int]]:
        """The rows, as soon as they are there: the one place where a round waits for the device."""
        if self.has_arrived is not None:
            self.has_arrived.synchronize()
        return self.rows.tolist()


@dataclass(frozen=True)
class RoundUnderWay:
    """
    A round that has begun.

    Args:
        rounds ([`FixedRounds`]): Those of its size.
        report ([`Report`]): What it chooses.
        began (`float`): When, in seconds of a clock.
    """

    rounds: FixedRounds
    report: Report
    began: float

    def wait(self) -> tuple[list[list[int]], float]:
        """The rows of the report, and how many seconds the round has taken by then."""
        return self.report.wait(), time.perf_counter() - self.began


def record_round(
    stats: SpeculationStats, shelf: Shelf, rounds: FixedRounds, walks: Walks, texts: RaggedTexts | TextsInStep
) -> None:
    """
    Counts a round.

    **Effects**: the streamer gets its tokens; `shelf` knows what the draft will read.
    """
    stats.target_calls += 1
    stats.record(walks, tree_size(rounds.plan) - 1, rounds.plan.depth)
    stats.draft_cache_bytes, stats.draft_cache_tokens = shelf.buffers.memory.num_bytes, max(shelf.num_rows)
    num_read = texts.lengths or [texts.ids.shape[1] - 1] * len(texts.ids)
    num_omitted = texts.transcript.num_omitted
    shelf.num_rows = [num_omitted + count - pads for count, pads in zip(num_read, shelf.num_pads, strict=True)]
    texts.transcript.flush()
