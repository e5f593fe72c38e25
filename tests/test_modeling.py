"""The head against an independent reference, its kernels against each other, its cache, its weights, its target."""

import logging
import threading
from contextlib import contextmanager

import pytest
import torch
from reference import reference_head
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from eagle3_mla import modeling_eagle3_mla as modeling
from eagle3_mla.configuration_eagle3_mla import Eagle3MLAConfig
from eagle3_mla.modeling_eagle3_mla import ATTENTION_KERNELS, Eagle3MLADraftModel

VARIANTS = {
    "mla": {},
    "mla-rms-norm": {"mla_kv_norm_type": "rms_norm"},
    "mla-no-norm": {"mla_use_kv_norm": False},
    "mla-R8": {"mla_rope_dim": 8},
    "mla-R8-q12": {"mla_rope_dim": 8, "mla_q_lora_rank": 12, "mla_kv_norm_type": "rms_norm"},
    "mla-q12": {"mla_q_lora_rank": 12},
    "mla-C24": {"mla_latent_dim": 24},
    "mla-G1": {"num_key_value_heads": 1},
    "mla-2-layers": {"num_hidden_layers": 2},
    "mla-eagle3.1": {"fc_norm": True, "norm_output": True},
    "mla-embed-residual": {"embed_residual": True},
    "gqa": {"attention_type": "gqa"},
}
VARIANT = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
MLA_NAMES = [name for name in VARIANTS if name != "gqa"]
MLA_VARIANT = pytest.mark.parametrize("fields", [VARIANTS[name] for name in MLA_NAMES], ids=MLA_NAMES)
KERNEL = pytest.mark.parametrize("kernel", ["eager", "sdpa", "flex_attention"])


@contextmanager
def propagating_transformers_log():
    logger = logging.getLogger("eagle3_mla")
    previous, logger.propagate = logger.propagate, True
    yield
    logger.propagate = previous


def make_config(**fields) -> Eagle3MLAConfig:
    defaults = {
        "vocab_size": 40,
        "draft_vocab_size": 30,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "target_num_hidden_layers": 4,
    }
    return Eagle3MLAConfig(**(defaults | fields))


def make_draft(kernel: str = "eager", **fields) -> Eagle3MLADraftModel:
    """A random head in fp64 whose norms are no identities."""
    draft = Eagle3MLADraftModel(make_config(**fields)).double().eval()
    for name, weight in draft.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, mean=0.0 if name.endswith("bias") else 1.0, std=0.2)
    draft.config._attn_implementation = kernel
    return draft


def make_rows(num_rows: int, batch_size: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    embeds = torch.randn(batch_size, num_rows, 32, dtype=torch.float64)
    return embeds, torch.randn(batch_size, num_rows, 96, dtype=torch.float64)


@KERNEL
@VARIANT
@torch.no_grad()
def test_head_equals_the_reference_written_from_the_equations(fields, kernel):
    draft = make_draft(kernel, **fields)
    embeds, aux = make_rows(7)
    outputs = draft(embeds, aux)
    logits, states = reference_head(draft.config, draft.state_dict(), embeds[0], aux[0])
    torch.testing.assert_close(outputs.logits[0], logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(outputs.states[0], states, rtol=0, atol=1e-6)


@KERNEL
@VARIANT
@torch.no_grad()
def test_rows_read_in_pieces_with_the_cache_equal_rows_read_at_once(fields, kernel):
    draft = make_draft(kernel, **fields)
    embeds, aux = make_rows(9, batch_size=2)
    cache = DynamicCache()
    parts = slice(0, 5), slice(5, 8), slice(8, 9)
    pieces = [draft(embeds[:, part], aux[:, part], past_key_values=cache).logits for part in parts]
    torch.testing.assert_close(torch.cat(pieces, dim=1), draft(embeds, aux).logits, rtol=0, atol=1e-12)


@VARIANT
@torch.no_grad()
def test_rows_that_are_only_remembered_leave_the_same_cache(fields):
    draft = make_draft(**fields)
    embeds, aux = make_rows(9, batch_size=2)
    cache, read_cache = DynamicCache(), DynamicCache()
    for part in slice(0, 5), slice(5, 9):
        draft(embeds[:, part], aux[:, part], past_key_values=read_cache)
        outputs = draft(embeds[:, part], aux[:, part], past_key_values=cache, logits_to_keep=None)
        assert (outputs.logits, outputs.states, outputs.past_key_values) == (None, None, cache)
    assert len(cache.layers) == len(read_cache.layers) == draft.config.num_hidden_layers
    for layer, read_layer in zip(cache.layers, read_cache.layers, strict=True):
        assert torch.equal(layer.keys, read_layer.keys)
        assert torch.equal(layer.values, read_layer.values)


@KERNEL
@MLA_VARIANT
@torch.no_grad()
def test_absorbed_attention_equals_expanded_attention(fields, kernel):
    attention = make_draft(kernel, **fields).layers[0].self_attn
    cos_sin = make_draft(**fields).rotary_emb(torch.arange(9)[None], torch.float64)
    attention_input = torch.randn(2, 9, 64, dtype=torch.float64)
    query, memory = attention.ask(attention_input, cos_sin), attention.remember(attention_input, cos_sin)
    for num_queries in (1, 3, 9):
        arguments = query[:, :, -num_queries:], memory, cos_sin, None
        absorbed, expanded = attention.attend_absorbed(*arguments), attention.attend_expanded(*arguments)
        torch.testing.assert_close(absorbed, expanded, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "width",
    [{"mla_latent_dim": 256}, {"mla_latent_dim": 256, "mla_rope_dim": 64}, {"mla_latent_dim": 64}],
    ids=["C256", "C256-R64", "C64"],
)
def test_attention_is_absorbed_exactly_while_that_costs_less(width):
    """The two costs per cached position are those of the table in arXiv:2405.04434's terms: H, G, d, C, R, Q."""
    config = make_config(num_attention_heads=32, num_key_value_heads=8, head_dim=128, hidden_size=64, **width)
    attention = Eagle3MLADraftModel(config).layers[0].self_attn
    heads, groups, head_dim, latent, rope = 32, 8, 128, config.mla_latent_dim, config.mla_rope_dim
    for num_queries in (1, 8, 16, 17, 64, 4096):
        if rope > 0:
            absorbed = num_queries * heads * (2 * latent + rope)
            expanded = num_queries * heads * (2 * head_dim + rope) + 2 * latent * groups * head_dim
        else:
            absorbed = num_queries * heads * (head_dim + latent) + latent * groups * head_dim
            expanded = num_queries * heads * 2 * head_dim + 2 * latent * groups * head_dim
        assert attention.absorbing_is_cheaper(num_queries) == (absorbed <= expanded)


@pytest.mark.parametrize("mask_kind", ["causal", "tree"])
@pytest.mark.parametrize("num_queries", [1, 4, 9], ids="Q{}".format)
@pytest.mark.parametrize("value_width", [8, 5], ids="F{}".format)
def test_kernels_agree_in_output_and_gradient(num_queries, value_width, mask_kind):
    query = torch.randn(2, 4, num_queries, 8, dtype=torch.float64, requires_grad=True)
    key = torch.randn(2, 2, 9, 8, dtype=torch.float64, requires_grad=True)
    value = torch.randn(2, 2, 9, value_width, dtype=torch.float64, requires_grad=True)
    mask = None
    if mask_kind == "tree":
        mask = torch.where(torch.rand(2, 1, num_queries, 9) < 0.5, 0.0, -1e30).double()
        mask[..., 0] = 0.0
    results = {}
    for name in ("eager", "sdpa"):
        heads = ATTENTION_KERNELS[name](query, key, value, mask, scaling=0.3)
        weights = torch.linspace(-1, 1, heads.numel(), dtype=torch.float64).view_as(heads)
        results[name] = heads, *torch.autograd.grad((heads * weights).sum(), (query, key, value))
    for ours, reference in zip(results["sdpa"], results["eager"], strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12)
    detached = (tensor.detach() for tensor in (query, key, value))
    heads = ATTENTION_KERNELS["flex_attention"](*detached, mask, scaling=0.3)
    torch.testing.assert_close(heads, results["eager"][0].detach(), rtol=0, atol=1e-12)


def test_flex_attention_that_needs_a_backward_on_the_cpu_says_that_it_runs_sdpa(caplog):
    modeling.logger.warning_once.cache_clear()
    query, key, value = (torch.randn(1, 2, 3, 8, requires_grad=True) for _ in range(3))
    with propagating_transformers_log():
        heads = ATTENTION_KERNELS["flex_attention"](query, key, value, None, scaling=0.3)
    assert torch.equal(heads, ATTENTION_KERNELS["sdpa"](query, key, value, None, scaling=0.3))
    assert "no backward on the CPU" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("num_queries", [1, 100, 200], ids="Q{}".format)
def test_flex_attention_agrees_with_eager_in_gradient_on_a_gpu(num_queries):
    shapes = (2, 8, num_queries, 64), (2, 2, 200, 64), (2, 2, 200, 64)
    tensors = [torch.randn(shape, device="cuda", requires_grad=True) for shape in shapes]
    results = {}
    for name in ("eager", "flex_attention"):
        heads = ATTENTION_KERNELS[name](*tensors, None, scaling=0.125)
        results[name] = heads, *torch.autograd.grad(heads.square().sum(), tensors)
    for ours, reference in zip(results["flex_attention"], results["eager"], strict=True):
        assert (ours - reference).norm() / reference.norm() < 2e-3


@VARIANT
def test_cache_holds_exactly_the_latents(fields):
    """Symptom of a cache of expanded keys and values: the saving that the head exists for is gone, silently."""
    draft = make_draft(**fields).float()
    cache = DynamicCache()
    embeds, aux = make_rows(6)
    draft(embeds.float(), aux.float(), past_key_values=cache)
    for layer in cache.layers:
        elements = layer.keys.numel() + layer.values.numel()
        assert elements == 6 * draft.config.cached_elements_per_token
    if draft.config.attention_type == "mla":
        assert cache.layers[0].keys.shape == (1, 1, 6, draft.config.mla_latent_dim)
        assert cache.layers[0].values.shape == (1, 1, 6, draft.config.mla_rope_dim)


@torch.no_grad()
def test_key_positions_may_be_anything():
    """Left padding: rows that sit three slots later, at their old positions, give the same logits."""
    draft = make_draft()
    embeds, aux = make_rows(5)
    padded = [torch.cat([torch.randn_like(rows[:, :3]), rows], dim=1) for rows in (embeds, aux)]
    hidden = torch.ones(8, 8).triu(1).bool()
    hidden[:, :3] = True
    mask = torch.where(hidden, -1e30, 0.0).double()[None, None]
    positions = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4]])
    outputs = draft(*padded, position_ids=positions, attention_mask=mask)
    torch.testing.assert_close(outputs.logits[:, 3:], draft(embeds, aux).logits, rtol=0, atol=1e-12)
    assert outputs.logits.isfinite().all()


def test_weight_names_are_the_documented_ones():
    attention = "layers.0.self_attn."
    common = {
        "fc.weight",
        "norm.weight",
        "lm_head.weight",
        "d2t",
        "t2d",
        *(f"layers.0.{name}.weight" for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")),
        *(f"layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        attention + "o_proj.weight",
    }
    latent = {attention + f"{name}.weight" for name in ("W_dkv", "W_uk", "W_uv", "kv_norm")}
    query, bias = {attention + "q_proj.weight"}, {attention + "kv_norm.bias"}
    decoupled = {attention + "W_qr.weight", attention + "W_kr.weight"}
    compressed = {attention + f"{name}.weight" for name in ("q_a_proj", "q_a_layernorm", "q_b_proj")}
    expected = {
        (): common | latent | query | bias,
        (("mla_kv_norm_type", "rms_norm"),): common | latent | query,
        (("mla_rope_dim", 8),): common | latent | query | bias | decoupled,
        (("mla_rope_dim", 8), ("mla_q_lora_rank", 12)): common | latent | bias | decoupled | compressed,
        (("fc_norm", True),): common | latent | query | bias | {f"fc_norm.{i}.weight" for i in range(3)},
        (("has_own_embeddings", True),): common | latent | query | bias | {"embed_tokens.weight"},
        (("target_hidden_size", 24),): common | latent | query | bias | {"embed_tokens.weight"},
        (("attention_type", "gqa"),): common | query | {attention + "k_proj.weight", attention + "v_proj.weight"},
    }
    for fields, names in expected.items():
        assert set(Eagle3MLADraftModel(make_config(**dict(fields))).state_dict()) == names


def test_weight_shapes_are_the_documented_ones():
    weights = make_draft(mla_rope_dim=6, mla_q_lora_rank=12).state_dict()
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    attention = "layers.0.self_attn."
    assert shapes["fc.weight"] == (32, 96)
    assert shapes["lm_head.weight"] == (30, 32)
    assert shapes["d2t"] == (30,)
    assert shapes["t2d"] == (40,)
    assert shapes[attention + "W_dkv.weight"] == (4, 64)
    assert shapes[attention + "W_uk.weight"] == shapes[attention + "W_uv.weight"] == (16, 4)
    assert shapes[attention + "W_qr.weight"] == (24, 12)
    assert shapes[attention + "W_kr.weight"] == (6, 64)


@VARIANT
def test_loaded_weights_are_the_saved_ones_bit_for_bit(fields, tmp_path):
    draft = make_draft(**fields).float()
    draft.set_draft_vocabulary(torch.arange(5, 35))
    draft.save_pretrained(tmp_path)
    loaded = Eagle3MLADraftModel.from_pretrained(tmp_path)
    assert draft.state_dict().keys() == loaded.state_dict().keys()
    for name, weight in draft.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    embeds, aux = (rows.float() for rows in make_rows(4))
    loaded.config._attn_implementation = "eager"
    assert torch.equal(draft(embeds, aux).logits, loaded(embeds, aux).logits)


@torch.no_grad()
def test_casting_the_model_does_not_round_its_rope_frequencies():
    draft = make_draft().bfloat16().double()
    cos, _ = draft.rotary_emb(torch.tensor([[4001]]), torch.float64)
    expected = (4001 * 10000.0 ** -(torch.arange(4).float() / 4)).cos()
    torch.testing.assert_close(cos[0, 0, :4].float(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("saved", "opened"), [("gqa", "mla"), ("mla", "gqa")])
def test_checkpoint_of_the_other_attention_type_names_both_and_the_way_out(saved, opened, tmp_path):
    make_draft(attention_type=saved).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f'attention_type="{saved}".*"{opened}".*config.json'):
        Eagle3MLADraftModel.from_pretrained(tmp_path, attention_type=opened)


@pytest.mark.parametrize("missing", ["d2t", "lm_head.weight", "layers.0.self_attn.W_uk.weight"])
def test_checkpoint_that_lacks_a_weight_is_refused(missing, tmp_path):
    make_draft().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop(missing)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"missing .*{missing}"):
        Eagle3MLADraftModel.from_pretrained(tmp_path)


def test_checkpoint_with_an_unknown_weight_is_refused(tmp_path):
    make_draft().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors") | {"layers.1.mlp.up_proj.weight": torch.zeros(2, 2)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"unexpected .*layers\.1"):
        Eagle3MLADraftModel.from_pretrained(tmp_path)


def test_draft_vocabulary_is_stored_as_offsets():
    draft = make_draft(draft_vocab_size=4)
    draft.set_draft_vocabulary(torch.tensor([1, 2, 30, 39]))
    assert draft.d2t.tolist() == [1, 1, 28, 36]
    assert draft.draft_to_target(torch.arange(4)).tolist() == [1, 2, 30, 39]
    assert draft.t2d.nonzero().flatten().tolist() == [1, 2, 30, 39]


@pytest.mark.parametrize("ids", [[1, 2, 3], [1, 2, 2, 3], [3, 2, 1, 0], [-1, 0, 1, 2], [1, 2, 3, 40]], ids=str)
def test_draft_vocabulary_that_is_no_rising_set_of_target_ids_is_refused(ids):
    with pytest.raises(ValueError, match="`draft_ids` must be"):
        make_draft(draft_vocab_size=4).set_draft_vocabulary(torch.tensor(ids))


@torch.no_grad()
def test_captured_states_are_the_residual_stream_before_the_layers_and_after_the_last(tiny_target):
    """One layer off, a head trained elsewhere still runs, at acceptance 1.x."""
    config = Eagle3MLAConfig.from_target(tiny_target.config, eagle_aux_hidden_state_layer_ids=[0, 2, 4])
    draft = Eagle3MLADraftModel(config)
    input_ids = torch.randint(0, 32, (1, 6))
    captured = draft.capture_aux_hidden_states(tiny_target)
    with captured:
        tiny_target(input_ids[:, :4])
        states = captured.take()
    tiny_target(input_ids)  # nobody listens any more
    expected = [tiny_target.model.embed_tokens(input_ids[:, :4])]
    positions = torch.arange(4)[None]
    rope = tiny_target.model.rotary_emb(expected[0], positions)
    for layer in tiny_target.model.layers:
        hidden = layer(expected[-1], position_embeddings=rope, attention_mask=None, position_ids=positions)
        expected.append(hidden[0] if isinstance(hidden, tuple) else hidden)
    torch.testing.assert_close(states, torch.cat([expected[0], expected[2], expected[4]], dim=-1))
    with captured:
        tiny_target(input_ids[:, :2])
        tiny_target(input_ids[:, 2:])
    assert captured.take().shape == (1, 6, 96)


@pytest.mark.parametrize(
    ("difference", "message"),
    [
        ({"vocab_size": 33}, "`vocab_size` is 32, the target's is 33"),
        ({"hidden_size": 64}, "`target_hidden_size` is 32, the target's is 64"),
        ({"num_hidden_layers": 6}, "`target_num_hidden_layers` is 4, the target's is 6"),
    ],
    ids=str,
)
def test_draft_of_another_target_is_refused(tiny_target, difference, message):
    draft = Eagle3MLADraftModel(Eagle3MLAConfig.from_target(tiny_target.config))
    other = LlamaForCausalLM(LlamaConfig(**(tiny_target.config.to_dict() | difference)))
    with pytest.raises(ValueError, match=message):
        draft.check_target(other)


def test_target_whose_embeddings_have_another_width_is_refused():
    shape = {"vocab_size": 32, "hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 4}
    target = OPTForCausalLM(OPTConfig(word_embed_proj_dim=16, **shape))
    draft = Eagle3MLADraftModel(Eagle3MLAConfig.from_target(target.config))
    with pytest.raises(ValueError, match=r"`hidden_size` \(32\), got 16. Give the draft its own"):
        draft.check_target(target)


@pytest.mark.parametrize("change", ["absolute ids", "out of range", "negative", "t2d"])
def test_checkpoint_with_a_wrong_draft_vocabulary_is_refused(change, tmp_path):
    """Published heads and their tools disagree on what `d2t` holds; taken for ids, offsets accept nothing."""
    draft = make_draft(draft_vocab_size=4)
    draft.set_draft_vocabulary(torch.tensor([3, 5, 8, 13]))
    changes = {"absolute ids": torch.arange(4), "out of range": torch.tensor([0, 0, 0, 40]), "negative": -7}
    draft.d2t += changes.get(change, 0)
    draft.t2d ^= change == "t2d"
    draft.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="`t2d` of the checkpoint" if change in ("t2d", "absolute ids") else "`d2t` of"
    ):
        Eagle3MLADraftModel.from_pretrained(tmp_path)


def test_states_come_from_the_forwards_of_ones_own_thread(tiny_target):
    draft = Eagle3MLADraftModel(Eagle3MLAConfig.from_target(tiny_target.config))
    captured = draft.capture_aux_hidden_states(tiny_target)
    with captured:
        tiny_target(torch.tensor([[1, 2, 3]]))
        stranger = threading.Thread(target=tiny_target, args=(torch.tensor([[4, 5]]),))
        stranger.start()
        stranger.join()
    assert captured.take().shape == (1, 3, 96)


def test_states_of_a_target_that_was_not_seen_running_are_refused(tiny_target):
    draft = Eagle3MLADraftModel(Eagle3MLAConfig.from_target(tiny_target.config))
    with pytest.raises(NotImplementedError, match=r"target.compile\(\)"):
        draft.capture_aux_hidden_states(tiny_target).take()


def test_draft_alone_does_not_generate():
    with pytest.raises(NotImplementedError, match="assistant_model=draft"):
        make_draft().generate(torch.tensor([[1, 2]]))


def test_wrong_inputs_of_forward_are_named():
    draft, (embeds, aux) = make_draft(), make_rows(3)
    with pytest.raises(ValueError, match="Exactly one of `aux_hidden_states` and `fused_states`"):
        draft(embeds)
    with pytest.raises(ValueError, match="Exactly one of `aux_hidden_states` and `fused_states`"):
        draft(embeds, aux, fused_states=embeds)
    with pytest.raises(ValueError, match=r"floating-point.*got torch.bool"):
        draft(embeds, aux, attention_mask=torch.ones(1, 1, 3, 3, dtype=torch.bool))
