"""What the draft knows of the text, as in `memory.py`, but in buffers of fixed shapes.

How many rows a sequence has, and how many are pending, only the device knows. Pending rows begin together; behind a
sequence's own stand others that mean nothing, and whatever they leave in the cache is overwritten or never seen. A row
stands in the slot of its RoPE position.

Shapes: B batch, T rows of a forward, M pending rows, P nodes of a path, W new rows, S slots from the first new one on,
K slots, D hidden, d width of a head, Vd the draft's vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from .caches import new_draft_cache
from .fixed_cache import FixedCache
from .memory import DraftMemory, additive_mask
from .opaque_ops import latent_attention_op


@dataclass(frozen=True)
class RootRows:
    """
    The draft's output for the roots.

    Args:
        logits (`torch.Tensor` of shape `(B, 1, Vd)`): Scores of what follows.
        states (`torch.Tensor` of shape `(B, 1, D)`): The states to feed back.
    """

    logits: Tensor
    states: Tensor


class LatentCache(FixedCache):
    """
    Latents in slots, and who sees which: every row the committed ones of its sequence, of the newest what `show` says.

    Args:
        like (`Cache`), capacity (`int`): As for [`FixedCache`].
    """

    def show(self, num_rows: Tensor, sees: Tensor, positions: Tensor, inv_freq: Tensor, scaling: float) -> None:
        """
        What the next forward sees, which writes the last of the new slots.

        Args:
            num_rows (`torch.LongTensor` of shape `(B,)`): Committed rows of each sequence, in the first slots.
            sees (`torch.BoolTensor` of shape `(B, W, S)`): Which of the S slots behind them each row sees.
            positions (`torch.LongTensor` of shape `(B, S)`): RoPE positions of these.
            inv_freq (`torch.Tensor` of shape `(d / 2,)`), scaling (`float`): Of RoPE.
        """
        self.lengths = (num_rows + sees.shape[2]).to(torch.int32)
        self.sees, self.positions = sees.contiguous(), positions.to(torch.int32)
        self.rope = inv_freq, scaling

    def attend_latents(
        self, query: Tensor, c_kv: Tensor, k_rope: Tensor, w_uk: Tensor, w_uv: Tensor, scaling: float
    ) -> Tensor:
        """See `AttendingCache` in the modeling file."""
        newest = self.lengths, self.sees, self.positions
        heads = latent_attention_op(query, c_kv, k_rope, *newest, scaling, w_uk, w_uv, *self.rope)
        return heads.transpose(1, 2)


class FixedMemory:
    """
    The draft's rows of a batch.

    Args:
        draft ([`Eagle3MLADraftModel`]): The head.
        like ([`DraftMemory`]): One that has read a prompt.
        capacity (`int`): Committed rows of a sequence.
        num_guesses (`int`): Rows that a round drafts.
        num_pending (`int`): Rows that a round can accept.
    """

    def __init__(self, draft, like: DraftMemory, capacity: int, num_guesses: int, num_pending: int):
        batch_size, _, width = like.pending_states.shape
        is_latent = draft.config.attention_type == "mla"
        self.cache = (LatentCache if is_latent else FixedCache)(like.cache, capacity + max(num_guesses, num_pending))
        self.num_guesses = num_guesses
        self.rotary = draft.rotary_emb
        self.first_slot = like.first_slot
        self.num_rows = like.pending_tokens.new_zeros(batch_size)
        self.num_pending = torch.ones_like(self.num_rows)
        self.pending_tokens = like.pending_tokens.new_zeros(batch_size, num_pending)
        self.pending_states = like.pending_states.new_zeros(batch_size, num_pending, width)

    @property
    def num_bytes(self) -> int:
        """Bytes that the cache has allocated."""
        return self.cache.num_bytes

    @property
    def roots(self) -> Tensor:
        """The newest token of each sequence, `(B, 1)`."""
        return self.pending_tokens.gather(1, self._newest())

    def load(self, memory: DraftMemory) -> None:
        """
        Takes over what `memory` holds; its roots are pending.

        **Effects**: `memory` forgets it.
        """
        self.cache.load(memory.cache)
        self.first_slot = memory.first_slot
        self.num_rows.copy_(torch.tensor(memory.num_rows))
        self.num_pending.fill_(1)
        self.pending_states.zero_()
        self.pending_tokens[:, :1], self.pending_states[:, :1] = memory.pending_tokens, memory.pending_states

    @property
    def moving(self) -> list[Tensor]:
        """What differs from round to round, the cache aside."""
        return [self.num_rows, self.num_pending, self.pending_tokens, self.pending_states]

    def take_over(self, smaller: "FixedMemory") -> None:
        """Goes on where one of a smaller capacity has come to."""
        for own, other in zip(self.moving, smaller.moving, strict=True):
            own.copy_(other)
        self.first_slot = smaller.first_slot
        self.cache.take_over(smaller.cache)

    def give_back(self, memory: DraftMemory) -> None:
        """
        Gives `memory`, from which `load` took, all rows; those that were accepted last are pending.

        **Effects**: overwrites what `memory` holds.
        """
        memory.num_rows, num_pending = torch.stack([self.num_rows, self.num_pending]).tolist()
        memory.cache = new_draft_cache()
        for index, layer in enumerate(self.cache.layers):
            keys, values = (states[:, :, : max(memory.num_rows)] for states in (layer.keys, layer.values))
            memory.cache.update(keys, values, index)
        memory.pending_states, memory.pending_tokens = self.pending_states[:, :0], self.pending_tokens[:, :0]
        memory.num_pending = [0] * len(num_pending)
        memory.await_rows(self.pending_states, self.pending_tokens, num_pending)

    def await_rows(self, states: Tensor, tokens: Tensor, num_new: Tensor) -> None:
        """
        Makes accepted rows the pending ones.

        Args:
            states (`torch.Tensor` of shape `(B, P, D)`): The target's, fused, of at most M nodes.
            tokens (`torch.LongTensor` of shape `(B, P)`): For each of them the token that follows.
            num_new (`torch.LongTensor` of shape `(B,)`): How many of a sequence's rows are meant; none if it waits.
        """
        num_rows = tokens.shape[1]
        self.pending_states[:, :num_rows], self.pending_tokens[:, :num_rows] = states, tokens
        self.num_pending.copy_(num_new)

    def read(self, draft, target: PreTrainedModel) -> RootRows:
        """
        Lets the draft read the pending rows.

        **Effects**: the rows move to the cache.
        """
        roots = self._newest()
        new = torch.arange(self.pending_tokens.shape[1], device=roots.device)
        positions = self.num_rows[:, None] + new
        sees = (new <= new[:, None]).expand(len(roots), -1, -1)
        outputs = draft(
            inputs_embeds=draft.embed(self.pending_tokens, target),
            fused_states=self.pending_states,
            past_key_values=self.cache,
            **self._inputs(sees, positions),
        )
        self.num_rows += self.num_pending
        return RootRows(rows_at(outputs.logits, roots), rows_at(outputs.states, roots))

    def frontier_inputs(self, sees: Tensor) -> dict[str, Tensor]:
        """
        What the draft has to know for the nodes of one depth.

        Args:
            sees (`torch.BoolTensor` of shape `(B, W, rows)`): Which of the rows drafted in this round each attends to.

        **Effects**: the next forward writes behind the rows that were drafted before.
        """
        width, num_drafted = sees.shape[1:]
        # Of one size at all depths, so that a compiler meets one shape; what is not written yet is not seen.
        num_later = self.num_guesses - num_drafted
        depths = torch.arange(self.num_guesses, device=sees.device) // width
        return self._inputs(F.pad(sees, (0, num_later)), self.num_rows[:, None] + depths, num_later)

    def _inputs(self, sees: Tensor, positions: Tensor, num_later: int = 0) -> dict[str, Tensor]:
        """
        For rows `(B, W)` that see all rows in the cache and, of those behind, what `sees (B, W, S)` says.

        They are themselves the last of these but for `num_later`, at RoPE positions `positions (B, S)`.
        """
        width, num_new = sees.shape[1:]
        slots = self.num_rows[:, None] + torch.arange(num_new, device=sees.device)  # (B, S)
        own = slice(num_new - num_later - width, num_new - num_later)
        self.cache.write_at(slots[:, own])
        own_positions = positions[:, own]
        if isinstance(self.cache, LatentCache):
            self.cache.show(self.num_rows, sees, positions, *self.rotary.frequencies(positions.device))
            return {"position_ids": own_positions}
        all_slots = torch.arange(self.cache.capacity, device=slots.device)
        is_row = (all_slots < self.num_rows[:, None])[:, None].expand(-1, width, -1)  # (B, W, K)
        sees = is_row.scatter(2, slots[:, None].expand_as(sees), sees)
        return {
            "attention_mask": additive_mask(sees, self.pending_states.dtype),
            "key_position_ids": all_slots.expand(len(slots), -1).scatter(1, slots, positions),
            "position_ids": own_positions,
        }

    def forget_guesses(self) -> None:
        """Nothing: what nobody sees need not go."""

    def _newest(self) -> Tensor:
        # A sequence that has ended may get nothing in a round; what is drafted for it is not used.
        return (self.num_pending[:, None] - 1).clamp(min=0)


def rows_at(states: Tensor, places: Tensor) -> Tensor:
    """One row of each sequence, `(B, T, width)` at `(B, 1)` -> `(B, 1, width)`."""
    return states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))
