"""Plain generation as the reference: tiny targets of many families, settings, and the comparison of two calls."""

from dataclasses import dataclass

import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from eagle3_mla.configuration_eagle3_mla import Eagle3MLAConfig
from eagle3_mla.modeling_eagle3_mla import Eagle3MLADraftModel

VOCAB_SIZE = 11
MAX_NEW_TOKENS = 20
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": 2,
}
GPT2_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": 2,
}
BLOOM_SHAPE = {name: GPT2_SHAPE[name] for name in GPT2_SHAPE if name not in ("n_embd", "n_positions")}
GPT_NEO_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_layers": 4,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 2]],
    "window_size": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": 2,
}
TARGETS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "mistral-window-8": lambda: MistralForCausalLM(MistralConfig(sliding_window=8, **SHAPE)),
    "gemma2-window-8": lambda: Gemma2ForCausalLM(Gemma2Config(sliding_window=8, **SHAPE)),
    "gemma3-window-8": lambda: Gemma3ForCausalLM(Gemma3TextConfig(sliding_window=8, **SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SHAPE)),
    "gpt-neo-window-8": lambda: GPTNeoForCausalLM(GPTNeoConfig(**GPT_NEO_SHAPE)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(hidden_size=32, **BLOOM_SHAPE)),
}
SETTINGS = {
    "greedy": {"do_sample": False},
    "greedy-processors": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    "greedy-min-new-tokens": {"do_sample": False, "min_new_tokens": 12, "eos_token_id": [1, 5, 7]},
    "sample": {"do_sample": True},
    "sample-warpers": {"do_sample": True, "temperature": 0.7, "top_k": 7, "top_p": 0.9, "min_p": 0.05},
    "sample-typical": {"do_sample": True, "typical_p": 0.8, "epsilon_cutoff": 0.02},
    "sample-processors": {"do_sample": True, "repetition_penalty": 1.2, "bad_words_ids": [[3], [4, 5]]},
    "sample-eos": {"do_sample": True, "eos_token_id": [1, 5, 7]},
    "sample-guidance": {"do_sample": True, "guidance_scale": 1.5},
}


def make_draft(target, **fields) -> Eagle3MLADraftModel:
    config = Eagle3MLAConfig.from_target(target.config, draft_vocab_size=10, initializer_range=0.2, **fields)
    draft = Eagle3MLADraftModel(config).eval()
    draft.set_draft_vocabulary(torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 9, 10]))
    return draft


def set_tree(draft, num_nodes: int, top_k: int, depth: int | None = None):
    draft.generation_config.num_assistant_tokens = num_nodes
    draft.generation_config.assistant_tree_top_k = top_k
    draft.generation_config.assistant_tree_depth = depth
    return draft


class CountingProcessor(LogitsProcessor):
    """Has a state: every third call forbids the best token of every sequence."""

    def __init__(self):
        self.num_calls = 0

    def __call__(self, input_ids, scores):
        self.num_calls += 1
        if self.num_calls % 3 == 0:
            scores = scores.scatter(-1, scores.argmax(dim=-1, keepdim=True), -float("inf"))
        return scores


@dataclass
class GivenNoise:
    """Stands for `Noise`: hands out given draws `(T, B, V)` in order."""

    draws: torch.Tensor
    num_spent: int = 0

    def peek(self, ahead: int) -> torch.Tensor:
        return self.draws[min(self.num_spent + ahead, len(self.draws) - 1)]

    def spend(self) -> torch.Tensor:
        self.num_spent += 1
        return self.draws[self.num_spent - 1]


def make_prompt(num_tokens: int, num_padding: int = 0) -> dict[str, torch.Tensor]:
    return make_prompts([num_tokens], num_padding)


def make_prompts(lengths: list[int], num_padding: int = 0) -> dict[str, torch.Tensor]:
    """Random sequences of these lengths, padded on the left to `num_padding` more than the longest."""
    input_ids = torch.randint(2, VOCAB_SIZE, (len(lengths), max(lengths) + num_padding))
    is_padding = torch.arange(input_ids.shape[1]) < input_ids.shape[1] - torch.tensor(lengths)[:, None]
    return {"input_ids": input_ids.masked_fill(is_padding, 0), "attention_mask": (~is_padding).long()}


def run(target, prompt, seed=0, **settings):
    torch.manual_seed(seed)
    outputs = target.generate(
        **prompt,
        **{"max_new_tokens": MAX_NEW_TOKENS, "return_dict_in_generate": True, **settings},
        output_scores=True,
        output_logits=True,
    )
    return outputs, torch.get_rng_state()


def assert_same_generation(target, draft, prompt, seed=0, **settings):
    """Texts, scores, logits, what the cache holds, and where the random generator stands."""
    plain, plain_state = run(target, prompt, seed, **settings)
    assisted, assisted_state = run(target, prompt, seed, assistant_model=draft, **settings)
    assert assisted.sequences.tolist() == plain.sequences.tolist()
    assert torch.equal(assisted_state, plain_state)
    new_tokens = plain.sequences[:, prompt["input_ids"].shape[1] :]
    assert draft.speculation_stats.new_tokens == num_emitted(new_tokens, settings.get("eos_token_id", []))
    assert len(assisted.scores) == len(assisted.logits) == new_tokens.shape[1]
    torch.testing.assert_close(torch.cat(assisted.scores), torch.cat(plain.scores), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(assisted.logits), torch.cat(plain.logits), rtol=1e-4, atol=1e-4)
    assert_same_cache(assisted.past_key_values, plain.past_key_values)
    assert assisted.past_key_values.get_seq_length() == plain.sequences.shape[1] - 1
    return assisted


def num_emitted(new_tokens: torch.Tensor, eos_token_ids: list[int]) -> int:
    """How many of `new_tokens (B, T)` are not padding after an end of sequence."""
    is_end = torch.isin(new_tokens, new_tokens.new_tensor(eos_token_ids))
    return int((is_end.cumsum(dim=1) - is_end.long() == 0).sum())


def assert_same_cache(cache, expected, tolerance: float = 1e-3) -> None:
    assert [type(layer) for layer in cache.layers] == [type(layer) for layer in expected.layers]
    for layer, expected_layer in zip(cache.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.keys, expected_layer.keys, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(layer.values, expected_layer.values, rtol=tolerance, atol=tolerance)
        assert layer.get_seq_length() == expected_layer.get_seq_length()
