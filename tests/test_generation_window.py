"""`draft_window`: what a row of the draft sees of its past, against masks over a cache that forgets nothing."""

from dataclasses import dataclass, field

import pytest
import torch
from pairwise import pairwise
from reference_generation import TARGETS, VOCAB_SIZE, assert_same_generation, make_draft, make_prompts
from transformers import DynamicCache, LogitsProcessorList

from eagle3_mla.generation import caches
from eagle3_mla.generation import memory as memories
from eagle3_mla.generation.draft_window import DraftWindow
from eagle3_mla.generation.drafting import draft_tree
from eagle3_mla.generation.memory import DraftMemory
from eagle3_mla.generation.support import TreePlan, draft_window

KINDS = [{}, {"mla_rope_dim": 4}, {"attention_type": "gqa"}, {"num_hidden_layers": 2}]


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return TARGETS["llama"]().eval()


@dataclass
class Reference:
    """All rows of one sequence, and the tree after them by plain recursion, each node by a chain of its own."""

    draft: torch.nn.Module
    target: torch.nn.Module
    window: int
    sink: int
    states: torch.Tensor = field(default_factory=lambda: torch.zeros(1, 0, 32).double())
    tokens: torch.Tensor = field(default_factory=lambda: torch.zeros(1, 0, dtype=torch.long))

    def append(self, states, tokens) -> None:
        self.states = torch.cat([self.states, states[None]], dim=1)
        self.tokens = torch.cat([self.tokens, tokens[None]], dim=1)

    def past_mask(self, position: int, num_rows: int) -> list[float]:
        seen = [row <= position and (row < self.sink or row > position - self.window) for row in range(num_rows)]
        return [0.0 if each else torch.finfo(torch.float64).min for each in seen]

    def read(self):
        num_rows = self.tokens.shape[1]
        mask = torch.tensor([self.past_mask(position, num_rows) for position in range(num_rows)]).double()
        cache, embeds = DynamicCache(), self.draft.embed(self.tokens, self.target)
        outputs = self.draft(
            embeds, fused_states=self.states, attention_mask=mask[None, None], past_key_values=cache, logits_to_keep=1
        )
        return outputs, cache

    def logits_after(self, path: tuple[int, ...]) -> torch.Tensor:
        outputs, cache = self.read()
        num_rows = self.tokens.shape[1]
        for depth, token in enumerate(path):
            mask = self.past_mask(num_rows + depth, num_rows) + [0.0] * (depth + 1)  # ancestors are always seen
            outputs = self.draft(
                self.draft.embed(torch.tensor([[token]]), self.target),
                fused_states=outputs.states,
                attention_mask=torch.tensor(mask).double()[None, None, None],
                past_key_values=cache,
            )
        return outputs.logits[0, -1].float()

    def tree(self, plan: TreePlan) -> set[tuple[int, ...]]:
        paths, expanded = {}, {(): 0.0}
        for _ in range(plan.depth):
            found = {}
            for path, score in expanded.items():
                best = self.logits_after(path).log_softmax(dim=-1).topk(plan.top_k)
                for log_prob, draft_id in zip(best.values.tolist(), best.indices, strict=True):
                    found[(*path, int(self.draft.draft_to_target(draft_id)))] = score + log_prob
            paths |= found
            expanded = dict(sorted(found.items(), key=lambda item: -item[1])[: plan.top_k])
        return set(sorted(paths, key=lambda path: -paths[path])[: plan.num_nodes])


def paths_of(tree, row: int) -> set[tuple[int, ...]]:
    paths = {0: ()}
    for node in range(1, len(tree)):
        paths[node] = (*paths[int(tree.parents[row, node])], int(tree.token_ids[row, node]))
    return set(paths.values()) - {()}


def side_by_side(rows, ends_together: bool):
    """Rows of different counts in one tensor, beside others that nobody may see."""
    width = max(len(tokens) for _, tokens in rows)
    states = torch.full((len(rows), width, 32), 1e3).double()
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    for row, (own_states, own_tokens) in enumerate(rows):
        count = len(own_tokens)
        place = slice(width - count, None) if ends_together else slice(count)
        states[row, place], tokens[row, place] = own_states, own_tokens
    return states, tokens


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "sizes", "lengths", "top_k"),
    pairwise(KINDS, [(5, 2), (2, 0), (1, 4), (9, 3)], [[14], [3], [14, 3, 9]], [1, 3]),
    ids=str,
)
def test_drafts_are_those_of_masks_over_a_full_cache(kind, sizes, lengths, top_k, monkeypatch):
    """Rows in the wrong slot, at the wrong position or gone too early cost acceptance only; nobody would see it."""
    monkeypatch.setattr(memories, "WINDOW_CHUNK_ROWS", 4)
    (window, sink), target = sizes, TARGETS["llama"]().eval().double()
    draft = make_draft(target, **kind).double()
    plan = TreePlan(num_nodes=6 if top_k > 1 else 3, depth=3, top_k=top_k, confidence_threshold=None)
    references = [Reference(draft, target, window, sink) for _ in lengths]
    memory = None
    for counts in [lengths, *[[(3 * turn + 2 * row) % 4 + 1 for row in range(len(lengths))] for turn in range(6)]]:
        rows = [(torch.randn(count, 32).double(), torch.randint(2, VOCAB_SIZE, (count,))) for count in counts]
        states, tokens = side_by_side(rows, ends_together=memory is None)
        if memory is None:
            memory = DraftMemory(states, tokens, counts, [0] * len(counts), window=DraftWindow(window, sink))
        else:
            memory.await_rows(states, tokens, counts)
        tree = draft_tree(draft, target, memory, plan, LogitsProcessorList(), None)
        assert memory.cache.get_seq_length() <= window + sink + 4
        for row, (reference, own) in enumerate(zip(references, rows, strict=True)):
            reference.append(*own)
            assert paths_of(tree, row) == reference.tree(plan)
            assert_rows_are_held(memory, row, reference.read()[1])
    assert min(memory.num_dropped) > 0


def assert_rows_are_held(memory, row: int, expected) -> None:
    positions = memory.slot_positions(memory.num_held[row], torch.device("cpu"))[row]
    assert positions[-1] == memory.num_rows[row] - 1
    for layer, expected_layer in zip(memory.cache.layers, expected.layers, strict=True):
        for name in "keys", "values":
            held, states = getattr(layer, name)[row, :, : len(positions)], getattr(expected_layer, name)[0]
            torch.testing.assert_close(held, states[:, positions], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("sizes", "shape", "lengths", "do_sample"),
    pairwise([(3, 1), (8, None)], [(5, 1), (12, 3)], [[40], [12, 9, 14, 3]], [False, True]),
    ids=str,
)
def test_text_is_that_of_plain_generation(llama, sizes, shape, lengths, do_sample, monkeypatch):
    monkeypatch.setattr(memories, "WINDOW_CHUNK_ROWS", 4)
    (window, sink), draft, num_accepted = sizes, make_draft(llama), 0
    config = draft.generation_config
    config.draft_window, config.draft_window_sink = window, sink
    config.num_assistant_tokens, config.assistant_tree_top_k = shape
    for seed in range(3):
        assert_same_generation(llama, draft, make_prompts(lengths), seed, do_sample=do_sample)
        num_accepted += sum(draft.speculation_stats.accepted_by_depth)
        assert draft.speculation_stats.draft_cache_tokens <= window + (4 if sink is None else sink) + 4
    assert num_accepted > 0


@pytest.mark.parametrize("window", [None, 16])
def test_cache_stays_as_large_as_it_is_however_long_the_text_becomes(llama, window, monkeypatch):
    monkeypatch.setattr(memories, "WINDOW_CHUNK_ROWS", 8)
    monkeypatch.setattr(caches, "SPARE_POSITIONS", 8)
    draft, num_bytes = make_draft(llama), []
    draft.generation_config.draft_window = window
    for num_tokens, max_new_tokens in [(30, 40), (30, 100), (100, 30)]:
        prompt = make_prompts([num_tokens])
        llama.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False, assistant_model=draft)
        num_bytes.append(draft.speculation_stats.draft_cache_bytes)
    is_constant = len(set(num_bytes)) == 1
    assert is_constant == (window is not None)


@pytest.mark.parametrize("lengths", [[12], [12, 5]], ids=str)
def test_window_that_nothing_reaches_beyond_drafts_as_none(llama, lengths):
    draft, prompt, logits = make_draft(llama), make_prompts(lengths), []
    for window in None, 100:
        draft.generation_config.draft_window = window
        logits.append([])
        hook = draft.register_forward_hook(lambda draft, inputs, outputs: logits[-1].append(outputs.logits[:, -1]))
        assert_same_generation(llama, draft, prompt, do_sample=False)
        hook.remove()
    if len(lengths) == 1:
        assert all(torch.equal(*each) for each in zip(*logits, strict=True))
    assert len(logits[0]) >= len(logits[1]) > 10


@pytest.mark.parametrize(
    ("knob", "value", "bound"),
    [
        ("draft_window", 0, 1),
        ("draft_window", -3, 1),
        ("draft_window", 2.5, 1),
        ("draft_window", True, 1),
        ("draft_window_sink", -1, 0),
        ("draft_window_sink", "4", 0),
    ],
    ids=str,
)
def test_setting_out_of_its_bounds_is_named(llama, knob, value, bound):
    draft = make_draft(llama)
    setattr(draft.generation_config, knob, value)
    message = rf"`draft.generation_config.{knob}` must be an integer of at least {bound}, got {value!r}"
    with pytest.raises(ValueError, match=message):
        llama.generate(**make_prompts([4]), max_new_tokens=5, assistant_model=draft)


def test_window_is_off_by_default_and_has_four_rows_of_sink(llama):
    draft = make_draft(llama)
    assert draft_window(draft) is None
    draft.generation_config.draft_window = 7
    assert draft_window(draft) == DraftWindow(7, 4)
