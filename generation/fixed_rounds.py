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

from .branching import window_of
from .capture import Stage, capture
from .choice import limit_walk, report_walk, walk_at_once
from .compilation import compiled
from .drafting import draft_tree
from .fixed_cache import FixedCache
from .fixed_memory import FixedMemory
from .fused_rope import HALF_PRECISION
from .fused_target import TreeInSlots, fused_operations, tree_attention
from .memory import DraftMemory, additive_mask
from .ragged import MAX_LEAD
from .sampling import Noise, RowNoise
from .support import TreePlan
from .tree import DraftTree
from .verification import Verdict


class GivenNoise:
    """
    Noise of the coming tokens in a buffer.

    Args:
        draws (`torch.Tensor` of shape `(B, P, V)`): Those of each place behind the newest token.
    """

    def __init__(self, draws: Tensor):
        self.draws = draws

    def peek(self, ahead: int) -> Tensor:
        """Noise `(B, V)` of the token that is `ahead` places after the next one."""
        return self.draws[:, ahead]


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
    The rounds of texts that fit into `capacity` slots. Target and draft are not kept alive.

    Args:
        target (`PreTrainedModel`), draft ([`Eagle3MLADraftModel`]): The pair.
        plan ([`TreePlan`]): Size of every tree.
        warpers (`LogitsProcessorList`): Those of the target's processors that look at scores alone.
        cache (`Cache`), memory ([`DraftMemory`]): After the prompt; they say which shapes the buffers need.
        capacity (`int`): Slots of each sequence, those of a tree's nodes included.
        draw (`torch.Tensor` of shape `(B, V)`, *optional*): Like the noise of a token; `None` means greedy.
        ends ([`Ends`]): How sequences end.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        draft,
        plan: TreePlan,
        warpers: LogitsProcessorList,
        cache: Cache,
        memory: DraftMemory,
        capacity: int,
        draw: Tensor | None,
        ends: Ends,
    ):
        self.target, self.draft, self.whose = weakref.proxy(target), weakref.proxy(draft), weakref.ref(target)
        self.plan, self.warpers, self.capacity = plan, warpers, capacity
        self.cache = FixedCache(cache, capacity)
        self.memory = FixedMemory(draft, memory, capacity, plan.depth * plan.top_k, plan.depth + 1)
        self.windows = windows_by_kind(target, cache)
        counts = self.memory.num_rows
        self.slots = torch.arange(capacity, device=counts.device)
        self.lengths, self.offsets = torch.zeros_like(counts), torch.zeros_like(counts)
        self.limit = counts.new_full((), capacity)
        self.is_token = torch.ones(len(counts), capacity, dtype=torch.bool, device=counts.device)
        self.noise = None if draw is None else GivenNoise(draw.new_ones(len(draw), plan.depth + 1, draw.shape[1]))
        self.token_ids = counts.new_zeros(len(counts), tree_size(plan))
        self.parents, self.preferred = torch.zeros_like(self.token_ids), torch.zeros_like(self.token_ids[:, 1:])
        num_nodes = self.token_ids.shape[1]
        self.attends = torch.zeros(len(counts), num_nodes, num_nodes, dtype=torch.bool, device=counts.device)
        self.path = counts.new_zeros(len(counts), plan.depth + 1)
        self.tokens, self.num_new = torch.zeros_like(self.path), torch.ones_like(counts)
        self.roots = torch.zeros_like(self.path[:, :1])
        self.is_frozen = torch.zeros_like(counts, dtype=torch.bool)
        self.freezes = ends.pad_token_id is not None
        self.pad_token_id = counts.new_tensor(ends.pad_token_id if self.freezes else -1)
        self.eos_token_ids = None if ends.eos_token_ids is None else counts.new_tensor(ends.eos_token_ids)
        self.logits = None
        self.first = torch.zeros_like(counts)
        self.fuses = False
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
        self.fuses, target = fuses, self.whose()
        if compile_config is not None:
            self.listener.thread = None  # a compiler does not know of threads
        with (
            fused_operations(target, self.draft) if fuses and compile_config is None else nullcontext(),
            compiled(compile_config, target, self.draft),
        ):
            stages = capture(self._stages(), self.lengths.device)
        self.draft_trees, self.verify, self.choose, self.keep = stages
        self.listener = None  # it knows the target's layers

    def can_fuse(self) -> bool:
        """Whether the target computes in half precision and has no windows, which its own masks describe."""
        return self.target.dtype in HALF_PRECISION and not any(self.windows.values())

    def _stages(self) -> tuple[Stage, Stage, Stage, Stage]:
        return self.draft_trees, self.verify, self.choose, self.keep

    def belong_to(self, target: PreTrainedModel) -> bool:
        """Whether these are rounds of `target` itself, not of one that had its weights in the same place."""
        return self.whose() is target

    @property
    def tree(self) -> DraftTree:
        """The trees of the round, in the buffers."""
        is_chain = self.plan.top_k == 1
        preferred = None if is_chain else self.preferred
        tree = DraftTree(self.token_ids, self.parents, is_chain, self.plan.depth, preferred)
        if not is_chain:
            vars(tree)["attends"] = self.attends  # computed once a round
        return tree

    def load(
        self,
        cache: Cache,
        memory: DraftMemory,
        is_token: Tensor | None,
        positions: Tensor | int,
        limit: int,
        is_frozen: Tensor,
    ) -> None:
        """
        Begins a text.

        Args:
            cache (`Cache`): The target's, which has read the prompt; emptied.
            memory ([`DraftMemory`]): The draft's, which has read it but for the roots; emptied.
            is_token (`torch.Tensor` of shape `(B, T)`, *optional*): 0 where a slot of the prompt is padding.
            positions (`torch.LongTensor` of shape `(B,)`): RoPE positions of the roots in the target.
            limit (`int`): Tokens that a text may have in the end.
            is_frozen (`torch.BoolTensor` of shape `(B,)`): The sequences that have ended.
        """
        num_read = cache.get_seq_length()
        self.lengths.fill_(num_read)
        self.offsets.fill_(0).add_(positions - num_read)
        self.is_frozen.copy_(is_frozen)
        self.limit.fill_(limit)
        self.is_token.fill_(True)
        if is_token is not None:
            self.is_token[:, :num_read] = is_token[:, :num_read].bool()
        self.first.copy_((~self.is_token).sum(dim=1))
        self.cache.load(cache)
        self.memory.load(memory)
        self.roots.copy_(self.memory.roots)

    def take_over(self, smaller: "FixedRounds") -> None:
        """Goes on where rounds of a smaller capacity have come to."""
        for name in ("lengths", "offsets", "limit", "path", "tokens", "num_new", "roots", "is_frozen", "first"):
            getattr(self, name).copy_(getattr(smaller, name))
        self.is_token.fill_(True)
        self.is_token[:, : smaller.capacity] = smaller.is_token
        self.cache.take_over(smaller.cache)
        self.memory.take_over(smaller.memory)

    def load_noise(self, noise: Noise | RowNoise) -> None:
        """Copies the draws of the coming tokens."""
        for ahead in range(self.plan.depth + 1):
            self.noise.draws[:, ahead] = noise.peek(ahead)

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
        memory, warpers = self.memory, self.warpers
        tree = draft_tree(self.draft, self.target, memory, self.plan, warpers, self.noise)
        if len(self.lengths) > 1:
            tree = tree.with_roots(self.roots)
        if len(self.lengths) > 1 and self.freezes:
            tree = tree.with_pads(self.is_frozen, self.pad_token_id, self.plan.depth)
        self.load_tree(tree)

    def verify(self) -> Tensor:
        """The target's logits after each node, `(B, N, V)`, fp32."""
        tree = self.tree
        slots = self.lengths[:, None] + torch.arange(len(tree), device=self.lengths.device)
        places = torch.minimum(self.lengths[:, None] + tree.depths, self.limit - 1)
        self.cache.write_at(slots)
        attention, masks = nullcontext(), None
        if self.fuses:
            view = TreeInSlots(self.lengths, self.first, tree.attends, tree.depths)
            attention, masks = tree_attention(self.whose(), view), self.lengths.new_zeros(1, 1, 1, 1)
        else:
            masks = self._masks(tree, slots, places)
        with self.listener, attention:
            outputs = self.target(
                input_ids=tree.token_ids,
                attention_mask=masks,
                position_ids=places + self.offsets[:, None],
                past_key_values=self.cache,
                use_cache=True,
                return_dict=True,
            )
        self.logits = outputs.logits.float()
        return self.logits

    def choose(self) -> Tensor:
        """The path of every sequence; returns what the host has to know of it, `(B, 4 + 2P)`."""
        tree, is_sampled = self.tree, self.noise is not None
        pads = torch.where(self.is_frozen, self.pad_token_id, -1)
        walk = walk_at_once(tree, self.logits, self.warpers, self.noise.draws if is_sampled else None, pads)
        num_tokens = self.lengths + 1
        limit = torch.minimum(self.limit, num_tokens.min() + MAX_LEAD) if is_sampled else self.limit
        num_new, has_ended = limit_walk(
            walk, num_tokens, limit - num_tokens, self.eos_token_ids, self.is_frozen, is_sampled
        )
        self.path.copy_(walk.path)
        self.tokens.copy_(walk.tokens)
        self.num_new.copy_(num_new)
        if self.freezes:
            self.is_frozen |= has_ended
        return report_walk(tree, walk, num_new, has_ended)

    def keep(self) -> None:
        """Both models keep the accepted paths and forget the other nodes."""
        begin = self.lengths[:, None]
        self.cache.move(begin + self.path, begin + torch.arange(self.path.shape[1], device=begin.device))
        self.memory.await_rows(self.listener.take(self.path), self.tokens, self.num_new)
        newest = self.tokens.gather(1, (self.num_new[:, None] - 1).clamp(min=0))
        self.roots.copy_(torch.where(self.num_new[:, None] > 0, newest, self.roots))
        self.lengths += self.num_new

    def _masks(self, tree: DraftTree, slots: Tensor, places: Tensor) -> Tensor | dict[str, Tensor]:
        """
        Who sees which slot, `(B, 1, N, K)`, added to the scores; one mask for each kind of layers.

        Args:
            tree ([`DraftTree`]): The trees.
            slots (`torch.LongTensor` of shape `(B, N)`): Where the nodes stand in the cache.
            places (`torch.LongTensor` of shape `(B, N)`): Where they would stand if their path were the text.
        """
        is_read = self.is_token & (self.slots < self.lengths[:, None])
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
    if plan.top_k == 1:
        return 1 + plan.depth
    return 1 + min(plan.num_nodes, plan.top_k + (plan.depth - 1) * plan.top_k**2)


def windows_by_kind(target: PreTrainedModel, cache: Cache) -> dict[str, int | None]:
    """The sliding window of each kind of the target's layers; `None`: they see everything."""
    config = target.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or ["the only one"]
    return {kind: window_of(cache.layers[kinds.index(kind)], kind, config) for kind in dict.fromkeys(kinds)}
