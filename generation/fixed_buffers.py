"""What goes on from round to round at fixed shapes: both caches, how far each sequence has come, the coming noise.

Everything lies where it is, in buffers for texts of at most `capacity` slots, so that rounds of any size, each with
graphs of its own, can take turns on it.

Shapes: B batch, P nodes on the longest path of the largest trees, K slots, V the target's vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .fixed_cache import FixedCache
from .fixed_memory import FixedMemory
from .prefill import Prefill
from .sampling import Noise, RowNoise
from .support import TreePlan
from .transcript import Transcript


class GivenNoise:
    """
    Noise of the coming tokens in a buffer.

    Args:
        draws (`torch.Tensor` of shape `(B, P, V)`): Those of each place behind the newest token.
    """

    def __init__(self, draws: Tensor):
        self.draws = draws

    def peek(self, ahead: int) -> Tensor:
        """Noise `(B, V)` of the token that is `ahead` places after the next one."""
        return self.draws[:, ahead]


class TextBuffers:
    """
    The texts of a call and what both models know of them.

    Args:
        draft ([`Eagle3MLADraftModel`]): The head; not kept alive.
        largest ([`TreePlan`]): Size of the largest trees.
        prefill ([`Prefill`]): Says which shapes the buffers need.
        capacity (`int`): Slots of each sequence, those of a tree's nodes included.
        draw (`torch.Tensor` of shape `(B, V)`, *optional*): Like the noise of a token; `None` means greedy.
    """

    def __init__(self, draft, largest: TreePlan, prefill: Prefill, capacity: int, draw: Tensor | None):
        self.capacity = capacity
        self.cache = FixedCache(prefill.cache, capacity)
        self.memory = FixedMemory(draft, prefill.memory, capacity, largest.depth * largest.top_k, largest.depth + 1)
        counts = self.memory.num_rows  # (B,)
        self.lengths, self.offsets = torch.zeros_like(counts), torch.zeros_like(counts)
        self.limit = counts.new_full((), capacity)
        self.is_token = torch.ones(len(counts), capacity, dtype=torch.bool, device=counts.device)  # (B, K)
        self.first_slots = torch.zeros_like(counts)
        self.roots = counts.new_zeros(len(counts), 1)  # (B, 1)
        self.is_frozen = torch.zeros_like(counts, dtype=torch.bool)
        self.noise = None if draw is None else GivenNoise(draw.new_ones(len(draw), largest.depth + 1, draw.shape[1]))

    @property
    def num_bytes(self) -> int:
        """Bytes of both caches."""
        return self.cache.num_bytes + self.memory.num_bytes

    def load(self, prefill: Prefill, transcript: Transcript) -> None:
        """
        Begins a text.

        **Effects**: empties the target's cache and the draft's memory of `prefill`.
        """
        num_read = prefill.cache.get_seq_length()
        self.lengths.fill_(num_read)
        self.offsets.fill_(0).add_(prefill.positions - num_read)
        self.is_frozen.copy_(transcript.is_frozen)
        self.limit.fill_(transcript.max_slots)
        self.is_token.fill_(True)
        if prefill.is_token is not None:
            self.is_token[:, :num_read] = prefill.is_token[:, :num_read].bool()
        self.first_slots.copy_((~self.is_token).sum(dim=1))
        self.cache.load(prefill.cache)
        self.memory.load(prefill.memory)
        self.roots.copy_(self.memory.roots)

    def take_over(self, smaller: "TextBuffers") -> None:
        """Goes on where buffers of a smaller capacity have come to."""
        for name in ("lengths", "offsets", "limit", "roots", "is_frozen", "first_slots"):
            getattr(self, name).copy_(getattr(smaller, name))
        self.is_token.fill_(True)
        self.is_token[:, : smaller.capacity] = smaller.is_token
        self.cache.take_over(smaller.cache)
        self.memory.take_over(smaller.memory)

    def load_noise(self, noise: Noise | RowNoise, depth: int) -> None:
        """Copies the draws of the coming tokens, for trees of this depth."""
        for ahead in range(depth + 1):
            self.noise.draws[:, ahead] = noise.peek(ahead)

    @contextmanager
    def unmoved(self) -> Iterator[None]:
        """
        Undoes what rounds do while the context is open; in the caches, they write behind the texts alone.

        Meanwhile no text becomes longer than the longest is: behind it there need not be slots for a second round.
        """
        moving = [self.lengths, self.roots, self.is_frozen, *self.memory.moving]
        before = [each.clone() for each in moving]
        self.is_frozen.fill_(True)
        try:
            yield
        finally:
            for each, value in zip(moving, before, strict=True):
                each.copy_(value)
