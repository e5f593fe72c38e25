"""Checks of the data: what is supervised, whether the draft can say it, whether the target would, and how long it is.

Shapes: V the target's vocabulary.
"""

from collections.abc import Iterable
from itertools import groupby
from typing import Any

import torch

from .diagnosis_case import FAILED, OK, WARNING, Case, Finding, grade

NUM_EXAMPLES = 3
EXAMPLE_TOKENS = 8
# A few answers may be cut or odd; more than this is a habit of the template or the mask.
TOLERATED_ANSWERS = 0.05
TOLERATED_TRUNCATED_ROWS = 0.25
TOLERATED_UNSUPERVISED_ROWS = 0.1
# Published heads with 32,000 of 128,000 tokens cover 95 % and more of what their targets say.
GOOD_COVERAGE, POOR_COVERAGE = 0.95, 0.8
# Text of the target itself agrees by 100 % if greedy and about 70 to 90 % if sampled.
GOOD_AGREEMENT, POOR_AGREEMENT = 0.6, 0.4
TOLERATED_LONG_POSITIONS, REFUSED_LONG_POSITIONS = 0.01, 0.25
SMALL_SHARE_OF_POSITIONS = 1 / 8


def check_masks(case: Case) -> Finding:
    """Which tokens are supervised: enough of them, whole answers, each with its end-of-turn token, nothing else."""
    answers = [(row, start, end) for row in case.counted_rows for start, end in answer_spans(row["loss_mask"])]
    num_tokens = sum(len(row["input_ids"]) for row in case.counted_rows)
    is_cut = [len(row["input_ids"]) >= case.max_length for row in case.counted_rows]
    end_ids = set(case.end_ids)
    # Supervised from the first token to the last, without the end of a turn in between: not an answer.
    is_plain_text = [all(row["loss_mask"]) and end_ids.isdisjoint(row["input_ids"][:-1]) for row in case.counted_rows]
    complete = [
        row["input_ids"][start:end]
        for row, start, end in answers
        if end < len(row["input_ids"]) or len(row["input_ids"]) < case.max_length
        if start > 0 or not end_ids.isdisjoint(row["input_ids"][:-1])
    ]
    measured = {
        "num_rows": len(case.counted_rows),
        "num_answers": len(answers),
        "supervised_share": sum(end - start for _, start, end in answers) / num_tokens,
        "rows_without_supervision": share_without_answer(case),
        "plain_text_rows": share(is_plain_text),
        "truncated_rows": share(is_cut),
        "answers_ending_with_end_of_turn": share((answer[-1] in end_ids for answer in complete), of_none=1.0),
        "answers_beyond_end_of_turn": share(not end_ids.isdisjoint(answer[:-1]) for answer in complete),
        "end_of_turn_tokens": case.tokenizer.convert_ids_to_tokens(sorted(end_ids)),
        "examples": [describe_answer(case, *answer) for answer in answers[:NUM_EXAMPLES]],
    }
    verdict, remedy = judge_masks(measured)
    summary = (
        f"{measured['supervised_share']:.0%} of the tokens are supervised; "
        f"{measured['answers_ending_with_end_of_turn']:.0%} of the answers end with an end-of-turn token, "
        f"{measured['answers_beyond_end_of_turn']:.0%} go on behind one; {measured['truncated_rows']:.0%} of the rows "
        f"are cut at {case.max_length} tokens, {measured['rows_without_supervision']:.0%} have no answer."
    )
    return Finding("mask and template", verdict, summary, remedy, measured)


def judge_masks(measured: dict[str, Any]) -> tuple[str, str]:
    """Verdict and remedy, the gravest fault first."""
    without_end = 1 - measured["answers_ending_with_end_of_turn"]
    if measured["answers_beyond_end_of_turn"] > TOLERATED_ANSWERS:
        return FAILED, (
            "The mask covers more than the assistant's answers; put `{% generation %}` and `{% endgeneration %}` "
            "around the answer and its end-of-turn token only, and look at `--inspect-data 3`."
        )
    if without_end > TOLERATED_ANSWERS:
        return FAILED if without_end > 0.5 else WARNING, (
            "The end-of-turn token is not supervised, so the draft never learns to stop and misses the last token of "
            "each answer; move it inside `{% generation %}`, or name it as `eos_token_id` in the generation config."
        )
    if measured["plain_text_rows"] > TOLERATED_ANSWERS:
        return WARNING, (
            "Rows are supervised from their first token on: right for plain text, wrong for conversations, of which "
            "only the answers should be."
        )
    if measured["rows_without_supervision"] > TOLERATED_UNSUPERVISED_ROWS:
        return WARNING, "Rows without an answer teach nothing; look at them with `--inspect-data 3`."
    if measured["truncated_rows"] > TOLERATED_TRUNCATED_ROWS:
        return WARNING, "Raise `--max-length`: the ends of many answers are never seen."
    return OK, "Nothing to do."


def check_vocabulary(case: Case) -> Finding:
    """Whether the draft can say what the data and the target say; a token outside its vocabulary is never accepted."""
    known = case.draft.t2d.cpu()
    supervised = torch.tensor(
        [
            token
            for row in case.counted_rows
            for token, is_answer in zip(row["input_ids"], row["loss_mask"], strict=True)
            if is_answer
        ]
    )
    target_tokens = case.answers.target_tokens.cpu()
    spoken_ends = [token for token in case.end_ids if (supervised == token).any()]
    unknown_ends = [token for token in spoken_ends if not known[token]]
    measured = {
        "draft_vocab_size": case.draft.config.draft_vocab_size,
        "vocab_size": case.draft.config.vocab_size,
        "supervised_coverage": known[supervised].double().mean().item(),
        "target_coverage": known[target_tokens].double().mean().item(),
        "unknown_end_of_turn_tokens": case.tokenizer.convert_ids_to_tokens(unknown_ends),
    }
    coverage = min(measured["supervised_coverage"], measured["target_coverage"])
    verdict, remedy = grade(coverage, POOR_COVERAGE, GOOD_COVERAGE), "Nothing to do."
    if unknown_ends:
        verdict, remedy = (
            FAILED,
            "The draft can never propose the end of a turn; train it with a new draft vocabulary.",
        )
    elif verdict != OK:
        remedy = (
            "Raise `--draft-vocab-size`, or choose the vocabulary from text that looks like what the target will be "
            "asked for; every token outside ends a draft."
        )
    summary = (
        f"{measured['supervised_coverage']:.1%} of the supervised tokens and {measured['target_coverage']:.1%} of the "
        f"target's own choices are among the draft's {measured['draft_vocab_size']} of {measured['vocab_size']} "
        "tokens."
    )
    return Finding("draft vocabulary", verdict, summary, remedy, measured)


def check_agreement(case: Case) -> Finding:
    """Whether the data are what the target would say: a draft imitates the target, on text that the target goes on."""
    answers = case.answers
    agreement = (answers.tokens == answers.target_tokens).double().mean().item()
    measured = {
        "num_tokens": len(answers.tokens),
        "top_1_agreement": agreement,
        "target_loss_in_nats_per_token": answers.losses.double().mean().item(),
    }
    verdict = grade(agreement, POOR_AGREEMENT, GOOD_AGREEMENT)
    remedy = "Nothing to do."
    if verdict != OK:
        remedy = (
            "The answers are not the target's; let it answer the prompts itself with scripts/regenerate_dataset.py, "
            "and train on that. If it did, it was with another chat template or another target."
        )
    summary = (
        f"{agreement:.0%} of the data's tokens are the target's first choice; its loss on them is "
        f"{measured['target_loss_in_nats_per_token']:.2f} nats per token."
    )
    return Finding("data against target", verdict, summary, remedy, measured)


def check_lengths(case: Case) -> Finding:
    """Whether the draft has seen positions as far as it is used; behind them, acceptance falls."""
    lengths = [len(row["input_ids"]) for row in case.counted_rows]
    trained_length = case.trained_length if case.is_trained else max(lengths)
    target_positions = case.target.config.get_text_config(decoder=True).max_position_embeddings
    positions = case.draft.config.max_position_embeddings
    measured = {
        "trained_length": trained_length,
        "max_length": case.max_length,
        "longest_row": max(lengths),
        "positions_beyond_trained_length": None,
        "draft_max_position_embeddings": positions,
        "target_max_position_embeddings": target_positions,
    }
    summary = f"Trained on up to {trained_length or 'an unknown number of'} tokens"
    if trained_length is not None:
        beyond = sum(max(length - trained_length, 0) for length in lengths) / sum(lengths)
        measured["positions_beyond_trained_length"] = beyond
        summary += f" ({beyond:.0%} of the data's positions are beyond)"
    summary += f"; the draft is declared for {positions} positions, the target for {target_positions}."
    verdict, remedy = judge_lengths(measured)
    return Finding("length", verdict, summary, remedy, measured)


def judge_lengths(measured: dict[str, Any]) -> tuple[str, str]:
    """Verdict and remedy, the gravest fault first."""
    positions, target_positions = measured["draft_max_position_embeddings"], measured["target_max_position_embeddings"]
    if positions < target_positions:
        return FAILED, (
            f"Set `max_position_embeddings` to {target_positions} in the draft's config.json: serving engines break "
            "or crawl beyond the smaller number."
        )
    trained_length, beyond = measured["trained_length"], measured["positions_beyond_trained_length"]
    if trained_length is None:
        return WARNING, (
            "The checkpoint has no provenance.json with its training length; compare acceptance on short and long "
            "prompts with scripts/eval_eagle.py."
        )
    if beyond > TOLERATED_LONG_POSITIONS:
        verdict = FAILED if beyond > REFUSED_LONG_POSITIONS else WARNING
        return (
            verdict,
            "Train with a larger `--max-length` on rows that long: acceptance falls past the trained length.",
        )
    if trained_length < SMALL_SHARE_OF_POSITIONS * target_positions:
        return WARNING, (
            f"Prompts and answers may be {target_positions} tokens long; where they exceed {trained_length}, expect a "
            "lower acceptance, or train on longer rows."
        )
    return OK, "Nothing to do."


def answer_spans(loss_mask: list[int]) -> list[tuple[int, int]]:
    """Start and end of every run of supervised tokens."""
    spans, position = [], 0
    for is_answer, run in groupby(loss_mask):
        length = len(list(run))
        if is_answer:
            spans.append((position, position + length))
        position += length
    return spans


def share_without_answer(case: Case) -> float:
    """Share of the data's rows that supervise nothing, dropped ones included."""
    num_dropped, num_kept = case.num_dropped_rows, len(case.rows)
    without_answer = share(not any(row["loss_mask"]) for row in case.counted_rows)
    return (num_dropped + without_answer * num_kept) / (num_dropped + num_kept)


def describe_answer(case: Case, row: dict, start: int, end: int) -> dict[str, str]:
    """The tokens around both borders of an answer, decoded."""

    def decode(first: int, last: int) -> str:
        return case.tokenizer.decode(row["input_ids"][max(first, 0) : last])

    return {
        "before": decode(start - EXAMPLE_TOKENS, start),
        "first": decode(start, min(start + EXAMPLE_TOKENS, end)),
        "last": decode(max(end - EXAMPLE_TOKENS, start), end),
        "after": decode(end, end + EXAMPLE_TOKENS),
    }


def share(flags: Iterable[bool], of_none: float = 0.0) -> float:
    """Share of true ones."""
    flags = list(flags)
    return sum(flags) / len(flags) if flags else of_none
