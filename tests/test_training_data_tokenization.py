"""One dataset row as one training row: every form of row, exact borders, and what is refused."""

import math

import pytest
from reference_templates import tokenizer_like
from reference_ttt import tiny_tokenizer

from eagle3_mla.training.tokenization import RowTokenizer, TextEncoder, TokenizationOptions

CONVERSATION = [{"role": "user", "content": "say abc"}, {"role": "assistant", "content": "abc"}]


def tokenize(row, tokenizer=None, **options) -> dict:
    tokenizer = tiny_tokenizer() if tokenizer is None else tokenizer
    options = {"max_length": 256} | options
    return RowTokenizer(tokenizer, TokenizationOptions(**options), "somewhere")(row, index=6)


def supervised_text(row: dict, tokenizer) -> str:
    """The supervised tokens in words, with a bar where supervision pauses."""
    tokens = zip(row["input_ids"], row["loss_mask"], strict=True)
    pieces = [tokenizer.decode([token]) if mask else "|" for token, mask in tokens]
    return "|".join(part for part in "".join(pieces).split("|") if part)


def test_tokens_are_those_of_the_chat_template():
    tokenizer = tokenizer_like("llama3")
    row = tokenize({"messages": CONVERSATION}, tokenizer)
    assert row["input_ids"] == tokenizer.apply_chat_template(CONVERSATION, return_dict=True)["input_ids"]
    assert row["input_ids"].count(tokenizer.bos_token_id) == 1
    assert supervised_text(row, tokenizer) == "abc<|eot_id|>"
    assert (row["length"], row["is_supervised"], row["refusal"]) == (len(row["input_ids"]), True, None)


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_a_token_across_the_border_of_an_answer_is_nobodys(trim_offsets):
    """With trimmed offsets such a token seems to begin where its white space ends."""
    tokenizer = tokenizer_like("chatml", trim_offsets=trim_offsets)
    row = tokenize({"messages": [CONVERSATION[0], {"role": "assistant", "content": "\n a b"}]}, tokenizer)
    pieces = [tokenizer.decode([token]) for token in row["input_ids"]]
    border = "".join(pieces).index("\n a b")
    starts = [len("".join(pieces[:index])) for index in range(len(pieces))]
    straddling = [index for index, piece in enumerate(pieces) if starts[index] < border < starts[index] + len(piece)]
    assert [pieces[index] for index in straddling] == ["\n\n a"]
    assert row["loss_mask"][straddling[0]] == 0
    assert supervised_text(row, tokenizer) == " b<|im_end|>"


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("text", ["\n\n a \n", "  ", "é 😀\n\n b", "<|eot_id|> a<|eot_id|>", ""])
def test_the_encoder_gives_the_tokenizers_own_tokens_and_every_character(text, trim_offsets):
    tokenizer = tokenizer_like("llama3", trim_offsets=trim_offsets)
    input_ids, offsets = TextEncoder(tokenizer).encode(text)
    assert input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    covered = set().union(*(range(start, end) for start, end in offsets)) if offsets else set()
    assert covered == set(range(len(text)))


def test_a_tokenizer_without_offsets_is_refused():
    tokenizer = tiny_tokenizer()
    type(tokenizer).is_fast, kept = False, type(tokenizer).is_fast
    try:
        with pytest.raises(ValueError, match="is not a fast one"):
            TextEncoder(tokenizer)
    finally:
        type(tokenizer).is_fast = kept


def test_a_long_row_is_cut_at_its_end():
    whole, cut = tokenize({"messages": CONVERSATION * 4}), tokenize({"messages": CONVERSATION * 4}, max_length=20)
    assert cut["length"] == 20
    assert cut["input_ids"] == whole["input_ids"][:20]
    assert cut["loss_mask"] == whole["loss_mask"][:20]


@pytest.mark.parametrize("name", ["qwen3", "gemma", "phi3"])
def test_the_cut_leaves_the_answers_before_it_as_they_are(name):
    tokenizer = tokenizer_like(name)
    whole = tokenize({"messages": CONVERSATION * 5}, tokenizer, max_length=10_000)
    for length in range(3, whole["length"]):
        assert (
            tokenize({"messages": CONVERSATION * 5}, tokenizer, max_length=length)["loss_mask"]
            == whole["loss_mask"][:length]
        )


def test_only_the_last_answer_can_be_learnt_from():
    for tokenizer in (tiny_tokenizer(), tokenizer_like("gemma")):
        messages = [*CONVERSATION, CONVERSATION[0], {"role": "assistant", "content": "xyz"}]
        every, last = (tokenize({"messages": messages}, tokenizer, last_turn_only=last) for last in (False, True))
        end = tokenizer.decode([last["input_ids"][i] for i, mask in enumerate(last["loss_mask"]) if mask])
        assert last["input_ids"] == every["input_ids"]
        assert end.startswith("xyz<")
        assert "abc" not in end
        assert supervised_text(every, tokenizer).startswith("abc<")


def test_a_completion_is_learnt_from_with_its_end():
    tokenizer = tokenizer_like("llama3")
    row = tokenize({"prompt": "2 + 2 =", "completion": " 4"}, tokenizer)
    assert row["input_ids"] == tokenizer("2 + 2 = 4<|eot_id|>")["input_ids"]
    assert row["input_ids"][0] == tokenizer.bos_token_id
    assert supervised_text(row, tokenizer) == " 4<|eot_id|>"
    assert tokenize({"prompt": "2 + 2 =", "completion": " 4<|eot_id|>"}, tokenizer) == row


def test_a_completion_of_messages_uses_the_chat_template():
    row = tokenize({"prompt": CONVERSATION[:1], "completion": CONVERSATION[1:]})
    assert row == tokenize({"messages": CONVERSATION})


def test_all_of_a_text_but_its_first_token_is_learnt_from():
    with_begin, without = tokenizer_like("llama3"), tokenizer_like("chatml")
    row = tokenize({"text": "the answer"}, with_begin)
    assert row["input_ids"] == with_begin("the answer")["input_ids"]
    assert supervised_text(row, with_begin) == "the answer"
    row = tokenize({"text": "the answer"}, without)
    assert row["loss_mask"] == [0] + [1] * (row["length"] - 1)


@pytest.mark.parametrize(
    "mask",
    [
        {"loss_mask": [0, 0, 1, 1]},
        {"loss_mask": [False, False, True, True]},
        {"assistant_masks": [0, 0, 1, 1]},
        {"labels": [-100, -100, 7, 8]},
        {"loss_mask": None, "labels": [-100, -100, 7, 8]},
    ],
)
def test_tokenised_rows_are_taken_as_they_are(mask):
    row = tokenize({"input_ids": [5, 6, 7, 8], "text": "ignored", "messages": CONVERSATION} | mask, vocab_size=9)
    assert (row["input_ids"], row["loss_mask"]) == ([5, 6, 7, 8], [0, 0, 1, 1])


def test_padding_of_tokenised_rows_is_left_out():
    row = {"input_ids": [0, 5, 6, 7, 0], "loss_mask": [0, 0, 1, 1, 0], "attention_mask": [0, 1, 1, 1, 0]}
    assert tokenize(row)["input_ids"] == [5, 6, 7]
    assert tokenize(row)["loss_mask"] == [0, 1, 1]


def test_whole_numbers_that_became_floats_are_read():
    """One huge number makes floats of all rows of a column; the others are as good as before."""
    row = {"input_ids": [4.0, 5.0, 6.0], "loss_mask": [0.0, 1.0, 1.0], "attention_mask": [1.0, 1.0, 1.0]}
    tokenized = tokenize(row, vocab_size=40)
    assert tokenized["input_ids"] == [4, 5, 6]
    assert {type(token) for token in tokenized["input_ids"]} == {int}
    assert tokenized["loss_mask"] == [0, 1, 1]


WRONG = {
    "nothing": ({}, "Row 7 must have `messages` or `conversations`, `prompt` and `completion`, `text`"),
    "other columns": ({"a": 1, "text": None}, r"got the columns a, text \(empty\)\."),
    "only a prompt": ({"prompt": "abc"}, "got the columns prompt"),
    "an empty tokenised row": ({"input_ids": [], "loss_mask": []}, r"input_ids \(empty\)"),
    "no mask": ({"input_ids": [1]}, "`input_ids` without `loss_mask`, `assistant_masks`, `labels`"),
    "a short mask": (
        {"input_ids": [1, 2], "loss_mask": [1]},
        r"`loss_mask` must be as long as `input_ids` \(2\), got 1",
    ),
    "an odd mask": ({"input_ids": [1, 2], "loss_mask": [1, 2]}, "`loss_mask` must be 0 or 1, got 2"),
    "shifted labels": ({"input_ids": [1, 2], "labels": [2, -100]}, "they are not shifted"),
    "an id beyond the vocabulary": (
        {"input_ids": [1, 40], "loss_mask": [1, 1]},
        "`input_ids` must be at least 0 and below the target's `vocab_size` 40, got 40",
    ),
    "a negative id": ({"input_ids": [1, -2], "loss_mask": [1, 1]}, "`input_ids` must be at least 0.* got -2"),
    "an id beyond 64 bits": (
        {"input_ids": [1, 2**64], "loss_mask": [1, 1]},
        "below the target's `vocab_size` 40, got 18446744073709551616",
    ),
    # Unsigned in the file, and once negative where it was read.
    "an id beyond 63 bits": (
        {"input_ids": [1, 2**63], "loss_mask": [1, 1]},
        "below the target's `vocab_size` 40, got 9223372036854775808",
    ),
    # What the JSON reader makes of one that is beyond 64 bits.
    "an id that became a float": (
        {"input_ids": [1.0, 2.0**70], "loss_mask": [1, 1]},
        "below the target's `vocab_size` 40, got 1180591620717411303424",
    ),
    "a negative id beyond 64 bits": ({"input_ids": [1, -(2**70)], "loss_mask": [1, 1]}, "got -1180591620717411303424"),
    "a mask beyond 64 bits": (
        {"input_ids": [1, 2], "loss_mask": [1, 2**64]},
        "must be 0 or 1, got 18446744073709551616",
    ),
    "a label beyond 64 bits": ({"input_ids": [1, 2], "labels": [1, 2**64]}, "`labels` must be -100 or the token"),
    "a fraction as id": ({"input_ids": [1.0, 1.5], "loss_mask": [1, 1]}, "`input_ids` must hold integers, got 1.5"),
    "an endless id": ({"input_ids": [1, math.inf], "loss_mask": [1, 1]}, "must hold integers, got inf"),
    "a null id": ({"input_ids": [1, None], "loss_mask": [1, 1]}, "`input_ids` must hold integers, got None"),
    "not a number as id": ({"input_ids": [1, math.nan], "loss_mask": [1, 1]}, "must hold integers, got nan"),
    "rows of ids": ({"input_ids": [[1], [2, 3]], "loss_mask": [1, 1]}, "must be a list of integers, got"),
    "ids as text": ({"input_ids": "1 2", "loss_mask": [1, 1]}, "must be a list of integers, got '1 2'"),
    "text that is a number": ({"text": math.nan}, "`text` must be text that is not empty, got nan"),
    "empty text": ({"text": ""}, "`text` must be text that is not empty, got ''"),
    "an empty completion": ({"prompt": "a", "completion": ""}, "`completion` is empty"),
    "no answer": ({"messages": CONVERSATION[:1]}, "Row 7 has no assistant turn"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_row_that_cannot_be_used_is_named_with_the_way_out(name):
    row, message = WRONG[name]
    with pytest.raises(ValueError, match=message) as info:
        tokenize(row, vocab_size=40)
    assert str(info.value).startswith("Row 7")
    assert "In somewhere; `--skip-bad-rows` leaves such rows out." in str(info.value)
    skipped = tokenize(row, vocab_size=40, skip_bad_rows=True)
    assert (skipped["input_ids"], skipped["is_supervised"]) == ([], False)
    assert skipped["refusal"].startswith("Row 7")


def test_a_conversation_needs_a_chat_template_and_a_text_does_not():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="Row 7 is a conversation, but the tokenizer has no chat template"):
        tokenize({"messages": CONVERSATION}, tokenizer)
    assert tokenize({"text": "say the letters"}, tokenizer)["is_supervised"]


def test_a_template_that_refuses_a_row_names_it():
    with pytest.raises(ValueError, match="Row 7: the chat template refuses it: System role not supported"):
        tokenize({"messages": [{"role": "system", "content": "a"}, *CONVERSATION]}, tokenizer_like("gemma"))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content + message.absent.deeper }}{% endfor %}"
    with pytest.raises(ValueError, match="Row 7: the chat template refuses it"):
        tokenize({"messages": CONVERSATION}, tokenizer)


def test_the_end_tokens_of_the_generation_config_end_a_turn():
    tokenizer = tokenizer_like("glm")
    messages = [*CONVERSATION, *CONVERSATION]
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    assert supervised_text(tokenize({"messages": messages}, tokenizer), tokenizer) == "abc|abc"
    row = tokenize({"messages": messages}, tokenizer, end_token_ids=(user,))
    assert supervised_text(row, tokenizer).replace("|", "") == "abc<user>abc"


def test_a_row_that_teaches_nothing_says_so():
    assert tokenize({"messages": CONVERSATION}, max_length=4)["is_supervised"] is False
    assert tokenize({"messages": CONVERSATION})["is_supervised"] is True
