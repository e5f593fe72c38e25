"""The benchmark of trees: its table, what it keeps, and that it does not mix results of two requests."""

import sys

import pytest
from reference_benchmarks import NANO_TARGET, ROOT, ask_for, benchmark, read_table, write_prompts


@pytest.fixture
def trees():
    with benchmark("trees") as module:
        yield module


@pytest.fixture
def run(trees, tmp_path, monkeypatch):
    """Runs the command on the embedded target, with few shapes and two sources; returns the rows of its table."""
    chats = {"first": [ask_for("first")] * 2, "second": [ask_for("second")]}
    prompts = write_prompts(tmp_path / "prompts.jsonl", chats)
    monkeypatch.setattr(trees, "SHAPES", [(2, 1, 2), (6, 3, 2)])
    monkeypatch.setattr(trees, "REFERENCE_SHAPES", [(6, 3, 2)])
    output = tmp_path / "trees.md"

    def command(*extra: str) -> list[list[str]]:
        models = ["--target", str(NANO_TARGET), "--draft", str(ROOT)]
        paths = ["--prompts", str(prompts), "--output", str(output), "--work-dir", str(tmp_path / "work")]
        monkeypatch.setattr(sys, "argv", ["trees.py", *models, *paths, "--max-new-tokens", "16", *extra])
        trees.main()
        return read_table(output)

    return command


def test_a_table_compares_with_the_reference_and_is_measured_once(run, trees, monkeypatch):
    header, *rows = run("--num-samples", "1")
    assert header[6:] == ["first", "second", "equal texts"]
    modes = ["greedy", "greedy", "greedy, EAGLE-2", *["T = 1, noise-coupled"] * 2, *["T = 1, noise-blind"] * 2]
    assert [row[0] for row in rows] == [*modes, "T = 1, EAGLE-2"]
    assert {row[-1] for row in rows} == {"2 of 2", "replayed"}
    assert rows[1][4] == rows[2][4]  # the same greedy trees
    assert all(float(row[6]) >= 1 for row in rows)
    monkeypatch.setattr(trees, "generate", None)
    monkeypatch.setattr(trees, "replay", None)
    assert run("--num-samples", "1") == [header, *rows]


def test_results_of_another_request_are_not_mixed_in(run, tmp_path, trees):
    path = tmp_path / "notebook.json"
    trees.Notebook(path, {"commit": "a"}).recall("x", lambda: 1)
    assert trees.Notebook(path, {"commit": "a"}).recall("x", lambda: 2) == 1
    with pytest.raises(RuntimeError, match="Give another --work-dir"):
        trees.Notebook(path, {"commit": "b"})
