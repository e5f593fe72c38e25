"""Where rows come from, and what is said of sources that cannot be read."""

import json

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from reference_ttt import CONVERSATIONS, write_conversations

from eagle3_mla.training.sources import load_conversations

pytestmark = pytest.mark.usefixtures("own_dataset_cache")

CONVERSATION = [{"role": "user", "content": "say abc"}, {"role": "assistant", "content": "abc"}]
CALLING = [
    {"role": "user", "content": [{"type": "text", "text": "say abc"}]},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
]


def write_lines(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_files_directories_parquet_and_saved_datasets_hold_the_same_rows(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_conversations(folder / "a.jsonl", CONVERSATIONS[:2])
    write_conversations(folder / "b.jsonl", CONVERSATIONS[2:])
    whole = load_conversations(str(write_conversations(tmp_path / "train.jsonl")))
    whole.to_parquet(tmp_path / "train.parquet")
    whole.save_to_disk(tmp_path / "saved")
    (tmp_path / "list.json").write_text(json.dumps(list(whole), indent=2))
    DatasetDict({"train": whole, "test": whole.select([0])}).save_to_disk(tmp_path / "splits")
    for name in ("folder", "train.parquet", "saved", "splits", "list.json"):
        assert load_conversations(str(tmp_path / name))["messages"] == whole["messages"]
    assert len(load_conversations(str(tmp_path / "splits"), split="test")) == 1


def test_only_the_first_rows_can_be_asked_for(tmp_path):
    path = str(write_conversations(tmp_path / "train.jsonl"))
    whole = load_conversations(path)
    assert load_conversations(path, max_rows=2)["messages"] == whole["messages"][:2]
    assert len(load_conversations(path, max_rows=1000)) == len(whole)


def test_rows_of_different_shapes_can_be_in_one_file(tmp_path):
    path = write_lines(tmp_path / "mixed.jsonl", [{"messages": CONVERSATION}, {"messages": CALLING}, {"text": "abc"}])
    rows = load_conversations(path)
    assert [row["messages"] is None for row in rows] == [False, False, True]
    assert rows[1]["messages"][0]["content"] == CALLING[0]["content"]
    assert rows[2]["text"] == "abc"


def test_a_saved_dataset_gives_plain_values(tmp_path):
    Dataset.from_dict({"input_ids": [[1, 2]], "loss_mask": [[0, 1]]}).with_format("torch").save_to_disk(tmp_path / "a")
    assert load_conversations(str(tmp_path / "a"))[0] == {"input_ids": [1, 2], "loss_mask": [0, 1]}


WRONG_FILES = {
    "broken JSON": (b'{"messages": []}\n\n{"messages": [\n', r"Line 3 of .*train.jsonl is not valid JSON"),
    "a list on a line": (b"[1, 2]\n", r"Line 1 of .*train.jsonl must be a JSON object, got list"),
    "not a number": (b'{"text": "a"}\n{"text": NaN}\n', r"Line 2 of .*train.jsonl holds NaN, which is not JSON"),
    "another encoding": ('{"text": "é"}\n'.encode("latin-1"), r"train.jsonl is not UTF-8 text"),
    "too many brackets": (b"{}\n" + b"[" * 100_000, r"Line 2 of .*train.jsonl is nested too deeply to be read"),
    "a number without end": (
        b'{"a": ' + b"7" * 5000 + b"}\n",
        r"Line 1 of .*train.jsonl holds a number that cannot be read: Exceeds the limit",
    ),
    "half of a surrogate pair": (
        b'{"text": "\\ud83d\\ude00"}\n{"text": ["\\ud800 x"]}\n',
        r"Line 2 of .*train.jsonl holds \\ud800, half of a surrogate pair, which is no character",
    ),
    "no rows": (b"\n \n", r"train.jsonl is empty"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_broken_file_is_named_with_the_line(name, tmp_path):
    content, message = WRONG_FILES[name]
    (tmp_path / "train.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_conversations(str(tmp_path / "train.jsonl"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"text": "a"}, 3]', r"Item 2 of .*list.json must be a JSON object, got int"),
        ("[]", "list.json is empty"),
        ('[{}, {"\\udfff": "a"}]', r"list.json holds \\udfff, half of a surrogate pair"),
        ('[{"text": "a"}', r"list.json is not valid JSON"),
    ],
)
def test_a_broken_list_is_named_with_the_item(text, message, tmp_path):
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_conversations(str(tmp_path / "list.json"))


def test_a_damaged_parquet_file_is_one_sentence(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(ValueError, match=r"train.parquet cannot be read together as rows: ") as info:
        load_conversations(str(tmp_path / "train.parquet"))
    assert "\n" not in str(info.value)


def test_missing_and_empty_datasets_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"missing.jsonl does not exist"):
        load_conversations(str(tmp_path / "missing.jsonl"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"must be, or hold, files of the types"):
        load_conversations(str(tmp_path / "folder"))
    (tmp_path / "folder" / "a.json").write_text("[]")
    (tmp_path / "folder" / "b.parquet").write_text("")
    with pytest.raises(ValueError, match="mixes JSON and Parquet files"):
        load_conversations(str(tmp_path / "folder"))
    DatasetDict({"test": Dataset.from_dict({"messages": [CONVERSATION]})}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match=r"has no split 'train'; it has \['test'\]"):
        load_conversations(str(tmp_path / "splits"))


@pytest.mark.parametrize("options", [{"config": "en"}, {"streaming": True, "max_rows": 1}])
def test_what_only_the_hub_has_is_refused_for_a_file(options, tmp_path):
    with pytest.raises(ValueError, match="are for datasets on the Hub"):
        load_conversations(write_lines(tmp_path / "a.jsonl", [{"text": "a"}]), **options)


def test_a_split_of_what_has_none_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}')
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    for name in ("train.jsonl", "saved"):
        with pytest.raises(ValueError, match=rf"`--dataset-split` must be train for .*{name}, got foo"):
            load_conversations(str(tmp_path / name), split="foo")


def test_a_hub_dataset_is_loaded_by_id_config_and_split(monkeypatch):
    rows = Dataset.from_dict({"messages": [CONVERSATION]})
    calls = []
    monkeypatch.setattr(
        "eagle3_mla.training.sources.load_dataset", lambda *args, **kwargs: calls.append((args, kwargs)) or rows
    )
    assert load_conversations("user/chats", "train_sft", "en")["messages"] == rows["messages"]
    assert calls == [(("user/chats", "en"), {"split": "train_sft"})]


def test_an_unreachable_hub_dataset_is_one_sentence(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'user/chats' on the Hub\nand more")

    monkeypatch.setattr("eagle3_mla.training.sources.load_dataset", fail)
    monkeypatch.setattr("eagle3_mla.training.sources.HfApi.dataset_info", fail)
    for options in ({}, {"streaming": True, "max_rows": 2}):
        with pytest.raises(ValueError, match=r"user/chats is neither .* nor loadable .*Couldn't reach") as info:
            load_conversations("user/chats", **options)
        assert "\n" not in str(info.value)


class FakeHub:
    """A dataset of a million rows on the Hub, which counts what is read of it."""

    def __init__(self):
        self.commit = "c0ffee"
        self.sha = self.commit
        self.num_read = 0

    def dataset_info(self, api, name):
        return self

    def load_dataset(self, name, config, split, revision, streaming):
        assert (name, config, split, revision, streaming) == ("user/chats", None, "train", self.commit, True)
        return IterableDataset.from_generator(self.rows)

    def rows(self):
        for number in range(1_000_000):
            self.num_read += 1
            yield {"text": f"{self.commit} {number}"}

    def __getstate__(self):
        return {}


def test_streaming_reads_the_first_rows_and_keeps_them_under_their_commit(monkeypatch):
    hub = FakeHub()
    monkeypatch.setattr("eagle3_mla.training.sources.load_dataset", hub.load_dataset)
    monkeypatch.setattr("eagle3_mla.training.sources.HfApi.dataset_info", lambda api, name: hub)
    rows = load_conversations("user/chats", streaming=True, max_rows=3)
    assert rows["text"] == ["c0ffee 0", "c0ffee 1", "c0ffee 2"]
    num_read = hub.num_read
    assert num_read < 1000
    again = load_conversations("user/chats", streaming=True, max_rows=3)
    assert (again["text"], again._fingerprint, hub.num_read) == (rows["text"], rows._fingerprint, num_read)
    hub.commit = hub.sha = "decade"
    assert load_conversations("user/chats", streaming=True, max_rows=3)["text"][0] == "decade 0"
