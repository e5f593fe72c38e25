"""Draft trees: what is drafted, what the target reads of it, what caches keep, and that the text stays the same."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairwise import pairwise
from reference_generation import (
    SETTINGS,
    TARGETS,
    VOCAB_SIZE,
    assert_same_generation,
    make_draft,
    make_prompt,
    make_prompts,
    set_tree,
)
from transformers import DynamicCache, LogitsProcessorList

from eagle3_mla.generation import drafting
from eagle3_mla.generation.branching import branching_inputs
from eagle3_mla.generation.caches import keep_path
from eagle3_mla.generation.drafting import draft_tree
from eagle3_mla.generation.memory import DraftMemory
from eagle3_mla.generation.probing import can_branch
from eagle3_mla.generation.support import TreePlan, tree_plan
from eagle3_mla.generation.tree import DraftTree, build_tree
from eagle3_mla.modeling_eagle3_mla import Eagle3MLADraftModel

# Identities in fp64; the eager attention of Gemma 2 takes its softmax in fp32.
TOLERANCES = {"gemma2-window-8": 1e-5}
CHAINS_ONLY = ["bloom", "gpt-neo-window-8"]
BRANCHING = [name for name in TARGETS if name not in CHAINS_ONLY]
# A root with three children, of which two go on.
TREE = DraftTree(torch.tensor([[3, 4, 5, 6, 7, 8, 9]]), torch.tensor([[0, 0, 0, 0, 1, 2, 4]]))


def path_to(tree: DraftTree, node: int, row: int = 0) -> list[int]:
    """The nodes from the root to `node`."""
    return [0] if node == 0 else [*path_to(tree, int(tree.parents[row, node]), row), node]


@st.composite
def trees(draw):
    num_nodes = draw(st.integers(1, 12))
    parents = [[0] + [draw(st.integers(0, node - 1)) for node in range(1, num_nodes)] for _ in range(2)]
    return DraftTree(torch.arange(num_nodes).expand(2, -1), torch.tensor(parents))


@given(tree=trees())
@settings(deadline=None)
def test_node_attends_to_its_ancestors_only(tree):
    for row in range(2):
        for node in range(len(tree)):
            path = path_to(tree, node, row)
            assert tree.attends[row, node].nonzero().flatten().tolist() == sorted(path)
            assert tree.depths[row, node] == len(path) - 1


@given(seed=st.integers(0, 10**6), num_nodes=st.integers(1, 20), has_ties=st.booleans())
@settings(deadline=None)
def test_kept_candidates_are_the_best_and_come_with_their_parents(seed, num_nodes, has_ties):
    """Without its parent a node would hang under another one, and the target would read a text nobody proposed."""
    generator = torch.Generator().manual_seed(seed)
    candidates = [random_candidates(generator, has_ties) for _ in range(3)]
    parents, scores = (torch.stack(each) for each in zip(*candidates, strict=True))
    roots = torch.tensor([[97], [98], [99]])
    trees = build_tree(roots, torch.arange(25).expand(3, -1), parents, scores, num_nodes)
    assert trees.token_ids[:, :1].equal(roots)
    for row, (tokens, places) in enumerate(zip(trees.token_ids, trees.parents, strict=True)):
        kept = tokens[1:].tolist()
        best = scores[row].sort(descending=True).values[:num_nodes]
        assert sorted(scores[row, kept].tolist()) == sorted(best.tolist())
        for node, token in enumerate(kept, start=1):
            assert places[node] < node
            assert tokens[places[node]] == (roots[row, 0] if parents[row, token] < 0 else parents[row, token])


def random_candidates(generator: torch.Generator, has_ties: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Parents and path scores of 25 candidates."""
    parents = torch.tensor([-1, -1] + [int(torch.randint(-1, node, (), generator=generator)) for node in range(2, 25)])
    steps = -torch.rand(25, generator=generator) * (0 if has_ties else 1)
    scores = torch.zeros(25)
    for node, parent in enumerate(parents.tolist()):
        scores[node] = steps[node] + (scores[parent] if parent >= 0 else 0)
    return parents, scores


@pytest.mark.parametrize("num_committed", [3, 12], ids=["within-the-window", "beyond-the-window"])
@pytest.mark.parametrize("name", BRANCHING)
def test_target_reads_a_tree_as_it_reads_each_of_its_paths(name, num_committed):
    target, tolerance = TARGETS[name]().eval().double(), TOLERANCES.get(name, 1e-10)
    read = partial(read_after_prompt, target, make_prompt(num_committed))
    logits, _ = read(TREE.token_ids[0], TREE)
    for node in range(len(TREE)):
        expected, _ = read(TREE.token_ids[0, path_to(TREE, node)], None)
        torch.testing.assert_close(logits[node], expected[-1], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("num_committed", [3, 12], ids=["within-the-window", "beyond-the-window"])
@pytest.mark.parametrize("name", BRANCHING)
def test_kept_path_is_the_cache_of_a_text_that_never_branched(name, num_committed):
    target, tolerance = TARGETS[name]().eval().double(), TOLERANCES.get(name, 1e-10)
    read, path = partial(read_after_prompt, target, make_prompt(num_committed)), [0, 1, 4]
    _, cache = read(TREE.token_ids[0], TREE)
    keep_path(cache, len(TREE), torch.tensor([path]))
    _, expected = read(TREE.token_ids[0, path], None)
    keep_path(expected, len(path), torch.arange(len(path))[None])  # a window returns to its size
    for layer, expected_layer in zip(cache.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.keys, expected_layer.keys, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(layer.values, expected_layer.values, atol=tolerance, rtol=tolerance)
    assert cache.get_seq_length() == expected.get_seq_length()


@torch.no_grad()
def read_after_prompt(target, prompt, token_ids, tree):
    """Logits `(N, V)` of a tree or a chain after the prompt, and the cache that then holds all of it."""
    cache = DynamicCache(config=target.config)
    mask = prompt["attention_mask"]
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    target(**prompt, position_ids=positions, past_key_values=cache)
    cache.activate_past_recording()
    inputs = {
        "attention_mask": torch.cat([mask, mask.new_ones(1, len(token_ids))], dim=-1),
        "position_ids": positions[:, -1:] + 1 + torch.arange(len(token_ids)),
    }
    if tree is not None:
        inputs |= branching_inputs(target, tree, inputs, {"past_key_values": cache, "attention_mask": mask})
    return target(input_ids=token_ids[None], past_key_values=cache, **inputs).logits[0], cache


@pytest.mark.parametrize("fields", [{}, {"mla_rope_dim": 4}, {"attention_type": "gqa"}], ids=str)
@pytest.mark.parametrize("noise_seed", [None, 0], ids=["greedy", "noise"])
def test_drafted_tree_is_the_best_of_all_paths_of_the_reference(fields, noise_seed):
    """EAGLE-2's expansion, written as plain recursion: every node by a chain of the draft's own forwards."""
    target = TARGETS["llama"]().eval().double()
    draft = make_draft(target, **fields).double()
    memory = DraftMemory(torch.randn(1, 5, 32).double(), torch.randint(2, VOCAB_SIZE, (1, 5)), [5], [0])
    pending = memory.pending_states, memory.pending_tokens
    noise = None if noise_seed is None else KnownNoise(noise_seed)
    plan = TreePlan(num_nodes=11, depth=3, top_k=3, confidence_threshold=None)
    tree = draft_tree(draft, target, memory, plan, LogitsProcessorList(), noise)
    drafted = {tuple(tree.token_ids[0, path_to(tree, node)].tolist()) for node in range(1, len(tree))}
    assert drafted == reference_tree(draft, target, *pending, plan, noise)
    assert memory.cache.get_seq_length() == 5


class KnownNoise:
    """Stands for `Noise`: any draws, always the same."""

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.draws = torch.empty(3, VOCAB_SIZE).exponential_(1, generator=generator)

    def peek(self, ahead: int) -> torch.Tensor:
        return self.draws[ahead : ahead + 1]


@torch.no_grad()
def reference_tree(draft, target, states, tokens, plan, noise) -> set[tuple[int, ...]]:
    """The paths, each with its root, that EAGLE-2 keeps (arXiv:2406.16858, Section 4)."""
    root = int(tokens[0, -1])
    paths, expanded = {}, {(root,): 0.0}
    for depth in range(plan.depth):
        found = {}
        for path, score in expanded.items():
            log_probs = chain_logits(draft, target, states, tokens, path[1:]).log_softmax(dim=-1)
            if noise is not None:
                known = draft.draft_to_target(torch.arange(len(log_probs)))
                log_probs = (log_probs - noise.peek(depth)[0, known].log()).log_softmax(dim=-1)
            best = log_probs.topk(plan.top_k)
            for log_prob, draft_id in zip(best.values.tolist(), best.indices, strict=True):
                found[(*path, int(draft.draft_to_target(draft_id)))] = score + log_prob
        paths |= found
        expanded = dict(sorted(found.items(), key=lambda item: -item[1])[: plan.top_k])
    return set(sorted(paths, key=lambda path: -paths[path])[: plan.num_nodes])


def chain_logits(draft, target, states, tokens, path) -> torch.Tensor:
    """The draft's logits `(Vd,)` after it has decoded `path`, one token at a time."""
    cache = DynamicCache()
    outputs = draft(draft.embed(tokens, target), fused_states=states, past_key_values=cache, logits_to_keep=1)
    for token in path:
        embeds = draft.embed(torch.tensor([[token]]), target)
        outputs = draft(embeds, fused_states=outputs.states, past_key_values=cache)
    return outputs.logits[0, -1].float()


CELLS = ["greedy", "greedy-processors", "sample", "sample-warpers", "sample-eos"]
SHAPES = [(12, 3, 4), (40, 10, 3)]
PROMPTS = [(9, 0), (12, 5), (1, 0)]  # tokens, and padding before them


@pytest.mark.parametrize(("name", "setting", "shape", "prompt"), pairwise(BRANCHING, CELLS, SHAPES, PROMPTS), ids=str)
def test_text_of_a_tree_is_that_of_plain_generation(name, setting, shape, prompt):
    target, num_accepted, seed = TARGETS[name]().eval(), 0, 0
    while num_accepted == 0 and seed < 6:
        draft = set_tree(make_draft(target), *shape)
        assert_same_generation(target, draft, make_prompt(*prompt), seed, **SETTINGS[setting])
        num_accepted, seed = sum(draft.speculation_stats.accepted_by_depth), seed + 1
        assert draft.speculation_stats.drafted_nodes <= shape[0] * draft.speculation_stats.rounds
    assert can_branch(target)
    assert num_accepted > 0


@pytest.mark.parametrize("mask", [[1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1]], ids=str)
def test_mask_of_any_form_gives_the_plain_text(mask):
    target = TARGETS["llama"]().eval()
    prompt = {"input_ids": make_prompt(6)["input_ids"], "attention_mask": torch.tensor([mask])}
    assert_same_generation(target, set_tree(make_draft(target), 12, 4), prompt, do_sample=False)


@pytest.mark.parametrize("fields", [{"mla_rope_dim": 4}, {"attention_type": "gqa"}, {"num_hidden_layers": 2}], ids=str)
@pytest.mark.parametrize("kernel", ["eager", "sdpa", "flex_attention"])
def test_every_head_and_kernel_drafts_trees(fields, kernel):
    target = TARGETS["llama"]().eval()
    draft = set_tree(make_draft(target, **fields), 12, 4)
    draft.set_attn_implementation(kernel)
    assert_same_generation(target, draft, make_prompt(7), do_sample=True)


def test_wide_tree_accepts_more_than_a_chain_of_its_depth():
    target = TARGETS["llama"]().eval()
    draft, accepted = make_draft(target), []
    for top_k in (1, 10):
        set_tree(draft, 3 if top_k == 1 else 60, top_k, depth=3)
        assert_same_generation(target, draft, make_prompt(7), do_sample=True, max_new_tokens=60)
        accepted.append(draft.speculation_stats.acceptance_length)
    assert accepted[1] > accepted[0]


@pytest.mark.parametrize("name", CHAINS_ONLY)
def test_target_that_takes_no_tree_mask_gets_a_chain_and_says_why(name, caplog):
    target = TARGETS[name]().eval()
    draft = set_tree(make_draft(target), 12, 3, depth=4)
    for _ in range(2):
        assert_same_generation(target, draft, make_prompt(7), do_sample=False)
    assert not can_branch(target)
    assert len(draft.speculation_stats.drafted_by_depth) <= 4
    assert sum("chains are drafted" in record.message for record in caplog.records) == 1


def test_settings_of_the_tree_are_saved_with_the_draft(tmp_path):
    draft = set_tree(make_draft(TARGETS["llama"]()), 25, 5, depth=6)
    draft.save_pretrained(tmp_path)
    loaded = Eagle3MLADraftModel.from_pretrained(tmp_path)
    assert tree_plan(loaded) == TreePlan(num_nodes=25, depth=6, top_k=5, confidence_threshold=None)


@pytest.mark.parametrize(
    ("name", "value", "bound"),
    [
        ("assistant_tree_top_k", 0, "at least 1"),
        ("assistant_tree_top_k", 11, "at most `draft_vocab_size` \\(10\\)"),
        ("assistant_tree_top_k", 2.0, "at least 1"),
        ("assistant_tree_depth", 0, "at least 1"),
        ("assistant_tree_depth", True, "at least 1"),
        ("num_assistant_tokens", -1, "at least 0"),
    ],
)
def test_setting_out_of_its_bounds_is_refused_by_name(name, value, bound):
    target = TARGETS["llama"]().eval()
    draft = make_draft(target)
    setattr(draft.generation_config, name, value)
    with pytest.raises(ValueError, match=f"{name}` must be .*{bound}.*got {value}"):
        target.generate(**make_prompt(5), max_new_tokens=4, assistant_model=draft)


def test_absent_settings_mean_a_chain_and_depths_have_a_default():
    draft = make_draft(TARGETS["llama"]())
    assert tree_plan(draft) == TreePlan(num_nodes=7, depth=7, top_k=1, confidence_threshold=None)
    assert tree_plan(set_tree(draft, 60, 10)).depth == 8
    assert tree_plan(set_tree(draft, 3, 2)).depth == 3


def test_nodes_come_with_their_parents_where_scores_are_not_numbers():
    scores = torch.tensor([[-1.0, -2.0, *[float("nan")] * 4]])
    parents = torch.tensor([[-1, -1, 0, 0, 1, 1]])
    tree = build_tree(torch.tensor([[5]]), torch.tensor([[1, 2, 3, 4, 5, 6]]), parents, scores, num_nodes=3)
    assert tree.token_ids.tolist() == [[5, 1, 2, 3]]
    assert tree.parents.tolist() == [[0, 0, 0, 1]]


@pytest.mark.parametrize("is_fixed", [False, True])
def test_text_is_that_of_plain_generation_whatever_a_head_that_overflows_says(is_fixed, monkeypatch):
    best = drafting.best_log_probs
    monkeypatch.setattr(
        drafting,
        "best_log_probs",
        lambda scores, top_k: best(scores * (1 if scores.shape[1] == 1 else torch.nan), top_k),
    )
    for seed in range(3):
        torch.manual_seed(seed)
        target, prompt = TARGETS["llama"]().eval(), make_prompts([5])
        draft = set_tree(make_draft(target), 6, 3, 2)
        draft.generation_config.fixed_shapes = is_fixed
        plain = target.generate(**prompt, max_new_tokens=30).tolist()
        assert target.generate(**prompt, max_new_tokens=30, assistant_model=draft).tolist() == plain
