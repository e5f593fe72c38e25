"""The frozen target as the draft's teacher: one forward gives the states to read and the distributions to imitate.

The distributions come from the last hidden state and the target's output embeddings, a chunk of rows at a time:
`(T, V)` logits of a whole batch never exist at once, and only positions that teach somebody are computed.

Shapes: B batch, T tokens, Dt the target's hidden, M taught positions, V and Vd vocabularies of target and draft.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..modeling_eagle3_mla import Eagle3MLADraftModel
from .attention import is_plain_causal

CHUNK_ROWS = 1024
NUM_VERIFIED_TOKENS = 8


@dataclass(frozen=True)
class Lesson:
    """
    What the target says about one batch.

    Args:
        aux_hidden_states (`torch.Tensor` of shape `(B, T, 3 * Dt)`): States for the draft's `fc`.
        logits (`torch.Tensor` of shape `(M, Vd)`): Logits of the draft vocabulary at the taught positions.
        tokens (`torch.LongTensor` of shape `(M,)`): Top-1 over the full vocabulary at these positions.
    """

    aux_hidden_states: Tensor
    logits: Tensor
    tokens: Tensor


class Teacher:
    """
    A frozen target, read for one draft.

    Args:
        target (`PreTrainedModel`): The model to imitate, in evaluation mode.
        draft (`Eagle3MLADraftModel`): Says which states it reads and which tokens it knows.

    Raises:
        ValueError: If the draft does not fit the target, or the target's logits are not what its output embeddings and
            the known transformations give.
    """

    def __init__(self, target: PreTrainedModel, draft: Eagle3MLADraftModel):
        draft.check_target(target)
        check_logits_can_be_chunked(target)
        self.target = target
        self.draft = draft

    @torch.no_grad()
    def embed(self, input_ids: Tensor) -> Tensor:
        """The target's embeddings of `input_ids`, for a draft without its own, `(B, T, D)`."""
        return self.draft.embed(input_ids, self.target)

    @torch.no_grad()
    def teach(self, input_ids: Tensor, document_ids: Tensor, taught: Tensor) -> Lesson:
        """
        Runs the target once.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`): The conversation.
            document_ids (`torch.LongTensor` of shape `(B, T)`): Its attention mask.
            taught (`torch.BoolTensor` of shape `(B, T)`): Where distributions are wanted.
        """
        # Behind a prompt without padding in front, causality hides the padding, and the target's fast path stays open.
        attention_mask = None if is_plain_causal(document_ids) else document_ids
        with self.draft.capture_aux_hidden_states(self.target) as captured:
            last_hidden_state = run_decoder(self.target, input_ids, attention_mask)
        taught_states = last_hidden_state[taught.to(last_hidden_state.device)]  # (M, Dt)
        logits, tokens = self._chunked_logits(taught_states)
        device = self.draft.fc.weight.device
        return Lesson(captured.take(), logits.to(device), tokens.to(device))

    def _chunked_logits(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the draft vocabulary `(M, Vd)` and full top-1 `(M,)`, never more than `CHUNK_ROWS * V` at once."""
        draft_ids = self.draft.draft_to_target(torch.arange(len(self.draft.d2t), device=self.draft.d2t.device))
        logits, tokens = [], []
        for chunk in states.split(CHUNK_ROWS):
            chunk_logits = target_logits(self.target, chunk)  # (CHUNK_ROWS, V)
            logits.append(chunk_logits[:, draft_ids.to(chunk_logits.device)])
            tokens.append(chunk_logits.argmax(dim=-1))
        return torch.cat(logits), torch.cat(tokens)


def run_decoder(target: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Last hidden state of the target, after its final norm, `(B, T, Dt)`."""
    decoder = target.get_decoder()
    input_ids = input_ids.to(target.get_input_embeddings().weight.device)
    return decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


def target_logits(target: PreTrainedModel, states: Tensor) -> Tensor:
    """The target's logits of last hidden states `(M, Dt) -> (M, V)`, with the transformations that families add.

    Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`, Gemma caps softly.
    """
    config = target.config.get_text_config(decoder=True)
    logits = target.get_output_embeddings()(states)
    logits = logits * (getattr(config, "logit_scale", None) or 1.0)
    logits = logits / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


@torch.no_grad()
def check_logits_can_be_chunked(target: PreTrainedModel) -> None:
    """
    Compares `target_logits` with the target's own on a few tokens.

    Raises:
        ValueError: If they differ by more than rounding.
    """
    device = target.get_input_embeddings().weight.device
    input_ids = torch.arange(NUM_VERIFIED_TOKENS, device=device).unsqueeze(0)
    expected = target(input_ids=input_ids, use_cache=False).logits.float()
    chunked = target_logits(target, run_decoder(target, input_ids, None)).float()
    tolerance = 1e-4 if target.dtype == torch.float32 else 2e-2
    difference = (chunked - expected).abs().max() / expected.abs().max()
    if not difference <= tolerance:
        raise ValueError(
            f"The logits of {type(target).__name__} are not its output embeddings applied to its last hidden state "
            f"(relative difference {difference:.1e}, allowed {tolerance:.0e}): it transforms them in a way that "
            "training does not know. Add that transformation to `target_logits` in training/target.py."
        )
