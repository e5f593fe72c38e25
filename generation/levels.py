"""A depth of a draft's tree: what it adds to the candidates, and which of these are continued.

Many operations on few numbers, which on a GPU are one Triton kernel.

Shapes: B batch, W nodes of one depth, k candidates after each, S rows drafted in this round.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .top_tokens import MOST_AT_ONCE, runs_on_triton


@dataclass(frozen=True)
class Candidates:
    """
    Of one depth, those after the same node next to each other.

    Args:
        token_ids (`torch.LongTensor` of shape `(B, W * k)`): Target ids.
        parents (`torch.LongTensor` of shape `(B, W * k)`): Indices among all candidates of the tree; -1 is the root.
        scores (`torch.Tensor` of shape `(B, W * k)`): Log-probability of the path to each, fp32.
    """

    token_ids: Tensor
    parents: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Frontier:
    """
    The nodes whose continuations come next: the draft's rows of one depth.

    Args:
        candidates (`torch.LongTensor` of shape `(B, W)`): Their indices among all candidates; -1 is the root.
        scores (`torch.Tensor` of shape `(B, W)`): Log-probability of the path to each, fp32.
        sees (`torch.BoolTensor` of shape `(B, W, S)`): Which of the rows drafted in this round each attends to; those
            that are not drafted yet, at the end, are not seen.
        num_candidates (`int`): Of the tree, up to their depth.
        num_drafted (`int`): Rows, they themselves included.
        token_ids (`torch.LongTensor` of shape `(B, W)`, *optional*): Target ids; the root's are not needed.
        rows (`torch.LongTensor` of shape `(B, W)`, *optional*): Which row of the depth before each continues.
    """

    candidates: Tensor
    scores: Tensor
    sees: Tensor
    num_candidates: int
    num_drafted: int
    token_ids: Tensor | None = None
    rows: Tensor | None = None

    @classmethod
    def of_roots(cls, batch_size: int, device: torch.device) -> "Frontier":
        """The roots of the trees, which are no candidates, and whose rows are not guesses."""
        candidates, scores = torch.full((batch_size, 1), -1, device=device), torch.zeros(batch_size, 1, device=device)
        sees = torch.zeros(batch_size, 1, 0, dtype=torch.bool, device=device)
        return cls(candidates, scores, sees, num_candidates=0, num_drafted=0)


def grow(
    frontier: Frontier, log_probs: Tensor, draft_ids: Tensor, d2t: Tensor, num_columns: int
) -> tuple[Candidates, Frontier]:
    """
    One depth more: all continuations, and the k best of them, of equal ones the first.

    Args:
        frontier ([`Frontier`]): What is continued.
        log_probs (`torch.Tensor` of shape `(B, W, k)`): Of the best tokens after each node, fp32.
        draft_ids (`torch.LongTensor` of shape `(B, W, k)`): These tokens.
        d2t (`torch.LongTensor` of shape `(Vd,)`): Offsets from draft ids to target ids.
        num_columns (`int`): Rows that the new frontier's `sees` is to have, at least those drafted by then.
    """
    num_scores = log_probs[0].numel()
    if runs_on_triton(log_probs, log_probs.shape[2]) and num_scores <= MOST_AT_ONCE:
        from .levels_triton import grow

        return grow(frontier, log_probs, draft_ids, d2t, num_columns)
    return grow_by_definition(frontier, log_probs, draft_ids, d2t, num_columns)


def grow_by_definition(
    frontier: Frontier, log_probs: Tensor, draft_ids: Tensor, d2t: Tensor, num_columns: int
) -> tuple[Candidates, Frontier]:
    """As [`grow`]."""
    top_k, num_before = log_probs.shape[2], frontier.num_drafted
    candidates = Candidates(
        token_ids=(draft_ids + d2t[draft_ids]).flatten(1),
        parents=frontier.candidates.repeat_interleave(top_k, dim=1),
        scores=(frontier.scores[..., None] + log_probs).flatten(1),
    )
    scores, chosen = (each[:, :top_k] for each in candidates.scores.sort(dim=1, descending=True, stable=True))
    rows = chosen // top_k
    sees = frontier.sees[..., :num_before].gather(1, rows[..., None].expand(-1, -1, num_before))
    itself = torch.eye(top_k, dtype=torch.bool, device=sees.device).expand(len(sees), -1, -1)
    num_drafted = num_before + top_k
    sees = F.pad(torch.cat([sees, itself], dim=2), (0, num_columns - num_drafted))
    return candidates, Frontier(
        candidates=frontier.num_candidates + chosen,
        scores=scores,
        sees=sees,
        num_candidates=frontier.num_candidates + candidates.scores.shape[1],
        num_drafted=num_drafted,
        token_ids=candidates.token_ids.gather(1, chosen),
        rows=rows,
    )
