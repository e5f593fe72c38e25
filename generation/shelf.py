"""Buffers and graphs of rounds at fixed shapes: made for a call, kept for the next one that is like it.

What a graph has recorded reads and writes at fixed addresses and looks at no Python attribute again, so it lasts as
long as the models' weights stay where they are and both compute as they did (`fingerprint.py`). Of a pair the sets of
the latest calls are kept, as many as a part of the device's memory holds.
"""

import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from .fingerprint import Fingerprint
from .fixed_buffers import TextBuffers
from .fixed_rounds import Ends, FixedRounds
from .fused_target import can_fuse
from .obstacles import give_loss, give_reason
from .prefill import Prefill
from .sampling import stateless_warpers
from .support import TreePlan, compile_config
from .timing import Stopwatch
from .transcript import Transcript
from .turns import capturing

# Capacities are powers of two and the middles between them: a third of the slots is never used, at most.
LEAST_CAPACITY = 256
# Sets of buffers and graphs that are kept of a pair: texts of a few lengths come again and again.
MOST_KEPT = 4
# Share of the device's memory that their caches may take.
KEPT_SHARE = 0.25
# How often the forwards of one capture may change what a model holds in Python, and calls after one another in which
# they did so more often.
MOST_CHANGES, MOST_RESTLESS_CALLS = 1, 3
# Of a pair, ways to capture a size that are remembered as failed.
MOST_FAILED = 256

# Of each device, which threads use by turns.
_kept: dict[torch.device, WeakKeyDictionary[nn.Module, OrderedDict]] = {}
# What could not be captured, and would not be another time.
_failed: WeakKeyDictionary[nn.Module, set] = WeakKeyDictionary()
# Of each draft, in how many calls after one another the models went on changing while they were captured, by target.
_restless_calls: WeakKeyDictionary[nn.Module, Counter] = WeakKeyDictionary()


@dataclass(frozen=True)
class KeptSet:
    """
    Buffers, and the rounds that work on them.

    Args:
        buffers ([`TextBuffers`]): The buffers.
        target_ref (`Callable`): Gives the target that the rounds are of, as long as it is there.
        rounds (`dict[TreePlan, FixedRounds]`): By size.
    """

    buffers: TextBuffers
    target_ref: Callable[[], PreTrainedModel | None]
    rounds: dict[TreePlan, FixedRounds] = field(default_factory=dict)

    def belongs_to(self, target: PreTrainedModel) -> bool:
        """Whether these are rounds of `target` itself, not of one that had its weights in the same place."""
        return self.target_ref() is target


class Way(NamedTuple):
    """
    How rounds are captured.

    Args:
        compiles (`bool`): Whether `compile_config` is obeyed.
        fuses (`bool`): Whether the models may run what `fused_target.py` has for them.
    """

    compiles: bool
    fuses: bool


@dataclass(frozen=True)
class Failure:
    """
    Why a way does not work.

    Args:
        reason (`str`): For the log.
        is_known (`bool`): Whether the target is one that asks for more than the attention to trees has.
        is_of_memory (`bool`): Whether the device had no room.
    """

    reason: str
    is_known: bool
    is_of_memory: bool

    @classmethod
    def of(cls, error: Exception, target: PreTrainedModel) -> "Failure":
        first_line = next(iter(str(error).strip().splitlines()), "")  # compilers write pages
        is_known = type(error) is NotImplementedError or not target._supports_attention_backend
        is_of_memory = isinstance(error, torch.OutOfMemoryError)
        return cls(f"{type(error).__name__}: {first_line}".rstrip(": ."), is_known, is_of_memory)


class Shelf:
    """
    The buffers of a call, and the rounds of every size on them.

    Args:
        target (`PreTrainedModel`), draft ([`Eagle3MLADraftModel`]): The pair.
        largest ([`TreePlan`]): Size of the largest trees.
        transcript ([`Transcript`]): The texts.
        prefill ([`Prefill`]): What the pair knows of them.
        stopwatch ([`Stopwatch`]): Of captures.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        draft,
        largest: TreePlan,
        transcript: Transcript,
        prefill: Prefill,
        stopwatch: Stopwatch,
    ):
        self.target, self.draft, self.largest, self.prefill = target, draft, largest, prefill
        self.warpers, self.ends = stateless_warpers(transcript.logits_processor), ends_of(transcript)
        self.draw = transcript.noise.peek(0) if transcript.do_sample else None
        self.num_rows = [count + 1 for count in prefill.memory.num_rows]  # of the draft, after the coming round
        self.num_pads = [prefill.cache.get_seq_length() - count for count in self.num_rows]
        self.compile_config, self.stopwatch = compile_config(draft), stopwatch
        self.kept = _kept.setdefault(target.device, WeakKeyDictionary()).setdefault(draft, OrderedDict())
        self.current_key, self.current = None, None
        self.uncaptured: dict[TreePlan, FixedRounds] = {}
        self.is_full = False  # whether a capture has found no memory
        self.fingerprints = self._fingerprints()
        self.call_key = (
            largest,
            len(self.num_rows),
            transcript.do_sample,
            tuple(map(repr_of, self.warpers)),
            self.ends,
            (target.dtype, draft.dtype),
            prefill.is_padded_left,
            repr(self.compile_config),
            torch.is_inference_mode_enabled(),  # elsewhere, its buffers could not be written
        )

    @property
    def key(self) -> tuple:
        """What two calls have in common that can share graphs, the length of their buffers aside."""
        return *self.call_key, *self.fingerprints

    @property
    def buffers(self) -> TextBuffers:
        """Those in use."""
        return self.current.buffers

    def make_room(self, num_slots: int) -> bool:
        """
        Puts buffers for texts of so many slots in the place of those in use.

        Returns:
            `bool`: Whether the device has the memory. If not, the log says so.
        """
        capacity = next(size for size in capacities() if size >= num_slots)
        key = *self.key, capacity
        known = self.kept.get(key)
        if known is None or not known.belongs_to(self.target):
            self.kept.pop(key, None)
            buffers = self._new_within_memory(capacity)
            if buffers is None:
                return False
            known = KeptSet(buffers, weakref.ref(self.target))
        else:
            self.kept.move_to_end(key)
        known.buffers.lengths.zero_()  # behind the end of an earlier text there need not be slots to capture a round
        self.current_key, self.current, self.uncaptured = key, known, {}
        return True

    def grow(self, num_slots: int) -> bool:
        """
        Makes room in the middle of a text.

        Returns:
            `bool`: Whether the device has the memory, for these buffers beside those in use. If not, these stay in
            use, and the log says so.
        """
        before = self.buffers
        if not self.make_room(num_slots):
            return False
        self.buffers.take_over(before)
        return True

    def let_go(self) -> None:
        """Gives back the memory of the buffers in use, and of all that are kept on the device; there are none then."""
        self.current, self.uncaptured = None, {}
        self._empty_device()

    def rounds(self, size: TreePlan) -> FixedRounds | None:
        """Rounds of this size on the buffers; `None`, and a line in the log, if they cannot be captured."""
        if size in self.current.rounds:
            return self.current.rounds[size]
        is_captured = can_capture(self.target.device)
        rounds = self._captured_as_it_is(size) if is_captured else self._new_rounds(size)
        if rounds is None:
            return None
        self.current.rounds[size] = rounds
        if is_captured:
            self._keep()
        return rounds

    def rounds_of_text(self, size: TreePlan) -> FixedRounds | None:
        """
        For a text that has begun: rounds of this size, captured or not; `None` if the device has no memory for graphs.

        Those that are not hold the models, so that they are not kept for another text.
        """
        rounds = self.uncaptured.get(size) or self.rounds(size)
        if rounds is None and self.is_full:  # uncaptured ones take more memory than the other loop
            return None
        return rounds or self.uncaptured.setdefault(size, self._new_rounds(size))

    def _keep(self) -> None:
        """Makes the set in use the newest; the oldest go where there are too many, or too large ones."""
        self.kept[self.current_key] = self.current
        self.kept.move_to_end(self.current_key)
        most_bytes = KEPT_SHARE * memory_of(self.target.device)
        while len(self.kept) > 1 and (
            len(self.kept) > MOST_KEPT or sum(each.buffers.num_bytes for each in self.kept.values()) > most_bytes
        ):
            self.kept.popitem(last=False)

    def _new_within_memory(self, capacity: int) -> TextBuffers | None:
        """New buffers; where the device has no room for them, nothing else is kept on it any more."""
        for _ in range(2):
            with suppress(torch.OutOfMemoryError):
                return self._new(capacity)
            self._empty_device()  # only now: the error held what had been made
        give_reason(self.target, f"the device has no memory for {capacity} slots a sequence")
        return None

    def _empty_device(self) -> None:
        """Keeps nothing on the target's device any more."""
        for kept in _kept[self.target.device].values():
            kept.clear()
        with capturing:
            torch.cuda.empty_cache()

    def _captured_as_it_is(self, size: TreePlan) -> FixedRounds | None:
        """
        Rounds of models that compute as they did before these were captured.

        What a model makes once, in its first forward over a tree, changes it once. One that goes on changing is left
        to its own code: its graphs would hold what it was when they were recorded. That may be another thread's doing;
        after a few such calls it is taken for the model's.
        """
        restless, target_ref = _restless_calls.setdefault(self.draft, Counter()), weakref.ref(self.target)
        if restless[target_ref] >= MOST_RESTLESS_CALLS:
            return None
        for _ in range(MOST_CHANGES + 1):
            rounds = self._captured(size)
            if rounds is None:
                return None
            if (found := self._fingerprints()) == self.fingerprints:
                del restless[target_ref]
                return rounds
            self._change_to(found)
        give_reason(self.target, "what its modules, or the draft's, hold in Python changes while it generates")
        restless[target_ref] += 1
        return None

    def _fingerprints(self) -> tuple[Fingerprint, Fingerprint]:
        return Fingerprint(self.target), Fingerprint(self.draft)

    def _change_to(self, fingerprints: tuple[Fingerprint, Fingerprint]) -> None:
        """Takes other models for those of the call; what was captured of them as they were is forgotten."""
        self.kept.pop(self.current_key, None)
        self.fingerprints, capacity = fingerprints, self.buffers.capacity
        self.current_key = *self.key, capacity
        self.current = KeptSet(self.buffers, weakref.ref(self.target))

    def _captured(self, size: TreePlan) -> FixedRounds | None:
        """
        The rounds as graphs, in the best of the ways that work.

        **Effects**: the log says once what is lost, and why.
        """
        failed, failures = _failed.setdefault(self.draft, set()), {}
        for way in self._ways():
            if (self.key, size, way) in failed:
                continue
            found = self._captured_in(way, size)
            if isinstance(found, Failure) and found.is_of_memory:
                self._empty_device()
                found = self._captured_in(way, size)
            if isinstance(found, FixedRounds):
                self._tell_losses(way, failures)
                return found
            failures[way] = found
            if len(failed) >= MOST_FAILED:
                failed.clear()
            if not found.is_of_memory:
                failed.add((self.key, size, way))
        if failures:
            self.is_full = any(failure.is_of_memory for failure in failures.values())
            give_reason(self.target, list(failures.values())[-1].reason)
        return None

    def _captured_in(self, way: Way, size: TreePlan) -> FixedRounds | Failure:
        """The rounds as graphs, in one way."""
        rounds = self._new_rounds(size)
        try:
            with capturing, self.stopwatch, self.buffers.unmoved():
                rounds.capture(way.fuses, self.compile_config if way.compiles else None)
        except Exception as error:  # whatever a model or a compiler raises
            return Failure.of(error, self.target)
        return rounds

    def _ways(self) -> list[Way]:
        """The best first; a target that takes no attention but its own is captured with that."""
        fusing = [True, False] if self.prefill.is_padded_left and can_fuse(self.target) else [False]
        compiling = [False] if self.compile_config is None else [True, False]
        return [Way(compiles, fuses) for compiles in compiling for fuses in fusing]

    def _tell_losses(self, way: Way, failures: dict[Way, Failure]) -> None:
        compiling = [failure for other, failure in failures.items() if other.compiles > way.compiles]
        fusing = [failures[other] for other in failures if other == Way(way.compiles, True)]
        for failure in compiling[:1]:
            give_loss(self.target, "`compile_config`", failure.reason)
        for failure in fusing:
            give_loss(self.target, "fused operations", failure.reason, failure.is_known)

    def _new(self, capacity: int) -> TextBuffers:
        return TextBuffers(self.draft, self.largest, self.prefill, capacity, self.draw)

    def _new_rounds(self, size: TreePlan) -> FixedRounds:
        return FixedRounds(self.buffers, self.target, self.draft, size, self.warpers, self.prefill.cache, self.ends)


def forget_elsewhere(draft) -> None:
    """
    Lets go what is kept of a draft on devices that it has left.

    A turn there may be at it, or at all that is kept there: so nothing is emptied, and no entry goes.
    """
    for device, sets in list(_kept.items()):
        if device != draft.device and draft in sets:
            sets[draft] = OrderedDict()


def can_capture(device: torch.device) -> bool:
    """Whether rounds on a device become graphs."""
    return device.type == "cuda"


def memory_of(device: torch.device) -> int:
    """Bytes of a device."""
    return torch.cuda.get_device_properties(device).total_memory


def capacities() -> Iterator[int]:
    """The sizes of buffers, in rising order."""
    capacity = LEAST_CAPACITY
    while True:
        yield capacity
        yield capacity * 3 // 2
        capacity *= 2


def ends_of(transcript: Transcript) -> Ends:
    """How the sequences of a text end."""
    eos, pad = transcript.eos_token_ids, transcript.pad_token_id if transcript.freezes else None
    return Ends(None if eos is None else tuple(eos.tolist()), None if pad is None else int(pad))


def repr_of(processor) -> str:
    """What a stateless processor is and does."""
    fields = vars(processor).items()
    # A tensor's own representation has four digits.
    numbers = {name: value.tolist() if torch.is_tensor(value) else value for name, value in fields}
    return f"{type(processor).__name__} {sorted(numbers.items())}"
