"""What the draft knows of the text: the latents of past rows, and the rows that it has still to read.

The EAGLE shift, stated here once: the draft's row i pairs the target's states at token i with the embedding of token
i + 1, sits at RoPE position i, and predicts token i + 2. So after a round the rows of all committed tokens are known
except the newest token's own, which the target has not read.

The sequences of a batch need not have equally many rows: padding has none. A sequence's rows fill its slots in the
cache from the first one on, so slot and RoPE position are the same number; slots beyond hold what nobody sees. Pending
rows end together instead, with the root, so that the last one is the one whose scores are wanted.

A long prompt is read in chunks, so that what attention and MLP need at once does not grow with it. With a window, rows
that nobody will see any more leave the cache now and then. The rows behind the sink then move up, each sequence's by
its own number, so that their positions are their slots plus the number of rows that left.

Shapes: B batch, T tokens, M pending rows, P nodes of a path, W nodes of one depth, L slots of the cache, Q queries, K
keys, D hidden.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from .caches import cache_bytes, drop_positions, forget_last, keep_path, new_draft_cache
from .draft_window import DraftWindow

# Pending rows of a sequence that the draft reads at once.
CHUNK_ROWS = 2048
# With a window also the rows that are in the cache unseen before they leave it.
WINDOW_CHUNK_ROWS = 256


@dataclass
class DraftMemory:
    """
    The draft's rows of a batch.

    Args:
        pending_states (`torch.Tensor` of shape `(B, M, D)`): The target's states, fused, not yet read by the draft.
        pending_tokens (`torch.LongTensor` of shape `(B, M)`): For each of them the token that follows.
        num_pending (`list[int]`): How many of a sequence's pending rows are its own; they are the last ones.
        num_rows (`list[int]`): Rows of each sequence that the draft has read.
        cache (`Cache`): Latents of rows from true states of the target.
        window ([`DraftWindow`], *optional*): What a row sees of its past; `None`: all.
        first_slot (`int`, *optional*, defaults to 0): The slot of the target's cache of the first token with a row.
    """

    pending_states: Tensor
    pending_tokens: Tensor
    num_pending: list[int]
    num_rows: list[int]
    cache: Cache = field(default_factory=new_draft_cache)
    window: DraftWindow | None = None
    first_slot: int = 0

    def __post_init__(self):
        self.num_dropped = [0] * len(self.num_rows)

    @classmethod
    def of_prompt(
        cls, states: Tensor, input_ids: Tensor, mask: Tensor | None, window: DraftWindow | None = None
    ) -> "DraftMemory":
        """
        The prompt's rows, all pending, without those of its padding.

        Args:
            states (`torch.Tensor` of shape `(B, T, D)`): The target's, of what it read of the prompt, fused.
            input_ids (`torch.LongTensor` of shape `(B, T + 1 or more)`): The prompt and the first new token.
            mask (`torch.Tensor` of shape `(B, T + 1 or more)`, *optional*): 0 where a position is padding.
            window ([`DraftWindow`], *optional*): What a row sees of its past; `None`: all.
        """
        batch_size, num_states = states.shape[:2]
        input_ids = input_ids[:, -num_states - 1 :]
        is_token = torch.ones_like(input_ids, dtype=torch.bool)
        if mask is not None:
            is_token = mask[:, -num_states - 1 :].to(input_ids.device).bool()
            is_token = is_token | ~is_token[:, :-1].any(dim=1, keepdim=True)  # a prompt of nothing else is read
        num_tokens = is_token.sum(dim=1).tolist()
        if min(num_tokens) <= num_states:
            order = is_token.int().sort(dim=1, stable=True).indices  # padding first
            input_ids = input_ids.gather(1, order)
            order = is_token[:, :-1].int().sort(dim=1, stable=True).indices.to(states.device)
            states = states.gather(1, order[..., None].expand_as(states))
        longest = max(num_tokens) - 1
        num_pending = [count - 1 for count in num_tokens]
        return cls(states[:, -longest:], input_ids[:, -longest:], num_pending, [0] * batch_size, window=window)

    @property
    def roots(self) -> Tensor:
        """The newest token of each sequence, `(B, 1)`."""
        return self.pending_tokens[:, -1:]

    @property
    def num_held(self) -> list[int]:
        """Rows of each sequence in the cache."""
        return [count - dropped for count, dropped in zip(self.num_rows, self.num_dropped, strict=True)]

    @property
    def has_even_rows(self) -> bool:
        """Whether all sequences have equally many rows, and equally many of them in the cache."""
        return len(set(self.num_rows)) == len(set(self.num_dropped)) == 1

    @property
    def is_even(self) -> bool:
        """Whether they also have equally many pending: then these see each other by causal attention."""
        return self.has_even_rows and len(set(self.num_pending)) == 1

    @property
    def num_bytes(self) -> int:
        """Bytes that the cache has allocated."""
        return cache_bytes(self.cache)

    def await_rows(self, states: Tensor, tokens: Tensor, num_new: list[int]) -> None:
        """
        Adds accepted rows to the pending ones.

        Args:
            states (`torch.Tensor` of shape `(B, P, D)`): The target's, fused.
            tokens (`torch.LongTensor` of shape `(B, P)`): For each of them the token that follows.
            num_new (`list[int]`): How many of a sequence's rows are meant; they are the first ones.
        """
        states, tokens = states[:, : max(num_new)], tokens[:, : max(num_new)]
        num_before = self.pending_tokens.shape[1]
        self.pending_states = torch.cat([self.pending_states, states], dim=1)
        self.pending_tokens = torch.cat([self.pending_tokens, tokens], dim=1)
        self.num_pending = [count + new for count, new in zip(self.num_pending, num_new, strict=True)]
        if len(set(num_new)) > 1:
            longest, device = max(self.num_pending), self.pending_tokens.device
            ends = num_before + torch.tensor(num_new, device=device)[:, None]
            rows = (ends - longest + torch.arange(longest, device=device)).clamp(min=0)  # (B, M)
            self.pending_tokens = self.pending_tokens.gather(1, rows)
            rows = rows.to(self.pending_states.device)[..., None]
            self.pending_states = self.pending_states.gather(1, rows.expand(-1, -1, self.pending_states.shape[-1]))

    def can_go_on(self, num_rows: list[int], prompt: "DraftMemory") -> bool:
        """Whether the first `num_rows` of each sequence are there, and rows of `prompt` can follow."""
        if self.window != prompt.window or self.pending_states.device != prompt.pending_states.device:
            return False
        if self.pending_states.dtype != prompt.pending_states.dtype:
            return False
        sink = self.window.sink if self.window else 0
        num_known = [read + pending for read, pending in zip(self.num_rows, self.num_pending, strict=True)]
        num_least = [dropped + sink if dropped else 0 for dropped in self.num_dropped]
        return all(least <= count <= known for least, count, known in zip(num_least, num_rows, num_known, strict=True))

    def go_on(self, draft, target: PreTrainedModel, num_rows: list[int], prompt: "DraftMemory") -> None:
        """
        Keeps the first `num_rows` of each sequence; the pending rows of `prompt` follow.

        **Effects**: the rows that were pending are read first.
        """
        if self.pending_tokens.shape[1] > 0:
            self.read(draft, target)
        self.num_rows = list(num_rows)
        forget_last(self.cache, self.cache.get_seq_length() - max(self.num_held))
        self.pending_states, self.pending_tokens = prompt.pending_states, prompt.pending_tokens
        self.num_pending = list(prompt.num_pending)

    def read(self, draft, target: PreTrainedModel):
        """
        Lets the draft read the pending rows.

        Returns:
            `Eagle3MLAOutput` of the roots, one row for each sequence.

        **Effects**: the rows move to the cache.
        """
        return self._read_all_but(0, draft, target, logits_to_keep=1)

    def read_prompt(self, draft, target: PreTrainedModel) -> None:
        """
        Lets the draft read what is pending, the roots aside; of these rows is wanted what later ones see, and no more.

        **Effects**: the rows move to the cache, whose layers exist from now on, with or without any.
        """
        self._read_all_but(1, draft, target, logits_to_keep=None)
        if not self.cache.layers:  # nothing but roots
            self._read(draft, target, self.pending_states, self.pending_tokens, logits_to_keep=None)
            self.forget_guesses()

    def num_columns(self, num_drafted: int) -> int:
        """How many rows [`Frontier.sees`] tells of, where so many are drafted."""
        return num_drafted

    def frontier_inputs(self, sees: Tensor, num_drafted: int) -> dict[str, Tensor]:
        """
        The draft's mask and positions for the nodes of one depth, which are appended to those of the depths before.

        Chains after equally many rows need neither, as long as they see all of these.

        Args:
            sees (`torch.BoolTensor` of shape `(B, W, rows)`): Which of the rows drafted in this round each attends to.
            num_drafted (`int`): These rows.
        """
        width = sees.shape[1]
        if width == 1 and self.has_even_rows and self.shows_all(num_drafted):
            return {}
        device, num_slots = sees.device, self.cache.get_seq_length() - (num_drafted - width)
        depths = torch.arange(num_drafted // width, device=device).repeat_interleave(width)
        drafted = torch.tensor(self.num_rows, device=device)[:, None] + depths  # (B, rows)
        positions = drafted[:, -width:]
        sees = torch.cat([self.sees(positions, num_slots), sees], dim=2)
        return {
            "attention_mask": additive_mask(sees, self.pending_states.dtype),
            "key_position_ids": torch.cat([self.slot_positions(num_slots, device), drafted], dim=1),
            "position_ids": positions,
        }

    def forget_guesses(self) -> None:
        """Drops the rows of the nodes, which were made from the draft's own states."""
        forget_last(self.cache, self.cache.get_seq_length() - max(self.num_held))

    def shows_all(self, num_new: int) -> bool:
        """Whether the row that is so many rows ahead of the cache sees its whole past."""
        return self.window is None or not self.window.hides(max(self.num_rows) + num_new - 1)

    def sees(self, positions: Tensor, num_slots: int) -> Tensor:
        """Which of the first slots hold rows that new rows at `positions (B, Q)` see, bool `(B, Q, num_slots)`."""
        device = positions.device
        is_held = torch.arange(num_slots, device=device) < torch.tensor(self.num_held, device=device)[:, None]
        is_seen = is_held[:, None].expand(-1, positions.shape[1], -1)
        if self.window is None:
            return is_seen
        return is_seen & self.window.shows(positions, self.slot_positions(num_slots, device))

    def slot_positions(self, num_slots: int, device: torch.device) -> Tensor:
        """RoPE positions of what the first slots hold, `(B, num_slots)`."""
        slots = torch.arange(num_slots, device=device)
        num_dropped = torch.tensor(self.num_dropped, device=device)[:, None]
        return slots + num_dropped * (slots >= (self.window.sink if self.window else 0))

    def _read_all_but(self, num_left: int, draft, target: PreTrainedModel, logits_to_keep: int | None):
        """Reads the pending rows, chunk by chunk, until so many columns are left; the output of the last chunk."""
        if not self.is_even and max(self.num_rows) == 0 and self.window is None:
            self._read_all_but_roots(draft, target, logits_to_keep)
        most, outputs = CHUNK_ROWS if self.window is None else WINDOW_CHUNK_ROWS, None
        while (num_waiting := self.pending_tokens.shape[1] - num_left) > 0:
            outputs = self._read_next(draft, target, min(num_waiting, most), logits_to_keep)
        return outputs

    def _read_all_but_roots(self, draft, target: PreTrainedModel, logits_to_keep: int | None) -> None:
        """
        Reads sequences of different lengths from their first slot on, with causal attention.

        Right-aligned rows would need a mask of a prompt's length squared, left-aligned ones need none.
        """
        longest, device = self.pending_tokens.shape[1], self.pending_tokens.device
        num_missing = longest - torch.tensor(self.num_pending, device=device)
        rows = (torch.arange(longest - 1, device=device) + num_missing[:, None]).clamp(max=longest - 1)  # (B, M - 1)
        for chunk in rows.split(CHUNK_ROWS, dim=1):
            places = chunk.to(self.pending_states.device)[..., None].expand(-1, -1, self.pending_states.shape[-1])
            states, tokens = self.pending_states.gather(1, places), self.pending_tokens.gather(1, chunk)
            self._read(draft, target, states, tokens, logits_to_keep=logits_to_keep)
        self.num_rows = [count - 1 for count in self.num_pending]
        self.num_pending = [1] * len(self.num_pending)
        self.pending_states, self.pending_tokens = self.pending_states[:, -1:], self.pending_tokens[:, -1:]

    def _read_next(self, draft, target: PreTrainedModel, num_columns: int, logits_to_keep: int | None):
        """Reads the first so many columns of the pending rows."""
        num_later = self.pending_tokens.shape[1] - num_columns
        num_new = [max(0, count - num_later) for count in self.num_pending]
        self._drop_unseen(num_columns)
        is_even = self.has_even_rows and len(set(num_new)) == 1
        is_plain = is_even and self.shows_all(num_columns)
        inputs = {} if is_plain else self._inputs(num_columns, num_new)
        states, tokens = self.pending_states[:, :num_columns], self.pending_tokens[:, :num_columns]
        outputs = self._read(draft, target, states, tokens, logits_to_keep=logits_to_keep, **inputs)
        if not is_even:
            self._move_to_their_slots(num_columns, num_new)
        self.num_rows = [count + new for count, new in zip(self.num_rows, num_new, strict=True)]
        self.num_pending = [count - new for count, new in zip(self.num_pending, num_new, strict=True)]
        self.pending_states = self.pending_states[:, num_columns:]
        self.pending_tokens = self.pending_tokens[:, num_columns:]
        return outputs

    def _read(self, draft, target: PreTrainedModel, states: Tensor, tokens: Tensor, **inputs):
        embeds = draft.embed(tokens, target)
        return draft(inputs_embeds=embeds, fused_states=states, past_key_values=self.cache, **inputs)

    def _drop_unseen(self, num_columns: int) -> None:
        """Makes room for so many rows, as soon as they would be more than a chunk beyond what a row sees."""
        num_slots = self.cache.get_seq_length()
        if self.window is None or num_slots + num_columns <= self.window.sink + self.window.size + WINDOW_CHUNK_ROWS:
            return
        # Never fewer than before: sequences may have become shorter.
        before, num_unseen = self.num_dropped, map(self.window.num_unseen, self.num_rows)
        self.num_dropped = list(map(max, before, num_unseen))
        counts = [now - then for now, then in zip(self.num_dropped, before, strict=True)]
        drop_positions(self.cache, self.window.sink, counts, max(self.num_held))

    def _inputs(self, num_columns: int, num_new: list[int]) -> dict[str, Tensor]:
        """Mask and positions of the next columns; what stands before a sequence's own is seen by itself alone."""
        device, dtype = self.pending_states.device, self.pending_states.dtype
        new = torch.arange(num_columns, device=device)
        first = num_columns - torch.tensor(num_new, device=device)[:, None]  # (B, 1)
        positions = (torch.tensor(self.num_rows, device=device)[:, None] + new - first).clamp(min=0)  # (B, M)
        among_new = (new <= new[:, None]) & (new >= first[..., None])  # (B, M, M)
        if self.window is not None:
            among_new = among_new & self.window.shows(positions, positions)
        among_new = among_new | torch.eye(num_columns, dtype=torch.bool, device=device)
        num_slots = self.cache.get_seq_length()
        sees = torch.cat([self.sees(positions, num_slots), among_new], dim=2)  # (B, M, L + M)
        return {
            "attention_mask": additive_mask(sees, dtype),
            "position_ids": positions,
            "key_position_ids": torch.cat([self.slot_positions(num_slots, device), positions], dim=1),
        }

    def _move_to_their_slots(self, num_columns: int, num_new: list[int]) -> None:
        """From behind the longest sequence, where the cache has appended them."""
        device = self.pending_states.device
        first = num_columns - torch.tensor(num_new, device=device)[:, None]
        rows = (first + torch.arange(max(num_new), device=device)).clamp(max=num_columns - 1)
        keep_path(self.cache, num_columns, rows, self.num_held, num_new)


def rows_at(states: Tensor, places: Tensor) -> Tensor:
    """Rows of each sequence, `(B, T, width)` at `(B, W)` -> `(B, W, width)`."""
    return states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))


def additive_mask(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """Who sees whom, bool `(B, Q, K)`, as a mask `(B, 1, Q, K)` that is added to the scores."""
    mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
    return mask.masked_fill_(~sees, torch.finfo(dtype).min)[:, None]
