"""Targets that read several tokens otherwise than one by one: refused by name, or not drafted for where it matters."""

import pytest
import torch
from reference_generation import (
    GPT2_SHAPE,
    MAX_NEW_TOKENS,
    SHAPE,
    TARGETS,
    VOCAB_SIZE,
    assert_same_generation,
    make_draft,
    make_prompts,
    run,
    set_tree,
)
from transformers import (
    BertConfig,
    BertLMHeadModel,
    DogeConfig,
    DogeForCausalLM,
    DynamicCache,
    GitConfig,
    GitForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MoshiConfig,
    MoshiForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    RobertaConfig,
    RobertaForCausalLM,
)

from eagle3_mla.generation import chunks, notices
from eagle3_mla.generation.probing import can_branch

LIMIT = 16
BERT_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": 2,
}


def bidirectional_llama():
    target = TARGETS["llama"]()
    target.config.is_causal = False
    return target


def deepseek_v32():
    transformers = pytest.importorskip("transformers", minversion="5.23")
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1}
    indexer = {"index_topk": LIMIT, "index_n_heads": 4, "index_head_dim": 16}
    shape = {name: value for name, value in SHAPE.items() if name != "head_dim"} | {"num_key_value_heads": 4}
    config = transformers.DeepseekV32Config(
        **shape, **ranks, **experts, **indexer, moe_intermediate_size=16, first_k_dense_replace=2
    )
    return transformers.DeepseekV32ForCausalLM(config)


def gemma4():
    transformers = pytest.importorskip("transformers", minversion="5.23")
    config = transformers.Gemma4TextConfig(
        **SHAPE,
        global_head_dim=16,
        num_global_key_value_heads=1,
        sliding_window=8,
        vocab_size_per_layer_input=VOCAB_SIZE,
        hidden_size_per_layer_input=8,
    )
    return transformers.Gemma4ForCausalLM(config)


def doge():
    return DogeForCausalLM(DogeConfig(keep_window_size=LIMIT, **SHAPE))


def gemma4_with_shared_keys():
    transformers = pytest.importorskip("transformers", minversion="5.23")
    kinds = ["sliding_attention", "full_attention"] * 2
    config = transformers.Gemma4TextConfig(
        **SHAPE, layer_types=kinds, sliding_window=8, hidden_size_per_layer_input=8, num_kv_shared_layers=2
    )
    return transformers.Gemma4ForCausalLM(config)


def lfm2():
    return Lfm2ForCausalLM(Lfm2Config(layer_types=["conv", "full_attention"] * 2, **SHAPE))


def moshi():
    shape = {name: value for name, value in SHAPE.items() if name not in ("intermediate_size", "eos_token_id")}
    config = MoshiConfig(**shape, ffn_dim=64, sliding_window=LIMIT, eos_token_id=None, tie_word_embeddings=False)
    return MoshiForCausalLM(config)


def git():
    vision = {name: BERT_SHAPE[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
    vision |= {"num_hidden_layers": 1, "image_size": 32, "patch_size": 16}
    return GitForCausalLM(GitConfig(**BERT_SHAPE, vision_config=vision))


def ready(make_target):
    target = make_target().eval()
    target.generation_config.pad_token_id = 0
    return target


@pytest.mark.parametrize(
    ("make_target", "message"),
    [
        (
            lambda: BertLMHeadModel(BertConfig(**BERT_SHAPE)),
            "BertLMHeadModel keeps no key-value cache.*is_decoder=True",
        ),
        (lambda: RobertaForCausalLM(RobertaConfig(**BERT_SHAPE)), "RobertaForCausalLM keeps no .*is_decoder=True"),
        (lambda: OpenAIGPTLMHeadModel(OpenAIGPTConfig(**GPT2_SHAPE)), "OpenAIGPTLMHeadModel keeps no key-value cache"),
        (lfm2, "Lfm2ForCausalLM.* must keep keys and values, got LinearAttentionLayer.*Pass no `assistant_model`"),
        (gemma4_with_shared_keys, "Gemma4ForCausalLM.* must keep keys and values, got DummyLayer"),
        (bidirectional_llama, "LlamaForCausalLM lets tokens see later ones.*Pass no `assistant_model`"),
    ],
    ids=["bert", "roberta", "openai-gpt", "lfm2", "gemma4-with-shared-keys", "bidirectional-llama"],
)
@pytest.mark.parametrize("top_k", [1, 3])
def test_targets_without_a_cache_or_a_direction_are_refused_by_name(make_target, message, top_k):
    target = ready(make_target)
    with pytest.raises(NotImplementedError, match=message):
        run(target, make_prompts([5]), assistant_model=set_tree(make_draft(target), 7, top_k))


def test_rounding_by_neighbours_is_forgiven_to_quantised_targets_only():
    refused = []
    for settings in None, {"load_in_8bit": True}:
        target = ready(TARGETS["llama"])
        target.config.quantization_config = settings
        target.lm_head.register_forward_hook(lambda _, __, logits: logits + 0.01 * logits.mean(dim=1, keepdim=True))
        try:
            chunks.check_chunks(target, DynamicCache(config=target.config))
        except NotImplementedError:
            refused.append(settings)
    assert refused == [None]


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("lengths", [[5], [5, 3]], ids=["one", "batch"])
def test_target_whose_layers_have_heads_of_two_sizes_is_drafted_for(lengths, top_k):
    target = ready(gemma4)
    draft = set_tree(make_draft(target), 7, top_k)
    assert draft.config.head_dim == 32 // 4
    for do_sample in False, True:
        assert_same_generation(target, draft, make_prompts(lengths), do_sample=do_sample)


@pytest.mark.parametrize("lengths", [[5], [5, 3]], ids=["one", "batch"])
def test_bert_as_a_decoder_is_drafted_for(lengths):
    target = ready(lambda: BertLMHeadModel(BertConfig(**BERT_SHAPE, is_decoder=True)))
    assert_same_generation(target, make_draft(target), make_prompts(lengths), do_sample=True)


def test_window_of_one_token_is_refused_by_name():
    target = ready(lambda: MistralForCausalLM(MistralConfig(sliding_window=1, **SHAPE)))
    with pytest.raises(
        NotImplementedError, match=r"`sliding_window` of MistralForCausalLM must be at least 2 .* got 1"
    ):
        run(target, make_prompts([5]), assistant_model=make_draft(target))
    target = ready(lambda: MistralForCausalLM(MistralConfig(sliding_window=2, **SHAPE)))
    assert_same_generation(target, make_draft(target), make_prompts([5]), do_sample=True)


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sample"])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("lengths", [[5], [6, 3]], ids=["one", "batch"])
@pytest.mark.parametrize("make_target", [deepseek_v32, doge, moshi])
def test_nothing_is_drafted_beyond_the_length_of_equal_chunks(make_target, lengths, top_k, do_sample):
    torch.manual_seed(0)
    target = ready(make_target)
    draft, prompt = set_tree(make_draft(target), 7, top_k), make_prompts(lengths)
    assert_same_generation(target, draft, prompt, do_sample=do_sample)
    stats = draft.speculation_stats
    num_alone = max(lengths) + MAX_NEW_TOKENS - LIMIT - 1
    assert set(stats.acceptance_lengths[-num_alone * len(lengths) :]) == {1}
    assert stats.drafted_nodes > 0


def test_log_says_once_where_drafting_stops(caplog):
    notices.warn_once.cache_clear()
    target = ready(moshi)
    draft = make_draft(target)
    run(target, make_prompts([5]), assistant_model=draft, max_new_tokens=LIMIT - 5)
    assert "Nothing is drafted there" not in caplog.text
    for _ in range(2):
        run(target, make_prompts([5]), assistant_model=draft, max_new_tokens=LIMIT)
    assert caplog.text.count("MoshiForCausalLM reads several tokens at once as one by one up to 16 tokens only") == 1


@pytest.mark.parametrize("top_k", [1, 3])
def test_target_that_reads_two_kinds_of_masks_otherwise_gets_chains(top_k):
    """GIT takes a 2D mask for that of a text behind an image: padded texts would part."""
    torch.manual_seed(0)
    target = ready(git)
    draft = set_tree(make_draft(target), 7, top_k)
    for do_sample in False, True:
        assert_same_generation(target, draft, make_prompts([6, 3]), do_sample=do_sample)
    assert not can_branch(target)


@pytest.mark.parametrize(
    "make_target",
    [
        lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attention_dropout=0.1)),
        lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SHAPE, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.1)),
    ],
    ids=["llama", "gpt2"],
)
def test_dropout_in_training_mode_is_refused_by_name(make_target):
    target = ready(make_target)
    draft, prompt = make_draft(target), make_prompts([5])
    assert_same_generation(target, draft, prompt, do_sample=True)
    target.train()
    state = torch.get_rng_state()
    with pytest.raises(NotImplementedError, match=r"training mode and draws random numbers.*Call `target.eval\(\)`"):
        target.generate(**prompt, max_new_tokens=9, assistant_model=draft)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("lengths", [[5], [5, 3]], ids=["one", "batch"])
def test_training_mode_without_dropout_gives_the_plain_text(lengths):
    target = ready(TARGETS["llama"]).train()
    for top_k in 1, 3:
        draft = set_tree(make_draft(target), 7, top_k)
        assert_same_generation(target, draft, make_prompts(lengths), do_sample=True)
