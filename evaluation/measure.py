"""Plain and assisted generation on the same prompts, counted in the same way.

Both are calls of the target's own `generate()` that differ in `assistant_model` only. Tokens are emitted tokens, never
drafted ones; the prefill is part of both times; a first call of each kind is left out as warm-up. With one seed for
both calls the texts must be equal token for token, whether greedy or sampled.

Shapes: T prompt tokens, D draft hidden size, Dt target hidden size, V the target's vocabulary.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .prompts import Prompt

WARM_UP_TOKENS = 8
CACHE_PROBE_TOKENS = 16


@dataclass(frozen=True)
class Decoding:
    """How every text is generated.

    Args:
        max_new_tokens (`int`): Bound of each text.
        do_sample (`bool`): Sampling instead of the most likely token.
        temperature (`float`): Used when sampling.
        seeds (`tuple[int, ...]`): Each prompt is sampled once per seed; a greedy evaluation needs one.
    """

    max_new_tokens: int = 128
    do_sample: bool = False
    temperature: float = 1.0
    seeds: tuple[int, ...] = (0,)

    def generate_arguments(self) -> dict[str, Any]:
        sampling = {"do_sample": True, "temperature": self.temperature} if self.do_sample else {"do_sample": False}
        return {"max_new_tokens": self.max_new_tokens, **sampling}


@dataclass(frozen=True)
class Run:
    """One call of `generate()`: the emitted tokens without the prompt, and its duration."""

    token_ids: list[int]
    seconds: float


@dataclass(frozen=True)
class Divergence:
    """Where assisted text leaves plain text.

    Args:
        prompt (`str`): Name of the prompt.
        seed (`int`): Seed of both calls.
        position (`int`): Index among the new tokens.
        plain_token (`int`, *optional*): `None` where the plain text had ended.
        assisted_token (`int`, *optional*): `None` where the assisted text had ended.
        logit_gap (`float`, *optional*): How much the target prefers the plain token, recomputed on the common prefix:
            the difference of the two logits, when sampling with the noise that they were compared with. Rounding
            shows as a gap of a few spacings, on either side of 0. `None` where a text had ended.
        logit_spacing (`float`, *optional*): At most so far apart are neighbouring numbers of the target's dtype at
            the larger of the two logits.
    """

    prompt: str
    seed: int
    position: int
    plain_token: int | None
    assisted_token: int | None
    logit_gap: float | None
    logit_spacing: float | None


@dataclass(frozen=True)
class Comparison:
    """Both texts for one prompt and seed, with the draft's statistics of the assisted call."""

    prompt: str
    seed: int
    plain: Run
    assisted: Run
    stats: Any
    divergence: Divergence | None


def generate_timed(
    target: PreTrainedModel, input_ids: Tensor, decoding: Decoding, seed: int, draft: PreTrainedModel | None = None
) -> Run:
    """One text from `target`, assisted where there is a `draft`.

    Args:
        input_ids (`torch.Tensor` of shape `(1, T)`): The prompt.

    Effects:
        Seeds torch's global generator with `seed`.
    """
    torch.manual_seed(seed)
    wait_for_device(target.device)
    start = time.perf_counter()
    output = target.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        assistant_model=draft,
        **decoding.generate_arguments(),
    )
    token_ids = output[0, input_ids.shape[1] :].tolist()
    wait_for_device(target.device)
    return Run(token_ids, time.perf_counter() - start)


def wait_for_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def find_divergence(plain_ids: list[int], assisted_ids: list[int]) -> int | None:
    """The first index at which the two texts differ, in length too; `None` if they are equal."""
    pairs = zip_longest(plain_ids, assisted_ids)
    return next((position for position, (plain, assisted) in enumerate(pairs) if plain != assisted), None)


@torch.no_grad()
def logit_gap(
    target: PreTrainedModel, prefix_ids: Tensor, tokens: tuple[int, int], noise: Tensor | None
) -> tuple[float, float]:
    """
    How much the target prefers the first of two tokens to the second after `prefix_ids (1, T)`, and what rounding is.

    Args:
        noise (`torch.Tensor` of shape `(V,)`, *optional*): Added to the logits before they are compared.

    Returns:
        The difference, and the spacing of the target's dtype at the larger of the two logits.
    """
    logits = target(prefix_ids).logits[0, -1].float()  # (V,)
    spacing = torch.finfo(target.dtype).eps * logits[list(tokens)].abs().max()
    scores = logits if noise is None else logits + noise.to(logits.device)
    return (scores[tokens[0]] - scores[tokens[1]]).item(), spacing.item()


def sampling_noise(target: PreTrainedModel, decoding: Decoding, seed: int, position: int) -> Tensor | None:
    """
    What the logits of a new token have added before the largest is chosen, `(V,)`; `None` for greedy texts.

    `torch.multinomial(softmax(logits / t), 1)` is `argmax(logits - t * log(e))`, with one exponential draw `e` for
    each new token.
    """
    if not decoding.do_sample:
        return None
    generator = torch.Generator(target.device).manual_seed(seed)
    draw = torch.empty(1, target.config.get_text_config(decoder=True).vocab_size, device=target.device)
    for _ in range(position + 1):
        draw.exponential_(1, generator=generator)
    return -decoding.temperature * draw[0].log()


def describe_divergence(
    target: PreTrainedModel,
    prompt: Prompt,
    decoding: Decoding,
    seed: int,
    plain_ids: list[int],
    assisted_ids: list[int],
) -> Divergence | None:
    position = find_divergence(plain_ids, assisted_ids)
    if position is None:
        return None
    tokens = tuple(ids[position] if position < len(ids) else None for ids in (plain_ids, assisted_ids))
    gap = spacing = None
    if None not in tokens:
        prefix = torch.cat([prompt.input_ids, prompt.input_ids.new_tensor([plain_ids[:position]])], dim=1)
        noise = sampling_noise(target, decoding, seed, position)
        gap, spacing = logit_gap(target, prefix.to(target.device), tokens, noise)
    return Divergence(prompt.name, seed, position, *tokens, gap, spacing)


def warm_up(target: PreTrainedModel, draft: PreTrainedModel, prompt: Prompt, decoding: Decoding) -> None:
    """One short call of each kind, for what only the first call pays (kernel choice, compilation)."""
    short = Decoding(WARM_UP_TOKENS, decoding.do_sample, decoding.temperature)
    for assistant in (None, draft):
        generate_timed(target, prompt.input_ids.to(target.device), short, seed=0, draft=assistant)


def compare(target: PreTrainedModel, draft: PreTrainedModel, prompt: Prompt, decoding: Decoding, seed: int):
    """Generates one prompt plainly and assisted.

    Returns:
        `Comparison`
    """
    input_ids = prompt.input_ids.to(target.device)
    plain = generate_timed(target, input_ids, decoding, seed)
    assisted = generate_timed(target, input_ids, decoding, seed, draft=draft)
    divergence = describe_divergence(target, prompt, decoding, seed, plain.token_ids, assisted.token_ids)
    return Comparison(prompt.name, seed, plain, assisted, draft.speculation_stats, divergence)


def compare_all(
    target: PreTrainedModel, draft: PreTrainedModel, prompts: list[Prompt], decoding: Decoding
) -> Iterator[Comparison]:
    """Yields a comparison for each prompt and seed, after the warm-up; greedy decoding needs one seed."""
    seeds = decoding.seeds if decoding.do_sample else decoding.seeds[:1]
    warm_up(target, draft, prompts[0], decoding)
    for prompt in prompts:
        for seed in seeds:
            yield compare(target, draft, prompt, decoding, seed)


def summarise(comparisons: list[Comparison]) -> dict[str, Any]:
    """Pools all comparisons: every round, token and second counts once.

    Args:
        comparisons (`list[Comparison]`): At least one.

    Returns:
        `dict`: The measured part of `results.json`; `report.py` documents its keys.
    """
    stats = [comparison.stats for comparison in comparisons]
    divergences = [comparison.divergence for comparison in comparisons if comparison.divergence is not None]
    plain_rate = tokens_per_second([comparison.plain for comparison in comparisons])
    assisted_rate = tokens_per_second([comparison.assisted for comparison in comparisons])
    round_lengths = [length for one in stats for length in one.acceptance_lengths]
    drafted = sum_by_depth([one.drafted_by_depth for one in stats])
    accepted = sum_by_depth([one.accepted_by_depth for one in stats])
    num_tokens = sum(len(comparison.assisted.token_ids) for comparison in comparisons)
    return {
        "acceptance_length": sum(round_lengths) / max(len(round_lengths), 1),
        "acceptance_by_depth": [hits / reached for hits, reached in zip(accepted, drafted, strict=True) if reached],
        "drafted_by_depth": drafted,
        "accepted_by_depth": accepted,
        "target_calls_per_token": sum(one.target_calls for one in stats) / max(num_tokens, 1),
        "plain_tokens_per_second": plain_rate,
        "assisted_tokens_per_second": assisted_rate,
        "speedup": assisted_rate / plain_rate,
        **sum_seconds(stats),
        "lossless": not divergences,
        "num_divergent": len(divergences),
        "first_divergence": vars(divergences[0]) if divergences else None,
        "num_prompts": len({comparison.prompt for comparison in comparisons}),
        "num_texts": len(comparisons),
        "num_rounds": len(round_lengths),
        "num_tokens": num_tokens,
    }


def describe_texts(comparisons: list[Comparison]) -> list[dict[str, Any]]:
    """What `texts.jsonl` says of each text."""
    return [
        {
            "prompt": one.prompt,
            "seed": one.seed,
            "num_tokens": len(one.assisted.token_ids),
            "acceptance_lengths": one.stats.acceptance_lengths,
            "divergence": vars(one.divergence) if one.divergence is not None else None,
        }
        for one in comparisons
    ]


def sum_seconds(stats: list) -> dict[str, float]:
    """Seconds of the assisted calls, and the share of the rounds in which neither model was in a forward."""
    parts = ("prefill_seconds", "draft_seconds", "target_seconds", "host_seconds")
    seconds = {name: sum(getattr(one, name) for one in stats) for name in parts}
    in_rounds = sum(seconds.values()) - seconds["prefill_seconds"]
    return seconds | {"host_share": seconds["host_seconds"] / in_rounds if in_rounds else 0.0}


def tokens_per_second(runs: list[Run]) -> float:
    return sum(len(run.token_ids) for run in runs) / sum(run.seconds for run in runs)


def sum_by_depth(counts: list[list[int]]) -> list[int]:
    """Column sums of rows that may differ in length."""
    return [sum(column) for column in zip_longest(*counts, fillvalue=0)]


@torch.no_grad()
def cache_bytes_per_token(draft: PreTrainedModel) -> float:
    """Bytes that the draft's cache holds per position, counted on the tensors of a short forward.

    Args:
        draft ([`~transformers.PreTrainedModel`]): Any draft head.
    """
    config, like = draft.config, {"device": draft.device, "dtype": draft.dtype}
    cache = DynamicCache()
    draft(
        inputs_embeds=torch.zeros(1, CACHE_PROBE_TOKENS, config.hidden_size, **like),  # (1, T, D)
        aux_hidden_states=torch.zeros(1, CACHE_PROBE_TOKENS, 3 * config.target_hidden_size, **like),  # (1, T, 3Dt)
        position_ids=torch.arange(CACHE_PROBE_TOKENS, device=draft.device)[None],
        past_key_values=cache,
    )
    return sum(states.nbytes for layer in cache.layers for states in (layer.keys, layer.values)) / CACHE_PROBE_TOKENS


def standard_head_like(draft: PreTrainedModel) -> PreTrainedModel:
    """A random draft of the same shape with the standard EAGLE-3 attention, which caches keys and values.

    Its `lm_head` has one row: the cache does not depend on it, and the target's would be the largest weight.
    """
    fields = draft.config.to_dict() | {
        "attention_type": "gqa",
        "mla_rope_dim": 0,
        "mla_q_lora_rank": None,
        "draft_vocab_size": 1,
    }
    return type(draft)(type(draft.config)(**fields)).to(draft.device, draft.dtype)
