"""Draft trees: the kernels that build them and that tell who sees whom, against the definitions."""

import pytest
import torch

from eagle3_mla.generation import tree as module
from eagle3_mla.generation.tree import DraftTree, attends_by_definition, build_by_definition, build_tree

in_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
# Batch size, candidates, nodes that are asked for.
BUILDS = [(1, 12, 4), (3, 100, 9), (2, 720, 60), (2, 9, 30), (1, 1, 1), (2, 64, 64), (1, 130, 127)]
BIG_BUILDS = [(32, 720, 60), (4, 1024, 127), (8, 1000, 64)]
KINDS = ["distinct", "ties", "signed-zeros", "not-numbers", "lowest"]
# Batch size, nodes, depth.
TREES = [(1, 1, 0), (2, 7, 3), (3, 61, 8), (1, 128, 127), (2, 64, 5)]


def make_candidates(shape: tuple[int, int], kind: str, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """Roots, tokens, parents and path scores: no score exceeds the parent's, unless it is not a number."""
    batch_size, num_candidates = shape
    root, token_ids = torch.randint(0, 99, (batch_size, 1)), torch.randint(0, 99, shape)
    parents = (torch.rand(shape) * (torch.arange(num_candidates) + 1)).long() - 1  # (B, M), each before its child
    steps = -torch.rand(shape) if kind == "distinct" else -torch.randint(0, 2, shape).float()
    if kind == "not-numbers":
        steps[torch.rand(shape) < 0.3] = float("nan")
    if kind == "lowest":
        steps[torch.rand(shape) < 0.5] = -float("inf")
    scores = torch.zeros(shape)
    for place in range(num_candidates):
        parent = parents[:, place]
        of_parent = torch.where(parent < 0, 0.0, scores.gather(1, parent.clamp(min=0)[:, None])[:, 0])
        scores[:, place] = of_parent + steps[:, place]
    if kind == "signed-zeros":
        scores = torch.where(torch.rand(shape) < 0.5, 0.0, -0.0)
    return tuple(each.to(device) for each in (root, token_ids, parents, scores))


def assert_same_tree(found: DraftTree, expected: DraftTree) -> None:
    for name in ("token_ids", "parents", "preferred"):
        value, other = getattr(found, name), getattr(expected, name)
        assert value.dtype == other.dtype
        assert torch.equal(value, other), name
    assert (found.is_chain, found.max_depth) == (expected.is_chain, expected.max_depth)


def compare_builds(shape: tuple[int, int, int], kind: str, device: str = "cpu") -> None:
    from eagle3_mla.generation.tree_triton import build

    given = make_candidates(shape[:2], kind, device)
    assert_same_tree(build(*given, shape[2], 8), build_by_definition(*given, shape[2], 8))


def make_parents(shape: tuple[int, int, int], device: str = "cpu") -> torch.Tensor:
    """Of trees in which no node is deeper than it may be, the last one a chain as far as possible."""
    batch_size, num_nodes, depth = shape
    parents, depths = torch.zeros(batch_size, num_nodes, dtype=torch.long), torch.zeros(batch_size, num_nodes)
    for row in range(batch_size):
        for node in range(1, num_nodes):
            may_go_on = (depths[row, :node] < depth).nonzero()[:, 0]
            chosen = -1 if row == batch_size - 1 else int(torch.randint(0, len(may_go_on), ()))
            parents[row, node] = may_go_on[chosen]
            depths[row, node] = depths[row, parents[row, node]] + 1
    return parents.to(device)


def compare_attends(shape: tuple[int, int, int], device: str = "cpu") -> None:
    from eagle3_mla.generation.tree_triton import attends

    parents = make_parents(shape, device)
    sees = attends(parents, shape[2])
    assert sees.dtype == torch.bool
    assert torch.equal(sees, attends_by_definition(parents, shape[2]))


@in_interpreter
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", BUILDS, ids=str)
def test_kernel_builds_the_tree_of_the_definition_in_the_interpreter(shape, kind):
    pytest.importorskip("triton")
    compare_builds(shape, kind)


@in_interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0])
def test_of_equal_scores_the_first_candidates_make_the_tree(value):
    pytest.importorskip("triton")
    from eagle3_mla.generation.tree_triton import build

    root, token_ids, parents, scores = make_candidates((2, 40), "ties")
    tree = build(root, token_ids, parents, torch.full_like(scores, value), 9, None)
    assert torch.equal(tree.token_ids, torch.cat([root, token_ids[:, :9]], dim=1))
    assert torch.equal(tree.preferred, torch.arange(9).expand(2, -1))


@in_interpreter
@pytest.mark.parametrize("shape", TREES, ids=str)
def test_kernel_sees_ancestors_in_the_interpreter(shape):
    pytest.importorskip("triton")
    compare_attends(shape)


def test_double_precision_and_large_trees_never_reach_the_kernels(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "runs_on_triton", lambda tensor, num_nodes: asked.append(num_nodes))
    root, token_ids, parents, scores = make_candidates((1, 1025), "distinct")
    build_tree(root, token_ids, parents, scores, 4)
    build_tree(root, token_ids[:, :9], parents[:, :9], scores[:, :9].double(), 4)
    assert asked == []
    build_tree(root, token_ids[:, :9], parents[:, :9], scores[:, :9], 40)
    assert asked == [10]
    monkeypatch.undo()
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(module, "can_run_kernels", lambda device: True)
    assert module.runs_on_triton(scores, module.MOST_NODES)
    assert not module.runs_on_triton(scores, module.MOST_NODES + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*BUILDS, *BIG_BUILDS], ids=str)
def test_kernel_builds_the_tree_of_the_definition(shape, kind):
    compare_builds(shape, kind, "cuda")
    given = make_candidates(shape[:2], kind, "cuda")
    assert_same_tree(build_tree(*given, shape[2], 8), build_by_definition(*given, shape[2], 8))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*TREES, (32, 61, 8)], ids=str)
def test_kernel_sees_ancestors(shape):
    compare_attends(shape, "cuda")
    parents = make_parents(shape, "cuda")
    tree = DraftTree(torch.zeros_like(parents), parents, max_depth=shape[2])
    assert torch.equal(tree.attends, attends_by_definition(parents, shape[2]))
