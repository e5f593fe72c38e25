"""Speculative decoding with an EAGLE-3 draft: the loop behind `target.generate(assistant_model=draft)`.

    prefill     the target reads the prompt, its choice is the first token; its states go to the draft
    draft       the head reads the true states of what was accepted, then proposes a tree
    verify      the target reads root and proposals at once and chooses its own token after each accepted one
    keep        both caches drop what was not accepted; the states of the accepted path go to the draft

After every round the text is one token longer than the target's cache: the newest token, the root of the next round,
has been chosen but not read.

Source: EAGLE-3, arXiv:2503.01840.

Shapes: B batch, T tokens.
"""

import time
from contextlib import ExitStack, nullcontext

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from .caches import keep_path
from .chunks import ChunkLimit
from .continuations import Beginning, num_omitted
from .drafting import draft_tree
from .memory import DraftMemory
from .metrics import SpeculationStats
from .obstacles import takes_fixed_shapes
from .probing import can_branch
from .ragged import RaggedTexts
from .rope import ReadingLimits, check_omitted, check_reread
from .runtime import decode_at_fixed_shapes, slots_of
from .shelf import forget_elsewhere
from .sizing import ConstantSize, TreeSizer, sizes_for
from .support import TreePlan, check_call, draft_window, may_differ_in_length, pad_token, tree_plan
from .timing import CallTimes
from .traces import Traces
from .transcript import Transcript
from .tree import DraftTree
from .verification import TextsInStep, Verdict, read_tree
from .windows import forget_unseen, recorded_past, uneven_windows, whole_rounds


@torch.no_grad()
def generate(
    target: PreTrainedModel,
    draft,
    input_ids: Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    inputs_tensor: Tensor | None = None,
    tokenizer=None,
    assistant_tokenizer=None,
    **model_kwargs,
) -> GenerateDecoderOnlyOutput | Tensor:
    """
    Continues `input_ids` as plain `generate()` would, in fewer forwards of the target.

    Args:
        target (`PreTrainedModel`): The model whose text is generated.
        draft ([`Eagle3MLADraftModel`]): The head; its `generation_config` says how large the trees are.
        input_ids (`torch.LongTensor` of shape `(B, T)`): The prompts, padded on the left; beside a cache that is
            filled, as in plain generation, the whole texts or what is new of them.
        logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, model_kwargs:
            As `generate()` prepared them.
        inputs_tensor, tokenizer, assistant_tokenizer:
            Given by `generate()` to every assistant, not needed here.

    Returns:
        `torch.LongTensor` of shape `(B, T + new)`, or `GenerateDecoderOnlyOutput` for `return_dict_in_generate`.

    Raises:
        ValueError: If target and draft do not belong together.
        NotImplementedError: If the call asks for something that has no assisted form yet.

    **Effects**: `draft.speculation_stats` is replaced. The random generator ends where plain sampling leaves it.
    """
    check_call(target, draft, generation_config, synced_gpus, model_kwargs)
    wants_output = generation_config.return_dict_in_generate
    transcript = Transcript(
        input_ids,
        logits_processor,
        stopping_criteria,
        do_sample=bool(generation_config.do_sample),
        pad_token_id=pad_token(generation_config, input_ids),
        scores=() if wants_output and generation_config.output_scores else None,
        logits=() if wants_output and generation_config.output_logits else None,
        streamer=streamer,
        num_omitted=num_omitted(input_ids, generation_config, model_kwargs),
    )
    check_omitted(target, transcript)
    check_reread(target, transcript)
    traces = Traces.wanted_by(generation_config)
    stats = draft.speculation_stats = SpeculationStats(times=CallTimes(target.device, draft.device))
    try:
        cache = decode(target, draft, transcript, traces, stats, generation_config, model_kwargs)
    finally:
        stats.times.end()
        if streamer is not None:
            streamer.end()
    if not wants_output:
        return transcript.input_ids
    return GenerateDecoderOnlyOutput(
        sequences=transcript.input_ids,
        scores=transcript.scores,
        logits=transcript.logits,
        attentions=traces.attentions,
        hidden_states=traces.hidden_states,
        past_key_values=cache,
    )


def decode(
    target: PreTrainedModel,
    draft,
    transcript: Transcript,
    traces: Traces,
    stats: SpeculationStats,
    generation_config: GenerationConfig,
    model_kwargs: dict,
) -> Cache:
    """
    All rounds of one call; returns the target's cache, which holds the whole text but its last token.

    **Effects**: fills `transcript`, `traces` and `stats`.
    """
    forget_elsewhere(draft)
    captured = draft.capture_fused_states(target)
    beginning = Beginning.of_call(draft, model_kwargs["past_key_values"], transcript.input_ids, transcript.num_omitted)
    with captured, stats.times.prefill:
        outputs = target._prefill(transcript.input_ids, generation_config, model_kwargs)
    transcript.extend(outputs.logits[:, -1].to(dtype=torch.float32, device=transcript.input_ids.device, copy=True))
    traces.add_prompt(outputs)
    model_kwargs = target._update_model_kwargs_for_generation(outputs, model_kwargs)
    cache = outputs.past_key_values
    del outputs
    mask = model_kwargs.get("attention_mask")
    memory = beginning.memory(draft, target, captured.take(), transcript.input_ids, mask)
    stats.target_calls, stats.new_tokens = 1, len(transcript.input_ids)
    transcript.flush()
    stats.times.begin_rounds()

    limits = ReadingLimits.of(target, model_kwargs)
    limits.warn(target, transcript)
    may_differ = may_differ_in_length(target, transcript, traces.are_wanted, limits.are_reached(transcript))
    texts = RaggedTexts(transcript) if may_differ else TextsInStep(transcript)
    plan = largest_plan(draft, target, limits, texts.ids)
    is_finished = transcript.is_finished
    if not is_finished and takes_fixed_shapes(target, draft, plan, transcript, limits, traces, model_kwargs):
        is_finished = decode_at_fixed_shapes(target, draft, texts, stats, plan, memory, model_kwargs)
    if not is_finished:
        stats.times.time_forwards(target, draft)
        sizes = sizes_for(draft, target, plan, len(transcript.input_ids))
        cache, memory = decode_round_by_round(target, draft, texts, limits, traces, stats, sizes, memory, model_kwargs)
    stats.new_tokens -= texts.num_discarded
    beginning.remember(draft, cache, memory, transcript.input_ids, mask)
    return cache


def decode_round_by_round(
    target: PreTrainedModel,
    draft,
    texts: RaggedTexts | TextsInStep,
    limits: ReadingLimits,
    traces: Traces,
    stats: SpeculationStats,
    sizes: TreeSizer | ConstantSize,
    memory: DraftMemory,
    model_kwargs: dict,
) -> tuple[Cache, DraftMemory]:
    """
    All rounds of one call, each with tensors of its own size; returns what both models remember in the end.

    **Effects**: fills `texts`, `traces` and `stats`; moves the target's cache and `memory` on.
    """
    transcript, cache, limit = texts.transcript, model_kwargs["past_key_values"], ChunkLimit.of(target)
    limit.warn(target, transcript.max_slots)
    captured = draft.capture_fused_states(target)
    with ExitStack() as windows:
        # Only now: recorded from the start, a sliding-window layer would keep the whole prompt.
        windows.enter_context(recorded_past(cache))
        windows.enter_context(uneven_windows(cache) if texts.lengths else nullcontext())
        while not transcript.is_finished:
            began = time.perf_counter()
            plan = limits.fit(sizes.choose().at_most(transcript.max_new_tokens - 1), texts.ids)
            plan = plan.at_most(limit.depth(plan.depth, slots_of(texts)))
            tree = draft_tree(draft, target, memory, plan, transcript.logits_processor, texts.noise)
            tree = texts.fit(tree, plan.depth)
            with whole_rounds(cache, transcript):
                with captured:
                    outputs, logits = read_tree(
                        target, tree, texts.ids, model_kwargs, texts.lengths, transcript.max_slots
                    )
                verdict = texts.accept(tree, logits)
                record_round(stats, tree, verdict, memory)
                transcript.flush()
            if outputs.past_key_values is cache:
                traces.add_path(target, outputs, verdict.path)
                model_kwargs = keep(target, tree, verdict, outputs, model_kwargs)
                with stats.times.draft:
                    states = captured.take(verdict.path)
                memory.await_rows(states, verdict.tokens, verdict.num_kept)
            else:  # the whole text has been read again, see `rope.py`
                traces.add_prompt(outputs)
                model_kwargs = target._update_model_kwargs_for_generation(outputs, model_kwargs)
                cache, mask = outputs.past_key_values, model_kwargs.get("attention_mask")
                windows.enter_context(recorded_past(cache))
                memory = DraftMemory.of_prompt(captured.take(), texts.ids, mask, draft_window(draft))
            del outputs, logits
            sizes.record(plan, verdict.walks.ranks, time.perf_counter() - began)
    return cache, memory


def largest_plan(draft, target: PreTrainedModel, limits: ReadingLimits, ids: Tensor) -> TreePlan:
    """The size that the draft's settings ask for: as a chain where the target cannot read trees, 0 beyond `limits`."""
    plan = tree_plan(draft)
    if limits.forbid_drafting(ids):
        return plan.within(0)
    return plan if plan.top_k == 1 or can_branch(target) else plan.as_chain()


def record_round(stats: SpeculationStats, tree: DraftTree, verdict: Verdict, memory: DraftMemory) -> None:
    """Counts a round."""
    stats.target_calls += 1
    stats.record(verdict.walks, len(tree) - 1, tree.deepest)
    stats.draft_cache_bytes, stats.draft_cache_tokens = memory.num_bytes, memory.cache.get_seq_length()


def keep(target: PreTrainedModel, tree: DraftTree, verdict: Verdict, outputs, model_kwargs: dict) -> dict:
    """
    Lets the target forget what was not accepted.

    Returns:
        `dict`: Its generation state for the longest sequence.

    **Effects**: shortens the cache.
    """
    cache = outputs.past_key_values
    num_before = cache.get_seq_length() - len(tree)
    keep_path(cache, len(tree), verdict.path, verdict.lengths, verdict.num_kept, tree.is_chain)
    forget_unseen(cache, min(map(sum, zip(verdict.lengths, verdict.num_kept, strict=True))))
    num_new = cache.get_seq_length() - num_before
    if num_new > 0:
        model_kwargs = target._update_model_kwargs_for_generation(outputs, model_kwargs, num_new_tokens=num_new)
    return model_kwargs
