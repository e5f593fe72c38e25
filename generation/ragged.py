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

from .choice import Walk, walk_at_once, walk_step_by_step
from .sampling import RowNoise, is_stateless, raise_no_distribution
from .transcript import Transcript
from .tree import DraftTree
from .verification import Verdict, Walks

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
        eos = [each.eos_token_id for each in transcript.stopping_criteria if type(each) is EosTokenCriteria]
        self.eos_token_ids = torch.cat(eos).to(self.ids.device) if eos else None
        self.stop_strings = StoppingCriteriaList(
            each for each in transcript.stopping_criteria if type(each) is StopStringCriteria
        )
        foreseen = {MaxLengthCriteria, EosTokenCriteria, *([StopStringCriteria] if transcript.freezes else [])}
        self.knows_the_end = all(type(each) in foreseen for each in transcript.stopping_criteria)
        self.chooses_at_once = all(map(is_stateless, transcript.logits_processor))
        # Per sequence, what waits for the frontier, or `None` where nobody wants it.
        self.waiting_scores = self.waiting_logits = None
        self.num_discarded = 0
        self._note_who_is_frozen()

    @property
    def lengths(self) -> list[int] | None:
        """Tokens of each sequence that the target has read; `None` for a single one."""
        return [count - 1 for count in self.num_tokens] if len(self.ids) > 1 else None

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
        raw_logits = logits.clone() if self.transcript.logits is not None else None
        walk = self._walk(tree, logits)
        num_new, is_tried = self._limit(walk), tree.has_children.gather(1, walk.path)
        has_ended = self._ends(walk.tokens).gather(1, (num_new - 1).clamp(min=0)[:, None])[:, 0] & (num_new > 0)
        steps = torch.arange(walk.path.shape[1], device=num_new.device)
        num_tried = (is_tried & (steps < num_new[:, None])).sum(dim=1)
        num_drafted = torch.minimum(num_new, walk.num_steps - 1)
        # The one place where a round waits for the device.
        num_new, has_ended, num_drafted, num_tried = torch.stack(
            [num_new, has_ended.long(), num_drafted, num_tried]
        ).tolist()

        before, had_ended = self.num_tokens, self.ended_at
        self._keep_waiting(walk, raw_logits)
        self._append(walk.tokens, num_new, has_ended)
        self._advance()
        return self._verdict(walk, before, had_ended, num_drafted, num_tried)

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

    def _limit(self, walk: Walk) -> Tensor:
        """How many of its chosen tokens each sequence gets, `(B,)`: none after the one that ends it."""
        device, longest = self.ids.device, walk.path.shape[1]
        num_tokens, room = torch.tensor([self.num_tokens, self._room()], device=device)
        num_new = torch.minimum(walk.num_steps, room)
        num_new = torch.minimum(num_new, first_true(self._ends(walk.tokens), longest - 1) + 1)
        if self.transcript.do_sample:
            num_new = torch.minimum(num_new, first_true(~walk.is_valid, longest))
        if not any(self.ended_at):
            return num_new
        furthest = (num_tokens + num_new.masked_fill(self.is_frozen, 0)).max()
        return torch.where(self.is_frozen, torch.minimum(num_new, furthest - num_tokens), num_new)

    def _ends(self, tokens: Tensor) -> Tensor:
        """Which of the chosen tokens `(B, P)` end a sequence that has not ended yet."""
        if self.eos_token_ids is None:
            return torch.zeros_like(tokens, dtype=torch.bool)
        return torch.isin(tokens, self.eos_token_ids) & ~self.is_frozen[:, None]

    def _room(self) -> list[int]:
        """How many tokens each sequence may still get."""
        limit = self.transcript.stopping_criteria.max_length
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
            scores = self.waiting_scores[:, length - start - 1] if transcript.scores is not None else None
            logits = self.waiting_logits[:, length - start - 1] if transcript.logits is not None else None
            transcript.commit(self.ids[:, :length], scores, logits)
            if self.knows_the_end:
                is_last = all(end is not None and end <= length for end in self.ended_at)
                transcript.is_finished = is_last or length >= transcript.stopping_criteria.max_length
            else:
                transcript.is_finished = bool(transcript.is_done.all())
            if transcript.is_finished:
                return
        if transcript.input_ids.shape[1] == start:
            raise_no_distribution()
        self._forget_committed(transcript.input_ids.shape[1] - start)

    def _keep_waiting(self, walk: Walk, raw_logits: Tensor | None) -> None:
        """Scores and logits of the chosen tokens `(B, A, V)`, where they are wanted."""
        if self.transcript.scores is not None:
            self.waiting_scores = write_rows(self.waiting_scores, walk.scores, self._leads())
        if raw_logits is not None:
            rows = walk.path[..., None].expand(-1, -1, raw_logits.shape[-1])
            self.waiting_logits = write_rows(self.waiting_logits, raw_logits.gather(1, rows), self._leads())

    def _forget_committed(self, num_committed: int) -> None:
        waiting = slice(num_committed, num_committed + max(self._leads()))
        if self.waiting_scores is not None:
            self.waiting_scores = self.waiting_scores[:, waiting]
        if self.waiting_logits is not None:
            self.waiting_logits = self.waiting_logits[:, waiting]

    def _verdict(
        self, walk: Walk, before: list[int], had_ended: list, num_drafted: list[int], num_tried: list[int]
    ) -> Verdict:
        """What caches keep and statistics count; after the last round, what went beyond the end counts no more."""
        end = self.transcript.input_ids.shape[1] if self.transcript.is_finished else max(self.num_tokens)
        lengths = [min(old, end) - 1 for old in before]
        num_kept = [min(new, end) - 1 - length for new, length in zip(self.num_tokens, lengths, strict=True)]
        limit = self.transcript.stopping_criteria.max_length
        counted = [row for row, old in enumerate(before) if had_ended[row] is None and old < limit]
        walks = Walks(
            num_emitted=[num_kept[row] for row in counted],
            num_accepted=[min(num_drafted[row], num_kept[row]) for row in counted],
            num_tried=[min(num_tried[row], num_kept[row]) for row in counted],
        )
        written = [old if ended is None else ended for old, ended in zip(before, had_ended, strict=True)]
        self.num_discarded = sum(max(count - end, 0) for count in written)
        return Verdict(walk.path, walk.tokens, walks, lengths, num_kept)

    def _leads(self) -> list[int]:
        """How many tokens each sequence is ahead of the frontier."""
        return [count - self.transcript.input_ids.shape[1] for count in self.num_tokens]

    def _note_who_is_frozen(self) -> None:
        """The sequences that get nothing but padding from now on, bool `(B,)`."""
        self.is_frozen = torch.tensor([end is not None for end in self.ended_at], device=self.ids.device)


def first_true(is_true: Tensor, otherwise: int) -> Tensor:
    """Index of the first true entry of each row of `(B, P)`."""
    return torch.where(is_true.any(dim=1), is_true.int().argmax(dim=1), otherwise)


def write_rows(written: Tensor | None, new: Tensor, starts: list[int]) -> Tensor:
    """
    Writes `new (B, P, ...)` into each row from its own place on.

    Args:
        written (`torch.Tensor` of shape `(B, A, ...)`, *optional*): What is there so far; `None` is nothing.
    """
    if written is None:
        written = new[:, :0]
    if len(set(starts)) == 1:
        return torch.cat([written[:, : starts[0]], new], dim=1)
    written = torch.cat([written, torch.zeros_like(new)], dim=1)
    places = torch.tensor(starts, device=new.device)[:, None] + torch.arange(new.shape[1], device=new.device)
    places = places.view(*places.shape, *[1] * (new.dim() - 2)).expand_as(new)
    return written.scatter(1, places, new)
