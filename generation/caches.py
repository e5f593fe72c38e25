"""What the two models remember, and how a round's rejected nodes are forgotten.

The target's cache is the one that `generate()` prepared. The draft's holds latents in transformers' own cache layers:
keys are `c_kv (B, 1, T, C)`, values `k_rope (B, 1, T, R)`.
"""

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


def cache_bytes(cache: Cache) -> int:
    """Bytes of the tensors that `cache` holds."""
    tensors = [tensor for layer in cache.layers if layer.is_initialized for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
