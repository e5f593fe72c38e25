"""What a run leaves behind: the same bytes whatever happened on the way, and never half a shard."""

import itertools
import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from reference_regeneration import QUESTIONS, contents, messages_of, tiny_answerer
from reference_ttt import tiny_tokenizer

from eagle3_mla.training.answered_rows import row_form
from eagle3_mla.training.answering import Decoding
from eagle3_mla.training.conversations import read_conversation
from eagle3_mla.training.prompt_rows import read_prompts, survey_rows
from eagle3_mla.training.regeneration import Regeneration, regenerate, total_record
from eagle3_mla.training.row_shards import RowShards
from eagle3_mla.training.sources import load_conversations

pytestmark = pytest.mark.usefixtures("own_dataset_cache")

ROWS_PER_SHARD = 3
REQUEST = {"--seed": 3, "rows of --dataset": "abc"}
SAMPLING = Decoding(max_new_tokens=10, do_sample=True, temperature=0.8, seed=3)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "source.jsonl"
    with path.open("w") as file:
        for number, turns in enumerate(QUESTIONS * 2):
            row = {"id": f"row-{number}", "source": "toys", "conversations": messages_of(turns)}
            file.write(json.dumps(row) + "\n")
    return load_conversations(str(path))


def job_of(rows, directory, process=0, num_processes=1, output_format="messages", file_format="jsonl", **settings):
    num_shards = -(-len(rows) // ROWS_PER_SHARD)
    form = row_form(output_format, file_format, survey_rows(rows), is_endpoint=False)
    schema = form.schema(rows) if file_format == "parquet" else None
    return Regeneration(
        rows=rows,
        answerer=tiny_answerer(settings.pop("decoding", SAMPLING), **settings),
        shards=RowShards(directory, num_shards, file_format, schema),
        rows_per_shard=ROWS_PER_SHARD,
        form=form,
        last_turn_only=False,
        process=process,
        num_processes=num_processes,
    )


def run(job: Regeneration):
    job.shards.begin(REQUEST, job.process)
    regenerate(job)
    return contents(job.shards.path)


def written(directory) -> list[dict]:
    return [json.loads(line) for path in sorted(directory.glob("*.jsonl")) for line in path.open()]


def test_rows_keep_their_order_their_other_columns_and_their_prompts(rows, tmp_path):
    run(job_of(rows, tmp_path / "out"))
    result = written(tmp_path / "out")
    assert [row["id"] for row in result] == rows["id"]
    assert all(row["source"] == "toys" and "conversations" not in row for row in result)
    assert {row["finish_reason"] for row in result} == {"stop", "length"}
    for row, turns in zip(result, QUESTIONS * 2, strict=True):
        asked = messages_of(turns)[: len(row["messages"])]
        pairs = list(zip(row["messages"], asked, strict=False))
        assert all(new == old for new, old in pairs if old["role"] != "assistant")
        assert row["messages"][-1]["role"] == "assistant"


def test_the_result_is_a_dataset_that_training_takes(rows, tmp_path):
    run(job_of(rows, tmp_path / "out"))
    loaded = load_conversations(str(tmp_path / "out"))
    assert loaded["messages"] == [row["messages"] for row in written(tmp_path / "out")]


def test_token_rows_hold_what_the_target_saw_and_said(rows, tmp_path):
    run(job_of(rows, tmp_path / "out", output_format="tokens"))
    tokenizer, end = tiny_tokenizer(), 1
    result = written(tmp_path / "out")
    assert all("messages" not in row and "conversations" not in row for row in result)
    for row in result:
        assert len(row["input_ids"]) == len(row["loss_mask"])
        prompt = row["input_ids"][: row["loss_mask"].index(1)]
        assert tokenizer.decode(prompt).endswith("<assistant>")
        assert (row["input_ids"][-1] == end) == (row["finish_reason"] == "stop")


def test_parquet_holds_the_rows_of_json_lines(rows, tmp_path):
    run(job_of(rows, tmp_path / "lines"))
    run(job_of(rows, tmp_path / "parquet", file_format="parquet"))
    found = [
        row for path in sorted((tmp_path / "parquet").glob("*.parquet")) for row in pq.read_table(path).to_pylist()
    ]
    for row in found:
        row["messages"] = [{name: text for name, text in m.items() if text is not None} for m in row["messages"]]
    assert found == written(tmp_path / "lines")
    assert len(load_conversations(str(tmp_path / "parquet"))) == len(rows)


def test_json_lines_keep_every_character(rows, tmp_path):
    job = job_of(rows, tmp_path / "out")
    job.shards.begin(REQUEST)
    text = 'tab\t quote" back\\ line\n separator\u2028 \u00e9\u4e2d\U0001f40d'
    job.shards.write(0, [{"text": text}], {})
    assert json.loads(job.shards.shard_path(0).read_text(encoding="utf-8"))["text"] == text


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_the_result_does_not_depend_on_processes_or_batches(rows, tmp_path, batch_size, num_processes):
    expected = run(job_of(rows, tmp_path / "expected"))
    for process in reversed(range(num_processes)):
        job = job_of(rows, tmp_path / "out", process, num_processes, batch_size=batch_size)
        found = run(job)
    assert found == expected


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def end_at(rename: int, is_after: bool):
    """An `os.replace` that ends the run before or after it is called for the n-th time."""
    real_replace, calls = os.replace, itertools.count()

    def replace_or_end(source, target):
        number = next(calls)
        if number < rename or is_after:
            real_replace(source, target)
        if number == rename:
            raise Killed

    return replace_or_end


def test_an_end_between_any_two_steps_changes_nothing(rows, tmp_path, monkeypatch):
    """Every file appears by one rename: the manifest first, then for each shard the rows and the record."""
    whole = job_of(rows.select(range(2 * ROWS_PER_SHARD)), tmp_path / "expected")
    expected = run(whole)
    num_renames = 1 + 2 * whole.shards.num_shards
    for rename, is_after in itertools.product(range(num_renames), (False, True)):
        directory = tmp_path / f"out-{rename}-{is_after}"
        job = replace(whole, shards=replace(whole.shards, path=directory))
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", end_at(rename, is_after))
            with pytest.raises(Killed):
                run(job)
        check_only_complete_shards(directory, expected)
        assert run(job) == expected


def check_only_complete_shards(directory, expected: dict[str, bytes]) -> None:
    for name, content in contents(directory).items():
        assert name.endswith(".incomplete") or content == expected[name], name


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_at_random_moments_gives_the_same_bytes(rows, tmp_path, seed):
    start = time.monotonic()
    expected = run(job_of(rows, tmp_path / "expected"))
    seconds = time.monotonic() - start
    moments, directory = random.Random(seed), tmp_path / "out"
    fork = multiprocessing.get_context("fork")
    num_killed = 0
    for _ in range(50):
        child = fork.Process(target=run, args=(job_of(rows, directory),))
        child.start()
        child.join(moments.uniform(0, seconds))
        if child.exitcode == 0:
            break
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        num_killed += child.exitcode == -signal.SIGKILL
        check_only_complete_shards(directory, expected)
    assert num_killed
    assert run(job_of(rows, directory)) == expected


def test_complete_shards_are_not_answered_again(rows, tmp_path, monkeypatch):
    run(job_of(rows, tmp_path / "out"))
    job = job_of(rows, tmp_path / "out")
    job.shards.record_path(2).unlink()
    monkeypatch.setattr(job.answerer, "_generate", record_calls(job.answerer._generate, asked := []))
    regenerate(job)
    assert {dialogue.number for batch in asked for dialogue, _ in batch} == {6, 7, 8}


def record_calls(function, calls: list):
    def recording(argument):
        calls.append(argument)
        return function(argument)

    return recording


def test_another_request_is_refused_by_the_name_of_what_differs(rows, tmp_path):
    job = job_of(rows, tmp_path / "out")
    job.shards.begin(REQUEST)
    job.shards.begin(dict(reversed(REQUEST.items())))
    with pytest.raises(ValueError, match=r"`--seed` was 3 when .*out was begun, got 4"):
        job.shards.begin({**REQUEST, "--seed": 4})
    with pytest.raises(ValueError, match=r"`--top-p` was None when .* got 0.5"):
        job.shards.begin({**REQUEST, "--top-p": 0.5})


def test_a_directory_with_other_data_is_refused(rows, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"holds train.jsonl, which no regeneration wrote"):
        job_of(rows, tmp_path / "out").shards.begin(REQUEST)


@pytest.mark.parametrize(("damage", "said"), [("change", "was changed"), ("remove", "is missing")])
def test_a_damaged_shard_is_named_and_made_again_as_the_error_says(rows, tmp_path, damage, said):
    job = job_of(rows, tmp_path / "out")
    expected = run(job)
    job.shards.check_complete_shards()
    path = job.shards.shard_path(1)
    if damage == "change":
        path.write_bytes(path.read_bytes().replace(b"toys", b"tays", 1))
    else:
        path.unlink()
    with pytest.raises(ValueError, match=rf"{path.name} {said}.*shard-00001.json"):
        job.shards.check_complete_shards()
    job.shards.record_path(1).unlink()
    assert run(job) == expected


def test_a_shard_without_rows_is_a_record_with_the_reasons(rows, tmp_path):
    job = job_of(rows, tmp_path / "out", decoding=Decoding(max_new_tokens=256))
    run(job)
    assert not list((tmp_path / "out").glob("*.jsonl"))
    total = total_record(job.shards.read_records())
    assert (total["num_rows"], total["num_conversations"]) == (0, len(rows))
    assert sum(total["left_out"].values()) == len(rows)
    job.shards.check_complete_shards()
    assert job.missing_shards() == []


def test_records_count_what_was_written(rows, tmp_path):
    job = job_of(rows, tmp_path / "out")
    run(job)
    total, result = total_record(job.shards.read_records()), written(tmp_path / "out")
    assert total["num_rows"] == len(result) == len(rows)
    assert total["num_cut"] == sum(row["finish_reason"] == "length" for row in result)
    wanted = sum(role == "assistant" for turns in QUESTIONS * 2 for role, _ in turns)
    assert 0 < total["num_answers"] <= wanted + 4
    assert total["num_answer_tokens"] >= total["num_answers"]


def test_the_hash_of_the_rows_sees_content_and_order(rows):
    sha256 = survey_rows(rows).sha256
    assert survey_rows(rows).sha256 == sha256
    assert survey_rows(rows.select(range(len(rows) - 1))).sha256 != sha256
    assert survey_rows(rows.select(reversed(range(len(rows))))).sha256 != sha256


def test_a_row_without_a_conversation_is_named_before_anything_is_asked(rows):
    broken = Dataset.from_list(
        [row if index != 4 else {**row, "conversations": None} for index, row in enumerate(rows)]
    )
    with pytest.raises(ValueError, match="Row 5 must have"):
        survey_rows(broken)


def test_all_forms_of_a_question_are_read():
    user = {"role": "user", "content": "say abc"}
    answer = {"role": "assistant", "content": "abc"}
    assert read_prompts({"messages": [user]}, 1).messages == [user]
    assert read_prompts({"conversations": [{"from": "human", "value": "say abc"}]}, 1).messages == [user]
    assert read_prompts({"prompt": "say abc"}, 1).messages == [user]
    told = read_prompts({"system": "be brief", "messages": [user, answer]}, 1)
    assert told.messages == [{"role": "system", "content": "be brief"}, user, answer]
    completed = read_prompts({"prompt": [user, answer, user], "completion": "abc"}, 1)
    assert (completed.messages, completed.num_given) == ([user, answer, user, answer], 3)
    for row in ({"text": "abc"}, {"prompt": [user, answer]}, {"messages": []}):
        with pytest.raises(ValueError, match="Row 1"):
            read_prompts(row, 1)


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALLING = [
    {"role": "user", "content": "use f"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
    {"role": "tool", "content": "42"},
    {"role": "assistant", "content": "42"},
]


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_calls_and_tools_come_back_from_shards_that_have_none_and_shards_that_do(tmp_path, file_format):
    """Arrow takes the type of a column from its first shard; text has the same type in all of them."""
    source = tmp_path / "source.jsonl"
    plain = [{"tools": [], "messages": messages_of(turns)} for turns in QUESTIONS[:ROWS_PER_SHARD]]
    lines = [json.dumps(row) for row in [*plain, {"tools": [TOOL], "messages": CALLING}]]
    source.write_text("\n".join(lines) + "\n")
    rows = load_conversations(str(source))
    run(job_of(rows, tmp_path / "out", file_format=file_format))
    loaded = [read_conversation(row, 1) for row in load_conversations(str(tmp_path / "out"))]
    assert [conversation.tools for conversation in loaded] == [None, None, None, [TOOL]]
    kept = [message["content"] for message in CALLING[:3]]
    assert [message["content"] for message in loaded[3].messages[:3]] == kept
    assert loaded[3].messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert loaded[0].messages[0] == plain[0]["messages"][0]


def test_a_column_that_json_lines_cannot_hold_is_refused_and_parquet_holds_it(rows, tmp_path):
    notes = [None] * 5 + ["note"] * 9
    noted = rows.add_column("note", notes)
    with pytest.raises(ValueError, match=r"cannot hold the column `note`.*parquet"):
        job_of(noted, tmp_path / "lines")
    run(job_of(noted, tmp_path / "out", file_format="parquet"))
    assert load_conversations(str(tmp_path / "out"))["note"] == notes
