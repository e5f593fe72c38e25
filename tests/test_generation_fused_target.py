"""What a target does differently while a graph is recorded."""

import importlib.util
import sys
import threading

import pytest
import torch
from reference_generation import SHAPE, TARGETS, assert_same_generation, make_draft, make_prompts, set_tree
from transformers import (
    AttentionInterface,
    CodeGenConfig,
    CodeGenForCausalLM,
    Cohere2Config,
    Cohere2ForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTJConfig,
    GPTJForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from eagle3_mla.generation import fixed_rounds, fused_target, shelf
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
WINDOW = {"sliding_window": 8, **SHAPE}
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, **WINDOW}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
# All with windows, and which ones their layers have.
WINDOWED = {
    "mistral": (TARGETS["mistral-window-8"], {8}),
    "gemma2": (TARGETS["gemma2-window-8"], {8, None}),  # softcap
    "gemma3": (lambda: Gemma3ForCausalLM(Gemma3TextConfig(**MIXED)), {8, None}),
    "qwen3": (lambda: Qwen3ForCausalLM(Qwen3Config(use_sliding_window=True, **MIXED)), {8, None}),
    "gpt-oss": (lambda: GptOssForCausalLM(GptOssConfig(num_local_experts=4, **MIXED)), {8, None}),  # sinks
    "phi3": (lambda: Phi3ForCausalLM(Phi3Config(**WINDOW)), {8}),
    "cohere2": (lambda: Cohere2ForCausalLM(Cohere2Config(**MIXED)), {8, None}),
    "olmo3": (lambda: Olmo3ForCausalLM(Olmo3Config(**MIXED)), {8, None}),
    # Their attention is not told its window.
    "phimoe": (lambda: PhimoeForCausalLM(PhimoeConfig(num_local_experts=4, **WINDOW)), {8}),
    "qwen2-moe": (
        lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(use_sliding_window=True, **EXPERTS, **MIXED)),
        {8, None},
    ),
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_other_threads_run_the_target_as_it_is_while_a_graph_is_recorded(implementation):
    target, prompt = TARGETS["llama"]().eval(), make_prompts([5, 3])
    target.set_attn_implementation(implementation)
    expected, found = target(**prompt).logits, []
    view = TreeInSlots(*(torch.zeros(2, dtype=torch.long) for _ in range(4)), windows={"the only one": None})
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
        assert fused_target.can_fuse(target)
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


@pytest.fixture
def windows(monkeypatch) -> list[int | None]:
    """Those with which the attention to trees is computed."""
    seen, compute = [], fused_target.tree_attention_op

    def watched(*arguments):
        seen.append(arguments[8])
        return compute(*arguments)

    monkeypatch.setattr(fused_target, "tree_attention_op", watched)
    return seen


@pytest.mark.parametrize("name", WINDOWED)
def test_targets_with_windows_attend_to_trees_and_give_the_plain_text(name, windows, monkeypatch):
    make, expected_windows = WINDOWED[name]
    target, verify = make().eval(), fixed_rounds.FixedRounds.verify

    def fused(rounds):
        rounds.fuses = True
        return verify(rounds)

    monkeypatch.setattr(fixed_rounds.FixedRounds, "verify", fused)
    draft = set_tree(make_draft(target), 12, 3, 4)
    draft.generation_config.fixed_shapes = True
    for seed, prompt in enumerate([make_prompts([5], 2), make_prompts([20, 13, 4])]):
        assert_same_generation(target, draft, prompt, seed, do_sample=bool(seed))
    assert set(windows) == expected_windows
    assert len(windows) >= 4 * draft.speculation_stats.target_calls > 4


@pytest.fixture
def captured(monkeypatch) -> list[bool]:
    """Whether each of the rounds that were captured is fused."""
    seen, capture = [], fixed_rounds.FixedRounds.capture

    def watched(rounds, fuses, compile_config):
        capture(rounds, fuses, compile_config)
        seen.append(fuses)

    monkeypatch.setattr(fixed_rounds.FixedRounds, "capture", watched)
    return seen


# In fp32 their experts ask the device.
NOT_CAPTURED_IN_FULL_PRECISION = {"gpt-oss", "phimoe", "qwen2-moe"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in WINDOWED if name not in NOT_CAPTURED_IN_FULL_PRECISION])
def test_captured_attention_to_trees_gives_the_plain_text(name, captured, monkeypatch):
    """Where half precision would part the texts, the kernels are taken in fp32, too."""
    monkeypatch.setattr(shelf, "can_fuse", lambda target: True)
    target = WINDOWED[name][0]().eval().cuda()
    draft = set_tree(make_draft(target), 12, 3, 4).cuda()
    for seed, prompt in enumerate([make_prompts([5], 2), make_prompts([20, 13, 4])]):
        prompt = {name: tensor.cuda() for name, tensor in prompt.items()}
        assert_same_tokens(target, draft, prompt, seed, do_sample=bool(seed))
    assert captured == [True, True]


def assert_same_tokens(target, draft, prompt: dict, seed: int, **settings) -> None:
    """Without scores, so that the device may choose."""
    texts = []
    for assistant in None, draft:
        torch.manual_seed(seed)
        outputs = target.generate(**prompt, max_new_tokens=20, assistant_model=assistant, **settings)
        texts.append(outputs.tolist())
    assert texts[0] == texts[1]


# Of so few experts rounding chooses others now and then.
HALF_PRECISION = [name for name in WINDOWED if name != "phimoe"]


@pytest.mark.parametrize("name", HALF_PRECISION)
def test_targets_with_windows_may_have_all_fused_operations_in_half_precision(name, windows, monkeypatch):
    target, verify = WINDOWED[name][0]().eval().bfloat16(), fixed_rounds.FixedRounds.verify
    draft = set_tree(make_draft(target), 12, 3, 4).bfloat16()
    draft.generation_config.fixed_shapes = True

    def fused(rounds):
        rounds.fuses = fused_target.can_fuse(target)
        with fused_target.fused_operations(target, draft):
            return verify(rounds)

    monkeypatch.setattr(fixed_rounds.FixedRounds, "verify", fused)
    assert rounding_error(target, draft, make_prompts([20])["input_ids"]) <= 0.04
    assert set(windows) == WINDOWED[name][1]


@pytest.mark.gpu
@pytest.mark.parametrize("name", HALF_PRECISION)
def test_targets_with_windows_are_captured_with_all_fused_operations_in_half_precision(name, captured):
    target = WINDOWED[name][0]().eval().cuda().bfloat16()
    draft = set_tree(make_draft(target), 12, 3, 4).cuda().bfloat16()
    assert rounding_error(target, draft, make_prompts([20])["input_ids"].cuda()) <= 0.04
    assert captured == [True]


@torch.no_grad()
def rounding_error(target, draft, input_ids: torch.Tensor) -> float:
    """Of the logits with which a text was generated, against one forward over all of it: a share of their size."""
    settings = {"max_new_tokens": 40, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    outputs = target.generate(input_ids, assistant_model=draft, **settings)
    expected = target(outputs.sequences[:, :-1]).logits[0, input_ids.shape[1] - 1 :]
    return float((torch.cat(outputs.logits) - expected).norm() / expected.norm())


@torch.no_grad()
def test_attention_with_another_window_or_mask_than_the_given_ones_is_refused():
    """A graph would be another function than the target: its own attention is captured instead."""
    target, number = TARGETS["gemma2-window-8"]().eval(), torch.zeros(1, dtype=torch.long)
    view = TreeInSlots(
        number, number, torch.ones(1, 1, 1, dtype=torch.bool), number[None], {"sliding_attention": 3, "other": None}
    )
    states, masks = torch.randn(1, 1, 1, 8), view.masks()
    with tree_attention(target, view, is_compiled=False):
        for mask, window in (
            (masks["sliding_attention"], 3),
            (masks["sliding_attention"], None),
            (masks["other"], None),
        ):
            output, _ = fused_target.attend_to_tree(target, *[states] * 3, mask, sliding_window=window)
            torch.testing.assert_close(output, states)
        for mask, window in (masks["sliding_attention"], 4), (masks["other"], 3):
            with pytest.raises(NotImplementedError, match=f"a window of {window} where the mask has"):
                fused_target.attend_to_tree(target, *[states] * 3, mask, sliding_window=window)
        for mask in None, torch.zeros(1, 1, 1, 7):
            with pytest.raises(NotImplementedError, match="a mask of width"):
                fused_target.attend_to_tree(target, *[states] * 3, mask)


def test_attention_in_chunks_stays_out_of_captured_rounds(windows, caplog):
    """A chunk begins where it begins, whatever the query: no window says that."""
    fields = {"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 64}
    target = Llama4ForCausalLM(Llama4TextConfig(**fields, **SHAPE)).eval()
    draft = set_tree(make_draft(target), 12, 3, 4)
    draft.generation_config.fixed_shapes = True
    assert_same_generation(target, draft, make_prompts([20]), do_sample=False)
    assert windows == []
    assert "its layers are of the types ['chunked_attention', 'full_attention']" in caplog.text


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
