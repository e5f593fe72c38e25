"""What the two models remember, and how a round's rejected nodes are forgotten.

The target's cache is the one that `generate()` prepared. The draft's holds latents in layers of its own, which write
into buffers with room to spare: keys are `c_kv (B, 1, T, C)`, values `k_rope (B, 1, T, R)`.

Shapes: B batch, G key-value heads, T positions, P nodes of a path, C latent, R decoupled RoPE.
"""

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

# A buffer that is too small is replaced by one with room for a quarter more, but for so many positions at least: then
# the copies cost four times as much as writing every position once, however long the text becomes.
SPARE_POSITIONS = 256


class PreallocatedLayer(DynamicLayer):
    """
    A cache layer that grows in steps: new positions are written where there is room; `keys` and `values` are views.

    `DynamicLayer` copies its whole past for every new position. The numbers are the same.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.buffers: tuple[Tensor, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes that are allocated."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # Not slices of the states, which would stay in memory.
        self.keys, self.values = (states.new_empty(states[:, :, :0].shape) for states in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """
        Appends positions, `(B, G, T, width)`, and returns all.

        **Effects**: what earlier calls returned is overwritten where it has been cropped since.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        num_before = self.get_seq_length()
        num_positions = num_before + key_states.shape[2]
        if not self._has_room(num_positions):
            num_spare = max(SPARE_POSITIONS, num_positions // 4)
            self.buffers = tuple(grown(states, num_positions + num_spare) for states in (self.keys, self.values))
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, num_before:num_positions] = states
        self.keys, self.values = (buffer[:, :, :num_positions] for buffer in self.buffers)
        return self.keys, self.values

    def _has_room(self, num_positions: int) -> bool:
        # Inherited methods that select sequences leave tensors that are no views: then the buffers are renewed.
        is_view = bool(self.buffers) and self.keys.data_ptr() == self.buffers[0].data_ptr()
        return is_view and num_positions <= self.buffers[0].shape[2]

    def reset(self) -> None:
        """Forgets all positions and gives the buffers back."""
        self.keys = self.values = None
        self.is_initialized = False
        self.buffers = ()


def grown(states: Tensor, num_positions: int) -> Tensor:
    """A buffer for `num_positions` positions that begins with `states (B, G, T, width)`."""
    buffer = states.new_empty(*states.shape[:2], num_positions, states.shape[3])
    buffer[:, :, : states.shape[2]] = states
    return buffer


def new_draft_cache() -> Cache:
    """An empty cache for the draft, which grows with what it is given."""
    return Cache(layer_class_to_replicate=PreallocatedLayer)


def forget_last(cache: Cache, num_positions: int) -> None:
    """
    Drops the newest positions.

    Called also for 0: a sliding-window layer that records its past returns to its window only here.

    **Effects**: shortens `cache`.
    """
    cache.crop(-num_positions)


def keep_path(
    cache: Cache,
    num_nodes: int,
    path: Tensor,
    lengths: list[int] | None = None,
    num_kept: list[int] | None = None,
    is_chain: bool = False,
) -> None:
    """
    Keeps those of the newest `num_nodes` positions that `path` names, and drops the others.

    Args:
        cache (`Cache`): Any cache of dynamic layers.
        num_nodes (`int`): Positions of the newest forward.
        path (`torch.LongTensor` of shape `(B, P)`): Indices among them, in rising order.
        lengths (`list[int]`, *optional*): Where each sequence goes on; `None`: all where the newest positions begin.
        num_kept (`list[int]`, *optional*): How much of its path each sequence keeps; `None`: all of it.
        is_chain (`bool`, *optional*, defaults to `False`): Whether the paths are known to be the first positions.

    **Effects**: moves what is kept and shortens `cache` to the longest sequence.
    """
    num_before = cache.get_seq_length() - num_nodes
    if lengths is None:
        lengths, num_kept = [num_before] * len(path), [path.shape[1]] * len(path)
    longest = max(length + kept for length, kept in zip(lengths, num_kept, strict=True))
    if not is_chain or min(lengths) < num_before:
        starts = torch.tensor(lengths, device=path.device)[:, None]
        move_path(cache, num_nodes, path, starts + torch.arange(path.shape[1], device=path.device))
    forget_last(cache, num_before + num_nodes - longest)


def move_path(cache: Cache, num_nodes: int, path: Tensor, places: Tensor) -> None:
    """Copies what `path (B, P)` names of the newest `num_nodes` positions to the slots `places (B, P)`."""
    for layer in cache.layers:
        if layer.is_initialized:
            # A sliding window holds the newest slots only.
            first = layer.get_seq_length() - layer.keys.shape[-2]
            nodes, slots = (each.to(layer.keys.device)[:, None, :, None] for each in (path, places - first))
            for states in (layer.keys, layer.values):
                newest = states[:, :, -num_nodes:]
                chosen = nodes.expand(*newest.shape[:2], -1, newest.shape[-1])
                states.scatter_(2, slots.expand_as(chosen), newest.gather(2, chosen))


def drop_positions(cache: Cache, first: int, counts: list[int], num_left: int) -> None:
    """
    Drops some positions of each sequence, those from `first` on; what is behind them moves up.

    Args:
        cache (`Cache`): The draft's.
        first (`int`): The slot from which on positions are dropped.
        counts (`list[int]`): How many of them each sequence loses.
        num_left (`int`): Length of the cache afterwards.

    **Effects**: moves the positions in place and shortens `cache`.
    """
    num_before = cache.get_seq_length()
    for layer in cache.layers:
        slots = torch.arange(first, num_left, device=layer.keys.device)
        slots = slots + torch.tensor(counts, device=slots.device)[:, None]  # (B, num_left - first)
        slots = slots.clamp(max=num_before - 1)[:, None, :, None]
        for states in (layer.keys, layer.values):
            moved = states.gather(2, slots.expand(-1, states.shape[1], -1, states.shape[3]))
            states[:, :, first:num_left] = moved
    forget_last(cache, num_before - num_left)


def cache_bytes(cache: Cache) -> int:
    """Bytes that the draft's `cache` has allocated."""
    return sum(layer.num_bytes for layer in cache.layers)
