"""What several test files share: fixed seeds and a target small enough to check against enumeration."""

import os

# Tiny models are slower on several threads than on one, and much slower where the cores are shared. Before torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Triton kernels run in its interpreter. Before triton.
    os.environ["TRITON_INTERPRET"] = "1"

from transformers import LlamaConfig, LlamaForCausalLM

TINY_VOCAB_SIZE = 32


@pytest.fixture(autouse=True)
def fixed_seed():
    """Every test starts from the same state of torch's global generator."""
    torch.manual_seed(0)


@pytest.fixture
def own_dataset_cache(tmp_path, monkeypatch):
    """A cache of `datasets` for this test alone."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))


@pytest.fixture
def tiny_target() -> LlamaForCausalLM:
    """A random Llama of four layers in fp32, without an EOS token; its weights are large enough for clear choices."""
    config = LlamaConfig(
        vocab_size=TINY_VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()
