"""What the two models remember, and how a round's rejected nodes are forgotten.

The target's cache is the one that `generate()` prepared. The draft's holds latents in transformers' own cache layers:
keys are `c_kv (B, 1, T, C)`, values `k_rope (B, 1, T, R)`.
"""

from torch import Tensor
from transformers import Cache, DynamicCache


def new_draft_cache() -> DynamicCache:
    """An empty cache for the draft, which grows with what it is given."""
    return DynamicCache()


def forget_last(cache: Cache, num_positions: int) -> None:
    """
    Drops the newest positions.

    Called also for 0: a sliding-window layer that records its past returns to its window only here.

    **Effects**: shortens `cache`.
    """
    cache.crop(-num_positions)


def keep_path(cache: Cache, num_nodes: int, path: Tensor) -> None:
    """
    Keeps those of the newest `num_nodes` positions that `path (n,)` names, in rising order, and drops the others.

    **Effects**: shortens `cache`, after moving what is kept to the front.
    """
    num_kept = len(path)
    if num_kept < num_nodes:
        for layer in cache.layers:
            if layer.is_initialized:
                for states in (layer.keys, layer.values):
                    newest = states[:, :, -num_nodes:]
                    newest[:, :, :num_kept] = newest[:, :, path.to(states.device)]
    forget_last(cache, num_nodes - num_kept)


def cache_bytes(cache: Cache) -> int:
    """Bytes of the tensors that `cache` holds."""
    tensors = [tensor for layer in cache.layers if layer.is_initialized for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
