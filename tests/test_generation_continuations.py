"""Caches that are filled when a call begins, and how a call leaves them: as in plain generation."""

import pytest
import torch
from reference_generation import TARGETS, assert_same_cache, make_draft, make_prompts, run, set_tree

SHAPES = {"chain": (5, 1), "tree": (12, 3)}
LENGTHS = {"B1": [14], "B3": [14, 5, 3]}


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
