"""The head in the repository root: what a user gets who loads this repository."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from eagle3_mla.modeling_eagle3_mla import Eagle3MLADraftModel

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "examples" / "nano-target"
MAX_WEIGHT_BYTES = 12_000_000
REQUESTS = (
    "Write the Python function `is_empty(items)`.\n\nTrue if there are no items.",
    "Write the Python method `close(self)` of the class `Connection`.\n\nClose the socket and forget it.",
    "Write the Python function `flatten(items)`.\n\nYield the elements of a nested list one after the other.",
    "Write the Python method `__repr__(self)` of the class `Point`.",
)


@pytest.fixture(scope="module")
def target():
    return AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)


@pytest.fixture(scope="module")
def draft():
    return Eagle3MLADraftModel.from_pretrained(ROOT)


@pytest.fixture(scope="module")
def inputs():
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    chat = [{"role": "user", "content": REQUESTS[0]}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")


def test_root_is_a_complete_hub_repository():
    config = json.loads((ROOT / "config.json").read_text())
    assert config["model_type"] == "eagle3_mla"
    assert config["architectures"] == ["Eagle3MLADraftModel"]
    assert config["auto_map"]["AutoModel"] == "modeling_eagle3_mla.Eagle3MLADraftModel"
    assert (ROOT / "model.safetensors").stat().st_size <= MAX_WEIGHT_BYTES
    assert (ROOT / "README.md").read_text().startswith("---\n")


def test_released_head_belongs_to_the_nano_target(target, draft):
    draft.check_target(target)
    assert draft.config.attention_type == "mla"
    assert draft.config.mla_latent_dim == draft.config.num_key_value_heads * draft.config.head_dim // 4


@torch.no_grad()
def test_released_heads_cache_is_an_eighth_of_a_standard_heads(draft):
    cache = DynamicCache()
    rows = torch.randn(1, 5, draft.config.hidden_size), torch.randn(1, 5, 3 * draft.config.target_hidden_size)
    draft(*rows, past_key_values=cache)
    num_bytes = cache.layers[0].keys.nbytes + cache.layers[0].values.nbytes
    standard_bytes = 5 * 2 * draft.config.num_key_value_heads * draft.config.head_dim * 4
    assert num_bytes == 5 * draft.config.mla_latent_dim * 4
    assert standard_bytes == 8 * num_bytes


def test_released_head_speeds_up_the_count_and_keeps_the_text(target, draft, inputs):
    plain = target.generate(**inputs, max_new_tokens=64, do_sample=False)
    assisted = target.generate(**inputs, max_new_tokens=64, do_sample=False, assistant_model=draft)
    assert assisted.tolist() == plain.tolist()
    assert draft.speculation_stats.target_calls < draft.speculation_stats.new_tokens


def test_sampled_text_keeps_its_seed(target, draft, inputs):
    texts = []
    for assistance in {}, {"assistant_model": draft}:
        torch.manual_seed(11)
        texts.append(target.generate(**inputs, max_new_tokens=64, do_sample=True, **assistance).tolist())
    assert texts[0] == texts[1]


def test_released_head_is_accepted(target, draft):
    """A head whose weights were overwritten on loading still runs, at acceptance length 1.0."""
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    rounds = []
    for request in REQUESTS:
        chat = [{"role": "user", "content": request}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        target.generate(**inputs, max_new_tokens=64, do_sample=False, assistant_model=draft)
        rounds += draft.speculation_stats.acceptance_lengths
    assert sum(rounds) / len(rounds) > 2.5
