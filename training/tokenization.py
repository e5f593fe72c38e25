"""One dataset row as one training row: its tokens, and 1 where the assistant produced the token.

A row is, in this order: already tokenised (`input_ids` with `loss_mask`, `assistant_masks` or `labels`), a
conversation (`messages` or `conversations`), `prompt` and `completion`, or plain `text`.

A token belongs to the assistant iff all of its characters do. One that straddles the border between a prompt and its
answer belongs to neither and is not supervised: a draft could not be asked for it. A token without characters (some
tokenizers begin a text with one) belongs to the assistant iff it stands inside an answer or at its beginning.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from .conversations import CONVERSATION_COLUMNS, Conversation, has_value, read_completion, read_conversation
from .spans import ChatTemplate, Rendering, Span, find_answers

MASK_COLUMNS = ("loss_mask", "assistant_masks", "labels")
# The value of a label that is not learnt from, by torch's convention.
IGNORED_LABEL = -100
ACCEPTED = (
    "`messages` or `conversations`, `prompt` and `completion`, `text`, or `input_ids` with `loss_mask`, "
    "`assistant_masks` or `labels`"
)


@dataclass(frozen=True)
class TokenizationOptions:
    """
    What besides data and tokenizer decides what a training row is.

    Args:
        max_length (`int`): Longer documents are cut at the end.
        last_turn_only (`bool`, *optional*, defaults to `False`): Learn from the last answer of a conversation only.
        skip_bad_rows (`bool`, *optional*, defaults to `False`): Leave out a row that cannot be used, instead of
            raising an error.
        vocab_size (`int`, *optional*): The target's; an id that a tokenised row has must be below it.
        end_token_ids (`tuple[int, ...]`, *optional*): Tokens that end generation, besides the tokenizer's own.
    """

    max_length: int
    last_turn_only: bool = False
    skip_bad_rows: bool = False
    vocab_size: int | None = None
    end_token_ids: tuple[int, ...] = ()


class TextEncoder:
    """
    Tokens of a text with the characters that each of them stands for.

    Byte-level tokenizers can leave the white space of a token out of its offsets (`trim_offsets`), which would hide
    that a token straddles a border. That is a matter of the post-processor, so this one has none.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A fast one.

    Raises:
        ValueError: If it is not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if not tokenizer.is_fast:
            raise ValueError(
                f"The tokenizer {type(tokenizer).__name__} is not a fast one, so it does not say which characters a "
                "token stands for. Save a fast tokenizer (tokenizer.json) beside the target."
            )
        self.tokenizer = tokenizer
        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.backend.post_processor = None
        self.backend.no_truncation()
        self.backend.no_padding()

    def encode(self, text: str) -> tuple[list[int], list[Span]]:
        """Tokens of the text as it is, without special tokens around it."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def tokens_before(self, text: str, input_ids: list[int]) -> list[int]:
        """What the tokenizer puts before a text that has the tokens `input_ids`: its `bos_token`, or nothing."""
        whole = self.tokenizer(text)["input_ids"]
        for start in range(len(whole) - len(input_ids) + 1):
            if whole[start : start + len(input_ids)] == input_ids:
                return whole[:start]
        raise ValueError("the tokenizer gives other tokens with special tokens around the text than without")


class RowTokenizer:
    """
    Makes training rows of dataset rows.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The target's.
        options ([`TokenizationOptions`]): What a training row is.
        source (`str`, *optional*, defaults to `"the dataset"`): Name of the dataset, for errors.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: TokenizationOptions, source: str = "the dataset"):
        self.tokenizer = tokenizer
        self.options = options
        self.source = source
        self.encoder = TextEncoder(tokenizer)
        end_tokens = tokenizer.convert_ids_to_tokens([token for token in options.end_token_ids if token is not None])
        self.template = ChatTemplate(tokenizer, tuple(token for token in end_tokens if token is not None))

    def __call__(self, row: dict, index: int) -> dict[str, Any]:
        """
        The training row, with `refusal`, the reason why it is empty, and `is_supervised`, whether it teaches anything.

        Args:
            row (`dict`): From a dataset.
            index (`int`): Its position from 0.

        Raises:
            ValueError: If the row cannot be used, names it with the reason, unless such rows are to be skipped.
        """
        try:
            input_ids, loss_mask = self.tokenize(row, index + 1)
            refusal = None
        except ValueError as error:
            if not self.options.skip_bad_rows:
                raise ValueError(f"{error} In {self.source}; `--skip-bad-rows` leaves such rows out.") from None
            input_ids, loss_mask, refusal = [], [], str(error)
        input_ids, loss_mask = input_ids[: self.options.max_length], loss_mask[: self.options.max_length]
        return {
            "input_ids": input_ids,
            "loss_mask": loss_mask,
            "length": len(input_ids),
            "is_supervised": has_supervised_position(loss_mask),
            "refusal": refusal,
        }

    def tokenize(self, row: dict, number: int) -> tuple[list[int], list[int]]:
        """
        Tokens and mask of one row, uncut.

        Raises:
            ValueError: If it cannot be used, begins with its number.
        """
        if has_value(row, "input_ids"):
            return read_tokens(row, number, self.options.vocab_size)
        if any(has_value(row, column) for column in CONVERSATION_COLUMNS):
            return self._tokenize_conversation(read_conversation(row, number), number)
        if has_value(row, "prompt") and has_value(row, "completion"):
            if isinstance(row["prompt"], str) and isinstance(row["completion"], str):
                return self._tokenize_completion(row["prompt"], row["completion"], number)
            return self._tokenize_conversation(read_completion(row, number), number)
        if has_value(row, "text"):
            return self._tokenize_text(row["text"], number)
        columns = {name: "" if has_value(row, name) else " (empty)" for name in sorted(row)}
        found = ", ".join(f"{name}{note}" for name, note in columns.items())
        raise ValueError(f"Row {number} must have {ACCEPTED}, got the columns {found}.")

    def _tokenize_conversation(self, conversation: Conversation, number: int) -> tuple[list[int], list[int]]:
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"Row {number} is a conversation, but the tokenizer has no chat template. Save one beside the target "
                "as chat_template.jinja."
            )
        try:
            text = self.template.render(conversation.messages, conversation.tools)
            input_ids, offsets = self.encoder.encode(text)
            answers = conversation.answers()[-1:] if self.options.last_turn_only else conversation.answers()
            is_cut = len(input_ids) > self.options.max_length
            limit = offsets[self.options.max_length][0] if is_cut else len(text) + 1
            spans = find_answers(Rendering(self.template, conversation, text), answers, limit)
        except ValueError as error:
            raise ValueError(f"Row {number}: {str(error).removesuffix('.')}.") from None
        return input_ids, mask_tokens(offsets, spans)

    def _tokenize_completion(self, prompt: str, completion: str, number: int) -> tuple[list[int], list[int]]:
        """A prompt that is no conversation, with its completion and the end that the target would give it."""
        if not completion:
            raise ValueError(f"Row {number}: `completion` is empty; there is nothing to learn from it.")
        end = self.tokenizer.eos_token or ""
        text = prompt + (completion if completion.endswith(end) else completion + end)
        input_ids, offsets = self.encoder.encode(text)
        before = self._tokens_before(text, input_ids, number)
        return before + input_ids, [0] * len(before) + mask_tokens(offsets, [(len(prompt), len(text))])

    def _tokenize_text(self, text: Any, number: int) -> tuple[list[int], list[int]]:
        """Plain text, of which the target could have said everything but the first token."""
        if not isinstance(text, str) or not text:
            raise ValueError(f"Row {number}: `text` must be text that is not empty, got {text!r:.40}.")
        input_ids, _ = self.encoder.encode(text)
        input_ids = self._tokens_before(text, input_ids, number) + input_ids
        return input_ids, [0] + [1] * (len(input_ids) - 1)

    def _tokens_before(self, text: str, input_ids: list[int], number: int) -> list[int]:
        try:
            return self.encoder.tokens_before(text, input_ids)
        except ValueError as error:
            raise ValueError(f"Row {number}: {error}.") from None


def read_tokens(row: dict, number: int, vocab_size: int | None = None) -> tuple[list[int], list[int]]:
    """
    A row that is tokenised already.

    Args:
        row (`dict`): With `input_ids` and one of `loss_mask`, `assistant_masks` (1 where the assistant produced the
            token) and `labels` (-100 where it did not); `attention_mask`, where there is one, is 0 at padding, which
            is left out.
        number (`int`): Position in the dataset from 1, for the error.
        vocab_size (`int`, *optional*): The target's.

    Raises:
        ValueError: Names the column that is wrong.
    """
    column = next((name for name in MASK_COLUMNS if has_value(row, name)), None)
    if column is None:
        raise ValueError(f"Row {number} has `input_ids` without {', '.join(f'`{name}`' for name in MASK_COLUMNS)}.")
    input_ids = _read_integers(row, "input_ids", number)
    mask = _read_integers(row, column, number, len(input_ids))
    if input_ids.min() < 0 or (vocab_size is not None and input_ids.max() >= vocab_size):
        wrong = input_ids[(input_ids < 0) | (input_ids >= (vocab_size or np.inf))][0]
        bound = "" if vocab_size is None else f" and below the target's `vocab_size` {vocab_size}"
        raise ValueError(f"Row {number}: `input_ids` must be at least 0{bound}, got {wrong}.")
    if column == "labels":
        is_supervised = mask != IGNORED_LABEL
        if (mask != input_ids)[is_supervised].any():
            raise ValueError(
                f"Row {number}: `labels` must be {IGNORED_LABEL} or the token of `input_ids` at the same position; "
                "they are not shifted."
            )
        mask = is_supervised.astype(np.int64)
    elif not np.isin(mask, (0, 1)).all():
        raise ValueError(f"Row {number}: `{column}` must be 0 or 1, got {mask[~np.isin(mask, (0, 1))][0]}.")
    if has_value(row, "attention_mask"):
        is_text = _read_integers(row, "attention_mask", number, len(input_ids)) != 0
        input_ids, mask = input_ids[is_text], mask[is_text]
    return input_ids.tolist(), mask.tolist()


def mask_tokens(offsets: list[Span], spans: list[Span]) -> list[int]:
    """1 for the tokens whose characters all lie in one of the spans; both are in rising order."""
    mask, remaining = [], iter(spans)
    first, end = next(remaining, (0, 0))
    for token_start, token_end in offsets:
        while token_start >= end and (span := next(remaining, None)) is not None:
            first, end = span
        mask.append(int(first <= token_start < end and token_end <= end))
    return mask


def has_supervised_position(loss_mask: list[int]) -> bool:
    """Two assistant tokens in a row, after at least one other token: see `documents.supervised_rows` at step 0."""
    mask = np.asarray(loss_mask[1:])
    return bool((mask[1:] * mask[:-1]).any())


def _read_integers(row: dict, column: str, number: int, length: int | None = None) -> np.ndarray:
    """The column as int64, or as Python's integers where those of the file are larger or were read as floats."""
    values = row[column]
    if not isinstance(values, list) or any(isinstance(value, list) for value in values):
        raise ValueError(f"Row {number}: `{column}` must be a list of integers, got {values!r:.40}.")
    array = np.asarray(values)
    if array.dtype.kind in "ib":
        array = array.astype(np.int64)
    else:
        for value in values:
            if not _is_whole(value):
                raise ValueError(f"Row {number}: `{column}` must hold integers, got {value!r:.40}.")
        array = np.array([int(value) for value in values], dtype=object)
    if length is not None and len(array) != length:
        raise ValueError(f"Row {number}: `{column}` must be as long as `input_ids` ({length}), got {len(array)}.")
    return array


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
