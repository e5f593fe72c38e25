"""Twins: the large models compute what the small ones compute, in fp64, and their matrices are not empty."""

import sys

import pytest
import torch
import torch.nn.functional as F
from reference_benchmarks import NANO_TARGET, ROOT, benchmark
from reference_generation import set_tree
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from eagle3_mla.configuration_eagle3_mla import Eagle3MLAConfig
from eagle3_mla.modeling_eagle3_mla import Eagle3MLADraftModel

SHAPE = {
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-2,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
TWIN_SHAPE = {
    "hidden_size": 60,
    "intermediate_size": 100,
    "num_hidden_layers": 9,
    "num_attention_heads": 12,
    "num_key_value_heads": 3,
    "head_dim": 16,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SETTINGS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
TARGETS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3-rope": {"rope_parameters": LLAMA3_ROPE},
    "groups-larger-than-the-twin's": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "two-layers": {"num_hidden_layers": 2},
    "eight-layers": {"num_hidden_layers": 8},
}
TWINS = {
    "all-larger": {},
    "groups-of-two": {"num_attention_heads": 12, "num_key_value_heads": 6},
    "same-heads": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "deeper-only": {**{name: SHAPE[name] for name in TWIN_SHAPE}, "num_hidden_layers": 12},
    "eight-layers": {"num_hidden_layers": 8},
}
DECOUPLED = {"mla_rope_dim": 4, "mla_latent_dim": 6}
DRAFTS = {
    "mla": ({"mla_latent_dim": 6}, {}),
    "rms-norm": ({"mla_latent_dim": 6, "mla_kv_norm_type": "rms_norm"}, {}),
    "no-norm": ({"mla_latent_dim": 6, "mla_use_kv_norm": False}, {}),
    "decoupled": (DECOUPLED, {"mla_rope_dim": 12}),
    "decoupled-same-size": (DECOUPLED, {"mla_latent_dim": 6}),
    "query-compression": ({"mla_latent_dim": 6, "mla_q_lora_rank": 5}, {"mla_q_lora_rank": 15}),
    "engine": ({**DECOUPLED, "mla_q_lora_rank": 5, "mla_kv_norm_type": "rms_norm"}, {"mla_rope_dim": 8}),
    "gqa": ({"attention_type": "gqa"}, {}),
    "embed-residual-and-fc-norm": ({"mla_latent_dim": 6, "embed_residual": True, "fc_norm": True}, {}),
    "norm-output": ({"mla_latent_dim": 6, "norm_output": True}, {}),
    "own-embeddings": ({"mla_latent_dim": 6, "has_own_embeddings": True}, {}),
    "two-layers": ({"mla_latent_dim": 6, "num_hidden_layers": 2}, {}),
    "own-heads": ({"mla_latent_dim": 6, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4}, {}),
    "other-places": ({"mla_latent_dim": 6, "eagle_aux_hidden_state_layer_ids": [0, 1, 3]}, {}),
    "llama3-rope": ({"mla_latent_dim": 6, "rope_parameters": LLAMA3_ROPE}, {}),
}


@pytest.fixture
def twin():
    with benchmark("twin") as module:
        yield module


@pytest.fixture(autouse=True)
def exact_norms(monkeypatch):
    """Llama's norm computes in fp32 whatever its input is, which would hide everything below 1e-7."""

    def forward(self, hidden_states):
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@torch.no_grad()
def randomise(model):
    """In fp64 and ready, with norms and biases that are no ones and zeros."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double().eval()


def make_target(**fields) -> LlamaForCausalLM:
    return randomise(LlamaForCausalLM(LlamaConfig(**SHAPE | fields)))


def make_draft(target, **fields) -> Eagle3MLADraftModel:
    fields = {"draft_vocab_size": 29, "initializer_range": 0.2, **fields}
    draft = randomise(Eagle3MLADraftModel(Eagle3MLAConfig.from_target(target.config, **fields)))
    draft.set_draft_vocabulary(torch.arange(2, 31))
    return draft


def make_prompt(length: int = 40) -> torch.Tensor:
    return torch.randint(1, SHAPE["vocab_size"], (2, length))


def assert_padded(states, small_states):
    """Equal up to rounding in fp64, and nothing but zeros beside."""
    width = small_states.shape[-1]
    torch.testing.assert_close(states[..., :width], small_states, rtol=1e-10, atol=1e-10)
    assert not states[..., width:].any()


@torch.no_grad()
def read(target, draft, input_ids):
    """The target's logits and auxiliary states, the draft's logits and states."""
    with draft.capture_aux_hidden_states(target) as captured:
        logits = target(input_ids).logits
        aux_hidden_states = captured.take()
    outputs = draft(draft.embed(input_ids, target), aux_hidden_states=aux_hidden_states)
    again = draft(draft.embed(input_ids, target), fused_states=outputs.states)
    return logits, aux_hidden_states.unflatten(-1, (3, -1)), outputs, again


def assert_same_function(models, twins):
    input_ids = make_prompt()
    logits, aux_hidden_states, *outputs = read(*models, input_ids)
    twin_logits, twin_aux_hidden_states, *twin_outputs = read(*twins, input_ids)
    torch.testing.assert_close(twin_logits, logits, rtol=1e-10, atol=1e-10)
    assert_padded(twin_aux_hidden_states, aux_hidden_states)
    for twin_output, output in zip(twin_outputs, outputs, strict=True):
        torch.testing.assert_close(twin_output.logits, output.logits, rtol=1e-10, atol=1e-10)
        assert_padded(twin_output.states, output.states)


def generate(target, draft, **settings):
    """A text, and what each round accepted."""
    torch.manual_seed(3)
    text = target.generate(make_prompt(7)[:1], assistant_model=draft, max_new_tokens=16, **settings)
    return text.tolist(), draft.speculation_stats.acceptance_lengths


def make_twins(twin, target, draft, shape=None, mla_sizes=None):
    twin_target = twin.widen_target(target, twin.TwinShape(**TWIN_SHAPE | (shape or {})))
    return twin_target, twin.widen_draft(draft, twin_target.config, **mla_sizes or {})


@pytest.mark.parametrize("shape", TWINS.values(), ids=TWINS)
@pytest.mark.parametrize("fields", TARGETS.values(), ids=TARGETS)
def test_a_twin_of_any_target_computes_the_same(twin, fields, shape):
    target = make_target(**fields)
    draft = make_draft(target)
    assert_same_function((target, draft), make_twins(twin, target, draft, shape))


def test_a_twin_may_be_tied_as_the_small_target(twin):
    target = make_target(tie_word_embeddings=True)
    draft = make_draft(target)
    twins = make_twins(twin, target, draft, {"tie_word_embeddings": True})
    assert twins[0].lm_head.weight is twins[0].model.embed_tokens.weight
    assert_same_function((target, draft), twins)


@pytest.mark.parametrize(("fields", "mla_sizes"), DRAFTS.values(), ids=DRAFTS)
def test_a_twin_of_any_head_computes_the_same(twin, fields, mla_sizes):
    target = make_target()
    draft = make_draft(target, **fields)
    draft.config._attn_implementation = "eager"
    twins = make_twins(twin, target, draft, mla_sizes=mla_sizes)
    assert twins[1].config._attn_implementation == "eager"
    assert_same_function((target, draft), twins)


@pytest.mark.parametrize("rope_dim", [0, 4])
@pytest.mark.parametrize("rope_type", ["yarn", "dynamic"])
def test_rope_that_cannot_be_widened_may_stay(twin, rope_type, rope_dim):
    """Each of these makes frequencies depend on the width itself."""
    target = make_target(rope_parameters=YARN_ROPE | {"rope_type": rope_type})
    draft = make_draft(target, mla_latent_dim=6, mla_rope_dim=rope_dim)
    assert_same_function((target, draft), make_twins(twin, target, draft, {"head_dim": 8}))
    with pytest.raises(ValueError, match=rf"`head_dim` of the twin must be 8 with RoPE of the type '{rope_type}'"):
        make_twins(twin, target, draft, {"head_dim": 16})


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", ["mla", "engine", "gqa"])
def test_a_twin_writes_and_accepts_what_the_small_models_do(twin, name, settings):
    fields, mla_sizes = DRAFTS[name]
    target = make_target()
    draft = make_draft(target, **fields)
    set_tree(draft, num_nodes=30, top_k=25, depth=2)
    twins = make_twins(twin, target, draft, mla_sizes=mla_sizes)
    text, acceptance_lengths = generate(target, draft, **settings)
    assert max(acceptance_lengths) > min(acceptance_lengths)
    assert generate(*twins, **settings) == (text, acceptance_lengths)


def test_the_command_makes_a_twin_of_the_released_head(twin, tmp_path, monkeypatch, capsys):
    """In fp32, with the weights as they are loaded by whoever measures: trained ones, which accept something."""
    sizes = "--hidden-size 512 --intermediate-size 640 --num-hidden-layers 10 --num-attention-heads 8"
    sizes += " --num-key-value-heads 2 --head-dim 128 --mla-latent-dim 128 --dtype float32 --device cpu"
    paths = ["--target-model-path", str(NANO_TARGET), "--draft-checkpoint", str(ROOT), "--output-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["twin.py", *paths, *sizes.split()])
    twin.main()
    assert "model.layers.*.self_attn.o_proj.weight" in capsys.readouterr().out
    messages = [{"role": "user", "content": "What does the module heapq do?"}]
    answers = []
    for target_path, draft_path in [(NANO_TARGET, ROOT), (tmp_path / "target", tmp_path / "draft")]:
        inputs = AutoTokenizer.from_pretrained(target_path).apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        target = LlamaForCausalLM.from_pretrained(target_path, dtype=torch.float32).eval()
        draft = Eagle3MLADraftModel.from_pretrained(draft_path, dtype=torch.float32).eval()
        text = target.generate(**inputs, assistant_model=draft, do_sample=False, max_new_tokens=32)
        answers.append((text.tolist(), draft.speculation_stats.acceptance_lengths))
    assert answers[0] == answers[1]
    assert sum(answers[0][1]) > 1.5 * len(answers[0][1])


def test_a_twin_may_have_another_dtype(twin):
    target = make_target()
    draft = make_draft(target)
    twin_target = twin.widen_target(target, twin.TwinShape(**TWIN_SHAPE), torch.bfloat16)
    twin_draft = twin.widen_draft(draft, twin_target.config, torch.bfloat16)
    assert twin_target.dtype == twin_draft.dtype == torch.bfloat16
    weight = twin_target.model.layers[0].mlp.gate_proj.weight[:40, :24]
    torch.testing.assert_close(weight, target.model.layers[0].mlp.gate_proj.weight.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("name", DRAFTS)
def test_only_zeros_that_are_needed_are_zeros(twin, name):
    """What reads nothing but entries and zeros and writes no residual stream has no reason for any."""
    target = make_target()
    draft = make_draft(target, **DRAFTS[name][0])
    twins = make_twins(twin, target, draft, mla_sizes=DRAFTS[name][1])
    full = {"q_proj", "gate_proj", "q_a_proj", "q_b_proj", "W_dkv", "W_qr", "lm_head"}
    for model in twins:
        for path, weight in model.named_parameters():
            share = 1 - int(weight.count_nonzero()) / weight.numel()
            kind = path.split(".")[-2]
            assert share == 0 or kind not in full, path
            assert share < 0.8, path
    assert set(twin.zero_shares(twins[0])) == {
        *(f"model.layers.*.self_attn.{part}_proj.weight" for part in "qkvo"),
        *(f"model.layers.*.mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
        *("model.embed_tokens.weight", "lm_head.weight"),
    }


def test_the_share_of_zeros_is_that_of_the_layouts(twin):
    target = make_target()
    shares = twin.zero_shares(twin.widen_target(target, twin.TwinShape(**TWIN_SHAPE)))
    assert shares["model.embed_tokens.weight"] == pytest.approx(1 - 30 / 31 * 24 / 60)  # a token pads
    # 24 of 60 inputs are no zeros. Three layers of nine have 40 neurons of 100; every second of the others is silenced
    # by `up_proj`, the rest by `down_proj`, which also writes zeros beside the 24.
    assert shares["model.layers.*.mlp.up_proj.weight"] == pytest.approx((3 * 0.3 + 6 * 0.5) / 9 * 24 / 60)
    assert shares["model.layers.*.mlp.down_proj.weight"] == pytest.approx((3 * (0.3 + 0.4 * 36 / 60) + 6 * 0.5) / 9)


def test_layouts_decide_what_a_matrix_holds(twin):
    """An entry held twice is read as the mean; random values, here ones, stay where nothing reads them."""
    widening = sys.modules["widening"]
    rows = widening.Layout(torch.tensor([0, widening.ZERO, widening.NOISE]))
    columns = widening.Layout(torch.tensor([1, 0, 1, widening.ZERO, widening.NOISE]))
    weight, bias = torch.ones(3, 5), torch.ones(3)
    widening.write_matrix(weight, torch.tensor([[4.0, 6.0]]), rows, columns, scale=2.0)
    assert weight.tolist() == [[6, 8, 6, 1, 0], [0, 0, 0, 1, 0], [1, 1, 1, 1, 1]]
    widening.write_vector(bias, torch.tensor([4.0]), rows, scale=2.0)
    assert bias.tolist() == [8, 0, 1]


@pytest.mark.parametrize(("num_layers", "twin_num_layers"), [(2, 7), (3, 4), (4, 32), (6, 32), (8, 32), (32, 80)])
def test_default_places_of_a_head_stay_default_places(twin, num_layers, twin_num_layers):
    config = Eagle3MLAConfig(target_num_hidden_layers=num_layers)
    default = Eagle3MLAConfig(target_num_hidden_layers=twin_num_layers).eagle_aux_hidden_state_layer_ids
    assert twin.twin_aux_layer_ids(config, twin_num_layers) == default


@pytest.mark.parametrize(("num_layers", "twin_num_layers"), [(5, 7), (6, 8)])
def test_where_default_places_do_not_fit_added_layers_come_last(twin, num_layers, twin_num_layers):
    assert twin.place_layers(num_layers, twin_num_layers) == list(range(num_layers))
    target = make_target(num_hidden_layers=num_layers)
    draft = make_draft(target)
    twins = make_twins(twin, target, draft, {"num_hidden_layers": twin_num_layers})
    assert_same_function((target, draft), twins)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"hidden_size": 12}, "`hidden_size` of the twin must be at least 24, got 12"),
        ({"num_hidden_layers": 2}, "`num_hidden_layers` of the twin must be at least 3, got 2"),
        ({"head_dim": 20}, r"`head_dim` of the twin must be a multiple of the small model's \(8\), got 20"),
        ({"num_attention_heads": 4, "num_key_value_heads": 1}, "`num_key_value_heads` of the twin must be at least 2"),
        ({"tie_word_embeddings": True}, "`tie_word_embeddings` of the twin must be False"),
    ],
)
def test_a_shape_that_does_not_hold_the_target_is_refused(twin, shape, message):
    target = make_target()
    with pytest.raises(ValueError, match=message):
        twin.widen_target(target, twin.TwinShape(**TWIN_SHAPE | shape))


def test_groups_that_do_not_fit_are_refused(twin):
    """Three query heads of a group need two groups of two."""
    target = make_target(num_attention_heads=6, num_key_value_heads=2)
    shape = twin.TwinShape(**TWIN_SHAPE | {"num_attention_heads": 6, "num_key_value_heads": 3})
    with pytest.raises(ValueError, match=r"`num_key_value_heads` must be at least 4 .* got 3"):
        twin.widen_target(target, shape)


@pytest.mark.parametrize(
    ("name", "mla_sizes", "message"),
    [
        ("mla", {"mla_latent_dim": 20}, r"`mla_latent_dim` of the twin must be a multiple of .* \(6\), got 20"),
        ("mla", {"mla_rope_dim": 8}, r"`mla_rope_dim` of the twin must be a multiple of .* \(0\), got 8"),
        ("mla", {"mla_q_lora_rank": 8}, r"`mla_q_lora_rank` of the twin must be a multiple of .* \(0\), got 8"),
        ("decoupled", {"mla_rope_dim": 0}, r"`mla_rope_dim` of the twin must be a multiple of .* \(4\), got 0"),
        ("gqa", {"mla_latent_dim": 8}, "mla_latent_dim.* belong to"),
    ],
)
def test_sizes_that_do_not_hold_the_head_are_refused(twin, name, mla_sizes, message):
    target = make_target()
    draft = make_draft(target, **DRAFTS[name][0])
    with pytest.raises(ValueError, match=message):
        make_twins(twin, target, draft, mla_sizes=mla_sizes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 32}, r"`hidden_size` must be its target's \(24\), got 32"),
        ({"target_num_hidden_layers": None}, "`target_num_hidden_layers` must be known"),
        ({"vocab_size": 40}, r"`vocab_size` must be the head's \(40\), got 31"),
    ],
)
def test_heads_that_cannot_be_widened_are_refused(twin, fields, message):
    target = make_target()
    draft = make_draft(target, mla_latent_dim=6)
    config = Eagle3MLAConfig.from_target(target.config, mla_latent_dim=6, draft_vocab_size=29, **fields)
    with pytest.raises(ValueError, match=message):
        twin.twin_draft_config(config, draft.config, {})
