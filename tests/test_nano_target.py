"""The embedded target: its training text keeps held-out files apart, and the committed model is ready to use."""

import ast
import importlib.util
import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

NANO_TARGET = Path(__file__).parents[1] / "examples" / "nano-target"
MAX_WEIGHT_BYTES = 12_000_000
# Packages with held-out files (by the hash of their names: json, logging, collections, email.errors) and others.
SAMPLE_PACKAGES = ["collections", "email", "html", "json", "logging", "wsgiref"]

SOURCE = '''
class Stack:
    @property
    def top(self):
        """The last item.

        It stays where it is.
        """

        return self.items[-1]

    def push(self, item, *, twice=False):
        self.items.extend([item, item] if twice else [item])

    def pop(self):
        """To be written."""
        raise NotImplementedError("pop")
'''


def load_stdlib_conversations():
    spec = importlib.util.spec_from_file_location("stdlib_conversations", NANO_TARGET / "stdlib_conversations.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


stdlib_conversations = load_stdlib_conversations()


@pytest.fixture(scope="module")
def sample_stdlib(tmp_path_factory) -> Path:
    """A few packages of the running interpreter: the whole library takes some 10 s to read."""
    folder = tmp_path_factory.mktemp("stdlib")
    for package in SAMPLE_PACKAGES:
        shutil.copytree(Path(sysconfig.get_path("stdlib")) / package, folder / package)
    return folder


@pytest.fixture(scope="module")
def splits(sample_stdlib) -> dict[str, list[dict]]:
    return stdlib_conversations.build_splits(sample_stdlib)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(NANO_TARGET)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(NANO_TARGET, dtype="float32").eval()


def module_names(rows: list[dict]) -> set[str]:
    return {row["id"].split(":")[0] for row in rows}


def bodies(source: str) -> set[str]:
    functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, stdlib_conversations.FUNCTION))
    return {stdlib_conversations.normalised_body(function) for function in functions}


def test_no_file_is_in_both_splits(splits):
    train, held_out = module_names(splits["code_train"]), module_names(splits["code_heldout"])
    assert train
    assert held_out
    assert not train & held_out
    assert module_names(splits["train"]) <= train
    assert module_names(splits["heldout"]) <= held_out


def test_building_the_splits_twice_gives_the_same_rows(splits, sample_stdlib):
    assert stdlib_conversations.build_splits(sample_stdlib) == splits


def test_no_held_out_function_is_in_a_training_text(splits):
    train_texts = [row["text"] for row in splits["code_train"]]
    train_texts += [row["messages"][1]["content"] for row in splits["train"]]
    seen = set().union(*map(bodies, train_texts))
    for row in splits["heldout"]:
        assert not bodies(row["messages"][1]["content"]) <= seen, row["id"]


def test_held_out_function_with_the_body_of_a_training_function_is_left_out(tmp_path):
    """`json` is held out and `html` is not; only the name and the docstring differ."""
    (tmp_path / "json.py").write_text('def held_out(x):\n    """One more."""\n    return x + 1\n')
    (tmp_path / "html.py").write_text("def train(x):\n    return x + 1  # next\n")
    splits = stdlib_conversations.build_splits(tmp_path)
    assert [row["id"] for row in splits["code_heldout"]] == ["json"]
    assert splits["heldout"] == []


def test_answer_is_the_source_without_its_docstring():
    module = stdlib_conversations.Module("stack", SOURCE, ast.parse(SOURCE))
    rows = [row for _, row in stdlib_conversations.conversations(module)]
    contents = [[message["content"] for message in row["messages"]] for row in rows]
    assert contents == [
        [
            "Write the Python method `top(self)` of the class `Stack`.\n\nThe last item.\n\nIt stays where it is.",
            "@property\ndef top(self):\n    return self.items[-1]",
        ],
        [
            "Write the Python method `push(self, item, *, twice=False)` of the class `Stack`.",
            "def push(self, item, *, twice=False):\n    self.items.extend([item, item] if twice else [item])",
        ],
    ]
    assert [row["documented"] for row in rows] == [True, False]


def test_tests_and_tables_and_unparseable_files_are_not_read(tmp_path):
    for name in ("good.py", "test/test_good.py", "encodings/cp437.py", "_sysconfigdata_linux.py", "bad.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("def broken(" if name == "bad.py" else "x = 1\n")
    assert [module.name for module in stdlib_conversations.read_modules(tmp_path)] == ["good"]


def test_output_folder_that_cannot_be_written_is_named_in_the_error(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        stdlib_conversations.main(["--output-dir", str(tmp_path / "file" / "data")])
    assert f"`--output-dir` must be a folder that can be written to, got {tmp_path}" in capsys.readouterr().err


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "train.jsonl"
    stdlib_conversations.write_jsonl([{"id": "old"}], path)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        stdlib_conversations.write_jsonl([{"id": "new"}], path)
    assert json.loads(path.read_text()) == {"id": "old"}


@pytest.mark.parametrize(
    "answers",
    [
        ["def one():\n    return 1"],
        ["def one():\n    return 1", "def two():\n\n    return '<b>'\n"],
        ["  starts and ends with white space \n"],
    ],
    ids=["one-turn", "two-turns", "white-space"],
)
def test_assistant_mask_covers_exactly_the_answers_and_their_end_tokens(tokenizer, answers):
    messages = [{"role": "system", "content": "Write Python."}]
    for answer in answers:
        messages += [{"role": "user", "content": "Write a function."}, {"role": "assistant", "content": answer}]
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    masked = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(masked) == "".join(answer + "<|end|>" for answer in answers)


def test_prompt_is_a_prefix_of_the_whole_conversation(tokenizer):
    messages = [{"role": "user", "content": "Write a function."}, {"role": "assistant", "content": "def one(): ..."}]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert whole[: len(prompt)] == prompt


def test_tokenizer_gives_every_text_back(tokenizer):
    text = "def f(x):\n\tif x:\n        return  x ** 1234  # \u00e9\u4e2d\U0001f40d\r\n\n\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_have_the_documented_ids(tokenizer, model):
    names = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>", "<|system|>"]
    assert tokenizer.convert_tokens_to_ids(names) == list(range(6))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.padding_side) == (3, 4, "left")
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (3, 4)
    assert model.config.vocab_size == len(tokenizer)


def test_weights_take_at_most_12_megabytes():
    assert (NANO_TARGET / "model.safetensors").stat().st_size <= MAX_WEIGHT_BYTES


def test_model_answers_a_held_out_request_with_a_python_function(tokenizer, model):
    request = "Write the Python method `close(self)` of the class `FileHandler`.\n\nCloses the stream."
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": request}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert output[-1] == tokenizer.eos_token_id
    (function,) = ast.parse(tokenizer.decode(output, skip_special_tokens=True)).body
    assert function.name == "close"
