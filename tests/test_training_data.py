"""Conversations in, training rows out: what is supervised, what is refused, what is cached."""

import json

import pytest
import torch
from datasets import Dataset, DatasetDict
from reference_ttt import CONVERSATIONS, tiny_tokenizer, write_conversations

from eagle3_mla.training.data import (
    PaddingCollator,
    check_chat_template,
    content_hash,
    load_conversations,
    parse_conversation,
    tokenize_conversations,
)

CONVERSATION = [{"role": "user", "content": "say abc"}, {"role": "assistant", "content": "abc"}]


@pytest.fixture(autouse=True)
def own_dataset_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))


def tokenize(path, max_length=256) -> Dataset:
    return tokenize_conversations(load_conversations(str(path)), tiny_tokenizer(), max_length)


def supervised_text(row: dict) -> str:
    """The supervised tokens in words, with a bar where supervision pauses."""
    tokenizer = tiny_tokenizer()
    tokens = zip(row["input_ids"], row["loss_mask"], strict=True)
    pieces = [tokenizer.decode([token]) if mask else "|" for token, mask in tokens]
    return "|".join(part for part in "".join(pieces).split("|") if part)


def test_exactly_what_the_assistant_says_is_supervised(tmp_path):
    rows = tokenize(write_conversations(tmp_path / "train.jsonl"))
    assert supervised_text(rows[0]) == "abc abc abc<end>"
    assert supervised_text(rows[1]) == "1 2 3<end>|4 5 6 7<end>"
    assert rows["length"] == [len(input_ids) for input_ids in rows["input_ids"]]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CONVERSATION},
        {"conversations": CONVERSATION},
        {"conversations": [{"from": "human", "value": "say abc"}, {"from": "gpt", "value": "abc"}]},
        {"messages": None, "conversations": CONVERSATION},
    ],
)
def test_all_spellings_of_a_conversation_are_read(row):
    assert parse_conversation(row, 1) == CONVERSATION


def test_files_directories_parquet_and_saved_datasets_hold_the_same_rows(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_conversations(folder / "a.jsonl", CONVERSATIONS[:2])
    write_conversations(folder / "b.jsonl", CONVERSATIONS[2:])
    whole = load_conversations(str(write_conversations(tmp_path / "train.jsonl")))
    whole.to_parquet(tmp_path / "train.parquet")
    whole.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": whole, "test": whole.select([0])}).save_to_disk(tmp_path / "splits")
    for name in ("folder", "train.parquet", "saved", "splits"):
        assert load_conversations(str(tmp_path / name))["messages"] == whole["messages"]
    assert len(load_conversations(str(tmp_path / "splits"), split="test")) == 1


def test_a_cut_conversation_keeps_what_is_before_the_cut(tmp_path):
    path = write_conversations(tmp_path / "train.jsonl")
    whole, cut = tokenize(path), tokenize(path, max_length=16)
    assert max(cut["length"]) == 16
    assert cut[0]["input_ids"] == whole[0]["input_ids"][:16]
    assert cut[0]["loss_mask"] == whole[0]["loss_mask"][:16]


def test_rows_without_a_supervised_position_are_dropped_and_counted(tmp_path, caplog):
    long_prompt = [("user", "say nothing " * 20), ("assistant", "abc")]
    path = write_conversations(tmp_path / "train.jsonl", [CONVERSATIONS[0], long_prompt])
    with caplog.at_level("INFO", logger="eagle3_mla.training.data"):
        rows = tokenize(path, max_length=32)
    assert len(rows) == 1
    assert "Dropped 1 of 2 rows" in caplog.text


def test_tokenized_rows_are_cached_by_content(tmp_path, monkeypatch):
    path = write_conversations(tmp_path / "train.jsonl")
    first = tokenize(path)
    monkeypatch.setattr(
        "eagle3_mla.training.data.tokenize_conversation", lambda *args: pytest.fail("tokenized a second time")
    )
    assert content_hash(tokenize(path)) == content_hash(first)
    with pytest.raises(BaseException, match="tokenized a second time"):
        tokenize(path, max_length=20)


def test_the_content_hash_sees_tokens_and_masks():
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3]], "loss_mask": [[0, 1], [1]]})
    other_mask = Dataset.from_dict({"input_ids": [[1, 2], [3]], "loss_mask": [[1, 1], [1]]})
    assert content_hash(rows) != content_hash(other_mask)
    assert content_hash(rows) != content_hash(rows.select([1, 0]))


def test_batches_are_padded_on_the_right_to_their_longest_row():
    batch = PaddingCollator(pad_token_id=9)(
        [
            {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1], "length": 3},
            {"input_ids": [4], "loss_mask": [1], "length": 1},
        ]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["loss_mask"].tolist() == [[0, 1, 1], [1, 0, 0]]
    assert all(tensor.dtype == torch.long for tensor in batch.values())


def test_broken_json_is_named_by_file_and_line(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"messages": CONVERSATION}) + "\n\n" + '{"messages": [\n')
    with pytest.raises(ValueError, match=r"Line 3 of .*train.jsonl is not valid JSON"):
        load_conversations(str(path))
    path.write_text("[1, 2]\n")
    with pytest.raises(ValueError, match=r"Line 1 of .*train.jsonl must be a JSON object, got list"):
        load_conversations(str(path))


def test_missing_and_empty_datasets_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"missing.jsonl does not exist"):
        load_conversations(str(tmp_path / "missing.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty.jsonl is empty"):
        load_conversations(str(tmp_path / "empty.jsonl"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"must be, or hold, files of the types"):
        load_conversations(str(tmp_path / "folder"))
    DatasetDict({"test": Dataset.from_dict({"messages": [CONVERSATION]})}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match=r"has no split 'train'; it has \['test'\]"):
        load_conversations(str(tmp_path / "splits"))


def test_a_hub_dataset_is_loaded_by_id_and_split(monkeypatch):
    rows = Dataset.from_dict({"messages": [CONVERSATION]})
    calls = []
    monkeypatch.setattr(
        "eagle3_mla.training.data.load_dataset", lambda *args, **kwargs: calls.append((args, kwargs)) or rows
    )
    assert load_conversations("user/chats", split="train_sft") is rows
    assert calls == [(("user/chats",), {"split": "train_sft"})]


def test_an_unreachable_hub_dataset_is_one_sentence(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'user/chats' on the Hub\nand more")

    monkeypatch.setattr("eagle3_mla.training.data.load_dataset", fail)
    with pytest.raises(ValueError, match=r"user/chats is neither a local path nor loadable .*Couldn't reach") as info:
        load_conversations("user/chats")
    assert "\n" not in str(info.value)


def test_rows_that_hold_no_usable_conversation_are_named(tmp_path):
    path = write_conversations(tmp_path / "train.jsonl", [CONVERSATIONS[0], [("user", "say abc")]])
    with pytest.raises(ValueError, match="Row 2 has no assistant turn"):
        tokenize(path)
    with pytest.raises(ValueError, match=r"Row 7 must have `messages` or `conversations`, got the columns \['text'\]"):
        parse_conversation({"text": "abc"}, 7)
    with pytest.raises(ValueError, match="Row 7 has a message without `role` and `content`"):
        parse_conversation({"messages": [{"role": "assistant", "content": None}]}, 7)


def test_a_dataset_of_which_nothing_is_supervised_is_refused(tmp_path):
    path = write_conversations(tmp_path / "train.jsonl")
    with pytest.raises(ValueError, match="two assistant tokens in a row within its first 4 tokens"):
        tokenize(path, max_length=4)


def test_a_chat_template_without_generation_marks_is_refused_with_the_way_out():
    tokenizer = tiny_tokenizer()
    check_chat_template(tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="does not mark what the assistant says") as info:
        check_chat_template(tokenizer)
    assert "{% generation %}" in str(info.value)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        check_chat_template(tokenizer)


def test_a_template_that_refuses_a_row_names_it(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}" + tokenizer.chat_template
    rows = load_conversations(str(write_conversations(tmp_path / "train.jsonl")))
    with pytest.raises(ValueError, match="The chat template refuses row 1: roles must alternate"):
        tokenize_conversations(rows, tokenizer, 64)
