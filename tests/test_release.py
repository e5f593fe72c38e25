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


@pytest.fixture(scope="module")
def target():
    return AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)


@pytest.fixture(scope="module")
def draft():
    return Eagle3MLADraftModel.from_pretrained(ROOT)


@pytest.fixture(scope="module")
def inputs():
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    chat = [{"role": "user", "content": "Write the Python function `is_empty(items)`.\n\nTrue if there are no items."}]
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


@torch.no_grad()
def test_released_head_knows_more_than_chance(target, draft):
    """A head whose weights were overwritten on loading still runs, at acceptance 1.0."""
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    text = "def is_empty(self):\n    return len(self._items) == 0\n\ndef clear(self):\n    self._items.clear()\n"
    input_ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    captured = draft.capture_aux_hidden_states(target)
    with captured:
        choices = target(input_ids).logits.argmax(dim=-1)
    logits = draft(draft.embed(input_ids[:, 1:], target), captured.take()[:, :-1]).logits
    hits = draft.draft_to_target(logits.argmax(dim=-1)) == choices[:, 1:]
    assert hits.float().mean() > 0.3
