"""What the two models remember, and how a round's rejected nodes are forgotten.

The target's cache is the one that `generate()` prepared. The draft's holds latents in transformers' own cache layers:
keys are `c_kv (B, 1, T, C)`, values `k_rope (B, 1, T, R)`.
"""

import torch
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
    is_moved = not is_chain or min(lengths) < num_before
    for layer in cache.layers if is_moved else ():
        if layer.is_initialized:
            # A sliding window holds the newest slots only.
            first = layer.get_seq_length() - layer.keys.shape[-2]
            starts = torch.tensor(lengths, device=layer.keys.device) - first
            slots = starts[:, None] + torch.arange(path.shape[1], device=starts.device)  # (B, P)
            for states in (layer.keys, layer.values):
                newest = states[:, :, -num_nodes:]
                chosen = path.to(states.device)[:, None, :, None].expand(*newest.shape[:2], -1, newest.shape[-1])
                states.scatter_(2, slots[:, None, :, None].expand_as(chosen), newest.gather(2, chosen))
    forget_last(cache, num_before + num_nodes - longest)


def cache_bytes(cache: Cache) -> int:
    """Bytes of the tensors that `cache` holds."""
    tensors = [tensor for layer in cache.layers if layer.is_initialized for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
