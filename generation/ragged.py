"""Sequences of a batch that go on at their own pace: each keeps what it accepts, however much the others do.

The text that plain generation would have by now is that of the sequences that are furthest behind: the frontier. It is
committed to the transcript one token at a time, as in plain generation, so criteria, scores, noise and the random
generator follow the frontier; what sequences have beyond it waits. A sequence that finishes says so at once, and from
there on gets padding, so that it never runs on past its end.

Shapes: B batch, T tokens, N nodes, P nodes on the longest possible path, A waiting tokens, V the target's vocabulary.
"""

import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria

from .choice import Walk, limit_walk, report_walk, walk_at_once, walk_step_by_step
from .sampling import RowNoise, is_stateless, raise_no_distribution
from .transcript import Transcript
from .tree import DraftTree
from .verification import Verdict, Walks
from .waiting import Waiting, write_rows

# How far a sequence may be ahead when sampling: the noise of a token, (B, V), is kept until all have passed it.
MAX_LEAD = 128


class RaggedTexts:
    """
    The texts of a batch, each as far as it has come.

    Args:
        transcript ([`Transcript`]): With the first new token; its processors and criteria are stock ones.
    """

    def __init__(self, transcript: Transcript):
        self.transcript = transcript
        self.ids = transcript.input_ids
        self.num_tokens = [self.ids.shape[1]] * len(self.ids)
        self.ended_at: list[int | None] = [None] * len(self.ids)
        if transcript.freezes:
            self.ended_at = [self.ids.shape[1] if is_done else None for is_done in transcript.is_done.tolist()]
        self.eos_token_ids = transcript.eos_token_ids
        self.stop_strings = StoppingCriteriaList(
            each for each in transcript.stopping_criteria if type(each) is StopStringCriteria
        )
        foreseen = {MaxLengthCriteria, EosTokenCriteria, *([StopStringCriteria] if transcript.freezes else [])}
        self.knows_the_end = all(type(each) in foreseen for each in transcript.stopping_criteria)
        self.chooses_at_once = all(map(is_stateless, transcript.logits_processor))
        self.scores = Waiting(transcript.scores is not None)
        self.logits = Waiting(transcript.logits is not None)
        self.num_discarded = 0
        self._note_who_is_frozen()

    @property
    def lengths(self) -> list[int] | None:
        """Tokens of each sequence that the target has read; `None` for a single one."""
        num_unread = 1 - self.transcript.num_omitted
        return [count - num_unread for count in self.num_tokens] if len(self.ids) > 1 else None

    @property
    def noise(self) -> RowNoise | None:
        """Noise of each sequence's coming tokens."""
        return RowNoise(self.transcript.noise, self._leads()) if self.transcript.do_sample else None

    def fit(self, tree: DraftTree, depth: int) -> DraftTree:
        """`tree` after each sequence's newest token; a chain of padding, `depth` deep, where it is finished."""
        if len(self.ids) == 1:
            return tree
        newest = torch.tensor(self.num_tokens, device=self.ids.device)[:, None] - 1
        tree = tree.with_roots(self.ids.gather(1, newest))
        if any(self.ended_at):
            tree = tree.with_pads(self.is_frozen, self.transcript.pad_token_id, depth)
        return tree

    def accept(self, tree: DraftTree, logits: Tensor) -> Verdict:
        """
        Lets every sequence go as far as its own tree holds the target's choices.

        Args:
            tree ([`DraftTree`]): From `fit`.
            logits (`torch.Tensor` of shape `(B, N, V)`): The target's, after each node.

        Returns:
            [`Verdict`]

        Raises:
            RuntimeError: If scores are no distribution, as in plain sampling.

        **Effects**: appends to the texts, and to the transcript what all have passed.
        """
        raw_logits = logits.clone() if self.logits.is_wanted else None  # processors may write into theirs
        walk = self._walk(tree, logits)
        num_tokens, room = torch.tensor([self.num_tokens, self._room()], device=self.ids.device)
        is_sampled = self.transcript.do_sample
        num_new, has_ended = limit_walk(walk, num_tokens, room, self.eos_token_ids, self.is_frozen, is_sampled)
        leads = self._leads()
        self.scores.add(walk.scores, leads)
        if raw_logits is not None:
            self.logits.add(raw_logits.gather(1, walk.path[..., None].expand_as(walk.scores)), leads)
        # The one place where a round waits for the device.
        rows = report_walk(tree, walk, num_new, has_ended).tolist()
        walks, lengths, num_kept = self.take(rows, walk.tokens)
        return Verdict(walk.path, walk.tokens, walks, lengths, num_kept)

    def take(self, rows: list[list[int]], tokens: Tensor) -> tuple[Walks, list[int], list[int]]:
        """
        Appends what was chosen.

        Args:
            rows (`list[list[int]]`): What `report_walk` says of each sequence.
            tokens (`torch.LongTensor` of shape `(B, P)`): The tokens among it.

        Returns:
            [`Walks`], where in the cache each sequence goes on, and how much of its path it keeps.

        Raises:
            RuntimeError: If scores are no distribution, as in plain sampling.

        **Effects**: appends to the texts, and to the transcript what all have passed.
        """
        num_new, has_ended = [row[0] for row in rows], [row[1] for row in rows]
        before, had_ended, takes_part = self.num_tokens, self.ended_at, self._who_takes_part()
        self._append(tokens, num_new, has_ended)
        self._advance()
        num_chosen = tokens.shape[1]
        walks = self._count(before, takes_part, [row[2:4] + row[4 + num_chosen :] for row in rows])
        written = [old if ended is None else ended for old, ended in zip(before, had_ended, strict=True)]
        self.num_discarded = sum(max(count - self._end(), 0) for count in written)
        lengths = [min(old, self._end()) - 1 for old in before]
        num_kept = [min(new, self._end()) - 1 - old for new, old in zip(self.num_tokens, lengths, strict=True)]
        lengths = [length + self.transcript.num_omitted for length in lengths]
        return walks, lengths, num_kept

    def may_go_on(self, rows: list[list[int]]) -> bool:
        """Whether the text is not known to end with what `report_walk` says; see `take`."""
        counts = [count + row[0] for count, row in zip(self.num_tokens, rows, strict=True)]
        has_ended = [old is not None or row[1] for old, row in zip(self.ended_at, rows, strict=True)]
        is_last = all(has_ended) if self.transcript.freezes else any(has_ended)
        return self.knows_the_end and not is_last and min(counts) < self.transcript.max_length

    def move_to(self, device: torch.device | str) -> None:
        """
        Where the texts are kept; noise stays where it is drawn.

        **Effects**: moves the transcript, too.
        """
        self.ids, self.is_frozen = self.ids.to(device), self.is_frozen.to(device)
        self.transcript.move_to(device)

    def _walk(self, tree: DraftTree, logits: Tensor) -> Walk:
        pads = torch.full_like(self.ids[:, 0], -1)
        if any(self.ended_at):
            pads = torch.where(self.is_frozen, self.transcript.pad_token_id, pads)
        noise, processors = None, self.transcript.logits_processor
        if self.transcript.do_sample:
            ahead = self.noise
            noise = torch.stack([ahead.peek(depth) for depth in range(tree.deepest + 1)], dim=1)  # (B, P, V)
        if self.chooses_at_once:
            return walk_at_once(tree, logits, processors, noise, pads)
        return walk_step_by_step(tree, logits, processors, noise, pads, self.ids, self.num_tokens)

    def _room(self) -> list[int]:
        """How many tokens each sequence may still get."""
        limit = self.transcript.max_length
        if self.transcript.do_sample:
            limit = min(limit, min(self.num_tokens) + MAX_LEAD)
        return [limit - count for count in self.num_tokens]

    def _append(self, tokens: Tensor, num_new: list[int], has_ended: list[int]) -> None:
        self.ids = write_rows(self.ids, tokens, self.num_tokens)
        ended_at = list(self.ended_at)
        for row, (count, is_end) in enumerate(zip(num_new, has_ended, strict=True)):
            if self.stop_strings and self.transcript.freezes and ended_at[row] is None:
                count, is_end = self._cut_at_stop_string(row, count, is_end)
            num_new[row] = count
            if is_end:
                ended_at[row] = self.num_tokens[row] + count
        self.num_tokens = [old + new for old, new in zip(self.num_tokens, num_new, strict=True)]
        self.ended_at = ended_at
        self._note_who_is_frozen()
        self.ids = self.ids[:, : max(self.num_tokens)]

    def _cut_at_stop_string(self, row: int, num_new: int, has_ended: int) -> tuple[int, int]:
        for count in range(1, num_new + 1):
            if self.stop_strings(self.ids[row : row + 1, : self.num_tokens[row] + count], None).any():
                return count, 1
        return num_new, has_ended

    def _advance(self) -> None:
        """Commits what all sequences have, up to the token that ends the last of them."""
        transcript, start = self.transcript, self.transcript.input_ids.shape[1]
        for length in range(start + 1, min(self.num_tokens) + 1):
            if transcript.do_sample:
                transcript.noise.spend()
            place = length - start - 1
            transcript.commit(self.ids[:, :length], self.scores.at(place), self.logits.at(place))
            if self.knows_the_end:
                is_last = all(end is not None and end <= length for end in self.ended_at)
                transcript.is_finished = is_last or length >= transcript.max_length
            else:
                transcript.is_finished = bool(transcript.is_done.all())
            if transcript.is_finished:
                return
        if transcript.input_ids.shape[1] == start:
            raise_no_distribution()
        for waiting in self.scores, self.logits:
            waiting.forget(transcript.input_ids.shape[1] - start, max(self._leads()))

    def _count(self, before: list[int], takes_part: list[int], drafted: list[list[int]]) -> Walks:
        """
        How far each sequence came; what goes beyond the end of the text does not count.

        Args:
            before (`list[int]`): Tokens of each sequence before the round.
            takes_part (`list[int]`): The sequences that count.
            drafted (`list[list[int]]`): For each sequence drafted tokens among the new ones, after how many of them
                something had been drafted, and the ranks of its path, root first.
        """
        num_emitted = {row: max(min(self.num_tokens[row], self._end()) - before[row], 0) for row in takes_part}
        return Walks(
            num_emitted=list(num_emitted.values()),
            num_accepted=[min(drafted[row][0], num) for row, num in num_emitted.items()],
            num_tried=[min(drafted[row][1], num) for row, num in num_emitted.items()],
            ranks=[drafted[row][3 : 3 + min(drafted[row][0], num)] for row, num in num_emitted.items()],
        )

    def _end(self) -> int:
        """Where the text ends, or for now the longest sequence."""
        return self.transcript.input_ids.shape[1] if self.transcript.is_finished else max(self.num_tokens)

    def _who_takes_part(self) -> list[int]:
        """The sequences that get tokens of their own in this round."""
        return [row for row, room in enumerate(self._room()) if room > 0 and self.ended_at[row] is None]

    def _leads(self) -> list[int]:
        """How many tokens each sequence is ahead of the frontier."""
        return [count - self.transcript.input_ids.shape[1] for count in self.num_tokens]

    def _note_who_is_frozen(self) -> None:
        """Sets `is_frozen (B,)`: the sequences that get nothing but padding from now on."""
        self.is_frozen = torch.tensor([end is not None for end in self.ended_at], device=self.ids.device)
