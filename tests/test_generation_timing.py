"""The seconds of a call: what is counted, that nothing waits for them, and that nothing stays behind on the models."""

import copy
import functools
import threading

import pytest
import torch
from reference_generation import TARGETS, make_draft, make_prompt

from eagle3_mla.generation import timing
from eagle3_mla.generation.metrics import SpeculationStats
from eagle3_mla.generation.timing import CallTimes, Stopwatch, time_forwards


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)


class FakeEvent:
    """A CUDA event whose time is the clock's, and that notes who waits for it."""

    num_waits = 0
    clock: Clock

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        self.time = self.clock.now

    def synchronize(self):
        FakeEvent.num_waits += 1

    def elapsed_time(self, other):
        return 1000 * (other.time - self.time)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def cuda_stopwatch(monkeypatch, clock):
    monkeypatch.setattr(FakeEvent, "clock", clock, raising=False)
    monkeypatch.setattr(FakeEvent, "num_waits", 0)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    return Stopwatch(torch.device("cuda", 0))


@pytest.fixture
def llama():
    return TARGETS["llama"]().eval()


def costing(model, clock: Clock, seconds: float):
    """Lets every forward of `model` take `seconds` of `clock`."""
    forward = model.forward

    @functools.wraps(forward)
    def slow_forward(*args, **kwargs):
        clock.now += seconds
        return forward(*args, **kwargs)

    model.forward = slow_forward
    return model


def test_stopwatch_adds_up(clock):
    stopwatch = Stopwatch()
    for seconds in (1.0, 2.5):
        with stopwatch:
            clock.now += seconds
        clock.now += 10.0
    assert stopwatch.seconds == 3.5


def test_nothing_waits_for_the_device_until_the_seconds_are_read(cuda_stopwatch, clock):
    for seconds in (1.0, 2.5):
        with cuda_stopwatch:
            clock.now += seconds
    assert FakeEvent.num_waits == 0
    assert cuda_stopwatch.seconds == cuda_stopwatch.seconds == 3.5
    assert FakeEvent.num_waits == 2


def test_copies_hold_the_seconds(cuda_stopwatch, clock):
    with cuda_stopwatch:
        clock.now += 2.0
    copied = copy.deepcopy(cuda_stopwatch)
    assert (copied.seconds, copied.unread) == (2.0, [])


def test_forwards_of_another_thread_are_not_counted(clock):
    stopwatch, model = Stopwatch(), costing(torch.nn.Identity(), clock, 1.0)
    hooks = time_forwards(model, stopwatch)
    other = threading.Thread(target=model, args=(0,))
    other.start()
    other.join()
    assert stopwatch.seconds == 0.0
    model(0)
    for hook in hooks:
        hook.remove()
    model(0)
    assert (clock.now, stopwatch.seconds) == (103.0, 1.0)


@pytest.mark.parametrize("top_k", [1, 2], ids=["chain", "tree"])
def test_forwards_of_a_call_are_told_apart(llama, clock, top_k):
    """Every forward costs a known time, so that the seconds are counts of forwards."""
    draft = costing(make_draft(llama), clock, 0.5)
    draft.generation_config.num_assistant_tokens = 3
    draft.generation_config.assistant_tree_top_k = top_k
    llama.generate(**make_prompt(5), max_new_tokens=2, assistant_model=draft)  # tries whether trees can be read
    costing(llama, clock, 8.0)
    llama.generate(**make_prompt(5), max_new_tokens=9, assistant_model=draft, prefill_chunk_size=2)
    stats = draft.speculation_stats
    assert stats.prefill_seconds == 3 * 8.0
    assert stats.target_seconds == stats.rounds * 8.0
    assert stats.draft_seconds == clock.now - 100.0 - stats.prefill_seconds - stats.target_seconds
    assert 0 < stats.draft_seconds <= 0.5 * 3 * stats.rounds
    assert stats.host_seconds == 0.0
    assert stats.round_seconds == stats.draft_seconds + stats.target_seconds


def test_what_is_neither_model_is_the_hosts(llama, clock):
    draft = make_draft(llama)

    class Slow:
        def put(self, value):
            clock.now += 3.0

        def end(self):
            clock.now += 100.0

    llama.generate(**make_prompt(5), max_new_tokens=9, assistant_model=draft, streamer=Slow())
    stats = draft.speculation_stats
    assert stats.host_seconds == stats.round_seconds == 3.0 * (stats.new_tokens - 1)


def test_times_are_up_to_date_while_the_call_goes_on(llama, clock):
    draft, seen = make_draft(llama), []
    costing(llama, clock, 1.0)

    class Reader:
        def put(self, value):
            if (stats := draft.speculation_stats) is not None:
                seen.append((stats.target_seconds, stats.round_seconds, stats.target_calls))

        def end(self):
            pass

    llama.generate(**make_prompt(5), max_new_tokens=9, assistant_model=draft, streamer=Reader())
    assert all(target == rounds == calls - 1 for target, rounds, calls in seen[1:])
    assert seen[-1][0] == draft.speculation_stats.target_seconds > 0


def test_models_are_left_without_hooks_also_after_an_error(llama):
    draft = make_draft(llama)

    class Failing:
        num_left = 3

        def put(self, value):
            self.num_left -= 1
            if self.num_left == 0:
                raise RuntimeError("full")

        def end(self):
            pass

    with pytest.raises(RuntimeError, match="full"):
        llama.generate(**make_prompt(5), max_new_tokens=9, assistant_model=draft, streamer=Failing())
    for model in (llama, draft):
        assert not model._forward_hooks
        assert not model._forward_pre_hooks
    assert draft.speculation_stats.round_seconds > 0


def test_statistics_name_the_seconds_and_can_be_copied(llama):
    draft = make_draft(llama)
    llama.generate(**make_prompt(5), max_new_tokens=9, assistant_model=draft)
    stats = draft.speculation_stats
    assert "draft_seconds=" in repr(stats)
    copied = copy.deepcopy(stats)
    assert copied == stats
    assert (copied.draft_seconds, copied.round_seconds) == (stats.draft_seconds, stats.round_seconds)


def test_statistics_print_what_a_reader_asks_first(llama, clock):
    draft = costing(make_draft(llama), clock, 0.5)
    costing(llama, clock, 8.0)
    llama.generate(**make_prompt(5), max_new_tokens=9, assistant_model=draft)
    stats = draft.speculation_stats
    shares = " ".join(f"{share:.2f}" for share in stats.acceptance_by_depth)
    assert str(stats).splitlines() == [
        f"{stats.rounds} rounds, acceptance length {8 / stats.rounds:.2f}, by depth: {shares}",
        f"9 new tokens in {stats.rounds + 1} calls of the target; "
        f"draft cache: {stats.draft_cache_bytes:,} bytes, {stats.draft_cache_tokens} positions in use",
        f"seconds: prefill 8.000, draft {stats.draft_seconds:.3f}, target {8 * stats.rounds}.000",
    ]


def test_statistics_of_a_call_without_rounds_can_be_printed():
    lines = str(SpeculationStats()).splitlines()
    assert lines[0] == "0 rounds, acceptance length 0.00, by depth: none"


def test_a_call_that_had_no_round_has_no_seconds():
    times = CallTimes()
    times.end()
    assert times.round_seconds == 0.0


@pytest.mark.gpu
def test_events_measure_the_work_on_the_device():
    stopwatch, matrix = Stopwatch(torch.device("cuda")), torch.randn(2048, 2048, device="cuda")
    with stopwatch:
        for _ in range(20):
            matrix @ matrix
    assert stopwatch.seconds > 20 * 2 * 2048**3 / 1e16
