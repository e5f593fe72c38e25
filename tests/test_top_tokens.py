"""The best tokens of a draft: kernels against a stable sort."""

import pytest
import torch

from eagle3_mla.generation import top_tokens as module
from eagle3_mla.generation.top_tokens import best_by_definition, best_log_probs

in_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Less than a part, a whole number of parts, a bit more; one row and several.
SHAPES = [((1, 1, 48), 1), ((2, 3, 2048), 10), ((1, 4, 2500), 7), ((1, 1, 12), 12)]
BIG_SHAPES = [((1, 10, 32000), 10), ((4, 10, 32000), 10), ((1, 1, 128256), 1), ((1, 32, 151936), 32)]


def compare(scores: torch.Tensor, top_k: int) -> None:
    from eagle3_mla.generation.top_tokens_triton import best

    values, places = best(scores, top_k)
    expected, expected_places = best_by_definition(scores, top_k)
    assert torch.equal(places, expected_places)
    torch.testing.assert_close(values, expected, rtol=2e-6, atol=2e-6)


@in_interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "top_k"), SHAPES, ids=str)
def test_kernels_take_the_best_in_the_interpreter(shape, top_k, dtype):
    pytest.importorskip("triton")
    compare(4 * torch.randn(shape).to(dtype), top_k)


def tied_scores(device: str = "cpu") -> torch.Tensor:
    """Few different numbers, zeros of both signs among them, and rows without a single finite one but some."""
    scores = torch.randint(-2, 3, (1, 5, 3000), device=device).float()
    scores[scores == 0] *= torch.where(torch.rand(int((scores == 0).sum()), device=device) < 0.5, -1.0, 1.0)
    scores[:, 1] = -float("inf")
    scores[:, 1, 1500:1520] = -700.0
    scores[:, 2, ::2] = -float("inf")
    return scores


@in_interpreter
def test_kernels_take_the_first_of_equal_scores_in_the_interpreter():
    pytest.importorskip("triton")
    compare(tied_scores(), 10)


@in_interpreter
@pytest.mark.parametrize("value", [float("nan"), -float("inf"), float("inf")])
def test_places_are_different_tokens_whatever_the_scores_are(value):
    """An index beyond the vocabulary ends the process on a GPU."""
    pytest.importorskip("triton")
    from eagle3_mla.generation.top_tokens_triton import best

    scores = torch.full((1, 2, 1500), value)
    scores[0, 1, 1100:] = 1.0
    _, places = best(scores, 10)
    assert all(len(set(row)) == 10 and min(row) >= 0 and max(row) < 1500 for row in places[0].tolist())


@in_interpreter
def test_rows_may_lie_apart_in_memory():
    pytest.importorskip("triton")
    compare(torch.randn(2, 8, 1300)[:, ::3, :1100], 4)


def compare_highest(scores: torch.Tensor) -> None:
    from eagle3_mla.generation.top_tokens_triton import highest

    assert torch.equal(highest(scores), scores.argmax(dim=-1))


def uneven_scores(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """Many equal ones, zeros of both signs, infinities, and rows with what is not a number, of both signs."""
    scores = torch.randint(-3, 4, shape, device=device).to(dtype)
    scores[torch.rand(shape, device=device) < 0.3] *= -1.0
    rows = scores.view(-1, shape[-1])
    rows[0] = -float("inf")
    rows[1 % len(rows), 7::5] = float("inf")
    rows[2 % len(rows), -9:] = float("nan")
    rows[2 % len(rows), -11:-9] = -torch.tensor(float("nan"))
    return scores


@in_interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 20), (5, 4096), (2, 3, 9001)], ids=str)
def test_highest_is_that_of_pytorch_in_the_interpreter(shape, dtype):
    pytest.importorskip("triton")
    compare_highest(torch.randn(shape).to(dtype))
    compare_highest(uneven_scores(shape, dtype))
    compare_highest(uneven_scores((*shape[:-1], 2 * shape[-1]), dtype)[..., ::2])


@pytest.mark.parametrize(("shape", "top_k"), SHAPES, ids=str)
def test_without_a_gpu_the_best_are_the_same(shape, top_k):
    scores = torch.randn(shape)
    values, places = best_log_probs(scores, top_k)
    expected, expected_places = best_by_definition(scores, top_k)
    assert torch.equal(places, expected_places)
    assert torch.equal(values, expected)


def test_double_precision_and_many_best_never_reach_the_kernels(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(module, "can_run_kernels", lambda device: True)
    scores = torch.zeros(1, 64)
    assert not module.runs_on_triton(scores.double(), 4)
    assert not module.runs_on_triton(scores, module.MOST_BEST + 1)
    assert not module.runs_on_triton(torch.zeros(1, 1).expand(1, module.MOST_SCORES + 1), 4)
    assert module.runs_on_triton(scores, module.MOST_BEST)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "top_k"), [*SHAPES, *BIG_SHAPES], ids=str)
def test_kernels_take_the_best_on_a_gpu(shape, top_k, dtype):
    compare(4 * torch.randn(shape, device="cuda").to(dtype), top_k)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 61, 128256), (4, 16, 151936), (3, 5000)], ids=str)
def test_highest_is_that_of_pytorch_on_a_gpu(shape, dtype):
    compare_highest(torch.randn(shape, device="cuda").to(dtype))
    compare_highest(uneven_scores(shape, dtype, "cuda"))
    assert torch.equal(module.highest(torch.ones(shape, device="cuda")), torch.zeros(shape[:-1], device="cuda"))


@pytest.mark.gpu
def test_kernels_take_the_first_of_equal_scores_on_a_gpu():
    compare(tied_scores("cuda"), 10)
