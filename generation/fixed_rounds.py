"""The stages of a round at fixed shapes, on CUDA each of them captured in a graph of its own.

    draft     the head reads what was accepted and proposes the trees
    verify    the target reads them
    choose    the target's own tokens, and how far every sequence goes with them
    keep      both caches take over the accepted paths, the states of these become the draft's pending rows

All that a stage reads and writes lies in buffers that stay where they are. What differs from round to round (lengths,
tokens, trees) is data on the device, which is asked for one thing in a round: what it has chosen. Where processors
look at the text, or somebody wants scores, the host chooses instead, as in `decoder.py`.

Shapes: B batch, N nodes, P nodes on the longest path, K slots, V the target's vocabulary.
"""

import weakref
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, CompileConfig, LogitsProcessorList, PreTrainedModel

from .branching import layer_kinds, window_of
from .capture import Stage, capture
from .choice import choose_at_once
from .compilation import compiled
from .drafting import draft_tree
from .fixed_buffers import TextBuffers
from .fused_target import TreeInSlots, fused_operations, tree_attention
from .memory import additive_mask
from .ragged import MAX_LEAD
from .steps import Standing, Steps, take_steps
from .support import TreePlan
from .tree import DraftTree
from .verification import Verdict


@dataclass(frozen=True)
class Ends:
    """
    How the sequences of a batch end.

    Args:
        eos_token_ids (`tuple[int, ...]`, *optional*): Tokens that end one; `None`: nothing does but the length.
        pad_token_id (`int`, *optional*): What a sequence gets that has ended before others; `None`: it goes on.
    """

    eos_token_ids: tuple[int, ...] | None
    pad_token_id: int | None


class FixedRounds:
    """
    Rounds of one size. Target and draft are not kept alive.

    Args:
        buffers ([`TextBuffers`]): What they work on; rounds of other sizes may, too, but not at the same time.
        target (`PreTrainedModel`), draft ([`Eagle3MLADraftModel`]): The pair.
        plan ([`TreePlan`]): Size of every tree, at most the largest of the buffers.
        warpers (`LogitsProcessorList`): Those of the target's processors that look at scores alone.
        like (`Cache`): A cache of the target's, which says which layers have windows.
        ends ([`Ends`]): How sequences end.
    """

    def __init__(
        self,
        buffers: TextBuffers,
        target: PreTrainedModel,
        draft,
        plan: TreePlan,
        warpers: LogitsProcessorList,
        like: Cache,
        ends: Ends,
    ):
        self.target, self.draft, self.target_ref = weakref.proxy(target), weakref.proxy(draft), weakref.ref(target)
        self.buffers, self.plan, self.warpers = buffers, plan, warpers
        self.windows = windows_by_kind(target, like)
        counts = buffers.lengths
        self.slots = torch.arange(buffers.capacity, device=counts.device)
        self.token_ids = counts.new_zeros(len(counts), tree_size(plan))  # (B, N)
        self.parents, self.preferred = torch.zeros_like(self.token_ids), torch.zeros_like(self.token_ids[:, 1:])
        num_nodes = self.token_ids.shape[1]
        self.attends = torch.zeros(len(counts), num_nodes, num_nodes, dtype=torch.bool, device=counts.device)
        self.path = counts.new_zeros(len(counts), plan.depth + 1)  # (B, P)
        self.tokens, self.num_new = torch.zeros_like(self.path), torch.ones_like(counts)
        self.freezes = ends.pad_token_id is not None
        self.pad_token_id = counts.new_tensor(ends.pad_token_id if self.freezes else -1)
        self.eos_token_ids = None if ends.eos_token_ids is None else counts.new_tensor(ends.eos_token_ids)
        self.logits = None
        self.fuses = self.is_compiled = False
        self.listener = draft.capture_fused_states(target)

    def capture(self, fuses: bool, compile_config: CompileConfig | None) -> None:
        """
        Makes each stage one launch of a CUDA graph, which stands in the place of the method.

        Args:
            fuses (`bool`): Whether the models may run what `fused_target.py` has for them.
            compile_config (`CompileConfig`, *optional*): How to compile both models.

        Raises:
            RuntimeError: If a model asks something of the device.
        """
        self.fuses, self.is_compiled, target = fuses, compile_config is not None, self.target_ref()
        if compile_config is not None:
            self.listener.thread = None  # a compiler does not know of threads
        with (
            fused_operations(target, self.draft) if fuses and compile_config is None else nullcontext(),
            compiled(compile_config, target, self.draft),
        ):
            stages = capture(self._stages(), self.path.device)
        self.draft_trees, self.verify, self.choose, self.keep = stages
        self.listener = None  # it knows the target's layers

    def _stages(self) -> tuple[Stage, Stage, Stage, Stage]:
        return self.draft_trees, self.verify, self.choose, self.keep

    @property
    def tree(self) -> DraftTree:
        """The trees of the round, in the buffers."""
        is_chain = self.plan.is_chain
        preferred = None if is_chain else self.preferred
        tree = DraftTree(self.token_ids, self.parents, is_chain, self.plan.depth, preferred)
        if not is_chain:
            vars(tree)["attends"] = self.attends  # computed once a round
        return tree

    def load_tree(self, tree: DraftTree) -> None:
        """Puts `tree`, of the size of the plan, in the place of the one that was drafted."""
        self.token_ids.copy_(tree.token_ids)
        self.parents.copy_(tree.parents)
        if not tree.is_chain:
            self.preferred.copy_(tree.preferred)
            self.attends.copy_(tree.attends)

    def load_verdict(self, verdict: Verdict) -> None:
        """What `keep` is to keep."""
        num_steps = verdict.path.shape[1]
        self.path[:, :num_steps], self.tokens[:, :num_steps] = verdict.path, verdict.tokens
        self.num_new.copy_(torch.tensor(verdict.num_kept))

    def draft_trees(self) -> None:
        """The head reads the pending rows and proposes `tree`."""
        buffers = self.buffers
        tree = draft_tree(self.draft, self.target, buffers.memory, self.plan, self.warpers, buffers.noise)
        if self.plan.depth == 0:  # there is room for the pending rows of one round
            buffers.memory.read(self.draft, self.target)
        if len(self.path) > 1:
            tree = tree.with_roots(buffers.roots)
        if len(self.path) > 1 and self.freezes:
            tree = tree.with_pads(buffers.is_frozen, self.pad_token_id, self.plan.depth)
        self.load_tree(tree)

    def verify(self) -> Tensor:
        """The target reads `tree`; returns its logits after each node, `(B, N, V)`."""
        tree, buffers = self.tree, self.buffers
        slots = buffers.lengths[:, None] + torch.arange(len(tree), device=self.path.device)
        places = torch.minimum(buffers.lengths[:, None] + tree.depths, buffers.limit - 1)
        buffers.cache.write_at(slots)
        if self.fuses:
            view = TreeInSlots(buffers.lengths, buffers.first_slots, tree.attends, tree.depths, self.windows)
            attention, masks = tree_attention(self.target_ref(), view, self.is_compiled), view.masks()
        else:
            attention, masks = nullcontext(), self._masks(tree, slots, places)
        with self.listener, attention:
            outputs = self.target(
                input_ids=tree.token_ids,
                attention_mask=masks,
                position_ids=places + buffers.offsets[:, None],
                past_key_values=buffers.cache,
                use_cache=True,
                return_dict=True,
            )
        self.logits = outputs.logits
        return self.logits

    def choose(self) -> Tensor:
        """The path of every sequence; returns what the host has to know of it, `(B, 4 + 2P)`."""
        tree, buffers, is_sampled = self.tree, self.buffers, self.buffers.noise is not None
        noise = buffers.noise.draws if is_sampled else None
        scores, choices = choose_at_once(tree, self.logits, self.warpers, noise)
        limit = torch.minimum(buffers.limit, buffers.lengths.min() + 1 + MAX_LEAD) if is_sampled else buffers.limit
        pad_token_id = self.pad_token_id if self.freezes else None
        standing = Standing(buffers.lengths, limit, buffers.is_frozen, self.eos_token_ids, pad_token_id)
        steps = Steps(self.path, self.tokens, self.num_new)
        return take_steps(tree, choices, standing, steps, scores if is_sampled else None)

    def keep(self) -> None:
        """Both models keep the accepted paths and forget the other nodes."""
        buffers, begin = self.buffers, self.buffers.lengths[:, None]
        buffers.cache.move(begin + self.path, begin + torch.arange(self.path.shape[1], device=begin.device))
        buffers.memory.await_rows(self.listener.take(self.path), self.tokens, self.num_new)
        newest = self.tokens.gather(1, (self.num_new[:, None] - 1).clamp(min=0))
        buffers.roots.copy_(torch.where(self.num_new[:, None] > 0, newest, buffers.roots))
        buffers.lengths += self.num_new

    def _masks(self, tree: DraftTree, slots: Tensor, places: Tensor) -> Tensor | dict[str, Tensor]:
        """
        Who sees which slot, `(B, 1, N, K)`, added to the scores; one mask for each kind of layers.

        Args:
            tree ([`DraftTree`]): The trees.
            slots (`torch.LongTensor` of shape `(B, N)`): Where the nodes stand in the cache.
            places (`torch.LongTensor` of shape `(B, N)`): Where they would stand if their path were the text.
        """
        is_read = self.buffers.is_token & (self.slots < self.buffers.lengths[:, None])
        slots = slots[:, None].expand(-1, len(tree), -1)
        sees = is_read[:, None].expand(-1, len(tree), -1).scatter(2, slots, tree.attends)  # (B, N, K)
        key_places = self.slots.expand_as(is_read).scatter(1, slots[:, 0], places)
        behind = places[..., None] - key_places[:, None]
        masks = {
            kind: additive_mask(sees if window is None else sees & (behind < window), self.target.dtype)
            for kind, window in self.windows.items()
        }
        return masks if len(masks) > 1 else next(iter(masks.values()))


def tree_size(plan: TreePlan) -> int:
    """Nodes of the trees that `draft_tree` makes by `plan`, the root included."""
    if plan.is_chain:
        return 1 + plan.depth
    return 1 + min(plan.num_nodes, plan.top_k + (plan.depth - 1) * plan.top_k**2)


def windows_by_kind(target: PreTrainedModel, cache: Cache) -> dict[str, int | None]:
    """The sliding window of each kind of the target's layers; `None`: they see everything."""
    config = target.config.get_text_config(decoder=True)
    kinds = layer_kinds(config)
    return {kind: window_of(cache.layers[kinds.index(kind)], kind, config) for kind in dict.fromkeys(kinds)}
