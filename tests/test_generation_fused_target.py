"""What a target does differently while a graph is recorded."""

import threading

import pytest
import torch
from reference_generation import TARGETS, make_prompts

from eagle3_mla.generation.fused_target import TreeInSlots, tree_attention


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_other_threads_run_the_target_as_it_is_while_a_graph_is_recorded(implementation):
    target, prompt = TARGETS["llama"]().eval(), make_prompts([5, 3])
    target.set_attn_implementation(implementation)
    expected, found = target(**prompt).logits, []
    view = TreeInSlots(*(torch.zeros(2, dtype=torch.long) for _ in range(4)))
    with tree_attention(target, view, is_compiled=False):
        assert target.config._attn_implementation == "eagle3_mla_tree"
        thread = threading.Thread(target=lambda: found.append(target(**prompt).logits))
        thread.start()
        thread.join()
    assert target.config._attn_implementation == implementation
    assert torch.equal(found[0], expected)
    assert torch.equal(target(**prompt).logits, expected)
