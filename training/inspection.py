"""`--inspect-data`: what a run would learn from, before it learns anything.

Prints rows with the supervised tokens in colour, how the answers were found, lengths, and what the draft vocabulary
covers. Neither the target's weights nor the output directory are touched.
"""

from collections.abc import Iterator
from itertools import groupby

import numpy as np
from datasets import Dataset
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .data import PreparedRows
from .spans import ChatTemplate

SUPERVISED_STYLE = "bold green"
GIVEN_STYLE = "dim"
NO_PROMPT_WARNING = (
    "`add_generation_prompt` changes nothing in it, so whatever stands between the request and the answer is taken "
    "for the assistant's."
)
# Around what is supervised where the output has no colours.
SUPERVISED_BRACKETS = "\N{LEFT-POINTING DOUBLE ANGLE QUOTATION MARK}", "\N{RIGHT-POINTING DOUBLE ANGLE QUOTATION MARK}"


def print_inspection(
    console: Console,
    prepared: PreparedRows,
    tokenizer: PreTrainedTokenizerBase,
    counts: Tensor,
    draft_ids: Tensor,
    num_rows: int,
) -> None:
    """
    Prints everything.

    Args:
        console (`rich.console.Console`): Where to.
        prepared ([`PreparedRows`]): The data.
        tokenizer (`PreTrainedTokenizerBase`): The target's.
        counts (`torch.LongTensor` of shape `(V,)`): Occurrences of every token in what is supervised.
        draft_ids (`torch.LongTensor` of shape `(Vd,)`): The draft vocabulary.
        num_rows (`int`): Rows to print, at equal distances.
    """
    for index in choose_evenly(len(prepared.rows), num_rows):
        print_row(console, prepared.rows, index, tokenizer)
    console.print(source_table(prepared))
    for report in prepared.sources:
        if report.first_refusal is not None:
            console.print(f"first refusal of {report.name}: {report.first_refusal}", style="red", markup=False)
    console.print(f"Template: {describe_template(tokenizer)}", highlight=False, markup=False)
    console.print(length_table(prepared.rows))
    console.print(describe_vocabulary(counts, draft_ids), highlight=False)


def print_row(console: Console, rows: Dataset, index: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """One row, its supervised tokens in colour, or in brackets where there are no colours."""
    row = rows[index]
    num_supervised = sum(row["loss_mask"])
    share = num_supervised / row["length"]
    title = f"row {index + 1} of {len(rows)}: {row['length']} tokens, {num_supervised} supervised ({share:.0%})"
    console.rule(Text(title))
    text = Text()
    for is_supervised, piece in pieces(row, tokenizer):
        if is_supervised and not console.is_terminal:
            piece = piece.join(SUPERVISED_BRACKETS)
        text.append(piece, SUPERVISED_STYLE if is_supervised else GIVEN_STYLE)
    console.print(text, soft_wrap=True)


def pieces(row: dict, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[bool, str]]:
    """The text of a row where supervision begins and ends: `(is_supervised, text)`."""
    tokens = zip(row["input_ids"], row["loss_mask"], strict=True)
    for is_supervised, run in groupby(tokens, key=lambda token: bool(token[1])):
        ids = [token for token, _ in run]
        yield is_supervised, tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def choose_evenly(num_rows: int, num_chosen: int) -> list[int]:
    """At most `num_chosen` rows at equal distances."""
    count = min(num_chosen, num_rows)
    return [number * num_rows // count for number in range(count)]


def source_table(prepared: PreparedRows) -> Table:
    """What became of the rows of each source."""
    table = Table("source", "rows", "refused", "nothing to learn", "cut at the end", "rows per epoch")
    for report in prepared.sources:
        numbers = report.num_rows, report.num_refused, report.num_unsupervised, report.num_cut, report.num_used
        table.add_row(escape(report.name), *(str(number) for number in numbers))
    return table


def describe_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """How the answers in conversations were found."""
    if tokenizer.chat_template is None:
        return "there is none; only text and tokenised rows can be used."
    template = ChatTemplate(tokenizer)
    if template.marks_answers(tools=None):
        verdict = "it marks the answers with {% generation %}; the marks were compared with the messages."
    else:
        verdict = (
            "it does not mark the answers; each was found by rendering variants of its conversation and comparing "
            "them, and a row where that is not certain is refused."
        )
    return verdict if gives_generation_prompt(template) else f"{verdict} {NO_PROMPT_WARNING}"


def gives_generation_prompt(template: ChatTemplate) -> bool:
    """Whether `add_generation_prompt` changes anything."""
    request = [{"role": "user", "content": "Hello"}]
    return template.render(request, None) != template.render(request, None, add_generation_prompt=True)


def length_table(rows: Dataset) -> Table:
    """Lengths in tokens, and how much of the data is supervised."""
    lengths = np.asarray(rows["length"])
    batches = rows.select_columns(["loss_mask"]).with_format("numpy").iter(1000)
    supervised = np.array([loss_mask.sum() for batch in batches for loss_mask in batch["loss_mask"]])
    table = Table("tokens per row", "least", "half of the rows", "95 %", "most", "all rows")
    for name, values in (("all", lengths), ("supervised", supervised)):
        points = (int(value) for value in np.quantile(values, (0, 0.5, 0.95, 1), method="higher"))
        table.add_row(name, *(f"{point:,}" for point in points), f"{values.sum():,}")
    table.caption = f"{supervised.sum() / lengths.sum():.1%} of the tokens are supervised"
    return table


def describe_vocabulary(counts: Tensor, draft_ids: Tensor) -> str:
    """What the draft vocabulary covers, and how many tokens the data has."""
    total, num_used = counts.sum().item(), int((counts > 0).sum())
    covered = counts[draft_ids].sum().item() / max(total, 1)
    return (
        f"Draft vocabulary: {len(draft_ids):,} of {len(counts):,} tokens cover {covered:.2%} of what is supervised, "
        f"which has {num_used:,} different tokens."
    )
