"""What the draft knows of the text: the latents of past rows, and the rows that it has still to read.

The EAGLE shift, stated here once: the draft's row i pairs the target's states at token i with the embedding of token
i + 1, sits at RoPE position i, and predicts token i + 2. So after a round the rows of all committed tokens are known
except the newest token's own, which the target has not read.

The sequences of a batch need not have equally many rows: padding has none. A sequence's rows fill its slots in the
cache from the first one on, so slot and RoPE position are the same number; slots beyond hold what nobody sees. Pending
rows end together instead, with the root, so that the last one is the one whose scores are wanted.

A long prompt is read in chunks, so that what attention and MLP need at once does not grow with it.

Shapes: B batch, M pending rows, L slots of the cache, D hidden.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from .caches import cache_bytes, keep_path, new_draft_cache

# Pending rows of a sequence that the draft reads at once.
CHUNK_ROWS = 2048


@dataclass
class DraftMemory:
    """
    The draft's rows of a batch.

    Args:
        pending_states (`torch.Tensor` of shape `(B, M, D)`): The target's states, fused, not yet read by the draft.
        pending_tokens (`torch.LongTensor` of shape `(B, M)`): For each of them the token that follows.
        num_pending (`list[int]`): How many of a sequence's pending rows are its own; they are the last ones.
        num_rows (`list[int]`): Rows of each sequence in the cache.
        cache (`Cache`): Latents of rows from true states of the target.
    """

    pending_states: Tensor
    pending_tokens: Tensor
    num_pending: list[int]
    num_rows: list[int]
    cache: Cache = field(default_factory=new_draft_cache)

    @classmethod
    def of_prompt(cls, states: Tensor, input_ids: Tensor, mask: Tensor | None) -> "DraftMemory":
        """
        The prompt's rows, all pending, without those of its padding.

        Args:
            states (`torch.Tensor` of shape `(B, T, D)`): The target's, of the prompt, fused.
            input_ids (`torch.LongTensor` of shape `(B, T + 1)`): The prompt and the first new token.
            mask (`torch.Tensor` of shape `(B, T + 1)`, *optional*): 0 where a position is padding.
        """
        batch_size, num_states = states.shape[:2]
        is_token = torch.ones_like(input_ids, dtype=torch.bool)
        if mask is not None:
            is_token = mask.to(input_ids.device).bool()
            is_token = is_token | ~is_token[:, :-1].any(dim=1, keepdim=True)  # a prompt of nothing else is read
        num_tokens = is_token.sum(dim=1).tolist()
        if min(num_tokens) <= num_states:
            order = is_token.int().sort(dim=1, stable=True).indices  # padding first
            input_ids = input_ids.gather(1, order)
            order = is_token[:, :-1].int().sort(dim=1, stable=True).indices.to(states.device)
            states = states.gather(1, order[..., None].expand_as(states))
        longest = max(num_tokens) - 1
        return cls(
            states[:, -longest:], input_ids[:, -longest:], [count - 1 for count in num_tokens], [0] * batch_size
        )

    @property
    def has_even_rows(self) -> bool:
        """Whether all sequences have equally many rows in the cache."""
        return len(set(self.num_rows)) == 1

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

    def read(self, draft, target: PreTrainedModel):
        """
        Lets the draft read the pending rows.

        Returns:
            `Eagle3MLAOutput` of the roots, one row for each sequence.

        **Effects**: the rows move to the cache.
        """
        if not self.is_even and max(self.num_rows) == 0:
            self._read_all_but_roots(draft, target)
        while (num_waiting := self.pending_tokens.shape[1]) > 0:
            outputs = self._read_next(draft, target, min(num_waiting, CHUNK_ROWS))
        return outputs

    def sees(self, num_slots: int, device: torch.device) -> Tensor:
        """Which of the first slots hold rows of their sequence, bool `(B, num_slots)`."""
        slots = torch.arange(num_slots, device=device)
        return slots < torch.tensor(self.num_rows, device=device)[:, None]

    def _read_all_but_roots(self, draft, target: PreTrainedModel) -> None:
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
            self._read(draft, target, states, tokens)
        self.num_rows = [count - 1 for count in self.num_pending]
        self.num_pending = [1] * len(self.num_pending)
        self.pending_states, self.pending_tokens = self.pending_states[:, -1:], self.pending_tokens[:, -1:]

    def _read_next(self, draft, target: PreTrainedModel, num_columns: int):
        """Reads the first so many columns of the pending rows."""
        num_later = self.pending_tokens.shape[1] - num_columns
        num_new = [max(0, count - num_later) for count in self.num_pending]
        is_even = self.has_even_rows and len(set(num_new)) == 1
        inputs = {} if is_even else self._uneven_inputs(num_columns, num_new)
        states, tokens = self.pending_states[:, :num_columns], self.pending_tokens[:, :num_columns]
        outputs = self._read(draft, target, states, tokens, **inputs)
        if not is_even:
            self._move_to_their_slots(num_columns, num_new)
        self.num_rows = [count + new for count, new in zip(self.num_rows, num_new, strict=True)]
        self.num_pending = [count - new for count, new in zip(self.num_pending, num_new, strict=True)]
        self.pending_states = self.pending_states[:, num_columns:]
        self.pending_tokens = self.pending_tokens[:, num_columns:]
        return outputs

    def _read(self, draft, target: PreTrainedModel, states: Tensor, tokens: Tensor, **inputs):
        embeds = draft.embed(tokens, target)
        return draft(inputs_embeds=embeds, fused_states=states, past_key_values=self.cache, logits_to_keep=1, **inputs)

    def _uneven_inputs(self, num_columns: int, num_new: list[int]) -> dict[str, Tensor]:
        """Mask and positions of the next columns; what stands before a sequence's own is seen by itself alone."""
        device, dtype = self.pending_states.device, self.pending_states.dtype
        new = torch.arange(num_columns, device=device)
        first = num_columns - torch.tensor(num_new, device=device)[:, None]  # (B, 1)
        positions = (torch.tensor(self.num_rows, device=device)[:, None] + new - first).clamp(min=0)  # (B, M)
        among_new = (new <= new[:, None]) & (new >= first[..., None]) | torch.eye(num_columns, device=device).bool()
        past = self.sees(self.cache.get_seq_length(), device)
        sees = torch.cat([past[:, None].expand(-1, num_columns, -1), among_new], dim=2)  # (B, M, L + M)
        slots = torch.arange(past.shape[1], device=device).expand_as(past)
        return {
            "attention_mask": additive_mask(sees, dtype),
            "position_ids": positions,
            "key_position_ids": torch.cat([slots, positions], dim=1),
        }

    def _move_to_their_slots(self, num_columns: int, num_new: list[int]) -> None:
        """From behind the longest sequence, where the cache has appended them."""
        device = self.pending_states.device
        first = num_columns - torch.tensor(num_new, device=device)[:, None]
        rows = (first + torch.arange(max(num_new), device=device)).clamp(max=num_columns - 1)
        keep_path(self.cache, num_columns, rows, self.num_rows, num_new)


def additive_mask(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """Who sees whom, bool `(B, Q, K)`, as a mask `(B, 1, Q, K)` that is added to the scores."""
    mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
    return mask.masked_fill_(~sees, torch.finfo(dtype).min)[:, None]
