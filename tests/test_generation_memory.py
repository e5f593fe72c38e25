"""The draft's memory: its cache, how a long prompt gets there, and how much of it there is at once."""

from itertools import accumulate

import pytest
import torch
from reference_benchmarks import ROOT
from reference_generation import TARGETS, VOCAB_SIZE, assert_same_generation, make_draft, make_prompts
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, LogitsProcessorList
from transformers.cache_utils import DynamicLayer

from eagle3_mla.generation import caches
from eagle3_mla.generation import memory as memories
from eagle3_mla.generation.caches import SPARE_POSITIONS, PreallocatedLayer, cache_bytes, keep_path, new_draft_cache
from eagle3_mla.generation.drafting import draft_tree
from eagle3_mla.generation.fixed_cache import FixedCache
from eagle3_mla.generation.memory import DraftMemory
from eagle3_mla.generation.shelf import capacities
from eagle3_mla.generation.support import TreePlan
from eagle3_mla.modeling_eagle3_mla import FusedStates

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


def peak_bytes(function) -> int:
    """The most memory that `function` had allocated at once, beyond what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = function()
    del result
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


class WrappedLinear(nn.Module):
    """As an adapter leaves it: what the module computes is not its `weight`."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.weight = base, base.weight

    def forward(self, states):
        return self.base(states) * 2


@torch.no_grad()
@pytest.mark.parametrize("wraps_fc", [False, True], ids=["fc", "wrapped-fc"])
@pytest.mark.parametrize("fc_norm", [False, True], ids=["", "fc_norm"])
@pytest.mark.parametrize("sizes", [[9], [2, 2, 3], [4, 9, 1]], ids=str)
def test_fused_states_are_what_fc_makes_of_all_three(llama, sizes, fc_norm, wraps_fc, monkeypatch):
    target = TARGETS["llama"]().eval().double()
    draft = make_draft(target, fc_norm=fc_norm).double()
    if wraps_fc:
        draft.fc = WrappedLinear(draft.fc)
    ids, cache = torch.randint(2, VOCAB_SIZE, (2, sum(sizes))), DynamicCache()
    captured, expected = draft.capture_fused_states(target), draft.capture_aux_hidden_states(target)
    with captured, expected:
        for part in ids.split(sizes, dim=1):
            target(part, past_key_values=cache)
            assert all(len(chunks) <= 1 for chunks in captured.chunks)  # chunked prefill does not pile them up
    expected, states = draft.fuse(expected.take()), captured.take()
    torch.testing.assert_close(states, expected, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(FusedStates, "max_unfused", 3)
    with captured:
        for part in ids.split(sizes, dim=1):
            target(part)
    by_parts = captured.take()
    with captured:
        for part in ids.split(sizes, dim=1):
            target(part)
    assert by_parts.shape == expected.shape
    if len(sizes) == 1:
        torch.testing.assert_close(by_parts, expected, rtol=1e-12, atol=1e-12)
        path = torch.tensor([[1, 4], [0, 8]])
        chosen = captured.take(path)
        assert torch.equal(chosen, by_parts.gather(1, path[..., None].expand_as(chosen)))


@torch.no_grad()
def test_states_of_a_path_are_those_rows(llama):
    draft, ids, path = make_draft(llama), torch.randint(2, VOCAB_SIZE, (2, 9)), torch.tensor([[1, 4], [0, 8]])
    captured = draft.capture_fused_states(llama)
    states = []
    for wanted in None, path:
        with captured:
            llama(ids)
        states.append(captured.take(wanted))
    torch.testing.assert_close(states[1], states[0].gather(1, path[..., None].expand(-1, -1, 32)))


def test_states_of_a_target_that_was_not_seen_running_are_refused_fused_too(llama):
    with pytest.raises(NotImplementedError, match=r"target.compile\(\)"):
        make_draft(llama).capture_fused_states(llama).take()


@torch.no_grad()
def test_long_prompt_never_holds_three_states_of_its_length(monkeypatch):
    """Beside what the target needs by itself: one fused state of the prompt, and parts of bounded length."""
    target, num_tokens = TARGETS["llama"]().eval(), 2048
    monkeypatch.setattr(FusedStates, "max_unfused", 64)
    draft, ids = make_draft(target), torch.randint(2, VOCAB_SIZE, (1, num_tokens))
    one_state = num_tokens * 32 * 4

    def read_and_take(captured):
        with captured:
            outputs = target(ids, logits_to_keep=1)
        return outputs.past_key_values, captured.take()

    alone = peak_bytes(lambda: target(ids, logits_to_keep=1).past_key_values)
    fused = peak_bytes(lambda: read_and_take(draft.capture_fused_states(target)))
    unfused = peak_bytes(lambda: read_and_take(draft.capture_aux_hidden_states(target)))
    assert fused - alone < 1.2 * one_state
    assert unfused - alone >= 2 * one_state  # the meter sees those that the target would have freed


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[2048], [2048, 1500]], ids=str)
def test_activations_of_the_draft_do_not_grow_with_the_prompt(llama, lengths, monkeypatch):
    draft = make_draft(llama, intermediate_size=2048)

    def peak(chunk_rows):
        monkeypatch.setattr(memories, "CHUNK_ROWS", chunk_rows)
        states, tokens = torch.randn(len(lengths), 2048, 32), torch.randint(2, VOCAB_SIZE, (len(lengths), 2048))
        memory = DraftMemory(states, tokens, list(lengths), [0] * len(lengths))
        return peak_bytes(lambda: memory.read(draft, llama))

    one_chunk = len(lengths) * 64 * 2048 * 4
    at_once, in_chunks = peak(2048), peak(64)
    assert at_once > 2 * 32 * one_chunk  # gate and up projections of all rows
    assert in_chunks < 0.15 * at_once


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("lengths", [[23], [23, 9, 16, 1]], ids=str)
def test_prompt_that_is_read_in_chunks_is_drafted_as_one_read_at_once(kind, lengths, monkeypatch):
    target = TARGETS["llama"]().eval().double()
    draft, plan = make_draft(target, **kind).double(), TreePlan(12, 4, 3, None)
    prompt = make_prompts([length + 1 for length in lengths])
    states, found = torch.randn(len(lengths), 23, 32).double(), []
    for chunk_rows in 2048, 5, 1:
        monkeypatch.setattr(memories, "CHUNK_ROWS", chunk_rows)
        memory = DraftMemory.of_prompt(states, prompt["input_ids"], prompt["attention_mask"])
        tree = draft_tree(draft, target, memory, plan, LogitsProcessorList(), None)
        assert (memory.num_rows, memory.num_pending) == (lengths, [0] * len(lengths))
        rows = [layer.keys[row, :, :length] for layer in memory.cache.layers for row, length in enumerate(lengths)]
        found.append((tree.token_ids, tree.parents, torch.cat(rows, dim=1)))
    for tokens, parents, rows in found[1:]:
        assert torch.equal(tokens, found[0][0])
        assert torch.equal(parents, found[0][1])
        torch.testing.assert_close(rows, found[0][2], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("settings", [{}, {"prefill_chunk_size": 7}], ids=str)
def test_text_after_a_long_prompt_is_that_of_plain_generation(llama, settings, monkeypatch):
    monkeypatch.setattr(memories, "CHUNK_ROWS", 4)
    monkeypatch.setattr(FusedStates, "max_unfused", 5)
    for lengths in [19], [19, 8, 13]:
        draft = make_draft(llama)
        assert_same_generation(llama, draft, make_prompts(lengths), do_sample=True, **settings)
        assert sum(draft.speculation_stats.accepted_by_depth) > 0


@pytest.mark.parametrize(
    ("num_heads", "widths", "megabytes"), [(1, (256, 0), 100.7), (8, (128, 128), 805.6)], ids=["mla", "gqa"]
)
def test_captured_rounds_keep_128k_tokens_in_what_the_readme_says(num_heads, widths, megabytes):
    """Shapes of the head of an 8B target, without memory behind them; trees of 60 nodes."""
    num_tokens, tree_size = 131072, 61
    like = new_draft_cache()
    like.update(*(torch.zeros(1, num_heads, 4, width, dtype=torch.bfloat16, device="meta") for width in widths), 0)
    capacity = next(each for each in capacities() if each >= num_tokens + 2 * tree_size)
    assert FixedCache(like, capacity + tree_size).num_bytes / 1e6 == pytest.approx(megabytes, abs=0.05)
    readme = (ROOT / "README.md").read_text()
    assert f"{capacity:,}" in readme
    assert f"{megabytes}" in readme
