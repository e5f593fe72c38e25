"""The benchmark of rounds: bytes and limits are those of the formulas, and a tiny table has all its rows."""

import sys

import pytest
import torch
from reference_benchmarks import ROOT, benchmark, read_table

from eagle3_mla.configuration_eagle3_mla import Eagle3MLAConfig
from eagle3_mla.modeling_eagle3_mla import Eagle3MLADraftModel

EAGER_WAYS = ["plain-eager", "prompt-lookup", "ours-eager", "ours-captured"]


@pytest.fixture
def rounds():
    with benchmark("rounds") as module:
        yield module


def make_llama_8b_pair(rounds, **fields):
    """Without memory behind the weights."""
    target = rounds.make_llama(rounds.SHAPES["target"], torch.bfloat16, "meta")
    config = Eagle3MLAConfig.from_target(target.config, draft_vocab_size=rounds.DRAFT_VOCAB_SIZE, **fields)
    with torch.device("meta"):
        return target, Eagle3MLADraftModel._from_config(config, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("fields", "step_gb", "context"),
    [({}, 0.720, 2 * 256), ({"attention_type": "gqa"}, 0.749, 2 * 2048)],
    ids=["mla", "gqa"],
)
def test_a_round_of_an_8b_model_reads_what_its_shapes_say(rounds, fields, step_gb, context):
    target, draft = make_llama_8b_pair(rounds, **fields)
    layer = 4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336 + 2 * 4096
    assert rounds.target_bytes(target) == 2 * (32 * layer + 4096 + 128256 * 4096)
    assert rounds.step_bytes(draft) / 1e9 == pytest.approx(step_gb, abs=5e-4)
    assert rounds.fusion_bytes(draft) == 2 * 3 * 4096 * 4096
    assert (rounds.context_bytes(target), rounds.context_bytes(draft)) == (2 * 32 * 2048, context)


def test_limit_of_a_round_is_everything_it_reads_at_the_bandwidth(rounds):
    target, draft = make_llama_8b_pair(rounds)
    weights = rounds.reads_of("ours-captured", target, draft, (1, 512), depth=8)
    assert weights.weights == rounds.target_bytes(target) + 8 * rounds.step_bytes(draft) + 2 * 3 * 4096 * 4096
    assert rounds.Reads(weights.weights, 0).milliseconds(4.25e12) == pytest.approx(4.92, abs=0.01)
    eight = rounds.reads_of("ours-captured", target, draft, (8, 512), depth=8)
    assert (eight.weights, eight.caches) == (weights.weights, 8 * weights.caches)
    plain = rounds.reads_of("plain-static", target, draft, (1, 512), depth=8)
    assert (plain.weights, plain.caches) == (rounds.target_bytes(target), 512 * 2 * 32 * 2048)


def test_what_a_longer_call_does_more_is_counted_per_call(rounds):
    short = rounds.Measured(3, 4, 1.0, (0.1, 0.2, 0.3, 0.4))
    costs = rounds.Measured(13, 24, 2.0, (0.2, 0.4, 0.6, 0.8)).per_call_after(short)
    assert costs == pytest.approx([100.0, 10.0, 20.0, 30.0, 40.0, 2.0])
    found = rounds.Costs(costs, peak_bytes=3 * 10**9, first_seconds=61.25)
    row = rounds.table_row("ours-eager", (2, 512), found, rounds.Reads(40 * 10**9, 10 * 10**9), 1e12)
    assert row == [
        *("ours, eager", "2", "512", "**100.00**", "10.00", "20.00", "30.00", "40.00", "40.0%"),
        *("40.00", "10.00", "50.00", "2.00", "3.0", "1.00", "61.2"),
    ]


def test_a_longer_call_that_takes_no_further_calls_is_an_error_of_its_row(rounds, capsys):
    short = rounds.Measured(3, 4, 1.0)
    with pytest.raises(rounds.NoFurtherCallsError, match="3 calls of the target"):
        rounds.Measured(3, 5, 1.1).per_call_after(short)

    class Case:
        def measure(self, *tokens):
            return short.per_call_after(short)

    assert rounds.row_of(Case, "ours-eager", (1, 2), (2, 4), 1.0)[-1] == "failed: NoFurtherCallsError"
    assert "--max-new-tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-new-tokens", "2"], "--max-new-tokens: must be at least 3, got 2"),
        (["--batch-sizes", "1", "0"], "--batch-sizes: must be at least 1, got 0"),
        (["--prompt-lengths", "0"], "--prompt-lengths: must be at least 1, got 0"),
        (["--depth", "0"], "--depth: must be at least 1, got 0"),
        (["--attention-type", "gqa", "--mla-rope-dim", "8"], "`--mla-rope-dim` must be 0 for `gqa`, got 8"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_models_are_made(rounds, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rounds.py", *arguments])
    with pytest.raises(SystemExit):
        rounds.parse_arguments()
    assert message in capsys.readouterr().err


def test_the_first_call_of_a_row_is_timed_alone(rounds, monkeypatch):
    """Nothing is compiled or captured in those that follow."""
    clock, calls = [0.0], []
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: clock[0])

    class Case:
        measure = rounds.Case.measure

        def generate(self, max_new_tokens):
            clock[0] += 2.0 if calls else 50.0
            calls.append(max_new_tokens)
            return rounds.Measured(max_new_tokens, max_new_tokens, 0.5 * max_new_tokens)

    costs = Case().measure(2, 6)
    assert costs.first_seconds == 50.0
    assert costs.per_call == [500.0, 1.0]
    assert calls[:3] == [6, 2, 6]


def test_the_first_cell_comes_first_and_compilers_last(rounds):
    jobs = rounds.jobs_of(rounds.MEASURED_WAYS, [1, 4], [512, 8192], crosses=False)
    cells = [(1, 512), (4, 512), (1, 8192)]
    assert {cell for cell, _ in jobs} == set(cells)
    assert {cell for cell, _ in jobs[: len(rounds.MEASURED_WAYS) - 1]} == {(1, 512)}
    late = jobs[-6:]
    assert all(way in (*rounds.COMPILED, rounds.ASSISTED) for _, way in late)
    assert ((4, 512), "assisted") not in jobs
    assert ((4, 8192), "plain-eager") in rounds.jobs_of(["plain-eager"], [1, 4], [512, 8192], crosses=True)


def test_ways_are_documented(rounds):
    text = (ROOT / "docs" / "measuring.md").read_text()
    assert [way for way in rounds.WAYS if f"`{way}`" not in text] == []


def test_a_row_that_fails_leaves_the_others(rounds, capsys):
    def fail():
        raise RuntimeError("no")

    assert rounds.row_of(fail, "ours-eager", (1, 2), (2, 4), 1.0)[-1] == "failed: RuntimeError"
    assert "no" in capsys.readouterr().err


def test_a_tiny_table_has_all_rows(rounds, tmp_path, monkeypatch):
    output = tmp_path / "rounds.md"
    sizes = ["--batch-sizes", "1", "--prompt-lengths", "12", "--max-new-tokens", "8"]
    tree = ["--num-nodes", "4", "--top-k", "2", "--depth", "2", "--output", str(output)]
    monkeypatch.setattr(rounds, "MAX_PAIRS", 1)
    monkeypatch.setattr(sys, "argv", ["rounds.py", "--small", *sizes, *tree, "--ways", *EAGER_WAYS])
    rounds.main()
    table = read_table(output)
    assert [row[0] for row in table[1:]] == [rounds.WAYS[way] for way in EAGER_WAYS]
    assert {len(row) for row in table} == {len(rounds.COLUMNS)}
    assert all(float(row[3].strip("*")) > 0 for row in table[1:])
    assert table[0][-1] == "first call, s"
    assert all(float(row[-1]) >= 0 for row in table[1:])


def test_a_tree_of_some_depth_takes_as_many_steps(rounds):
    """The limit counts so many."""
    target = rounds.make_llama(rounds.SMALL_SHAPES["target"], torch.float32, "cpu")
    config = Eagle3MLAConfig.from_target(target.config, draft_vocab_size=48)
    draft = Eagle3MLADraftModel(config).eval()
    calls = []
    draft.register_forward_hook(lambda *_: calls.append(1))
    case = rounds.Case(target, draft, None, "ours-eager", torch.ones(1, 6).long(), rounds.TreeShape(6, 2, 3))
    short = case.generate(6).calls, len(calls)
    long = case.generate(9).calls, len(calls) - short[1]
    assert long[0] > short[0]
    assert long[1] - short[1] == 3 * (long[0] - short[0])
