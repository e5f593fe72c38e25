"""Calls that break off in the middle of a round: what the caller's cache holds then is the text, and nothing else."""

import pytest
import torch
from reference_generation import TARGETS, make_draft, make_prompts, set_tree
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria

from eagle3_mla.generation.continuations import _remembered

MAX_TOKENS = 17


class FailingProcessor(LogitsProcessor):
    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == MAX_TOKENS:
            raise KeyboardInterrupt
        return scores


class FailingCriterion(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] == MAX_TOKENS:
            raise KeyboardInterrupt
        return torch.zeros(len(input_ids), dtype=torch.bool)


class FailingStreamer:
    def __init__(self):
        self.num_tokens = 0

    def put(self, value):
        self.num_tokens += value.shape[1] if value.dim() == 2 else 1
        if self.num_tokens == MAX_TOKENS:
            raise KeyboardInterrupt

    def end(self):
        """Nothing is to be done."""


CULPRITS = {
    "processor": lambda: {"logits_processor": [FailingProcessor()]},
    "criterion": lambda: {"stopping_criteria": [FailingCriterion()]},
    "streamer": lambda: {"streamer": FailingStreamer()},
}


def break_off(target, prompt, **settings) -> DynamicCache:
    """What is in the caller's cache after a greedy call that was interrupted."""
    cache = DynamicCache(config=target.config)
    with pytest.raises(KeyboardInterrupt):
        target.generate(**prompt, past_key_values=cache, max_new_tokens=40, do_sample=False, **settings)
    return cache


def assert_holds_text(target, draft, cache: DynamicCache, prompt: dict, at_least: int, at_most: int) -> None:
    """Another text of `prompt`'s beginning goes on from `cache`, without and with the draft, as without a cache."""
    assert at_least <= cache.get_seq_length() <= at_most
    assert len({layer.get_seq_length() for layer in cache.layers}) == 1
    assert cache not in _remembered[draft]
    torch.manual_seed(0)
    text = target.generate(**prompt, max_new_tokens=MAX_TOKENS, do_sample=False)[:, : at_most + 1]
    text = torch.cat([text, torch.randint(2, 11, (len(text), 20))], dim=1)
    num_new = text.shape[1] - prompt["input_ids"].shape[1]
    mask = torch.cat([prompt["attention_mask"], prompt["attention_mask"].new_ones(len(text), num_new)], dim=1)
    inputs = {"input_ids": text, "attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    expected = target.generate(**inputs).tolist()
    assert target.generate(**inputs, past_key_values=cache, assistant_model=draft).tolist() == expected


@pytest.mark.parametrize("fixed_shapes", [False, True], ids=["changing", "fixed"])
@pytest.mark.parametrize("culprit", CULPRITS)
@pytest.mark.parametrize("name", ["llama", "gemma3-window-8"])
def test_cache_of_a_broken_call_holds_the_text_up_to_the_last_whole_round(name, culprit, fixed_shapes):
    for lengths in [9], [9, 5]:
        target, prompt = TARGETS[name]().eval(), make_prompts(lengths)
        draft = set_tree(make_draft(target), 12, 3, 4)
        draft.generation_config.fixed_shapes = fixed_shapes
        cache = break_off(target, prompt, assistant_model=draft, **CULPRITS[culprit]())
        plain = break_off(target, prompt, **CULPRITS[culprit]()).get_seq_length()
        assert_holds_text(target, draft, cache, prompt, at_least=plain - 4, at_most=plain)


@pytest.mark.parametrize("fixed_shapes", [False, True], ids=["changing", "fixed"])
def test_forward_that_breaks_off_leaves_all_layers_with_the_same_text(fixed_shapes, monkeypatch):
    target, prompt = TARGETS["gemma3-window-8"]().eval(), make_prompts([9, 5])
    draft = set_tree(make_draft(target), 12, 3, 4)
    draft.generation_config.fixed_shapes = fixed_shapes
    mlp, calls = target.model.layers[2].mlp, []
    forward = mlp.forward

    def interrupted(states):
        calls.append(states.shape)
        if len(calls) == 5 and len(states) == 2:
            raise KeyboardInterrupt
        return forward(states)

    target.generate(**prompt, assistant_model=draft, max_new_tokens=2)  # what is tried once, is tried
    monkeypatch.setattr(mlp, "forward", interrupted)
    cache = break_off(target, prompt, assistant_model=draft)
    # A round may begin before what the one before has chosen is taken over.
    assert_holds_text(target, draft, cache, prompt, at_least=9 + 2, at_most=9 + 3 * 5)


@pytest.mark.parametrize("setting", [{}, {"repetition_penalty": 1.2}], ids=["device", "host"])
def test_cache_is_given_back_from_buffers_that_have_grown(setting, monkeypatch):
    monkeypatch.setattr("eagle3_mla.generation.shelf.LEAST_CAPACITY", 16)
    target, prompt = TARGETS["llama"]().eval(), make_prompts([3])
    draft = set_tree(make_draft(target), 5, 1)
    draft.generation_config.fixed_shapes = True
    cache = break_off(target, prompt, assistant_model=draft, streamer=FailingStreamer(), **setting)
    plain = break_off(target, prompt, streamer=FailingStreamer(), **setting).get_seq_length()
    assert plain - 5 <= cache.get_seq_length() <= plain
    text = target.generate(**prompt, max_new_tokens=30, do_sample=False, return_dict_in_generate=True, **setting)
    for layer, expected in zip(cache.layers, text.past_key_values.layers, strict=True):
        torch.testing.assert_close(layer.keys, expected.keys[:, :, : layer.keys.shape[2]], rtol=1e-4, atol=1e-4)
