"""Whether the rounds of a call can have fixed shapes, and what the log says where they cannot."""

import logging

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .chunks import ChunkLimit
from .modules import devices_of, modules_of
from .notices import warn_once
from .probing import can_branch
from .rope import ReadingLimits, rope_lengths
from .support import TreePlan, compile_config, draft_window, fixed_shapes
from .traces import Traces
from .transcript import Transcript

logger = logging.getLogger(__name__)

# Inputs of a target that rounds at fixed shapes give it, or that say nothing about single tokens.
KNOWN_INPUTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
KNOWN_LAYERS = {DynamicLayer, DynamicSlidingWindowLayer}
_reasons_given: set[str | tuple[str, str]] = set()


def takes_fixed_shapes(
    target: PreTrainedModel,
    draft,
    plan: TreePlan,
    transcript: Transcript,
    limits: ReadingLimits,
    traces: Traces,
    model_kwargs: dict,
) -> bool:
    """
    Whether the rounds of a call have fixed shapes: on CUDA where possible, or as `fixed_shapes` says.

    **Effects**: where they are wanted but not possible, the log says why, once; also that nothing is compiled then.
    """
    wanted, is_on_gpu = fixed_shapes(draft), target.device.type == "cuda"
    takes = is_on_gpu if wanted is None else wanted
    if takes:
        reason = why_shapes_vary(target, draft, plan, transcript, limits, traces, model_kwargs)
        takes = reason is None
        if not takes:
            give_reason(target, reason)
    if compile_config(draft) is not None and not (takes and is_on_gpu):
        warn_once(
            "`compile_config` is ignored: models are compiled only where their rounds are captured as CUDA graphs."
        )
    return takes


def why_shapes_vary(
    target: PreTrainedModel,
    draft,
    plan: TreePlan,
    transcript: Transcript,
    limits: ReadingLimits,
    traces: Traces,
    model_kwargs: dict,
) -> str | None:
    """Why the rounds of a call cannot have fixed shapes; `None` if they can."""
    modules = modules_of(target)
    devices = devices_of(modules) | {draft.device, transcript.input_ids.device}
    unknown = {name for name, value in model_kwargs.items() if value is not None} - KNOWN_INPUTS
    positions, cache = model_kwargs.get("position_ids"), model_kwargs["past_key_values"]
    reasons = {
        "nothing is drafted": plan.depth == 0,
        "`assistant_confidence_threshold` is set": plan.confidence_threshold is not None,
        "`draft_window` is set": draft_window(draft) is not None,
        "hidden states or attentions are wanted": traces.are_wanted,
        f"models and text are on several devices: {', '.join(sorted(map(str, devices)))}": len(devices) > 1,
        f"the target has inputs besides the usual ones: {', '.join(sorted(unknown))}": bool(unknown),
        f"beyond some length {ChunkLimit.of(target).reason}": ChunkLimit.of(target).num_tokens is not None,
        "the target's RoPE factors may change with the length of the text": limits.are_reached(transcript)
        or any(rope_lengths(target.config.get_text_config(decoder=True))),
        "positions have several axes": positions is not None and positions.dim() != 2,
        "the target's windows are to record their past": any(
            getattr(each, "record_past", False) for each in cache.layers
        ),
        "the target's cache is of a kind of its own": type(cache) is not DynamicCache
        or not {type(layer) for layer in cache.layers} <= KNOWN_LAYERS,
        "autocast is on, whose copies of weights end with it": torch.is_autocast_enabled(target.device.type),
        "the target or the draft has hooks, which a graph would not call": has_hooks(modules | modules_of(draft)),
    }
    applying = [reason for reason, applies in reasons.items() if applies]
    if not applying and not can_branch(target):
        return "the target takes no masks of its own"
    return applying[0] if applying else None


def has_hooks(modules: set[nn.Module]) -> bool:
    """Whether somebody listens to modules; transformers' own hooks do nothing unless asked."""
    if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
        return True
    if any("_hf_hook" in vars(module) for module in modules):
        return True
    listened = [module for module in modules if module._forward_hooks or module._forward_pre_hooks]
    hooks = [hook for each in listened for hook in (*each._forward_hooks.values(), *each._forward_pre_hooks.values())]
    return any(not str(hook.__module__).startswith("transformers.") for hook in hooks)


def give_reason(target: PreTrainedModel, reason: str) -> None:
    """Says once in the log why a target's rounds have no fixed shapes."""
    message = f"Rounds of {type(target).__name__} are not captured as CUDA graphs: {reason}."
    _say_once(reason, logging.WARNING, message)


def give_loss(target: PreTrainedModel, lost: str, reason: str, is_known: bool = False) -> None:
    """Says once in the log why a target's graphs are slower than they could be; as information if it `is_known`."""
    message = f"Rounds of {type(target).__name__} are captured without {lost}: {reason}."
    _say_once((lost, reason), logging.INFO if is_known else logging.WARNING, message)


def _say_once(reason: str | tuple[str, str], level: int, message: str) -> None:
    """Logs the first message of each reason, whatever target it is of."""
    if reason not in _reasons_given:
        _reasons_given.add(reason)
        logger.log(level, message)
