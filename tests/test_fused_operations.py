"""The small operations of a captured round: kernels against their definitions, and who gets them."""

import threading
from collections import Counter
from functools import partial

import pytest
import torch
from reference_generation import SHAPE, TARGETS, make_draft, make_prompt, make_prompts, set_tree
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from eagle3_mla.generation import fused_draft_layer, fused_mlp, fused_residual, fused_rope, slot_writing
from eagle3_mla.generation.fused_embedding import indexed_embeddings
from eagle3_mla.generation.fused_mlp import ACTIVATIONS, activation_of, fused_mlps, gate_by_definition
from eagle3_mla.generation.fused_norm import FORMS, fused_norms, normalise_by_definition, usual_norm
from eagle3_mla.generation.fused_residual import add_and_normalise_by_definition, fused_residuals
from eagle3_mla.generation.fused_rope import columns_per_angle, fused_draft_rope, rotate_by_definition
from eagle3_mla.generation.fused_target import fused_operations
from eagle3_mla.generation.slot_writing import write_by_definition

in_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
# Batch, heads, key-value heads, positions, width.
HEADS = [(2, 5, 3, 4, 24), (1, 4, 4, 1, 16), (3, 6, 2, 2, 20)]
BIG_HEADS = [(1, 32, 8, 61, 128), (4, 28, 4, 61, 128), (1, 9, 3, 17, 80)]
# Batch, key-value heads, positions, widths of keys and values.
WRITES = [(2, 3, 4, 8, 5), (1, 1, 3, 16, 0), (1, 5, 1, 12, 20)]
BIG_WRITES = [(1, 8, 61, 128, 128), (4, 8, 61, 128, 128), (1, 1, 10, 256, 0), (2, 1, 10, 256, 64)]


def random_heads(shape, dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """Views as projections leave them, with angles for each row, or the same for all."""
    batch_size, num_heads, num_groups, num_positions, width = shape
    query, key = (
        torch.randn(batch_size, num_positions, count, width, device=device).to(dtype).transpose(1, 2)
        for count in (num_heads, num_groups)
    )
    num_rows = 1 if num_positions == 1 else batch_size
    cos, sin = (torch.randn(num_rows, num_positions, width, device=device).to(dtype) for _ in range(2))
    return query, key, cos, sin


def compare_rotation(shape, dtype: torch.dtype, device: str) -> None:
    from eagle3_mla.generation.fused_kernels_triton import rotate

    heads = random_heads(shape, dtype, device)
    for found, expected in zip(rotate(*heads), rotate_by_definition(*heads), strict=True):
        assert torch.equal(found, expected)
    halves = *heads[:2], *(angles[..., : angles.shape[-1] // 2] for angles in heads[2:])
    for found, expected in zip(rotate(*halves), rotate_by_definition(*halves), strict=True):
        assert torch.equal(found, expected)
    alone = rotate(heads[0], heads[0][:, :0], *heads[2:])
    assert torch.equal(alone[0], rotate_by_definition(*heads)[0])
    assert alone[1].numel() == 0


def compare_gates(activation: str, dtype: torch.dtype, device: str, size: int) -> None:
    """The functions of a compiler may round otherwise in float32: then a result is the next number, and seldom."""
    from eagle3_mla.generation.fused_kernels_triton import gate

    gates, values = (scale * torch.randn(2, 3, size, device=device).to(dtype) for scale in (4, 1))
    gates[0, 0, :2] = torch.tensor([60.0, -60.0])
    found, expected = gate(gates, values, activation), gate_by_definition(gates, values, activation)
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.float(), expected.float(), rtol=2 * eps, atol=eps * 1e-2)
    # Where GELU is nearly zero, half of its digits are lost in a difference.
    assert activation != "silu" or (found != expected).float().mean() <= 2e-3


def compare_writing(shape, dtype: torch.dtype, device: str) -> None:
    from eagle3_mla.generation.fused_kernels_triton import write

    batch_size, num_groups, num_positions, *widths = shape
    found = [torch.randn(batch_size, num_groups, 100, width, device=device).to(dtype) for width in widths]
    expected = [each.clone() for each in found]
    states = [torch.randn(batch_size, num_positions, num_groups, width, device=device).to(dtype) for width in widths]
    states = [each.transpose(1, 2) for each in states]
    slots = 3 * torch.arange(batch_size, device=device)[:, None] + torch.arange(num_positions, device=device)
    write(*found, slots, *states)
    write_by_definition(*expected, slots, *states)
    assert all(map(torch.equal, found, expected))


@in_interpreter
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_rotation_has_the_bits_of_its_definition_in_the_interpreter(shape):
    """In float16: to bfloat16 the interpreter does not round to the nearest."""
    pytest.importorskip("triton")
    compare_rotation(shape, torch.float16, "cpu")


@in_interpreter
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_equals_its_definition_in_the_interpreter(activation):
    pytest.importorskip("triton")
    compare_gates(activation, torch.float16, "cpu", size=300)


@in_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", WRITES, ids=str)
def test_writing_leaves_what_its_definition_leaves_in_the_interpreter(shape, dtype):
    pytest.importorskip("triton")
    compare_writing(shape, dtype, "cpu")


@in_interpreter
def test_slots_that_do_not_exist_are_not_written():
    """Memory beyond a buffer is somebody else's."""
    pytest.importorskip("triton")
    from eagle3_mla.generation.fused_kernels_triton import write

    memory = torch.zeros(2, 1, 1, 30, 4)
    keys, values = memory[:, :, :, 10:20]
    states = torch.ones(1, 1, 3, 4)
    write(keys, values, torch.tensor([[-1, 9, 10]]), states, states)
    assert memory.sum() == 2 * 4
    assert memory[:, 0, 0, 19].eq(1).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*HEADS, *BIG_HEADS], ids=str)
def test_rotation_has_the_bits_of_its_definition_on_a_gpu(shape, dtype):
    compare_rotation(shape, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_equals_its_definition_on_a_gpu(activation, dtype):
    compare_gates(activation, dtype, "cuda", size=14336)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*WRITES, *BIG_WRITES], ids=str)
def test_writing_leaves_what_its_definition_leaves_on_a_gpu(shape):
    compare_writing(shape, torch.bfloat16, "cuda")


MORE_TARGETS = {
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SHAPE)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SHAPE)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(residual_multiplier=0.5, **SHAPE)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(partial_rotary_factor=0.5, **SHAPE)),
    "gpt-oss": lambda: GptOssForCausalLM(GptOssConfig(num_local_experts=4, **SHAPE)),
}


def half_target(name: str):
    return (TARGETS | MORE_TARGETS)[name]().eval().bfloat16()


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Which of the definitions were run: `rope` or `gate`."""
    seen = []
    for module, name, label in [
        (fused_rope, "rotate_by_definition", "rope"),
        (fused_mlp, "gate_by_definition", "gate"),
    ]:
        original = getattr(module, name)

        def watched(*arguments, original=original, label=label):
            seen.append(label)
            return original(*arguments)

        monkeypatch.setattr(module, name, watched)
    return seen


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "num_ropes", "num_gates"),
    [
        ("llama", 4, 4),
        ("qwen3", 4, 4),
        ("mistral-window-8", 4, 4),
        ("gemma", 4, 4),
        ("gemma3-window-8", 4, 4),
        ("cohere", 0, 4),  # neighbours are rotated against each other
        ("phi3", 0, 0),  # half of each head is rotated; gate and up are one projection
        ("gpt-oss", 4, 0),  # with one angle for both halves of a head; experts are no gated MLP
        ("gpt2", 0, 0),
    ],
)
def test_usual_operations_are_taken_over_and_others_left_alone(name, num_ropes, num_gates, calls):
    target, prompt = half_target(name), make_prompts([9, 5])
    expected = target(**prompt).logits
    with fused_rope.fused_rope(target), fused_mlps(target):
        calls.clear()
        assert torch.equal(target(**prompt).logits, expected)
    assert (calls.count("rope"), calls.count("gate")) == (num_ropes, num_gates)
    calls.clear()
    assert torch.equal(target(**prompt).logits, expected)
    assert calls == []


@torch.no_grad()
def test_full_precision_runs_the_models_own_code(calls):
    target = TARGETS["llama"]().eval()
    draft = make_draft(target)
    with fused_operations(target, draft):
        calls.clear()
        set_tree(draft, 6, 2, 3).generation_config.fixed_shapes = True
        target.generate(**make_prompt(6), do_sample=False, max_new_tokens=8, assistant_model=draft)
    assert calls == []


@pytest.mark.parametrize("kind", [{}, {"mla_rope_dim": 4}, {"attention_type": "gqa"}], ids=str)
def test_text_and_drafts_stay_the_same_bit_for_bit(kind, calls):
    """With the definitions; norms aside, which round less often than the target's own."""
    target = half_target("llama")
    draft = set_tree(make_draft(target, **kind).bfloat16(), 8, 3, 3)
    draft.generation_config.fixed_shapes = True
    settings = {**make_prompts([9, 5]), "do_sample": False, "max_new_tokens": 12, "assistant_model": draft}
    expected = target.generate(**settings), draft.speculation_stats.acceptance_lengths
    with fused_rope.fused_rope(target), fused_draft_rope(draft), fused_mlps(target, draft):
        calls.clear()
        found = target.generate(**settings), draft.speculation_stats.acceptance_lengths
    assert found[0].tolist() == expected[0].tolist()
    assert found[1] == expected[1]
    assert {"rope", "gate"} == set(calls)
    assert vars(draft.layers[0].self_attn).keys() & {"ask", "remember"} == set()
    assert "forward" not in vars(draft.layers[0].mlp)


@torch.no_grad()
def test_other_threads_get_the_original_rotation(calls):
    target, prompt, counts = half_target("llama"), make_prompt(5), []

    def run():
        calls.clear()
        target(**prompt)
        counts.append(calls.count("rope"))

    with fused_rope.fused_rope(target):
        run()
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert counts == [4, 0]


def test_original_rotation_is_back_after_an_error():
    original, seen = modeling_llama.apply_rotary_pos_emb, []

    def fail():
        with fused_rope.fused_rope(half_target("llama")):
            seen.append(modeling_llama.apply_rotary_pos_emb)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen != [original]
    assert modeling_llama.apply_rotary_pos_emb is original


def usual(q, k, cos, sin, unsqueeze_dim=1):
    return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)


def other_names(query, key, cos, sin):
    return usual(query, key, cos, sin)


def needs_more(q, k, cos, sin, position_ids):
    return usual(q, k, cos, sin)


def other_way_round(q, k, cos, sin):
    return usual(q, k, cos, -sin)


def queries_alone(q, k, cos, sin):
    return usual(q, k, cos, sin)[0], k


@pytest.mark.parametrize(
    ("function", "num_columns"),
    [
        (usual, 1),
        (modeling_gpt_oss.apply_rotary_pos_emb, 2),
        (other_names, None),
        (needs_more, None),
        (other_way_round, None),
        (queries_alone, None),
    ],
)
def test_rotation_is_tried_before_it_is_replaced(function, num_columns):
    assert columns_per_angle(function, torch.device("cpu"), torch.bfloat16) == num_columns
    assert columns_per_angle(function, torch.device("cpu"), torch.float32) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"q": torch.zeros(1, 2, 3, 4, dtype=torch.float16)},
        {"k": torch.zeros(1, 2, 5, 4, dtype=torch.bfloat16)},
        {"cos": torch.zeros(1, 3, 4)},
        {"cos": torch.zeros(1, 3, 2, dtype=torch.bfloat16)},
        {"cos": torch.zeros(1, 1, 3, 4, dtype=torch.bfloat16)},
        {"unsqueeze_dim": 1},
    ],
)
def test_calls_of_another_kind_get_the_original(changes):
    taken = []
    apply = fused_rope.rope_of_this_thread(lambda *arguments, **settings: taken.append("original"), num_columns=1)
    heads = torch.zeros(1, 2, 3, 4, dtype=torch.bfloat16)
    inputs = {"q": heads, "k": heads, "cos": heads[:, 0], "sin": heads[:, 0]}
    apply(**inputs)
    assert taken == []
    apply(**inputs | changes)
    assert taken == ["original"]


def compare_norms(shape, form: tuple[bool, bool], dtype: torch.dtype, device: str) -> None:
    """Sums bit for bit; norms but for the order of a sum, which seldom reaches a rounding."""
    from eagle3_mla.generation.fused_kernels_triton import add_and_normalise, normalise

    residual, states = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(shape[-1], device=device).to(dtype)
    sums, normed = add_and_normalise(residual, states, weight, 1e-5, *form)
    assert torch.equal(sums, residual + states)
    alone = normalise(sums, weight, 1e-5, *form)
    assert torch.equal(alone, normed)
    expected = normalise_by_definition(sums, weight, 1e-5, *form)
    torch.testing.assert_close(normed.float(), expected.float(), rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert (normed != expected).float().mean() <= 2e-3


@in_interpreter
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 64), (1, 1, 100), (1, 5, 2300), (3, 7, 16)], ids=str)
def test_sums_and_norms_equal_their_definition_in_the_interpreter(shape, form):
    pytest.importorskip("triton")
    compare_norms(shape, form, torch.float16, "cpu")


def compare_both(shape, form: tuple[bool, bool], dtype: torch.dtype, device: str) -> None:
    from eagle3_mla.generation.fused_kernels_triton import normalise, normalise_both

    first, second = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weights = [torch.randn(shape[-1], device=device).to(dtype) for _ in range(2)]
    halves = normalise_both(first, second, *weights, 1e-5, *form).split(shape[-1], dim=-1)
    for half, states, weight in zip(halves, (first, second), weights, strict=True):
        assert torch.equal(half, normalise(states, weight, 1e-5, *form))


@in_interpreter
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 64), (1, 1, 100)], ids=str)
def test_norms_side_by_side_equal_each_alone_in_the_interpreter(shape, form):
    pytest.importorskip("triton")
    compare_both(shape, form, torch.float16, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", [(1, 10, 4096), (4, 10, 2880)], ids=str)
def test_norms_side_by_side_equal_each_alone_on_a_gpu(shape, form):
    compare_both(shape, form, torch.bfloat16, "cuda")


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("kind", [{}, {"mla_rope_dim": 4, "embed_residual": True}, {"attention_type": "gqa"}], ids=str)
@torch.no_grad()
def test_layers_of_a_draft_are_taken_over_and_compute_the_same(kind, num_layers, monkeypatch):
    draft = make_draft(half_target("llama"), num_hidden_layers=num_layers, **kind).bfloat16()
    rows, num_calls = torch.randn(2, 5, draft.config.hidden_size, dtype=torch.bfloat16), Counter()
    for name in "add_and_normalise", "normalise_both":
        module = fused_residual if name == "add_and_normalise" else fused_draft_layer
        function = getattr(module, name)

        def counted(*given, name=name, function=function):
            num_calls[name] += 1
            return function(*given)

        monkeypatch.setattr(module, name, counted)
    with fused_norms(draft):
        expected = draft(rows, fused_states=rows)
    with fused_draft_layer.fused_draft_layers(draft), fused_norms(draft):
        found = draft(rows, fused_states=rows)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.states, expected.states)
    assert num_calls == {"normalise_both": 1, "add_and_normalise": num_layers + 1}
    assert not {"attention_input", "finish"} & vars(draft.layers[0]).keys()
    assert "forward" not in vars(draft.norm)
    draft.layers[0].finish = own = draft.layers[0].finish
    with fused_draft_layer.fused_draft_layers(draft):
        assert draft.layers[0].finish is own
    assert draft.layers[0].finish is own
    with fused_draft_layer.fused_draft_layers(draft.float()):
        assert "attention_input" not in vars(draft.layers[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", [(1, 61, 4096), (4, 61, 2048), (2, 7, 2880), (1, 61, 32, 128)], ids=str)
def test_sums_and_norms_equal_their_definition_on_a_gpu(shape, form, dtype):
    compare_norms(shape, form, dtype, "cuda")


@torch.no_grad()
@pytest.mark.parametrize(("kind", "form"), list(zip([LlamaRMSNorm, nn.RMSNorm, GemmaRMSNorm], FORMS, strict=True)))
def test_form_of_a_norm_is_found_out(kind, form):
    norm = kind(64, eps=1e-5).bfloat16()
    norm.weight.copy_(torch.rand(64) + 0.5)
    assert (usual_norm(norm).rounds_first, usual_norm(norm).adds_one) == form
    states = torch.randn(3, 5, 64).bfloat16()
    assert (usual_norm(norm)(states) != norm(states)).float().mean() <= 2e-3
    assert usual_norm(norm.float()) is None


def test_form_of_a_norm_is_found_out_while_its_weights_are_all_alike():
    """They may change later, under a graph that has recorded the form."""
    torch.manual_seed(0)
    norm, states = nn.RMSNorm(512, eps=1e-6).bfloat16(), torch.randn(16, 512).bfloat16()
    usual = usual_norm(norm)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(512) + 0.5)
        assert (usual(states) != norm(states)).float().mean() <= 2e-3


def compare_angles(device: str, dtype: torch.dtype) -> None:
    from eagle3_mla.generation.fused_kernels_triton import cos_sin

    draft = make_draft(TARGETS["llama"]()).to(device)
    positions = torch.tensor([[0, 1, 5, 31999], [7, 130000, 2, 3]], device=device)[:, ::2]
    found = cos_sin(positions, *draft.rotary_emb.frequencies(positions.device), dtype)
    for each, expected in zip(found, draft.rotary_emb(positions, dtype), strict=True):
        torch.testing.assert_close(each, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@in_interpreter
def test_angles_equal_those_of_the_draft_in_the_interpreter():
    pytest.importorskip("triton")
    compare_angles("cpu", torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_angles_equal_those_of_the_draft_on_a_gpu(dtype):
    compare_angles("cuda", dtype)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "num_sums"),
    [
        ("llama", 7),  # all but the last
        ("qwen3", 7),
        ("mistral-window-8", 7),
        ("granite", 0),  # what is added is scaled
        ("gemma", 7),
        ("gemma3-window-8", 0),  # what is added has been normalised
        ("cohere", 0),  # attention and MLP read the same states
        ("phi3", 0),
        ("gpt2", 0),
    ],
)
def test_sums_of_usual_layers_are_taken_over_and_others_left_alone(name, num_sums, monkeypatch):
    counts = []

    def watched(*arguments):
        counts.append(1)
        return add_and_normalise_by_definition(*arguments)

    monkeypatch.setattr(fused_residual, "add_and_normalise_by_definition", watched)
    target, prompt = half_target(name), make_prompts([9, 5])
    with fused_norms(target):
        expected = target(**prompt).logits
    with fused_residuals(target), fused_norms(target):
        assert torch.equal(target(**prompt).logits, expected)
        assert len(counts) == num_sums
    assert not any("forward" in vars(module) for module in target.modules())


@torch.no_grad()
def test_states_that_somebody_changes_between_layers_are_normalised_anew():
    target, prompt = half_target("llama"), make_prompt(5)

    def change(module, args, kwargs):
        states = args[0] if args else kwargs["hidden_states"]
        states.mul_(3)

    target.model.layers[2].register_forward_pre_hook(change, with_kwargs=True)
    with fused_norms(target):
        expected = target(**prompt).logits
    with fused_residuals(target), fused_norms(target):
        assert torch.equal(target(**prompt).logits, expected)


def test_sums_are_right_in_inference_mode():
    target, prompt = half_target("llama"), make_prompt(5)
    with torch.inference_mode():
        with fused_norms(target):
            expected = target(**prompt).logits
        with fused_residuals(target), fused_norms(target):
            assert torch.equal(target(**prompt).logits, expected)


class GatedMLP(nn.Module):
    """With what the tests change."""

    def __init__(self, activation=None):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(16, 24), nn.Linear(16, 24)
        self.down_proj = nn.Linear(24, 16)
        self.act_fn = activation or nn.SiLU()
        self.bfloat16()

    def forward(self, states):
        return self.down_proj(self.act_fn(self.gate_proj(states)) * self.up_proj(states))


class ScaledMLP(GatedMLP):
    def forward(self, states):
        return 1.05 * super().forward(states)


class TwoInputsMLP(GatedMLP):
    def forward(self, states, scale=1.0):
        return scale * super().forward(states)


class ClampedMLP(GatedMLP):
    def forward(self, states):
        gates, values = self.gate_proj(states).clamp(max=10), self.up_proj(states).clamp(min=-10, max=10)
        return self.down_proj(self.act_fn(gates) * values)


def patched_mlp() -> GatedMLP:
    mlp = GatedMLP()
    mlp.forward = partial(GatedMLP.forward, mlp)
    return mlp


@torch.no_grad()
@pytest.mark.parametrize(
    ("module", "activation"),
    [
        (GatedMLP(), "silu"),
        (GatedMLP(nn.GELU(approximate="tanh")), "gelu_tanh"),
        (GatedMLP(nn.GELU()), None),
        (GatedMLP(nn.ReLU()), None),
        (GatedMLP().float(), None),
        (ScaledMLP(), None),
        (TwoInputsMLP(), None),
        (ClampedMLP(), None),
        (patched_mlp(), None),
        (nn.Linear(4, 4), None),
    ],
)
def test_mlp_is_tried_before_it_is_replaced(module, activation):
    assert activation_of(module) == activation


@torch.no_grad()
@pytest.mark.parametrize(("context", "kind"), [(fused_mlps, "mlp"), (fused_norms, "post_attention_layernorm")])
def test_modules_that_somebody_has_given_another_forward_keep_it(context, kind):
    target = half_target("llama")
    module = getattr(target.model.layers[1], kind)
    own = module.forward = partial(type(module).forward, module)
    other = getattr(target.model.layers[2], kind)
    with context(target):
        assert module.forward is own
        assert "forward" in vars(other)
    assert module.forward is own
    assert "forward" not in vars(other)


def test_compilers_get_the_definition(monkeypatch):
    """A GPU's tensors, as far as the choice goes."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    keys, states = torch.zeros(1, 1, 4, 2), torch.ones(1, 1, 1, 2)
    slot_writing.write_to_slots(keys, keys.clone(), torch.tensor([[2]]), states, states)
    assert keys[0, 0].sum(dim=-1).tolist() == [0, 0, 2, 0]


class OwnWeights(torch.Tensor):
    """As of quantised weights, which know how to be looked up but not how to be indexed."""


@torch.no_grad()
def test_plain_tables_are_indexed_and_others_left_alone():
    plain, patched, limited = nn.Embedding(9, 4), nn.Embedding(9, 4), nn.Embedding(9, 4, max_norm=1.0)
    patched.forward = own = partial(nn.Embedding.forward, patched)
    scaled = TARGETS["gemma3-window-8"]().get_input_embeddings()
    quantised = nn.Embedding(9, 4)
    quantised.weight = nn.Parameter(torch.randn(9, 4).as_subclass(OwnWeights))
    ids = torch.tensor([[3, 0], [8, 3]])
    expected = plain(ids)
    with indexed_embeddings(plain, patched, limited, scaled, quantised, None):
        assert "forward" in vars(plain)
        assert torch.equal(plain(ids), expected)
        assert patched.forward is own
        assert "forward" not in vars(limited)
        assert "forward" not in vars(scaled)
        assert "forward" not in vars(quantised)
    assert "forward" not in vars(plain)
