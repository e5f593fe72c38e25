"""Sliding-window layers of a cache during decoding: rejected nodes leave it, and sequences may differ in length.

A window that has moved on cannot move back, unless the layer records what leaves it: so it does while rounds last, and
not for longer, since a layer that records and is never cropped keeps the whole text.

Where the sequences of a batch have different lengths, transformers' own layer keeps and shows too few slots for a
sequence that is behind: the newest ones, the same for all. The layer that takes its place keeps what the shortest
sequence can still see and shows all of it; the mask carries the windows.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .transcript import Transcript


class RecordingLayer(DynamicSlidingWindowLayer):
    """
    A sliding-window layer whose record outlasts `crop`: its owner wants to crop it later.

    Args:
        layer (`DynamicSlidingWindowLayer`): The layer whose place it takes.
    """

    def __init__(self, layer: DynamicSlidingWindowLayer):
        super().__init__(layer.sliding_window)
        vars(self).update(vars(layer))

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Old transformers return the whole record, which masks do not cover."""
        states = super().update(key_states, value_states, *args, **kwargs)
        keys, values = (each[:, :, -(self.sliding_window - 1 + key_states.shape[2]) :] for each in states)
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove < 0:
            self.keys, self.values = self.keys[:, :, :tokens_to_remove], self.values[:, :, :tokens_to_remove]
            self.cumulative_length += tokens_to_remove


class UnevenWindowLayer(DynamicLayer):
    """
    A sliding-window layer whose slots are dropped by `forget_before` only, or never if it takes a record's place.

    Args:
        layer (`DynamicSlidingWindowLayer`): The layer whose place it takes.
    """

    is_sliding = True

    def __init__(self, layer: DynamicSlidingWindowLayer):
        super().__init__()
        self.sliding_window = layer.sliding_window
        self.keys, self.values, self.is_initialized = layer.keys, layer.values, True
        self.dtype, self.device = layer.keys.dtype, layer.keys.device
        self.first_slot = layer.get_seq_length() - layer.keys.shape[-2]
        self.keeps_all = isinstance(layer, RecordingLayer)

    def get_seq_length(self) -> int:
        return self.first_slot + self.keys.shape[-2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[-2] + query_length, self.first_slot

    def forget_before(self, num_tokens: int) -> None:
        """Drops the slots that a token after `num_tokens` others does not see."""
        num_dropped = num_tokens - self.sliding_window + 1 - self.first_slot
        if num_dropped > 0 and not self.keeps_all:
            self.keys, self.values = self.keys[:, :, num_dropped:], self.values[:, :, num_dropped:]
            self.first_slot += num_dropped


@contextmanager
def recorded_past(cache: Cache) -> Iterator[None]:
    """
    Lets the newest positions of `cache` be dropped while the context is open, beyond its windows too.

    **Effects**: sliding-window layers record their past, which `crop` alone shortens; afterwards as they did before.
    Those that did so already are replaced meanwhile, so that they keep all of it.
    """
    layers = {i: layer for i, layer in enumerate(cache.layers) if isinstance(layer, DynamicSlidingWindowLayer)}
    did_record = {i: layer for i, layer in layers.items() if layer.record_past}
    for index, layer in did_record.items():
        cache.layers[index] = RecordingLayer(layer)
    cache.activate_past_recording()
    try:
        yield
    finally:
        for index, layer in layers.items():
            if index in did_record:
                vars(layer).update(vars(cache.layers[index]))
                cache.layers[index] = layer
            else:
                layer.record_past = False


@contextmanager
def uneven_windows(cache: Cache) -> Iterator[None]:
    """
    Lets the sequences of `cache` have different lengths while the context is open.

    **Effects**: sliding-window layers are replaced; the original ones return with what is then in their windows.
    """
    originals = {
        index: layer
        for index, layer in enumerate(cache.layers)
        if isinstance(layer, DynamicSlidingWindowLayer) and layer.is_initialized
    }
    for index, layer in originals.items():
        cache.layers[index] = UnevenWindowLayer(layer)
    try:
        yield
    finally:
        for index, layer in originals.items():
            uneven = cache.layers[index]
            uneven.forget_before(uneven.get_seq_length())
            layer.keys, layer.values, layer.cumulative_length = uneven.keys, uneven.values, uneven.get_seq_length()
            cache.layers[index] = layer


def forget_unseen(cache: Cache, num_tokens: int) -> None:
    """Drops from the windows what no sequence of at least `num_tokens` tokens sees any more."""
    for layer in cache.layers:
        if isinstance(layer, UnevenWindowLayer):
            layer.forget_before(num_tokens)


@contextmanager
def whole_rounds(cache: Cache, transcript: Transcript) -> Iterator[None]:
    """
    Takes a round that raises back out of the caller's `cache`: what nobody accepted is not the text.

    **Effects**: then `cache` holds what `transcript` had before the round, its newest token aside.
    """
    try:
        yield
    except BaseException:
        for layer in cache.layers:
            if layer.is_initialized:  # a forward that was interrupted has come to some of them
                layer.crop(min(transcript.num_kept_slots - layer.get_seq_length(), 0))
        raise
