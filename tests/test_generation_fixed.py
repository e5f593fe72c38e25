"""Decoding at fixed shapes: text, random state, cache, stream, scores and statistics are those of the other loop."""

import gc
import threading
import weakref
from collections import OrderedDict
from contextlib import nullcontext
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from reference_generation import (
    GPT2_SHAPE,
    SETTINGS,
    TARGETS,
    CountingProcessor,
    assert_same_cache,
    assert_same_generation,
    make_draft,
    make_prompt,
    make_prompts,
    set_tree,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DynamicCache,
    EtaLogitsWarper,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
)
from transformers.cache_utils import DynamicLayer

from eagle3_mla.generation import capture, fixed_rounds, obstacles, ragged, runtime, shelf, turns
from eagle3_mla.generation.drafting import draft_tree
from eagle3_mla.generation.fixed_cache import FixedCache
from eagle3_mla.generation.fixed_memory import FixedMemory
from eagle3_mla.generation.memory import DraftMemory
from eagle3_mla.generation.modules import modules_of
from eagle3_mla.generation.prefill import is_padded_left
from eagle3_mla.generation.support import TreePlan

SHAPES = {"chain": (5, 1, 5), "tree": (12, 3, 4)}
PROMPTS = {"alone": ([9], 2), "batch": ([12, 5, 9], 0)}
CELLS = ["greedy", "greedy-processors", "greedy-min-new-tokens", "sample", "sample-warpers", "sample-eos"]
BRANCHING = [name for name in TARGETS if name not in ("bloom", "gpt-neo-window-8")]


def make_fixed(target, shape: str = "tree", **fields):
    """A draft that decodes at fixed shapes, on the CPU, too."""
    draft = set_tree(make_draft(target, **fields), *SHAPES[shape])
    draft.generation_config.fixed_shapes = True
    return draft


@pytest.fixture
def ways(monkeypatch) -> list[str]:
    """Who chose in the calls of a test at fixed shapes: `host` or `device`."""
    seen = []
    for name, way in {"choose_on_the_host": "host", "follow_the_device": "device"}.items():
        original = getattr(runtime, name)
        new = partial(lambda way, original, *arguments: seen.append(way) or original(*arguments), way, original)
        monkeypatch.setattr(runtime, name, new)
    return seen


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return TARGETS["llama"]().eval()


def call(target, prompt, seed=0, **settings):
    """Without scores, so that the device may choose; `(text, cache, random state)`."""
    torch.manual_seed(seed)
    outputs = target.generate(**prompt, **{"max_new_tokens": 16, "return_dict_in_generate": True, **settings})
    return outputs.sequences.tolist(), outputs.past_key_values, torch.get_rng_state()


def assert_same_call(target, draft, prompt, seed=0, **settings) -> list[list[int]]:
    """As `assert_same_generation`, without scores."""
    text, cache, state = call(target, prompt, seed, **settings)
    assisted, assisted_cache, assisted_state = call(target, prompt, seed, assistant_model=draft, **settings)
    assert assisted == text
    assert torch.equal(assisted_state, state)
    assert_same_cache(assisted_cache, cache)
    assert assisted_cache.get_seq_length() == len(text[0]) - 1
    return text


def assert_same_calls(name: str, setting: str, shapes_and_prompts, ways: list[str]) -> None:
    target, num_accepted = TARGETS[name]().eval(), 0
    for seed, (shape, prompts) in enumerate(shapes_and_prompts):
        draft = make_fixed(target, shape)
        assert_same_call(target, draft, make_prompts(*PROMPTS[prompts]), seed, **SETTINGS[setting])
        num_accepted += sum(draft.speculation_stats.accepted_by_depth)
    assert num_accepted > 0
    assert set(ways) == {"host" if "processors" in setting or "min-new" in setting else "device"}


@pytest.mark.parametrize("setting", CELLS)
def test_text_is_that_of_plain_generation(setting, ways):
    assert_same_calls("llama", setting, product(SHAPES, PROMPTS), ways)


@pytest.mark.parametrize("setting", ["greedy", "sample-eos"])
@pytest.mark.parametrize("name", [name for name in BRANCHING if name != "llama"])
def test_text_of_every_family_is_that_of_plain_generation(name, setting, ways):
    assert_same_calls(name, setting, [("tree", "batch"), ("chain", "batch")], ways)


@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("setting", ["greedy", "sample-processors", "sample"])
def test_scores_and_logits_are_those_of_plain_generation(llama, setting, prompts, ways):
    draft, prompt = make_fixed(llama), make_prompts(*PROMPTS[prompts])
    assert_same_generation(llama, draft, prompt, max_new_tokens=20, **SETTINGS[setting])
    assert ways == ["host"]


@pytest.mark.parametrize(
    "fields",
    [
        {"mla_rope_dim": 4},
        {"mla_rope_dim": 4, "mla_q_lora_rank": 8},
        {"attention_type": "gqa"},
        {"num_hidden_layers": 2},
        {"hidden_size": 16},
        {"fc_norm": True, "norm_output": True},
    ],
    ids=str,
)
def test_every_kind_of_head_gives_the_plain_text(llama, fields, ways):
    for settings in SETTINGS["greedy"], SETTINGS["sample-warpers"]:
        assert_same_call(llama, make_fixed(llama, **fields), make_prompts([7, 4]), **settings)
    assert ways == ["device"] * 2


@pytest.mark.parametrize("setting", ["greedy", "greedy-processors", "sample"])
def test_buffers_grow_in_the_middle_of_a_text(llama, setting, monkeypatch, ways):
    monkeypatch.setattr(shelf, "LEAST_CAPACITY", 16)
    sizes, new = [], shelf.TextBuffers.__init__

    def watched(self, *arguments):
        new(self, *arguments)
        sizes.append(self.capacity)

    monkeypatch.setattr(shelf.TextBuffers, "__init__", watched)
    prompt = make_prompts([3, 7])
    assert_same_call(llama, make_fixed(llama), prompt, max_new_tokens=60, **SETTINGS[setting])
    assert sizes == sorted(set(sizes))
    assert len(sizes) >= 3


@pytest.mark.parametrize("name", ["llama", "gemma3-window-8"])
@pytest.mark.parametrize("setting", ["greedy", "greedy-processors", "sample"])
@pytest.mark.parametrize("prompts", PROMPTS)
def test_text_goes_on_where_there_is_no_memory_for_longer_buffers(name, setting, prompts, monkeypatch, caplog, ways):
    monkeypatch.setattr(obstacles, "_reasons_given", set())
    monkeypatch.setattr(shelf, "LEAST_CAPACITY", 64)
    new = shelf.Shelf._new

    def new_if_small(self, capacity):
        if capacity > 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return new(self, capacity)

    monkeypatch.setattr(shelf.Shelf, "_new", new_if_small)
    target = TARGETS[name]().eval().double()
    prompt, settings = make_prompts(*PROMPTS[prompts]), SETTINGS[setting] | {"max_new_tokens": 60}
    draft, lengths = make_fixed(target).double(), []
    for wanted in True, False:
        draft.generation_config.fixed_shapes = wanted
        assert len(assert_same_call(target, draft, prompt, **settings)[0]) > 64
        lengths.append(draft.speculation_stats.acceptance_lengths)
    assert lengths[0] == lengths[1]
    draft.generation_config.fixed_shapes, streams = True, []
    for assistance in [{}, {"assistant_model": draft}] if prompts == "alone" else []:
        streamer = Recorder()
        call(target, prompt, streamer=streamer, **settings, **assistance)
        streams.append(streamer.pieces)
    assert streams[:1] == streams[1:]
    assert set(ways) == {"host" if "processors" in setting else "device"}
    assert [message.split(": ")[1] for message in caplog.messages if "not captured" in message] == [
        "the device has no memory for 96 slots a sequence."
    ]


@pytest.mark.parametrize("setting", ["greedy", "greedy-processors", "sample"])
@pytest.mark.parametrize("prompts", PROMPTS)
def test_text_goes_on_in_the_other_loop_where_there_is_no_memory_for_its_graphs(
    setting, prompts, monkeypatch, caplog, ways
):
    """Uncaptured rounds would take more of it."""

    def capture_if_small(rounds, fuses, compile_config):
        if rounds.buffers.capacity > 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        captured.append(rounds)

    captured, recorded, record = [], set(), runtime.record_round
    monkeypatch.setattr(runtime, "record_round", lambda *given: (recorded.add(given[2]), record(*given)))
    monkeypatch.setattr(obstacles, "_reasons_given", set())
    monkeypatch.setattr(shelf, "LEAST_CAPACITY", 64)
    monkeypatch.setattr(shelf, "can_capture", lambda device: True)
    monkeypatch.setattr(shelf, "memory_of", lambda device: 2**40)
    monkeypatch.setattr(fixed_rounds.FixedRounds, "capture", capture_if_small)
    target = TARGETS["llama"]().eval().double()
    prompt, draft = make_prompts(*PROMPTS[prompts]), make_fixed(target).double()
    assert len(assert_same_call(target, draft, prompt, **SETTINGS[setting] | {"max_new_tokens": 60})[0]) > 64
    assert recorded
    assert recorded <= set(captured)
    assert ways == ["host" if "processors" in setting else "device"]
    assert [message.split(": ", 1)[1] for message in caplog.messages if "not captured" in message] == [
        "OutOfMemoryError: CUDA out of memory."
    ]


@pytest.fixture
def is_alone(monkeypatch) -> list[bool]:
    """Of a device with no room for a text beside its buffers: whether layers that come back to it found them gone."""
    give_back, new, made, is_alone = FixedCache.give_back, shelf.Shelf._new, [], []

    def watched(self, capacity):
        buffers = new(self, capacity)
        made.append(weakref.ref(buffers.cache))
        return buffers

    def give_back_elsewhere(self, cache, num_tokens, num_least=None, device=None):
        if device is None:
            cache.layers[0].keys = torch.empty(0)
            raise torch.OutOfMemoryError("CUDA out of memory")
        give_back(self, cache, num_tokens, num_least, device)

    monkeypatch.setattr(shelf, "LEAST_CAPACITY", 64)
    monkeypatch.setattr(shelf, "can_capture", lambda device: True)
    monkeypatch.setattr(shelf, "memory_of", lambda device: 2**40)
    monkeypatch.setattr(fixed_rounds.FixedRounds, "capture", lambda *given: None)
    monkeypatch.setattr(shelf.Shelf, "_new", watched)
    monkeypatch.setattr(FixedCache, "give_back", give_back_elsewhere)
    monkeypatch.setattr(DynamicLayer, "prefetch", lambda layer: is_alone.append(made[-1]() is None))
    return is_alone


@pytest.mark.parametrize("name", ["llama", "gemma3-window-8"])
@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("most_slots", [64, 128], ids=["text-outgrows-buffers", "text-fits"])
def test_cache_is_given_back_where_there_is_no_memory_for_it_beside_its_buffers(
    name, prompts, most_slots, monkeypatch, ways, is_alone
):
    new = shelf.Shelf._new

    def new_if_small(self, capacity):
        if capacity > most_slots:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return new(self, capacity)

    monkeypatch.setattr(shelf.Shelf, "_new", new_if_small)
    target = TARGETS[name]().eval().double()
    draft, prompt = make_fixed(target).double(), make_prompts(*PROMPTS[prompts])
    for _ in range(2):
        assert_same_call(target, draft, prompt, do_sample=False, max_new_tokens=60)
        assert not any(shelf._kept[target.device].values())  # shorter buffers of the same text included
    assert ways == ["device"] * 2
    assert is_alone == [True] * 2 * target.config.num_hidden_layers


def test_cache_of_a_broken_call_is_given_back_where_there_is_no_memory_for_it_beside_its_buffers(llama, is_alone):
    prompt, draft, cache = make_prompt(6), make_fixed(llama), DynamicCache(config=llama.config)
    _, plain, _ = call(llama, prompt, do_sample=False)
    settings = {"streamer": Recorder(fails_at=9), "past_key_values": cache, "do_sample": False}
    with pytest.raises(ZeroDivisionError):
        call(llama, prompt, assistant_model=draft, **settings)
    assert len(is_alone) == len(cache.layers)
    assert cache.get_seq_length() > 6
    plain.crop(cache.get_seq_length() - plain.get_seq_length())
    assert_same_cache(cache, plain)


def test_cache_comes_back_to_a_device_that_was_full_in_the_middle_of_a_round(llama, is_alone, monkeypatch):
    def fail(*given) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(runtime, "record_round", fail)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        call(llama, make_prompt(6), assistant_model=make_fixed(llama), do_sample=False)
    assert is_alone == [True] * llama.config.num_hidden_layers


def test_prompt_may_be_longer_than_the_least_capacity(llama, monkeypatch):
    monkeypatch.setattr(shelf, "LEAST_CAPACITY", 8)
    assert_same_call(llama, make_fixed(llama), make_prompts([50, 33]), do_sample=False)


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 8])
@pytest.mark.parametrize("setting", ["greedy-processors", "sample"])
def test_length_limit_cuts_inside_a_round(llama, max_new_tokens, setting):
    text = assert_same_call(
        llama, make_fixed(llama), make_prompts([5, 2]), max_new_tokens=max_new_tokens, **SETTINGS[setting]
    )
    assert len(text[0]) == 5 + max_new_tokens


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sample"])
def test_learned_positions_may_be_used_up_to_the_last_one(do_sample):
    target = GPT2LMHeadModel(GPT2Config(**GPT2_SHAPE | {"n_positions": 24})).eval()
    for shape, prompt in product(SHAPES, (make_prompt(9), make_prompts([9, 4]))):
        text = assert_same_call(target, make_fixed(target, shape), prompt, max_new_tokens=15, do_sample=do_sample)
        assert len(text[0]) == 24


@pytest.mark.parametrize("max_lead", [1, 2])
def test_sequences_that_may_not_run_ahead_get_their_text(llama, max_lead, monkeypatch):
    """Some get no token in a round: nothing new is pending for them, and their roots stay."""
    for module in ragged, fixed_rounds:
        monkeypatch.setattr(module, "MAX_LEAD", max_lead)
    for seed in range(2):
        assert_same_call(llama, make_fixed(llama), make_prompts([5, 2, 4]), seed, do_sample=True)


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sample"])
def test_padding_may_be_an_end_of_sequence(llama, do_sample):
    prompt = make_prompts([5, 2, 4])
    plain = call(llama, prompt, do_sample=do_sample)[0]
    token = plain[0][7]
    settings = {"do_sample": do_sample, "eos_token_id": [token, 1], "pad_token_id": token}
    assert_same_call(llama, make_fixed(llama), prompt, **settings)
    tensor = torch.tensor([token, 1])
    assert_same_call(llama, make_fixed(llama), prompt, do_sample=do_sample, eos_token_id=tensor)


@pytest.mark.parametrize("mask", [[1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1]], ids=str)
def test_mask_of_any_form_gives_the_plain_text(llama, mask):
    prompt = {"input_ids": make_prompt(6)["input_ids"], "attention_mask": torch.tensor([mask])}
    assert_same_call(llama, make_fixed(llama), prompt, do_sample=False)


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32], ids=str)
def test_padding_is_on_the_left_whatever_the_type_of_the_mask(dtype):
    """Kernels that ask for nothing but the first token of a sequence must not be told of another padding."""
    masks = {(1, 1, 1, 1): True, (0, 0, 1, 1): True, (1, 0, 1, 1): False, (1, 1, 1, 0): False, (0, 0, 0, 0): False}
    for mask, is_left in masks.items():
        assert is_padded_left(torch.tensor([mask], dtype=dtype)) == is_left
    assert is_padded_left(None)


def test_sequences_without_limit_of_time_end_where_time_ends(llama):
    for settings in {"max_time": 1e6}, {"max_time": -1.0}:
        assert_same_call(llama, make_fixed(llama), make_prompts([5, 3]), do_sample=False, **settings)


class StopAtToken(StoppingCriteria):
    def __init__(self, token: int):
        self.token, self.lengths = token, []

    def __call__(self, input_ids, scores, **kwargs):
        self.lengths.append(input_ids.shape[1])
        return input_ids[:, -1] == self.token


@pytest.mark.parametrize("lengths", [[6], [6, 4]], ids=str)
def test_own_processors_and_criteria_see_plain_generations_calls(llama, lengths, ways):
    prompt, calls = make_prompts(lengths), []
    for assistance in {}, {"assistant_model": make_fixed(llama)}:
        criterion = StopAtToken(3)
        stateful = {"logits_processor": [CountingProcessor()], "stopping_criteria": [criterion]}
        text, _, state = call(llama, prompt, do_sample=True, **stateful, **assistance)
        calls.append((text, state.tolist(), criterion.lengths))
    assert calls[0] == calls[1]
    assert ways == ["host"]


class Interruption(LogitsProcessor):
    """Ctrl-C while a text grows."""

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > 12:
            raise KeyboardInterrupt
        return scores


class Recorder:
    """A streamer; fails with its `fails_at`-th piece."""

    def __init__(self, fails_at: int | None = None):
        self.pieces, self.has_ended, self.fails_at = [], False, fails_at

    def put(self, value):
        self.pieces.append(value.tolist())
        if len(self.pieces) == self.fails_at:
            raise ZeroDivisionError

    def end(self):
        self.has_ended = True


@pytest.mark.parametrize("setting", ["greedy", "greedy-processors", "sample"])
def test_streamer_gets_what_plain_generation_streams(llama, setting):
    streams, prompt = [], make_prompt(6)
    for assistance in {}, {"assistant_model": make_fixed(llama)}:
        streamer = Recorder()
        call(llama, prompt, streamer=streamer, **SETTINGS[setting], **assistance)
        assert streamer.has_ended
        streams.append(streamer.pieces)
    assert streams[0] == streams[1]


@pytest.mark.parametrize("setting", ["greedy", "sample"])
def test_call_after_a_broken_one_is_as_good(llama, setting, ways):
    draft, prompt = make_fixed(llama), make_prompt(6)
    streamer = Recorder(fails_at=9)
    with pytest.raises(ZeroDivisionError):
        call(llama, prompt, streamer=streamer, assistant_model=draft, **SETTINGS[setting])
    assert streamer.has_ended
    with pytest.raises(KeyboardInterrupt):
        call(llama, prompt, logits_processor=[Interruption()], assistant_model=draft, **SETTINGS[setting])
    assert_same_call(llama, draft, prompt, **SETTINGS[setting])
    assert ways == ["device", "host", "device"]
    assert not llama.model.layers[2]._forward_pre_hooks


def test_call_by_another_thread_meanwhile_takes_the_other_loop(llama, ways, caplog, monkeypatch):
    monkeypatch.setattr(obstacles, "_reasons_given", set())
    prompts = make_prompt(6), make_prompt(8)
    expected = [call(llama, prompt, do_sample=False)[0] for prompt in prompts]
    texts = {}

    class CallsInBetween(Recorder):
        def put(self, value):
            super().put(value)
            if len(self.pieces) == 4:
                thread = threading.Thread(target=generate, args=(1,))
                thread.start()
                thread.join()

    def generate(index, **settings):
        texts[index] = call(llama, prompts[index], assistant_model=make_fixed(llama), do_sample=False, **settings)[0]

    for num_calls in range(1, 3):
        generate(0, streamer=CallsInBetween())
        assert [texts[0], texts[1]] == expected
        assert ways == ["device"] * num_calls
    assert [message for message in caplog.messages if "not captured" in message] == [
        "Rounds of LlamaForCausalLM are not captured as CUDA graphs: another call generates on cpu at this time."
    ]


def test_threads_take_turns_on_a_device():
    seen, first, second = [], torch.device("meta", 0), torch.device("meta", 1)

    def try_both():
        for device in (first, second):
            with turns.turn_on(device) as is_free:
                seen.append(is_free)

    def fail_in_turn():
        with turns.turn_on(first) as is_free:
            seen.append(is_free)
            thread = threading.Thread(target=try_both)
            thread.start()
            thread.join()
            raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            fail_in_turn()
    try_both()
    assert seen == [True, False, True] * 2 + [True, True]


def test_pairs_on_different_devices_generate_at_once_and_capture_one_after_the_other(monkeypatch, ways):
    """Which of them runs is left to the threads; on the CPU both have to be told that they have a device each."""
    monkeypatch.setattr(runtime, "turn_on", lambda device: nullcontext(True))
    monkeypatch.setattr(shelf, "can_capture", lambda device: True)
    monkeypatch.setattr(shelf, "memory_of", lambda device: 2**40)
    both, captures, texts = threading.Barrier(2), [], {}

    def capture_slowly(rounds, fuses, compile_config):
        captures.append("begins")
        threading.Event().wait(0.2)
        captures.append("ends")

    monkeypatch.setattr(fixed_rounds.FixedRounds, "capture", capture_slowly)

    class MeetsTheOther(Recorder):
        def put(self, value):
            super().put(value)
            if len(self.pieces) in (2, 9):
                both.wait(timeout=60)

    def generate(name):
        target, prompt = TARGETS[name]().eval(), make_prompt(6)
        settings = {"do_sample": False, "max_new_tokens": 12, "streamer": MeetsTheOther()}
        expected = target.generate(**prompt, do_sample=False, max_new_tokens=12)
        texts[name] = torch.equal(target.generate(**prompt, **settings, assistant_model=make_fixed(target)), expected)

    threads = [threading.Thread(target=generate, args=(name,)) for name in ("llama", "qwen3")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {"llama": True, "qwen3": True}
    assert captures == ["begins", "ends"] * 2
    assert ways == ["device"] * 2


@pytest.mark.parametrize("setting", ["greedy", "sample"])
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_are_those_of_the_other_loop(setting, shape):
    """The last round aside: here its trees may be deeper than what is left of the text."""
    target = TARGETS["llama"]().eval().double()
    draft, prompt, found = make_fixed(target, shape).double(), make_prompt(9, num_padding=3), []
    for wanted in True, False:
        draft.generation_config.fixed_shapes = wanted
        call(target, prompt, assistant_model=draft, max_new_tokens=40, **SETTINGS[setting])
        found.append(draft.speculation_stats)
    fixed, varying = found
    assert fixed.acceptance_lengths == varying.acceptance_lengths
    assert sum(fixed.accepted_by_depth) > 0
    assert sum(fixed.accepted_by_depth) - sum(varying.accepted_by_depth) in (0, 1)
    assert fixed.draft_cache_tokens == 9 + 40 - fixed.acceptance_lengths[-1] - 1
    assert (fixed.new_tokens, fixed.target_calls) == (varying.new_tokens, varying.target_calls)


def keep_rounds(monkeypatch) -> list:
    """Lets calls on the CPU share buffers, as calls on CUDA do; returns all that are made."""
    made, new = {}, shelf.Shelf._new
    monkeypatch.setattr(
        shelf.Shelf, "_new", lambda self, size: made.get(size) or made.setdefault(size, new(self, size))
    )
    return made


@pytest.mark.parametrize("kind", [{}, {"attention_type": "gqa"}], ids=str)
def test_nothing_of_an_earlier_text_comes_into_the_next(llama, kind, monkeypatch):
    """Masked or not, a key that is not a number makes the scores none."""
    made, draft, prompt = keep_rounds(monkeypatch), make_fixed(llama, **kind), make_prompts([5, 3])
    plain = call(llama, prompt, do_sample=False)[0]
    lengths = []
    for _ in range(2):
        assert call(llama, prompt, do_sample=False, assistant_model=draft)[0] == plain
        lengths.append(draft.speculation_stats.acceptance_lengths)
        (buffers,) = made.values()
        memory = buffers.memory
        for stack in *buffers.cache.stacks.values(), *memory.cache.stacks.values(), memory.pending_states:
            stack.fill_(float("nan"))
    assert lengths[0] == lengths[1]


@pytest.mark.parametrize("setting", ["greedy", "greedy-processors"])
def test_buffers_and_models_are_let_go_at_once(setting, monkeypatch):
    """Caches that wait for the garbage collector fill a GPU that has room for one."""
    made = []

    def watch(kind):
        new = kind.__init__
        monkeypatch.setattr(kind, "__init__", lambda self, *given: made.append(weakref.ref(self)) or new(self, *given))

    watch(shelf.TextBuffers)
    watch(shelf.FixedRounds)
    target = TARGETS["llama"]().eval()
    draft = make_fixed(target)
    call(target, make_prompt(6), assistant_model=draft, **SETTINGS[setting])  # what is made once, is made
    gc.collect()
    gc.disable()
    try:
        call(target, make_prompt(6), assistant_model=draft, **SETTINGS[setting])
        assert [each() for each in made] == [None] * 4
    finally:
        gc.enable()
    models = weakref.ref(target), weakref.ref(draft)
    del target, draft
    gc.collect()
    assert [each() for each in models] == [None, None]


def test_rounds_that_could_not_be_captured_in_a_text_do_not_keep_models(monkeypatch):
    """Kept buffers, under which captured rounds of other sizes lie, last as long as the draft."""
    target = TARGETS["llama"]().eval()
    draft, tried = make_fixed(target), []

    def rounds(self, size):
        self.kept[self.current_key] = self.current  # as a GPU's are
        tried.append(size)
        return self._new_rounds(size) if len(tried) == 1 else None

    monkeypatch.setattr(shelf.Shelf, "rounds", rounds)
    assert_same_call(target, draft, make_prompt(6), do_sample=False)
    assert draft.speculation_stats.rounds > 2
    models = weakref.ref(target), weakref.ref(draft)
    del target, draft
    gc.collect()
    assert [each() for each in models] == [None, None]
    assert len(tried) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_draft_may_have_a_type_of_its_own(llama, dtype):
    for prompt in make_prompt(6), make_prompts([5, 3]):
        assert_same_call(llama, make_fixed(llama).to(dtype), prompt, do_sample=False)


def test_scores_that_float64_alone_tells_apart_are_equal():
    """Plain generation rounds to float32 before it chooses, and takes the first of equal ones."""
    target = TARGETS["llama"]().eval().double()
    with torch.no_grad():
        weight = target.lm_head.weight
        weight[3::2] = weight[2:-1:2] * (1 + 1e-11)
    prompt, settings = make_prompts([5, 2]), {"max_new_tokens": 20, "do_sample": False}
    draft = set_tree(make_draft(target), 8, 2, 4)
    draft.generation_config.fixed_shapes = True
    plain = target.generate(**prompt, **settings).tolist()
    assert target.generate(**prompt, **settings, assistant_model=draft).tolist() == plain


def test_half_precision_comes_to_the_end_of_the_text():
    target = TARGETS["llama"]().eval().bfloat16()
    draft = make_fixed(target).bfloat16()
    text = call(target, make_prompts([5, 3]), do_sample=True, assistant_model=draft)[0]
    assert len(text[0]) == 5 + 16


def test_modes_of_torch_change_nothing(llama):
    prompt = make_prompts([5, 3])
    with torch.inference_mode():
        assert_same_call(llama, make_fixed(llama), prompt, do_sample=True)
    torch.use_deterministic_algorithms(True)
    try:
        assert_same_call(llama, make_fixed(llama), prompt, do_sample=True)
    finally:
        torch.use_deterministic_algorithms(False)


OBSTACLES = {
    "nothing is drafted": ({"num_assistant_tokens": 0}, {}),
    "`assistant_confidence_threshold` is set": ({"assistant_confidence_threshold": 0.1}, {}),
    "`draft_window` is set": ({"draft_window": 8}, {}),
    "hidden states or attentions are wanted": ({}, {"output_hidden_states": True}),
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_log_says_once_why_shapes_vary(llama, reason, caplog, monkeypatch, ways):
    monkeypatch.setattr(obstacles, "_reasons_given", set())
    knobs, settings = OBSTACLES[reason]
    draft, prompt = make_fixed(llama), make_prompt(6)
    draft.generation_config.update(**knobs)
    vars(draft.generation_config).update(knobs)
    for _ in range(2):
        assert_same_call(llama, draft, prompt, do_sample=False, **settings)
    assert [message for message in caplog.messages if "not captured" in message] == [
        f"Rounds of LlamaForCausalLM are not captured as CUDA graphs: {reason}."
    ]
    assert ways == []


@pytest.mark.parametrize("name", TARGETS)
def test_all_modules_are_found(name):
    target = TARGETS[name]()
    target.again, target.absent = target.lm_head, None
    target.register_module("no_module", None)
    assert modules_of(target) == set(target.modules())


def test_hooks_autocast_and_targets_without_masks_take_the_other_loop(llama, caplog, monkeypatch, ways):
    monkeypatch.setattr(obstacles, "_reasons_given", set())
    hook = llama.model.layers[1].register_forward_hook(lambda *arguments: None)
    try:
        assert_same_call(llama, make_fixed(llama), make_prompt(6), do_sample=False)
    finally:
        hook.remove()
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *arguments: None)
    try:
        assert_same_call(llama, make_fixed(llama), make_prompt(6), do_sample=False)
    finally:
        hook.remove()
    assert ways == []
    with torch.autocast("cpu", torch.bfloat16):
        call(llama, make_prompt(6), do_sample=False, assistant_model=make_fixed(llama))
    bloom = TARGETS["bloom"]().eval()
    assert_same_call(bloom, make_fixed(bloom), make_prompt(6), do_sample=False)
    reasons = [message.split(": ", 1)[1] for message in caplog.messages if "not captured" in message]
    assert reasons == [
        "the target or the draft has hooks, which a graph would not call.",
        "autocast is on, whose copies of weights end with it.",
        "the target takes no masks of its own.",
    ]
    assert ways == []


class ScalingCache(DynamicCache):
    """Changes what it is given."""

    def update(self, key_states, value_states, *args, **kwargs):
        return super().update(key_states * 1.5, value_states, *args, **kwargs)


def test_caches_with_ways_of_their_own_take_the_other_loop(llama, caplog, monkeypatch, ways):
    monkeypatch.setattr(obstacles, "_reasons_given", set())
    target, prompt = TARGETS["mistral-window-8"]().eval(), make_prompts([9, 5])
    recording = DynamicCache(config=target.config)
    recording.activate_past_recording()
    for model, plain_cache, cache in [
        (llama, ScalingCache(config=llama.config), ScalingCache(config=llama.config)),
        (target, DynamicCache(config=target.config), recording),
    ]:
        plain, _, state = call(model, prompt, do_sample=True, past_key_values=plain_cache)
        assisted = call(model, prompt, do_sample=True, past_key_values=cache, assistant_model=make_fixed(model))
        assert (assisted[0], assisted[2].tolist()) == (plain, state.tolist())
    assert [message.split(": ", 1)[1] for message in caplog.messages if "not captured" in message] == [
        "the target's cache is of a kind of its own.",
        "the target's windows are to record their past.",
    ]
    assert ways == []


@pytest.mark.parametrize(("value", "is_taken"), [(None, False), (False, False), (True, True)])
def test_knob_decides_and_absent_means_cuda(llama, value, is_taken, ways):
    draft = make_fixed(llama)
    draft.generation_config.fixed_shapes = value
    assert_same_call(llama, draft, make_prompt(6), do_sample=False)
    assert bool(ways) == is_taken


@pytest.mark.parametrize("value", ["yes", 1, 0])
def test_wrong_value_of_the_knob_is_refused_by_name(llama, value):
    draft = make_draft(llama)
    draft.generation_config.fixed_shapes = value
    with pytest.raises(ValueError, match=f"fixed_shapes` must be None, True or False, got {value!r}"):
        call(llama, make_prompt(4), assistant_model=draft)


@torch.no_grad()
@pytest.mark.parametrize(
    "kind", [{}, {"mla_rope_dim": 4}, {"attention_type": "gqa"}, {"num_hidden_layers": 2}], ids=str
)
@pytest.mark.parametrize("shape", SHAPES)
def test_memory_of_fixed_shape_drafts_the_same_trees(shape, kind):
    """Rounds with every number of pending rows, for sequences of several lengths, against a cache that grows."""
    target = TARGETS["llama"]().eval().double()
    draft = make_draft(target, **kind).double()
    plan, prompt = TreePlan(*SHAPES[shape][::2], SHAPES[shape][1], None), make_prompts([9, 4, 6])
    captured = draft.capture_fused_states(target)
    with captured:
        target(**prompt)
    ids = torch.cat([prompt["input_ids"], torch.randint(2, 11, (3, 1))], dim=1)
    is_token = torch.cat([prompt["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1)
    states = captured.take()
    slow, like = (DraftMemory.of_prompt(states, ids, is_token) for _ in range(2))
    like.read_prompt(draft, target)
    fixed = FixedMemory(draft, like, 64, plan.depth * plan.top_k, plan.depth + 1)
    fixed.load(like)
    most = plan.depth + 1
    for num_new in [1, 1, 1], [1, 2, 3], [most, 1, 2], [most, most, most], [2, 4, 1], [1, 1, 1]:
        trees = [draft_tree(draft, target, memory, plan, LogitsProcessorList(), None) for memory in (slow, fixed)]
        assert trees[0].token_ids.tolist() == trees[1].token_ids.tolist()
        assert trees[0].parents.tolist() == trees[1].parents.tolist()
        assert fixed.num_rows.tolist() == slow.num_rows
        states = torch.randn(3, most, slow.pending_states.shape[-1], dtype=torch.float64)
        tokens = torch.randint(2, 11, (3, most))
        slow.await_rows(states, tokens, num_new)
        fixed.await_rows(states, tokens, torch.tensor(num_new))


def test_moved_slots_hold_what_a_cache_of_the_accepted_path_holds():
    like, states = DynamicCache(), torch.randn(2, 2, 20, 4)
    for layer, width in enumerate((4, 4, 2)):
        like.update(states[..., :5, :width], states[..., :5, :width], layer)
    cache = FixedCache(like, capacity=16)
    expected = [(layer.keys.clone(), layer.values.clone()) for layer in like.layers]
    cache.load(like)
    begin = torch.tensor([5, 4])
    cache.write_at(begin[:, None] + torch.arange(6))
    for layer, width in enumerate((4, 4, 2)):
        cache.update(states[..., 5:11, :width], -states[..., 5:11, :width], layer)
    path = torch.tensor([[0, 2, 5], [0, 1, 4]])
    cache.move(begin[:, None] + path, begin[:, None] + torch.arange(3))
    for layer, (keys, values) in zip(cache.layers, expected, strict=True):
        for row, start in enumerate(begin.tolist()):
            accepted = states[row, :, 5 + path[row], : keys.shape[-1]]
            assert torch.equal(layer.keys[row, :, : start + 3], torch.cat([keys[row, :, :start], accepted], dim=1))
            assert torch.equal(
                layer.values[row, :, : start + 3], torch.cat([values[row, :, :start], -accepted], dim=1)
            )


STOP_LENGTHS = {"alone": [6], "batch": [6, 4]}


@pytest.mark.parametrize("eos_token_id", [None, [9]], ids=["no-eos", "eos"])
@pytest.mark.parametrize("lengths", STOP_LENGTHS.values(), ids=STOP_LENGTHS.keys())
def test_stop_strings_end_texts_where_they_end_plain_ones(llama, lengths, eos_token_id, ways):
    model = models.WordLevel({chr(97 + token): token for token in range(11)}, unk_token="a")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    prompt = make_prompts(lengths)
    text = call(llama, prompt, do_sample=True)[0][0]
    stop = "".join(chr(97 + token) for token in text[11:13])
    settings = {"stop_strings": [stop], "tokenizer": tokenizer, "do_sample": True, "eos_token_id": eos_token_id}
    found = assert_same_call(llama, make_fixed(llama), prompt, **settings)
    assert len(lengths) > 1 or len(found[0]) == 13
    assert ways == ["device" if len(lengths) == 1 else "host"]


@pytest.fixture
def graphs(monkeypatch) -> list:
    """The stages that a test captures."""
    made, new = [], capture.CapturedStage.__init__
    monkeypatch.setattr(capture.CapturedStage, "__init__", lambda self, *given: made.append(self) or new(self, *given))
    return made


def on_cuda(prompt):
    return {name: tensor.cuda() for name, tensor in prompt.items()}


@pytest.mark.parametrize("setting", ["sample", "greedy-processors"])
def test_statistics_know_how_much_is_in_the_drafts_cache(llama, setting, monkeypatch):
    """Neither is a round ahead of the statistics."""
    record, num_rounds = runtime.record_round, 0

    def watched(stats, shelf, rounds, *others):
        nonlocal num_rounds
        record(stats, shelf, rounds, *others)
        assert stats.draft_cache_tokens == rounds.buffers.memory.num_rows.max()
        num_rounds += 1

    monkeypatch.setattr(runtime, "record_round", watched)
    call(llama, make_prompts([9, 4], num_padding=2), assistant_model=make_fixed(llama), **SETTINGS[setting])
    assert num_rounds > 5


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("setting", CELLS)
@pytest.mark.parametrize("name", BRANCHING)
def test_captured_rounds_give_the_plain_text(name, setting, shape, graphs):
    target, num_accepted = TARGETS[name]().eval().cuda(), 0
    for seed, prompt in enumerate([make_prompt(9, 2), make_prompts([12, 5, 9])]):
        draft = set_tree(make_draft(target), *SHAPES[shape]).cuda()
        assert_same_call(target, draft, on_cuda(prompt), seed, **SETTINGS[setting])
        num_accepted += sum(draft.speculation_stats.accepted_by_depth)
    assert num_accepted > 0
    assert len(graphs) == 8


@pytest.mark.gpu
def test_calls_share_graphs_until_weights_move(graphs):
    target = TARGETS["llama"]().eval().cuda()
    draft, prompt, counts = set_tree(make_draft(target), *SHAPES["tree"]).cuda(), on_cuda(make_prompt(9)), []

    def count():
        assert_same_call(target, draft, prompt, do_sample=False)
        counts.append(len(graphs))

    for _ in range(2):
        count()
    for parameter in draft.parameters():
        parameter.data = parameter.data.clone()
    count()
    for parameter in target.parameters():
        parameter.data = parameter.data.clone()
    count()
    with torch.inference_mode():
        count()
    count()
    assert counts == [4, 4, 8, 12, 16, 16]


def test_buffers_that_are_used_again_are_the_last_to_go(llama):
    buffers = SimpleNamespace(lengths=torch.ones(1, dtype=torch.long))
    kept = OrderedDict((("a call", size), shelf.KeptSet(buffers, weakref.ref(llama))) for size in (256, 384))
    used = shelf.Shelf.__new__(shelf.Shelf)
    used.call_key, used.fingerprints, used.target, used.kept = ("a call",), (), llama, kept
    assert used.make_room(200)
    assert used.current is kept["a call", 256]
    assert list(kept) == [("a call", 384), ("a call", 256)]


@pytest.fixture
def kept_on(monkeypatch):
    """Sets of heads on two devices, this one and another."""

    def keep(here, *drafts) -> tuple:
        kept = [weakref.WeakKeyDictionary((draft, OrderedDict(of=draft)) for draft in drafts) for _ in range(2)]
        monkeypatch.setattr(shelf, "_kept", {here: kept[0], torch.device("meta", 0): kept[1]})
        return kept

    return keep


@pytest.mark.parametrize("fixed_shapes", [True, False])
def test_pair_that_has_moved_leaves_no_sets_on_its_old_device(llama, fixed_shapes, kept_on):
    draft, other = make_fixed(llama), make_fixed(llama)
    draft.generation_config.fixed_shapes = fixed_shapes
    here, elsewhere = kept_on(llama.device, draft, other)
    call(llama, make_prompt(6), assistant_model=draft, do_sample=False)
    assert [list(sets[each]) for sets in (here, elsewhere) for each in (draft, other)] == [["of"], ["of"], [], ["of"]]


def test_sets_that_another_thread_uses_are_left_alone(llama, kept_on):
    """It may be out of memory, and on its way through all of them."""
    draft = make_fixed(llama)
    _, elsewhere = kept_on(llama.device, draft, make_fixed(llama))
    for in_use in elsewhere.values():
        shelf.forget_elsewhere(draft)
        assert list(in_use) == ["of"]
    assert not elsewhere[draft]


@pytest.mark.gpu
def test_call_on_another_stream_waits_until_the_buffers_are_free(monkeypatch):
    """A call returns before the device has copied its cache; the next one writes into the same buffers."""
    target = TARGETS["llama"]().eval().cuda()
    draft, prompts = set_tree(make_draft(target), *SHAPES["tree"]).cuda(), [on_cuda(make_prompt(9)) for _ in range(2)]
    expected = [call(target, prompt, do_sample=False)[1] for prompt in prompts]
    give_back = FixedCache.give_back
    monkeypatch.setattr(FixedCache, "give_back", lambda *given: torch.cuda._sleep(1_000_000_000) or give_back(*given))
    call(target, prompts[0], assistant_model=draft, do_sample=False)
    caches = []
    for prompt in prompts:
        with torch.cuda.stream(torch.cuda.Stream()):
            caches.append(call(target, prompt, assistant_model=draft, do_sample=False)[1])
    torch.cuda.synchronize()
    for cache, plain in zip(caches, expected, strict=True):
        assert_same_cache(cache, plain)


@pytest.mark.gpu
def test_text_of_another_thread_is_plain_while_rounds_are_captured(monkeypatch):
    target = TARGETS["llama"]().eval().cuda().bfloat16()
    draft, prompt = set_tree(make_draft(target), *SHAPES["tree"]).cuda().bfloat16(), on_cuda(make_prompt(9))
    expected, texts = call(target, prompt, do_sample=False)[0], []

    def captured_meanwhile(*given):
        thread = threading.Thread(target=lambda: texts.append(call(target, prompt, do_sample=False)[0]))
        thread.start()
        thread.join()
        return verify(*given)

    verify = fixed_rounds.FixedRounds.verify
    monkeypatch.setattr(fixed_rounds.FixedRounds, "verify", captured_meanwhile)
    call(target, prompt, do_sample=False, assistant_model=draft)
    assert len(texts) >= 2
    assert all(text == expected for text in texts)


@pytest.mark.gpu
def test_adapter_that_is_switched_off_gets_graphs_of_its_own(graphs):
    peft = pytest.importorskip("peft")
    target = TARGETS["llama"]().eval()
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(target, config).eval().cuda()
    draft, prompt = set_tree(make_draft(target), *SHAPES["tree"]).cuda(), on_cuda(make_prompt(9))
    with_adapter = assert_same_call(target, draft, prompt, do_sample=False)
    with model.disable_adapter():
        assert assert_same_call(target, draft, prompt, do_sample=False) != with_adapter
    assert len(graphs) == 8


def test_processors_that_differ_in_the_fifth_digit_are_told_apart():
    described = {shelf.repr_of(EtaLogitsWarper(epsilon)) for epsilon in (3.0e-4, 3.4e-4, 3.4e-4)}
    assert len(described) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sample"])
def test_model_that_asks_the_device_takes_the_other_loop(do_sample, caplog, monkeypatch, graphs):
    """Where a recording breaks off, PyTorch takes the next random numbers for a part of it, and raises."""
    monkeypatch.setattr(obstacles, "_reasons_given", set())
    target = TARGETS["llama"]().eval().cuda()
    mlp = target.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda states: forward(states) * (1.0 if states.sum().item() < float("inf") else 0.0)
    draft, prompt = set_tree(make_draft(target), *SHAPES["tree"]).cuda(), on_cuda(make_prompt(9))
    stream = torch.cuda.current_stream()
    for _ in range(2):
        assert_same_call(target, draft, prompt, do_sample=do_sample)
        assert torch.cuda.current_stream() == stream
    assert sum("not captured" in message for message in caplog.messages) == 1
    assert draft.speculation_stats.rounds > 0


@pytest.mark.gpu
def test_cache_moves_to_the_host_without_memory_of_the_device():
    plain = DynamicCache()
    for layer in range(3):
        plain.update(*torch.randn(2, 2, 4, 50, 64, device="cuda"), layer)
    expected = [(layer.keys[:, :, :40].cpu(), layer.values[:, :, :40].cpu()) for layer in plain.layers]
    fixed = FixedCache(plain, 96)
    fixed.load(plain)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    num_before = torch.cuda.memory_allocated()
    fixed.give_back(plain, 40, device=torch.device("cpu"))
    assert torch.cuda.max_memory_allocated() == num_before
    for layer, (keys, values) in zip(plain.layers, expected, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
