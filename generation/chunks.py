"""Chunks: whether, and how far, a target reads several tokens at once as it reads them one by one.

Every round rests on it, and no target says whether it does. That it keeps a cache and reads from left to right is
tried on a few tokens; what shows in long texts only is known by name: there each token is read alone, as in plain
generation.

Shapes: T tokens, V vocabulary.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from .devices import input_device
from .modules import devices_of, modules_of
from .notices import warn_once
from .probing import TOLERATED_SHARE, TOLERATED_SHARE_IN_HALF_PRECISION

# Their windows are in the cache alone: of a chunk, all tokens but the last see more than they would by themselves.
TYPES_WITH_WINDOWS_OF_CACHE = ("moshi",)
# Attention is to so many keys: of DeepSeek-V3.2, of Doge.
NAMES_OF_CHOSEN_KEYS = ("index_topk", "keep_window_size")
_known_targets: WeakKeyDictionary[PreTrainedModel, dict] = WeakKeyDictionary()


@dataclass(frozen=True)
class ChunkLimit:
    """
    The length beyond which a target reads each token alone.

    Args:
        num_tokens (`int`, *optional*): So many it may have read after a round, padding included; `None`: any number.
        reason (`str`): What happens beyond.
    """

    num_tokens: int | None
    reason: str = ""

    @classmethod
    def of(cls, target: PreTrainedModel) -> "ChunkLimit":
        """The limit of a target, by its configuration."""
        config = target.config.get_text_config(decoder=True)
        for name in NAMES_OF_CHOSEN_KEYS:
            if (num_keys := getattr(config, name, None)) is not None:
                return cls(num_keys, f"it chooses `{name}` ({num_keys}) keys, and not the same of equally good ones")
        if config.model_type == "git":
            return cls(0, "one token gets another mask than several")
        if config.model_type in TYPES_WITH_WINDOWS_OF_CACHE and config.sliding_window is not None:
            return cls(config.sliding_window, f"its mask does not know its `sliding_window` ({config.sliding_window})")
        return cls(None)

    def depth(self, depth: int, num_tokens: int) -> int:
        """How deep a tree may be, at most `depth`, after the last of so many tokens."""
        return depth if self.num_tokens is None else max(0, min(depth, self.num_tokens - num_tokens))

    def warn(self, target: PreTrainedModel, max_length: int) -> None:
        """Says once that drafting stops, if a text of `max_length` tokens can become so long."""
        if self.num_tokens is not None and max_length > self.num_tokens:
            warn_once(
                f"{type(target).__name__} reads several tokens at once as one by one up to {self.num_tokens} tokens "
                f"only: beyond, {self.reason}. Nothing is drafted there."
            )


def check_chunks(target: PreTrainedModel, target_cache: Cache) -> None:
    """
    Refuses a target that cannot be told to read several tokens as it reads them one by one.

    Args:
        target (`PreTrainedModel`): Any target.
        target_cache (`Cache`): The one that it will use.

    Raises:
        NotImplementedError: Says what it does instead.

    **Effects**: calls the target, in evaluation mode once for each of its settings.
    """
    name = type(target).__name__
    if draws_random_numbers(target, lambda: _read_some(target)):
        raise NotImplementedError(
            f"{name} is in training mode and draws random numbers, as for dropout: its text would not be that of "
            "plain generation. Call `target.eval()`."
        )
    _check_layers(name, target_cache)
    if getattr(target.config.get_text_config(decoder=True), "cross_attention_layers", None):
        raise NotImplementedError(
            f"{name} has `cross_attention_layers`, which keep an image in the cache that a round would shorten. "
            "Pass no `assistant_model`."
        )
    known = _known_targets.setdefault(target, {})
    settings = target.config._attn_implementation, target.dtype, getattr(target.config, "is_causal", None)
    if settings not in known:
        known[settings] = _why_not(target)
    if known[settings] is not None:
        raise NotImplementedError(f"{name} {known[settings]}")


def _check_layers(name: str, cache: Cache) -> None:
    others = {type(layer).__name__ for layer in cache.layers if not keeps_keys_and_values(layer)}
    if others:
        raise NotImplementedError(
            f"The layers of {name}'s cache must keep keys and values, got {', '.join(sorted(others))}: a round could "
            "not take back there what it rejects. Pass no `assistant_model`."
        )
    if any(layer.is_sliding and layer.sliding_window < 2 for layer in cache.layers):
        raise NotImplementedError(
            f"The `sliding_window` of {name} must be at least 2 for an EAGLE-3 draft, got 1, with which the "
            "cache drops nothing. Pass no `assistant_model`."
        )


def keeps_keys_and_values(layer) -> bool:
    """Whether a layer of a cache does, and keeps no states of convolutions or recurrences beside them."""
    return isinstance(layer, CacheLayerMixin) and not isinstance(layer, LinearAttentionCacheLayerMixin)


@torch.no_grad()
def draws_random_numbers(model: PreTrainedModel, forward: Callable[[], object]) -> bool:
    """Whether a `forward` of `model` moves a random generator, if any of its modules is in training mode."""
    modules = modules_of(model)
    if not any(module.training for module in modules):
        return False
    on_gpu = [device for device in devices_of(modules) if device.type == "cuda"]
    with torch.random.fork_rng(on_gpu):
        before = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, on_gpu)]
        forward()
        after = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, on_gpu)]
    return not all(map(torch.equal, before, after))


def _read_some(target: PreTrainedModel) -> None:
    target(input_ids=torch.arange(5, device=input_device(target))[None], use_cache=False)


@torch.no_grad()
def _why_not(target: PreTrainedModel) -> str | None:
    """What `target` does instead of reading from left to right into a cache, and the way out; `None`: nothing."""
    tokens = torch.arange(6, device=input_device(target))
    read = [_read_chunk(target, tokens[:2], chunk) for chunk in (tokens[2:5], tokens[[2, 3, 5]])]
    is_encoder = getattr(target.config, "is_decoder", None) is False
    remedy = "Load it with `is_decoder=True`." if is_encoder else "Pass no `assistant_model`."
    if any(logits is None for logits in read):
        return f"keeps no key-value cache, without which a draft saves nothing. {remedy}"
    difference = (read[0] - read[1]).abs().amax(dim=-1)
    # Quantised kernels may scale a token by its neighbours.
    is_exact = getattr(target.config, "quantization_config", None) is None
    tolerated = TOLERATED_SHARE.get(target.dtype) if is_exact else None
    tolerated = tolerated or TOLERATED_SHARE_IN_HALF_PRECISION
    if (difference[:-1] > tolerated * difference[-1]).any():
        return f"lets tokens see later ones, so that it cannot read several at once. {remedy}"
    return None


def _read_chunk(target: PreTrainedModel, prompt: Tensor, chunk: Tensor) -> Tensor | None:
    """The target's logits `(T, V)` after each token of `chunk (T,)`, fp32; `None` if it has no cache."""
    cache, ids = DynamicCache(config=target.config), torch.cat([prompt, chunk])[None]
    takes_positions = "position_ids" in inspect.signature(target.forward).parameters
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    for start, stop in (0, len(prompt)), (len(prompt), ids.shape[1]):
        inputs = target.prepare_inputs_for_generation(
            ids[:, :stop],
            next_sequence_length=stop - start,
            past_key_values=cache,
            attention_mask=torch.ones_like(ids[:, :stop]),
            use_cache=True,
            # Qwen2.5-VL and its kin would count those of all tokens, and remember it for a later turn.
            **({"position_ids": positions[:, :stop]} if takes_positions else {}),
        )
        outputs = target(**inputs, return_dict=True)
        cache = getattr(outputs, "past_key_values", None)
        if cache is None or cache.get_seq_length() != stop:
            return None
    return outputs.logits[0, -len(chunk) :].float()
