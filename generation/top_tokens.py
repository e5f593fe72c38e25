"""The best tokens of a draft with their log-probabilities, without all the others', and the best one of a target.

A draft asks for the `top_k` best of its vocabulary for every node that it continues, a target for the best after each
node. On a GPU two Triton kernels read the scores once; elsewhere PyTorch normalises and sorts them, or compares all.

Shapes: V tokens.
"""

import torch
from torch import Tensor

from .kernels import HALF_PRECISION, can_run_kernels

# The kernels take the best one after the other, and hold those of all parts of the vocabulary at once.
MOST_BEST = 32
MOST_SCORES = 2**18
MOST_AT_ONCE = 1024


def best_log_probs(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """
    The best of `scores.float().log_softmax(-1)` in falling order and their places, `(..., V)` -> `(..., top_k)` twice.

    Of equal scores the kernels take the first ones, PyTorch any; a tree may be drafted of either.
    """
    if not runs_on_triton(scores, top_k):
        return scores.float().log_softmax(dim=-1).topk(top_k)
    from .top_tokens_triton import best

    return best(scores, top_k)


def highest(scores: Tensor) -> Tensor:
    """As `scores.argmax(dim=-1)`, the first of equal ones or the first that is not a number, `(..., V)` -> `(...)`."""
    if not runs_on_triton(scores, 1) or scores.shape[-1] <= MOST_AT_ONCE:
        return scores.argmax(dim=-1)
    from .top_tokens_triton import highest

    return highest(scores)


def runs_on_triton(scores: Tensor, top_k: int) -> bool:
    is_supported = (
        scores.is_cuda and scores.dtype in (torch.float32, *HALF_PRECISION) and scores.shape[-1] <= MOST_SCORES
    )
    return is_supported and top_k <= MOST_BEST and can_run_kernels(scores.device)


def best_by_definition(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """[`best_log_probs`] as the kernels compute it: of equal scores the first ones."""
    places = scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    return scores.float().log_softmax(dim=-1).gather(-1, places), places
