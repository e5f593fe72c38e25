"""Dataset rows as conversations: all spellings of the same thing, and errors that name row, column and remedy."""

import json
import math

import pytest

from eagle3_mla.training.conversations import (
    drop_nulls,
    parse_conversation,
    parse_messages,
    parse_tools,
    read_completion,
    read_conversation,
)
from eagle3_mla.training.prompt_rows import read_prompts

CONVERSATION = [{"role": "user", "content": "say abc"}, {"role": "assistant", "content": "abc"}]
USER = CONVERSATION[0]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CONVERSATION},
        {"conversations": CONVERSATION},
        {"conversations": [{"from": "human", "value": "say abc"}, {"from": "gpt", "value": "abc"}]},
        {"messages": None, "conversations": CONVERSATION},
        {"messages": [], "conversations": CONVERSATION},
        {"messages": json.dumps(CONVERSATION)},
        {"messages": [USER, {"role": "model", "content": "abc"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "say "}, "abc"]}, CONVERSATION[1]]},
        {"messages": [message | {"tool_calls": None, "name": None} for message in CONVERSATION]},
        {"messages": [{"role": "user", "content": "say abc", "value": None}, {"from": "gpt", "value": "abc"}]},
    ],
)
def test_all_spellings_of_a_conversation_are_read(row):
    assert parse_conversation(row, 1) == CONVERSATION


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"function": {"name": "add", "arguments": '{"a": 2}'}},
        {"name": "add", "arguments": {"a": 2}},
        {"name": "add", "arguments": '{"a": 2}'},
        {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": None}}, "id": None},
    ],
)
def test_all_spellings_of_a_tool_call_are_read(call):
    expected = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    for stored in ([call], json.dumps([call]), [json.dumps(call)]):
        if "b" not in str(stored) or isinstance(stored[0], dict):
            answer = {"role": "assistant", "content": None, "tool_calls": stored}
            assert parse_conversation({"messages": [USER, answer]}, 1) == expected


def test_nulls_of_a_json_string_are_kept_where_they_are_the_users():
    """Arrow adds nulls to objects only; what a string says was written by somebody."""
    arguments = {"a": 2, "b": None, "c": {"d": None}}
    call = {"id": None, "function": {"name": "add", "arguments": arguments, "strict": None}}
    answer = {"role": "assistant", "content": None, "name": None, "tool_calls": [call]}
    expected = [USER, {"role": "assistant", "content": ""}]
    expected[1]["tool_calls"] = [{"type": "function", "function": {"name": "add", "arguments": arguments}}]
    as_text = {"function": {"name": "add", "arguments": json.dumps(arguments)}}
    for messages in (
        json.dumps([USER, answer]),
        [USER, json.dumps(answer)],
        [USER, answer | {"tool_calls": json.dumps([call])}],
        [USER, answer | {"tool_calls": [json.dumps(call)]}],
        [USER, answer | {"tool_calls": [as_text]}],
    ):
        assert parse_conversation({"messages": messages}, 1) == expected
        assert read_prompts({"messages": messages}, 1).messages == expected


def test_nulls_of_a_schema_in_a_json_string_are_kept():
    schema = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"default": None}}}}}
    for tools in (json.dumps([schema]), [json.dumps(schema)]):
        assert parse_tools({"tools": tools}, 1) == [schema]
    assert "default" not in str(parse_tools({"tools": [schema]}, 1))


def test_calls_and_results_of_sharegpt_are_read():
    row = {
        "conversations": [
            {"from": "human", "value": "say abc"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "four"},
        ],
        "system": "Be brief.",
        "tools": json.dumps([TOOL["function"]]),
    }
    conversation = read_conversation(row, 1)
    assert conversation.messages == [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "four"},
    ]
    assert conversation.tools == [TOOL]
    assert conversation.answers() == [2, 4]


def test_a_system_message_is_not_doubled():
    system = {"role": "system", "content": "Be brief."}
    assert parse_conversation({"messages": [system, *CONVERSATION], "system": "no"}, 1) == [system, *CONVERSATION]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_one_name(key):
    answer = {"role": "assistant", "content": "abc", key: "hm"}
    expected = {"role": "assistant", "content": "abc", "reasoning_content": "hm"}
    assert parse_conversation({"messages": [USER, answer]}, 1)[1] == expected


@pytest.mark.parametrize("tools", [None, [], "[]", "null"])
def test_a_row_without_tools_has_none(tools):
    assert parse_tools({"tools": tools}, 1) is None


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)], [TOOL["function"]]])
def test_all_spellings_of_tools_are_read(tools):
    assert parse_tools({"tools": tools}, 1) == [TOOL]


def test_nulls_that_arrow_added_are_dropped_however_deep():
    assert drop_nulls({"a": None, "b": [{"c": None, "d": 0}], "e": {"f": None}}) == {"b": [{"d": 0}], "e": {}}


def test_what_a_template_may_read_is_kept():
    message = {"role": "tool", "content": "4", "tool_call_id": "x1", "name": "add"}
    assert parse_messages([message], "messages", 1) == [message]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ([USER], [CONVERSATION[1]]),
        ("say abc", [CONVERSATION[1]]),
        ([USER], "abc"),
    ],
)
def test_a_completion_of_messages_is_learnt_from_and_its_prompt_is_not(prompt, completion):
    conversation = read_completion({"prompt": prompt, "completion": completion}, 1)
    assert conversation.messages == CONVERSATION
    assert conversation.answers() == [1]


def test_an_answer_in_the_prompt_is_not_learnt_from():
    conversation = read_completion({"prompt": [*CONVERSATION, USER], "completion": [CONVERSATION[1]]}, 1)
    assert conversation.answers() == [3]


def answer_with(**fields) -> dict:
    return {"messages": [USER, {"role": "assistant"} | fields]}


WRONG = {
    "no columns": ({"text": "abc"}, r"Row 7 must have `messages` or `conversations`, got the columns \['text'\]"),
    "no answer": ({"messages": [USER]}, "Row 7 has no assistant turn"),
    "an empty JSON list": ({"messages": "[]"}, "Row 7 has no assistant turn"),
    "not a list": ({"messages": 3}, r"Row 7: `messages` must be a list of messages, got int 3"),
    "not a number": ({"messages": math.nan}, r"Row 7: `messages` must be a list of messages, got float nan"),
    "one message": (
        {"messages": USER},
        r"must be a list of messages, got an object with the keys \['content', 'role'\]",
    ),
    "text": ({"messages": "hello"}, r"Row 7: `messages` is text that is not JSON .*'hello'"),
    "too many brackets": ({"messages": "[" * 100_000}, "Row 7: `messages` is nested too deeply to be read"),
    "brackets that Python's reader takes": (
        {"messages": "[" * 900 + "]" * 900},
        "Row 7: `messages` is nested too deeply to be read",
    ),
    "tools of many brackets": (
        {"messages": CONVERSATION, "tools": "[" * 100_000},
        "Row 7: `tools` is nested too deeply to be read",
    ),
    "a number without end": ({"messages": "[" + "7" * 5000 + "]"}, "Row 7: `messages` holds a number that cannot be"),
    "half of a surrogate pair": (
        {"messages": '[{"role": "user", "content": "\\ud800"}]'},
        r"Row 7: `messages` holds \\ud800, half of a surrogate pair",
    ),
    "a null message": ({"messages": [USER, None]}, r"message 2 of `messages` must be an object .* got null"),
    "a number as message": ({"messages": [USER, 5]}, r"message 2 of `messages` must be an object .* got int 5"),
    "no role": ({"messages": [{"content": "abc"}]}, r"message 1 of `messages` must have a `role` .* got null"),
    "an odd role": ({"messages": [{"role": 3, "content": "abc"}]}, r"must have a `role` .* got int 3"),
    "no content": (answer_with(content=None), r"Row 7, message 2 of `messages`: `content` .* must be text, got null"),
    "content that is not a number": (answer_with(content=math.nan), r"`content` .* must be text, got float nan"),
    "an image": (
        answer_with(content=[{"type": "image", "url": "x"}]),
        r"a part of `content` must be text, got an object .* of type 'image'. Images",
    ),
    "a part without text": (answer_with(content=[{"type": "text", "text": None}]), "a part of `content` must be text"),
    "odd reasoning": (
        answer_with(content="a", reasoning_content=[1]),
        r"`reasoning_content` must be text, got list \[1\]",
    ),
    "odd calls": (answer_with(tool_calls=5), r"`tool_calls` must be a list of calls, got int 5"),
    "a call without name": (answer_with(tool_calls=[{"arguments": {}}]), r"must have the `name` of a function"),
    "a null call": (answer_with(tool_calls=[None]), r"a call in `tool_calls` must be an object, got null"),
    "broken arguments": (
        answer_with(tool_calls=[{"name": "add", "arguments": "{a: 2}"}]),
        r"`arguments` is text that is not JSON .*'{a: 2}'",
    ),
    "a list of arguments": (
        answer_with(tool_calls=[{"name": "add", "arguments": [2]}]),
        r"`arguments` must be an object, got list \[2\]",
    ),
    "broken tools": ({"messages": CONVERSATION, "tools": "[{"}, r"Row 7: `tools` is text that is not JSON"),
    "tools that are no schemas": (
        {"messages": CONVERSATION, "tools": [3]},
        r"`tools` must hold JSON schemas, got int 3",
    ),
    "one tool": ({"messages": CONVERSATION, "tools": TOOL}, r"`tools` must be a list of JSON schemas, got an object"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_row_that_cannot_be_read_is_named_with_what_was_found(name):
    row, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        read_conversation(row, 7)


def test_a_completion_without_an_answer_is_named():
    with pytest.raises(ValueError, match="Row 7 has no assistant turn"):
        read_completion({"prompt": CONVERSATION, "completion": [USER]}, 7)
    with pytest.raises(ValueError, match=r"Row 7: `completion` must be a list of messages, got int 3"):
        read_completion({"prompt": "a", "completion": 3}, 7)
