"""JSON of a data set: what Python's reader refuses otherwise than as a syntax error, and text that is no Unicode."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# An escape of one half of a surrogate pair, which is all right beside the other half.
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def load_json(text: str, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """
    What a text of JSON says.

    Args:
        text (`str`): The JSON.
        parse_constant (`Callable`, *optional*): Of `json.loads`: what becomes of `NaN` and the infinities.

    Raises:
        ValueError: A `json.JSONDecodeError` if it is no JSON; otherwise with the end of a sentence about the text.
    """
    try:
        value = json.loads(text, parse_constant=parse_constant)
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise ValueError(f"holds a number that cannot be read: {error}") from None
    if SURROGATE.search(text):
        check_characters(value)
    return value


def check_characters(value: Any) -> None:
    """
    Requires that all text in a value of JSON can be written: half of a surrogate pair is no character.

    Raises:
        ValueError: Says which half is there, as the end of a sentence.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(f"holds {half}, half of a surrogate pair, which is no character") from None


@contextmanager
def refusing_depth(place: str) -> Iterator[None]:
    """Raises `ValueError` about `place` where Python would say that it recursed too often."""
    try:
        yield
    except RecursionError:
        raise ValueError(f"{place} is nested too deeply to be read.") from None
