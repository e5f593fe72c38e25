"""Caches that are filled when a call begins, and how a call leaves them: as in plain generation."""

import copy
import gc
import weakref

import pytest
import torch
from pairwise import pairwise
from reference_generation import (
    TARGETS,
    assert_same_cache,
    make_draft,
    make_prompts,
    run,
    set_tree,
)
from transformers import DynamicCache, StaticCache

from eagle3_mla.generation import continuations, decoder
from eagle3_mla.generation import memory as memories

SHAPES = {"chain": (5, 1), "tree": (12, 3)}
LENGTHS = {"B1": [14], "B3": [14, 5, 3]}
EOS = 5
SETTINGS = {
    "greedy": {"do_sample": False, "max_new_tokens": 14},
    "sample": {"do_sample": True, "max_new_tokens": 12},
    "sample-eos": {"do_sample": True, "max_new_tokens": 14, "eos_token_id": EOS},
}
FAMILIES = ["llama", "qwen3", "mistral-window-8", "gemma3-window-8"]


@pytest.mark.parametrize(
    ("name", "lengths", "shape"), pairwise(["mistral-window-8", "gemma3-window-8"], LENGTHS, SHAPES)
)
def test_returned_cache_goes_on_in_plain_generation_as_a_plain_one(name, lengths, shape):
    """A sliding-window layer that still records its past gives the same text, and grows with it."""
    target, prompt = TARGETS[name]().eval(), make_prompts(LENGTHS[lengths])
    draft, caches = set_tree(make_draft(target), *SHAPES[shape]), []
    for assistance in {}, {"assistant_model": draft}:
        outputs, _ = run(target, prompt, do_sample=False, **assistance)
        ids, cache = outputs.sequences, outputs.past_key_values
        mask = torch.cat([prompt["attention_mask"], torch.ones_like(ids[:, prompt["input_ids"].shape[1] :])], dim=1)
        target(ids[:, -1:], attention_mask=mask, past_key_values=cache)
        caches.append(cache)
    assert_same_cache(*caches[::-1])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_cache_that_records_its_past_keeps_all_of_it(lengths, shape):
    """Its owner wants to crop it, which its windows allow for as long as they record."""
    target, prompt = TARGETS["gemma3-window-8"]().eval(), make_prompts(lengths)
    cache, expected = (DynamicCache(config=target.config) for _ in range(2))
    for each in cache, expected:
        each.activate_past_recording()
    draft, settings = set_tree(make_draft(target), *shape), {"do_sample": False, "max_new_tokens": 20}
    text = target.generate(**prompt, past_key_values=cache, assistant_model=draft, **settings)
    assert text.tolist() == target.generate(**prompt, **settings).tolist()
    mask = torch.cat([prompt["attention_mask"], torch.ones(len(text), 19, dtype=torch.long)], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        target(text[:, :-1], attention_mask=mask, position_ids=positions, past_key_values=expected)
    assert all(layer.record_past for layer in cache.layers)
    for each in cache, expected:
        each.crop(-3)
    assert_same_cache(cache, expected)


def next_turn(prompt, sequences, eos_token_id=None, num_new: int = 6):
    """The text so far and a question of different lengths; what sequences got after their end is padding."""
    batch_size, num_before = prompt["input_ids"].shape
    answers = sequences[:, num_before:]
    is_end = (answers == eos_token_id).long() if eos_token_id else torch.zeros_like(answers)
    is_answer = (is_end.cumsum(dim=1) - is_end == 0).long()
    question = make_prompts([num_new - row for row in range(batch_size)])
    return {
        "input_ids": torch.cat([sequences, question["input_ids"]], dim=1),
        "attention_mask": torch.cat([prompt["attention_mask"], is_answer, question["attention_mask"]], dim=1),
    }


def read(target, prompt, num_tokens: int):
    """A cache of the first tokens, by one plain forward."""
    prefix = {name: tensor[:, :num_tokens] for name, tensor in prompt.items()}
    return run(target, prefix, max_new_tokens=1, do_sample=False)[0].past_key_values


def memory_of(draft, cache):
    return continuations._remembered[draft][cache].memory


def assert_same_rows(memory, other):
    assert memory.first_slot == other.first_slot == 0
    for row, num_rows in enumerate(map(min, memory.num_rows, other.num_rows)):
        rows = (each.cache.layers[0].keys[row, :, :num_rows] for each in (memory, other))
        torch.testing.assert_close(*rows, rtol=1e-9, atol=1e-9)


def assert_same_turn(target, draft, prompt, cache, seed=0, **settings):
    """Texts, scores, cache and random generator of a call that continues `cache`; its own output."""
    plain_cache, number = copy.deepcopy(cache), cache.get_seq_length()
    plain, plain_state = run(target, prompt, seed, past_key_values=plain_cache, **settings)
    outputs, state = run(target, prompt, seed, past_key_values=cache, assistant_model=draft, **settings)
    assert outputs.sequences.tolist() == plain.sequences.tolist()
    assert torch.equal(state, plain_state)
    torch.testing.assert_close(torch.cat(outputs.scores), torch.cat(plain.scores), rtol=1e-4, atol=1e-4)
    assert outputs.past_key_values is cache
    assert_same_cache(cache, plain_cache)
    assert cache.get_seq_length() > number
    return outputs


@pytest.mark.parametrize(("name", "setting", "shape", "lengths"), pairwise(FAMILIES, SETTINGS, SHAPES, LENGTHS))
def test_later_turns_are_those_of_plain_generation(name, setting, shape, lengths):
    target, settings, num_accepted, seed = TARGETS[name]().eval(), SETTINGS[setting], 0, 0
    while num_accepted == 0 and seed < 18:
        draft = set_tree(make_draft(target), *SHAPES[shape])
        prompt, cache = make_prompts(LENGTHS[lengths]), DynamicCache(config=target.config)
        for turn in range(3):
            outputs = assert_same_turn(target, draft, prompt, cache, seed + turn, **settings)
            num_accepted += sum(draft.speculation_stats.accepted_by_depth) if turn else 0
            prompt = next_turn(prompt, outputs.sequences, settings.get("eos_token_id"))
            assert memory_of(draft, cache).first_slot == 0
        seed += 3
    assert num_accepted > 0


@pytest.mark.parametrize(
    ("name", "setting", "lengths", "chooses"),
    pairwise(["llama", "gemma3-window-8"], ["greedy", "sample-eos"], [[1], [14, 5, 3]], ["device", "host"]),
    ids=str,
)
def test_later_turns_at_fixed_shapes_are_the_same(name, setting, lengths, chooses):
    """Lengths count slots, also those that no id stands for; the draft's rows come back from the buffers.

    The device chooses where no scores are wanted, here for texts without what is cached; the host for whole ones.
    """
    target, prompt = TARGETS[name]().eval().double(), make_prompts(lengths)
    is_cut, wants_scores = chooses == "device", chooses == "host"
    draft, caches = set_tree(make_draft(target).double(), 12, 3), [DynamicCache(config=target.config)]
    caches.append(copy.deepcopy(caches[0]))
    settings = {"return_dict_in_generate": True, "output_scores": wants_scores, **SETTINGS[setting]}
    for turn, fixes in enumerate([True, True, False, True]):
        num_omitted, outcomes = caches[0].get_seq_length() if is_cut else 0, []
        given = prompt | {"input_ids": prompt["input_ids"][:, num_omitted:]}
        for cache, fixed_shapes in zip(caches, [fixes, False], strict=True):
            draft.generation_config.fixed_shapes = fixed_shapes
            torch.manual_seed(turn)
            outputs = target.generate(**given, past_key_values=cache, assistant_model=draft, **settings)
            outcomes.append((outputs.sequences.tolist(), torch.get_rng_state().tolist()))
        assert outcomes[0] == outcomes[1]
        assert_same_cache(*caches)
        assert_same_rows(*(memory_of(draft, cache) for cache in caches))
        sequences = torch.cat([prompt["input_ids"][:, :num_omitted], outputs.sequences], dim=1)
        prompt = next_turn(prompt, sequences, settings.get("eos_token_id"))


@pytest.mark.parametrize(
    ("name", "num_cached", "given", "lengths"),
    pairwise(["llama", "mistral-window-8", "gpt2", "bloom", "gpt-neo-window-8"], [3, 13], ["whole", "new"], LENGTHS),
)
def test_cache_of_a_forward_is_continued_from_whole_texts_and_from_what_is_new(name, num_cached, given, lengths):
    """A text that ends one token behind the cache, padding that is only cached, and slots that no id stands for."""
    target = TARGETS[name]().eval()
    draft, num_accepted = set_tree(make_draft(target), 12, 3), 0
    prompt = make_prompts(LENGTHS[lengths])
    cache = read(target, prompt, num_cached)
    if given == "new":
        prompt["input_ids"] = prompt["input_ids"][:, num_cached:]
    for settings in {"do_sample": False}, {"do_sample": True, "repetition_penalty": 1.2}:
        outputs = assert_same_turn(target, draft, prompt, copy.deepcopy(cache), max_new_tokens=18, **settings)
        assert outputs.sequences.shape[1] == prompt["input_ids"].shape[1] + 18
        num_accepted += sum(draft.speculation_stats.accepted_by_depth)
    assert num_accepted > 0


def test_hidden_states_of_a_continuation_are_those_of_plain_generation():
    target, prompt = TARGETS["llama"]().eval(), make_prompts([9])
    draft, settings = make_draft(target), {"output_hidden_states": True, "do_sample": False}
    plain, _ = run(target, prompt, past_key_values=read(target, prompt, 6), **settings)
    outputs, _ = run(target, prompt, past_key_values=read(target, prompt, 6), assistant_model=draft, **settings)
    assert len(outputs.hidden_states) == len(plain.hidden_states)
    for states, expected in zip(outputs.hidden_states, plain.hidden_states, strict=True):
        torch.testing.assert_close(torch.stack(states), torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("num_cached", "lengths", "mask_length", "message"),
    [
        (8, [8], 8, r"`past_key_values` must hold fewer tokens than `input_ids` \(8\), got 8. Where `input_ids` are"),
        (8, [5], 5, r"`past_key_values` must hold fewer tokens than `input_ids` \(5\), got 8"),
        (4, [8, 6], 8, r"`past_key_values` must hold as many sequences as `input_ids` \(2\), got 1"),
        (4, [8], 10, r"`attention_mask` must be as long as `input_ids` \(8\) .* `past_key_values` \(12\) .* got 10"),
        (7, [3], 11, r"\(10\) where they are what is new, got 11. The cache of an earlier call lacks the last token"),
    ],
    ids=["all", "more", "batch", "mask", "last"],
)
def test_cache_that_does_not_fit_is_refused_before_any_forward(num_cached, lengths, mask_length, message):
    target = TARGETS["llama"]().eval()
    cache, prompt = read(target, make_prompts([8]), num_cached), make_prompts(lengths)
    prompt["attention_mask"] = torch.ones(len(lengths), mask_length, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        target.generate(**prompt, past_key_values=cache, max_new_tokens=3, assistant_model=make_draft(target))
    assert cache.get_seq_length() == num_cached


def test_offloaded_cache_is_refused_by_name():
    """Made here by hand: without a GPU transformers makes none."""
    target = TARGETS["llama"]().eval()
    cache = DynamicCache(config=target.config)
    cache.offloading = True
    with pytest.raises(NotImplementedError, match=r"must not be offloaded .*, got `offloading=True`"):
        target.generate(
            **make_prompts([4]), past_key_values=cache, max_new_tokens=3, assistant_model=make_draft(target)
        )


def test_cache_of_another_class_is_refused_by_name():
    target = TARGETS["llama"]().eval()
    cache = StaticCache(config=target.config, max_cache_len=32)
    with pytest.raises(NotImplementedError, match="must be a DynamicCache for an EAGLE-3 draft, got StaticCache"):
        target.generate(
            **make_prompts([4]), past_key_values=cache, max_new_tokens=3, assistant_model=make_draft(target)
        )


@pytest.fixture
def drafted(monkeypatch):
    """The trees of all rounds, `(tokens, parents)`."""
    trees, read_tree = [], decoder.read_tree

    def note(target, tree, *args, **kwargs):
        trees.append((tree.token_ids.tolist(), tree.parents.tolist()))
        return read_tree(target, tree, *args, **kwargs)

    monkeypatch.setattr(decoder, "read_tree", note)
    return trees


KNOBS = [{}, {"draft_window": 3, "draft_window_sink": 1}, {"draft_window": 12}]


@pytest.mark.parametrize(
    ("knobs", "lengths", "shape", "num_cropped"), pairwise(KNOBS, LENGTHS, SHAPES, [0, 4]), ids=str
)
def test_drafts_of_a_later_turn_are_those_of_the_whole_text(knobs, lengths, shape, num_cropped, drafted, monkeypatch):
    """Rows that are missing, doubled or at other positions cost acceptance only; nobody would see it."""
    monkeypatch.setattr(memories, "WINDOW_CHUNK_ROWS", 4 if num_cropped == 0 else 256)
    target, prompt = TARGETS["llama"]().eval().double(), make_prompts(LENGTHS[lengths])
    draft, cache = set_tree(make_draft(target).double(), *SHAPES[shape]), DynamicCache()
    for knob, value in knobs.items():
        setattr(draft.generation_config, knob, value)
    for _ in range(3):
        outputs, _ = run(target, prompt, past_key_values=cache, assistant_model=draft, do_sample=True)
        later = list(drafted)
        drafted.clear()
        whole, _ = run(target, prompt, assistant_model=draft, do_sample=True)
        assert whole.sequences.tolist() == outputs.sequences.tolist()
        assert later == drafted
        drafted.clear()
        if num_cropped > 0:
            cache.crop(-num_cropped)
        prompt = next_turn(prompt, outputs.sequences)


def test_question_may_be_asked_again_after_a_crop():
    target, prompt = TARGETS["llama"]().eval(), make_prompts(LENGTHS["B3"])
    draft, cache = set_tree(make_draft(target), 12, 3), DynamicCache()
    outputs = assert_same_turn(target, draft, prompt, cache, do_sample=True)
    num_before = cache.get_seq_length()
    for seed in range(3):
        turn = next_turn(prompt, outputs.sequences, num_new=4 + seed)
        assert_same_turn(target, draft, turn, cache, seed, do_sample=True)
        assert memory_of(draft, cache).first_slot == 0
        cache.crop(num_before - cache.get_seq_length())


def test_what_is_new_alone_goes_on_with_the_rows_of_the_call_before(drafted):
    target, prompt = TARGETS["llama"]().eval().double(), make_prompts([9, 6])
    draft, cache = set_tree(make_draft(target).double(), 12, 3), DynamicCache()
    for _ in range(3):
        num_omitted = cache.get_seq_length()
        given = prompt | {"input_ids": prompt["input_ids"][:, num_omitted:]}
        outputs = assert_same_turn(target, draft, given, cache, do_sample=True)
        assert memory_of(draft, cache).first_slot == 0
        later = list(drafted)
        drafted.clear()
        run(target, prompt, assistant_model=draft, do_sample=True)
        assert later == drafted
        drafted.clear()
        sequences = torch.cat([prompt["input_ids"][:, :num_omitted], outputs.sequences], dim=1)
        prompt = next_turn(prompt, sequences)


def extend(target, draft, prompt, outputs):
    """Another call, without the draft, reads on."""
    prompt = next_turn(prompt, outputs.sequences)
    outputs, _ = run(target, prompt, past_key_values=outputs.past_key_values, do_sample=True)
    return next_turn(prompt, outputs.sequences)


def reorder(target, draft, prompt, outputs):
    order = torch.tensor([1, 0, 2])
    outputs.past_key_values.reorder_cache(order)
    return next_turn({name: tensor[order] for name, tensor in prompt.items()}, outputs.sequences[order])


def select(target, draft, prompt, outputs):
    outputs.past_key_values.batch_select_indices(torch.tensor([2]))
    return next_turn({name: tensor[2:] for name, tensor in prompt.items()}, outputs.sequences[2:])


def set_window(target, draft, prompt, outputs):
    draft.generation_config.draft_window = 5
    return next_turn(prompt, outputs.sequences)


@pytest.mark.parametrize("change", [extend, reorder, select, set_window])
def test_rows_of_another_text_are_left_behind(change):
    target, prompt = TARGETS["llama"]().eval(), make_prompts(LENGTHS["B3"])
    draft, cache = set_tree(make_draft(target), 12, 3), DynamicCache()
    outputs = assert_same_turn(target, draft, prompt, cache, do_sample=True)
    prompt = change(target, draft, prompt, outputs)
    num_cached = cache.get_seq_length()
    outputs = assert_same_turn(target, draft, prompt, cache, do_sample=True)
    assert memory_of(draft, cache).first_slot == num_cached
    assert_same_turn(target, draft, next_turn(prompt, outputs.sequences), cache, do_sample=True)
    assert memory_of(draft, cache).first_slot == num_cached


def test_rows_are_forgotten_with_the_cache_and_with_the_draft():
    target, prompt = TARGETS["llama"]().eval(), make_prompts([5])
    drafts = [make_draft(target) for _ in range(2)]
    outputs = [run(target, prompt, assistant_model=draft)[0] for draft in drafts]
    rows = [weakref.ref(memory_of(draft, each.past_key_values)) for draft, each in zip(drafts, outputs, strict=True)]
    assert all(each() is not None for each in rows)
    outputs.pop()
    gc.collect()
    assert rows[1]() is None
    assert len(continuations._remembered[drafts[1]]) == 0
    drafts.pop(0)
    gc.collect()
    assert rows[0]() is None


def test_prompt_that_the_draft_never_read_is_not_remembered():
    """Its rows are still states of the target."""
    target = TARGETS["llama"]().eval()
    draft = make_draft(target)
    for num_tokens in 64, 65:
        outputs, _ = run(target, make_prompts([num_tokens]), assistant_model=draft, max_new_tokens=1)
        assert len(continuations._remembered[draft]) == (num_tokens == 64)
        del outputs
