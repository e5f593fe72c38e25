"""What a diagnosis looks at, and what a check says about it.

A case is a draft, fresh or trained, with its target and data. A few of its rows are studied: read by the target once,
shared by all checks that need states or distributions.

Shapes: T tokens, D the draft's hidden, Dt the target's hidden, V the target's vocabulary.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from .arguments import Eagle3TrainingArguments
from .documents import count_supervised_rows
from .losses import step_weights
from .target import Lesson, Teacher
from .ttt import TTTDraftModel, TTTOutput

OK, WARNING, FAILED = "ok", "warning", "failed"
# The target reads these rows, the others are only counted. States are kept of a few: of an 8B target 100 MB a row.
NUM_STUDIED_ROWS = 16
NUM_READ_ROWS = 64
NUM_COUNTED_ROWS = 2000
CHUNK_ROWS = 1024


@dataclass(frozen=True)
class Finding:
    """
    What one check says.

    Args:
        check (`str`): Its name.
        verdict (`str`): `"ok"`, `"warning"` or `"failed"`.
        summary (`str`): What was measured, in a sentence.
        remedy (`str`): What to do about it, in a sentence.
        measured (`dict`): All numbers.
    """

    check: str
    verdict: str
    summary: str
    remedy: str
    measured: dict[str, Any]


@dataclass(frozen=True)
class Answers:
    """
    Supervised tokens beside what the target would have said in their places.

    Args:
        tokens (`torch.LongTensor` of shape `(N,)`): The supervised ones.
        target_tokens (`torch.LongTensor` of shape `(N,)`): The target's top-1.
        losses (`torch.Tensor` of shape `(N,)`): The target's loss on the supervised ones, in nats.
    """

    tokens: Tensor
    target_tokens: Tensor
    losses: Tensor


@dataclass(frozen=True)
class StudiedRow:
    """
    A row of the data that the target has read.

    Args:
        batch (`dict[str, torch.Tensor]`): The collator's batch of this row, `(1, T)` each.
        inputs_embeds (`torch.Tensor` of shape `(1, T, D)`): Embeddings of its tokens.
        lesson ([`Lesson`]): The target's states.
        answers ([`Answers`]): Its supervised tokens.
    """

    batch: dict[str, Tensor]
    inputs_embeds: Tensor
    lesson: Lesson
    answers: Answers


@dataclass(frozen=True)
class Case:
    """
    What is diagnosed.

    Args:
        draft ([`TTTDraftModel`]): The head; no check changes it.
        target (`PreTrainedModel`): Its target.
        teacher ([`Teacher`]): The target, read for this draft.
        tokenizer (`PreTrainedTokenizerBase`): The target's.
        rows (`Sequence[dict]`): Training rows with `input_ids` and `loss_mask`.
        collator (`Callable`): Makes a batch of rows.
        args ([`Eagle3TrainingArguments`]): Of the run that is, or would be, made.
        max_length (`int`): Where the rows were cut.
        end_ids (`list[int]`): Tokens that end a turn.
        is_trained (`bool`): The head comes from a checkpoint.
        trained_length (`int`, *optional*): Longest document that the head was trained on; `None`: it is not known.
        num_dropped_rows (`int`, *optional*, defaults to 0): Rows of the data without an answer, not among `rows`.
    """

    draft: TTTDraftModel
    target: PreTrainedModel
    teacher: Teacher
    tokenizer: PreTrainedTokenizerBase
    rows: Sequence[dict]
    collator: Callable[[list[dict]], dict[str, Tensor]]
    args: Eagle3TrainingArguments
    max_length: int
    end_ids: list[int]
    is_trained: bool
    trained_length: int | None = None
    num_dropped_rows: int = 0

    @cached_property
    def counted_rows(self) -> list[dict[str, list[int]]]:
        """Rows for everything that is counted without a model."""
        return choose_evenly(self.rows, NUM_COUNTED_ROWS)

    @cached_property
    def studied_rows(self) -> list[StudiedRow]:
        """Rows that the target reads."""
        return [self.study([row]) for row in choose_evenly(self.rows, NUM_STUDIED_ROWS)]

    @cached_property
    def answers(self) -> Answers:
        """The supervised tokens of more rows, of which nothing else is kept."""
        read = [self.study([row]).answers for row in choose_evenly(self.rows, NUM_READ_ROWS)]
        return Answers(
            torch.cat([answers.tokens for answers in read]),
            torch.cat([answers.target_tokens for answers in read]),
            torch.cat([answers.losses for answers in read]),
        )

    @torch.no_grad()
    def study(self, rows: list[dict]) -> StudiedRow:
        """Reads `rows` with the target, as one batch."""
        batch = {name: tensor.to(self.draft.device) for name, tensor in self.collator(rows).items()}
        lesson = self.teacher.lesson(batch)
        input_ids, document_ids = batch["input_ids"], batch["document_ids"]
        # A supervised token is what the target says after the token before it.
        is_answer = batch["loss_mask"][:, 1:].bool() & (document_ids[:, 1:] == document_ids[:, :-1])
        answer_tokens = input_ids[:, 1:][is_answer]
        states = lesson.last_hidden_states[:, :-1]
        states = states[is_answer.to(states.device)]  # (N, Dt)
        answers = Answers(answer_tokens, *self._read_distributions(states, answer_tokens))
        return StudiedRow(batch, self.embed(input_ids), lesson, answers)

    @torch.no_grad()
    def embed(self, input_ids: Tensor) -> Tensor:
        """What the draft reads for tokens `(B, T)`, whosever embeddings it uses."""
        return self.draft.embed(input_ids, self.target)

    def unroll(self, draft: TTTDraftModel, row: StudiedRow, aux_hidden_states: Tensor, num_steps: int) -> TTTOutput:
        """Loss, a mean over the row's supervised positions at each step, and hits, as training computes them."""
        batch = row.batch
        num_supervised = count_supervised_rows(batch["loss_mask"], batch["document_ids"], num_steps)
        return draft(
            input_ids=batch["input_ids"],
            inputs_embeds=row.inputs_embeds,
            aux_hidden_states=aux_hidden_states,
            last_hidden_states=row.lesson.last_hidden_states,
            target_logits=self.teacher.logits,
            loss_mask=batch["loss_mask"],
            document_ids=batch["document_ids"],
            step_weights=step_weights(num_supervised, self.args.step_weights[:num_steps]),
            loss=self.args.loss,
        )

    def _read_distributions(self, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The target's top-1 after `states (N, Dt)` and its loss on `tokens (N,)`, `(N,)` each."""
        top_tokens, losses = [tokens[:0]], [torch.zeros(0, device=tokens.device)]
        for chunk_states, chunk_tokens in zip(states.split(CHUNK_ROWS), tokens.split(CHUNK_ROWS), strict=True):
            logits = self.teacher.logits(chunk_states).float().to(tokens.device)  # (N, V)
            top_tokens.append(logits.argmax(dim=-1))
            losses.append(F.cross_entropy(logits, chunk_tokens, reduction="none"))
        return torch.cat(top_tokens), torch.cat(losses)


def trained_length(source: str) -> int | None:
    """Longest row that the head at `source`, a directory or a Hub id, was trained on; `None` if it does not say so."""
    provenance = cached_file(source, "provenance.json", _raise_exceptions_for_missing_entries=False)
    return None if provenance is None else json.loads(Path(provenance).read_text()).get("longest_row")


def choose_evenly(rows: Sequence[dict], count: int) -> list[dict]:
    """At most `count` rows, at equal distances."""
    count = min(count, len(rows))
    return [rows[index * len(rows) // count] for index in range(count)]


def grade(value: float, failed_below: float, warning_below: float) -> str:
    """The verdict on a figure that should be high."""
    if value >= warning_below:
        return OK
    return WARNING if value >= failed_below else FAILED
