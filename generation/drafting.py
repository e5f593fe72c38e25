"""Drafting: the head proposes the tokens that the target will probably choose.

The EAGLE shift, stated here once: the draft's row i pairs the target's states at token i with the embedding of token
i + 1, sits at RoPE position i, and predicts token i + 2. So after a round the rows of all committed tokens are known
except the newest token's own, which the target has not read.

Rows that were drafted in a round hold guesses (their states are the draft's). They are dropped, and the next round
begins by appending the rows of the accepted tokens from the target's true states.

Shapes: M new rows, T rows so far, W nodes of one depth, D the draft's hidden size, V and Vd vocabularies of target and
draft.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel

from .caches import forget_last, new_draft_cache
from .sampling import Noise, stateless_warpers
from .support import TreePlan
from .tree import DraftTree, build_chain, build_tree


@dataclass
class DraftMemory:
    """
    What the draft knows of the text: the latents of past rows, and the rows that are still to be read.

    Args:
        cache (`DynamicCache`): Latents of rows from true states of the target.
        pending_states (`torch.Tensor` of shape `(1, M, 3 * Dt)`): The target's states, not yet read by the draft.
        pending_tokens (`torch.LongTensor` of shape `(1, M)`): For each of them the token that follows.
    """

    pending_states: Tensor
    pending_tokens: Tensor
    cache: DynamicCache = field(default_factory=new_draft_cache)

    def await_rows(self, states: Tensor, tokens: Tensor) -> None:
        """Adds accepted rows to the pending ones."""
        self.pending_states = torch.cat([self.pending_states, states], dim=1)
        self.pending_tokens = torch.cat([self.pending_tokens, tokens], dim=1)

    def mark_read(self) -> None:
        """Nothing is pending any more."""
        self.pending_states, self.pending_tokens = self.pending_states[:, :0], self.pending_tokens[:, :0]


@dataclass
class Frontier:
    """
    The nodes whose continuations come next: the draft's rows of one depth.

    Args:
        candidates (`torch.LongTensor` of shape `(W,)`): Their indices among all candidates; -1 is the root.
        scores (`torch.Tensor` of shape `(W,)`): Log-probability of the path to each, fp32.
        sees (`torch.BoolTensor` of shape `(W, rows)`): Which of the rows drafted in this round each attends to.
    """

    candidates: Tensor
    scores: Tensor
    sees: Tensor


def draft_tree(
    draft,
    target: PreTrainedModel,
    memory: DraftMemory,
    plan: TreePlan,
    logits_processor: LogitsProcessorList,
    noise: Noise | None,
) -> DraftTree:
    """
    What the draft expects after the newest committed token (EAGLE-2, arXiv:2406.16858).

    Every depth continues the `top_k` best nodes of the depth before by their `top_k` best tokens; of all these
    candidates the best `num_nodes` make the tree. With `top_k` 1 that is a chain.

    Args:
        draft ([`Eagle3MLADraftModel`]): The head.
        target (`PreTrainedModel`): For its embeddings.
        memory ([`DraftMemory`]): Its last pending token is the root.
        plan ([`TreePlan`]): Size of the tree; with a depth of 0 the draft is not called.
        logits_processor (`LogitsProcessorList`): The target's; its stateless warpers shape the draft's scores too.
        noise ([`Noise`], *optional*): What the coming tokens will be drawn with; `None` means greedy.

    Returns:
        [`DraftTree`] of at most `plan.num_nodes + 1` nodes.

    **Effects**: the pending rows move to `memory.cache`, which holds no guesses afterwards.
    """
    root = memory.pending_tokens[0, -1:]
    if plan.depth == 0:
        return build_chain(root)
    warpers = stateless_warpers(logits_processor)
    outputs = draft(
        inputs_embeds=draft.embed(memory.pending_tokens, target),
        aux_hidden_states=memory.pending_states,
        past_key_values=memory.cache,
        logits_to_keep=1,
    )
    memory.mark_read()
    num_rows, device = memory.cache.get_seq_length(), outputs.logits.device
    frontier = Frontier(
        candidates=torch.full((1,), -1, device=device),
        scores=torch.zeros(1, device=device),
        sees=torch.zeros(1, 0, dtype=torch.bool, device=device),
    )
    token_ids, parents, scores = [], [], []
    for depth in range(plan.depth):
        logits, num_before = outputs.logits[0], sum(map(len, scores))
        log_probs, draft_ids = expected_log_probs(draft, logits, warpers, noise, ahead=depth).topk(plan.top_k)
        token_ids.append(draft.draft_to_target(draft_ids).flatten())  # (W * top_k,)
        parents.append(frontier.candidates.repeat_interleave(plan.top_k))
        scores.append((frontier.scores[:, None] + log_probs).flatten())
        if depth + 1 == plan.depth or is_unsure(logits, draft_ids, plan.confidence_threshold):
            break
        chosen = scores[-1].topk(plan.top_k).indices
        rows = chosen // plan.top_k
        itself = torch.eye(plan.top_k, dtype=torch.bool, device=device)
        frontier = Frontier(num_before + chosen, scores[-1][chosen], torch.cat([frontier.sees[rows], itself], dim=1))
        outputs = draft(
            inputs_embeds=draft.embed(token_ids[-1][chosen][None], target),
            fused_states=outputs.states[:, rows],
            past_key_values=memory.cache,
            **tree_inputs(frontier, num_rows, outputs.states.dtype),
        )
    forget_last(memory.cache, memory.cache.get_seq_length() - num_rows)
    proposals = torch.cat(token_ids).to(root.device)
    if plan.top_k == 1:
        return build_chain(torch.cat([root, proposals]))
    return build_tree(
        root, proposals, torch.cat(parents).to(root.device), torch.cat(scores).to(root.device), plan.num_nodes
    )


def tree_inputs(frontier: Frontier, num_rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The draft's mask and positions for the rows of a frontier; a chain needs neither."""
    width, num_drafted = frontier.sees.shape
    if width == 1:
        return {}
    device = frontier.sees.device
    mask = torch.zeros(width, num_rows + num_drafted, dtype=dtype, device=device)
    mask[:, num_rows:].masked_fill_(~frontier.sees, torch.finfo(dtype).min)
    drafted = num_rows + torch.arange(num_drafted // width, device=device).repeat_interleave(width)
    positions = torch.cat([torch.arange(num_rows, device=device), drafted])[None]
    return {"attention_mask": mask[None, None], "key_position_ids": positions, "position_ids": positions[:, -width:]}


def expected_log_probs(draft, logits: Tensor, warpers: LogitsProcessorList, noise: Noise | None, ahead: int) -> Tensor:
    """
    Log-probability of each draft id to be the target's choice, fp32, given the draft's logits `(W, Vd)`.

    When sampling, the target will choose `argmax(p / e)`. The draft knows e, so its guess is `q / e`, normalised, with
    its own distribution q under the target's temperature and filters.
    """
    if noise is None:
        return logits.float().log_softmax(dim=-1)
    all_ids = draft.draft_to_target(torch.arange(logits.shape[-1], device=logits.device))  # (Vd,)
    ahead_noise = noise.peek(ahead).to(logits.device)[:, all_ids]  # (1, Vd)
    return (warpers(None, logits.float()) - ahead_noise.log()).log_softmax(dim=-1)


def is_unsure(logits: Tensor, draft_ids: Tensor, threshold: float | None) -> bool:
    """True if the draft gives each of its proposals `(W, top_k)` a probability below `threshold`, if there is one."""
    if threshold is None:
        return False
    return bool((logits.float().softmax(dim=-1).gather(1, draft_ids) < threshold).all())
