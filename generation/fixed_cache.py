"""A key-value cache of a fixed capacity, for forwards that have the same shapes in every round.

Every sequence writes at slots of its own, which are read off the device, so a captured CUDA graph can be replayed
however far the texts have come. The layers of one shape lie in one tensor, so that an accepted path is moved in all of
them at once.

Shapes: L layers, B batch, G key-value heads, K slots, N new positions, P positions of a path.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from .slot_writing import write_to_slots


class FixedLayer(CacheLayerMixin):
    """
    One layer: new positions go where `write_at` of its cache said; all slots are returned, written or not.

    Args:
        keys, values (`torch.Tensor` of shape `(B, G, K, width)`): The buffers.
    """

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.slots: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The buffers are there from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Writes `(B, G, N, width)` at the slots and returns the buffers."""
        write_to_slots(self.keys, self.values, self.slots, key_states, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        """0: how many slots are in use differs between sequences, and only the device knows."""
        return 0

    def get_max_length(self) -> int:
        return self.keys.shape[2]

    def get_max_cache_shape(self) -> int:
        return self.keys.shape[2]


class FixedCache(Cache):
    """
    A cache for as many layers as `like` has.

    Args:
        like (`Cache`): An initialised cache, which says how many heads of which width each layer has.
        capacity (`int`): Slots of each sequence.
    """

    def __init__(self, like: Cache, capacity: int):
        self.capacity = capacity
        self.shapes = [(buffer_shape(layer.keys), buffer_shape(layer.values)) for layer in like.layers]
        flat = [shape for pair in self.shapes for shape in pair]
        sample = like.layers[0].keys
        self.stacks = {
            shape: sample.new_zeros(flat.count(shape), len(sample), shape[0], capacity, shape[1], dtype=shape[2])
            for shape in dict.fromkeys(flat)
        }
        super().__init__(layers=[FixedLayer(keys, values) for keys, values in self._states_at(0, capacity)])

    @property
    def num_bytes(self) -> int:
        """Bytes that are allocated."""
        return sum(stack.numel() * stack.element_size() for stack in self.stacks.values())

    def load(self, cache: Cache) -> None:
        """
        Takes over what `cache` holds, slot by slot; of a sliding window that are the newest slots.

        What an earlier text left is overwritten: a number that is not finite would come through any mask.

        **Effects**: `cache` forgets it, layer by layer, so that nothing is in memory twice.
        """
        self._clear()
        nothing = {shape: stack.new_empty(stack[0, :, :, :0].shape) for shape, stack in self.stacks.items()}
        ends = [source.get_seq_length() for source in cache.layers]
        spans = [(end - source.keys.shape[2], end) for end, source in zip(ends, cache.layers, strict=True)]
        for (keys, values), shapes, source in zip(self._states_in(spans), self.shapes, cache.layers, strict=True):
            keys.copy_(source.keys)
            values.copy_(source.values)
            source.keys, source.values = map(nothing.get, shapes)

    def take_over(self, smaller: "FixedCache") -> None:
        """Copies all slots of a cache of a smaller capacity; there is nothing in the others."""
        self._clear()
        for stack, source in zip(self.stacks.values(), smaller.stacks.values(), strict=True):
            stack[:, :, :, : smaller.capacity] = source

    def _clear(self) -> None:
        for stack in self.stacks.values():
            stack.zero_()

    def give_back(
        self, cache: Cache, num_tokens: int, num_least: int | None = None, device: torch.device | None = None
    ) -> None:
        """
        Fills `cache`, from which `load` took, with the first `num_tokens` slots: what plain generation leaves there.

        Args:
            cache (`Cache`): The target's.
            num_tokens (`int`): Slots of the longest sequence.
            num_least (`int`, *optional*): Slots of the shortest, whose windows must be there, too; `None`: as many.
            device (`torch.device`, *optional*): Where they are put; `None`: where the buffers are.

        **Effects**: overwrites the layers of `cache`.
        """
        num_least = num_tokens if num_least is None else num_least
        firsts = [max(0, num_least - each.sliding_window + 1) if each.is_sliding else 0 for each in cache.layers]
        spans = [(first, num_tokens) for first in firsts]
        states = self._copies_in(spans) if device is None else self._copies_on(device, spans)
        for (keys, values), source in zip(states, cache.layers, strict=True):
            source.keys, source.values = keys, values
            if source.is_sliding:
                source.cumulative_length = num_tokens

    def _copies_in(self, spans: list[tuple[int, int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each layer's keys and values in its span of slots, where the buffers are."""
        return ((keys.clone(), values.clone()) for keys, values in self._states_in(spans))

    def _copies_on(self, device: torch.device, spans: list[tuple[int, int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The same on another device. Whole buffers go there, because slices would first be copied where they are."""
        for layer, (first, end) in zip(self.layers, spans, strict=True):
            yield tuple(each.to(device)[:, :, first:end].clone() for each in (layer.keys, layer.values))

    def _states_in(self, spans: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer in its span of slots; slices of whole stacks, of which few are different."""
        states = {span: self._states_at(*span) for span in set(spans)}
        return [states[span][index] for index, span in enumerate(spans)]

    def _states_at(self, first: int, end: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer in the same slots."""
        unused = {shape: iter(stack[:, :, :, first:end].unbind()) for shape, stack in self.stacks.items()}
        return [(next(unused[keys]), next(unused[values])) for keys, values in self.shapes]

    def write_at(self, slots: Tensor) -> None:
        """The slots `(B, N)` of what the next forward appends."""
        for layer in self.layers:
            layer.slots = slots

    def move(self, sources: Tensor, slots: Tensor) -> None:
        """Copies what stands at the slots `sources (B, P)` to `slots (B, P)`, in all layers at once."""
        rows = torch.arange(len(slots), device=slots.device)[:, None]
        for stack in self.stacks.values():
            stack = stack.transpose(0, 1).transpose(2, 3).transpose(1, 2)  # (B, K, L, G, width)
            stack.index_put_((rows.expand_as(slots), slots), stack[rows, sources])


def buffer_shape(states: Tensor) -> tuple[int, int, torch.dtype]:
    """What two layers must have in common to lie in one tensor, of states `(B, G, T, width)`."""
    return states.shape[1], states.shape[3], states.dtype
