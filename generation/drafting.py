"""Drafting: the head proposes the tokens that the target will probably choose.

The EAGLE shift, stated here once: the draft's row i pairs the target's states at token i with the embedding of token
i + 1, sits at RoPE position i, and predicts token i + 2. So after a round the rows of all committed tokens are known
except the newest token's own, which the target has not read.

Rows that were drafted in a round hold guesses (their states are the draft's). They are dropped, and the next round
begins by appending the rows of the accepted tokens from the target's true states.

Shapes: M new rows, T rows so far, D the draft's hidden size, V and Vd vocabularies of target and draft.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel

from .caches import forget_last, new_draft_cache
from .sampling import Noise, stateless_warpers
from .tree import DraftTree, build_chain


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


def draft_chain(
    draft,
    target: PreTrainedModel,
    memory: DraftMemory,
    num_tokens: int,
    confidence_threshold: float | None,
    logits_processor: LogitsProcessorList,
    noise: Noise | None,
) -> DraftTree:
    """
    A chain of at most `num_tokens` proposals after the newest committed token.

    Args:
        draft ([`Eagle3MLADraftModel`]): The head.
        target (`PreTrainedModel`): For its embeddings.
        memory ([`DraftMemory`]): Its last pending token is the root.
        num_tokens (`int`): Proposals, at most; with 0 the draft is not called.
        confidence_threshold (`float`, *optional*):
            The chain ends with the first proposal whose probability under the draft is below. `None`: it never does.
        logits_processor (`LogitsProcessorList`): The target's; its stateless warpers shape the draft's scores too.
        noise ([`Noise`], *optional*): What the coming tokens will be drawn with; `None` means greedy.

    Returns:
        [`DraftTree`] of at most `num_tokens + 1` nodes.

    **Effects**: the pending rows move to `memory.cache`, which holds no guesses afterwards.
    """
    token_ids = [memory.pending_tokens[:, -1]]
    if num_tokens == 0:
        return build_chain(token_ids[0])
    warpers = stateless_warpers(logits_processor)
    outputs = draft(
        inputs_embeds=draft.embed(memory.pending_tokens, target),
        aux_hidden_states=memory.pending_states,
        past_key_values=memory.cache,
        logits_to_keep=1,
    )
    memory.mark_read()
    num_rows = memory.cache.get_seq_length()
    while True:
        logits = outputs.logits[:, -1]
        draft_id = propose(draft, logits, warpers, noise, ahead=len(token_ids) - 1)
        token_ids.append(draft.draft_to_target(draft_id).to(token_ids[0].device))
        if len(token_ids) > num_tokens or is_unsure(logits, draft_id, confidence_threshold):
            break
        outputs = draft(
            inputs_embeds=draft.embed(token_ids[-1][:, None], target),
            fused_states=outputs.states,
            past_key_values=memory.cache,
        )
    forget_last(memory.cache, memory.cache.get_seq_length() - num_rows)
    return build_chain(torch.cat(token_ids))


def propose(draft, logits: Tensor, warpers: LogitsProcessorList, noise: Noise | None, ahead: int) -> Tensor:
    """
    The draft id `(1,)` of the token that the draft expects to be chosen, given its logits `(1, Vd)`.

    When sampling, the target will choose `argmax(p / e)`; the draft knows e, so its best guess is `argmax(q / e)` with
    its own distribution q under the target's temperature and filters.
    """
    if noise is None:
        return logits.argmax(dim=-1)
    draft_probs = warpers(None, logits.float()).softmax(dim=-1)  # (1, Vd)
    all_ids = draft.draft_to_target(torch.arange(logits.shape[-1], device=logits.device))  # (Vd,)
    return (draft_probs / noise.peek(ahead).to(logits.device)[:, all_ids]).argmax(dim=-1)


def is_unsure(logits: Tensor, draft_id: Tensor, threshold: float | None) -> bool:
    """True if the draft gives its proposal `(1,)` a probability below `threshold`; never without a threshold."""
    return threshold is not None and bool(logits.float().softmax(dim=-1)[0, draft_id] < threshold)
