"""Checks of the draft: can it learn, does training compute what decoding computes, do its states keep their size.

Shapes: T tokens, D the draft's hidden, Vd its vocabulary, K TTT steps.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..modeling_eagle3_mla import Eagle3MLADraftModel
from .arguments import Eagle3TrainingArguments
from .diagnosis_case import FAILED, OK, WARNING, Case, Finding, StudiedRow, choose_evenly, grade
from .documents import supervised_rows
from .losses import acceptance_metrics
from .optimization import MuonBeside, hidden_matrices
from .ttt import TTTDraftModel

OVERFITTING = "overfitting one batch"
OVERFIT_STEPS = 120
OVERFIT_ROWS = 2
# One batch can be learnt by heart; what stays below is told apart from a slow start by a wide margin.
GOOD_OVERFIT, POOR_OVERFIT = 0.95, 0.8
# Reached by all TTT steps, training ends early.
ENOUGH_ACCURACY = 0.99
NUM_DECODED_ROWS = 3
# Of float32 logits, relative to the largest: kernels differ in the order of their sums.
TOLERATED_DIFFERENCE = 1e-3
# A state fed back this many times larger or smaller than the first drowns the layer, or is drowned by it.
NOTABLE_RATIO, EXTREME_RATIO = 5.0, 30.0


@dataclass(frozen=True)
class DecodedRow:
    """
    What a draft computes that decodes with its cache.

    Args:
        logits (`torch.Tensor` of shape `(K, Vd)`): Of each step.
        norms (`torch.Tensor` of shape `(K + 1,)`): Of the fused state, then of each state fed back.
    """

    logits: Tensor
    norms: Tensor


def check_overfitting(case: Case, num_steps: int = OVERFIT_STEPS) -> Finding:
    """Trains a copy on one batch: whatever the draft cannot learn by heart, it is not given."""
    batch = case.study(median_rows(case.rows, OVERFIT_ROWS))
    reachable, steps_made = count_reachable(case, batch), 0
    if reachable[0] == 0:
        return Finding(
            OVERFITTING, WARNING, "The draft knows none of the target's tokens.", "Widen its vocabulary.", {}
        )
    draft = copy.deepcopy(case.draft).float().train().requires_grad_(True)
    optimizer = overfitting_optimizer(draft, case.args)
    # Steps of Muon are as large as its rate, however small the gradient has become: they have to shrink.
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=num_steps)
    while True:
        output = case.unroll(draft, batch, batch.lesson.aux_hidden_states.float(), case.args.num_ttt_steps)
        accuracies = [hits / count for hits, count in zip(output.hits.tolist(), reachable, strict=True) if count > 0]
        if steps_made == num_steps or min(accuracies) >= ENOUGH_ACCURACY or not output.loss.isfinite():
            break
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        steps_made += 1
    metrics = acceptance_metrics(output.hits, output.prefix_hits, output.num_supervised)
    measured = {
        "num_steps": steps_made,
        "learning_rate": case.args.learning_rate,
        "muon_learning_rate": case.args.muon_learning_rate,
        "loss": output.loss.item(),
        "accuracy_of_reachable_tokens": accuracies,
        "simulated_acceptance_length": metrics["simulated_acceptance_length"],
    }
    verdict = grade(accuracies[0], POOR_OVERFIT, GOOD_OVERFIT)
    remedy = "Nothing to do."
    if verdict != OK:
        remedy = (
            "The draft does not learn even one batch: look at the other failures first, then try another "
            "`--learning-rate`, and more optimizer steps where the loss is still falling."
        )
    summary = (
        f"After {steps_made} steps on one batch the draft hits {accuracies[0]:.1%} of the tokens it knows at step 0 "
        f"(all steps: {' '.join(f'{accuracy:.2f}' for accuracy in accuracies)}); simulated acceptance length "
        f"{metrics['simulated_acceptance_length']:.2f} of at most {1 + len(accuracies)}."
    )
    return Finding(OVERFITTING, verdict, summary, remedy, measured)


@torch.no_grad()
def check_parity(case: Case) -> Finding:
    """Whether the training unroll computes what a draft computes that decodes with its cache."""
    draft = copy.deepcopy(case.draft).float().eval()
    differences, num_compared = [], 0
    for row in choose_evenly(case.studied_rows, NUM_DECODED_ROWS):
        starts = starting_rows(row, case.args.num_ttt_steps)
        unrolled = unroll_logits(draft, row, starts, case.args.num_ttt_steps)
        for start in starts:
            decoded = decode(draft, row, start, len([step for step in unrolled if start in step]))
            for ttt_step, logits in enumerate(decoded.logits):
                expected = unrolled[ttt_step][start]
                differences.append(((logits - expected).abs().max() / expected.abs().max()).item())
                num_compared += 1
    largest = torch.tensor(differences).max().item()  # not a number, if one of them is not
    measured = {"num_compared": num_compared, "largest_relative_difference": largest}
    # Not `>`: a difference that is no number fails too.
    is_equal = largest <= TOLERATED_DIFFERENCE
    remedy = "Nothing to do."
    if not is_equal:
        remedy = (
            "The draft is trained on something else than it computes when it decodes: look for a shift of tokens, "
            "positions or states in the unroll, and try `--attention-backend eager_mla` (or `eager`)."
        )
    summary = (
        f"The logits of {num_compared} pairs of row and step differ between training and decoding by at most "
        f"{largest:.1e} of the largest logit."
    )
    return Finding("training against decoding", OK if is_equal else FAILED, summary, remedy, measured)


@torch.no_grad()
def check_feedback(case: Case) -> Finding:
    """Whether the states that the draft feeds back keep the size of the first one."""
    draft = copy.deepcopy(case.draft).float().eval()
    ratios = []
    for row in choose_evenly(case.studied_rows, NUM_DECODED_ROWS):
        for start in starting_rows(row, case.args.num_ttt_steps):
            norms = decode(draft, row, start, case.args.num_ttt_steps).norms
            ratios.append((norms[1:] / norms[0]).tolist())
    depth = max(map(len, ratios))
    by_step = [mean([ratio[step] for ratio in ratios if len(ratio) > step]) for step in range(depth)]
    measured = {"norm_output": draft.config.norm_output, "ratio_by_step": by_step}
    verdict, remedy = judge_feedback(by_step, draft.config.norm_output)
    summary = (
        "States fed back, relative to the fused state, step by step: "
        f"{' '.join(f'{ratio:.2f}' for ratio in by_step)} ({'after' if draft.config.norm_output else 'before'} the "
        "final norm)."
    )
    return Finding("feedback norm", verdict, summary, remedy, measured)


def judge_feedback(by_step: list[float], norm_output: bool) -> tuple[str, str]:
    """Verdict and remedy for the ratios of the steps."""
    extreme = max(max(ratio, 1 / ratio) if 0 < ratio < float("inf") else float("inf") for ratio in by_step)
    if extreme <= NOTABLE_RATIO:
        return OK, "Nothing to do."
    remedy = (
        "The weight of the final norm sets the size of the states fed back; train with a smaller one, or without "
        "`norm_output`."
        if norm_output
        else "Train with `--norm-output` (feeds back what comes after the final norm), or a lower `--learning-rate`."
    )
    return (WARNING if extreme <= EXTREME_RATIO else FAILED), remedy


def overfitting_optimizer(draft: TTTDraftModel, args: Eagle3TrainingArguments) -> torch.optim.Optimizer:
    """AdamW at the run's rate, with Muon beside it where the run has that; without weight decay."""
    adamw = torch.optim.AdamW(draft.parameters(), lr=args.learning_rate, weight_decay=0.0)
    if not args.muon_learning_rate:
        return adamw
    return MuonBeside(adamw, hidden_matrices(draft), args.muon_learning_rate, weight_decay=0.0)


def count_reachable(case: Case, batch: StudiedRow) -> list[int]:
    """For each TTT step, the supervised pairs whose target token the draft can say at all."""
    loss_mask, document_ids = batch.batch["loss_mask"], batch.batch["document_ids"]
    is_answer = loss_mask[:, 1:].bool() & (document_ids[:, 1:] == document_ids[:, :-1])
    knows = torch.zeros_like(is_answer)
    knows[is_answer] = case.draft.t2d[batch.answers.target_tokens]
    counts = []
    for ttt_step in range(case.args.num_ttt_steps):
        supervised = supervised_rows(loss_mask, document_ids, ttt_step)[:, : -ttt_step - 2]
        # Row i at step k predicts token i + 2 + k, of which `knows[i + 1 + k]` speaks.
        counts.append(int((supervised & knows[:, ttt_step + 1 :]).sum()))
    return counts


def unroll_logits(draft: TTTDraftModel, row: StudiedRow, starts: list[int], num_steps: int) -> list[dict[int, Tensor]]:
    """Logits `(Vd,)` of the training unroll for each TTT step, by row; a row is missing where it is not supervised."""
    batch, aux_hidden_states = row.batch, row.lesson.aux_hidden_states.float()
    documents = batch["loss_mask"], batch["document_ids"]
    logits = []
    for rows, states in draft.unroll(row.inputs_embeds.float(), aux_hidden_states, *documents, num_steps):
        indices = {start: rows.tolist().index(start) for start in starts if start in rows}
        logits.append({start: draft.lm_head(states[index]) for start, index in indices.items()})
    return logits


def starting_rows(row: StudiedRow, num_steps: int) -> list[int]:
    """The first and the middle one of the rows that are supervised at the latest step that has any."""
    loss_mask, document_ids = row.batch["loss_mask"], row.batch["document_ids"]
    for ttt_step in reversed(range(num_steps)):
        rows = supervised_rows(loss_mask, document_ids, ttt_step)[0].nonzero().flatten().tolist()
        if rows:
            return sorted({rows[0], rows[len(rows) // 2]})
    return []


def decode(draft: TTTDraftModel, row: StudiedRow, start: int, num_steps: int) -> DecodedRow:
    """
    A draft that decodes with its cache along the text, after the target has committed token `start + 1`.

    Args:
        draft ([`TTTDraftModel`]): In float32.
        row ([`StudiedRow`]): One document, from its first token.
        start (`int`): The first row that predicts; all before it fill the cache from true states.
        num_steps (`int`): Steps, as far as the text goes.
    """
    embeds, aux_hidden_states = row.inputs_embeds.float(), row.lesson.aux_hidden_states.float()
    cache = DynamicCache()
    norms = [draft.fuse(aux_hidden_states[:, start : start + 1]).norm()]
    # Not `draft(...)`: called like that, this model unrolls.
    output = Eagle3MLADraftModel.forward(
        draft,
        inputs_embeds=embeds[:, 1 : start + 2],
        aux_hidden_states=aux_hidden_states[:, : start + 1],
        past_key_values=cache,
    )
    logits = [output.logits[0, -1]]
    norms.append(output.states[:, -1].norm())
    for token in range(start + 2, min(start + 1 + num_steps, embeds.shape[1])):
        output = Eagle3MLADraftModel.forward(
            draft,
            inputs_embeds=embeds[:, token : token + 1],
            fused_states=output.states[:, -1:],
            past_key_values=cache,
        )
        logits.append(output.logits[0, -1])
        norms.append(output.states[:, -1].norm())
    return DecodedRow(torch.stack(logits), torch.stack(norms))


def median_rows(rows: Any, count: int) -> list[dict]:
    """`count` rows of about the median length of a few."""
    by_length = sorted(choose_evenly(rows, 16 * count), key=lambda row: len(row["input_ids"]))
    start = max((len(by_length) - count) // 2, 0)
    return by_length[start : start + count]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
