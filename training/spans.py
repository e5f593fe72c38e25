"""Where in a rendered conversation the assistant speaks, for any chat template; exact, or refused.

For a template without `{% generation %}` it is found by rendering variants of the conversation and comparing them as
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

A template with `{% generation %}` says itself what of an answer is learnt from. The same comparisons bound it, as far
as they are certain: what a block holds before the answer's beginning or behind its end (its header, the line break
behind the end-of-turn token) is cut off. The row is refused if a block lies outside the answers, if content or a call
lies outside the blocks, or if what they hold changes with what others say.

Whatever does not come out as it must is refused with the reason, never guessed.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .conversations import Conversation

# First and one-past-last character of an answer.
Span = tuple[int, int]

REMEDY = "Mark the answers in the target's chat_template.jinja with `{% generation %}` and `{% endgeneration %}`."


# Stands for the tools of a conversation where it is rendered with other words.
OTHER_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "X",
            "description": "X",
            "parameters": {
                "type": "object",
                "properties": {"x": {"type": "string", "description": "X"}},
                "required": ["x"],
            },
        },
    }
]
# More skeletons than this are not kept: where each conversation has one of its own, that would fill the memory.
MAX_KNOWN_CUTS = 10_000
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
        # What is cut off the blocks' beginnings and ends, by the hash of a conversation's skeleton; see `_skeleton`.
        self.known_cuts: dict[int, list[tuple[str, str]]] = {}

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
    What the template's `{% generation %}` blocks hold of the messages in `answers`.

    Blocks inside a macro, or around the wrong part, mark something else or nothing; see `cut_blocks`.

    Raises:
        ValueError: If the blocks are not around the answers.
    """
    text, blocks = rendering.template.render_marked(rendering.messages, rendering.conversation.tools)
    assert text == rendering.text
    spans = merge_touching(cut_blocks(rendering, blocks))
    if answers == _all_answers(rendering.messages):
        return spans
    start = find_start(rendering, answers[0])
    return [(max(first, start), last) for first, last in spans if last > start]  # blocks that touch were merged


def cut_blocks(rendering: Rendering, blocks: list[Span]) -> list[Span]:
    """
    The `{% generation %}` blocks without what they hold around the answers.

    Every conversation is rendered once more, with other words for what others say. If all but the answers' words is
    then as in a conversation before, so is what is cut off; only otherwise it is looked for.

    Raises:
        ValueError: If a block is elsewhere, an answer is not in them, or what they hold changes with what others say.
    """
    text, known_cuts = rendering.text, rendering.template.known_cuts
    other_text, other_blocks = _render_marked_others(rendering, "X")
    is_same = _texts(text, blocks) == _texts(other_text, other_blocks)
    skeleton = _skeleton(rendering, other_text, other_blocks) if is_same else None
    cuts = known_cuts.get(skeleton)
    if cuts is not None and _have_cuts(_texts(text, blocks), cuts):
        spans = [(start + len(head), end - len(tail)) for (start, end), (head, tail) in zip(blocks, cuts, strict=True)]
        return [(start, end) for start, end in spans if start < end]
    regions, are_certain = find_regions(rendering)
    pieces = [_intersect(block, merge_touching(sorted(regions))) for block in blocks]
    spans = [piece for block_pieces in pieces for piece in block_pieces]
    for answer, region in zip(_all_answers(rendering.messages), regions, strict=True):
        if answer >= rendering.conversation.num_given:
            check_holds_answer(rendering, answer, region, spans)
    check_marks_no_others(rendering)
    is_elsewhere = any(text[slice(*block)].strip() and not found for block, found in zip(blocks, pieces, strict=True))
    if is_elsewhere or not (is_same or are_certain):
        raise ValueError(
            "the template's {% generation %} blocks hold more than what the assistant says: text outside of its "
            "answers. Put them around the assistant's content and end-of-turn token only."
        )
    if skeleton is not None and len(known_cuts) < MAX_KNOWN_CUTS and all(len(found) == 1 for found in pieces):
        ends = [(block, found[0]) for block, found in zip(blocks, pieces, strict=True)]
        known_cuts[skeleton] = [(text[a:first], text[last:z]) for (a, z), (first, last) in ends]
    return spans


def check_holds_answer(rendering: Rendering, answer: int, region: Span, spans: list[Span]) -> None:
    """
    Requires that of message `answer` nothing that the template writes in `region` is outside of `spans`.

    A template may leave out lines, of reasoning, but not the last one, nor the last call of a message without content.

    Raises:
        ValueError: If something is.
    """
    message = rendering.messages[answer]
    held = [piece for span in spans for piece in _intersect(span, [region])]
    borders = [region[0], *(border for piece in held for border in piece), region[1]]
    outside = _texts(rendering.text, list(zip(borders[::2], borders[1::2], strict=True)))
    lines = [line.strip() for line in message["content"].splitlines() if line.strip()]
    names = [call["function"]["name"] for call in message.get("tool_calls", [])[-1:]]
    position, is_held = region[0], True
    for line in lines:
        found = _find_in_spans(line, rendering.text, held, position)
        position = max(position, found)
        if found < 0 and (line == lines[-1] or any(line in part for part in outside)):
            is_held = False
    for name in names:
        is_named = _find_in_spans(name, rendering.text, held, region[0]) >= 0
        is_held &= is_named or (bool(lines) and not any(name in part for part in outside))
    if not is_held:
        raise ValueError(
            f"the template's {{% generation %}} blocks do not hold the answer in message {answer + 1}. "
            "Put them around the assistant's content, calls and end-of-turn token, outside of macros."
        )


def check_marks_no_others(rendering: Rendering) -> None:
    """
    Requires that what the template's `{% generation %}` blocks hold does not change with what others say.

    What others say is replaced twice, by words that differ in everything; what the assistant says stays, also where it
    quotes them. This is done once for each sequence of kinds of messages, not for each conversation.

    Raises:
        ValueError: If it changes, or the template refuses the words.
    """
    template = rendering.template
    kinds = _kinds(rendering)
    if kinds in template.checked_kinds:
        return
    first, second = (_texts(*_render_marked_others(rendering, word)) for word in ("X", "other words"))
    if first != second:
        raise ValueError(
            "the template's {% generation %} blocks hold more than what the assistant says: their text changes with "
            "what others say. Put them around the assistant's content and end-of-turn token only."
        )
    template.checked_kinds.add(kinds)


def find_regions(rendering: Rendering) -> tuple[list[Span], bool]:
    """What the blocks of each message of the assistant may hold at most, and whether all of it is certain."""
    answers = _all_answers(rendering.messages)
    starts = [_earliest_start(rendering, answer) for answer in answers]
    ends = [_latest_end(rendering, answer, start or 0) for answer, start in zip(answers, starts, strict=True)]
    regions: list[Span] = []
    for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if start is None:
            start = next((known for known in reversed(ends[:index]) if known is not None), 0)
        if end is None:
            end = next((known for known in starts[index + 1 :] if known is not None), len(rendering.text))
        regions.append((start, max(start, end)))
    return regions, None not in [*starts, *ends]


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
    start = None
    if answer > 0 and (headers := _headers(rendering, answer)) is not None:
        before, between, header = headers
        if between.startswith(header):
            start = before + len(header)
        elif _mark_places(messages[answer])[0] == "content":
            # The prompt opens a block (for reasoning) that the template leaves out of what has been said, or leaves
            # empty. The content, at least, is the assistant's.
            start = before + len(between)
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
    for place, behind, behind_last in _texts_behind(rendering, answer, start):
        length = _turn_end(rendering, answer, place, behind, behind_last)
        if length is None and place == "content":
            # Nothing but the content: the next message begins with a token that ends generation, or there is none.
            length = _match_length(_any_of(rendering.template.end_tokens), behind) or 0
        if length is not None:
            return len(rendering.text) - len(behind) + length
    raise ValueError(f"the template does not say where message {answer + 1} ends. {REMEDY}")


def _earliest_start(rendering: Rendering, answer: int) -> int | None:
    """
    Where the prompt of message `answer` ends, as far as the text has it; `None` where that is not certain.

    Unlike `find_start`, it lets a block hold what the template writes between the prompt and the content.
    """
    prompt = _render_or_none(rendering, rendering.messages[:answer])
    if prompt is not None and rendering.text.startswith(prompt):
        return len(prompt)
    try:
        headers = None if answer == 0 else _headers(rendering, answer)
    except TemplateRefusedError:
        return None
    return None if headers is None else headers[0] + _common_length(*headers[1:])


def _latest_end(rendering: Rendering, answer: int, start: int) -> int | None:
    """
    Where message `answer` ends at the latest; `None` where that is not certain.

    Unlike `find_end`, it lets a block hold an ending that is no token known to end generation: one special token, or
    what follows the content also if the conversation ends with it.
    """
    try:
        for place, behind, behind_last in _texts_behind(rendering, answer, start):
            length = _turn_end(rendering, answer, place, behind, behind_last)
            if length is None and place == "content":
                length = _match_length(_any_of(rendering.template.special_tokens), behind)
                length = _common_length(behind, behind_last) if length is None else length
            if length is not None:
                return len(rendering.text) - len(behind) + length
    except TemplateRefusedError:
        pass
    return None


def _texts_behind(rendering: Rendering, answer: int, start: int) -> Iterator[tuple[str, str, str]]:
    """Places for a mark, what follows it, and what follows it if the conversation ends with this answer."""
    text, messages = rendering.text, rendering.messages
    for place in _mark_places(messages[answer]):
        mark = _new_mark(rendering)
        marked = [*messages[:answer], _set_mark(messages[answer], place, mark), *messages[answer + 1 :]]
        behind = _text_behind(rendering.render(marked), mark)
        if behind is None or not text.endswith(behind) or len(text) - len(behind) < start:
            continue
        is_last = answer == len(messages) - 1
        behind_last = behind if is_last else _text_behind(rendering.render(marked[: answer + 1]), mark)
        if behind_last is not None:
            yield place, behind, behind_last


def _headers(rendering: Rendering, answer: int) -> tuple[int, str, str] | None:
    """Where the message before ends, what stands between it and the answer, and what follows it in the prompt."""
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
    return len(before) - len(between), between, header


def _turn_end(rendering: Rendering, answer: int, place: str, behind: str, behind_last: str) -> int | None:
    """
    How much of the text behind an answer's mark the assistant generates, by the token that ends it.

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
    return length if length is not None and behind[:length] == behind_last[:length] else None


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


def _common_length(first: str, second: str) -> int:
    """How many characters two texts have in common from their beginning on."""
    pairs = zip(first, second, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


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


def _kinds(rendering: Rendering) -> tuple:
    return bool(rendering.conversation.tools), *map(_kind, rendering.messages)


def _render_marked_others(rendering: Rendering, word: str) -> tuple[str, list[Span]]:
    """Text and blocks where everybody but the assistant says `word`, with a number: messages stay distinct."""
    messages = [
        message | {"content": f"{word} {number}"} if message["role"] != "assistant" and message["content"] else message
        for number, message in enumerate(rendering.messages)
    ]
    try:
        return rendering.template.render_marked(messages, OTHER_TOOLS if rendering.conversation.tools else None)
    except TEMPLATE_ERRORS as error:
        raise ValueError(f"it is not certain what the template's {{% generation %}} blocks hold: {error}") from None


def _skeleton(rendering: Rendering, text: str, blocks: list[Span]) -> int | None:
    """
    A hash of all that is not the assistant's own: the kinds of messages, the text outside of the blocks, and what is
    around the content in them. `None` where a content, or the call of a message without, is not in them as it is.
    """
    borders = [0, *(border for block in blocks for border in block), len(text)]
    parts: list[Any] = [_kinds(rendering), rendering.conversation.num_given, len(blocks)]
    parts += _texts(text, list(zip(borders[::2], borders[1::2], strict=True)))
    position = 0
    for answer in _all_answers(rendering.messages):
        message = rendering.messages[answer]
        calls = message.get("tool_calls")
        said = message["content"].strip() or (calls[-1]["function"]["name"] if calls else "")
        if not said:
            return None
        position = _find_in_spans(said, text, blocks, position)
        if position < 0:
            return None
        if not calls and "reasoning_content" not in message:
            start, end = next(block for block in blocks if position <= block[1])
            parts += [text[start : position - len(said)], text[position:end]]
    return hash(tuple(parts))


def _have_cuts(texts: list[str], cuts: list[tuple[str, str]]) -> bool:
    return all(
        text.startswith(head) and text.endswith(tail) and len(text) >= len(head + tail)
        for text, (head, tail) in zip(texts, cuts, strict=True)
    )


def _texts(text: str, spans: list[Span]) -> list[str]:
    return [text[start:end] for start, end in spans]


def _intersect(span: Span, regions: list[Span]) -> list[Span]:
    """The parts of `span` that lie in `regions`, which do not overlap."""
    parts = [(max(span[0], start), min(span[1], end)) for start, end in regions]
    return [(start, end) for start, end in parts if start < end]


def _find_in_spans(line: str, text: str, spans: list[Span], position: int) -> int:
    """One past the first place of `line` at or behind `position` that lies in a span; -1 where there is none."""
    for start, end in spans:
        found = text.find(line, max(start, position), end)
        if found >= 0:
            return found + len(line)
    return -1
