"""The target's answers: those of `generate()`, in the turns that are wanted, with the tokens that it really said."""

import pytest
import torch
from reference_regeneration import QUESTIONS, answering_target, conversation_of, messages_of, tiny_answerer
from reference_ttt import CHAT_TEMPLATE, tiny_tokenizer

from eagle3_mla.training.answering import Decoding, check_generation_prompt, pad_left, plan_batches
from eagle3_mla.training.conversations import Conversation
from eagle3_mla.training.dialogues import CUT_ANSWER, Answer, Dialogue, answers_wanted, token_rows
from eagle3_mla.training.row_draws import row_seed

GREEDY = Decoding(max_new_tokens=12)
SAMPLING = Decoding(max_new_tokens=12, do_sample=True, temperature=0.8, top_p=0.9, top_k=40, seed=3)
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
REASONING_TEMPLATE = """{% for message in messages %}{{ '<' + message['role'] + '>' }}\
{% if message['role'] == 'assistant' and not loop.last %}{{ 'said<end>' }}\
{% else %}{{ message['content'] + '<end>' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""


def dialogues_of(questions=QUESTIONS, **settings) -> list[Dialogue]:
    return [Dialogue(number, conversation_of(turns), **settings) for number, turns in enumerate(questions)]


def answer_all(answerer, dialogues: list[Dialogue]) -> list[Dialogue]:
    (answered,) = answerer.answer([dialogues], report=lambda answer: None)
    return answered


def said(text: str, is_cut: bool = False) -> Answer:
    return Answer({"role": "assistant", "content": text}, is_cut, num_tokens=3)


def token_ids(dialogues: list[Dialogue]) -> list[list[list[int]]]:
    return [[answer.token_ids for answer in dialogue.answers] for dialogue in dialogues]


def answer_alone(target, prompt_ids: list[int], decoding: Decoding, seed: int) -> list[int]:
    """What plain `generate()` says to one prompt."""
    torch.manual_seed(seed)
    sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k}
    output = target.generate(
        torch.tensor([prompt_ids]),
        attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
        do_sample=decoding.do_sample,
        max_new_tokens=decoding.max_new_tokens,
        eos_token_id=1,
        pad_token_id=0,
        **(sampling if decoding.do_sample else {}),
    )
    return output[0, len(prompt_ids) :].tolist()


def test_every_turn_of_the_assistant_is_wanted_and_an_open_end_too():
    assert [answers_wanted(conversation_of(turns)) for turns in QUESTIONS[:6]] == [
        [1],
        [2, 4],
        [1],
        [1, 3, 5],
        [1],
        [1],
    ]
    assert answers_wanted(conversation_of(QUESTIONS[3]), last_turn_only=True) == [5]


def test_given_messages_stay():
    assert answers_wanted(conversation_of(QUESTIONS[1], num_given=4)) == [4]
    assert answers_wanted(conversation_of(QUESTIONS[3], num_given=2)) == [3, 5]


def test_a_call_that_a_tool_has_answered_stays_and_one_without_result_is_asked_again():
    user, result = {"role": "user", "content": "?"}, {"role": "tool", "content": "42"}
    assert answers_wanted(Conversation([user, CALL, result, said("42").message, user, CALL])) == [3, 5]
    assert answers_wanted(Conversation([user, CALL, result])) == [3]


def test_an_answer_becomes_the_context_of_the_next_turn():
    dialogue = Dialogue(0, conversation_of(QUESTIONS[1]))
    assert dialogue.advance()
    assert dialogue.said == messages_of(QUESTIONS[1][:2])
    dialogue.take(said("one"))
    assert dialogue.advance()
    assert [message["content"] for message in dialogue.said] == ["be brief", "count", "one", "more"]
    dialogue.take(said("two"))
    assert not dialogue.advance()
    assert [message["content"] for message in dialogue.messages] == ["be brief", "count", "one", "more", "two"]


def test_last_turn_only_keeps_the_earlier_answers():
    dialogue = Dialogue(0, conversation_of(QUESTIONS[1]), last_turn_only=True)
    assert dialogue.advance()
    dialogue.take(said("two"))
    assert [message["content"] for message in dialogue.messages] == ["be brief", "count", "1 2 3", "more", "two"]


@pytest.mark.parametrize(("drop_cut", "num_messages"), [(False, 3), (True, 0)])
def test_a_cut_answer_ends_the_conversation_and_is_dropped_on_demand(drop_cut, num_messages):
    dialogue = Dialogue(0, conversation_of(QUESTIONS[1]))
    dialogue.advance()
    dialogue.take(said("one and", is_cut=True), drop_cut)
    assert not dialogue.advance()
    assert dialogue.ended_because == CUT_ANSWER
    assert len(dialogue.messages) == num_messages
    assert dialogue.is_cut == (not drop_cut)


def test_what_came_before_a_dropped_answer_is_kept():
    dialogue = Dialogue(0, conversation_of(QUESTIONS[1]))
    dialogue.advance()
    dialogue.take(said("one"))
    dialogue.advance()
    dialogue.take(said("two and", is_cut=True), drop_cut=True)
    assert [message["content"] for message in dialogue.messages] == ["be brief", "count", "one"]


def test_batches_hold_every_prompt_once_with_the_longest_first():
    assert plan_batches([3, 9, 9, 1, 5], 2) == [[1, 2], [4, 0], [3]]
    assert plan_batches([], 2) == []


def test_padding_is_on_the_left_masked_and_foreign_to_no_row():
    input_ids, attention_mask = pad_left([[7, 8, 9], [5, 6]])
    assert input_ids.tolist() == [[7, 8, 9], [5, 5, 6]]
    assert attention_mask.tolist() == [[1, 1, 1], [0, 1, 1]]


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLING], ids=["greedy", "sampling"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_batched_answer_is_what_generate_says_to_its_prompt_alone(decoding, batch_size):
    """With sampling too: a row draws from its own seed, so neighbours, padding and batch borders leave no trace."""
    answerer = tiny_answerer(decoding, batch_size)
    dialogues = answer_all(answerer, dialogues_of())
    target = answering_target(len(answerer.tokenizer))
    answers = [(d, turn, answer) for d in dialogues for turn, answer in enumerate(d.answers)]
    for dialogue, turn, answer in answers:
        seed = row_seed(decoding.seed, dialogue.number, turn)
        assert answer.token_ids == answer_alone(target, answer.prompt_ids, decoding, seed)
    assert {answer.is_cut for _, _, answer in answers} == {True, False}


def test_a_repetition_penalty_does_not_see_the_padding():
    """Penalties read the prompt without its mask; foreign padding would change the answers of short rows."""
    answers = []
    for batch_size in (1, 16):
        answerer = tiny_answerer(GREEDY, batch_size)
        answerer.generation_config.repetition_penalty = 1.8
        answers.append(token_ids(answer_all(answerer, dialogues_of())))
    assert answers[0] == answers[1]
    assert answers[0] != token_ids(answer_all(tiny_answerer(GREEDY), dialogues_of()))


def test_samples_depend_on_seed_row_and_turn():
    answers = answer_all(tiny_answerer(SAMPLING), dialogues_of([QUESTIONS[0]] * 6))
    assert len({tuple(dialogue.answers[0].token_ids) for dialogue in answers}) > 1
    seeds = {row_seed(seed, number, turn) for seed in (0, 1) for number in range(5) for turn in range(3)}
    assert len(seeds) == 30


def test_the_targets_own_sampling_settings_hold_where_none_are_given():
    given = tiny_answerer(Decoding(12, do_sample=True, temperature=0.5, top_k=5, top_p=0.9))
    own = tiny_answerer(Decoding(12, do_sample=True))
    own.target.generation_config.update(temperature=0.5, top_k=5, top_p=0.9, do_sample=True)
    unset = tiny_answerer(Decoding(12, do_sample=True))
    texts = [token_ids(answer_all(answerer, dialogues_of())) for answerer in (given, own, unset)]
    assert texts[0] == texts[1] != texts[2]


def test_the_end_token_is_stripped_by_id_and_nothing_else_is():
    answerer = tiny_answerer(GREEDY)
    spelled = answerer.tokenizer("  <end of line \n ", add_special_tokens=False)["input_ids"]
    answer = answerer._read([5], [*spelled, 1, 0, 0])
    assert answer.message["content"] == "  <end of line \n "
    assert answer.token_ids == [*spelled, 1]
    assert not answer.is_cut


def test_it_is_known_whether_messages_give_back_the_tokens_that_were_said():
    """A random target also says bytes that are no text, and words in another spelling than the tokenizer's."""
    answerer = tiny_answerer(GREEDY)
    verdicts = {}
    for dialogue in answer_all(answerer, dialogues_of()):
        rendered = answerer._render(dialogue.messages, None, add_generation_prompt=False)
        last = dialogue.answers[-1].prompt_ids + dialogue.answers[-1].token_ids
        verdicts[dialogue.number] = answerer.reproduces(dialogue)
        assert verdicts[dialogue.number] == (rendered[: len(last)] == last and len(token_rows(dialogue.answers)) == 1)
    assert set(verdicts.values()) == {True, False}


def test_token_rows_hold_a_conversation_as_long_as_each_prompt_continues_it():
    first = Answer({}, False, 2, prompt_ids=[5, 6], token_ids=[7, 1])
    continued = Answer({}, False, 2, prompt_ids=[5, 6, 7, 1, 8], token_ids=[9, 1])
    rewritten = Answer({}, False, 2, prompt_ids=[5, 6, 1, 8], token_ids=[9, 1])
    assert token_rows([first, continued]) == [([5, 6, 7, 1, 8, 9, 1], [0, 0, 1, 1, 0, 1, 1])]
    assert token_rows([first, rewritten]) == [([5, 6, 7, 1], [0, 0, 1, 1]), ([5, 6, 1, 8, 9, 1], [0] * 4 + [1, 1])]


def test_a_template_that_rewrites_earlier_turns_gives_a_row_for_each_answer():
    answerer = tiny_answerer(Decoding(max_new_tokens=60))
    answerer.tokenizer.chat_template = REASONING_TEMPLATE
    (dialogue,) = answer_all(answerer, dialogues_of([QUESTIONS[1]]))
    rows = token_rows(dialogue.answers)
    assert len(rows) == len(dialogue.answers) == 2
    assert not answerer.reproduces(dialogue)
    for (input_ids, loss_mask), answer in zip(rows, dialogue.answers, strict=True):
        assert input_ids == answer.prompt_ids + answer.token_ids
        assert sum(loss_mask) == len(answer.token_ids)


def test_prompts_beyond_the_targets_positions_are_left_out_with_the_reason():
    questions = [QUESTIONS[0], [("user", "word " * 100)]]
    short, long = answer_all(tiny_answerer(GREEDY), dialogues_of(questions))
    assert short.answers
    assert short.ended_because is None
    assert not long.answers
    assert "256 positions" in long.ended_because


def test_what_the_template_refuses_is_left_out_with_its_reason():
    answerer = tiny_answerer(GREEDY)
    answerer.tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + CHAT_TEMPLATE
    )
    dialogues = answer_all(answerer, dialogues_of())
    assert [dialogue.number for dialogue in dialogues if not dialogue.answers] == [1]
    assert "no system turns" in dialogues[1].ended_because


def test_a_template_without_generation_prompt_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.split("{% if add_generation_prompt %}")[0]
    with pytest.raises(ValueError, match="ignores `add_generation_prompt`"):
        check_generation_prompt(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        check_generation_prompt(tokenizer)


@pytest.mark.parametrize("space", ["", " "])
def test_a_template_whose_questions_end_where_answers_begin_needs_no_generation_prompt(space):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}"
        "{% else %}{{ '" + space + "' + m['content'] + '<end>' }}{% endif %}{% endfor %}"
    )
    check_generation_prompt(tokenizer)
