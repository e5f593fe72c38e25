"""Bounds, derived defaults and what a draft takes over from its target."""

import importlib.metadata
import importlib.util

import pytest
from transformers import (
    DeepseekV3Config,
    Gemma3Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    Phi3Config,
    Qwen3MoeConfig,
    T5Config,
)

from eagle3_mla import configuration_eagle3_mla
from eagle3_mla.configuration_eagle3_mla import Eagle3MLAConfig, default_aux_layer_ids


def test_older_transformers_are_refused_when_loading_begins(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", {"transformers": "5.16.2"}.get)
    spec = importlib.util.spec_from_file_location("loaded_again", configuration_eagle3_mla.__file__)
    with pytest.raises(
        ImportError, match=r"transformers>=5.17 is required .* found transformers==5.16.2.\nThis draft"
    ):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_latent_is_an_eighth_of_the_standard_cache_by_default():
    mla = Eagle3MLAConfig(num_attention_heads=32, num_key_value_heads=8, head_dim=128)
    gqa = Eagle3MLAConfig(num_attention_heads=32, num_key_value_heads=8, head_dim=128, attention_type="gqa")
    assert mla.mla_latent_dim == 256
    assert gqa.cached_elements_per_token == 8 * mla.cached_elements_per_token


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [
        (2, [0, 1, 2]),
        (3, [1, 2, 3]),
        (4, [1, 2, 3]),
        (5, [1, 2, 4]),
        (6, [1, 3, 5]),
        (7, [2, 3, 4]),
        (32, [2, 16, 29]),
        (80, [2, 40, 77]),
    ],
)
def test_aux_layers_follow_the_targets_depth(num_layers, expected):
    assert default_aux_layer_ids(num_layers) == expected
    config = Eagle3MLAConfig.from_target(LlamaConfig(num_hidden_layers=num_layers))
    assert config.eagle_aux_hidden_state_layer_ids == expected


def test_target_of_one_layer_is_refused():
    with pytest.raises(ValueError, match="at least 2, got 1"):
        Eagle3MLAConfig.from_target(LlamaConfig(num_hidden_layers=1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"draft_vocab_size": 101, "vocab_size": 100}, r"must be at most `vocab_size` \(100\), got 101"),
        ({"draft_vocab_size": 0}, "`draft_vocab_size` must be an integer of at least 1, got 0"),
        ({"mla_rope_dim": 7}, "`mla_rope_dim` must be 0 or a positive even number .* got 7"),
        ({"mla_rope_dim": -2}, "`mla_rope_dim` must be 0 or a positive even number .* got -2"),
        ({"mla_latent_dim": 0}, "`mla_latent_dim` must be an integer of at least 1, got 0"),
        ({"mla_latent_dim": 2.5}, "`mla_latent_dim` must be an integer of at least 1, got 2.5"),
        ({"head_dim": 15}, "`head_dim` must be even .* got 15"),
        ({"attention_type": "mha"}, "`attention_type` must be one of .* got 'mha'"),
        ({"mla_kv_norm_type": "batch"}, "`mla_kv_norm_type` must be one of .* got 'batch'"),
        ({"mla_q_lora_rank": 0}, "`mla_q_lora_rank` must be an integer of at least 1, got 0"),
        ({"attention_type": "gqa", "mla_rope_dim": 8}, 'belong to `attention_type="mla"`'),
        ({"num_key_value_heads": 5}, r"must divide `num_attention_heads` \(32\), got 5"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` must be an integer of at least 1, got 0"),
        ({"hidden_size": None}, "`hidden_size` must be an integer of at least 1, got None"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2]}, "three different layer indices"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 2, 3]}, "three different layer indices"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2, 9], "target_num_hidden_layers": 8}, r"at most .* \(8\)"),
        ({"head_dim": "8"}, "`head_dim` must be an integer of at least 1, got '8'"),
        ({"target_num_hidden_layers": "4"}, "`target_num_hidden_layers` must be an integer of at least 1, got '4'"),
        ({"rms_norm_eps": "1e-5"}, "`rms_norm_eps` must be a positive number, got '1e-5'"),
        ({"rms_norm_eps": float("nan")}, "`rms_norm_eps` must be a positive number, got nan"),
        ({"initializer_range": -1}, "`initializer_range` must be a positive number, got -1"),
        ({"hidden_act": "nope"}, "`hidden_act` must be an activation of transformers, got 'nope'"),
        ({"mla_use_kv_norm": "no"}, "`mla_use_kv_norm` must be true or false, got 'no'"),
        ({"mla_rope_dim": False}, "`mla_rope_dim` must be 0 or a positive even number .* got False"),
        ({"tie_word_embeddings": True}, "`tie_word_embeddings` must be false"),
        ({"rope_parameters": "yarn"}, "`rope_parameters` must be a dictionary, got 'yarn'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, r"\['factor'\]` must be .* got None"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, r"\['rope_theta'\]` must be .* got 0"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            r"\['partial_rotary_factor'\]` must be 1",
        ),
        ({"eagle_aux_hidden_state_layer_ids": [0, True, 2]}, "three different layer indices"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "got 'dynamic'"),
    ],
    ids=str,
)
def test_field_out_of_bounds_is_named_with_its_bound_and_value(fields, message):
    with pytest.raises(ValueError, match=message):
        Eagle3MLAConfig(**fields)


def test_odd_head_width_is_fine_where_rope_is_decoupled():
    assert Eagle3MLAConfig(head_dim=15, mla_rope_dim=8).head_dim == 15


def test_every_field_survives_save_and_load(tmp_path):
    """A derived default that happens to equal the value of another shape must not be derived anew from the file."""
    config = Eagle3MLAConfig(
        vocab_size=100,
        draft_vocab_size=50,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        mla_latent_dim=Eagle3MLAConfig().mla_latent_dim,
        mla_rope_dim=8,
        mla_q_lora_rank=16,
        mla_kv_norm_type="rms_norm",
        eagle_aux_hidden_state_layer_ids=[1, 2, 3],
        fc_norm=True,
        norm_output=True,
        has_own_embeddings=True,
    )
    config.save_pretrained(tmp_path)
    loaded = Eagle3MLAConfig.from_pretrained(tmp_path)
    fields = Eagle3MLAConfig.__annotations__
    assert {name: getattr(loaded, name) for name in fields} == {name: getattr(config, name) for name in fields}


@pytest.mark.parametrize(
    "target_config",
    [LlamaConfig(), Gemma3Config(), GPT2Config(), GptOssConfig(), Phi3Config(), Qwen3MoeConfig()],
    ids=lambda config: config.model_type,
)
def test_shape_comes_from_the_target(target_config):
    text_config = target_config.get_text_config(decoder=True)
    config = Eagle3MLAConfig.from_target(target_config)
    assert config.vocab_size == text_config.vocab_size
    assert config.hidden_size == config.target_hidden_size == text_config.hidden_size
    assert config.num_attention_heads == text_config.num_attention_heads
    assert config.max_position_embeddings == text_config.max_position_embeddings
    assert config.mla_latent_dim == config.num_key_value_heads * config.head_dim // 4


def test_draft_of_an_mla_target_gets_plain_heads():
    config = Eagle3MLAConfig.from_target(DeepseekV3Config())
    assert (config.num_key_value_heads, config.head_dim, config.mla_latent_dim) == (8, 128, 256)
    assert config.num_attention_heads % 8 == 0


def test_overrides_win_over_preset_and_target():
    config = Eagle3MLAConfig.from_target(LlamaConfig(), preset="engine", mla_q_lora_rank=512)
    assert (config.mla_latent_dim, config.mla_rope_dim, config.mla_kv_norm_type) == (256, 64, "rms_norm")
    assert config.mla_q_lora_rank == 512
    with pytest.raises(ValueError, match="`preset` must be one of"):
        Eagle3MLAConfig.from_target(LlamaConfig(), preset="fast")


def test_encoder_decoder_target_is_refused():
    with pytest.raises(ValueError, match="must be decoder-only"):
        Eagle3MLAConfig.from_target(T5Config())


def test_rope_that_depends_on_length_or_width_becomes_plain_rope():
    rope = {"rope_type": "dynamic", "rope_theta": 5e5, "factor": 4.0}
    config = Eagle3MLAConfig.from_target(LlamaConfig(rope_parameters=rope))
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
