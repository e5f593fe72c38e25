"""Targets that cannot read trees are found out, whatever they take, and get chains and batches in step."""

import pytest
import torch
from reference_generation import TARGETS, VOCAB_SIZE, assert_same_generation, make_draft, make_prompts, set_tree
from transformers import GitConfig, GitForCausalLM, MptConfig, MptForCausalLM

from eagle3_mla.generation import probing
from eagle3_mla.generation.probing import can_branch

TOKENS = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": 2}


def mpt(num_heads: int, initializer_range: float = 0.3):
    """Takes positions and ignores them: distances are those of places in the cache."""
    shape = {"d_model": 64, "n_layers": 4, "n_heads": num_heads, "max_seq_len": 256}
    config = MptConfig(**TOKENS, **shape, use_cache=True, initializer_range=initializer_range)
    return MptForCausalLM(config)


def git():
    """Puts the mask of an image before that of a text, also where there is no image."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "initializer_range": 0.2}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    return GitForCausalLM(GitConfig(**TOKENS, **shape, num_hidden_layers=4, vision_config=vision))


OTHERS = {"mpt-4": lambda: mpt(4), "mpt-32": lambda: mpt(32), "mpt-small": lambda: mpt(4, 0.02), "git": git}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_target_that_reads_other_than_mask_and_positions_say_is_found_out(name, dtype):
    assert not can_branch(OTHERS[name]().eval().to(dtype))


@pytest.mark.parametrize("lengths", [[9], [9, 4]], ids=["one", "batch"])
@pytest.mark.parametrize("name", ["mpt-4", "git"])
def test_target_that_was_found_out_gets_chains(name, lengths):
    target = OTHERS[name]().eval()
    target.generation_config.pad_token_id = 0
    draft = set_tree(make_draft(target), 12, 3, depth=4)
    assert_same_generation(target, draft, make_prompts(lengths), max_new_tokens=12)
    assert draft.speculation_stats.drafted_nodes <= 4 * draft.speculation_stats.rounds * len(lengths)


@pytest.mark.parametrize("ignored", ["attention_mask", "position_ids"])
def test_target_that_ignores_an_input_is_found_out(ignored, monkeypatch):
    """Nothing is raised where a mask or positions are not obeyed: texts would differ."""
    target = TARGETS["llama"]().eval()
    forward = target.model.forward
    monkeypatch.setattr(target.model, "forward", lambda **inputs: forward(**inputs | {ignored: None}))
    assert not can_branch(target)


def test_window_that_is_read_off_places_in_the_cache_is_found_out(monkeypatch):
    monkeypatch.setattr(probing, "LAYER_TYPES", {"global", "local"})
    assert not can_branch(TARGETS["gpt-neo-window-8"]().eval())


@pytest.mark.parametrize("name", ["llama", "mistral-window-8", "gemma3-window-8", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_target_that_obeys_is_believed_once_and_leaves_the_random_generator_alone(name, dtype, monkeypatch):
    target = TARGETS[name]().eval().to(dtype)
    state = torch.get_rng_state()
    assert can_branch(target)
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(target, "forward", None)
    assert can_branch(target)
