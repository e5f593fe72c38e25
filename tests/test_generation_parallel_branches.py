"""Two branches of the draft's attention: who runs where and waits for whom, and the same bits whichever is slower."""

import threading
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from captured_layers import BIG, KINDS, PAUSE, SMALL, assert_same_bits_without, captured_rounds, make_layers
from fake_streams import FakeStreams
from reference_generation import TARGETS, make_draft, make_prompts, set_tree

from eagle3_mla.generation import fused_target, parallel_branches
from eagle3_mla.generation.fused_target import fused_draft_operations
from eagle3_mla.modeling_eagle3_mla import (
    Eagle3MLADecoderLayer,
    GroupedQueryAttention,
    LatentAttention,
)


@pytest.fixture
def log(monkeypatch) -> list[str]:
    """What happens on which stream."""
    streams = FakeStreams(monkeypatch)

    def logged(name, method, *given, **others):
        streams.note(name)
        return method(*given, **others)

    for kind in LatentAttention, GroupedQueryAttention:
        for name in parallel_branches.METHODS:
            watched = partial(logged, name, getattr(kind, name))
            monkeypatch.setattr(kind, name, lambda *given, watched=watched, **others: watched(*given, **others))
    return streams.log


def lines_of_layer(number: int) -> list[str]:
    return [
        f"current records event {number}",
        "ask on current",
        f"side 0 waits for event {number}",
        "remember on side 0",
        "current waits for side 0",
    ]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_memory_is_computed_on_the_side_between_fork_and_join(kind, log):
    draft = make_layers(kind, SMALL, num_layers=2)
    rows = torch.randn(1, 3, 32)
    expected = draft(rows, fused_states=rows)
    log.clear()
    with parallel_branches.parallel_branches(draft):
        found = draft(rows, fused_states=rows)
    assert log == [*lines_of_layer(1), *lines_of_layer(2)]
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.states, expected.states)


@torch.no_grad()
def test_branches_join_after_an_error_too(log, monkeypatch):
    """A graph with a loose branch cannot be ended, which would hide what went wrong: a shortage of memory, say."""

    def fail(*given, **others):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(LatentAttention, "remember", fail)
    draft, rows = make_layers("R64", SMALL), torch.randn(1, 3, 32)
    with parallel_branches.parallel_branches(draft), pytest.raises(torch.OutOfMemoryError, match="no room"):
        draft(rows, fused_states=rows)
    assert log[-1] == "current waits for side 0"


def plain_calls(draft) -> list[str]:
    return ["ask on current", "remember on current"] * len(draft.layers)


@torch.no_grad()
def test_compilers_get_one_branch(log, monkeypatch):
    draft, rows = make_layers("R64", SMALL), torch.randn(1, 3, 32)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with parallel_branches.parallel_branches(draft):
        draft(rows, fused_states=rows)
    assert log == plain_calls(draft)


@torch.no_grad()
def test_other_threads_have_one_branch_and_leave_the_fork_of_this_one(log):
    draft, rows = make_layers("R64", SMALL), torch.randn(1, 3, 32)
    attention, cos_sin = draft.layers[0].self_attn, draft.rotary_emb(torch.arange(3)[None], rows.dtype)
    attention_input = draft.layers[0].attention_input(rows, rows)
    with parallel_branches.parallel_branches(draft):
        attention.ask(attention_input, cos_sin)
        log.clear()
        for call in (lambda: draft(rows, fused_states=rows), lambda: attention.remember(attention_input, cos_sin)):
            thread = threading.Thread(target=torch.no_grad()(call))
            thread.start()
            thread.join()
        assert log == [*plain_calls(draft), "remember on current"]
        log.clear()
        attention.remember(attention_input, cos_sin)
    assert "remember on side 0" in log


@torch.no_grad()
def test_memory_of_other_rows_than_those_that_asked_is_computed_in_line(log):
    """They may have been made after the fork, for which alone the side stream would wait."""
    draft, rows = make_layers("R64", SMALL), torch.randn(1, 3, 32)
    attention, cos_sin = draft.layers[0].self_attn, draft.rotary_emb(torch.arange(3)[None], rows.dtype)
    attention_input = draft.layers[0].attention_input(rows, rows)
    with parallel_branches.parallel_branches(draft):
        for given in (attention_input.clone(), cos_sin), (attention_input, tuple(part.clone() for part in cos_sin)):
            attention.ask(attention_input, cos_sin)
            attention.remember(*given)
        attention.remember(attention_input, cos_sin)
    assert "remember on side 0" not in log
    assert log.count("remember on current") == 3


def test_own_methods_are_back_after_an_error():
    draft = make_layers("R64", SMALL, num_layers=2)
    first, second = (layer.self_attn for layer in draft.layers)
    second.ask = own = partial(LatentAttention.ask, second)

    def fail() -> None:
        with parallel_branches.parallel_branches(draft):
            assert {"ask", "remember"} <= vars(first).keys() & vars(second).keys()
            assert second.ask is not own
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not {"ask", "remember"} & vars(first).keys()
    assert second.ask is own
    assert "remember" not in vars(second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_branches_are_among_the_fused_operations_and_gone_behind_them(dtype):
    """RoPE replaces the same methods before."""
    draft = make_layers("R64", SMALL).to(dtype)
    attention = draft.layers[0].self_attn
    with fused_draft_operations(draft):
        for name in parallel_branches.METHODS:
            assert isinstance(getattr(attention, name).__self__, parallel_branches.Branches)
    assert not {"ask", "remember"} & vars(attention).keys()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_nothing_changes_on_the_cpu_nor_for_a_compiled_layer(kind):
    draft, rows = make_layers(kind, SMALL), torch.randn(2, 3, 32)
    compiled = torch.compile(draft.layers[0], backend="eager", fullgraph=True)
    cos_sin = draft.rotary_emb(torch.arange(3)[None], rows.dtype)
    inputs = {"cos_sin": cos_sin, "key_cos_sin": cos_sin, "mask": None}
    expected = draft.layers[0](rows, rows, **inputs)
    with parallel_branches.parallel_branches(draft):
        assert torch.equal(draft.layers[0](rows, rows, **inputs), expected)
        assert torch.equal(compiled(rows, rows, **inputs), expected)


def one_branch(monkeypatch) -> None:
    monkeypatch.setattr(fused_target, "parallel_branches", lambda draft: nullcontext())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_captured_branches_give_the_same_bits_in_every_replay(kind, monkeypatch):
    draft = make_layers(kind, BIG, num_layers=2).cuda().bfloat16()
    assert_same_bits_without(partial(one_branch, monkeypatch), draft)


@pytest.mark.gpu
@pytest.mark.parametrize("slow", ["attention_input", "ask", "remember", "output"])
@pytest.mark.parametrize("kind", KINDS)
def test_branches_wait_for_each_other_whichever_is_slow(kind, slow, monkeypatch):
    """Before and behind each part: what it reads may not be there yet, or what others read overwritten too early."""
    draft = make_layers(kind, BIG, num_layers=2).cuda().bfloat16()
    with monkeypatch.context() as patch, fused_draft_operations(draft):
        one_branch(patch)
        expected = captured_rounds(draft, 3)
    owner = Eagle3MLADecoderLayer if slow == "attention_input" else type(draft.layers[0].self_attn)
    method = getattr(owner, slow)

    def slowed(*given, **others):
        torch.cuda._sleep(PAUSE)
        result = method(*given, **others)
        torch.cuda._sleep(PAUSE)
        return result

    monkeypatch.setattr(owner, slow, slowed)
    with fused_draft_operations(draft):
        assert all(map(torch.equal, captured_rounds(draft, 3), expected))


@pytest.fixture
def places(monkeypatch) -> list[bool]:
    """Whether the draft remembered on the side stream, and that was being recorded."""
    seen: list[bool] = []

    def watched(method, *given, **others):
        device = given[1].device
        on_side = torch.cuda.current_stream(device) == parallel_branches.side_stream(device)
        seen.append(on_side and torch.cuda.is_current_stream_capturing())
        return method(*given, **others)

    for kind in LatentAttention, GroupedQueryAttention:
        method = partial(watched, kind.remember)
        monkeypatch.setattr(kind, "remember", lambda *given, method=method, **others: method(*given, **others))
    return seen


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [{}, {"mla_rope_dim": 4}, {"attention_type": "gqa"}], ids=str)
def test_captured_rounds_have_two_branches_and_the_texts_of_one(kind, places, monkeypatch):
    target = TARGETS["llama"]().eval().cuda().bfloat16()
    prompt = {name: tensor.cuda() for name, tensor in make_prompts([9, 5]).items()}
    settings = {**prompt, "max_new_tokens": 100, "do_sample": False}
    texts, acceptances, have_two = [], [], []
    for has_two in True, False:
        if not has_two:
            one_branch(monkeypatch)
        torch.manual_seed(0)
        draft = set_tree(make_draft(target, **kind), 8, 3, 3).cuda().bfloat16()  # with graphs of its own
        places.clear()
        texts.append(target.generate(**settings, assistant_model=draft).tolist())
        acceptances.append(draft.speculation_stats.acceptance_lengths)
        have_two.append(any(places))
    assert texts[0] == texts[1]
    assert acceptances[0] == acceptances[1]
    assert have_two == [True, False]


@pytest.mark.gpu
@torch.no_grad()
def test_recording_that_breaks_off_on_the_side_leaves_both_streams_usable(monkeypatch):
    draft = make_layers("R64", BIG).cuda().bfloat16()
    stream, remember = torch.cuda.current_stream(), LatentAttention.remember
    with monkeypatch.context() as patch, fused_draft_operations(draft):
        one_branch(patch)
        expected = captured_rounds(draft, 3)

    def asking(*given, **others):
        memory = remember(*given, **others)
        memory[0].sum().item()
        return memory

    monkeypatch.setattr(LatentAttention, "remember", asking)
    with pytest.raises(RuntimeError, match="captur"), fused_draft_operations(draft):
        captured_rounds(draft, 1)
    assert torch.cuda.current_stream() == stream
    monkeypatch.setattr(LatentAttention, "remember", remember)
    with fused_draft_operations(draft):
        assert all(map(torch.equal, captured_rounds(draft, 3), expected))
