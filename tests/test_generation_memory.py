"""The draft's memory: its cache."""

import pytest
import torch
from reference_generation import TARGETS, assert_same_generation, make_draft, make_prompts
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from eagle3_mla.generation import caches
from eagle3_mla.generation.caches import SPARE_POSITIONS, PreallocatedLayer, cache_bytes, keep_path, new_draft_cache

KINDS = [{}, {"mla_rope_dim": 4}, {"attention_type": "gqa"}, {"num_hidden_layers": 2}]


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return TARGETS["llama"]().eval()


def assert_equal(cache, expected) -> None:
    for layer, expected_layer in zip(cache.layers, expected.layers, strict=True):
        assert torch.equal(layer.keys, expected_layer.keys)
        assert torch.equal(layer.values, expected_layer.values)
        assert layer.get_seq_length() == expected_layer.get_seq_length()
        assert layer.get_mask_sizes(3) == expected_layer.get_mask_sizes(3)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_cache_holds_what_a_concatenating_one_holds(kind, batch_size):
    """Rows come, are moved and are dropped as in rounds, over several sizes of the buffer."""
    num_heads, key_width, value_width = (2, 8, 8) if "attention_type" in kind else (1, 4, kind.get("mla_rope_dim", 0))
    cache, expected = new_draft_cache(), DynamicCache()
    generator = torch.Generator().manual_seed(0)
    for num_new in [7, *[60] * 20, 1, 900, 1, 5, 0, 1]:
        for layer in range(kind.get("num_hidden_layers", 1)):
            keys = torch.randn(batch_size, num_heads, num_new, key_width, generator=generator)
            values = torch.randn(batch_size, num_heads, num_new, value_width, generator=generator)
            for each in cache, expected:
                each.update(keys, values, layer)
        assert_equal(cache, expected)
        if num_new == 60:
            path = torch.randint(60, (batch_size, 40), generator=generator).sort(dim=1).values
            lengths = [cache.get_seq_length() - 60 - row for row in range(batch_size)]
            for each in cache, expected:
                keep_path(each, 60, path, lengths, [40 - row for row in range(batch_size)])
            assert_equal(cache, expected)
    num_rows = cache.get_seq_length()
    width = num_heads * (key_width + value_width) * len(cache.layers) * batch_size * 4
    assert num_rows * width <= cache_bytes(cache) <= (num_rows * 1.25 + SPARE_POSITIONS) * width
    for layer in cache.layers:
        assert layer.keys.shape[2] == num_rows


def test_new_rows_are_written_where_there_is_room():
    layer = PreallocatedLayer()
    layer.update(torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 0))
    buffer = layer.keys.untyped_storage().data_ptr()
    for _ in range(SPARE_POSITIONS):
        layer.update(torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 0))
    assert layer.keys.untyped_storage().data_ptr() == buffer
    layer.update(torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 0))
    assert layer.keys.untyped_storage().data_ptr() != buffer
    assert layer.num_bytes == (6 + 2 * SPARE_POSITIONS) * 4 * 4


def test_selecting_sequences_leaves_the_others_alone():
    layer, keys = PreallocatedLayer(), torch.randn(3, 1, 5, 4)
    layer.update(keys, keys)
    layer.batch_select_indices(torch.tensor([2, 0]))
    layer.update(torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 4))
    assert torch.equal(layer.keys[:, :, :5], keys[[2, 0]])
    assert layer.keys[:, :, 5].eq(1).all()
    layer.reset()
    assert layer.get_seq_length() == layer.num_bytes == 0
    layer.update(keys, keys)
    assert torch.equal(layer.keys, keys)


class ConcatenatingLayer(DynamicLayer):
    """The stock layer, asked for its size."""

    num_bytes = 0


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("lengths", [[270], [9, 5, 2]], ids=str)
def test_drafted_rows_are_those_of_a_concatenating_cache(llama, kind, lengths, monkeypatch):
    """Bit for bit: views of a buffer must not lead to kernels that round otherwise."""
    draft, prompt, logits = make_draft(llama, **kind), make_prompts(lengths), []
    draft.generation_config.num_assistant_tokens, draft.generation_config.assistant_tree_top_k = 12, 3
    for layer in PreallocatedLayer, ConcatenatingLayer:
        monkeypatch.setattr(caches, "PreallocatedLayer", layer)
        logits.append([])
        hook = draft.register_forward_hook(lambda draft, inputs, outputs: logits[-1].append(outputs.logits))
        assert_same_generation(llama, draft, prompt, max_new_tokens=20, do_sample=True)
        hook.remove()
    assert len(logits[0]) == len(logits[1]) > 10
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*logits, strict=True))
