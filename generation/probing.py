"""Whether a target can read trees, and sequences of different lengths at once: tried on small ones, not believed.

FlashAttention takes no mask of a tree, ALiBi reads positions off a 2D mask, MPT takes positions and ignores them, GIT
widens the mask of a text by that of an image. Few of them say so. What a tree's nodes get is therefore compared with
what the target reads along each of their paths, as in plain generation: with padding on the left, a causal mask, and
equally long texts.

Windows and other things that begin beyond the probe's few tokens are not seen by it: those are known by name.

Shapes: R rows, each with a prompt of T tokens and a tree of N nodes; C chains, V the target's vocabulary.
"""

import logging
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .branching import branching_inputs
from .devices import input_device
from .tree import DraftTree
from .windows import uneven_windows

logger = logging.getLogger(__name__)

LAYER_TYPES = {"full_attention", "sliding_attention"}
# Of the difference that a causal mask would make: rounding is far below, a mask that is not obeyed above.
TOLERATED_SHARE = {torch.float64: 1e-3, torch.float32: 1e-3}
TOLERATED_SHARE_IN_HALF_PRECISION = 0.1
# By generations, by branches, and with children in another order than their parents.
PARENTS = [[0, 0, 0, 1, 1, 2, 3, 5], [0, 0, 1, 2, 0, 4, 1, 5], [0, 0, 0, 0, 3, 1, 4, 2]]
# Of the prompts' columns so many are padding on the left, so many on the right hold what nobody may see.
NUM_COLUMNS, NUM_PADDING, NUM_UNSEEN = 24, [0, 5, 2], [0, 3, 7]
# Token ids stay below: placeholders for images and the like are found among the last ones.
NUM_IDS = 64
_known_targets: WeakKeyDictionary[PreTrainedModel, dict] = WeakKeyDictionary()


def can_branch(target: PreTrainedModel) -> bool:
    """
    Whether `target` reads a tree as it reads each of its paths; tried once for each of its settings and remembered.

    **Effects**: calls the target; where it cannot, the log says so, with the reason.
    """
    known = _known_targets.setdefault(target, {})
    settings = target.config._attn_implementation, target.dtype, target.training
    if settings not in known:
        known[settings] = reason = _why_not(target)
        if reason is not None:
            logger.warning("%s cannot read draft trees, chains are drafted: %s", type(target).__name__, reason)
    return known[settings] is None


@torch.no_grad()
def _why_not(target: PreTrainedModel) -> str | None:
    """Why `target` cannot read trees; `None` if it can."""
    config = target.config.get_text_config(decoder=True)
    # GPT-Neo calls them otherwise, and cuts its windows behind the mask, by places in the cache.
    layer_types = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or []
    if not LAYER_TYPES.issuperset(layer_types):
        return f"its layers are of the types {sorted(set(layer_types))}, known are {sorted(LAYER_TYPES)}"
    if target.training:
        return "it is in training mode"
    try:
        error, mistake = _compare(target)
    except Exception as exception:  # whatever a target raises for a mask that it does not take
        return f"{type(exception).__name__}: {exception}"
    tolerated = TOLERATED_SHARE.get(target.dtype, TOLERATED_SHARE_IN_HALF_PRECISION)
    return None if error <= tolerated * mistake else "it does not obey the mask of a tree"


def _compare(target: PreTrainedModel) -> tuple[float, float]:
    """How far the logits of trees are from those of their paths, and how far those of a causal mask would be."""
    num_ids, generator = len(target.get_input_embeddings().weight), torch.Generator().manual_seed(0)
    shape = len(PARENTS), NUM_COLUMNS + len(PARENTS[0])
    token_ids = torch.randint(min(NUM_IDS, num_ids), shape, generator=generator).to(input_device(target))
    prompts, nodes = token_ids[:, :NUM_COLUMNS], token_ids[:, NUM_COLUMNS:]
    tree = DraftTree(nodes, torch.tensor(PARENTS, device=nodes.device))
    # As in plain generation the texts end together; what they hold beyond stands before them, as padding.
    aligned = torch.stack([row.roll(num) for row, num in zip(prompts, NUM_UNSEEN, strict=True)])
    num_aligned_padding = [sum(pair) for pair in zip(NUM_PADDING, NUM_UNSEEN, strict=True)]

    found = read_trees(target, prompts, NUM_PADDING, tree)
    # Rounds of one node have such a mask, too, and some targets take another way for one token.
    roots = read_trees(target, prompts, NUM_PADDING, DraftTree(nodes[:, :1], torch.zeros_like(nodes[:, :1])))
    causal = read_chains(target, aligned, num_aligned_padding, nodes)
    rows = torch.arange(len(nodes), device=nodes.device)[:, None]
    # Path by path: each node's ancestors, itself, and then anything, which it does not see.
    paths = tree.attends.int().sort(dim=-1, descending=True, stable=True).indices[..., : int(tree.depths.max()) + 1]
    along_paths = read_chains(target, aligned, num_aligned_padding, nodes[rows[..., None], paths].flatten(0, 1))
    ends = tree.depths.flatten()
    expected = along_paths[torch.arange(len(ends), device=ends.device), ends].view_as(found)
    error = max(float((expected - found).abs().max()), float((expected[:, :1] - roots).abs().max()))
    return error, float((expected - causal).abs().max())


def read_trees(target: PreTrainedModel, prompts: Tensor, num_padding: list[int], tree: DraftTree) -> Tensor:
    """The target's logits `(R, N, V)` of trees after the prompts `(R, T)` without their last columns, in fp32."""
    cache = DynamicCache(config=target.config)
    cache.activate_past_recording()  # windows end with the columns that nobody may see
    mask = read_prompts(target, prompts, num_padding, cache)
    inputs = chain_inputs(mask, len(tree))
    lengths = [prompts.shape[1] - num for num in NUM_UNSEEN]
    with uneven_windows(cache):
        state = {"past_key_values": cache, "attention_mask": mask}
        inputs |= branching_inputs(target, tree, inputs, state, lengths, prompts.shape[1] + len(tree))
        return target(input_ids=tree.token_ids, past_key_values=cache, use_cache=True, **inputs).logits.float()


def read_chains(target: PreTrainedModel, prompts: Tensor, num_padding: list[int], token_ids: Tensor) -> Tensor:
    """The target's logits `(C, N, V)` of chains `(C, N)`, equally many after each of the prompts `(R, T)`, in fp32."""
    cache = DynamicCache(config=target.config)
    mask = read_prompts(target, prompts, num_padding, cache)
    num_chains = len(token_ids) // len(prompts)
    cache.batch_repeat_interleave(num_chains)
    inputs = chain_inputs(mask.repeat_interleave(num_chains, dim=0), token_ids.shape[1])
    return target(input_ids=token_ids, past_key_values=cache, use_cache=True, **inputs).logits.float()


def read_prompts(target: PreTrainedModel, prompts: Tensor, num_padding: list[int], cache: DynamicCache) -> Tensor:
    """Lets the target read prompts `(R, T)` into `cache`; returns their mask, 0 where a position is padding."""
    columns = torch.arange(prompts.shape[1], device=prompts.device)
    mask = (columns >= torch.tensor(num_padding, device=prompts.device)[:, None]).long()
    target(
        input_ids=prompts, attention_mask=mask, position_ids=positions_of(mask), past_key_values=cache, use_cache=True
    )
    return mask


def chain_inputs(mask: Tensor, num_tokens: int) -> dict[str, Tensor]:
    """The inputs of plain generation for so many tokens after prompts with that mask `(R, T)`."""
    mask = torch.cat([mask, mask.new_ones(len(mask), num_tokens)], dim=1)
    return {"attention_mask": mask, "position_ids": positions_of(mask)[:, -num_tokens:]}


def positions_of(mask: Tensor) -> Tensor:
    """Positions of tokens, padding not counted."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)
