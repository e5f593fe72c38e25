"""What the benchmarks of speed share: how a pair is set for each way of decoding, and what must be read for it.

A way is one of `WAYS`; the keys are what tables and command lines say.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import CompileConfig, PreTrainedModel

from eagle3_mla.modeling_eagle3_mla import Eagle3MLADraftModel

PLAIN_EAGER, PLAIN_STATIC = "plain-eager", "plain-static"
LOOKUP, ASSISTED = "prompt-lookup", "assisted"
OURS_EAGER, OURS_CAPTURED, OURS_COMPILED = "ours-eager", "ours-captured", "ours-compiled"
OURS_ADAPTIVE = "ours-adaptive"
WAYS = {
    PLAIN_EAGER: "plain, eager",
    PLAIN_STATIC: "plain, static cache, compiled",
    LOOKUP: "prompt lookup",
    ASSISTED: "transformers' assisted generation",
    OURS_EAGER: "ours, eager",
    OURS_CAPTURED: "ours, captured",
    OURS_COMPILED: "ours, compiled",
    OURS_ADAPTIVE: "ours, captured, sizes by measurement",
}
OURS = (OURS_EAGER, OURS_CAPTURED, OURS_COMPILED, OURS_ADAPTIVE)
COMPILED = (PLAIN_STATIC, OURS_COMPILED)
# What transformers itself remembers of the largest static cache and the compiled forward of a model.
REMEMBERED = ("_previous_max_cache_length", "_compiled_call", "_last_compile_config")


class NotCapturedError(RuntimeError):
    """The rounds of a call ran in the plain loop though they were to have fixed shapes."""


@dataclass(frozen=True)
class TreeShape:
    """
    The trees of all of our ways.

    Args:
        num_nodes (`int`): Drafted tokens, without the root.
        top_k (`int`): Branches.
        depth (`int`): Of the deepest node; as many steps has the draft in a round.
    """

    num_nodes: int = 60
    top_k: int = 10
    depth: int = 8


def at_least(least: int) -> Callable[[str], int]:
    """How an argument is read that must be a whole number from `least` on."""

    def whole_number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return int(text)

    return whole_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What all of them are told: the trees of our ways, and for how long to measure."""
    parser.add_argument("--num-nodes", type=at_least(1), default=TreeShape.num_nodes)
    parser.add_argument("--top-k", type=at_least(1), default=TreeShape.top_k)
    parser.add_argument("--depth", type=at_least(1), default=TreeShape.depth)
    parser.add_argument("--time-limit", type=float, default=200.0, help="seconds after which no further row begins")


def tree_of(arguments: argparse.Namespace) -> TreeShape:
    return TreeShape(arguments.num_nodes, arguments.top_k, arguments.depth)


def set_way(draft: Eagle3MLADraftModel, way: str, tree: TreeShape) -> None:
    """**Effects**: `draft.generation_config` asks for one of our ways."""
    config = draft.generation_config
    config.num_assistant_tokens = tree.num_nodes
    config.assistant_tree_top_k, config.assistant_tree_depth = tree.top_k, tree.depth
    config.num_assistant_tokens_schedule = "heuristic" if way == OURS_ADAPTIVE else "constant"
    config.fixed_shapes = way != OURS_EAGER
    config.compile_config = CompileConfig(dynamic=False, mode="default") if way == OURS_COMPILED else None


def check_captured(draft: Eagle3MLADraftModel, way: str) -> None:
    """
    Raises:
        NotCapturedError: If the call ran another loop than the way's: only at fixed shapes is the choice timed.
    """
    if way != OURS_EAGER and draft.speculation_stats.choice_seconds == 0:
        raise NotCapturedError(f"The rounds of {way!r} did not run at fixed shapes; the log says why.")


def forget_compiled(target: PreTrainedModel) -> None:
    """
    Lets a row begin like a fresh process.

    Static caches would stay as long as the longest so far, and a second batch size would make all sizes symbolic.

    **Effects**: the next call compiles anew.
    """
    torch._dynamo.reset()
    for name in REMEMBERED:
        vars(target).pop(name, None)


def num_bytes(model: nn.Module, *unread: str) -> int:
    """Bytes of a model's weights, without those whose names begin with one of `unread`."""
    return sum(
        weight.numel() * weight.element_size()
        for name, weight in model.named_parameters()
        if not name.startswith(unread)
    )


def target_bytes(target: PreTrainedModel) -> int:
    """Bytes of weights that one forward of a target reads: all but embeddings of their own, of which it reads rows."""
    return num_bytes(target, *([] if target.config.tie_word_embeddings else ["model.embed_tokens."]))


def step_bytes(draft: Eagle3MLADraftModel) -> int:
    """Bytes of weights that one step of drafting reads."""
    return num_bytes(draft, "embed_tokens.", "fc.", "fc_norm.")


def fusion_bytes(draft: Eagle3MLADraftModel) -> int:
    """Bytes of weights that a round reads once: what makes the target's states the draft's."""
    return num_bytes(draft, "embed_tokens.") - step_bytes(draft)


def context_bytes(model: PreTrainedModel) -> int:
    """Bytes that the cache of a model, target or draft, holds for one token."""
    config = model.config
    if isinstance(model, Eagle3MLADraftModel):
        per_layer = config.cached_elements_per_token
    else:
        per_layer = 2 * config.num_key_value_heads * config.head_dim
    return config.num_hidden_layers * per_layer * model.dtype.itemsize
