"""A depth of a draft's tree: the kernel against the definition, and the definition against a plain loop."""

import pytest
import torch

from eagle3_mla.generation.levels import Candidates, Frontier, grow, grow_by_definition

in_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
VOCAB_SIZE = 50
# Batch size, best nodes of each depth, depths, columns of `sees` beyond those drafted.
SHAPES = [(1, 1, 4, 0), (1, 10, 3, 45), (3, 4, 4, 3), (2, 32, 2, 0), (2, 5, 3, 200)]


def make_depths(shape: tuple[int, ...], device: str = "cpu") -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Log-probabilities and draft ids of every depth; many are equal, some minus infinity."""
    batch_size, top_k, num_depths, _ = shape
    generator, depths = torch.Generator().manual_seed(0), []
    for depth in range(num_depths):
        size = batch_size, 1 if depth == 0 else top_k, top_k
        log_probs = -torch.randint(0, 6, size, generator=generator).float() / 2
        log_probs[torch.rand(size, generator=generator) < 0.05] = -float("inf")
        draft_ids = torch.rand(*size[:2], VOCAB_SIZE, generator=generator).argsort(dim=-1)[..., :top_k]
        depths.append((log_probs.to(device), draft_ids.to(device)))
    return depths


def make_offsets(device: str = "cpu") -> torch.Tensor:
    """As a draft's `d2t`."""
    return torch.randint(0, 7, (VOCAB_SIZE,), generator=torch.Generator().manual_seed(1)).cumsum(0).to(device)


def grow_all(grow, shape: tuple[int, ...], device: str = "cpu") -> list[tuple[Candidates, Frontier]]:
    batch_size, top_k, num_depths, num_more = shape
    frontier, d2t, grown = Frontier.of_roots(batch_size, torch.device(device)), make_offsets(device), []
    for log_probs, draft_ids in make_depths(shape, device):
        level, frontier = grow(frontier, log_probs, draft_ids, d2t, num_depths * top_k + num_more)
        grown.append((level, frontier))
    return grown


def assert_same(found: list[tuple[Candidates, Frontier]], expected: list[tuple[Candidates, Frontier]]) -> None:
    for parts, expected_parts in zip(found, expected, strict=True):
        for part, expected_part in zip(parts, expected_parts, strict=True):
            assert vars(part).keys() == vars(expected_part).keys()
            for name, value in vars(part).items():
                other = vars(expected_part)[name]
                assert torch.equal(value, other) if torch.is_tensor(value) else value == other, name
                assert not torch.is_tensor(value) or value.dtype == other.dtype


@in_interpreter
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_grows_as_the_definition_does_in_the_interpreter(shape):
    pytest.importorskip("triton")
    from eagle3_mla.generation import levels_triton

    assert_same(grow_all(levels_triton.grow, shape), grow_all(grow_by_definition, shape))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (32, 10, 8, 0), (1, 32, 8, 500)], ids=str)
def test_kernel_grows_as_the_definition_does(shape):
    from eagle3_mla.generation import levels_triton

    assert_same(grow_all(levels_triton.grow, shape, "cuda"), grow_all(grow_by_definition, shape, "cuda"))
    assert_same(grow_all(grow, shape, "cuda"), grow_all(levels_triton.grow, shape, "cuda"))


def test_tree_is_that_of_a_plain_search():
    """One sequence after the other, with Python's own lists."""
    shape = (2, 4, 3, 0)
    depths, d2t, grown = make_depths(shape), make_offsets().tolist(), grow_all(grow, shape)
    for batch in range(shape[0]):
        # Of a node: its score, number among all candidates, row of the depth before, token, and the rows it sees.
        nodes, candidates, num_rows = [(0.0, -1, None, None, [])], [], 0
        for (log_probs, draft_ids), (level, frontier) in zip(depths, grown, strict=True):
            new = []
            for row, (score, number, _, _, seen) in enumerate(nodes):
                for log_prob, draft_id in zip(
                    log_probs[batch, row].tolist(), draft_ids[batch, row].tolist(), strict=True
                ):
                    new.append(
                        (score + log_prob, len(candidates) + len(new), row, draft_id + d2t[draft_id], number, seen)
                    )
            assert level.scores[batch].tolist() == [each[0] for each in new]
            assert level.token_ids[batch].tolist() == [each[3] for each in new]
            assert level.parents[batch].tolist() == [each[4] for each in new]
            candidates += new
            chosen = frontier.candidates[batch].tolist()
            assert len(set(chosen)) == len(chosen)
            assert frontier.scores[batch].tolist() == sorted((each[0] for each in new), reverse=True)[: shape[1]]
            assert [candidates[each][0] for each in chosen] == frontier.scores[batch].tolist()
            assert [candidates[each][3] for each in chosen] == frontier.token_ids[batch].tolist()
            assert [candidates[each][2] for each in chosen] == frontier.rows[batch].tolist()
            nodes = [
                (*candidates[each][:4], [*candidates[each][5], num_rows + place]) for place, each in enumerate(chosen)
            ]
            num_rows += len(chosen)
            seen = [row.nonzero()[:, 0].tolist() for row in frontier.sees[batch]]
            assert seen == [node[4] for node in nodes]
            assert frontier.num_drafted == num_rows
            assert frontier.num_candidates == len(candidates)
