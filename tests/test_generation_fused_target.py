"""What a target does differently while a graph is recorded."""

import importlib.util
import sys
import threading

import pytest
import torch
from reference_generation import SHAPE, TARGETS, make_draft, make_prompts, set_tree
from transformers import (
    AttentionInterface,
    CodeGenConfig,
    CodeGenForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from eagle3_mla.generation import fixed_rounds, fused_target
from eagle3_mla.generation.fused_target import TreeInSlots, tree_attention

VOCAB_SIZE = SHAPE["vocab_size"]
FALCON_SHAPE = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
GPTJ_SHAPE = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 8, "n_inner": 64}
ROUTING = {"num_experts": 4, "num_experts_per_tok": 2}
WITH_EXPERTS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(num_local_experts=4, **SHAPE)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**ROUTING, **SHAPE)),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(moe_intermediate_size=16, **ROUTING, **SHAPE)),
}
# Their attention is code of their own, which the interface of transformers cannot replace.
OWN_ATTENTION = {
    "falcon": lambda: FalconForCausalLM(
        FalconConfig(new_decoder_architecture=True, num_kv_heads=2, eos_token_id=None, **FALCON_SHAPE)
    ),
    "gpt-j": lambda: GPTJForCausalLM(GPTJConfig(eos_token_id=None, bos_token_id=None, **GPTJ_SHAPE)),
    "codegen": lambda: CodeGenForCausalLM(CodeGenConfig(eos_token_id=None, bos_token_id=None, **GPTJ_SHAPE)),
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_other_threads_run_the_target_as_it_is_while_a_graph_is_recorded(implementation):
    target, prompt = TARGETS["llama"]().eval(), make_prompts([5, 3])
    target.set_attn_implementation(implementation)
    expected, found = target(**prompt).logits, []
    view = TreeInSlots(*(torch.zeros(2, dtype=torch.long) for _ in range(4)))
    with tree_attention(target, view, is_compiled=False):
        assert target.config._attn_implementation == fused_target.TREE_ATTENTION
        thread = threading.Thread(target=lambda: found.append(target(**prompt).logits))
        thread.start()
        thread.join()
    assert target.config._attn_implementation == implementation
    assert torch.equal(found[0], expected)
    assert torch.equal(target(**prompt).logits, expected)


@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_target_whose_attention_cannot_be_replaced_is_not_captured_with_that_to_trees(name, monkeypatch):
    """Such a target would see all slots of the buffers, written or not, and its text would be another one."""
    target = OWN_ATTENTION[name]().eval().bfloat16()
    draft = set_tree(make_draft(target), 5, 2, 3).bfloat16()
    draft.generation_config.fixed_shapes = True
    verify = fixed_rounds.FixedRounds.verify

    def fused(rounds):
        assert rounds.can_fuse()
        rounds.fuses = True
        return verify(rounds)

    monkeypatch.setattr(fixed_rounds.FixedRounds, "verify", fused)
    with pytest.raises(RuntimeError, match="size of tensor"):
        target.generate(**make_prompts([5]), max_new_tokens=8, do_sample=False, assistant_model=draft)


@pytest.mark.parametrize("name", ["llama", *WITH_EXPERTS])
def test_target_whose_attention_is_replaced_does_not_look_at_the_mask(name, monkeypatch):
    """Targets with experts tell their attention that nobody asks for the router's logits."""
    target = {**TARGETS, **WITH_EXPERTS}[name]().eval()
    draft, prompt, found = set_tree(make_draft(target), 5, 2, 3), make_prompts([5]), []
    draft.generation_config.fixed_shapes = True
    verify = fixed_rounds.FixedRounds.verify

    def both(rounds):
        rounds.fuses = True
        found.append(verify(rounds))
        rounds.listener.take()
        rounds.fuses = False
        found.append(verify(rounds))
        return found[-1]

    monkeypatch.setattr(fixed_rounds.FixedRounds, "verify", both)
    target.generate(**prompt, max_new_tokens=8, do_sample=False, assistant_model=draft)
    assert len(found) > 2
    for fused, plain in zip(found[::2], found[1::2], strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)


def test_another_version_of_the_package_has_its_own_attention():
    """Code travels with weights: heads of two commits may be loaded in one process, and register one name each."""
    name = f"{fused_target.__package__}.fused_target_of_another_version"
    spec = importlib.util.spec_from_file_location(name, fused_target.__file__)
    other = importlib.util.module_from_spec(spec)
    sys.modules[name] = other
    try:
        spec.loader.exec_module(other)
    finally:
        del sys.modules[name]
    interface = AttentionInterface()
    assert interface[fused_target.TREE_ATTENTION] is fused_target.attend_to_tree
    assert interface[other.TREE_ATTENTION] is other.attend_to_tree
