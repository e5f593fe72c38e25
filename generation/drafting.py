"""Drafting: the head proposes the tokens that the target will probably choose.

Rows that were drafted in a round hold guesses (their states are the draft's). They are dropped, and the next round
begins by appending the rows of the accepted tokens from the target's true states.

Shapes: B batch, W nodes of one depth, Vd the draft's vocabulary.
"""

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from .levels import Frontier, grow
from .memory import DraftMemory, rows_at
from .sampling import Noise, RowNoise, stateless_warpers
from .support import TreePlan
from .top_tokens import best_log_probs
from .tree import DraftTree, build_chain, build_tree

# A draft's q is flatter than the p of any one context, so that it expects noise to turn more choices than it does.
# That costs a chain 3 to 5 %; a tree holds both candidates (benchmarks/results/log.md).
CHAIN_SHARPNESS = 1.5


def draft_tree(
    draft,
    target: PreTrainedModel,
    memory: DraftMemory,
    plan: TreePlan,
    logits_processor: LogitsProcessorList,
    noise: Noise | RowNoise | None,
) -> DraftTree:
    """
    What the draft expects after the newest committed token (EAGLE-2, arXiv:2406.16858).

    Every depth continues the `top_k` best nodes of the depth before by their `top_k` best tokens; of all these
    candidates the best `num_nodes` make the tree. With `top_k` 1 that is a chain.

    Args:
        draft ([`Eagle3MLADraftModel`]): The head.
        target (`PreTrainedModel`): For its embeddings.
        memory ([`DraftMemory`]): Its newest pending token is the root.
        plan ([`TreePlan`]): Size of the tree; with a depth of 0 the draft is not called.
        logits_processor (`LogitsProcessorList`): The target's; its stateless warpers shape the draft's scores too.
        noise ([`Noise`], *optional*): What the coming tokens will be drawn with; `None` means greedy.

    Returns:
        [`DraftTree`] of at most `plan.num_nodes + 1` nodes.

    **Effects**: the pending rows move to `memory.cache`, which holds no guesses afterwards.
    """
    if plan.depth == 0:
        return build_chain(memory.roots)
    warpers = stateless_warpers(logits_processor)
    root, outputs = memory.roots, memory.read(draft, target)
    device, batch_size = outputs.logits.device, len(root)
    frontier, levels = Frontier.of_roots(batch_size, device), []
    sharpness = CHAIN_SHARPNESS if plan.top_k == 1 else 1.0
    for depth in range(plan.depth):
        expected = expected_scores(draft, outputs.logits, warpers, noise, depth, sharpness)
        log_probs, draft_ids = best_log_probs(expected, plan.top_k)
        num_columns = memory.num_columns(frontier.num_drafted + plan.top_k)
        level, following = grow(frontier, log_probs, draft_ids, draft.d2t, num_columns)
        levels.append(level)
        if depth + 1 == plan.depth or is_unsure(outputs.logits, draft_ids, plan.confidence_threshold):
            break
        frontier = following
        outputs = draft(
            inputs_embeds=draft.embed(frontier.token_ids, target),
            fused_states=rows_at(outputs.states, frontier.rows),
            past_key_values=memory.cache,
            **memory.frontier_inputs(frontier.sees, frontier.num_drafted),
        )
    memory.forget_guesses()
    proposals = torch.cat([level.token_ids for level in levels], dim=1).to(root.device)
    if plan.top_k == 1:
        return build_chain(torch.cat([root, proposals], dim=1))
    parents, scores = (
        torch.cat(each, dim=1).to(root.device)
        for each in zip(*((level.parents, level.scores) for level in levels), strict=True)
    )
    return build_tree(root, proposals, parents, scores, plan.num_nodes, max_depth=len(levels))


def expected_scores(
    draft,
    logits: Tensor,
    warpers: LogitsProcessorList,
    noise: Noise | RowNoise | None,
    ahead: int,
    sharpness: float,
) -> Tensor:
    """
    Scores whose softmax says how probably each draft id is the target's choice, given the draft's logits `(B, W, Vd)`.

    When sampling, the target will choose `argmax(p / e)`. The draft knows e, so its guess is `q^b / e`, with its own
    distribution q under the target's temperature and filters, and b the `sharpness`.
    """
    if noise is None:
        return logits
    all_ids = draft.draft_to_target(torch.arange(logits.shape[-1], device=logits.device))  # (Vd,)
    ahead_noise = noise.peek(ahead).to(logits.device)[:, None, all_ids]  # (B, 1, Vd)
    warped = warpers(None, logits.float().flatten(0, 1)).view(logits.shape)
    return sharpness * warped.log_softmax(dim=-1) - ahead_noise.log()


def is_unsure(logits: Tensor, draft_ids: Tensor, threshold: float | None) -> bool:
    """True if the draft gives all its proposals `(B, W, top_k)` a probability below `threshold`, if there is one."""
    if threshold is None:
        return False
    return bool((logits.float().softmax(dim=-1).gather(-1, draft_ids) < threshold).all())
