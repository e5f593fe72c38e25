"""The rows of a regenerated dataset: an answered conversation as text, or as exactly the tokens of the target.

`messages` is readable, works for every chat template and for other tools, and is tokenised again by training; where
the template does not give back the tokens that the target saw and said (it leaves out earlier reasoning, or the
target chose another spelling of a word than the tokenizer would), this is counted as `num_unreproduced`. `tokens`
holds exactly these tokens, `input_ids`, with `loss_mask`, which is 1 where the target produced the token: a draft then
learns what it will have to imitate, to the last token.

A dataset is read from all of its shards as one table, so a column must have the same type in each of them, whatever
happens to be in it. Therefore messages with more than role and content (calls, reasoning) are written as one JSON
text per conversation, and so are tools; training reads both.
"""

import json
from dataclasses import dataclass

import pyarrow as pa
from datasets import Dataset

from .dialogues import Dialogue, token_rows
from .prompt_rows import DIALOGUE_COLUMNS, Survey

OUTPUT_FORMATS = ("messages", "tokens")
FILE_FORMATS = ("jsonl", "parquet")
NEW_COLUMNS = ("finish_reason", "input_ids", "loss_mask")


@dataclass(frozen=True)
class RowForm:
    """
    How rows are written.

    Args:
        output_format (`str`): `"messages"` or `"tokens"`.
        has_structure (`bool`): Messages have more than `role` and `content`, or there are tools.
        has_reasoning (`bool`): The answers may come with reasoning, from an endpoint.
    """

    output_format: str
    has_structure: bool
    has_reasoning: bool

    def rows(self, dialogue: Dialogue, row: dict) -> list[dict]:
        """
        What is written for one conversation: the other columns of its row, and its new turns.

        Args:
            dialogue ([`Dialogue`]): With at least one answer.
            row (`dict`): The row of the dataset that it comes from.
        """
        kept = {name: value for name, value in row.items() if name not in DIALOGUE_COLUMNS}
        kept = {"id": dialogue.number, **kept}
        if self.output_format == "messages":
            return [{**kept, **finish(dialogue.is_cut), **self._conversation(dialogue)}]
        exact = token_rows(dialogue.answers)
        return [
            # A cut answer is the last one.
            {**kept, **finish(dialogue.is_cut and index == len(exact)), "input_ids": ids, "loss_mask": mask}
            for index, (ids, mask) in enumerate(exact, start=1)
        ]

    def schema(self, rows: Dataset) -> pa.Schema:
        """Columns of a Parquet shard of answered `rows`."""
        source = rows.features.arrow_schema
        fields = [field for field in source if field.name not in {*DIALOGUE_COLUMNS, *NEW_COLUMNS}]
        if "id" not in source.names:
            fields.insert(0, pa.field("id", pa.int64()))
        fields.append(pa.field("finish_reason", pa.string()))
        if self.output_format == "tokens":
            return pa.schema([*fields, *(pa.field(name, pa.list_(pa.int32())) for name in ("input_ids", "loss_mask"))])
        if self.has_structure:
            return pa.schema([*fields, pa.field("messages", pa.string()), pa.field("tools", pa.string())])
        names = ("role", "content", "reasoning_content") if self.has_reasoning else ("role", "content")
        message = pa.struct([pa.field(name, pa.string()) for name in names])
        return pa.schema([*fields, pa.field("messages", pa.list_(message))])

    def _conversation(self, dialogue: Dialogue) -> dict:
        if self.has_structure:
            messages, tools = (
                json.dumps(part, ensure_ascii=False) for part in (dialogue.messages, dialogue.tools or [])
            )
            return {"messages": messages, "tools": tools}
        if self.has_reasoning:
            return {"messages": [with_reasoning(message) for message in dialogue.messages]}
        return {"messages": dialogue.messages}


def row_form(output_format: str, file_format: str, survey: Survey, is_endpoint: bool) -> RowForm:
    """
    How the answered rows of a dataset are written.

    Raises:
        ValueError: If JSON Lines cannot hold a column so that all shards have the same types.
    """
    if file_format == "jsonl" and survey.uneven_columns:
        raise ValueError(
            f"`--file-format jsonl` cannot hold the column `{survey.uneven_columns[0]}`, which is null or empty in "
            "some rows: shards would differ in its type. Use `--file-format parquet`."
        )
    return RowForm(output_format, survey.has_structure, has_reasoning=is_endpoint)


def finish(is_cut: bool) -> dict[str, str]:
    return {"finish_reason": "length" if is_cut else "stop"}


def with_reasoning(message: dict) -> dict:
    """The message with what it was thought before it, as text in any case."""
    return {**message, "reasoning_content": message.get("reasoning_content", "")}
