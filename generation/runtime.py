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

from torch import Tensor, nn
from transformers import Cache, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .branching import can_branch
from .fixed_rounds import FixedRounds, tree_size
from .memory import DraftMemory
from .metrics import SpeculationStats
from .ragged import RaggedTexts
from .sampling import stateless_warpers
from .support import TreePlan, draft_window, fixed_shapes, schedule
from .traces import Traces
from .transcript import Transcript
from .verification import TextsInStep

logger = logging.getLogger(__name__)

# Capacities are powers of two and the middles between them: a third of the slots is never used, at most.
LEAST_CAPACITY = 256
# Sets of buffers and graphs that are kept of a pair: texts of a few lengths come again and again.
MOST_KEPT = 4
# Inputs of a target that rounds at fixed shapes give it, or that say nothing about single tokens.
KNOWN_INPUTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}

KNOWN_LAYERS = {DynamicLayer, DynamicSlidingWindowLayer}

_kept: WeakKeyDictionary[nn.Module, OrderedDict] = WeakKeyDictionary()
_in_use = threading.Lock()
_reasons_given: set[str] = set()


def takes_fixed_shapes(
    target: PreTrainedModel,
    draft,
    plan: TreePlan,
    transcript: Transcript,
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
    reason = why_shapes_vary(target, draft, plan, transcript, traces, cache, model_kwargs)
    if reason is not None:
        give_reason(target, reason)
    return reason is None


def why_shapes_vary(
    target: PreTrainedModel,
    draft,
    plan: TreePlan,
    transcript: Transcript,
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
        "positions have several axes": positions is not None and positions.dim() != 2,
        "the target's cache is of a kind of its own": not {type(layer) for layer in cache.layers} <= KNOWN_LAYERS,
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

    **Effects**: fills `transcript` and `stats`; `cache` holds the whole text but its last token.
    """
    if not _in_use.acquire(blocking=False):
        return False  # the buffers are another thread's for now
    try:
        with stats.times.draft:
            memory.read_prompt(draft, target)
        draw = texts.noise.peek(0) if transcript.do_sample else None
        shelf = Shelf(target, draft, plan, stateless_warpers(transcript.logits_processor), cache, memory, draw)
        num_read, num_nodes = cache.get_seq_length(), tree_size(plan)
        rounds = shelf.rounds_for(num_read + num_nodes)
        if rounds is None:
            return False
        positions = root_positions(model_kwargs, num_read)
        is_token, limit = model_kwargs.get("attention_mask"), transcript.stopping_criteria.max_length
        rounds.load(cache, memory, is_token, positions, limit)
        while not transcript.is_finished:
            if texts.ids.shape[1] + num_nodes > rounds.capacity:
                rounds = shelf.larger(rounds, texts.ids.shape[1] + num_nodes)
            run_round(rounds, transcript, texts, stats)
        rounds.cache.give_back(cache, transcript.input_ids.shape[1] - 1)
        return True
    finally:
        _in_use.release()


def run_round(
    rounds: FixedRounds, transcript: Transcript, texts: RaggedTexts | TextsInStep, stats: SpeculationStats
) -> None:
    """
    One round.

    **Effects**: extends the texts, and moves all buffers on.
    """
    if transcript.do_sample:
        rounds.load_noise(texts.noise)
    with stats.times.draft:
        rounds.draft_trees()
    drafted = rounds.tree
    tree = texts.fit(drafted, rounds.plan.depth)
    if tree is not drafted:
        rounds.load_tree(tree)
    with stats.times.target:
        logits = rounds.verify()
    verdict = texts.accept(tree, logits)
    rounds.load_verdict(verdict)
    with stats.times.draft:
        rounds.keep()

    stats.target_calls += 1
    stats.record(verdict.walks, len(tree) - 1, tree.deepest)
    stats.draft_cache_bytes, stats.draft_cache_tokens = rounds.memory.num_bytes, texts.ids.shape[1] - 2
    transcript.flush()


class Shelf:
    """
    The rounds of a call by their capacity, and those of earlier calls with the same settings.

    Args:
        target, draft, plan, warpers, cache, memory, draw: As for [`FixedRounds`].
    """

    def __init__(
        self,
        target: PreTrainedModel,
        draft,
        plan: TreePlan,
        warpers: LogitsProcessorList,
        cache: Cache,
        memory: DraftMemory,
        draw: Tensor | None,
    ):
        self.target, self.draft = target, draft
        self.settings = plan, warpers, cache, memory
        self.draw = draw
        self.kept = _kept.setdefault(draft, OrderedDict())
        key = plan, len(memory.num_rows), draw is None, tuple(map(repr_of, warpers)), target.dtype
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
            try:
                rounds.capture()
            except Exception as error:  # whatever a model raises that asks something of the device
                give_reason(self.target, f"{type(error).__name__}: {error}")
                return None
            self.kept[key] = rounds
            while len(self.kept) > MOST_KEPT:
                self.kept.popitem(last=False)
        return rounds

    def larger(self, rounds: FixedRounds, num_slots: int) -> FixedRounds:
        """Rounds for texts of so many slots, which go on where `rounds` have come to."""
        larger = self.rounds_for(num_slots) or self._new(next(size for size in capacities() if size >= num_slots))
        larger.take_over(rounds)
        return larger

    def _new(self, capacity: int) -> FixedRounds:
        plan, warpers, cache, memory = self.settings
        return FixedRounds(self.target, self.draft, plan, warpers, cache, memory, capacity, self.draw)


def capacities() -> Iterator[int]:
    """The sizes of buffers, in rising order."""
    capacity = LEAST_CAPACITY
    while True:
        yield capacity
        yield capacity * 3 // 2
        capacity *= 2


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
    adapters = [
        (module.disable_adapters, tuple(module.active_adapters), module.merged)
        for module in model.modules()
        if {"disable_adapters", "active_adapters", "merged"} <= set(dir(type(module)))
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
