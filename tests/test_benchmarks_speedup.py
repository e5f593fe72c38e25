"""The benchmark of speed: what is counted, what is computed, and a tiny twin whose texts are all equal."""

import sys

import pytest
import torch
from reference_benchmarks import NANO_TARGET, ROOT, ask_for, benchmark, read_table, write_prompts


@pytest.fixture
def speedup():
    with benchmark("speedup") as module:
        yield module


def test_padding_behind_the_end_counts_nowhere(speedup):
    assert speedup.emitted([5, 6, 3, 4, 4], [3]) == [5, 6, 3]
    assert speedup.emitted([5, 3, 3], [3]) == [5, 3]
    assert speedup.emitted([5, 6], [3]) == [5, 6]


def test_prompts_are_padded_on_the_left(speedup):
    ids, mask = speedup.pad_left([torch.tensor([[7, 8]]), torch.tensor([[9, 9, 9]])], 4, pad_token_id=1)
    assert ids.tolist() == [[1, 1, 7, 8], [1, 9, 9, 9]]
    assert mask.tolist() == [[0, 0, 1, 1], [0, 1, 1, 1]]


def test_batches_are_full(speedup):
    prompts = {"a": list(range(3)), "b": list(range(9))}
    assert speedup.batches_of(prompts, 4, 8) == {"a": [[0, 1, 2, 0], [1, 2, 0, 1]], "b": [[0, 1, 2, 3], [4, 5, 6, 7]]}
    assert speedup.batches_of(prompts, 4, 1) == {"a": [[0, 1, 2, 0]], "b": [[0, 1, 2, 3]]}


def test_ratios_are_to_plain_generation_with_the_same_vocabulary(speedup):
    plain = {"a": speedup.Tally(100, 1.0, 100, [], [[1, 2]]), "b": speedup.Tally(100, 2.0, 100, [], [[3]])}
    ours = {"a": speedup.Tally(100, 0.5, 25, [4, 4], [[1, 2]]), "b": speedup.Tally(100, 0.5, 50, [2], [[4]])}
    measured, computed = speedup.table_rows("ours-captured", 1, ours, plain, (0.02, 0.01))
    assert measured[1:] == ["1", "200", "**3.00x**", "3.00", "200 (2.00x)", "200 (4.00x)", "1 of 2"]
    # 100 / (0.5 + 25 * 0.02) against 100 / (1 + 100 * 0.01), and 100 / (0.5 + 50 * 0.02) against 100 / 3.
    assert computed[1:] == ["1", "83", "**2.00x**", "3.00", "100 (2.00x)", "67 (2.00x)", "1 of 2"]
    assert "computed" in computed[0]
    alone, _ = speedup.table_rows("ours-captured", 1, ours, None, (0.0, 0.0))
    assert alone[1:] == ["1", "200", "", "3.00", "200", "200", ""]


@pytest.mark.parametrize(("way", "num_calls"), [("plain-static", 1), ("ours-captured", 3)])
def test_seconds_of_a_warm_up_are_counted_apart(speedup, way, num_calls, monkeypatch):
    """Compilation is the first call's; ours captures once for each size of its buffers."""
    seen = []

    def run(pair, way, prompts, length):
        seen.append(prompts)
        return speedup.Tally(tokens=1, seconds=100.0 if len(seen) <= num_calls else 1.0)

    monkeypatch.setattr(speedup.Pair, "run", run)
    pair = speedup.Pair(None, None, speedup.TreeShape(), 8, 0)
    tallies, warm_up = pair.measure(way, {"a": [["first"], ["second"]], "b": [["third"]]}, 4)
    assert warm_up == 100.0 * num_calls
    assert {source: tally.seconds for source, tally in tallies.items()} == {"a": 2.0, "b": 1.0}
    assert len(seen) == num_calls + 3


def test_plain_generation_is_measured_before_what_is_compared_with_it(speedup):
    jobs = speedup.jobs_of(list(speedup.TRIED), [1, 8])
    assert sorted(jobs) == sorted((size, way) for size in (1, 8) for way in speedup.TRIED)
    for size in (1, 8):
        assert next(way for batch, way in jobs if batch == size) == "plain-static"


def test_batches_of_no_prompt_are_refused_before_models_are_made(speedup, monkeypatch, capsys):
    models = ["--target", "none", "--draft", "none", "--prompts", "none"]
    monkeypatch.setattr(sys, "argv", ["speedup.py", *models, "--batch-sizes", "8", "0"])
    with pytest.raises(SystemExit):
        speedup.parse_arguments()
    assert "--batch-sizes: must be at least 1, got 0" in capsys.readouterr().err


def test_a_tiny_twin_says_the_same_texts(speedup, tmp_path, monkeypatch):
    chats = {source: [ask_for(source)] for source in ("first", "second")}
    prompts, output = write_prompts(tmp_path / "prompts.jsonl", chats), tmp_path / "speedup.md"
    models = ["--target", str(NANO_TARGET), "--draft", str(ROOT), "--prompts", str(prompts)]
    sizes = ["--batch-sizes", "1", "--num-samples", "1", "--prompt-length", "32", "--max-new-tokens", "8"]
    tree = ["--num-nodes", "6", "--top-k", "3", "--depth", "2", "--output", str(output)]
    ways = ["--ways", "plain-static", "ours-captured"]
    monkeypatch.setattr(sys, "argv", ["speedup.py", "--small", *models, *sizes, *tree, *ways])
    speedup.main()
    table = read_table(output)
    assert table[0][5:] == ["first", "second", "equal texts", "warm-up, s"]
    assert len(table) == 1 + 2 * 2
    assert {row[-2] for row in table[1:]} == {"2 of 2"}
    assert float(table[3][4]) > 1
