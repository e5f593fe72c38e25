"""What assisted decoding takes, checked before any work begins.

Everything that `generate()` accepts and that has no exact assisted form is refused here by name, never approximated.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation import logits_process, stopping_criteria

from .chunks import check_chunks, draws_random_numbers
from .draft_window import DEFAULT_SINK, DraftWindow
from .notices import warn_once
from .probing import can_branch
from .sampling import STATELESS_WARPERS, is_stateless
from .transcript import Transcript

# Depth of the trees with which EAGLE-2 and EAGLE-3 are reported: the published code expands 7 times after the first.
DEFAULT_TREE_DEPTH = 8
# transformers' own names: fixed, or by what earlier rounds of all calls, or of the same one, accepted.
SCHEDULES = ("constant", "heuristic", "heuristic_transient")
# Processors and criteria of transformers that are functions of one sequence's text: no state, no random numbers, no
# functions of the user's (`prefix_allowed_tokens_fn` may know which texts it will see).
PREFIX_PROCESSORS = (
    logits_process.EncoderNoRepeatNGramLogitsProcessor,
    logits_process.EncoderRepetitionPenaltyLogitsProcessor,
    logits_process.ExponentialDecayLengthPenalty,
    logits_process.ForcedBOSTokenLogitsProcessor,
    logits_process.ForcedEOSTokenLogitsProcessor,
    logits_process.InfNanRemoveLogitsProcessor,
    logits_process.LogitNormalization,
    logits_process.MinLengthLogitsProcessor,
    logits_process.MinNewTokensLengthLogitsProcessor,
    logits_process.NoBadWordsLogitsProcessor,
    logits_process.NoRepeatNGramLogitsProcessor,
    logits_process.RepetitionPenaltyLogitsProcessor,
    logits_process.SequenceBiasLogitsProcessor,
    logits_process.SuppressTokensAtBeginLogitsProcessor,
    logits_process.SuppressTokensLogitsProcessor,
)
STOCK_CRITERIA = (
    stopping_criteria.EosTokenCriteria,
    stopping_criteria.MaxLengthCriteria,
    stopping_criteria.MaxTimeCriteria,
    stopping_criteria.StopStringCriteria,
)


@dataclass(frozen=True)
class TreePlan:
    """
    Size of the trees of a call.

    Args:
        num_nodes (`int`): Nodes besides the root.
        depth (`int`): Steps from the root to the deepest node.
        top_k (`int`): Nodes that are continued at each depth, and continuations of each; 1 makes a chain.
        confidence_threshold (`float`, *optional*): Drafting ends with the first depth at which the draft gives every
            proposal a probability below. `None`: it never does.
    """

    num_nodes: int
    depth: int
    top_k: int
    confidence_threshold: float | None

    @property
    def is_chain(self) -> bool:
        """Whether no node has two continuations."""
        return self.top_k == 1 or self.depth == 0

    def at_most(self, depth: int) -> "TreePlan":
        """The plan for a text that ends after `depth` further tokens."""
        return replace(self, depth=min(self.depth, depth))

    def within(self, num_nodes: int) -> "TreePlan":
        """The plan for a forward of at most `num_nodes` nodes besides the root."""
        return replace(self, num_nodes=min(self.num_nodes, num_nodes), depth=min(self.depth, num_nodes))

    def as_chain(self) -> "TreePlan":
        """The chain that is as deep as the tree."""
        return replace(self, top_k=1)


def check_call(
    target: PreTrainedModel,
    draft,
    generation_config: GenerationConfig,
    synced_gpus: bool,
    model_kwargs: dict,
) -> None:
    """
    Refuses what cannot be decoded exactly.

    Raises:
        ValueError: If target and draft do not belong together, or a setting is out of bounds.
        NotImplementedError: If the call asks for something that has no assisted form yet.
    """
    draft.check_target(target)
    tree_plan(draft)
    schedule(draft)
    draft_window(draft)
    fixed_shapes(draft)
    compile_config(draft)
    _check_draft(draft)
    _check_cache(generation_config, model_kwargs)
    if model_kwargs.get("inputs_embeds") is not None:
        raise NotImplementedError("`inputs_embeds` must be None: an EAGLE-3 draft needs the prompt's `input_ids`.")
    if target.config.is_encoder_decoder:
        raise NotImplementedError("An EAGLE-3 draft assists decoder-only targets, got an encoder-decoder.")
    # The property has another name in 5.17, where the new one is absent, than in 5.23, where the old one warns.
    if target.training and any(getattr(module, "gradient_checkpointing", False) for module in target.modules()):
        raise NotImplementedError(
            "`target` must not be in training mode with gradient checkpointing, which keeps no cache. Call "
            "`target.eval()`."
        )
    if synced_gpus:
        raise NotImplementedError("`synced_gpus=True` is not supported with an EAGLE-3 draft, pass False.")
    if generation_config.assistant_ensemble_weight is not None:
        raise NotImplementedError(
            "`assistant_ensemble_weight` changes the text and is not supported with an EAGLE-3 draft, pass None."
        )
    check_chunks(target, model_kwargs["past_key_values"])


def may_differ_in_length(target: PreTrainedModel, transcript: Transcript, is_traced: bool, changes_rope: bool) -> bool:
    """
    Whether every sequence may go on at its own pace, or must wait for the others at every token.

    A single sequence waits for nobody: there it decides whether the target chooses at all nodes at once.

    Args:
        target (`PreTrainedModel`): The target.
        transcript ([`Transcript`]): The text, with its processors and criteria.
        is_traced (`bool`): Whether hidden states or attentions are wanted, an entry for each token of all sequences.
        changes_rope (`bool`): Whether the text may reach a length at which the target reads it otherwise.

    **Effects**: where a batch must go on in step, the log says so once, with the reason.
    """
    criteria = [type(each).__name__ for each in transcript.stopping_criteria if type(each) not in STOCK_CRITERIA]
    if len(transcript.input_ids) == 1:
        return not is_traced and not criteria and all(map(is_stateless, transcript.logits_processor))
    known = STATELESS_WARPERS + PREFIX_PROCESSORS
    others = criteria + [type(each).__name__ for each in transcript.logits_processor if type(each) not in known]
    reason = None
    if others:
        reason = f"{', '.join(others)} may depend on how often or in which order texts are shown"
    elif is_traced:
        reason = "`output_hidden_states` and `output_attentions` have one entry for each token of all sequences"
    elif changes_rope:
        reason = f"{type(target).__name__} changes its RoPE factors for all sequences at once"
    elif not can_branch(target):
        reason = f"{type(target).__name__} takes no masks for sequences of different lengths"
    if reason is not None:
        warn_once(f"The sequences of the batch accept equally many draft tokens per round: {reason}.")
    return reason is None


def pad_token(generation_config: GenerationConfig, input_ids: Tensor) -> Tensor | None:
    """The token that finished sequences get, a scalar on the device of `input_ids`."""
    token = generation_config._pad_token_tensor
    return None if token is None else token.to(input_ids.device)


def tree_plan(draft) -> TreePlan:
    """
    What `draft.generation_config` asks for.

    Read are `num_assistant_tokens`, `assistant_tree_top_k` (absent: 1, a chain), `assistant_tree_depth` (absent: 8; a
    chain is as long as it has tokens) and `assistant_confidence_threshold`.

    Raises:
        ValueError: If one of them is out of its bounds.
    """
    num_nodes = _integer_setting(draft, "num_assistant_tokens", 0, draft.default_num_assistant_tokens)
    top_k = _integer_setting(draft, "assistant_tree_top_k", 1, 1)
    if top_k > draft.config.draft_vocab_size:
        raise ValueError(
            "`draft.generation_config.assistant_tree_top_k` must be at most `draft_vocab_size` "
            f"({draft.config.draft_vocab_size}), got {top_k}."
        )
    depth = _integer_setting(draft, "assistant_tree_depth", 1, num_nodes if top_k == 1 else DEFAULT_TREE_DEPTH)
    return TreePlan(num_nodes, min(depth, num_nodes), top_k, confidence_threshold(draft))


def schedule(draft) -> str:
    """
    How the size of the trees goes on, from `draft.generation_config.num_assistant_tokens_schedule`; absent: constant.

    Raises:
        ValueError: If it is none of `SCHEDULES`.
    """
    value = draft.generation_config.num_assistant_tokens_schedule
    if value is not None and value not in SCHEDULES:
        raise ValueError(
            "`draft.generation_config.num_assistant_tokens_schedule` must be None or one of "
            f"{', '.join(map(repr, SCHEDULES))}, got {value!r}."
        )
    return value or SCHEDULES[0]


def draft_window(draft) -> DraftWindow | None:
    """
    What a row of the draft sees of its past, from `draft_window` (absent: all) and `draft_window_sink` (absent: 4).

    Raises:
        ValueError: If one of them is out of its bounds.
    """
    size = _integer_setting(draft, "draft_window", 1, None)
    sink = _integer_setting(draft, "draft_window_sink", 0, DEFAULT_SINK)
    return None if size is None else DraftWindow(size, sink)


def fixed_shapes(draft) -> bool | None:
    """
    Whether rounds have fixed shapes, from `draft.generation_config.fixed_shapes`; absent: on CUDA, where possible.

    Raises:
        ValueError: If it is neither None nor a boolean.
    """
    value = getattr(draft.generation_config, "fixed_shapes", None)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"`draft.generation_config.fixed_shapes` must be None, True or False, got {value!r}.")
    return value


def compile_config(draft) -> CompileConfig | None:
    """
    How target and draft are compiled before they are captured, from `draft.generation_config.compile_config`.

    Raises:
        ValueError: If it is neither None nor a `CompileConfig`.
    """
    value = draft.generation_config.compile_config
    if value is not None and not isinstance(value, CompileConfig):
        raise ValueError(
            f"`draft.generation_config.compile_config` must be None or a transformers.CompileConfig, got {value!r}."
        )
    return value


def _integer_setting(draft, name: str, least: int, default: int | None) -> int | None:
    """`draft.generation_config.{name}`, or the default where it is absent."""
    value = getattr(draft.generation_config, name, None)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`draft.generation_config.{name}` must be an integer of at least {least}, got {value!r}.")
    return value


def confidence_threshold(draft) -> float | None:
    """
    Probability below which a proposal ends its chain, from `draft.generation_config.assistant_confidence_threshold`.

    Raises:
        ValueError: If it is not a number between 0 and 1.
    """
    value = draft.generation_config.assistant_confidence_threshold
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(
            "`draft.generation_config.assistant_confidence_threshold` must be None or a number between 0 and 1, got "
            f"{value!r}."
        )
    return value


def _check_draft(draft) -> None:
    config, dtype, device = draft.config, draft.dtype, draft.device
    embeds = torch.zeros(1, 2, config.hidden_size, dtype=dtype, device=device)
    states = torch.zeros(1, 2, 3 * config.target_hidden_size, dtype=dtype, device=device)
    if draws_random_numbers(draft, lambda: draft(inputs_embeds=embeds, aux_hidden_states=states)):
        raise NotImplementedError(
            "`assistant_model` must not be in training mode with dropout, which takes random numbers from the text. "
            "Call `assistant_model.eval()`."
        )


def _check_cache(generation_config: GenerationConfig, model_kwargs: dict) -> None:
    if not model_kwargs.get("use_cache"):
        raise ValueError(
            "`use_cache` must be True for an EAGLE-3 draft, got False. Pass `use_cache=True`, or no `assistant_model`."
        )
    cache = model_kwargs.get("past_key_values")
    if not isinstance(cache, DynamicCache):
        raise NotImplementedError(
            f"The target's cache must be a DynamicCache for an EAGLE-3 draft, got {type(cache).__name__} "
            f"(`cache_implementation={generation_config.cache_implementation!r}`). Leave `cache_implementation` out."
        )
    if cache.offloading:
        raise NotImplementedError(
            "The target's cache must not be offloaded for an EAGLE-3 draft, got `offloading=True` "
            f"(`cache_implementation={generation_config.cache_implementation!r}`): rounds would move rows while they "
            "are copied. Leave it out."
        )
