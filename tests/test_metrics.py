"""The metric modules, loaded by the `evaluate` library as a user would."""

import ast
import doctest
from pathlib import Path

import evaluate
import pytest
from reference_generation import TARGETS, make_draft, make_prompt

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("acceptance_length", "acceptance_rate")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """`evaluate` writes inputs and copies of modules into its cache."""
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "metrics"))
    monkeypatch.chdir(ROOT)


def load(name: str):
    return evaluate.load(f"metrics/{name}.py")


@pytest.fixture
def acceptance_length():
    return load("acceptance_length")


@pytest.fixture
def acceptance_rate():
    return load("acceptance_rate")


@pytest.fixture(scope="module")
def calls():
    """Statistics of three assisted calls."""
    target = TARGETS["llama"]().eval()
    draft, found = make_draft(target), []
    for num_tokens in (4, 6, 8):
        target.generate(**make_prompt(num_tokens), max_new_tokens=30, do_sample=True, assistant_model=draft)
        found.append(draft.speculation_stats)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_module_describes_itself(name):
    metric = load(name)
    assert metric.description.startswith("Acceptance")
    assert metric.citation.startswith("@")
    assert "predictions (`list[list[int]]`)" in metric.inputs_description
    assert metric.features.keys() >= {"predictions"}


@pytest.mark.parametrize("name", NAMES)
def test_examples_give_what_they_say(name):
    text = load(name).inputs_description
    example = doctest.DocTestParser().get_doctest(text, {"evaluate": evaluate}, name, None, 0)
    result = doctest.DocTestRunner().run(example)
    assert result.attempted >= 2
    assert result.failed == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_module_stands_alone(name):
    """The library copies it away; it must also be loadable from one downloaded file."""
    tree = ast.parse((ROOT / "metrics" / f"{name}.py").read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported == {"datasets", "evaluate"}
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(tree))


def test_length_is_that_of_the_statistics(acceptance_length, calls):
    for stats in calls:
        result = acceptance_length.compute(predictions=[stats.acceptance_lengths])
        assert result["acceptance_length"] == stats.acceptance_length
        assert (result["rounds"], result["tokens"]) == (stats.rounds, stats.new_tokens - 1)


def test_length_pools_rounds_or_texts(acceptance_length):
    texts = [[4, 4], [1], []]
    assert acceptance_length.compute(predictions=texts)["acceptance_length"] == 3.0
    assert acceptance_length.compute(predictions=texts, average="texts")["acceptance_length"] == 2.5
    assert acceptance_length.compute(predictions=texts, count_bonus_token=False)["acceptance_length"] == 2.0


def test_inputs_may_arrive_one_by_one_and_in_batches(acceptance_length, calls):
    lengths = [stats.acceptance_lengths for stats in calls]
    expected = acceptance_length.compute(predictions=lengths)
    acceptance_length.add(prediction=lengths[0])
    acceptance_length.add_batch(predictions=lengths[1:])
    assert acceptance_length.compute() == expected


def test_rate_is_that_of_the_statistics(acceptance_rate, calls):
    for stats in calls:
        result = acceptance_rate.compute(predictions=[stats.accepted_by_depth], references=[stats.drafted_by_depth])
        assert result["acceptance_rate_by_depth"] == stats.acceptance_by_depth
        assert result["accepted"] == sum(stats.accepted_by_depth) > 0
    accepted, tried = ([getattr(each, name) for each in calls] for name in ("accepted_by_depth", "drafted_by_depth"))
    nodes = sum(stats.drafted_nodes for stats in calls)
    result = acceptance_rate.compute(predictions=accepted, references=tried, drafted_nodes=nodes)
    assert result["acceptance_rate"] == sum(map(sum, accepted)) / sum(map(sum, tried))
    assert result["accepted_per_drafted_node"] == sum(map(sum, accepted)) / nodes < result["acceptance_rate"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"predictions": []}, "at least 1 round, got 0 texts"),
        ({"predictions": [[], []]}, "at least 1 round, got 2 texts"),
        ({"predictions": [[3, 0]]}, "at least 1 each, got 0"),
        ({"predictions": [[3]], "average": "tokens"}, '`average` must be "rounds" or "texts", got \'tokens\''),
    ],
    ids=["nothing", "no-round", "empty-round", "average"],
)
def test_wrong_lengths_are_named(acceptance_length, inputs, message):
    with pytest.raises(ValueError, match=message):
        acceptance_length.compute(**inputs)


@pytest.mark.parametrize(
    ("accepted", "tried", "extra", "message"),
    [
        ([[1]], [[1, 1]], {}, "as many depths as `references`, got 1 and 2 for text 0"),
        ([[1], [2]], [[1], [1]], {}, r"got \[2\] and \[1\] for text 1"),
        ([[0]], [[0]], {}, "at least 1 tried draft token, got none"),
        ([[1]], [[2]], {"drafted_nodes": 1}, r"at least the tried ones \(2\), got 1"),
    ],
    ids=["depths", "more-accepted", "none", "nodes"],
)
def test_wrong_rates_are_named(acceptance_rate, accepted, tried, extra, message):
    with pytest.raises(ValueError, match=message):
        acceptance_rate.compute(predictions=accepted, references=tried, **extra)
