"""Targets that would be read otherwise than in plain generation: refused by name, or drafted for with chains."""

import pytest
import torch
from reference_generation import SHAPE, TARGETS, VOCAB_SIZE, assert_same_generation, make_draft, make_prompts, run
from transformers import LlamaConfig, LlamaForCausalLM, MptConfig, MptForCausalLM, Phi3Config, Phi3ForCausalLM

from eagle3_mla.generation.branching import can_branch

LIMIT = 40
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": LIMIT,
}


def dynamic_llama():
    shape = SHAPE | {"max_position_embeddings": LIMIT}
    return LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=DYNAMIC)).eval()


def phi3():
    shape = {name: value for name, value in SHAPE.items() if name != "head_dim"}
    config = Phi3Config(**shape, rope_parameters=LONGROPE, original_max_position_embeddings=LIMIT)
    return Phi3ForCausalLM(config).eval()


@pytest.mark.parametrize("make_target", [dynamic_llama, phi3])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("lengths", [[5], [5, 3, 1]], ids=["one", "batch"])
def test_texts_that_reach_the_length_where_rope_changes_are_refused(make_target, top_k, lengths):
    target = make_target()
    draft = make_draft(target)
    draft.generation_config.assistant_tree_top_k = top_k
    prompt = make_prompts(lengths)
    assert_same_generation(target, draft, prompt, max_new_tokens=LIMIT - 5 - 7)
    with pytest.raises(NotImplementedError, match="changes its RoPE factors at 40 tokens, so with 7 draft tokens the"):
        run(target, prompt, assistant_model=draft, max_new_tokens=LIMIT - 5 - 6)


def test_prompts_beyond_the_switch_of_longrope_are_drafted_for():
    target = phi3()
    assert_same_generation(target, make_draft(target), make_prompts([LIMIT + 1]), max_new_tokens=20)
    target = dynamic_llama()
    with pytest.raises(NotImplementedError, match="changes its RoPE factors"):
        run(target, make_prompts([LIMIT + 1]), assistant_model=make_draft(target), max_new_tokens=20)


@pytest.mark.parametrize("num_heads", [4, 32])
def test_target_that_reads_places_off_the_cache_gets_chains(num_heads):
    """MPT takes positions and ignores them: the difference is small, and the text would be wrong."""
    config = MptConfig(
        vocab_size=VOCAB_SIZE,
        d_model=64,
        n_layers=4,
        n_heads=num_heads,
        max_seq_len=256,
        use_cache=True,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=2,
    )
    target = MptForCausalLM(config).eval()
    target.generation_config.pad_token_id = 0
    assert not can_branch(target)
    draft = make_draft(target)
    draft.generation_config.assistant_tree_top_k = 3
    assert_same_generation(target, draft, make_prompts([5, 3]), max_new_tokens=12)


@pytest.mark.parametrize("lengths", [[5], [5, 4]], ids=["one", "batch"])
def test_scores_hold_no_more_memory_than_they_show(lengths):
    target = TARGETS["llama"]().eval()
    outputs, _ = run(target, make_prompts(lengths), assistant_model=make_draft(target))
    for records in outputs.scores, outputs.logits:
        held = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in records}
        assert sum(held.values()) <= 2 * sum(each.nbytes for each in records)
    assert torch.stack(outputs.logits).isfinite().all()
