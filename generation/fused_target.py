"""What a captured forward does better than a model's own code, with the same numbers up to rounding.

    attention    to a tree by `tree_attention.py`: no mask of all slots, keys and values are not repeated for every
                 query head, and slots that are not in use, or not in a layer's window, cost nothing
    RMSNorm      one kernel instead of six (`fused_norm.py`), with the sum before it (`fused_residual.py`, of the draft
                 `fused_draft_layer.py`)
    embeddings   picked by indexing (`fused_embedding.py`)
    RoPE         one kernel instead of ten (`fused_rope.py`)
    MLP          the gate in one kernel instead of two (`fused_mlp.py`), the draft's as well
    projections  of the same states on streams beside each other (`sibling_projections.py`), and so is what the draft's
                 rows remember beside what they ask (`parallel_branches.py`)

All are put in place while a graph is captured, and only then: what a graph has recorded it keeps. What replaces code
of the target's layers is tried on random numbers before; a model that computes something else runs its own code.

Shapes: B batch, N nodes, H heads, G key-value heads, K slots.
"""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from .fused_draft_layer import fused_draft_layers
from .fused_embedding import indexed_embeddings
from .fused_mlp import fused_mlps
from .fused_norm import fused_norms
from .fused_residual import fused_residuals
from .fused_rope import fused_draft_rope, fused_rope
from .kernels import HALF_PRECISION, can_run_kernels
from .opaque_ops import tree_attention_op
from .parallel_branches import parallel_branches
from .sibling_projections import DRAFT_FAMILIES, TARGET_FAMILIES, sibling_projections

# Names are global, and two versions of this package may be loaded.
TREE_ATTENTION = f"tree_{re.sub(r'[^0-9A-Za-z]', '_', __name__)}"
# What attention functions get that has no bearing on the result at inference, or says what is known here anyhow.
KNOWN_ARGUMENTS = {
    "dropout",
    "position_ids",
    "is_causal",
    "use_cache",
    "cache_position",
    "logits_to_keep",
    "output_router_logits",
}
# A mask of one key would fit any number of them.
LEAST_MASK_WIDTH = 2


@dataclass(frozen=True)
class TreeInSlots:
    """
    The trees of a round and where they stand in the cache; see `tree_attention.py` for shapes.

    Args:
        lengths (`torch.Tensor`): Slots in use of each sequence.
        first_slots (`torch.Tensor`): The first of them behind the padding.
        attends (`torch.Tensor`), depths (`torch.Tensor`): Of the nodes.
        windows (`dict[str, int | None]`): The sliding window of each kind of the target's layers; `None`: they see
            everything.
    """

    lengths: Tensor
    first_slots: Tensor
    attends: Tensor
    depths: Tensor
    windows: dict[str, int | None]

    def masks(self) -> Tensor | dict[str, Tensor]:
        """
        What the target gets in the place of masks, one for each kind of layers, told apart by their widths.

        They fit no keys: attention that is not asked through transformers' interface fails on them.
        """
        masks = {kind: self.lengths.new_zeros(1, 1, 1, width) for width, kind in self._kinds().items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def window(self, mask: Tensor | None) -> int | None:
        """
        The window of a layer that got `mask`.

        Layers need not tell their window (Qwen2-MoE, Phi-3.5-MoE), but whichever mask they get is theirs.
        """
        kinds = self._kinds()
        width = None if mask is None else mask.shape[-1]
        if width not in kinds:
            raise NotImplementedError(f"attention with a mask of width {width}, given were {sorted(kinds)}")
        return self.windows[kinds[width]]

    def _kinds(self) -> dict[int, str]:
        return dict(enumerate(self.windows, LEAST_MASK_WIDTH))


# Of the graph that is being captured: attention functions get nothing but tensors of their layer.
_trees: list[TreeInSlots] = []
_threads: list[int] = []


def attend_to_tree(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """
    An attention function of transformers, `(B, H, N, d)` over `(B, G, K, d)` -> `(B, N, H, d)`.

    Raises:
        NotImplementedError: If a target's attention asks for more.
    """
    wishes = {name for name, given in kwargs.items() if given is not None and given is not False}
    unknown = wishes - KNOWN_ARGUMENTS
    tree = _trees[-1]
    window = tree.window(attention_mask)
    if unknown or sliding_window not in (None, window):
        raise NotImplementedError(
            f"attention with {sorted(unknown)} and a window of {sliding_window} where the mask has {window}"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    arguments = tree.lengths, tree.first_slots, tree.attends, tree.depths, scaling, window, softcap, s_aux
    return tree_attention_op(query, key, value, *arguments), None


AttentionInterface.register(TREE_ATTENTION, attend_to_tree)


@contextmanager
def tree_attention(target: PreTrainedModel, tree: TreeInSlots, is_compiled: bool) -> Iterator[None]:
    """
    While the context is open, `target` attends to the slots by `tree`, whose masks it gets.

    Other threads, which may run the target meanwhile, have its own attention; not so if it `is_compiled`, because a
    compiler does not know of threads.
    """
    config = target.config.get_text_config(decoder=True)
    kind, implementation = type(config), config._attn_implementation_internal
    if is_compiled:
        config._attn_implementation_internal = TREE_ATTENTION
    else:
        config.__class__ = of_one_thread(kind)
    _trees.append(tree)
    _threads.append(threading.get_ident())
    try:
        yield
    finally:
        _trees.pop()
        _threads.pop()
        config.__class__, config._attn_implementation_internal = kind, implementation


@cache
def of_one_thread(kind: type) -> type:
    """A configuration like `kind` with the attention to trees in the thread that records a graph."""

    def implementation(config) -> str:
        return TREE_ATTENTION if threading.get_ident() in _threads else kind._attn_implementation.fget(config)

    setter = kind._attn_implementation.fset
    return type(kind.__name__, (kind,), {"_attn_implementation": property(implementation, setter)})


def can_fuse(target: PreTrainedModel) -> bool:
    """Whether a target may run all this: it computes in half precision, and a GPU has the kernels."""
    # Where it has none, their definitions are slower than the target's own code.
    has_kernels = target.device.type == "cpu" or can_run_kernels(target.device)
    return target.dtype in HALF_PRECISION and has_kernels


@contextmanager
def fused_operations(target: PreTrainedModel, draft: nn.Module) -> Iterator[None]:
    """While the context is open, what lies between the matrix products of both models takes fewer kernels."""
    with (
        fused_residuals(target),  # before the others: it tries MLPs and norms as they are
        fused_norms(target),
        fused_rope(target),
        fused_mlps(target),
        indexed_embeddings(target.get_input_embeddings(), draft.get_input_embeddings()),
        sibling_projections(target, TARGET_FAMILIES),  # behind them: they try what they replace
        fused_draft_operations(draft),
    ):
        yield


@contextmanager
def fused_draft_operations(draft: nn.Module) -> Iterator[None]:
    """As [`fused_operations`], of a draft alone; what its rows remember is computed beside what they ask."""
    with (
        fused_draft_layers(draft),  # before the norms: it tries them as they are
        fused_norms(draft),
        fused_draft_rope(draft),
        fused_mlps(draft),
        sibling_projections(draft, DRAFT_FAMILIES),
        parallel_branches(draft),
    ):
        yield
