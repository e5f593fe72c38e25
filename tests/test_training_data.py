"""The data of a run: sources and their weights, what is dropped, what is cached, and the arguments that say so."""

import json
import math

import numpy as np
import pytest
from datasets import Dataset
from reference_templates import tokenizer_like
from reference_ttt import CONVERSATIONS, tiny_tokenizer, write_conversations
from transformers import GenerationConfig, LlamaConfig

from eagle3_mla.training.arguments import DataArguments, DraftArguments
from eagle3_mla.training.data import (
    content_hash,
    end_of_turn_ids,
    load_generation_config,
    prepare_rows,
    tokenize_conversations,
    weigh_rows,
)
from eagle3_mla.training.sources import load_conversations

pytestmark = pytest.mark.usefixtures("own_dataset_cache")

CONVERSATION = [{"role": "user", "content": "say abc"}, {"role": "assistant", "content": "abc"}]


def tokenize(path, max_length=256, **options) -> Dataset:
    return tokenize_conversations(load_conversations(str(path)), tiny_tokenizer(), max_length, **options)


def write_lines(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_texts(path, texts) -> str:
    return write_lines(path, [{"text": text} for text in texts])


def prepare(dataset, tokenizer=None, seed=0, **arguments):
    data = DataArguments(dataset=[str(name) for name in dataset], **arguments)
    return prepare_rows(data, tiny_tokenizer() if tokenizer is None else tokenizer, seed=seed)


def supervised_text(row: dict) -> str:
    """The supervised tokens in words, with a bar where supervision pauses."""
    tokenizer = tiny_tokenizer()
    tokens = zip(row["input_ids"], row["loss_mask"], strict=True)
    pieces = [tokenizer.decode([token]) if mask else "|" for token, mask in tokens]
    return "|".join(part for part in "".join(pieces).split("|") if part)


def texts_of(rows: Dataset) -> list[str]:
    return [tiny_tokenizer().decode(row["input_ids"]) for row in rows]


def test_exactly_what_the_assistant_says_is_supervised(tmp_path):
    rows = tokenize(write_conversations(tmp_path / "train.jsonl"))
    assert supervised_text(rows[0]) == "abc abc abc<end>"
    assert supervised_text(rows[1]) == "1 2 3<end>|4 5 6 7<end>"
    assert rows["length"] == [len(input_ids) for input_ids in rows["input_ids"]]
    assert rows.column_names == ["input_ids", "loss_mask", "length"]


def test_rows_without_a_supervised_position_are_dropped_and_counted(tmp_path, caplog):
    long_prompt = [("user", "say nothing " * 20), ("assistant", "abc")]
    path = write_conversations(tmp_path / "train.jsonl", [CONVERSATIONS[0], long_prompt])
    with caplog.at_level("INFO", logger="eagle3_mla.training.data"):
        prepared = prepare([path], max_length=32)
    assert len(prepared.rows) == 1
    assert "Dropped 1 of 2 rows" in caplog.text
    assert (prepared.num_dropped, prepared.sources[0].num_unsupervised, prepared.sources[0].num_cut) == (1, 1, 1)


def test_tokenized_rows_are_cached_by_content(tmp_path, monkeypatch):
    path = write_conversations(tmp_path / "train.jsonl")
    first = tokenize(path)

    def fail(*args):
        raise AssertionError("tokenized a second time")

    monkeypatch.setattr("eagle3_mla.training.data.RowTokenizer.tokenize", fail)
    assert content_hash(tokenize(path)) == content_hash(first)
    for options in ({"max_length": 20}, {"last_turn_only": True}, {"end_token_ids": (3,)}, {"vocab_size": 300}):
        with pytest.raises(AssertionError, match="tokenized a second time"):
            tokenize(path, **options)
    write_conversations(path, CONVERSATIONS[:3])
    with pytest.raises(AssertionError, match="tokenized a second time"):
        tokenize(path)


def test_another_tokenizer_or_template_is_not_served_from_the_cache(tmp_path):
    rows = load_conversations(str(write_conversations(tmp_path / "train.jsonl", CONVERSATIONS[2:])))
    tokenizer = tiny_tokenizer()
    hashes = {content_hash(tokenize_conversations(rows, tokenizer, 256))}
    tokenizer.chat_template = tokenizer.chat_template.replace("<end>", "<end> ")
    hashes.add(content_hash(tokenize_conversations(rows, tokenizer, 256)))
    hashes.add(content_hash(tokenize_conversations(rows, tokenizer_like("phi3"), 256)))
    assert len(hashes) == 3


def test_several_processes_give_the_rows_of_one(tmp_path):
    path = write_conversations(tmp_path / "train.jsonl", CONVERSATIONS * 5)
    alone = prepare([path])
    monkey_free = prepare([write_conversations(tmp_path / "copy.jsonl", CONVERSATIONS * 5)], preprocessing_workers=2)
    assert content_hash(alone.rows) == content_hash(monkey_free.rows)


def test_an_error_in_another_process_names_the_row(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"messages": CONVERSATION}] * 5 + [{"messages": CONVERSATION[:1]}])
    with pytest.raises(ValueError, match=r"Row 6 has no assistant turn.* In .*a.jsonl; `--skip-bad-rows`"):
        prepare([path], preprocessing_workers=2)


def test_several_sources_of_different_kinds_are_one_dataset(tmp_path):
    chats = write_conversations(tmp_path / "chats.jsonl", CONVERSATIONS[:1])
    texts = write_texts(tmp_path / "texts.jsonl", ["say the letters"])
    tokens = write_lines(tmp_path / "tokens.jsonl", [{"input_ids": [7, 8, 9], "loss_mask": [0, 1, 1]}])
    prepared = prepare([chats, texts, tokens])
    assert texts_of(prepared.rows)[1] == "say the letters"
    assert prepared.rows[2]["input_ids"] == [7, 8, 9]
    assert [source.num_used for source in prepared.sources] == [1, 1, 1]


def test_a_weight_is_how_often_rows_come_in_an_epoch(tmp_path):
    many = write_texts(tmp_path / "many.jsonl", [f"say a number {number}" for number in range(10)])
    few = write_texts(tmp_path / "few.jsonl", ["say x x x", "say y y y"])
    prepared = prepare([many, few], dataset_weights=[0.5, 2])
    texts = texts_of(prepared.rows)
    assert len(set(texts[:5])) == 5
    assert texts[5:] == ["say x x x"] * 2 + ["say y y y"] * 2
    assert [source.num_used for source in prepared.sources] == [5, 4]
    assert texts_of(prepare([many, few], dataset_weights=[0.5, 2]).rows) == texts
    assert texts_of(prepare([many, few], dataset_weights=[0.5, 2], seed=1).rows) != texts


def test_the_fraction_of_a_weight_is_drawn_without_replacement():
    rows = np.array([3, 5, 8, 9])
    assert weigh_rows(rows, 1, (0,)).tolist() == [3, 5, 8, 9]
    assert weigh_rows(rows, 2, (0,)).tolist() == [3, 3, 5, 5, 8, 8, 9, 9]
    counts = np.unique(weigh_rows(np.arange(100), 1.5, (0,)), return_counts=True)[1]
    assert sorted(counts) == [1] * 50 + [2] * 50
    assert len(weigh_rows(rows, 0.01, (0,))) == 0


def test_a_source_is_tokenized_once_whatever_its_weight(tmp_path, monkeypatch):
    path = write_conversations(tmp_path / "train.jsonl")
    prepare([path])
    monkeypatch.setattr("eagle3_mla.training.data.RowTokenizer.tokenize", lambda *args: pytest.fail("tokenized"))
    assert prepare([path, path], dataset_weights=[3, 0.4]).sources[0].num_used == 15


def test_bad_rows_are_an_error_or_skipped_and_counted(tmp_path, caplog):
    rows = [{"messages": CONVERSATION}, {"messages": None}, {"messages": CONVERSATION}, {"messages": CONVERSATION[:1]}]
    path = write_lines(tmp_path / "train.jsonl", rows)
    with pytest.raises(ValueError, match=r"Row 2 must have .*`--skip-bad-rows`"):
        prepare([path])
    with caplog.at_level("WARNING", logger="eagle3_mla.training.data"):
        prepared = prepare([path], skip_bad_rows=True)
    assert "Skipped 2 of 4 rows" in caplog.text
    assert "Row 2 must have" in caplog.text
    assert (len(prepared.rows), prepared.num_dropped, prepared.sources[0].num_refused) == (2, 2, 2)
    caplog.clear()
    prepare([path], skip_bad_rows=True)
    assert "Skipped 2 of 4 rows" in caplog.text


def test_data_of_which_nothing_is_left_are_refused(tmp_path):
    path = write_conversations(tmp_path / "train.jsonl")
    with pytest.raises(ValueError, match="two assistant tokens in a row within its first 4 tokens"):
        prepare([path], max_length=4)
    with pytest.raises(ValueError, match="two assistant tokens in a row within its first 4 tokens"):
        tokenize(path, max_length=4)
    bad = write_lines(tmp_path / "bad.jsonl", [{"messages": CONVERSATION[:1]}])
    with pytest.raises(ValueError, match=r"No row .* The first one that was skipped: Row 1 has no assistant turn"):
        prepare([bad], skip_bad_rows=True)


def test_rows_of_mixed_shapes_train_as_they_were_written(tmp_path):
    """Arrow gives each message the keys of all; a template must not see them."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    calling = {"messages": [CONVERSATION[0], call, {"role": "tool", "content": "1", "name": "add"}, CONVERSATION[1]]}
    plain = {"messages": CONVERSATION}
    tokenizer = tokenizer_like("llama3")
    mixed = prepare([write_lines(tmp_path / "mixed.jsonl", [plain, calling])], tokenizer).rows
    for row, alone in zip(mixed, (plain, calling), strict=True):
        path = write_lines(tmp_path / f"{len(alone['messages'])}.jsonl", [alone])
        assert prepare([path], tokenizer).rows[0] == row
    assert "null" not in tokenizer.decode(mixed[1]["input_ids"]) + tokenizer.decode(mixed[0]["input_ids"])


def test_a_conversation_of_a_thousand_turns_is_cut(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", [{"messages": CONVERSATION * 1000}])
    (row,) = prepare([path], tokenizer_like("gemma"), max_length=100).rows
    assert row["length"] == 100
    assert sum(row["loss_mask"]) > 10


def test_the_content_hash_sees_tokens_and_masks():
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3]], "loss_mask": [[0, 1], [1]]})
    other_mask = Dataset.from_dict({"input_ids": [[1, 2], [3]], "loss_mask": [[1, 1], [1]]})
    assert content_hash(rows) != content_hash(other_mask)
    assert content_hash(rows) != content_hash(rows.select([1, 0]))


def test_the_ends_of_a_turn_are_those_of_tokenizer_and_generation_config():
    tokenizer = tiny_tokenizer()
    end = tokenizer.eos_token_id
    assert end_of_turn_ids(tokenizer, None) == [end]
    assert end_of_turn_ids(tokenizer, GenerationConfig(eos_token_id=[7, end])) == [end, 7]
    assert end_of_turn_ids(tokenizer, GenerationConfig(eos_token_id=None)) == [end]


def test_a_target_without_generation_config_says_its_ends_in_its_config(tmp_path):
    config = LlamaConfig(eos_token_id=[5, 6])
    assert load_generation_config(str(tmp_path), config).eos_token_id == [5, 6]
    GenerationConfig(eos_token_id=9).save_pretrained(tmp_path)
    assert load_generation_config(str(tmp_path), config).eos_token_id == 9


WRONG_ARGUMENTS = {
    "no data": ({"dataset": None}, "Exactly one of `--dataset` and `--features`"),
    "too few weights": ({"dataset_weights": [1.0]}, "one weight for each of 2 datasets, got 1"),
    "a weight of nothing": ({"dataset_weights": [1.0, 0.0]}, "must be above 0 and finite, got 0.0"),
    "a weight that is not a number": ({"dataset_weights": [1.0, math.nan]}, "must be above 0 and finite, got nan"),
    "too many splits": (
        {"dataset_split": ["a", "b", "c"]},
        "`--dataset-split` must be given once, or once for each of 2",
    ),
    "too many configs": (
        {"dataset_config": ["a", "b", "c"]},
        "`--dataset-config` must be given once, or once for each",
    ),
    "a stream without end": ({"streaming": True}, "`--streaming` needs `--max-rows`"),
    "too short": ({"max_length": 2}, "`--max-length` must be at least 3, got 2"),
    "no rows": ({"max_rows": 0}, "`--max-rows` must be at least 1, got 0"),
    "no multiple": ({"pad_to_multiple_of": 0}, "`--pad-to-multiple-of` must be at least 1, got 0"),
    "no workers": ({"preprocessing_workers": 0}, "`--preprocessing-workers` must be at least 1, got 0"),
    "nothing to look at": ({"inspect_data": 0}, "`--inspect-data` must be at least 1, got 0"),
    "features to look at": (
        {"dataset": None, "features": "f", "inspect_data": 1},
        "`--inspect-data` needs `--dataset`",
    ),
}


@pytest.mark.parametrize("name", WRONG_ARGUMENTS)
def test_arguments_that_cannot_be_are_refused(name):
    arguments, message = WRONG_ARGUMENTS[name]
    with pytest.raises(ValueError, match=message):
        DataArguments(**{"dataset": ["a", "b"]} | arguments)


def test_each_source_has_its_split_config_and_weight():
    data = DataArguments(dataset=["a", "b"], dataset_split=["x", "y"], dataset_config=["c"], dataset_weights=[1, 0.5])
    assert [(s.dataset, s.split, s.config, s.weight) for s in data.sources()] == [
        ("a", "x", "c", 1),
        ("b", "y", "c", 0.5),
    ]
    assert (data.dataset_name, data.split_name) == ("a, b", "x, y")
    assert DataArguments(dataset=["a", "b"]).split_name == "train"


@pytest.mark.parametrize(("asked", "size"), [(None, 32000), ("full", 50000), ("100", 100), (50000, 50000)])
def test_the_draft_vocabulary_can_be_the_targets(asked, size):
    assert DraftArguments("target", draft_vocab_size=asked).num_draft_tokens(50000) == size


@pytest.mark.parametrize("asked", ["0", "50001", "-5", "many", 0])
def test_a_draft_vocabulary_that_cannot_be_is_refused(asked):
    with pytest.raises(ValueError, match=rf"between 1 and the target's 50000, or full, got {asked}"):
        DraftArguments("target", draft_vocab_size=asked).num_draft_tokens(50000)


def test_a_target_that_is_smaller_than_the_default_draft_vocabulary_is_taken_whole():
    assert DraftArguments("target").num_draft_tokens(280) == 280
