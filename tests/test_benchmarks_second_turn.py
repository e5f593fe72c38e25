"""The benchmark of a chat's second turn: its prompts, what the draft knows in each of its ways, and its table."""

import sys

import pytest
from reference_benchmarks import NANO_TARGET, ROOT, ask_for, benchmark, read_table, write_prompts
from transformers import AutoTokenizer


@pytest.fixture
def second_turn():
    with benchmark("second_turn") as module:
        yield module


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(NANO_TARGET)


ALPHA, BETA = ask_for("alpha"), ask_for("beta")


@pytest.mark.parametrize("is_ended", [True, False], ids=["ended", "cut"])
def test_the_second_prompt_is_the_rendered_chat(second_turn, tokenizer, is_ended):
    """An answer that ended holds the end of its turn, one that was cut does not."""
    first, last = second_turn.make_chats([ALPHA, BETA], tokenizer, num_chats=2, device="cpu")
    whole = second_turn.render([*ALPHA, BETA[0]], tokenizer)
    num_later = first.later[second_turn.OTHER].shape[1]
    answered = whole[:, : whole.shape[1] - num_later + is_ended]
    assert tokenizer.decode(answered[0]).endswith(ALPHA[1]["content"] + tokenizer.eos_token * is_ended)
    assert first.first.tolist() == second_turn.render(ALPHA[:1], tokenizer).tolist()
    assert first.second(second_turn.OTHER, answered).tolist() == whole.tolist()
    again = second_turn.render([*ALPHA, ALPHA[0]], tokenizer)
    assert first.second(second_turn.SAME, answered).tolist() == again.tolist()
    assert last.second(second_turn.OTHER, answered).tolist() == again.tolist()


def test_a_table_says_what_the_draft_knew_and_is_not_measured_twice(second_turn, tmp_path, monkeypatch):
    chats = {source: [ask_for(f"{source}_{number}") for number in (1, 2)] for source in ("one", "two")}
    prompts, output, known = write_prompts(tmp_path / "prompts.jsonl", chats), tmp_path / "table.md", []
    monkeypatch.setattr(second_turn, "generate", spy_on_rows(second_turn.generate, known))

    def command(*extra: str) -> None:
        models = ["--target", str(NANO_TARGET), "--draft", str(ROOT), "--device", "cpu"]
        paths = ["--prompts", str(prompts), "--output", str(output), "--work-dir", str(tmp_path / "work")]
        counts = ["--num-samples", "1", "--max-new-tokens", "9"]
        monkeypatch.setattr(sys, "argv", ["second_turn.py", *models, *paths, *counts, *extra])
        second_turn.main()

    command("--only", "one", "--again")
    assert not output.exists()
    command("--only", "two")
    assert_known_rows(known[:12])
    assert_known_rows(known[12:])
    monkeypatch.setattr(second_turn, "generate", None)
    command()
    header, *table = read_table(output)
    assert header[4:] == ["one", "two", "tokens", "equal texts"]
    assert [row[:2] for row in table] == [["chain of 7", "another"]] * 4 + [["tree of 16", "another"]] * 4
    assert [row[2] for row in table] == ["first", "second, anew", "second, remembered", "second, forgotten"] * 2
    assert {row[-1] for row in table} == {"2 of 2"}


def assert_known_rows(known: list[int]) -> None:
    """Of each case the first turn, and the three ways of the second."""
    assert len(known) in (8, 12)
    for start in range(0, len(known), 4):
        first, anew, remembered, forgotten = known[start : start + 4]
        assert first < anew == remembered
        assert 0 < forgotten < anew - first + 9


def spy_on_rows(generate, known: list[int]):
    """`generate` that notes how many rows the draft holds after every assisted call."""

    def spy(target, input_ids, max_new_tokens, cache, draft=None):
        text = generate(target, input_ids, max_new_tokens, cache, draft)
        if draft is not None:
            known.append(draft.speculation_stats.draft_cache_tokens)
        return text

    return spy
