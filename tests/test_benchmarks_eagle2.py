"""The reference of the benchmark of trees: it is EAGLE-2's, and it agrees with the decoder where both do the same."""

import ast
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference_generation import TARGETS, VOCAB_SIZE, make_draft, make_prompt, set_tree
from transformers import DynamicCache, LogitsProcessorList

from eagle3_mla.generation import decoder
from eagle3_mla.generation.drafting import DraftMemory, draft_tree
from eagle3_mla.generation.support import TreePlan, tree_plan

SOURCE = Path(__file__).resolve().parents[1] / "benchmarks" / "eagle2.py"
SIZES = [(7, 1, 7), (6, 2, 3), (30, 3, 4), (9, 10, 3)]


@pytest.fixture(scope="module")
def eagle2():
    specification = importlib.util.spec_from_file_location("eagle2", SOURCE)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return TARGETS["llama"]().eval()


def paths_of(tree) -> list[tuple[int, ...]]:
    """The path of every node of ours but the root."""
    paths = {0: ()}
    for node in range(1, len(tree)):
        paths[node] = (*paths[int(tree.parents[0, node])], int(tree.token_ids[0, node]))
    return list(paths.values())[1:]


@torch.no_grad()
def both_trees(eagle2, target, draft, text, size):
    """Ours and the reference after `text`, which both read from the same states."""
    captured = draft.capture_aux_hidden_states(target)
    with captured:
        target(text)
    states, tokens = captured.take()[:, :-1], text[:, 1:]
    plan = TreePlan(size.num_nodes, size.depth, size.top_k, None)
    memory = DraftMemory.of_prompt(draft.fuse(states), text, mask=None)
    ours = draft_tree(draft, target, memory, plan, LogitsProcessorList(), None)
    cache = DynamicCache()
    outputs = draft(inputs_embeds=draft.embed(tokens, target), aux_hidden_states=states, past_key_values=cache)
    reference = eagle2.reference_tree(target, draft, cache, outputs.states[:, -1:], outputs.logits[:, -1], size)
    return paths_of(ours), reference


def test_reference_shares_no_code_with_the_decoder():
    imported = [node for node in ast.walk(ast.parse(SOURCE.read_text())) if isinstance(node, ast.ImportFrom)]
    assert {node.module.split(".")[0] for node in imported} == {"copy", "dataclasses", "torch", "transformers"}


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_our_greedy_tree_is_the_reference(eagle2, llama, shape):
    for seed in range(5):
        torch.manual_seed(seed)
        text = torch.randint(2, VOCAB_SIZE, (1, 9))
        ours, reference = both_trees(eagle2, llama, make_draft(llama).double(), text, eagle2.TreeSize(*shape))
        assert set(ours) == set(reference)
        assert len(ours) == len(reference) > 0


def test_reference_expands_and_ranks_as_the_paper_says(eagle2, llama):
    """Against all paths: the tokens of a depth continue the best nodes of the depth before, by cumulative value."""
    draft, size = make_draft(llama).double(), eagle2.TreeSize(5, 2, 3)
    text = torch.randint(2, VOCAB_SIZE, (1, 9))
    _, reference = both_trees(eagle2, llama, draft, text, size)
    captured = draft.capture_aux_hidden_states(llama)
    with captured, torch.no_grad():
        llama(text)
    states = captured.take()[:, :-1]

    @torch.no_grad()
    def log_probs_after(path):
        """The whole text anew, then the path, token by token on the draft's own states."""
        embeds = draft.embed(torch.cat([text[:, 1:], torch.tensor([path], dtype=torch.long)], dim=1), llama)
        cache = DynamicCache()
        outputs = draft(inputs_embeds=embeds[:, :8], aux_hidden_states=states, past_key_values=cache)
        for step in range(len(path)):
            outputs = draft(
                inputs_embeds=embeds[:, 8 + step : 9 + step],
                fused_states=outputs.states[:, -1:],
                past_key_values=cache,
            )
        return outputs.logits[0, -1].log_softmax(dim=-1)

    def children(value, path):
        best = log_probs_after(path).topk(2)
        ids = draft.draft_to_target(best.indices).tolist()
        return [(value + log_prob, (*path, token)) for log_prob, token in zip(best.values.tolist(), ids, strict=True)]

    first = children(0.0, ())
    second = [child for node in first for child in children(*node)]
    third = [child for node in sorted(second, reverse=True)[:2] for child in children(*node)]
    expected = [path for _, path in sorted(first + second + third, reverse=True)[:5]]
    assert reference == expected


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_replay_counts_what_the_decoder_counts(eagle2, llama, shape, do_sample, monkeypatch):
    """With trees that neither the noise nor the end of the text changes, as EAGLE's."""
    monkeypatch.setattr(decoder, "tree_plan", lambda draft: NeverCut(**vars(tree_plan(draft))))
    monkeypatch.setattr(decoder, "draft_tree", lambda *arguments: draft_tree(*arguments[:-1], None))
    num_accepted = 0
    for seed in range(2):
        torch.manual_seed(seed)
        draft, prompt = make_draft(llama).double(), make_prompt(6)
        set_tree(draft, *shape)
        text = llama.generate(
            **prompt, max_new_tokens=20, do_sample=do_sample, eos_token_id=[1], assistant_model=draft
        )
        stats, counts = draft.speculation_stats, eagle2.replay(llama, draft, text, 6, eagle2.TreeSize(*shape))
        assert counts.acceptance_lengths == stats.acceptance_lengths
        for name in ("drafted_by_depth", "accepted_by_depth"):
            assert [count for count in getattr(counts, name) if count] == [x for x in getattr(stats, name) if x]
        num_accepted += sum(counts.accepted_by_depth)
    assert num_accepted > 0


class NeverCut(TreePlan):
    """Drafts as deep before the end of the text as anywhere."""

    def at_most(self, depth: int) -> TreePlan:
        return replace(self)


def test_one_draw_accepts_as_often_as_children_tried_in_turn():
    """EAGLE's sampling: accept a child with its probability, or take it out, renormalise and try the next."""
    probs = torch.softmax(torch.randn(6, dtype=torch.float64), dim=-1)
    children = [4, 1, 3]
    left, undecided, law = probs.clone(), 1.0, torch.zeros(6, dtype=torch.float64)
    for child in children:
        law[child] += undecided * left[child]
        undecided *= 1 - left[child].item()
        left[child] = 0
        left /= left.sum()
    accepted = law.sum()
    law += undecided * left
    torch.testing.assert_close(accepted, probs[children].sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(law, probs, rtol=1e-12, atol=0)
