"""Caches that are filled when a call begins, and how a call leaves them: as in plain generation."""

import copy

import pytest
import torch
from reference_generation import (
    TARGETS,
    assert_same_cache,
    make_draft,
    make_prompts,
    run,
    set_tree,
)
from transformers import DynamicCache, StaticCache

SHAPES = {"chain": (5, 1), "tree": (12, 3)}
LENGTHS = {"B1": [14], "B3": [14, 5, 3]}
EOS = 5
SETTINGS = {
    "greedy": {"do_sample": False, "max_new_tokens": 20},
    "sample": {"do_sample": True, "max_new_tokens": 12},
    "sample-eos": {"do_sample": True, "max_new_tokens": 20, "eos_token_id": EOS},
}
FAMILIES = ["llama", "qwen3", "mistral-window-8", "gemma3-window-8"]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("name", ["mistral-window-8", "gemma3-window-8"])
def test_returned_cache_goes_on_in_plain_generation_as_a_plain_one(name, lengths, shape):
    """A sliding-window layer that still records its past gives the same text, and grows with it."""
    target, prompt = TARGETS[name]().eval(), make_prompts(lengths)
    draft, caches = set_tree(make_draft(target), *shape), []
    for assistance in {}, {"assistant_model": draft}:
        outputs, _ = run(target, prompt, do_sample=False, **assistance)
        ids, cache = outputs.sequences, outputs.past_key_values
        mask = torch.cat([prompt["attention_mask"], torch.ones_like(ids[:, prompt["input_ids"].shape[1] :])], dim=1)
        target(ids[:, -1:], attention_mask=mask, past_key_values=cache)
        caches.append(cache)
    assert_same_cache(*caches[::-1])


def next_turn(prompt, sequences, eos_token_id=None, num_new: int = 6):
    """The text so far and a question of different lengths; what sequences got after their end is padding."""
    batch_size, num_before = prompt["input_ids"].shape
    answers = sequences[:, num_before:]
    is_end = (answers == eos_token_id).long() if eos_token_id else torch.zeros_like(answers)
    is_answer = (is_end.cumsum(dim=1) - is_end == 0).long()
    question = make_prompts([num_new - row for row in range(batch_size)])
    return {
        "input_ids": torch.cat([sequences, question["input_ids"]], dim=1),
        "attention_mask": torch.cat([prompt["attention_mask"], is_answer, question["attention_mask"]], dim=1),
    }


def read(target, prompt, num_tokens: int):
    """A cache of the first tokens, by one plain forward."""
    prefix = {name: tensor[:, :num_tokens] for name, tensor in prompt.items()}
    return run(target, prefix, max_new_tokens=1, do_sample=False)[0].past_key_values


def assert_same_turn(target, draft, prompt, cache, seed=0, **settings):
    """Texts, scores, cache and random generator of a call that continues `cache`; its own output."""
    plain_cache, number = copy.deepcopy(cache), cache.get_seq_length()
    plain, plain_state = run(target, prompt, seed, past_key_values=plain_cache, **settings)
    outputs, state = run(target, prompt, seed, past_key_values=cache, assistant_model=draft, **settings)
    assert outputs.sequences.tolist() == plain.sequences.tolist()
    assert torch.equal(state, plain_state)
    torch.testing.assert_close(torch.cat(outputs.scores), torch.cat(plain.scores), rtol=1e-4, atol=1e-4)
    assert outputs.past_key_values is cache
    assert_same_cache(cache, plain_cache)
    assert cache.get_seq_length() > number
    return outputs


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_later_turns_are_those_of_plain_generation(name, shape, settings):
    target, num_accepted = TARGETS[name]().eval(), 0
    draft = set_tree(make_draft(target), *shape)
    for lengths in LENGTHS.values():
        prompt, cache = make_prompts(lengths), DynamicCache(config=target.config)
        for turn in range(3):
            outputs = assert_same_turn(target, draft, prompt, cache, seed=turn, **settings)
            num_accepted += sum(draft.speculation_stats.accepted_by_depth) if turn else 0
            prompt = next_turn(prompt, outputs.sequences, settings.get("eos_token_id"))
    assert num_accepted > 0


@pytest.mark.parametrize("is_cut", [False, True], ids=["whole", "new"])
@pytest.mark.parametrize("num_cached", [3, 10, 13])
@pytest.mark.parametrize("name", ["llama", "mistral-window-8", "gpt2", "bloom", "gpt-neo-window-8"])
def test_cache_of_a_forward_is_continued_from_whole_texts_and_from_what_is_new(name, num_cached, is_cut):
    """A text that ends one token behind the cache, padding that is only cached, and slots that no id stands for."""
    target = TARGETS[name]().eval()
    draft, num_accepted = set_tree(make_draft(target), 12, 3), 0
    for lengths in LENGTHS.values():
        prompt = make_prompts(lengths)
        cache = read(target, prompt, num_cached)
        given = prompt | ({"input_ids": prompt["input_ids"][:, num_cached:]} if is_cut else {})
        for settings in {"do_sample": False}, {"do_sample": True, "repetition_penalty": 1.2}:
            outputs = assert_same_turn(target, draft, given, copy.deepcopy(cache), max_new_tokens=18, **settings)
            assert outputs.sequences.shape[1] == given["input_ids"].shape[1] + 18
            num_accepted += sum(draft.speculation_stats.accepted_by_depth)
    assert num_accepted > 0


def test_hidden_states_of_a_continuation_are_those_of_plain_generation():
    target, prompt = TARGETS["llama"]().eval(), make_prompts([9])
    draft, settings = make_draft(target), {"output_hidden_states": True, "do_sample": False}
    plain, _ = run(target, prompt, past_key_values=read(target, prompt, 6), **settings)
    outputs, _ = run(target, prompt, past_key_values=read(target, prompt, 6), assistant_model=draft, **settings)
    assert len(outputs.hidden_states) == len(plain.hidden_states)
    for states, expected in zip(outputs.hidden_states, plain.hidden_states, strict=True):
        torch.testing.assert_close(torch.stack(states), torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("num_cached", "lengths", "mask_length", "message"),
    [
        (8, [8], 8, r"`past_key_values` must hold fewer tokens than `input_ids` \(8\), got 8. Where `input_ids` are"),
        (8, [5], 5, r"`past_key_values` must hold fewer tokens than `input_ids` \(5\), got 8"),
        (4, [8, 6], 8, r"`past_key_values` must hold as many sequences as `input_ids` \(2\), got 1"),
        (4, [8], 10, r"`attention_mask` must be as long as `input_ids` \(8\) .* `past_key_values` \(12\) .* got 10"),
    ],
    ids=["all", "more", "batch", "mask"],
)
def test_cache_that_does_not_fit_is_refused_before_any_forward(num_cached, lengths, mask_length, message):
    target = TARGETS["llama"]().eval()
    cache, prompt = read(target, make_prompts([8]), num_cached), make_prompts(lengths)
    prompt["attention_mask"] = torch.ones(len(lengths), mask_length, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        target.generate(**prompt, past_key_values=cache, max_new_tokens=3, assistant_model=make_draft(target))
    assert cache.get_seq_length() == num_cached


def test_cache_of_another_class_is_refused_by_name():
    target = TARGETS["llama"]().eval()
    cache = StaticCache(config=target.config, max_cache_len=32)
    with pytest.raises(NotImplementedError, match="must be a DynamicCache for an EAGLE-3 draft, got StaticCache"):
        target.generate(
            **make_prompts([4]), past_key_values=cache, max_new_tokens=3, assistant_model=make_draft(target)
        )
