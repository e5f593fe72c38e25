"""What both models know of the texts when the first round begins: all but their newest tokens, the roots.

Shapes: B batch, T tokens.
"""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor
from transformers import Cache

from .memory import DraftMemory


@dataclass(frozen=True)
class Prefill:
    """
    The prompts, read.

    Args:
        cache (`Cache`): The target's.
        memory ([`DraftMemory`]): The draft's.
        is_token (`torch.Tensor` of shape `(B, T)`, *optional*): Of any type; 0 where a slot of the cache is padding.
        positions (`torch.LongTensor` of shape `(B,)`, or `int`): RoPE positions of the roots in the target.
    """

    cache: Cache
    memory: DraftMemory
    is_token: Tensor | None
    positions: Tensor | int

    @classmethod
    def of_call(cls, memory: DraftMemory, model_kwargs: dict) -> "Prefill":
        """
        Args:
            memory ([`DraftMemory`]): The draft's, which has read all but the roots.
            model_kwargs (`dict`): The target's generation state.
        """
        cache, mask, positions = (
            model_kwargs.get(name) for name in ("past_key_values", "attention_mask", "position_ids")
        )
        if positions is not None:
            return cls(cache, memory, mask, positions[:, -1])
        return cls(cache, memory, mask, cache.get_seq_length() if mask is None else mask.sum(dim=1) - 1)

    @cached_property
    def is_padded_left(self) -> bool:
        """Whether padding, if there is any, stands before the texts and nowhere else."""
        return is_padded_left(self.is_token)


def is_padded_left(mask: Tensor | None) -> bool:
    """Whether padding, where `mask (B, T)` of any type is 0, stands before the texts and nowhere else."""
    if mask is None:
        return True
    mask = mask.bool().int()  # a difference of booleans is never below 0
    return bool((mask.diff(dim=1) >= 0).all() & mask[:, -2:].all())
