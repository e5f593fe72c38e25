"""The size of the next tree: simulated rounds with a known price and a known acceptance."""

import itertools
import random

import pytest
import torch
from pairwise import pairwise
from reference_generation import SETTINGS, TARGETS, assert_same_generation, make_draft, make_prompts

from eagle3_mla.generation import shelf
from eagle3_mla.generation.capture import NUM_WARM_UPS
from eagle3_mla.generation.fixed_rounds import tree_size
from eagle3_mla.generation.sizing import (
    FIRST_ROUNDS,
    FIXED_STEP,
    ConstantSize,
    TreeSizer,
    ladder,
    num_within,
    sizes_for,
)
from eagle3_mla.generation.support import TreePlan

CHAIN = TreePlan(num_nodes=7, depth=7, top_k=1, confidence_threshold=None)
TREE = TreePlan(num_nodes=60, depth=7, top_k=10, confidence_threshold=None)


def play(sizer, num_rounds, accept, draft_price, node_price=0.0):
    """Rounds of chains: a plain one takes a second, every draft and every node its price more."""
    chosen = []
    for _ in range(num_rounds):
        size = sizer.choose()
        num_accepted = 0
        while num_accepted < size.depth and random.random() < accept:
            num_accepted += 1
        sizer.record(size, [list(range(num_accepted))], 1 + draft_price * size.depth + node_price * size.num_nodes)
        chosen.append(size)
    return chosen


def test_sizes_halve_down_to_none_and_small_trees_are_shallow():
    assert [size.num_nodes for size in ladder(CHAIN)] == [7, 3, 1, 0]
    assert [size.depth for size in ladder(CHAIN)] == [7, 3, 1, 0]
    assert [(size.num_nodes, size.depth) for size in ladder(TREE)] == [
        (60, 7), (30, 6), (15, 5), (7, 4), (3, 3), (1, 1), (0, 0)
    ]  # fmt: skip
    assert [(size.num_nodes, size.depth) for size in ladder(TREE, FIXED_STEP)] == [(60, 7), (15, 5), (3, 3), (0, 0)]


def test_every_size_is_tried_before_any_is_preferred():
    random.seed(0)
    chosen = play(TreeSizer(CHAIN), FIRST_ROUNDS * 4 + 2, accept=0.5, draft_price=0.1)
    assert [size.num_nodes for size in chosen[:-2]].count(7) >= FIRST_ROUNDS
    assert {size.num_nodes for size in chosen} == {7, 3, 1, 0}


@pytest.mark.parametrize(
    ("accept", "draft_price", "best"), [(0.95, 0.02, 7), (0.6, 0.3, 1), (0.05, 0.3, 0), (0.0, 0.01, 0)]
)
def test_the_size_follows_acceptance_and_price(accept, draft_price, best):
    random.seed(1)
    chosen = play(TreeSizer(CHAIN), 600, accept, draft_price)
    counts = [size.num_nodes for size in chosen[100:]]
    assert counts.count(best) > 0.9 * len(counts)


def test_an_unsuitable_draft_costs_next_to_nothing():
    random.seed(2)
    sizer = TreeSizer(TREE)
    rounds = [1 + 0.3 * size.depth + 0.02 * size.num_nodes for size in play(sizer, 3000, 0.0, 0.3, 0.02)]
    assert sum(rounds) < 1.03 * len(rounds)


def test_the_full_size_returns_when_the_text_becomes_easy():
    random.seed(3)
    sizer = TreeSizer(CHAIN)
    play(sizer, 200, accept=0.0, draft_price=0.05)
    assert sizer.choose().num_nodes == 0
    chosen = play(sizer, 600, accept=0.95, draft_price=0.05)
    assert chosen[-1].num_nodes == 7


def test_a_round_that_first_reads_what_was_missed_is_not_timed():
    sizer = TreeSizer(CHAIN)
    full, *_, none = ladder(CHAIN)
    sizer.record(none, [[]], 1.0)
    sizer.record(full, [[0, 1]], 100.0)
    assert len(sizer.sizes[full].seconds) == 0
    sizer.record(full, [[0, 1]], 2.0)
    assert list(sizer.sizes[full].seconds) == [2.0]


def test_a_smaller_tree_holds_the_preferred_nodes_up_to_its_depth():
    small = TreePlan(num_nodes=4, depth=2, top_k=10, confidence_threshold=None)
    assert num_within([0, 3, 1], small) == 2
    assert num_within([0, 4, 1], small) == 1
    assert num_within([5], small) == 0
    assert num_within([], small) == 0


@pytest.mark.parametrize(
    ("setting", "name", "lengths", "top_k"),
    pairwise(
        ["greedy", "sample", "greedy-processors", "sample-eos"],
        ["llama", "gemma2-window-8", "bloom"],
        [[9], [9, 3, 12]],
        [1, 3],
    ),
    ids=str,
)
def test_any_sequence_of_sizes_gives_the_text_of_plain_generation(setting, name, lengths, top_k, monkeypatch):
    monkeypatch.setattr(TreeSizer, "choose", lambda sizer: random.choice(list(sizer.sizes)))
    random.seed(4)
    target = TARGETS[name]().eval()
    draft = make_draft(target)
    draft.generation_config.num_assistant_tokens = 9
    draft.generation_config.assistant_tree_top_k = top_k
    draft.generation_config.num_assistant_tokens_schedule = "heuristic_transient"
    assert_same_generation(target, draft, make_prompts(lengths), **SETTINGS[setting])


@pytest.mark.parametrize("setting", ["greedy", "sample", "greedy-processors", "sample-eos"])
@pytest.mark.parametrize("name", ["llama", "gemma2-window-8"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_any_sequence_of_sizes_at_fixed_shapes_gives_the_text_of_plain_generation(name, setting, top_k, monkeypatch):
    monkeypatch.setattr(TreeSizer, "choose", lambda sizer: random.choice(list(sizer.sizes)))
    monkeypatch.setattr(shelf, "LEAST_CAPACITY", 16)  # buffers grow, too
    random.seed(5)
    torch.manual_seed(1)
    target, num_accepted = TARGETS[name]().eval(), 0
    for lengths in [9], [9, 3, 12]:
        draft = at_fixed_shapes(make_draft(target), top_k)
        prompt, texts, states = make_prompts(lengths), [], []
        for assistance in {}, {"assistant_model": draft}:
            torch.manual_seed(0)
            texts.append(target.generate(**prompt, max_new_tokens=40, **SETTINGS[setting], **assistance).tolist())
            states.append(torch.get_rng_state())
        assert texts[0] == texts[1]
        assert torch.equal(*states)
        num_accepted += sum(draft.speculation_stats.accepted_by_depth)
    assert num_accepted > 0


@pytest.mark.gpu
@pytest.mark.parametrize("setting", ["greedy", "sample", "greedy-processors"])
@pytest.mark.parametrize("name", ["llama", "gemma2-window-8"])
def test_any_sequence_of_captured_sizes_gives_the_text_of_plain_generation(name, setting, monkeypatch):
    monkeypatch.setattr(TreeSizer, "choose", lambda sizer: random.choice(list(sizer.sizes)))
    random.seed(6)
    torch.manual_seed(1)
    target, num_accepted = TARGETS[name]().eval().cuda(), 0
    for lengths in [9], [9, 3, 12]:
        draft = at_fixed_shapes(make_draft(target), 3).cuda()
        prompt = {key: tensor.cuda() for key, tensor in make_prompts(lengths).items()}
        assert_same_generation(target, draft, prompt, max_new_tokens=200, **SETTINGS[setting])
        texts = []
        for assistance in {}, {"assistant_model": draft}, {"assistant_model": draft}:
            torch.manual_seed(0)
            texts.append(target.generate(**prompt, max_new_tokens=200, **SETTINGS[setting], **assistance).tolist())
        assert texts[0] == texts[1] == texts[2]
        num_accepted += sum(draft.speculation_stats.accepted_by_depth)
    assert num_accepted > 0


def at_fixed_shapes(draft, top_k: int):
    """`draft` with trees of 9 nodes, whose sizes change, at fixed shapes."""
    draft.generation_config.num_assistant_tokens = 9
    draft.generation_config.assistant_tree_top_k = top_k
    draft.generation_config.num_assistant_tokens_schedule = "heuristic_transient"
    draft.generation_config.fixed_shapes = True
    return draft


@pytest.mark.parametrize("setting", ["greedy", "greedy-processors"])
@pytest.mark.parametrize("lengths", [[9], [9, 4, 6]], ids=["one", "batch"])
def test_draft_has_read_as_much_after_plain_rounds_as_in_the_other_loop(setting, lengths, monkeypatch):
    """A row that it has missed changes no text, only what is accepted."""
    target, found = TARGETS["llama"]().eval().double(), []
    draft, prompt = at_fixed_shapes(make_draft(target).double(), 3), make_prompts(lengths)
    chosen = []
    for is_fixed in True, False:
        sizes = itertools.cycle([0, 0, 2, 0, 9, 9, 2])
        monkeypatch.setattr(
            TreeSizer, "choose", lambda sizer, sizes=sizes: chosen.append(size_of(next(sizes))) or chosen[-1]
        )
        if is_fixed:  # asks once more, before the text begins
            for _ in range(6):
                next(sizes)
        draft.generation_config.fixed_shapes = is_fixed
        target.generate(**prompt, assistant_model=draft, max_new_tokens=40, **SETTINGS[setting])
        found.append(draft.speculation_stats.accepted_by_depth)
    assert len(set(chosen)) == 3
    assert sum(found[0]) > 3
    assert found[0] == found[1]


def size_of(num_nodes: int) -> TreePlan:
    return TreePlan(num_nodes, min(num_nodes, 3), 3, None)


def test_a_random_draft_is_not_asked_any_more_at_fixed_shapes(monkeypatch):
    target = TARGETS["llama"]().eval()
    draft = at_fixed_shapes(make_draft(target), 1)
    draft.generation_config.num_assistant_tokens_schedule = "heuristic"
    monkeypatch.setattr(type(draft), "draft_to_target", lambda draft, draft_ids: torch.full_like(draft_ids, 8))
    record = TreeSizer.record
    monkeypatch.setattr(
        TreeSizer, "record", lambda sizer, size, ranks, seconds: record(sizer, size, ranks, 1 + size.depth)
    )
    prompt = make_prompts([5])
    plain = target.generate(**prompt, max_new_tokens=60).tolist()
    for most in 200, 30:
        assert target.generate(**prompt, assistant_model=draft, max_new_tokens=60).tolist() == plain
        assert draft.speculation_stats.drafted_nodes < most


def test_what_rounds_do_while_they_are_tried_is_undone():
    """Graphs of another size are recorded in the middle of a text."""
    target, undone = TARGETS["llama"]().eval(), []
    draft, prompt = at_fixed_shapes(make_draft(target), 3), make_prompts([9, 4])

    def tried(self, size):
        rounds = new(self, size)
        if size not in self.current.rounds:
            with self.buffers.unmoved():
                for stage in rounds.draft_trees, rounds.verify, rounds.choose, rounds.keep:
                    stage()
            undone.append(size)
        return rounds

    plain = target.generate(**prompt, max_new_tokens=40).tolist()
    new, accepted = shelf.Shelf._new_rounds, []
    for is_tried in False, True:
        with pytest.MonkeyPatch.context() as patch:
            random.seed(0)
            patch.setattr(TreeSizer, "choose", lambda sizer: random.choice(list(sizer.sizes)))
            if is_tried:
                patch.setattr(shelf.Shelf, "_new_rounds", tried)
            assert target.generate(**prompt, max_new_tokens=40, assistant_model=draft).tolist() == plain
        accepted.append(draft.speculation_stats.acceptance_lengths)
    assert accepted[0] == accepted[1]
    assert len(undone) > 2


def test_what_was_learned_is_kept_for_the_next_call_with_the_same_models_and_batch_size():
    target = TARGETS["llama"]().eval()
    draft = make_draft(target)
    sizer = sizes_for(draft, target, CHAIN, batch_size=1)
    assert isinstance(sizer, ConstantSize)
    draft.generation_config.num_assistant_tokens_schedule = "heuristic"
    sizer = sizes_for(draft, target, CHAIN, batch_size=1)
    assert sizes_for(draft, target, CHAIN, batch_size=1) is sizer
    assert sizes_for(draft, target, CHAIN, batch_size=2) is not sizer
    assert sizes_for(make_draft(target), target, CHAIN, batch_size=1) is not sizer
    draft.generation_config.num_assistant_tokens_schedule = "heuristic_transient"
    assert sizes_for(draft, target, CHAIN, batch_size=1) is not sizer


def test_a_random_draft_is_not_asked_any_more(monkeypatch):
    """Every forward takes the same time: seven eighths of a round of 7 drafts are wasted."""
    target = TARGETS["llama"]().eval()
    draft = make_draft(target)
    monkeypatch.setattr(type(draft), "draft_to_target", lambda draft, draft_ids: torch.full_like(draft_ids, 8))
    draft.generation_config.num_assistant_tokens_schedule = "heuristic"
    record = TreeSizer.record
    monkeypatch.setattr(
        TreeSizer, "record", lambda sizer, size, ranks, seconds: record(sizer, size, ranks, 1 + size.depth)
    )
    prompt = make_prompts([5])
    assert_same_generation(target, draft, prompt, max_new_tokens=60)
    nodes = draft.speculation_stats.drafted_nodes
    assert_same_generation(target, draft, prompt, max_new_tokens=60)
    assert draft.speculation_stats.drafted_nodes < nodes / 2


def test_an_unknown_schedule_is_refused_by_name():
    target = TARGETS["llama"]().eval()
    draft = make_draft(target)
    draft.generation_config.num_assistant_tokens_schedule = "adaptive"
    with pytest.raises(ValueError, match=r"num_assistant_tokens_schedule` must be None or one of 'constant'"):
        target.generate(**make_prompts([5]), assistant_model=draft, max_new_tokens=3)


@pytest.mark.parametrize("lengths", [[9], [9, 4]], ids=str)
def test_rounds_that_are_tried_stay_within_the_buffers(lengths, monkeypatch):
    """On CUDA a slot beyond them ends the process; the stages run twice before they are recorded."""
    target, highest = TARGETS["llama"]().eval(), []
    draft, prompt = at_fixed_shapes(make_draft(target), 3), make_prompts(lengths)
    monkeypatch.setattr(shelf, "LEAST_CAPACITY", 16)

    def tried(self, size):
        self.kept[self.current_key] = self.current  # as a GPU's are
        buffers = self.buffers
        before, rounds = buffers.lengths.max().item(), new(self, size)
        with buffers.unmoved():
            for _ in range(NUM_WARM_UPS):
                for stage in rounds.draft_trees, rounds.verify, rounds.choose, rounds.keep:
                    stage()
                highest.append(buffers.lengths.max().item() - before)
        assert before + tree_size(self.largest) <= buffers.capacity
        return new(self, size)

    plain = target.generate(**prompt, max_new_tokens=40).tolist()
    new, sizes = shelf.Shelf._new_rounds, random.Random(0)
    monkeypatch.setattr(shelf.Shelf, "_new_rounds", tried)
    monkeypatch.setattr(TreeSizer, "choose", lambda sizer: sizes.choice(list(sizer.sizes)))
    for _ in range(3):
        assert target.generate(**prompt, max_new_tokens=40, assistant_model=draft).tolist() == plain
    assert len(highest) > 8
    assert set(highest) == {0}


def test_kept_buffers_begin_without_the_length_of_an_earlier_text(monkeypatch):
    target = TARGETS["llama"]().eval()
    draft, prompt, lengths = at_fixed_shapes(make_draft(target), 3), make_prompts([9]), []
    make_room = shelf.Shelf.make_room

    def watched(self, num_slots):
        has_room = make_room(self, num_slots)
        lengths.append(self.buffers.lengths.tolist())
        self.kept[self.current_key] = self.current  # as a GPU's are
        return has_room

    monkeypatch.setattr(shelf.Shelf, "make_room", watched)
    for _ in range(2):
        target.generate(**prompt, max_new_tokens=20, assistant_model=draft)
    assert lengths == [[0], [0]]
