"""Answers found in what chat templates write: exactly what `generate()` would have to produce, or a refusal."""

# ruff: noqa: RUF001 - the markup of one family is written with such characters
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_templates import CHATML, END_TOKENS, LLAMA3, QWEN3, TEMPLATES, make_tokenizer, tokenizer_like

from eagle3_mla.training.conversations import Conversation
from eagle3_mla.training.spans import ChatTemplate, Rendering, find_answers, find_unmarked_answers, merge_touching
from eagle3_mla.training.tokenization import RowTokenizer, TokenizationOptions, mask_tokens

SYSTEM = {"role": "system", "content": "Be brief."}
USER, OTHER_USER = {"role": "user", "content": " two and two? \n"}, {"role": "user", "content": "and one more"}
ANSWER, OTHER_ANSWER = (
    {"role": "assistant", "content": "\n the answer is four. "},
    {"role": "assistant", "content": "5"},
)
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "two"}}}],
}
RESULT = {"role": "tool", "content": "4"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
TWO_TURNS = [USER, ANSWER, OTHER_USER, OTHER_ANSWER]
CALL_JSON = '{"a": 2, "b": "two"}'
THOUGHT = ANSWER | {"reasoning_content": "2 + 2"}

# Template -> conversations and what is the assistant's in each, written down by hand.
EXPECTED = {
    "chatml": [
        ([SYSTEM, *TWO_TURNS], None, ["\n the answer is four. <|im_end|>", "5<|im_end|>"]),
        (
            [SYSTEM, USER, CALL, RESULT, ANSWER],
            TOOLS,
            [
                f'<tool_call>\n{{"name": "add", "arguments": {CALL_JSON}}}\n</tool_call><|im_end|>',
                "\n the answer is four. <|im_end|>",
            ],
        ),
    ],
    "qwen3": [
        (TWO_TURNS, None, ["\n the answer is four. <|im_end|>", "<think>\n\n</think>\n\n5<|im_end|>"]),
        (
            [USER, THOUGHT, OTHER_USER, OTHER_ANSWER | {"reasoning_content": "4 + 1"}],
            None,
            ["\n the answer is four. <|im_end|>", "<think>\n4 + 1\n</think>\n\n5<|im_end|>"],
        ),
        (
            [USER, {"role": "assistant", "content": "<think>\nwell\n</think>\n\nfour"}],
            None,
            ["<think>\nwell\n</think>\n\nfour<|im_end|>"],
        ),
        (
            [USER, CALL | {"reasoning_content": "a tool!"}, RESULT, THOUGHT],
            None,
            [
                "<think>\na tool!\n</think>\n\n\n<tool_call>\n"
                f'{{"name": "add", "arguments": {CALL_JSON}}}\n</tool_call><|im_end|>',
                "<think>\n2 + 2\n</think>\n\n the answer is four. <|im_end|>",
            ],
        ),
        # The first answer was generated behind reasoning that is gone once the user has asked again.
        (
            [USER, CALL | {"reasoning_content": "a tool!"}, RESULT, THOUGHT, OTHER_USER, OTHER_ANSWER],
            None,
            [
                f'\n<tool_call>\n{{"name": "add", "arguments": {CALL_JSON}}}\n</tool_call><|im_end|>',
                "\n the answer is four. <|im_end|>",
                "<think>\n\n</think>\n\n5<|im_end|>",
            ],
        ),
    ],
    "llama3": [
        ([SYSTEM, *TWO_TURNS], None, ["the answer is four.<|eot_id|>", "5<|eot_id|>"]),
        (
            [USER, CALL, RESULT, ANSWER],
            None,
            [f'{{"name": "add", "parameters": {CALL_JSON}}}<|eom_id|>', "the answer is four.<|eot_id|>"],
        ),
    ],
    "mistral": [
        (TWO_TURNS, None, [" the answer is four.</s>", " 5</s>"]),
        # The tools move to the last request, so the prompt of the first answer is not the beginning of the text.
        (TWO_TURNS, TOOLS, [" the answer is four.</s>", " 5</s>"]),
        (
            [USER, CALL, RESULT, ANSWER],
            TOOLS,
            [f'[TOOL_CALLS] [{{"name": "add", "arguments": {CALL_JSON}}}]</s>', " the answer is four.</s>"],
        ),
    ],
    "llama2": [(TWO_TURNS, None, [" the answer is four. </s>", " 5 </s>"])],
    "gemma": [(TWO_TURNS, None, ["the answer is four.<end_of_turn>", "5<end_of_turn>"])],
    "phi3": [([SYSTEM, *TWO_TURNS], None, ["\n the answer is four. <|end|>", "5<|end|>"])],
    "deepseek": [
        (TWO_TURNS, None, ["\n the answer is four. <｜end▁of▁sentence｜>", "5<｜end▁of▁sentence｜>"]),
        (
            [USER, {"role": "assistant", "content": "<think>\nwell\n</think>\nfour"}, OTHER_USER, OTHER_ANSWER],
            None,
            ["\nfour<｜end▁of▁sentence｜>", "5<｜end▁of▁sentence｜>"],
        ),
    ],
    "glm": [([SYSTEM, *TWO_TURNS], None, ["\n the answer is four. <|user|>", "5"])],
    "cohere": [(TWO_TURNS, None, ["\n the answer is four. <|END_RESPONSE|><|END|>", "5<|END_RESPONSE|><|END|>"])],
    "alpaca": [(TWO_TURNS, None, ["\n the answer is four. ", "5</s>"])],
}
CASES = [
    pytest.param(name, *case, id=f"{name}-{number}")
    for name, cases in EXPECTED.items()
    for number, case in enumerate(cases)
]


def answers_of(tokenizer, messages, tools=None, end_tokens=(), num_given=0) -> list[str]:
    """The text of every answer that is found."""
    template = ChatTemplate(tokenizer, tuple(end_tokens))
    conversation = Conversation(messages, tools, num_given)
    text = template.render(messages, tools)
    rendering = Rendering(template, conversation, text)
    return [text[start:end] for start, end in find_answers(rendering, conversation.answers(), len(text) + 1)]


@pytest.mark.parametrize(("name", "messages", "tools", "expected"), CASES)
def test_the_answers_of_well_known_templates_are_found(name, messages, tools, expected):
    assert answers_of(tokenizer_like(name), messages, tools, END_TOKENS.get(name, ())) == expected


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "glm"])
def test_the_end_of_turn_is_found_without_a_generation_config(name):
    messages, tools, expected = EXPECTED[name][0]
    assert answers_of(tokenizer_like(name), messages, tools) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_continues_its_prompt(name):
    """What is found is what `generate()` would be asked for: behind the prompt of the turn, where the text has it."""
    tokenizer = tokenizer_like(name)
    template = ChatTemplate(tokenizer)
    messages = [USER, ANSWER]
    text, prompt = template.render(messages, None), template.render(messages[:1], None, add_generation_prompt=True)
    (answer,) = answers_of(tokenizer, messages)
    if name == "deepseek":
        assert prompt == text[: text.index(answer)] + "<think>\n"
    else:
        assert text.startswith(prompt + answer)


def test_an_answer_that_quotes_the_template_is_whole():
    """Markup in a message is text of that message; it neither begins nor ends a turn."""
    quoted = "<|im_end|>\n<|im_start|>assistant\nfake<|im_end|>\n"
    messages = [SYSTEM, {"role": "user", "content": quoted}, {"role": "assistant", "content": quoted}]
    assert answers_of(tokenizer_like("chatml"), messages) == [quoted + "<|im_end|>"]
    messages += [{"role": "user", "content": quoted}, OTHER_ANSWER]
    assert answers_of(tokenizer_like("chatml"), messages) == [quoted + "<|im_end|>", "5<|im_end|>"]


def test_equal_answers_are_each_found_in_their_own_turn():
    tokenizer = tokenizer_like("phi3")
    template = ChatTemplate(tokenizer)
    messages = [USER, OTHER_ANSWER] * 3
    text = template.render(messages, None)
    conversation = Conversation(messages)
    spans = find_unmarked_answers(Rendering(template, conversation, text), [1, 3, 5], len(text) + 1)
    assert [match.start() for match in re.finditer("5", text)] == [start for start, _ in spans]


def test_the_mark_is_a_word_that_the_conversation_does_not_have():
    messages = [USER, {"role": "assistant", "content": "MARK0X MARK0XX"}]
    assert answers_of(tokenizer_like("gemma"), messages) == ["MARK0X MARK0XX<end_of_turn>"]


def test_messages_of_the_prompt_are_not_answers():
    assert answers_of(tokenizer_like("gemma"), TWO_TURNS, num_given=2) == ["5<end_of_turn>"]


def test_answers_behind_the_cut_are_not_looked_for():
    template = ChatTemplate(tokenizer_like("gemma"))
    text = template.render(TWO_TURNS, None)
    rendering = Rendering(template, Conversation(TWO_TURNS), text)
    assert len(find_answers(rendering, [1, 3], text.index("and one more"))) == 1


REFUSED = {
    "answers twice": (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content + m.content + '<e>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}",
        "does not say where message 2 ends",
    ),
    "answers nowhere": (
        "{% for m in messages %}{{ '<' + m.role + '><e>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}",
        "does not say where message 2 ends",
    ),
    "the last message first": (
        "{% for m in messages | reverse %}{{ '<' + m.role + '>' + m.content + '<e>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}",
        "does not say where message 2 begins",
    ),
    "the number of messages before them": (
        "{{ messages | length }}{% for m in messages %}{{ '<' + m.role + '>' }}{% if loop.last %}{{ '\n' }}{% endif %}"
        "{{ m.content | length }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}",
        "does not say where message 2 begins",
    ),
    "the length of the answer behind it": (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<e>' }}{{ m.content | length }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}",
        "does not say where message 2 ends",
    ),
    "the length of everything before it": (
        "{{ messages | map(attribute='content') | map('length') | sum }}"
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<e>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}",
        "does not say where message 2 begins",
    ),
    "an answer in capitals": (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content[:5] + '<e>' + m.content[5:] | upper }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}",
        "does not say where message 2 ends",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_certain_is_refused_with_the_way_out(name):
    template, message = REFUSED[name]
    tokenizer = make_tokenizer(template, ["<user>", "<assistant>"], "<e>")
    messages = [OTHER_USER, {"role": "assistant", "content": "five and more"}]
    with pytest.raises(ValueError, match=message) as info:
        answers_of(tokenizer, messages)
    assert "{% generation %}" in str(info.value)


def test_the_answer_begins_with_its_content_where_prompt_and_history_differ():
    """The prompt opens a block for reasoning; what has been said has an empty one, written by the template."""
    template = (
        "{% for m in messages %}{{ '<' + m.role + '>' }}{{ '<think></think>' if m.role == 'assistant' }}"
        "{{ m.content + '<e>' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant><think>\n' }}{% endif %}"
    )
    tokenizer = make_tokenizer(template, ["<user>", "<assistant>"], "<e>")
    assert answers_of(tokenizer, TWO_TURNS) == ["\n the answer is four. <e>", "5<e>"]


def test_a_call_whose_name_stands_beside_its_result_is_found():
    template = (
        "{% for m in messages %}{% if m.tool_calls %}{% set call = m.tool_calls[0].function %}"
        "{{ '<assistant>to ' + call.name + ': ' + call.arguments | tojson + '<c>' }}"
        "{% elif m.role == 'tool' %}{{ '<tool>' + messages[loop.index0 - 1].tool_calls[0].function.name + m.content }}"
        "{% else %}{{ '<' + m.role + '>' + m.content + '<e>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    tokenizer = make_tokenizer(template, ["<user>", "<assistant>", "<tool>", "<c>"], "<e>")
    expected = [f"to add: {CALL_JSON}<c>", "\n the answer is four. <e>"]
    assert answers_of(tokenizer, [USER, CALL, RESULT, ANSWER]) == expected


def test_a_call_that_the_template_does_not_write_is_refused():
    """Otherwise the draft would learn to end the turn at once."""
    with pytest.raises(ValueError, match="does not say where message 2 ends"):
        answers_of(tokenizer_like("phi3"), [USER, CALL, RESULT, ANSWER])


def test_the_end_of_a_call_is_the_only_special_token_behind_it():
    messages = [USER, CALL, RESULT, ANSWER]
    assert answers_of(tokenizer_like("llama3"), messages)[0].endswith("}<|eom_id|>")


def test_a_call_that_quotes_the_end_of_a_turn_is_refused():
    call = {"type": "function", "function": {"name": "say", "arguments": {"text": "<|im_end|>"}}}
    with pytest.raises(ValueError, match="does not say where message 3 ends"):
        answers_of(tokenizer_like("chatml"), [SYSTEM, USER, CALL | {"tool_calls": [call]}])


def test_a_conversation_that_the_template_refuses_is_refused():
    with pytest.raises(ValueError, match="refuses it: System role not supported"):
        answers_of(tokenizer_like("gemma"), [SYSTEM, USER, ANSWER])


# The same templates with marks around what the assistant generates.
MARKED = {
    "chatml": (
        CHATML.replace(
            "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}",
            "{{- '<|im_start|>' + message.role + '\\n' }}{% if message.role == 'assistant' %}{% generation %}"
            "{{- message.content + '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}{% else %}"
            "{{- message.content + '<|im_end|>\\n' }}{% endif %}",
        ),
        "chatml",
    ),
    "llama3": (
        LLAMA3.replace(
            "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim }}\n"
            "        {{- '<|eot_id|>' }}",
            "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
            "{% if message['role'] == 'assistant' %}{% generation %}"
            "{{- message['content'] | trim }}{{- '<|eot_id|>' }}{% endgeneration %}"
            "{% else %}{{- message['content'] | trim + '<|eot_id|>' }}{% endif %}",
        ),
        "llama3",
    ),
    "qwen3": (
        QWEN3.replace(
            "{{- '<|im_start|>assistant\\n<think>",
            "{{- '<|im_start|>assistant\\n' }}{% generation %}{{- '<think>",
        )
        .replace(
            "{{- '<|im_start|>assistant\\n' + content }}",
            "{{- '<|im_start|>assistant\\n' }}{% generation %}{{- content }}",
        )
        .replace(
            "{{- content.lstrip('\\n') }}",
            "{{- content.lstrip('\\n') + '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}",
        )
        .replace("{{- content }}", "{{- content + '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}")
        .replace("{%- endfor %}\n        {{- '<|im_end|>\\n' }}", "{%- endfor %}"),
        "qwen3",
    ),
}
TEXTS = st.text(st.sampled_from("ab 4\n.<>é😀"), min_size=1, max_size=12)
CONVERSATIONS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4)


def mask_of(tokenizer, row, **options) -> list[int]:
    make_row = RowTokenizer(tokenizer, TokenizationOptions(max_length=10_000, **options))
    return make_row(row, 0)["loss_mask"]


def test_the_last_answer_is_cut_out_of_blocks_that_touch():
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endif %}{% endfor %}"
    )
    name = next(iter(MARKED))
    tokenizer = make_tokenizer(template, *TEMPLATES[MARKED[name][1]][1:])
    contents = [("user", "q"), ("assistant", "one"), ("assistant", "two")]
    messages = [{"role": role, "content": content} for role, content in contents]
    make_row = RowTokenizer(tokenizer, TokenizationOptions(max_length=10_000, last_turn_only=True))
    row = make_row({"messages": messages}, 0)
    learnt = [token for token, is_learnt in zip(row["input_ids"], row["loss_mask"], strict=True) if is_learnt]
    assert tokenizer.decode(learnt) == "two<|im_end|>"


@pytest.mark.parametrize("name", MARKED)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=CONVERSATIONS, last_turn_only=st.booleans())
def test_marks_in_the_template_and_comparisons_agree(name, turns, last_turn_only):
    """Two independent methods give one mask, for any texts."""
    template, plain = MARKED[name]
    marked_tokenizer = make_tokenizer(template, *TEMPLATES[plain][1:])
    assert "generation" in template
    messages = [SYSTEM]
    for request, answer in turns:
        messages += [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
    marked = mask_of(marked_tokenizer, {"messages": messages}, last_turn_only=last_turn_only)
    assert marked == mask_of(tokenizer_like(plain), {"messages": messages}, last_turn_only=last_turn_only)
    assert sum(marked) > 0


@pytest.mark.parametrize("where", ["another role", "nothing", "a macro"])
def test_marks_that_do_not_hold_the_answers_are_refused(where):
    templates = {
        "another role": "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'user' %}{% generation %}"
        "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
        "nothing": "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% generation %}{% endgeneration %}"
        "{% endfor %}",
        # Inside a macro, transformers counts from the beginning of the macro's output.
        "a macro": "{% macro say(m) %}{{ '<' + m.role + '>' }}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
    }
    tokenizer = make_tokenizer(templates[where], ["<user>", "<assistant>"], "<e>")
    messages = [{"role": "user", "content": "a longer request"}, {"role": "assistant", "content": "five"}] * 2
    with pytest.raises(ValueError, match="do not hold the answer in message"):
        answers_of(tokenizer, messages)


# Each wraps the answers, and something that others say as well.
TOO_WIDE = {
    "the whole conversation": "{% generation %}{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<e>' }}"
    "{% endfor %}{% endgeneration %}",
    "every message": "{% for m in messages %}{{ '<' + m.role + '>' }}{% generation %}{{ m.content + '<e>' }}"
    "{% endgeneration %}{% endfor %}",
    "the request in capitals": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ messages[loop.index0 - 1].content | upper + '<assistant>' + m.content + '<e>' }}{% endgeneration %}"
    "{% else %}{{ '<' + m.role + '>' + m.content + '<e>' }}{% endif %}{% endfor %}",
    "the result of a tool": "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role in ['assistant', 'tool'] %}"
    "{% generation %}{{ m.content + '<e>' }}{% endgeneration %}{% else %}{{ m.content + '<e>' }}{% endif %}"
    "{% endfor %}",
}


@pytest.mark.parametrize("name", TOO_WIDE)
def test_marks_that_hold_what_others_say_are_refused(name):
    """The answers are in the blocks, so nothing fails, and the draft learns the user's text."""
    tokenizer = make_tokenizer(TOO_WIDE[name], ["<user>", "<assistant>", "<tool>"], "<e>")
    with pytest.raises(ValueError, match="blocks hold more than what the assistant says"):
        answers_of(tokenizer, [USER, ANSWER, RESULT, OTHER_ANSWER])


TURN = "{{ '<' + m.role + '>\n' + m.content + '<e>\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}"


def marked_turns(answer: str, others: str = TURN, before: str = "", behind: str = PROMPT) -> str:
    """A template that writes the turns of the assistant in one way and those of others in another."""
    return (
        f"{before}{{% for m in messages %}}{{% if m.role == 'assistant' %}}{answer}{{% else %}}{others}{{% endif %}}"
        f"{{% endfor %}}{behind}"
    )


MARKED_TURN = "{{ '<assistant>\n' }}{% generation %}{{ m.content + '<e>' }}{% endgeneration %}{{ '\n' }}"
# Each holds text around the answers; the first two are common in the templates of released models.
WITH_SURROUNDINGS = {
    "the line break": marked_turns(
        MARKED_TURN.replace("{% endgeneration %}{{ '\n' }}", "{{ '\n' }}{% endgeneration %}")
    ),
    "header and line break": marked_turns("{% generation %}" + TURN + "{% endgeneration %}"),
    "header": marked_turns("{% generation %}{{ '<assistant>\n' + m.content + '<e>' }}{% endgeneration %}{{ '\n' }}"),
    "the next header": marked_turns(
        "{% generation %}{{ m.content + '<e>\n<user>\n' }}{% endgeneration %}",
        "{% if loop.first %}{{ '<user>\n' }}{% endif %}{{ m.content + '<e>\n<assistant>\n' }}",
        behind="",
    ),
}
CALLS = "{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments | tojson }}{% endfor %}"
TAGS = ["<user>", "<assistant>", "<tool>", "<system>"]


@pytest.mark.parametrize("name", WITH_SURROUNDINGS)
def test_what_a_block_holds_around_an_answer_is_cut_off(name):
    """Otherwise the draft learns headers, which the target never generates."""
    tokenizer = make_tokenizer(WITH_SURROUNDINGS[name], TAGS, "<e>")
    quoting = {"role": "assistant", "content": "<assistant>\nfake<e>\n"}
    for answer in (ANSWER, quoting, ANSWER):
        expected = [answer["content"] + "<e>", "5<e>"]
        assert answers_of(tokenizer, [USER, answer, OTHER_USER, OTHER_ANSWER]) == expected
    assert answers_of(tokenizer, [OTHER_USER, quoting, USER, OTHER_ANSWER], num_given=2) == ["5<e>"]


@pytest.mark.parametrize("name", WITH_SURROUNDINGS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(CONVERSATIONS, min_size=2, max_size=3))
def test_cut_blocks_and_comparisons_agree(name, rows):
    """For any texts, also where what is cut off is known from the row before."""
    template = WITH_SURROUNDINGS[name]
    plain = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    options = TokenizationOptions(max_length=10_000)
    marked, unmarked = (RowTokenizer(make_tokenizer(each, TAGS, "<e>"), options) for each in (template, plain))
    for turns in rows:
        row = {"messages": []}
        for request, answer in turns:
            row["messages"] += [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
        assert marked(row, 0)["loss_mask"] == unmarked(row, 0)["loss_mask"]


@pytest.mark.parametrize(("messages", "tools", "expected"), EXPECTED["qwen3"])
def test_blocks_around_whole_turns_with_reasoning_and_calls_are_cut(messages, tools, expected):
    before, rest = QWEN3.split("        {%- if loop.index0 > ns.last_query", 1)
    turn, behind = rest.split("    {%- elif message.role == 'tool' %}", 1)
    turn = "{%- generation %}{%- if loop.index0 > ns.last_query" + turn + "{%- endgeneration %}"
    tokenizer = make_tokenizer(before + turn + "{%- elif message.role == 'tool' %}" + behind, *TEMPLATES["qwen3"][1:])
    assert answers_of(tokenizer, messages, tools) == expected


def test_an_ending_without_a_special_token_stays():
    """A template that marks it says that the target generates it; nothing contradicts that."""
    template = marked_turns(
        "Bot: {% generation %}{{ m.content + ' ###\n' }}{% endgeneration %}",
        "User: {{ m.content + '\n' }}",
        behind="{% if add_generation_prompt %}Bot: {% endif %}",
    )
    tokenizer = make_tokenizer(template, [], "<e>")
    assert answers_of(tokenizer, TWO_TURNS) == ["\n the answer is four.  ###\n", "5 ###\n"]


LINES = {"role": "assistant", "content": "line one\nline two\n\nline three"}
KEYWORD = marked_turns(
    MARKED_TURN,
    "{% if 'KEY' in m.content %}{% generation %}" + TURN + "{% endgeneration %}{% else %}" + TURN + "{% endif %}",
)
BAD_BLOCKS = {
    "the default system prompt": (
        marked_turns(MARKED_TURN, before="{% generation %}{{ '<system>\nBe brief.<e>\n' }}{% endgeneration %}"),
        TWO_TURNS,
        "hold more than",
    ),
    "the last line only": (
        marked_turns(
            "{% set lines = m.content.split('\n') %}{{ '<assistant>\n' + lines[:-1] | join('\n') }}"
            "{% generation %}{{ lines[-1] + '<e>' }}{% endgeneration %}{{ '\n' }}"
        ),
        [USER, LINES],
        "do not hold the answer in message 2",
    ),
    "the content without its calls": (
        marked_turns(
            "{{ '<assistant>\n' }}{% generation %}{{ m.content }}{% endgeneration %}" + CALLS + "{{ '<e>\n' }}"
        ),
        [USER, CALL, RESULT, ANSWER],
        "do not hold the answer in message 2",
    ),
    "the last turn only": (
        marked_turns("{% if loop.last %}" + MARKED_TURN + "{% else %}" + TURN + "{% endif %}"),
        [USER, {"role": "assistant", "content": "ab"}, USER, {"role": "assistant", "content": "abc\nd"}],
        "do not hold the answer in message 2",
    ),
    "requests with a keyword": (
        KEYWORD,
        [{"role": "user", "content": "the KEY"}, ANSWER],
        "hold more than",
    ),
}


@pytest.mark.parametrize("name", BAD_BLOCKS)
def test_blocks_that_are_not_around_the_answers_are_refused(name):
    template, messages, reason = BAD_BLOCKS[name]
    with pytest.raises(ValueError, match=reason):
        answers_of(make_tokenizer(template, TAGS, "<e>"), messages)


def test_blocks_are_checked_in_every_row():
    """The first row says nothing about a template that marks by what a message says."""
    template, messages, reason = BAD_BLOCKS["requests with a keyword"]
    make_row = RowTokenizer(make_tokenizer(template, TAGS, "<e>"), TokenizationOptions(max_length=100))
    assert sum(make_row({"messages": [USER, ANSWER]}, 0)["loss_mask"]) > 0
    with pytest.raises(ValueError, match=f"Row 2: .* blocks {reason}"):
        make_row({"messages": messages}, 1)


def test_calls_and_reasoning_in_a_block_are_held():
    template = marked_turns(
        "{% generation %}{{ '<assistant>\n' }}{% if m.reasoning_content %}<think>{{ m.reasoning_content }}"
        "</think>{% endif %}{{ m.content }}" + CALLS + "{{ '<e>\n' }}{% endgeneration %}",
        before="{% for tool in tools or [] %}{{ tool | tojson + '\n' }}{% endfor %}",
    )
    tokenizer = make_tokenizer(template, TAGS, "<e>")
    expected = [f"add{CALL_JSON}<e>", "<think>2 + 2</think>\n the answer is four. <e>"]
    assert answers_of(tokenizer, [USER, CALL, RESULT, THOUGHT], TOOLS) == expected


def test_a_template_that_was_found_right_is_checked_again_for_other_kinds_of_messages():
    tokenizer = make_tokenizer(TOO_WIDE["the result of a tool"], ["<user>", "<assistant>", "<tool>"], "<e>")
    make_row = RowTokenizer(tokenizer, TokenizationOptions(max_length=100))
    assert sum(make_row({"messages": TWO_TURNS}, 0)["loss_mask"]) > 0
    with pytest.raises(ValueError, match=r"Row 2: .* blocks hold more than what the assistant says"):
        make_row({"messages": [USER, RESULT, ANSWER]}, 1)


@pytest.mark.parametrize("name", MARKED)
def test_an_answer_that_quotes_the_user_is_accepted(name):
    template, plain = MARKED[name]
    tokenizer = make_tokenizer(template, *TEMPLATES[plain][1:])
    messages = [SYSTEM, USER, {"role": "assistant", "content": f"You said {USER['content']!r}"}, OTHER_USER]
    messages.append({"role": "assistant", "content": OTHER_USER["content"]})
    for message, answer in zip(messages[2::2], answers_of(tokenizer, messages), strict=True):
        assert message["content"] in answer


def test_boundaries_are_looked_for_once_where_conversations_differ_in_their_words_only():
    """Looking for them in every row would take several times as long as the row itself."""
    template, plain = MARKED["chatml"]
    tokenizer = make_tokenizer(template, *TEMPLATES[plain][1:])
    chat_template = ChatTemplate(tokenizer)
    num_rendered = []
    for name in ("render", "render_marked"):
        method = getattr(chat_template, name)
        setattr(chat_template, name, lambda *args, method=method: num_rendered.append(1) or method(*args))
    for number, request in enumerate(("one", "two", "three")):
        conversation = Conversation(
            [{"role": "user", "content": request}, ANSWER | {"content": f"{number} {request}"}]
        )
        text = ChatTemplate(tokenizer).render(conversation.messages, None)
        num_rendered.clear()
        find_answers(Rendering(chat_template, conversation, text), [1], len(text) + 1)
        assert len(num_rendered) == (6 if number == 0 else 2)


def test_blocks_that_touch_are_one():
    """A token may reach from the block of the content into that of the end; both are the assistant's."""
    assert merge_touching([(0, 3), (3, 5), (6, 8)]) == [(0, 5), (6, 8)]
    template = (
        "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% generation %}{{ '\n a<e>' }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    tokenizer = make_tokenizer(template, ["<user>", "<assistant>"], "<e>")
    messages = [OTHER_USER, {"role": "assistant", "content": "five\n"}]
    row = RowTokenizer(tokenizer, TokenizationOptions(max_length=100))({"messages": messages}, 0)
    pieces = [tokenizer.decode([token]) for token in row["input_ids"]]
    answer = pieces.index("<assistant>") + 1
    assert "\n\n a" in pieces[answer:]
    assert row["loss_mask"] == [0] * answer + [1] * (len(pieces) - answer)


def test_a_token_belongs_to_the_assistant_iff_all_its_characters_do():
    offsets = [(0, 3), (2, 5), (3, 5), (5, 5), (5, 7), (6, 9), (9, 9), (9, 10), (12, 14)]
    #           before straddle in  empty   in straddle  empty  behind  second span
    assert mask_tokens(offsets, [(3, 7), (12, 14)]) == [0, 0, 1, 1, 1, 0, 0, 0, 1]
    assert mask_tokens(offsets, []) == [0] * 9
