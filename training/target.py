"""The frozen target as the draft's teacher: its states to read, and its distributions to imitate.

One forward gives the three auxiliary states and the last one. Distributions come from the last state and the target's
output embeddings, as many rows at a time as the loss asks for: `(T, V)` logits of a whole batch never exist at once.

A row of the batch may hold several documents. The target reads them side by side, with positions that restart, where
it keeps them apart (tried once, on random tokens), and one by one as a padded batch where it does not. Padding stands
at no position that no document reaches: RoPE may depend on the greatest one, and a table of positions ends.

Shapes: B batch, T tokens, D and Dt hidden sizes of draft and target, M rows of states, V vocabulary of the target.
"""

import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..modeling_eagle3_mla import AuxHiddenStates, Eagle3MLADraftModel
from .attention import is_plain_causal
from .documents import document_lengths, document_positions, place
from .rope_lengths import forget_lengths

logger = logging.getLogger(__name__)

NUM_VERIFIED_TOKENS = 8


@dataclass(frozen=True)
class Lesson:
    """
    What the target says about one batch.

    Args:
        aux_hidden_states (`torch.Tensor` of shape `(B, T, 3 * Dt)`): States for the draft's `fc`.
        last_hidden_states (`torch.Tensor` of shape `(B, T, Dt)`): After the final norm; `Teacher.logits` reads them.
    """

    aux_hidden_states: Tensor
    last_hidden_states: Tensor


class Teacher:
    """
    A frozen target, read for one draft.

    Args:
        target (`PreTrainedModel`): The model to imitate, in evaluation mode.
        draft (`Eagle3MLADraftModel`): Says which states it reads.

    Raises:
        ValueError: If the draft does not fit the target, or the target's logits are not what its output embeddings and
            the known transformations give.
    """

    def __init__(self, target: PreTrainedModel, draft: Eagle3MLADraftModel):
        draft.check_target(target)
        check_logits_can_be_chunked(target)
        self.target = target
        self.draft = draft
        self.keeps_documents_apart: bool | None = None  # tried with the first packed batch

    @torch.no_grad()
    def embed(self, input_ids: Tensor) -> Tensor:
        """The target's embeddings of `input_ids`, for a draft without its own, `(B, T, D)`."""
        return self.draft.embed(input_ids, self.target)

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """The target's logits of last hidden states, `(M, Dt) -> (M, V)`."""
        return target_logits(self.target, states)

    @torch.no_grad()
    def lesson(self, batch: dict[str, Tensor]) -> Lesson:
        """
        Runs the target once.

        Args:
            batch (`dict[str, torch.Tensor]`): With `input_ids` and `document_ids`, each `(B, T)`.
        """
        input_ids, document_ids = batch["input_ids"], batch["document_ids"]
        captured = self.draft.capture_aux_hidden_states(self.target)
        if is_plain_causal(document_ids):
            # Behind a document without padding in front, causality hides the padding.
            longest = int((document_ids > 0).sum(dim=1).max())
            return extend(read(self.target, captured, input_ids[:, :longest]), input_ids.shape[1])
        if self.keeps_documents_apart is None:
            self.keeps_documents_apart = keeps_documents_apart(self.target)
            if not self.keeps_documents_apart:
                logger.warning("%s mixes packed documents: it reads them one by one.", type(self.target).__name__)
        if self.keeps_documents_apart:
            position_ids = document_positions(document_ids).where(document_ids > 0, 0)
            return read(self.target, captured, input_ids, position_ids)
        return read_one_by_one(self.target, captured, input_ids, document_ids)


def read(
    target: PreTrainedModel, captured: AuxHiddenStates, input_ids: Tensor, position_ids: Tensor | None = None
) -> Lesson:
    """One forward of the target; positions that restart (`(B, T)`) begin another document."""
    with captured:
        last_hidden_states = run_decoder(target, input_ids, position_ids=position_ids)
    return Lesson(captured.take(), last_hidden_states)


def extend(lesson: Lesson, num_columns: int) -> Lesson:
    """The lesson with zeros on its right, `num_columns` tokens long."""
    missing = num_columns - lesson.last_hidden_states.shape[1]
    if missing == 0:
        return lesson
    return Lesson(*(F.pad(states, (0, 0, 0, missing)) for states in vars(lesson).values()))


def read_one_by_one(
    target: PreTrainedModel, captured: AuxHiddenStates, input_ids: Tensor, document_ids: Tensor
) -> Lesson:
    """Every document as a row of a right-padded batch, the states put back where the document lies."""
    lengths, is_document = document_lengths(document_ids), document_ids > 0
    inside = torch.arange(int(lengths.max()), device=input_ids.device) < lengths[:, None]
    documents = torch.zeros_like(inside, dtype=input_ids.dtype)  # (number of documents, longest)
    documents[inside] = input_ids[is_document]
    lesson = read(target, captured, documents)
    return Lesson(*(place(states[inside.to(states.device)], is_document) for states in vars(lesson).values()))


def run_decoder(target: PreTrainedModel, input_ids: Tensor, **kwargs: Tensor | None) -> Tensor:
    """Last hidden state of the target, after its final norm, `(B, T, Dt)`."""
    decoder = target.get_decoder()
    forget_lengths(decoder)
    input_ids = input_ids.to(target.get_input_embeddings().weight.device)
    kwargs = {name: value.to(input_ids.device) for name, value in kwargs.items() if value is not None}
    return decoder(input_ids=input_ids, use_cache=False, **kwargs).last_hidden_state


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
    input_ids = some_tokens(target)
    expected = target(input_ids=input_ids, use_cache=False).logits.float()
    chunked = target_logits(target, run_decoder(target, input_ids)).float()
    tolerance = 1e-4 if target.dtype == torch.float32 else 2e-2
    difference = (chunked - expected).abs().max() / expected.abs().max()
    if not difference <= tolerance:
        raise ValueError(
            f"The logits of {type(target).__name__} are not its output embeddings applied to its last hidden state "
            f"(relative difference {difference:.1e}, allowed {tolerance:.0e}): it transforms them in a way that "
            "training does not know. Add that transformation to `target_logits` in training/target.py."
        )


@torch.no_grad()
def keeps_documents_apart(target: PreTrainedModel) -> bool:
    """True if a document whose positions restart at 0 is read as if nothing stood before it; tried on a few tokens."""
    document = some_tokens(target)
    alone = run_decoder(target, document).float()
    positions = torch.arange(NUM_VERIFIED_TOKENS, device=document.device).repeat(2)[None]
    try:
        behind = run_decoder(target, torch.cat([document.flip(1), document], dim=1), position_ids=positions)
    except TypeError:  # a decoder without position_ids
        return False
    difference = (behind[:, NUM_VERIFIED_TOKENS:].float() - alone).abs().max() / alone.abs().max()
    return bool(difference <= (1e-4 if target.dtype == torch.float32 else 2e-2))


def some_tokens(target: PreTrainedModel) -> Tensor:
    """The first tokens of the vocabulary, `(1, 8)`, where the target reads."""
    return torch.arange(NUM_VERIFIED_TOKENS, device=target.get_input_embeddings().weight.device)[None]
