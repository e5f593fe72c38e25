"""Speculative decoding with an EAGLE-3 draft: the loop behind `target.generate(assistant_model=draft)`.

    prefill     the target reads the prompt, its choice is the first token; its states go to the draft
    draft       the head reads the true states of what was accepted, then proposes a tree
    verify      the target reads root and proposals at once and chooses its own token after each accepted one
    keep        both caches drop what was not accepted; the states of the accepted path go to the draft

After every round the text is one token longer than the target's cache: the newest token, the root of the next round,
has been chosen but not read.

Source: EAGLE-3, arXiv:2503.01840.
"""

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from .branching import can_branch
from .caches import cache_bytes, keep_path
from .drafting import DraftMemory, draft_tree
from .metrics import SpeculationStats
from .support import check_call, tree_plan
from .timing import CallTimes
from .transcript import Transcript
from .verification import accept_path, read_tree


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
        input_ids (`torch.LongTensor` of shape `(1, T)`): The prompt.
        logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, model_kwargs:
            As `generate()` prepared them.
        inputs_tensor, tokenizer, assistant_tokenizer:
            Given by `generate()` to every assistant, not needed here.

    Returns:
        `torch.LongTensor` of shape `(1, T + new)`, or `GenerateDecoderOnlyOutput` for `return_dict_in_generate`.

    Raises:
        ValueError: If target and draft do not belong together.
        NotImplementedError: If the call asks for something that has no assisted form yet.

    **Effects**: `draft.speculation_stats` is replaced. The random generator ends where plain sampling leaves it.
    """
    check_call(target, draft, input_ids, generation_config, synced_gpus, model_kwargs)
    wants_output = generation_config.return_dict_in_generate
    transcript = Transcript(
        input_ids,
        logits_processor,
        stopping_criteria,
        do_sample=bool(generation_config.do_sample),
        scores=() if wants_output and generation_config.output_scores else None,
        logits=() if wants_output and generation_config.output_logits else None,
        streamer=streamer,
    )
    stats = draft.speculation_stats = SpeculationStats(times=CallTimes(target.device, draft.device))
    try:
        cache = decode(target, draft, transcript, stats, generation_config, model_kwargs)
    finally:
        stats.times.end()
        if streamer is not None:
            streamer.end()
    if not wants_output:
        return transcript.input_ids
    return GenerateDecoderOnlyOutput(
        sequences=transcript.input_ids, scores=transcript.scores, logits=transcript.logits, past_key_values=cache
    )


def decode(
    target: PreTrainedModel,
    draft,
    transcript: Transcript,
    stats: SpeculationStats,
    generation_config: GenerationConfig,
    model_kwargs: dict,
) -> Cache:
    """
    All rounds of one call; returns the target's cache, which holds the whole text but its last token.

    **Effects**: fills `transcript` and `stats`.
    """
    captured = draft.capture_aux_hidden_states(target)
    with captured, stats.times.prefill:
        outputs = target._prefill(transcript.input_ids, generation_config, model_kwargs)
    transcript.extend(outputs.logits[:, -1].to(dtype=torch.float32, device=transcript.input_ids.device, copy=True))
    model_kwargs = target._update_model_kwargs_for_generation(outputs, model_kwargs)
    cache = outputs.past_key_values
    # Only now: recorded from the start, a sliding-window layer would keep the whole prompt.
    cache.activate_past_recording()
    memory = first_memory(captured.take(), transcript.input_ids, model_kwargs)
    stats.target_calls, stats.new_tokens = 1, 1
    transcript.flush()
    stats.times.begin_rounds(target, draft)

    while not transcript.is_finished:
        plan = tree_plan(draft).at_most(transcript.max_new_tokens - 1)
        if plan.top_k > 1 and not can_branch(target):
            plan = plan.as_chain()
        tree = draft_tree(draft, target, memory, plan, transcript.logits_processor, transcript.noise)
        with captured:
            outputs, logits = read_tree(target, tree, transcript, model_kwargs)
        verdict = accept_path(tree, logits, transcript)

        num_kept, path = len(verdict.path), torch.tensor(verdict.path, device=tree.token_ids.device)
        keep_path(cache, len(tree), path)
        model_kwargs = target._update_model_kwargs_for_generation(outputs, model_kwargs, num_new_tokens=num_kept)
        states = captured.take()
        memory.await_rows(states[:, path.to(states.device)], transcript.input_ids[:, -num_kept:])

        stats.target_calls += 1
        stats.record(num_kept, verdict.num_accepted, verdict.num_tried, tree.deepest)
        stats.drafted_nodes += len(tree) - 1
        stats.draft_cache_bytes, stats.draft_cache_tokens = cache_bytes(memory.cache), memory.cache.get_seq_length()
        transcript.flush()
    return cache


def first_memory(aux_hidden_states: Tensor, input_ids: Tensor, model_kwargs: dict) -> DraftMemory:
    """The prompt's rows, all pending: states `(1, T, 3 * Dt)` and tokens `(1, T + 1)`, without padding."""
    tokens = input_ids
    mask = model_kwargs.get("attention_mask")
    if mask is not None and mask[0, :-1].any():
        is_token = mask[0].bool()
        tokens, aux_hidden_states = tokens[:, is_token], aux_hidden_states[:, is_token[:-1]]
    return DraftMemory(aux_hidden_states, tokens[:, 1:])
