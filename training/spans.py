"""Where in a rendered conversation the assistant speaks, for any chat template; exact, or refused.

A template with `{% generation %}` says it itself, and is believed if its blocks hold the answers and nothing that
changes with what others say. For any other it is found by rendering variants of the conversation and comparing them as
text:

- An answer begins where its prompt ends: what the template gives for the messages before it with
  `add_generation_prompt=True` must be the beginning of the whole text. Some templates write earlier messages
  differently once others follow (they drop the reasoning, or move the tools). Then the header between the message
  before and the answer is compared instead, each of the two messages replaced by a mark. Where the headers differ,
  because one of them opens a block for reasoning, the answer begins with its content.
- Its text ends where the text behind a mark in its place begins, which must be the end of the whole text. For a call
  the mark is its name or an argument.
- The tokens that end the turn belong to it, because the assistant generates them: what follows the mark up to the
  first end-of-turn token, if the same follows it when the conversation ends there. Neither the line break after that
  token nor the next header belongs to it.

Whatever does not come out as it must is refused with the reason, never guessed.
"""

import re
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .conversations import Conversation

# First and one-past-last character of an answer.
Span = tuple[int, int]

REMEDY = "Mark the answers in the target's chat_template.jinja with `{% generation %}` and `{% endgeneration %}`."


# What a template raises on messages that it was not written for: its own refusals, and Python's errors inside of it.
TEMPLATE_ERRORS = (TemplateError, TypeError, KeyError, IndexError, AttributeError, ValueError)


class TemplateRefusedError(ValueError):
    """The chat template cannot render these messages."""


class ChatTemplate:
    """
    The target's chat template, as a function from messages to text.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The target's.
        end_tokens (`list[str]`, *optional*): Tokens that end generation, besides the tokenizer's `eos_token`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_tokens: tuple[str, ...] = ()):
        self.tokenizer = tokenizer
        end_tokens = {*end_tokens, tokenizer.eos_token or ""}
        special_tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.end_tokens = sorted(token for token in end_tokens if token.strip())
        self.special_tokens = sorted({*special_tokens, *self.end_tokens})
        # Sequences of kinds of messages for which the blocks were found to hold the assistant's text only.
        self.checked_kinds: set[tuple] = set()

    def render(self, messages: list[dict], tools: list[dict] | None, add_generation_prompt: bool = False) -> str:
        """The text of `messages`. Raises [`TemplateRefusedError`] where the template refuses them."""
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TEMPLATE_ERRORS as error:
            raise TemplateRefusedError(f"the chat template refuses it: {error}") from None

    def marks_answers(self, tools: list[dict] | None) -> bool:
        """Whether the template has `{% generation %}` blocks."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.tokenizer.get_chat_template(tools=tools)) is not None

    def render_marked(self, messages: list[dict], tools: list[dict] | None) -> tuple[str, list[Span]]:
        """The text of `messages`, and what the template's `{% generation %}` blocks wrote of it."""
        texts, spans = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=self.tokenizer.get_chat_template(tools=tools),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        return texts[0], [(start, end) for start, end in spans[0] if start < end]


@dataclass(frozen=True)
class Rendering:
    """
    A conversation with its text.

    Args:
        template ([`ChatTemplate`]): The target's.
        conversation ([`Conversation`]): What was rendered.
        text (`str`): The whole of it.
    """

    template: ChatTemplate
    conversation: Conversation
    text: str

    @property
    def messages(self) -> list[dict]:
        return self.conversation.messages

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        return self.template.render(messages, self.conversation.tools, add_generation_prompt)


def find_answers(rendering: Rendering, answers: list[int], limit: int) -> list[Span]:
    """
    What the assistant says in `answers`, whether or not the template marks it.

    Args:
        rendering ([`Rendering`]): Of the whole conversation.
        answers (`list[int]`): Positions of messages of the assistant, rising.
        limit (`int`): Answers that begin at this character or behind it are not looked for.

    Raises:
        ValueError: With the reason, where it is not certain.
    """
    if rendering.template.marks_answers(rendering.conversation.tools):
        return find_marked_answers(rendering, answers)
    return find_unmarked_answers(rendering, answers, limit)


def find_marked_answers(rendering: Rendering, answers: list[int]) -> list[Span]:
    """
    What the template's `{% generation %}` blocks hold, of the messages in `answers`.

    Blocks inside a macro, or around the wrong part, mark something else or nothing; therefore what they mark must hold
    the last line of every answer, in order, and no text of others.

    Raises:
        ValueError: If it does not.
    """
    text, spans = rendering.template.render_marked(rendering.messages, rendering.conversation.tools)
    assert text == rendering.text
    position = 0
    for answer in rendering.conversation.answers():
        lines = rendering.messages[answer]["content"].strip().splitlines()
        if lines:
            position = _find_in_spans(lines[-1].strip(), text, spans, position)
        if position < 0 or not spans:
            raise ValueError(
                f"the template's {{% generation %}} blocks do not hold the answer in message {answer + 1}. "
                "Put them around the assistant's content and end-of-turn token, outside of macros."
            )
    check_marks_no_others(rendering)
    spans = merge_touching(spans)
    if answers == _all_answers(rendering.messages):
        return spans
    start = find_start(rendering, answers[0])
    return [(max(first, start), last) for first, last in spans if last > start]  # blocks that touch were merged


def check_marks_no_others(rendering: Rendering) -> None:
    """
    Requires that what the template's `{% generation %}` blocks hold does not change with what others say.

    What others say is replaced twice, by words that differ in everything; what the assistant says stays, also where it
    quotes them. This is done once for each sequence of kinds of messages, not for each conversation.

    Raises:
        ValueError: If it changes, or the template refuses the words.
    """
    template, tools = rendering.template, rendering.conversation.tools
    kinds = (bool(tools), *map(_kind, rendering.messages))
    if kinds in template.checked_kinds:
        return
    first, second = (_marked_texts(rendering, word) for word in ("X", "other words"))
    if first != second:
        raise ValueError(
            "the template's {% generation %} blocks hold more than what the assistant says: their text changes with "
            "what others say. Put them around the assistant's content and end-of-turn token only."
        )
    template.checked_kinds.add(kinds)


def find_unmarked_answers(rendering: Rendering, answers: list[int], limit: int) -> list[Span]:
    """
    The spans of `answers` by the comparisons that the module describes.

    Raises:
        ValueError: With the reason, where it is not certain.
    """
    spans: list[Span] = []
    for answer in answers:
        start = find_start(rendering, answer)
        if spans and start < spans[-1][1]:
            raise ValueError(f"message {answer + 1} begins before the answer before it ends. {REMEDY}")
        if start >= limit:
            break
        spans.append((start, find_end(rendering, answer, start)))
    return spans


def find_start(rendering: Rendering, answer: int) -> int:
    """
    Where the assistant begins to generate message `answer`: behind its prompt.

    Raises:
        ValueError: If that is not certain.
    """
    text, messages = rendering.text, rendering.messages
    prompt = _render_or_none(rendering, messages[:answer])
    if prompt is not None and text.startswith(prompt):
        return len(prompt)
    start = None if answer == 0 else _start_by_header(rendering, answer)
    if start is None:
        raise ValueError(
            f"the template does not say where message {answer + 1} begins: the text of the messages before it, with "
            f"the generation prompt, is not the beginning of the conversation's text. {REMEDY}"
        )
    return start


def find_end(rendering: Rendering, answer: int, start: int) -> int:
    """
    Where message `answer` ends, its end-of-turn token included.

    Raises:
        ValueError: If that is not certain.
    """
    text, messages = rendering.text, rendering.messages
    for place in _mark_places(messages[answer]):
        mark = _new_mark(rendering)
        marked = [*messages[:answer], _set_mark(messages[answer], place, mark), *messages[answer + 1 :]]
        behind = _text_behind(rendering.render(marked), mark)
        if behind is None or not text.endswith(behind) or len(text) - len(behind) < start:
            continue
        is_last = answer == len(messages) - 1
        behind_last = behind if is_last else _text_behind(rendering.render(marked[: answer + 1]), mark)
        if behind_last is None:
            continue
        length = _turn_end(rendering, answer, place, behind, behind_last)
        if length is not None:
            return len(text) - len(behind) + length
    raise ValueError(f"the template does not say where message {answer + 1} ends. {REMEDY}")


def _start_by_header(rendering: Rendering, answer: int) -> int | None:
    """The start by what stands between the message before and the answer, with the prompt's header for comparison."""
    messages, previous = rendering.messages, rendering.messages[answer - 1]
    place = _mark_places(messages[answer])[0]
    if not previous["content"]:
        return None
    previous_mark, mark = _new_mark(rendering), _new_mark(rendering, number=1)
    marked_answer = _set_mark(messages[answer], place, mark)
    marked_previous = previous | {"content": previous_mark}
    whole = rendering.render([*messages[: answer - 1], marked_previous, marked_answer, *messages[answer + 1 :]])
    prompt = _render_or_none(rendering, [*messages[: answer - 1], marked_previous])
    before = _text_before(rendering.render([*messages[:answer], marked_answer, *messages[answer + 1 :]]), mark)
    between = _text_behind(_text_before(whole, mark) or "", previous_mark)
    header = None if prompt is None else _text_behind(prompt, previous_mark)
    if before is None or between is None or header is None:
        return None
    if not rendering.text.startswith(before) or not before.endswith(between):
        return None
    if between.startswith(header):
        return len(before) - len(between) + len(header)
    # The prompt opens a block (for reasoning) that the template leaves out of what has been said, or leaves empty.
    # The content, at least, is the assistant's.
    return len(before) if place == "content" else None


def _turn_end(rendering: Rendering, answer: int, place: str, behind: str, behind_last: str) -> int | None:
    """
    How much of the text behind an answer's mark the assistant generates.

    Args:
        place (`str`): Where the mark is, from `_mark_places`.
        behind (`str`): What follows the mark.
        behind_last (`str`): What follows it if the conversation ends with this answer.
    """
    message, template = rendering.messages[answer], rendering.template
    end_pattern, special_pattern = _any_of(template.end_tokens), _any_of(template.special_tokens)
    if place == "content":
        # Several such tokens without a gap are one ending; the last one of it is the one that ends generation.
        ending = rf"(?:{special_pattern})*?(?:{end_pattern})|(?:{special_pattern})"
        length = _match_length(ending, behind_last) or _search_length(end_pattern, behind_last)
    elif re.search(special_pattern, str(message["tool_calls"])) is None:
        length = _search_length(end_pattern, behind_last) or _sole_length(special_pattern, behind_last)
    else:
        # What ends the turn cannot be told from what the call quotes.
        length = None
    if length is not None and behind[:length] == behind_last[:length]:
        return length
    if place != "content":
        return None
    # Nothing but the content: the next message begins with a token that ends generation, or there is no such token.
    return _match_length(end_pattern, behind) or 0


def _mark_places(message: dict) -> list[str]:
    """Parts of a message that a mark can replace; those of the last call where there is one, for it comes last."""
    if not message.get("tool_calls"):
        return ["content"]
    # Some templates repeat the name beside the result.
    return ["name", "argument"] if message["tool_calls"][-1]["function"]["arguments"] else ["name"]


def _set_mark(message: dict, place: str, mark: str) -> dict[str, Any]:
    if place == "content":
        return message | {"content": mark}
    *calls, last = message["tool_calls"]
    function = last["function"]
    if place == "name":
        function = function | {"name": mark}
    else:
        *arguments, (_, value) = function["arguments"].items()
        function = function | {"arguments": dict(arguments) | {mark: value}}
    return message | {"tool_calls": [*calls, last | {"function": function}]}


def _new_mark(rendering: Rendering, number: int = 0) -> str:
    """A word that neither the conversation nor its text has."""
    said = rendering.text + str(rendering.messages)
    mark = f"MARK{number}X"
    while mark in said:
        mark += "X"
    return mark


def _text_before(text: str, mark: str) -> str | None:
    """What is before the mark; `None` unless it is there exactly once."""
    return text.split(mark)[0] if text.count(mark) == 1 else None


def _text_behind(text: str, mark: str) -> str | None:
    """What is behind the mark; `None` unless it is there exactly once."""
    return text.split(mark)[1] if text.count(mark) == 1 else None


def _render_or_none(rendering: Rendering, messages: list[dict]) -> str | None:
    """The prompt that ends with `messages`; `None` where the template refuses such a beginning."""
    try:
        return rendering.render(messages, add_generation_prompt=True)
    except TemplateRefusedError:
        return None


def _any_of(tokens: list[str]) -> str:
    """A pattern for one of the tokens, the longest first; one that never matches where there is none."""
    return "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or r"(?!)"


def _match_length(pattern: str, text: str) -> int | None:
    """Length of what is matched at the beginning of the text, white space before it included."""
    found = re.match(rf"\s*(?:{pattern})", text)
    return None if found is None else found.end()


def _search_length(pattern: str, text: str) -> int | None:
    """Length of the text up to the end of the first match."""
    found = re.search(pattern, text)
    return None if found is None else found.end()


def _sole_length(pattern: str, text: str) -> int | None:
    """Length of the text up to the end of a match, if there is one only and nothing but white space behind it."""
    ends = [found.end() for found in re.finditer(pattern, text)]
    return ends[0] if len(ends) == 1 and not text[ends[0] :].strip() else None


def _all_answers(messages: list[dict]) -> list[int]:
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def merge_touching(spans: list[Span]) -> list[Span]:
    """The same characters in as few spans as possible; `spans` are in rising order."""
    merged: list[Span] = []
    for start, end in spans:
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _kind(message: dict) -> tuple:
    """What a template may distinguish messages by, besides their text."""
    return message["role"], bool(message["content"]), *sorted(message.keys() - {"role", "content"})


def _marked_texts(rendering: Rendering, word: str) -> list[str]:
    """What the blocks hold where everybody but the assistant says `word`, with a number: messages stay distinct."""
    messages = [
        message | {"content": f"{word} {number}"} if message["role"] != "assistant" and message["content"] else message
        for number, message in enumerate(rendering.messages)
    ]
    try:
        text, spans = rendering.template.render_marked(messages, rendering.conversation.tools)
    except TEMPLATE_ERRORS as error:
        raise ValueError(f"it is not certain what the template's {{% generation %}} blocks hold: {error}") from None
    return [text[start:end] for start, end in spans]


def _find_in_spans(line: str, text: str, spans: list[Span], position: int) -> int:
    """One past the first place of `line` at or behind `position` that lies in a span; -1 where there is none."""
    for start, end in spans:
        found = text.find(line, max(start, position), end)
        if found >= 0:
            return found + len(line)
    return -1
