"""Targets that would be read otherwise than in plain generation: refused by name, or drafted for with chains."""

import pytest
import torch
from reference_generation import TARGETS, VOCAB_SIZE, assert_same_generation, make_draft, make_prompts, run
from transformers import MptConfig, MptForCausalLM

from eagle3_mla.generation.branching import can_branch


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
