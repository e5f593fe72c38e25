"""A dataset row as a conversation, in the one form that chat templates expect, whatever form it was stored in.

Messages are `{role, content}` or `{from, value}`, with `tool_calls`, `reasoning_content` and whatever else a template
may read; tools and arguments may be JSON strings. Arrow gives every dictionary of a column the keys of all of them,
with nulls where a row had none; these are dropped, since a template would see keys that the row does not have. In a
JSON string nobody added nulls: those of arguments and schemas stay, those of messages and calls mean that the key is
not there.
"""

import json
from dataclasses import dataclass
from typing import Any

from .json_text import load_json, refusing_depth

CONVERSATION_COLUMNS = ("messages", "conversations")
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
# Other names for what the assistant thought before it spoke.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Conversation:
    """
    What the chat template is given.

    Args:
        messages (`list[dict]`): With `role` and `content`.
        tools (`list[dict]`, *optional*): JSON schemas of the tools that the assistant may call.
        num_given (`int`, *optional*, defaults to 0): Messages from the first on that are not learnt from: the prompt.
    """

    messages: list[dict[str, Any]]
    tools: list[dict] | None = None
    num_given: int = 0

    def answers(self) -> list[int]:
        """Positions of the assistant's messages that are learnt from."""
        roles = [message["role"] for message in self.messages]
        return [index for index, role in enumerate(roles) if role == "assistant" and index >= self.num_given]


def parse_conversation(row: dict, number: int) -> list[dict[str, Any]]:
    """
    The messages of a dataset row.

    Args:
        row (`dict`): With `messages` or `conversations`.
        number (`int`): Position in the dataset from 1, for the error.

    Raises:
        ValueError: If the row holds no conversation, or one without an assistant turn.
    """
    return _require_answer(parse_dialogue(row, number), number)


def parse_dialogue(row: dict, number: int) -> list[dict[str, Any]]:
    """The messages of a dataset row, answered or not. Raises `ValueError` if it holds none."""
    column = next((name for name in CONVERSATION_COLUMNS if has_value(row, name)), None)
    if column is None:
        raise ValueError(f"Row {number} must have `messages` or `conversations`, got the columns {sorted(row)}.")
    messages = parse_messages(row[column], column, number)
    is_system_first = any(message["role"] == "system" for message in messages[:1])
    if isinstance(row.get("system"), str) and row["system"] and not is_system_first:
        messages.insert(0, {"role": "system", "content": row["system"]})
    return messages


def read_conversation(row: dict, number: int) -> Conversation:
    """A row of messages, with its tools. Raises `ValueError` as `parse_conversation` does."""
    return Conversation(parse_conversation(row, number), parse_tools(row, number))


def read_completion(row: dict, number: int) -> Conversation:
    """
    A row of `prompt` and `completion` of which one or both are messages; only the completion is learnt from.

    Raises:
        ValueError: If one of them is neither text nor messages, or the completion has no assistant turn.
    """
    sides = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        value = row[column]
        messages = [{"role": role, "content": value}] if isinstance(value, str) else value
        sides.append(parse_messages(messages, column, number))
    prompt, completion = sides
    return Conversation(prompt + _require_answer(completion, number), parse_tools(row, number), len(prompt))


def parse_messages(value: Any, column: str, number: int) -> list[dict[str, Any]]:
    """
    Messages in the form of chat templates.

    Raises:
        ValueError: Names the row, the column, the message and what was found there.
    """
    place = f"Row {number}: `{column}`"
    with refusing_depth(place):
        messages = _from_json(drop_nulls(value), place)
        if not isinstance(messages, list):
            raise ValueError(f"{place} must be a list of messages, got {_describe(messages)}.")
        return [
            _parse_message(message, f"Row {number}, message {position} of `{column}`")
            for position, message in enumerate(messages, start=1)
        ]


def parse_tools(row: dict, number: int) -> list[dict] | None:
    """
    The JSON schemas in `tools`; `None` where a row has none.

    Raises:
        ValueError: If the column holds something else.
    """
    place = f"Row {number}: `tools`"
    with refusing_depth(place):
        tools = _from_json(drop_nulls(row.get("tools")), place)
        if not tools:
            return None
        if not isinstance(tools, list):
            raise ValueError(f"{place} must be a list of JSON schemas, got {_describe(tools)}.")
        return [_parse_tool(tool, place) for tool in tools]


def has_value(row: dict, column: str) -> bool:
    """Whether the row says something in this column; Arrow fills columns that other rows have with nulls."""
    value = row.get(column)
    return value is not None and value != []


def _parse_message(message: Any, place: str) -> dict[str, Any]:
    message = drop_nulls(_from_json(message, place), but_in="arguments")
    if not isinstance(message, dict):
        raise ValueError(f"{place} must be an object with `role` and `content`, got {_describe(message)}.")
    stated_role = message.pop("role", message.pop("from", None))
    if not isinstance(stated_role, str) or not stated_role:
        raise ValueError(f"{place} must have a `role` (or `from`) as text, got {_describe(stated_role)}.")
    content = message.pop("content", None)
    value = message.pop("value", None)
    content = value if content is None else content
    if stated_role == "function_call":
        message["tool_calls"], content = _from_json(content, place), ""
    tool_calls = message.pop("tool_calls", None)
    reasoning = [message.pop(key, None) for key in REASONING_KEYS]
    parsed = {"role": ROLES.get(stated_role, stated_role)}
    speaks_otherwise = parsed["role"] == "assistant" and (tool_calls or any(reasoning))
    parsed["content"] = "" if content is None and speaks_otherwise else _parse_content(content, place)
    if any(reasoning):
        parsed["reasoning_content"] = _parse_reasoning(next(filter(None, reasoning)), place)
    if tool_calls:
        parsed["tool_calls"] = _parse_tool_calls(tool_calls, place)
    return parsed | message


def _parse_content(content: Any, place: str) -> str:
    """Text, or the parts of a text one behind the other."""
    if isinstance(content, list):
        return "".join(_parse_part(part, place) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{place}: `content` (or `value`) must be text, got {_describe(content)}.")
    return content


def _parse_part(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.get("type", "text") != "text":
        kind = part.get("type") if isinstance(part, dict) else None
        raise ValueError(
            f"{place}: a part of `content` must be text, got {_describe(part)}"
            f"{'' if kind is None else f' of type {kind!r}'}. Images, sound and the like cannot be trained on."
        )
    return part["text"]


def _parse_reasoning(reasoning: Any, place: str) -> str:
    if not isinstance(reasoning, str):
        raise ValueError(f"{place}: `reasoning_content` must be text, got {_describe(reasoning)}.")
    return reasoning


def _parse_tool_calls(tool_calls: Any, place: str) -> list[dict]:
    """Calls as `{type, function: {name, arguments}}` with arguments as an object, which templates write as JSON."""
    tool_calls = _from_json(tool_calls, f"{place}: `tool_calls`")
    tool_calls = [tool_calls] if isinstance(tool_calls, dict) else tool_calls
    if not isinstance(tool_calls, list):
        raise ValueError(f"{place}: `tool_calls` must be a list of calls, got {_describe(tool_calls)}.")
    return [_parse_tool_call(call, f"{place}: a call in `tool_calls`") for call in tool_calls]


def _parse_tool_call(call: Any, place: str) -> dict:
    call = drop_nulls(_from_json(call, place), but_in="arguments")
    if not isinstance(call, dict):
        raise ValueError(f"{place} must be an object, got {_describe(call)}.")
    call = dict(call)
    function = call.pop("function", None)
    if function is None:
        function = {"name": call.pop("name", None), "arguments": call.pop("arguments", {})}
    function = _from_json(function, place)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{place} must have the `name` of a function, got {_describe(function)}.")
    arguments = _from_json(function.get("arguments", {}), f"{place}: `arguments`")
    if not isinstance(arguments, dict):
        raise ValueError(f"{place}: `arguments` must be an object, got {_describe(arguments)}.")
    return {"type": "function"} | call | {"function": function | {"arguments": arguments}}


def _parse_tool(tool: Any, place: str) -> dict:
    tool = _from_json(tool, place)
    if not isinstance(tool, dict):
        raise ValueError(f"{place} must hold JSON schemas, got {_describe(tool)}.")
    # The schema of a function without the envelope that templates expect.
    return {"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool


def _require_answer(messages: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"Row {number} has no assistant turn; there is nothing to learn from it.")
    return messages


def _from_json(value: Any, place: str) -> Any:
    """What a JSON string says; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return load_json(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is text that is not JSON ({error}): {value[:60]!r}.") from None
    except ValueError as error:
        raise ValueError(f"{place} {error}.") from None


def drop_nulls(value: Any, but_in: str | None = None) -> Any:
    """The value without the null entries of its dictionaries, however deep; what the key `but_in` holds stays."""
    if isinstance(value, dict):
        return {
            key: item if key == but_in else drop_nulls(item, but_in) for key, item in value.items() if item is not None
        }
    if isinstance(value, list):
        return [drop_nulls(item, but_in) for item in value]
    return value


def _describe(value: Any) -> str:
    """A value in an error: its type, and what it is where that is short."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return f"an object with the keys {sorted(map(str, value))}"
    text = repr(value)
    return type(value).__name__ if len(text) > 40 else f"{type(value).__name__} {text}"
