"""The command: what it refuses, how it ends, and how it goes on, also on several processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from reference_regeneration import QUESTIONS, contents, save_answering_target
from reference_ttt import CHAT_TEMPLATE, write_conversations
from test_regeneration_endpoint import echo, serving
from transformers import AutoModelForCausalLM, AutoTokenizer

from eagle3_mla.training.answering import TargetAnswerer
from eagle3_mla.training.data import tokenize_conversations
from eagle3_mla.training.regeneration_cli import main
from eagle3_mla.training.sources import load_conversations

pytestmark = pytest.mark.usefixtures("own_dataset_cache")

ROOT = Path(__file__).parents[1]
NANO_TARGET = ROOT / "examples" / "nano-target"
REQUESTS = [
    "Write the Python method `close(self)` of the class `Connection`.\n\nClose the socket and forget it.",
    "Write the Python function `gcd(a, b)`.",
    "Write the Python method `__repr__(self)` of the class `Point`.",
]


@pytest.fixture(scope="module")
def target_path(tmp_path_factory) -> Path:
    return save_answering_target(tmp_path_factory.mktemp("target"))


@pytest.fixture
def paths(tmp_path, target_path) -> list[str]:
    """Target, data and output directory as arguments."""
    data = write_conversations(tmp_path / "source.jsonl", QUESTIONS * 2)
    return [
        *("--model-path", str(target_path), "--dataset", str(data), "--output-dir", str(tmp_path / "out")),
        *("--max-new-tokens", "10", "--rows-per-shard", "3", "--use-cpu"),
    ]


def refused(capsys, arguments: list[str]) -> str:
    """The one message of a request that ends with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("regenerate_dataset.py: error: ")
    return message


def test_the_command_writes_a_dataset_and_where_it_comes_from(paths, tmp_path):
    main([*paths, "--drop-cut-answers", "False"])
    total = json.loads((tmp_path / "out" / "regeneration" / "provenance.json").read_text())
    assert total["result"]["num_rows"] == 14
    assert total["data_sha256"]
    assert total["versions"]["torch"] == torch.__version__
    assert {"argv", "commit", "seconds", "target", "dataset"} <= total.keys()
    assert len(list((tmp_path / "out").glob("train-*-of-00005.jsonl"))) == 5


def test_the_same_command_again_answers_nothing_and_another_one_is_refused(paths, tmp_path, monkeypatch, capsys):
    main(paths)
    before = contents(tmp_path / "out")
    monkeypatch.setattr(TargetAnswerer, "_generate", lambda *args: pytest.fail("answered a second time"))
    main([*paths, "--batch-size", "1"])
    assert contents(tmp_path / "out") == before
    assert "`--max-new-tokens` was 10 when" in refused(capsys, [*paths, "--max-new-tokens", "11"])
    assert "`--do-sample` was False when" in refused(capsys, [*paths, "--do-sample"])
    other = write_conversations(tmp_path / "other.jsonl", QUESTIONS[::-1] * 2)
    assert "`rows of --dataset` was" in refused(capsys, [*paths, "--dataset", str(other)])


def test_another_target_is_refused_although_its_path_is_the_same(paths, tmp_path, capsys):
    folder = save_answering_target(tmp_path / "own")
    arguments = [*paths, "--model-path", str(folder)]
    main(arguments)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[7, 3] += 1
    model.save_pretrained(folder)
    assert "`weights of --model-path` was" in refused(capsys, arguments)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--batch-size", "0"], "`--batch-size` must be at least 1, got 0"),
        (["--temperature", "0", "--do-sample"], "`--temperature` must be above 0, got 0.0"),
        (["--temperature", "0.5"], "`--temperature` needs `--do-sample`"),
        (["--do-sample", "--top-p", "1.5"], "`--top-p` must be above 0 and at most 1, got 1.5"),
        (["--endpoint", "http://localhost:1/v1"], "either `--model-path` or `--endpoint`"),
        (["--endpoint-model", "big"], "need `--endpoint`"),
        (["--dataset", "missing.jsonl"], "missing.jsonl does not exist"),
        (["--model-path", "/nowhere/at/all"], "The target /nowhere/at/all cannot be loaded"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_ends_with_one_message_and_exit_code_2(paths, capsys, extra, said):
    assert said in refused(capsys, [*paths, *extra])


def test_an_endpoint_needs_a_model_and_sends_no_tokens(tmp_path, capsys, monkeypatch):
    data = write_conversations(tmp_path / "source.jsonl", QUESTIONS)
    arguments = ["--dataset", str(data), "--output-dir", str(tmp_path / "out"), "--endpoint", "http://localhost:1/v1"]
    assert "needs `--endpoint-model`" in refused(capsys, arguments)
    arguments += ["--endpoint-model", "big"]
    assert "an endpoint sends text only" in refused(capsys, [*arguments, "--output-format", "tokens"])
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    assert "NO_SUCH_KEY, which is not set" in refused(capsys, [*arguments, "--api-key-env", "NO_SUCH_KEY"])


def test_a_template_that_cannot_ask_is_refused(paths, tmp_path, capsys):
    folder = save_answering_target(tmp_path / "own")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE.split("{% if add_generation_prompt %}")[0])
    assert "ignores `add_generation_prompt`" in refused(capsys, [*paths, "--model-path", str(folder)])


def test_an_interrupted_run_says_in_one_line_how_to_go_on(paths, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(TargetAnswerer, "_generate", interrupt_at(4, TargetAnswerer._generate))
    with pytest.raises(SystemExit) as ended:
        main(paths)
    assert ended.value.code == 130
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("Interrupted. ")
    assert "of 5 shards are complete" in line
    assert "the same command goes on from there" in line
    monkeypatch.undo()
    main(paths)
    main([*paths, "--output-dir", str(tmp_path / "uninterrupted")])
    assert contents(tmp_path / "out") == contents(tmp_path / "uninterrupted")


def interrupt_at(call: int, generate):
    calls = []

    def interrupting(self, prompts):
        calls.append(prompts)
        if len(calls) == call:
            raise KeyboardInterrupt
        return generate(self, prompts)

    return interrupting


def test_a_run_without_memory_says_which_argument_helps(paths, monkeypatch, capsys):
    def fail(self, prompts):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(TargetAnswerer, "_generate", fail)
    with pytest.raises(SystemExit) as ended:
        main(paths)
    assert ended.value.code == 1
    assert "Out of memory with `--batch-size 16`" in capsys.readouterr().err


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_an_endpoint_answers_a_dataset_and_its_key_is_written_nowhere(tmp_path, monkeypatch, file_format):
    monkeypatch.setenv("TEST_KEY", "secret-1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    data = write_conversations(tmp_path / "source.jsonl", QUESTIONS)
    with serving(echo) as server:
        main(
            [
                *("--dataset", str(data), "--output-dir", str(tmp_path / "out"), "--rows-per-shard", "2"),
                *("--endpoint", server.url, "--endpoint-model", "big", "--api-key-env", "TEST_KEY"),
                *("--concurrency", "3", "--file-format", file_format, "--use-cpu"),
            ]
        )
        assert server.headers[0]["Authorization"] == "Bearer secret-1"
    found = load_conversations(str(tmp_path / "out"))["messages"]
    assert [messages[-1]["content"] for messages in found][:2] == ["1 say abc", "4 more"]
    assert not any(b"secret-1" in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())


def test_a_server_that_refuses_ends_the_command_with_its_message(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    data = write_conversations(tmp_path / "source.jsonl", QUESTIONS)
    refusal = (404, {"message": "The model `big` does not exist."}, {})
    with serving(lambda request: refusal) as server, pytest.raises(SystemExit) as ended:
        main(
            [
                *("--dataset", str(data), "--output-dir", str(tmp_path / "out"), "--use-cpu"),
                *("--endpoint", server.url, "--endpoint-model", "big"),
            ]
        )
    assert ended.value.code == 1
    assert "refused with status 404: The model `big` does not exist. 0 of 1 shards" in capsys.readouterr().err


def test_answers_of_the_nano_target_are_those_of_generate(tmp_path):
    data = write_conversations(tmp_path / "source.jsonl", [[("user", request)] for request in REQUESTS])
    main(
        [
            *("--model-path", str(NANO_TARGET), "--dataset", str(data), "--output-dir", str(tmp_path / "out")),
            *("--max-new-tokens", "32", "--batch-size", "3", "--drop-cut-answers", "False", "--use-cpu"),
        ]
    )
    (shard,) = (tmp_path / "out").glob("*.jsonl")
    rows = [json.loads(line) for line in shard.open()]
    tokenizer = AutoTokenizer.from_pretrained(NANO_TARGET)
    model = AutoModelForCausalLM.from_pretrained(NANO_TARGET, dtype="float32").eval()
    for row, request in zip(rows, REQUESTS, strict=True):
        question = [{"role": "user", "content": request}]
        prompt = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        alone = model.generate(**prompt, max_new_tokens=32, do_sample=False)[
            0, prompt["input_ids"].shape[1] :
        ].tolist()
        is_finished = alone[-1] == tokenizer.eos_token_id
        said = tokenizer.decode(alone[:-1] if is_finished else alone)
        assert row["messages"] == [*question, {"role": "assistant", "content": said}]
        assert row["finish_reason"] == ("stop" if is_finished else "length")
    record = json.loads((tmp_path / "out" / "regeneration" / "shard-00000.json").read_text())
    assert record["num_unreproduced"] == 0


def test_training_finds_in_messages_what_the_token_rows_hold(tmp_path):
    """Both forms must teach the same tokens; a mask that is off by one would still train, and accept less."""
    data = write_conversations(tmp_path / "source.jsonl", [[("user", request)] for request in REQUESTS])
    rows, tokenizer = {}, AutoTokenizer.from_pretrained(NANO_TARGET)
    for form in ("messages", "tokens"):
        arguments = ["--dataset", str(data), "--output-dir", str(tmp_path / form), "--output-format", form]
        arguments += ["--drop-cut-answers", "False"]
        main([*arguments, "--model-path", str(NANO_TARGET), "--max-new-tokens", "48", "--use-cpu"])
        rows[form] = tokenize_conversations(load_conversations(str(tmp_path / form)), tokenizer, max_length=256)
    finish_reasons = load_conversations(str(tmp_path / "tokens"))["finish_reason"]
    assert "stop" in finish_reasons
    for text, exact, finish_reason in zip(rows["messages"], rows["tokens"], finish_reasons, strict=True):
        length = len(exact["input_ids"])
        assert text["input_ids"][:length] == exact["input_ids"]
        assert text["loss_mask"][:length] == exact["loss_mask"]
        # The template ends a turn that was cut, too.
        assert sum(text["loss_mask"][length:]) == (finish_reason == "length")


def test_nothing_teaches_an_end_that_the_target_never_said(tmp_path, caplog):
    """Behind a cut answer the template puts an end; the draft would learn to stop in the middle of sentences."""
    data = write_conversations(tmp_path / "source.jsonl", [[("user", request)] for request in REQUESTS])
    texts, tokenizer = {}, AutoTokenizer.from_pretrained(NANO_TARGET)
    for form in ("messages", "tokens"):
        arguments = ["--dataset", str(data), "--output-dir", str(tmp_path / form), "--output-format", form]
        with caplog.at_level("INFO"):
            main([*arguments, "--model-path", str(NANO_TARGET), "--max-new-tokens", "48", "--use-cpu"])
        rows = tokenize_conversations(load_conversations(str(tmp_path / form)), tokenizer, max_length=256)
        texts[form] = [tokenizer.decode(ids) for ids in rows["input_ids"]]
    reasons = load_conversations(str(tmp_path / "tokens"))["finish_reason"]
    assert set(reasons) == {"stop", "length"}
    finished = [text for text, reason in zip(texts["tokens"], reasons, strict=True) if reason == "stop"]
    assert [text.removesuffix("\n") for text in texts["messages"]] == finished
    assert f"{reasons.count('length')} conversations left out: the answer was cut by --max-new-tokens." in caplog.text


@pytest.mark.parametrize(
    ("arguments", "is_dropped"),
    [
        ([], True),
        (["--output-format", "tokens"], False),
        (["--drop-cut-answers", "False"], False),
        (["--output-format", "tokens", "--drop-cut-answers"], True),
    ],
)
def test_cut_answers_are_dropped_where_they_would_teach_an_end(arguments, is_dropped, paths, tmp_path):
    main([*paths, *arguments])
    total = json.loads((tmp_path / "out" / "regeneration" / "provenance.json").read_text())["result"]
    reasons = load_conversations(str(tmp_path / "out"))["finish_reason"]
    assert ("length" in reasons) == (total["num_cut"] > 0)
    assert ("length" in reasons) != is_dropped
    assert sum(total["left_out"].values()) == (14 - total["num_rows"] if is_dropped else 0)


def test_cut_answers_that_are_kept_as_text_are_named(paths, caplog):
    with caplog.at_level("INFO"):
        main([*paths, "--drop-cut-answers", "False"])
    assert "Training learns an end of turn behind each answer that was cut" in caplog.text


def start(arguments: list[str], *launcher: str, **settings) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, *launcher, "scripts/regenerate_dataset.py", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, **settings)


def finished(process: subprocess.Popen) -> str:
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return errors


@pytest.mark.slow
def test_two_processes_by_torchrun_write_what_one_writes(paths, tmp_path):
    arguments = [*paths, "--do-sample", "--seed", "5"]
    finished(start(arguments, "-m", "torch.distributed.run", "--nproc-per-node", "2"))
    main([*arguments, "--output-dir", str(tmp_path / "one")])
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    provenance = json.loads((tmp_path / "out" / "regeneration" / "provenance.json").read_text())
    assert provenance["num_processes"] == 2


@pytest.mark.slow
def test_a_killed_command_goes_on_and_gives_the_same_bytes(paths, tmp_path):
    arguments = [*paths, "--do-sample", "--rows-per-shard", "1", "--batch-size", "1"]
    main([*arguments, "--output-dir", str(tmp_path / "whole")])
    expected = contents(tmp_path / "whole")
    process = start(arguments)
    while not list((tmp_path / "out").glob("train-0000[1-9]*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = contents(tmp_path / "out")
    complete = {name: content for name, content in left.items() if not name.endswith(".incomplete")}
    assert set(complete) < set(expected)
    assert all(content == expected[name] for name, content in complete.items())
    finished(start(arguments))
    assert contents(tmp_path / "out") == expected
