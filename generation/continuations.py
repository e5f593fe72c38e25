"""Continuations: calls whose cache already holds the beginning of the text, as in a chat's second turn.

The target does not read that beginning again, so there are no states of it. If the draft assisted the call that the
cache comes from, it has its rows still: they are remembered as long as both exist, and go on as far as the text is the
same. Otherwise the draft's rows begin with the first token that is read, and so do their positions: RoPE knows
differences only.

What is remembered decides how much is accepted, never what the text is.

Shapes: B batch, T tokens of a call's text, S slots of the target's cache.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel

from .memory import DraftMemory
from .support import draft_window

# Pending rows are states of the target: those of a round are kept, those of a prompt that was never read are not.
MAX_PENDING_ROWS = 64


@dataclass(frozen=True)
class Remembered:
    """
    What a draft knew of a text when a call ended.

    Args:
        memory ([`DraftMemory`]): Its rows.
        ids (`torch.LongTensor` of shape `(B, S)`): What the slots held.
        is_token (`torch.BoolTensor` of shape `(B, S)`): Whether that was a token, or padding.
    """

    memory: DraftMemory
    ids: Tensor
    is_token: Tensor

    def rows_of(self, ids: Tensor, is_token: Tensor) -> list[int] | None:
        """How many rows of each sequence are those of a text `(B, S)`, as long or shorter; `None` if it is another."""
        first = self.memory.first_slot
        if len(ids) != len(self.ids) or not first < ids.shape[1] <= self.ids.shape[1]:
            return None
        slots = slice(first, ids.shape[1])
        ids, is_token, known_ids, was_token = (
            each[:, slots].to(self.ids.device) for each in (ids, is_token, self.ids, self.is_token)
        )
        num_rows = is_token.sum(dim=1, keepdim=True)
        # Tokens may have become padding where they were the last ones: what follows a sequence's end.
        is_kept = was_token & (was_token.cumsum(dim=1) <= num_rows)
        is_same = (is_token == is_kept) & ((ids == known_ids) | ~is_token)
        return num_rows[:, 0].tolist() if is_same.all() else None


_remembered: WeakKeyDictionary[PreTrainedModel, WeakKeyDictionary[Cache, Remembered]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Beginning:
    """
    The part of a text that is in the target's cache when a call begins.

    Args:
        num_cached (`int`): Its slots.
        omitted_ids (`torch.LongTensor` of shape `(B, slots)`): Of these what the call's `input_ids` leave out.
        remembered ([`Remembered`], *optional*): What the draft knows of it.
    """

    num_cached: int
    omitted_ids: Tensor
    remembered: Remembered | None

    @classmethod
    def of_call(cls, draft, cache: Cache, input_ids: Tensor, num_omitted: int) -> "Beginning":
        """
        Args:
            draft ([`Eagle3MLADraftModel`]): The head.
            cache (`Cache`): The target's, before it reads anything.
            input_ids (`torch.LongTensor` of shape `(B, T)`): The prompts.
            num_omitted (`int`): How many of the cached tokens these leave out.

        **Effects**: what is remembered is forgotten until [`remember`].
        """
        remembered = _remembered.setdefault(draft, WeakKeyDictionary()).pop(cache, None)
        omitted_ids = input_ids.new_full((len(input_ids), num_omitted), -1)
        if remembered is not None and remembered.ids[:, :num_omitted].shape == omitted_ids.shape:
            omitted_ids = remembered.ids[:, :num_omitted].to(input_ids.device)
        return cls(cache.get_seq_length(), omitted_ids, remembered)

    def memory(
        self, draft, target: PreTrainedModel, states: Tensor, input_ids: Tensor, mask: Tensor | None
    ) -> DraftMemory:
        """
        The draft's memory of a prompt that the target has read.

        Args:
            draft ([`Eagle3MLADraftModel`]), target (`PreTrainedModel`): The models.
            states, input_ids, mask: As [`DraftMemory.of_prompt`] takes them.
        """
        memory = DraftMemory.of_prompt(states, input_ids, mask, draft_window(draft))
        # Phi-3 may have dropped the cache and read the whole text, see `rope.py`.
        memory.first_slot = self.omitted_ids.shape[1] + input_ids.shape[1] - 1 - states.shape[1]
        if self.remembered is None or memory.first_slot != self.num_cached:
            return memory
        ids, is_token = self._text(input_ids, mask)
        num_rows = self.remembered.rows_of(ids[:, : self.num_cached], is_token[:, : self.num_cached])
        earlier = self.remembered.memory
        if num_rows is None or not earlier.can_go_on(num_rows, memory):
            return memory
        earlier.go_on(draft, target, num_rows, memory)
        return earlier

    def remember(self, draft, cache: Cache, memory: DraftMemory, input_ids: Tensor, mask: Tensor | None) -> None:
        """
        Keeps `memory` for a call that continues `cache`.

        Args:
            draft ([`Eagle3MLADraftModel`]): Whose memory it is.
            cache (`Cache`): The target's, of the whole text but its last token.
            memory ([`DraftMemory`]): As from `memory`.
            input_ids (`torch.LongTensor` of shape `(B, T)`): The texts.
            mask (`torch.Tensor` of shape `(B, slots)`, *optional*): 0 where a slot of the prompt is padding.
        """
        if memory.pending_tokens.shape[1] > MAX_PENDING_ROWS:
            return
        ids, is_token = (each[:, : cache.get_seq_length()] for each in self._text(input_ids, mask))
        _remembered[draft][cache] = Remembered(memory, ids, is_token)

    def _text(self, input_ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The tokens of all slots, and which are no padding; `mask` may end earlier."""
        ids = torch.cat([self.omitted_ids, input_ids], dim=1)
        is_token = torch.ones_like(ids, dtype=torch.bool)
        if mask is not None:
            is_token[:, : mask.shape[1]] = mask.to(ids.device).bool()
        return ids, is_token


def num_omitted(input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: dict) -> int:
    """
    How many tokens of the text are in the target's cache and not in `input_ids (B, T)`.

    As in plain generation, the mask tells: `input_ids` of its length are the whole text, shorter ones what is new.

    Raises:
        ValueError: If cache, mask and `input_ids` do not fit each other.
    """
    cache, mask = model_kwargs["past_key_values"], model_kwargs.get("attention_mask")
    num_cached, num_given = cache.get_seq_length(), input_ids.shape[1]
    if num_cached == 0:
        return 0
    _check_batch_size(cache, len(input_ids))
    # transformers 5.23 drops a mask of ones and notes its length.
    num_tokens = getattr(generation_config, "_mask_length", num_given) if mask is None else mask.shape[1]
    if num_tokens == num_given + num_cached:
        return num_cached
    if num_tokens != num_given:
        raise ValueError(
            f"`attention_mask` must be as long as `input_ids` ({num_given}) where they are the whole text, or as both "
            f"they and `past_key_values` ({num_given + num_cached}) where they are what is new, got {num_tokens}. The "
            "cache of an earlier call lacks the last token of its text: what is new begins with that one."
        )
    if num_cached >= num_given:
        raise ValueError(
            f"`past_key_values` must hold fewer tokens than `input_ids` ({num_given}), got {num_cached}. Where "
            "`input_ids` are only what is new, pass an `attention_mask` for the whole text."
        )
    return 0


def _check_batch_size(cache: Cache, batch_size: int) -> None:
    num_sequences = next(layer.keys.shape[0] for layer in cache.layers if layer.is_initialized)
    if num_sequences != batch_size:
        raise ValueError(
            f"`past_key_values` must hold as many sequences as `input_ids` ({batch_size}), got {num_sequences}."
        )
