"""The loop at fixed shapes: where it can be taken, and the buffers and graphs that calls share.

On CUDA this is what makes a round cost little more than reading the weights: each stage of `fixed_rounds.py` is one
launch of a captured graph. Where shapes cannot be fixed, or a model cannot be captured, the loop of `decoder.py` runs,
and the log says once why.

Buffers and graphs stay for the next call with the same pair, batch size and settings, as long as the models' weights
stay where they are.

Shapes: B batch, T tokens.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import EosTokenCriteria

from .chunks import ChunkLimit
from .fixed_rounds import Ends, FixedRounds, tree_size
from .memory import DraftMemory
from .metrics import SpeculationStats
from .probing import can_branch
from .ragged import RaggedTexts
from .rope import ReadingLimits, rope_lengths
from .sampling import stateless_warpers
from .support import TreePlan, compile_config, draft_window, fixed_shapes, schedule
from .timing import Stopwatch
from .traces import Traces
from .transcript import Transcript
from .verification import TextsInStep, Walks

logger = logging.getLogger(__name__)

# Capacities are powers of two and the middles between them: a third of the slots is never used, at most.
LEAST_CAPACITY = 256
# Sets of buffers and graphs that are kept of a pair: texts of a few lengths come again and again.
MOST_KEPT = 4
# Inputs of a target that rounds at fixed shapes give it, or that say nothing about single tokens.
KNOWN_INPUTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}

# What layers of adapters say about themselves.
ADAPTER_FIELDS = {"disable_adapters", "active_adapters", "merged"}

KNOWN_LAYERS = {DynamicLayer, DynamicSlidingWindowLayer}

_kept: WeakKeyDictionary[nn.Module, OrderedDict] = WeakKeyDictionary()
_in_use = threading.Lock()
_reasons_given: set[str] = set()


def takes_fixed_shapes(
    target: PreTrainedModel,
    draft,
    plan: TreePlan,
    transcript: Transcript,
    limits: ReadingLimits,
    traces: Traces,
    cache: Cache,
    model_kwargs: dict,
) -> bool:
    """
    Whether the rounds of a call have fixed shapes: on CUDA where possible, or as `fixed_shapes` says.

    **Effects**: where they are wanted but not possible, the log says why, once.
    """
    wanted = fixed_shapes(draft)
    if not (target.device.type == "cuda" if wanted is None else wanted):
        return False
    reason = why_shapes_vary(target, draft, plan, transcript, limits, traces, cache, model_kwargs)
    if reason is not None:
        give_reason(target, reason)
    return reason is None


def why_shapes_vary(
    target: PreTrainedModel,
    draft,
    plan: TreePlan,
    transcript: Transcript,
    limits: ReadingLimits,
    traces: Traces,
    cache: Cache,
    model_kwargs: dict,
) -> str | None:
    """Why the rounds of a call cannot have fixed shapes; `None` if they can."""
    devices = {parameter.device for parameter in target.parameters()} | {draft.device, transcript.input_ids.device}
    unknown = {name for name, value in model_kwargs.items() if value is not None} - KNOWN_INPUTS
    positions = model_kwargs.get("position_ids")
    reasons = {
        "nothing is drafted": plan.depth == 0,
        "`assistant_confidence_threshold` is set": plan.confidence_threshold is not None,
        "`num_assistant_tokens_schedule` is not constant": schedule(draft) != "constant",
        "`draft_window` is set": draft_window(draft) is not None,
        "hidden states or attentions are wanted": traces.are_wanted,
        f"models and text are on several devices: {', '.join(sorted(map(str, devices)))}": len(devices) > 1,
        f"the target has inputs besides the usual ones: {', '.join(sorted(unknown))}": bool(unknown),
        f"beyond some length {ChunkLimit.of(target).reason}": ChunkLimit.of(target).num_tokens is not None,
        "the target's RoPE factors may change with the length of the text": limits.are_reached(transcript)
        or any(rope_lengths(target.config.get_text_config(decoder=True))),
        "positions have several axes": positions is not None and positions.dim() != 2,
        "the target's windows are to record their past": any(
            getattr(each, "record_past", False) for each in cache.layers
        ),
        "the target's cache is of a kind of its own": type(cache) is not DynamicCache
        or not {type(layer) for layer in cache.layers} <= KNOWN_LAYERS,
        "autocast is on, whose copies of weights end with it": torch.is_autocast_enabled(target.device.type),
        "the target or the draft has hooks, which a graph would not call": has_hooks(target) or has_hooks(draft),
    }
    applying = [reason for reason, applies in reasons.items() if applies]
    if not applying and not can_branch(target):
        return "the target takes no masks of its own"
    return applying[0] if applying else None


def decode_at_fixed_shapes(
    target: PreTrainedModel,
    draft,
    transcript: Transcript,
    texts: RaggedTexts | TextsInStep,
    stats: SpeculationStats,
    plan: TreePlan,
    cache: Cache,
    memory: DraftMemory,
    model_kwargs: dict,
) -> bool:
    """
    All rounds of a call.

    Args:
        target, draft, transcript, texts, stats: As in `decoder.py`.
        plan ([`TreePlan`]): Size of every tree.
        cache (`Cache`): The target's, which has read the prompt.
        memory ([`DraftMemory`]): The draft's, with the prompt's states.
        model_kwargs (`dict`): The target's generation state.

    Returns:
        `bool`: Whether the text is finished. If not, the other loop can begin.

    **Effects**: fills `transcript` and `stats`; `cache` holds the whole text but its last token, `memory` all rows.
    """
    if not _in_use.acquire(blocking=False):
        return False  # the buffers are another thread's for now
    try:
        with stats.times.draft:
            memory.read_prompt(draft, target)
        draw = texts.noise.peek(0) if transcript.do_sample else None
        is_token = model_kwargs.get("attention_mask")
        is_padded_left = is_token is None or bool((is_token.diff(dim=1) >= 0).all() and is_token[:, -2:].all())
        shelf = Shelf(target, draft, plan, transcript, cache, memory, draw, is_padded_left, stats.times.capture)
        num_read, num_nodes = cache.get_seq_length(), tree_size(plan)
        rounds = shelf.newest = shelf.rounds_for(num_read + 2 * num_nodes)
        if rounds is None:
            return False
        positions = root_positions(model_kwargs, num_read)
        limit = transcript.max_slots
        rounds.load(cache, memory, is_token, positions, limit, transcript.is_frozen)
        try:
            go_on = follow_the_device if device_can_choose(texts) else choose_on_the_host
            rounds = go_on(shelf, rounds, texts, stats)
        finally:  # also after an error: the cache may be the caller's
            shelf.newest.cache.give_back(cache, transcript.num_kept_slots)
        rounds.memory.give_back(memory)
        return True
    finally:
        _in_use.release()


def device_can_choose(texts: RaggedTexts | TextsInStep) -> bool:
    """Whether a round needs nothing from the host."""
    if isinstance(texts, TextsInStep) or not texts.chooses_at_once or texts.scores.is_wanted or texts.logits.is_wanted:
        return False
    return not texts.stop_strings or len(texts.ids) == 1  # the host cuts texts where they end; one is then finished


def choose_on_the_host(
    shelf: "Shelf", rounds: FixedRounds, texts: RaggedTexts | TextsInStep, stats: SpeculationStats
) -> FixedRounds:
    """
    All rounds, in which processors see the text before the next token is chosen; returns those with the last buffers.

    **Effects**: extends the texts and moves all buffers on.
    """
    transcript, num_nodes = texts.transcript, tree_size(rounds.plan)
    while not transcript.is_finished:
        if (num_slots := slots_of(texts)) + num_nodes > rounds.capacity:
            rounds = shelf.larger(rounds, num_slots + 2 * num_nodes)
        if transcript.do_sample:
            rounds.load_noise(texts.noise)
        with stats.times.draft:
            rounds.draft_trees()
        tree = texts.fit(rounds.tree, rounds.plan.depth)
        rounds.load_tree(tree)
        with stats.times.target:
            logits = rounds.verify()
        verdict = texts.accept(tree, logits)
        rounds.load_verdict(verdict)
        with stats.times.choice:
            rounds.keep()
        record_round(stats, shelf, rounds, verdict.walks, texts)
    return rounds


def follow_the_device(shelf: "Shelf", rounds: FixedRounds, texts: RaggedTexts, stats: SpeculationStats) -> FixedRounds:
    """
    All rounds, in which the device chooses and goes on by itself; the host reads what it has chosen. Returns those
    with the last buffers.

    A greedy round begins before the host has taken over the one before, unless that one is seen to be the last.

    **Effects**: extends the texts and moves all buffers on.
    """
    transcript, num_nodes, device = texts.transcript, tree_size(rounds.plan), texts.ids.device
    texts.move_to("cpu")
    report = launch_round(rounds, texts, stats)
    while True:
        rows = report.wait()
        longest = max(count + row[0] for count, row in zip(texts.num_tokens, rows, strict=True))
        num_slots = transcript.num_omitted + longest + num_nodes
        is_ahead = not transcript.do_sample and num_slots <= rounds.capacity and texts.may_go_on(rows)
        if is_ahead:
            report = launch_round(rounds, texts, stats)
        walks, _, _ = texts.take(rows, torch.tensor([row[4 : 4 + rounds.plan.depth + 1] for row in rows]))
        record_round(stats, shelf, rounds, walks, texts)
        if transcript.is_finished:
            break
        if not is_ahead:
            if num_slots > rounds.capacity:
                rounds = shelf.larger(rounds, num_slots + num_nodes)
            report = launch_round(rounds, texts, stats)
    texts.move_to(device)
    return rounds


def slots_of(texts: RaggedTexts | TextsInStep) -> int:
    """Slots of the longest sequence in the target's cache, as soon as its newest token has been read."""
    return texts.transcript.num_omitted + texts.ids.shape[1]


def launch_round(rounds: FixedRounds, texts: RaggedTexts, stats: SpeculationStats) -> "Report":
    """
    Begins a round; on CUDA it goes on while the host does something else.

    **Effects**: moves all buffers on.
    """
    if texts.transcript.do_sample:
        rounds.load_noise(texts.noise)
    with stats.times.draft:
        rounds.draft_trees()
    with stats.times.target:
        rounds.verify()
    with stats.times.choice:
        report = Report(rounds.choose())
        rounds.keep()
    return report


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


def record_round(
    stats: SpeculationStats, shelf: "Shelf", rounds: FixedRounds, walks: Walks, texts: RaggedTexts | TextsInStep
) -> None:
    """
    Counts a round.

    **Effects**: the streamer gets its tokens; `shelf` knows what the draft will read.
    """
    stats.target_calls += 1
    stats.record(walks, tree_size(rounds.plan) - 1, rounds.plan.depth)
    stats.draft_cache_bytes, stats.draft_cache_tokens = rounds.memory.num_bytes, max(shelf.num_rows)
    num_read = texts.lengths or [texts.ids.shape[1] - 1] * len(texts.ids)
    num_omitted = texts.transcript.num_omitted
    shelf.num_rows = [num_omitted + count - pads for count, pads in zip(num_read, shelf.num_pads, strict=True)]
    texts.transcript.flush()


class Shelf:
    """
    The rounds of a call by their capacity, and those of earlier calls with the same settings.

    Args:
        target, draft, plan, cache, memory, draw: As for [`FixedRounds`].
        transcript ([`Transcript`]): The text.
        is_padded_left (`bool`): Whether padding, if there is any, stands before the texts and nowhere else.
        stopwatch ([`Stopwatch`]): Of captures.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        draft,
        plan: TreePlan,
        transcript: Transcript,
        cache: Cache,
        memory: DraftMemory,
        draw: Tensor | None,
        is_padded_left: bool,
        stopwatch: Stopwatch,
    ):
        self.target, self.draft, self.cache = target, draft, cache
        warpers, ends = stateless_warpers(transcript.logits_processor), ends_of(transcript)
        self.settings = plan, warpers, cache, memory
        self.draw, self.ends, self.is_padded_left = draw, ends, is_padded_left
        self.num_rows = [count + 1 for count in memory.num_rows]  # of the draft's cache, after the coming round
        self.num_pads = [cache.get_seq_length() - count for count in self.num_rows]
        self.compile_config, self.stopwatch = compile_config(draft), stopwatch
        self.newest: FixedRounds | None = None  # where the text has come to
        self.kept = _kept.setdefault(draft, OrderedDict())
        key = (
            plan,
            len(memory.num_rows),
            draw is None,
            tuple(map(repr_of, warpers)),
            ends,
            target.dtype,
            is_padded_left,
            repr(self.compile_config),
            torch.is_inference_mode_enabled(),  # elsewhere, its buffers could not be written
        )
        self.key = *key, fingerprint(target), fingerprint(draft)

    def rounds_for(self, num_slots: int) -> FixedRounds | None:
        """Rounds for texts of so many slots; `None`, and a line in the log, if they cannot be captured."""
        capacity = next(size for size in capacities() if size >= num_slots)
        key = *self.key, capacity
        if key in self.kept and self.kept[key].belong_to(self.target):
            self.kept.move_to_end(key)
            return self.kept[key]
        rounds = self._new(capacity)
        if self.target.device.type == "cuda":
            rounds = self._captured(rounds)
            if rounds is None:
                return None
            self.kept[key] = rounds
            while len(self.kept) > MOST_KEPT:
                self.kept.popitem(last=False)
        return rounds

    def larger(self, rounds: FixedRounds, num_slots: int) -> FixedRounds:
        """Rounds for texts of so many slots, which go on where `rounds` have come to."""
        larger = self.rounds_for(num_slots) or self._new(next(size for size in capacities() if size >= num_slots))
        larger.take_over(rounds)
        self.newest = larger
        return larger

    def _captured(self, rounds: FixedRounds) -> FixedRounds | None:
        """The rounds as graphs; where the target takes no attention but its own, with that."""
        errors = []
        for fuses in [True, False] if self.is_padded_left and rounds.can_fuse() else [False]:
            try:
                with self.stopwatch:
                    rounds.capture(fuses, self.compile_config)
                return rounds
            except Exception as error:  # whatever a model raises that asks something of the device
                errors.append(f"{type(error).__name__}: {error}")
                rounds = self._new(rounds.capacity)
        give_reason(self.target, errors[-1])
        return None

    def _new(self, capacity: int) -> FixedRounds:
        plan, warpers, cache, memory = self.settings
        return FixedRounds(self.target, self.draft, plan, warpers, cache, memory, capacity, self.draw, self.ends)


def capacities() -> Iterator[int]:
    """The sizes of buffers, in rising order."""
    capacity = LEAST_CAPACITY
    while True:
        yield capacity
        yield capacity * 3 // 2
        capacity *= 2


def ends_of(transcript: Transcript) -> Ends:
    """How the sequences of a text end."""
    eos = [each.eos_token_id for each in transcript.stopping_criteria if type(each) is EosTokenCriteria]
    pad = transcript.pad_token_id if transcript.freezes else None
    return Ends(tuple(torch.cat(eos).tolist()) if eos else None, None if pad is None else int(pad))


def root_positions(model_kwargs: dict, num_read: int) -> Tensor | int:
    """RoPE positions of the tokens that come next, `(B,)`."""
    if (positions := model_kwargs.get("position_ids")) is not None:
        return positions[:, -1]
    mask = model_kwargs.get("attention_mask")
    return num_read if mask is None else mask.sum(dim=1) - 1


def has_hooks(model: nn.Module) -> bool:
    """Whether somebody listens to a model's modules; transformers' own hooks do nothing unless asked."""
    for module in model.modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if "_hf_hook" in vars(module) or any(not str(hook.__module__).startswith("transformers.") for hook in hooks):
            return True
    return False


def fingerprint(model: PreTrainedModel) -> int:
    """Differs if a model's weights have moved, or it computes in another way."""
    tensors = [*model.parameters(), *model.buffers()]
    kinds = {kind for kind in set(map(type, model.modules())) if set(dir(kind)) >= ADAPTER_FIELDS}
    adapters = [
        (module.disable_adapters, tuple(module.active_adapters), module.merged)
        for module in model.modules()
        if type(module) in kinds
    ]
    return hash((tuple(tensor.data_ptr() for tensor in tensors), tuple(adapters), model.config._attn_implementation))


def repr_of(processor) -> str:
    """What a stateless processor is and does."""
    return f"{type(processor).__name__} {sorted(vars(processor).items())}"


def give_reason(target: PreTrainedModel, reason: str) -> None:
    """Says once in the log why a target's rounds have no fixed shapes."""
    if reason not in _reasons_given:
        _reasons_given.add(reason)
        logger.warning("Rounds of %s are not captured as CUDA graphs: %s.", type(target).__name__, reason)
