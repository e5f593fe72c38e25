"""The benchmark of the draft's window: its prompts, what it counts, and a table that several processes measure."""

import sys
from types import SimpleNamespace

import pytest
import torch
from reference_benchmarks import NANO_TARGET, ROOT, ask_for, benchmark, read_table, write_prompts
from transformers import AutoTokenizer


@pytest.fixture
def draft_window():
    with benchmark("draft_window") as module:
        yield module


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(NANO_TARGET)


CHATS = [ask_for(name) for name in ("alpha", "beta", "gamma", "delta")]


def test_a_joined_prompt_ends_before_the_last_answer_that_fits(draft_window, tokenizer):
    whole = draft_window.join(CHATS[:3], tokenizer, max_tokens=10_000)
    assert whole.tolist() == draft_window.render([*CHATS[0], *CHATS[1], *CHATS[2][:-1]], tokenizer).tolist()
    num_tokens = whole.shape[1]
    assert draft_window.join(CHATS, tokenizer, num_tokens).tolist() == whole.tolist()
    shorter = draft_window.join(CHATS, tokenizer, num_tokens - 1)
    assert shorter.tolist() == draft_window.render([*CHATS[0], *CHATS[1][:-1]], tokenizer).tolist()


def test_joined_prompts_begin_apart_and_hold_no_conversation_twice(draft_window, tokenizer):
    prompts = draft_window.joined(CHATS, tokenizer, num_prompts=2, max_tokens=10_000)
    rotated = [CHATS, CHATS[2:] + CHATS[:2]]
    assert [ids.tolist() for ids in prompts] == [
        draft_window.join(chats, tokenizer, 10_000).tolist() for chats in rotated
    ]
    text = tokenizer.decode(prompts[1][0])
    places = [text.index(f"Write `{name}(x)`") for name in ("gamma", "delta", "alpha", "beta")]
    assert places == sorted(places)
    assert text.count("Write `") == 4


def test_a_conversation_that_does_not_fit_is_an_error_with_its_length(draft_window, tokenizer):
    num_tokens = draft_window.render(CHATS[0][:-1], tokenizer).shape[1]
    with pytest.raises(ValueError, match=f"at least {num_tokens}, the first conversation's, got {num_tokens - 1}"):
        draft_window.join(CHATS, tokenizer, num_tokens - 1)


def test_a_row_is_the_mean_over_the_sources_and_the_largest_cache(draft_window):
    first, second = draft_window.Tally(), draft_window.Tally()
    first.add(SimpleNamespace(rounds=2, acceptance_lengths=[1, 3], draft_cache_bytes=4096), is_equal=True)
    first.add(SimpleNamespace(rounds=2, acceptance_lengths=[4, 4], draft_cache_bytes=1024), is_equal=False)
    second.add(SimpleNamespace(rounds=1, acceptance_lengths=[1], draft_cache_bytes=2048), is_equal=True)
    assert draft_window.table_row("long", None, [first, second]) == [
        *("long", "off", "**2.00**", "3.00", "1.00", "4,096", "2 of 3")
    ]
    assert draft_window.table_row("long", 64, [second])[1] == "64"


def test_a_table_of_sources_measured_apart_is_put_together_without_measuring(draft_window, tmp_path, monkeypatch):
    chats = {source: [ask_for(f"{source}_{number}") for number in range(3)] for source in ("one", "two")}
    prompts, output = write_prompts(tmp_path / "prompts.jsonl", chats), tmp_path / "table.md"
    monkeypatch.setattr(draft_window, "WINDOWS", (None, 4))
    seen = []
    monkeypatch.setattr(draft_window, "generate", spy_on_window(draft_window.generate, seen))

    def command(*extra: str) -> None:
        models = ["--target", str(NANO_TARGET), "--draft", str(ROOT), "--device", "cpu"]
        paths = ["--prompts", str(prompts), "--output", str(output), "--work-dir", str(tmp_path / "work")]
        counts = ["--num-samples", "1", "--joined", "80", "--num-joined", "1", "--max-new-tokens", "6"]
        monkeypatch.setattr(sys, "argv", ["draft_window.py", *models, *paths, *counts, *extra])
        draft_window.main()

    command("--only", "one")
    command("--only", "two")
    assert seen == [None, 4] * 4
    assert not output.exists()
    monkeypatch.setattr(draft_window, "generate", None)
    command()
    header, *table = read_table(output)
    assert header[3:] == ["one", "two", "cache, bytes", "equal texts"]
    assert [row[1] for row in table] == ["off", "4"] * 2
    assert [row[0].split(",")[0] for row in table] == ["joined to 80"] * 2 + ["held-out"] * 2
    assert {row[-1] for row in table} == {"2 of 2"}


def spy_on_window(generate, seen: list):
    """`generate` that notes the window of every assisted call."""

    def spy(target, input_ids: torch.Tensor, do_sample: bool, max_new_tokens: int, draft=None) -> list[int]:
        if draft is not None:
            seen.append(draft.generation_config.draft_window)
        return generate(target, input_ids, do_sample, max_new_tokens, draft)

    return spy
