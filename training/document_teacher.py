"""The target reads every document alone, at its own length.

Floating-point sums depend on the shape in which they are computed: the states of one document differ in the last bits
with the batch, the padding and the packing around it. Tried on a CPU with the benchmark target: padded to its
neighbours, a document's last states move by 7e-7 of their norm in float32 and by 9e-3 in bfloat16. Read alone they are
a function of document and target, so that stored features and training online can agree bit for bit.

Shapes: B batch, T tokens, Dt the target's hidden.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..modeling_eagle3_mla import AuxHiddenStates
from .documents import document_lengths
from .target import Lesson, Teacher, read


@torch.no_grad()
def read_document(target: PreTrainedModel, captured: AuxHiddenStates, input_ids: Tensor) -> Lesson:
    """What the target says about one document `(T,)`; a batch of one row."""
    return read(target, captured, input_ids[None])


class DocumentTeacher(Teacher):
    """A [`Teacher`] whose lessons do not depend on what else is in the batch; slower where documents are short."""

    @torch.no_grad()
    def lesson(self, batch: dict[str, Tensor]) -> Lesson:
        """
        Runs the target once for each document.

        Args:
            batch (`dict[str, torch.Tensor]`): With `input_ids` and `document_ids`, each `(B, T)`.

        Returns:
            [`Lesson`], zeros at the padding.
        """
        input_ids, document_ids = batch["input_ids"].flatten(), batch["document_ids"].flatten()
        captured = self.draft.capture_aux_hidden_states(self.target)
        lengths = document_lengths(batch["document_ids"]).tolist()
        pieces = zip(input_ids.split(lengths), document_ids.split(lengths), strict=True)
        lessons = [read_document(self.target, captured, tokens) for tokens, ids in pieces if ids[0] > 0]
        is_document = batch["document_ids"] > 0
        return Lesson(
            place([lesson.aux_hidden_states for lesson in lessons], is_document),
            place([lesson.last_hidden_states for lesson in lessons], is_document),
        )


def place(states: list[Tensor], is_document: Tensor) -> Tensor:
    """States `(1, T, W)` of the documents where `is_document (B, T)`, one behind the other, zeros elsewhere."""
    joined = torch.cat(states, dim=1)[0]
    placed = joined.new_zeros(*is_document.shape, joined.shape[-1])  # (B, T, W)
    placed[is_document.to(joined.device)] = joined
    return placed
