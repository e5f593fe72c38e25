"""How large the next tree should be: as large as it pays, by measured acceptance and measured time.

A round with a tree of n nodes takes seconds(n) and emits tokens(n); the size is chosen that makes most tokens per
second, plain decoding (no nodes) included. Seconds are measured for every size. Tokens need not be: the best n nodes
of a tree are the tree of n nodes, so a round tells what every smaller tree would have emitted. What a larger one would
emit it does not tell, so that the full size is tried again from time to time, ever more rarely while that changes
nothing.

The text does not depend on any of this: every token is the target's own choice.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from .support import TreePlan, schedule

# Rounds of each size before sizes are compared: the first of a new shape may be slow.
FIRST_ROUNDS = 2
# Weight of a round among those before it: the mean is over about the last 50.
DECAY = 0.98
# Rounds after which the full size is tried again: at first, and at most.
FIRST_PATIENCE, LONGEST_PATIENCE = 32, 1024
# Each size has how many times the nodes of the next smaller one. At fixed shapes every size has graphs of its own, and
# a few nodes more cost next to nothing there.
STEP, FIXED_STEP = 2, 4


def ladder(full: TreePlan, step: int = STEP) -> list[TreePlan]:
    """
    The sizes that are compared, from `full` down to no drafting at all, each with a `step`th of the nodes.

    A tree of few nodes is not deep: with the best continuation of every node alone, n nodes reach depth n, and where
    there are several, their logarithm.
    """
    sizes, num_nodes = [full], full.num_nodes // step
    while num_nodes > 0:
        deepest = num_nodes if full.top_k == 1 else num_nodes.bit_length() + 1
        sizes.append(replace(full, num_nodes=num_nodes, depth=min(full.depth, deepest, num_nodes)))
        num_nodes //= step
    return [*sizes, replace(full, num_nodes=0, depth=0)]


@dataclass
class Experience:
    """
    What is known of one size.

    Args:
        seconds (`deque[float]`): Durations of its latest rounds.
        tokens (`float`), weight (`float`): Sum of the tokens that a sequence emitted in a round, or would have, later
            rounds counting more, and of the weights.
    """

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=5))
    tokens: float = 0.0
    weight: float = 0.0

    def tokens_per_second(self) -> float:
        return self.tokens / self.weight / median(self.seconds)


class TreeSizer:
    """
    Chooses a size for every round, and learns from what the round took and gave.

    Args:
        full ([`TreePlan`]): The largest size.
        step (`int`): See [`ladder`].
    """

    def __init__(self, full: TreePlan, step: int = STEP):
        self.full = full
        self.sizes = {size: Experience() for size in ladder(full, step)}
        self.last: TreePlan | None = None
        self.patience = FIRST_PATIENCE
        self.num_rounds_since_full = 0

    def choose(self) -> TreePlan:
        """The size for which most tokens per second are expected, or one of which too little is known."""
        for size, known in self.sizes.items():
            if len(known.seconds) < FIRST_ROUNDS:
                return size
        return self.full if self.num_rounds_since_full >= self.patience else self._best()

    def record(self, size: TreePlan, accepted_ranks: Sequence[Sequence[int]], seconds: float) -> None:
        """
        Adds one round, unless the end of the text made it smaller than any of the sizes.

        Args:
            size ([`TreePlan`]): What `choose` gave, or less.
            accepted_ranks (`list[list[int]]`): For each sequence the accepted nodes from the root on, without it; each
                as the number of nodes in its tree that were preferred to it.
            seconds (`float`): Duration of the round.
        """
        if size not in self.sizes or not accepted_ranks:
            return
        for smaller, known in self.sizes.items():
            if smaller.num_nodes <= size.num_nodes:
                tokens = [num_within(ranks, smaller) + 1 for ranks in accepted_ranks]
                known.tokens = DECAY * known.tokens + sum(tokens) / len(tokens)
                known.weight = DECAY * known.weight + 1
        # After plain rounds the draft first reads what it has missed, which is not the price of a round.
        is_usual = size.num_nodes == 0 or self.last is None or self.last.num_nodes > 0
        self.last = size
        if is_usual:
            self._record_time(size, seconds)

    def _record_time(self, size: TreePlan, seconds: float) -> None:
        self.num_rounds_since_full += 1
        is_trial = size == self.full and self.num_rounds_since_full > self.patience
        before = self._best() if is_trial else None
        self.sizes[size].seconds.append(seconds)
        if is_trial:
            changed = self._best() != before
            self.patience = FIRST_PATIENCE if changed else min(2 * self.patience, LONGEST_PATIENCE)
        if size == self.full:
            self.num_rounds_since_full = 0

    def _best(self) -> TreePlan:
        return max(self.sizes, key=lambda size: self.sizes[size].tokens_per_second())


def num_within(accepted_ranks: Sequence[int], size: TreePlan) -> int:
    """How many of the accepted nodes a tree of this size would have held, up to the first that it would not."""
    num_held = 0
    for rank in accepted_ranks[: size.depth]:
        if rank >= size.num_nodes:
            break
        num_held += 1
    return num_held


class ConstantSize:
    """
    The same size for every round.

    Args:
        size ([`TreePlan`]): This one.
    """

    def __init__(self, size: TreePlan):
        self.size = size

    def choose(self) -> TreePlan:
        """The size of the next round."""
        return self.size

    def record(self, size: TreePlan, accepted_ranks: Sequence[Sequence[int]], seconds: float) -> None:
        """Nothing is to be learned."""


_sizers: WeakKeyDictionary[PreTrainedModel, WeakKeyDictionary] = WeakKeyDictionary()


def sizes_for(
    draft, target: PreTrainedModel, full: TreePlan, batch_size: int, step: int = STEP
) -> TreeSizer | ConstantSize:
    """
    Who chooses the sizes of a call, by `draft.generation_config.num_assistant_tokens_schedule`.

    Args:
        draft ([`Eagle3MLADraftModel`]), target (`PreTrainedModel`): The pair about which something is learned.
        full ([`TreePlan`]): The largest size.
        batch_size (`int`), step (`int`): Learned for each, too; for the latter see [`ladder`].

    Returns:
        With `"heuristic"` the [`TreeSizer`] of earlier such calls, with `"heuristic_transient"` a new one.
    """
    kind = schedule(draft)
    if kind == "constant" or full.num_nodes == 0:
        return ConstantSize(full)
    if kind == "heuristic_transient":
        return TreeSizer(full, step)
    known = _sizers.setdefault(draft, WeakKeyDictionary()).setdefault(target, {})
    return known.setdefault((full, batch_size, step), TreeSizer(full, step))
