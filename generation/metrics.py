"""What happened in one call: rounds, accepted tokens by depth, memory, time.

Counted are tokens that were emitted, never tokens that were only drafted; a round that end-of-sequence or the length
limit cuts short counts what it emitted. The prefill, which emits the first token without any draft, is not a round.

In a batch each sequence counts its own rounds until it is finished; padding counts nowhere. A sequence that is ahead
when a time limit or a criterion ends the text for all has counted rounds whose tokens were thrown away: they are in
`acceptance_lengths`, not in `new_tokens`.
"""

from dataclasses import dataclass, field

from .timing import CallTimes
from .verification import Walks


@dataclass
class SpeculationStats:
    """
    Statistics of one call of `generate(assistant_model=draft)`, in `draft.speculation_stats`.

    It is new for every call and up to date whenever a streamer gets a token: all tokens of a round but the last are
    accepted draft tokens.

    Args:
        acceptance_lengths (`list[int]`): Tokens that each round emitted, bonus token included.
        drafted_by_depth (`list[int]`): Rounds in which a token of that depth was drafted and its parent emitted.
        accepted_by_depth (`list[int]`): Rounds in which it was emitted.
        target_calls (`int`): Forwards of the target, prefill included; one forward reads the whole batch.
        new_tokens (`int`): Emitted tokens, those of the prefill included.
        drafted_nodes (`int`): Draft tokens that the target has read, accepted or not.
        draft_cache_bytes (`int`): Bytes allocated for the draft's cache after the last round.
        draft_cache_tokens (`int`): Positions in use there, by the longest sequence.
        times ([`CallTimes`]): Behind the properties that end in `_seconds`.
    """

    acceptance_lengths: list[int] = field(default_factory=list)
    drafted_by_depth: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)
    target_calls: int = 0
    new_tokens: int = 0
    drafted_nodes: int = 0
    draft_cache_bytes: int = 0
    draft_cache_tokens: int = 0
    times: CallTimes = field(default_factory=CallTimes, compare=False)

    @property
    def rounds(self) -> int:
        return len(self.acceptance_lengths)

    @property
    def acceptance_length(self) -> float:
        """Mean tokens per round, bonus token included (the serving engines' convention); 0 without any round."""
        return sum(self.acceptance_lengths) / self.rounds if self.rounds else 0.0

    @property
    def acceptance_by_depth(self) -> list[float]:
        """Share of the reached draft tokens that were accepted; index 0 is the first token after the root."""
        return [hit / tried for hit, tried in zip(self.accepted_by_depth, self.drafted_by_depth, strict=True) if tried]

    @property
    def prefill_seconds(self) -> float:
        """Seconds in which the target read the prompt."""
        return self.times.prefill.seconds

    @property
    def draft_seconds(self) -> float:
        """Seconds of the draft's forwards; those over the prompt, which the first round begins with, included."""
        return self.times.draft.seconds

    @property
    def target_seconds(self) -> float:
        """Seconds of the target's forwards in the rounds."""
        return self.times.target.seconds

    @property
    def choice_seconds(self) -> float:
        """Seconds in which the device chose tokens and moved what was accepted; 0 where the host lets it do so."""
        return self.times.choice.seconds

    @property
    def capture_seconds(self) -> float:
        """Seconds in which graphs were captured, compilation included; 0 where those of an earlier call serve."""
        return self.times.capture.seconds

    @property
    def round_seconds(self) -> float:
        """Seconds of all rounds."""
        return self.times.round_seconds

    @property
    def host_seconds(self) -> float:
        """Seconds of the rounds in which nothing of this was done."""
        named = self.draft_seconds, self.target_seconds, self.choice_seconds, self.capture_seconds
        return self.round_seconds - sum(named)

    def __str__(self) -> str:
        """What a reader asks first, in three lines; the kinds of work that took no time are left out."""
        shares = " ".join(f"{share:.2f}" for share in self.acceptance_by_depth) or "none"
        kinds = ("prefill", "draft", "target", "choice", "capture", "host")
        seconds = {kind: getattr(self, f"{kind}_seconds") for kind in kinds}
        return "\n".join(
            [
                f"{self.rounds} rounds, acceptance length {self.acceptance_length:.2f}, by depth: {shares}",
                f"{self.new_tokens} new tokens in {self.target_calls} calls of the target; "
                f"draft cache: {self.draft_cache_bytes:,} bytes, {self.draft_cache_tokens} positions in use",
                "seconds: " + ", ".join(f"{kind} {value:.3f}" for kind, value in seconds.items() if value),
            ]
        )

    def record(self, walks: Walks, num_nodes: int, deepest: int) -> None:
        """
        Adds one round of each sequence that was not finished before it.

        Args:
            walks ([`Walks`]): How far each came.
            num_nodes (`int`): Draft tokens that the target has read for each.
            deepest (`int`): Depth of the deepest draft token that the round could have.
        """
        self.acceptance_lengths += walks.num_emitted
        self.new_tokens += sum(walks.num_emitted)
        self.drafted_nodes += num_nodes * len(walks.num_emitted)
        missing = deepest - len(self.drafted_by_depth)
        self.drafted_by_depth += [0] * missing
        self.accepted_by_depth += [0] * missing
        for num_accepted, num_tried in zip(walks.num_accepted, walks.num_tried, strict=True):
            for depth in range(num_tried):
                self.drafted_by_depth[depth] += 1
                self.accepted_by_depth[depth] += depth < num_accepted
