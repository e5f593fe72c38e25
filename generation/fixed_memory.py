"""What the draft knows of the text, as in `memory.py`, but in buffers of fixed shapes.

How many rows a sequence has, and how many are pending, only the device knows. Pending rows begin together; behind a
sequence's own stand others that mean nothing, and whatever they leave in the cache is overwritten or never seen. A row
stands in the slot of its RoPE position.

Shapes: B batch, T rows of a forward, M pending rows, P nodes of a path, W new rows, S slots from the first new one on,
K slots, D hidden, d width of a head, Vd the draft's vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .caches import new_draft_cache
from .fixed_cache import FixedCache
from .memory import DraftMemory, additive_mask, rows_at
from .opaque_ops import latent_attention_op


@dataclass(frozen=True)
class NewSlots:
    """
    The slots behind the committed rows.

    Args:
        slots (`torch.LongTensor` of shape `(B, S)`): In the cache.
        positions (`torch.LongTensor` of shape `(B, S)`): Their RoPE positions.
        end (`torch.IntTensor` of shape `(B,)`): The slot behind them.
        short_positions (`torch.IntTensor` of shape `(B, S)`): The positions again, for kernels.
    """

    slots: Tensor
    positions: Tensor
    end: Tensor
    short_positions: Tensor

    @classmethod
    def at(cls, num_rows: Tensor, offsets: Tensor) -> "NewSlots":
        """Behind `num_rows (B,)`, at positions that are `offsets (S,)` ahead."""
        slots = num_rows[:, None] + torch.arange(len(offsets), device=offsets.device)
        positions = num_rows[:, None] + offsets
        return cls(slots, positions, (num_rows + len(offsets)).to(torch.int32), positions.to(torch.int32))


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

    def show(self, new: NewSlots, sees: Tensor, inv_freq: Tensor, scaling: float) -> None:
        """
        What the next forward sees, which writes some of the new slots.

        Args:
            new ([`NewSlots`]): Those behind the committed rows, all of which are seen.
            sees (`torch.BoolTensor` of shape `(B, W, S)`): Which of the new slots each row sees.
            inv_freq (`torch.Tensor` of shape `(d / 2,)`), scaling (`float`): Of RoPE.
        """
        self.lengths, self.positions, self.sees = new.end, new.short_positions, sees.contiguous()
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
        self.guesses: NewSlots | None = None  # where those of a round stand
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
        offsets = torch.arange(self.pending_tokens.shape[1], device=roots.device)
        sees = (offsets <= offsets[:, None]).expand(len(roots), -1, -1)
        outputs = draft(
            inputs_embeds=draft.embed(self.pending_tokens, target),
            fused_states=self.pending_states,
            past_key_values=self.cache,
            **self._inputs(sees, NewSlots.at(self.num_rows, offsets), slice(None)),
        )
        self.num_rows += self.num_pending
        self.guesses = None
        return RootRows(rows_at(outputs.logits, roots), rows_at(outputs.states, roots))

    def num_columns(self, num_drafted: int) -> int:
        """As many at all depths, so that a compiler meets one shape; what is not written yet is not seen."""
        return self.num_guesses

    def frontier_inputs(self, sees: Tensor, num_drafted: int) -> dict[str, Tensor]:
        """
        What the draft has to know for the nodes of one depth, of as many as of those before.

        Args:
            sees (`torch.BoolTensor` of shape `(B, W, S)`): Which of the rows that a round drafts each attends to.
            num_drafted (`int`): How many there are by then.

        **Effects**: the next forward writes behind the rows that were drafted before.
        """
        width = sees.shape[1]
        if self.guesses is None:
            self.guesses = NewSlots.at(self.num_rows, torch.arange(self.num_guesses, device=sees.device) // width)
        return self._inputs(sees, self.guesses, slice(num_drafted - width, num_drafted))

    def _inputs(self, sees: Tensor, new: NewSlots, own: slice) -> dict[str, Tensor]:
        """For rows in the slots `own` of the new ones; they see all committed rows, of the new what `sees` says."""
        self.cache.write_at(new.slots[:, own])
        own_positions = new.positions[:, own]
        if isinstance(self.cache, LatentCache):
            self.cache.show(new, sees, *self.rotary.frequencies(own_positions.device))
            return {"position_ids": own_positions}
        slots = torch.arange(self.cache.capacity, device=own_positions.device)
        is_row = (slots < self.num_rows[:, None])[:, None].expand(-1, sees.shape[1], -1)  # (B, W, K)
        sees = is_row.scatter(2, new.slots[:, None].expand_as(sees), sees)
        return {"attention_mask": additive_mask(sees, self.pending_states.dtype), "position_ids": own_positions}

    def forget_guesses(self) -> None:
        """Nothing: what nobody sees need not go."""

    def _newest(self) -> Tensor:
        # A sequence that has ended may get nothing in a round; what is drafted for it is not used.
        return (self.num_pending[:, None] - 1).clamp(min=0)
