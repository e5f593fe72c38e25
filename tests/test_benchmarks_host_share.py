"""The benchmark of the host's share: both loops do the same work, and what is counted is what happened."""

import pytest
import torch
from reference_benchmarks import benchmark
from reference_generation import TARGETS, make_draft, make_prompt


@pytest.fixture
def host_share():
    with benchmark("host_share") as module:
        yield module


@pytest.fixture
def case(host_share):
    torch.manual_seed(1)
    target = TARGETS["llama"]().eval()
    return host_share.Case(target, make_draft(target), make_prompt(6)["input_ids"], max_new_tokens=30)


@pytest.fixture
def shapes(host_share, monkeypatch):
    """Trees that a vocabulary of ten tokens has."""
    monkeypatch.setattr(host_share, "TREE", (6, 2, 3))


def test_both_loops_accept_the_same_tokens(host_share, case, shapes):
    seconds = case.fastest(num_repeats=1)
    ours, theirs = seconds[host_share.OURS], seconds[host_share.THEIRS]
    assert (ours.num_rounds, ours.num_tokens) == (theirs.num_rounds, theirs.num_tokens)
    assert ours.num_tokens == 29 > ours.num_rounds


def test_rounds_are_told_from_the_prompt(host_share, case):
    _, seconds = case.ours(host_share.CHAIN)
    stats = case.draft.speculation_stats
    assert (seconds.num_rounds, seconds.num_tokens) == (stats.rounds, stats.new_tokens - 1)
    assert 0 < seconds.draft + seconds.target < seconds.all
    assert seconds.rest == seconds.all - seconds.draft - seconds.target


def test_an_assistant_that_says_something_else_is_found_out(host_share, case, shapes, monkeypatch):
    """Otherwise a loop that accepts nothing would be timed, and its rounds look cheap."""
    monkeypatch.setattr(host_share.ScriptedAssistant, "generate", host_share.LlamaForCausalLM.generate)
    with pytest.raises(RuntimeError, match="as many rounds"):
        case.fastest(num_repeats=1)


def test_a_row_is_per_round(host_share):
    seconds = host_share.Seconds(draft=0.2, target=0.6, all=1.0, num_rounds=10, num_tokens=25)
    assert host_share.table_row("x", seconds) == [
        *("x", "10", "2.50", "10.0"),
        *("100.00", "20.00", "60.00", "20.00", "**20.0%**"),
    ]
