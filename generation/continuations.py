"""Continuations: calls whose cache already holds the beginning of the text, as in a chat's second turn.

The target does not read that beginning again, so there are no states of it, and the draft's rows begin with the first
token that is read. Their positions count from there: RoPE knows differences only.
"""

from torch import Tensor
from transformers import Cache, GenerationConfig


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
            f"they and `past_key_values` ({num_given + num_cached}) where they are what is new, got {num_tokens}."
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
