"""Dataset rows as things to ask the target: conversations of every form that training takes, and prompts alone."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from .conversations import (
    CONVERSATION_COLUMNS,
    Conversation,
    has_value,
    parse_dialogue,
    parse_messages,
    parse_tools,
)

# What a row says about its conversation; every other column goes with it into the result.
DIALOGUE_COLUMNS = {*CONVERSATION_COLUMNS, "prompt", "completion", "system", "tools"}


@dataclass(frozen=True)
class Survey:
    """
    What the rows of a dataset are, read once before anything is loaded that takes time.

    Args:
        sha256 (`str`): Of the rows, in their order.
        has_structure (`bool`): Some message has more than `role` and `content`, or some row has tools.
        uneven_columns (`list[str]`): Columns that hold a null or an empty list somewhere, so that their type cannot be
            seen in every part of the dataset.
    """

    sha256: str
    has_structure: bool
    uneven_columns: list[str]


def read_prompts(row: dict, number: int) -> Conversation:
    """
    The conversation of a row, with or without its last answer.

    Args:
        row (`dict`): With `messages` or `conversations`, or with `prompt` (text or messages) and perhaps `completion`.
            A text is what the user says.
        number (`int`): Its position from 1, for the error.

    Raises:
        ValueError: If there is nothing in it that the target could be asked.
    """
    if any(has_value(row, column) for column in CONVERSATION_COLUMNS):
        return Conversation(parse_dialogue(row, number), parse_tools(row, number))
    if not has_value(row, "prompt"):
        raise ValueError(
            f"Row {number} must have `messages`, `conversations` or `prompt`, got the columns {sorted(row)}."
        )
    given = _read_side(row, "prompt", "user", number)
    answered = _read_side(row, "completion", "assistant", number) if has_value(row, "completion") else []
    if given[-1]["role"] == "assistant" and not answered:
        raise ValueError(f"Row {number}: `prompt` ends with the assistant; there is nothing to answer.")
    return Conversation(given + answered, parse_tools(row, number), len(given))


def survey_rows(rows: Dataset) -> Survey:
    """
    Reads every row.

    Raises:
        ValueError: Names the first row that holds no conversation.
    """
    digest = hashlib.sha256()
    has_structure, uneven = False, set()
    for number, row in enumerate(rows, start=1):
        conversation = read_prompts(row, number)
        keys = {key for message in conversation.messages for key in message}
        has_structure = has_structure or bool(conversation.tools) or not keys <= {"role", "content"}
        uneven.update(name for name, value in row.items() if name not in DIALOGUE_COLUMNS and _is_uneven(value))
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return Survey(digest.hexdigest(), has_structure, sorted(uneven))


def _read_side(row: dict, column: str, role: str, number: int) -> list[dict[str, Any]]:
    value = row[column]
    messages = [{"role": role, "content": value}] if isinstance(value, str) else value
    return parse_messages(messages, column, number)


def _is_uneven(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_is_uneven, value.values()))
    if isinstance(value, list):
        return not value or any(map(_is_uneven, value))
    return value is None
