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
from .documents import document_lengths, place
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
        input_ids, is_document = batch["input_ids"], batch["document_ids"] > 0
        captured = self.draft.capture_aux_hidden_states(self.target)
        documents = input_ids[is_document].split(document_lengths(batch["document_ids"]).tolist())
        lessons = [read_document(self.target, captured, document) for document in documents]
        return Lesson(
            place(torch.cat([lesson.aux_hidden_states[0] for lesson in lessons]), is_document),
            place(torch.cat([lesson.last_hidden_states[0] for lesson in lessons]), is_document),
        )
