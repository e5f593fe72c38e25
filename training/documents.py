"""Documents in the rows of a batch: their positions, and the pairs of row and TTT step that a decoder visits.

A row of the batch holds one document or, packed, several. `document_ids (B, T)` numbers them from 1; padding is
document 0, and wherever the number changes another document begins.

Shapes: B batch, T tokens, K TTT steps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def document_starts(document_ids: Tensor) -> Tensor:
    """True at the first token of every document and of every stretch of padding, `(B, T)`."""
    return F.pad(document_ids.diff(dim=1) != 0, (1, 0), value=True)


def document_positions(document_ids: Tensor) -> Tensor:
    """Position of every token in its document, `(B, T)`: documents 0 0 7 7 7 2 have positions 0 1 0 1 2 0."""
    indices = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    return indices - torch.where(document_starts(document_ids), indices, 0).cummax(dim=1).values


def document_lengths(document_ids: Tensor) -> Tensor:
    """Lengths of all documents in the order of the flattened batch; padding is none."""
    starts = document_starts(document_ids).flatten().nonzero().squeeze(1)
    lengths = torch.cat([starts, starts.new_tensor([document_ids.numel()])]).diff()
    return lengths[document_ids.flatten()[starts] > 0]


def place(states: Tensor, is_document: Tensor) -> Tensor:
    """States of all documents one behind the other `(N, W)`, at their places: `(B, T, W)`, zeros at the padding."""
    placed = states.new_zeros(*is_document.shape, states.shape[-1])
    placed[is_document.to(states.device)] = states
    return placed


def supervised_rows(loss_mask: Tensor, document_ids: Tensor, ttt_step: int) -> Tensor:
    """True at (row, step) pairs that a decoder visits; `(B, T)` of bool.

    Row i at step k read the tokens up to i + 1 + k and predicts the next one. All from i + 1, the token with which the
    target began the round, must be the assistant's, and all from i in one document. With two prompt tokens (p) and
    four of the assistant (a):

        token        0 1 2 3 4 5
                     p p a a a a
        step 0         1 2 3          row 1 reads token 2, predicts token 3
        step 1         1 2            row 1 reads token 3, predicts token 4
        step 2         1              row 1 reads token 4, predicts token 5
        step 3       none
    """
    num_rows = loss_mask.shape[1] - ttt_step - 2
    supervised = torch.zeros_like(loss_mask, dtype=torch.bool)
    if num_rows > 0:
        produced = loss_mask[:, 1:].bool().unfold(1, ttt_step + 2, 1).all(dim=-1)  # (B, T - k - 2)
        documents = document_ids.unfold(1, ttt_step + 3, 1)
        supervised[:, :num_rows] = produced & (documents == documents[..., :1]).all(dim=-1)
    return supervised


def count_supervised_rows(loss_mask: Tensor, document_ids: Tensor, num_ttt_steps: int) -> Tensor:
    """Supervised rows of each step, `(K,)`."""
    counts = [supervised_rows(loss_mask, document_ids, ttt_step).sum() for ttt_step in range(num_ttt_steps)]
    return torch.stack(counts)


def taught_positions(loss_mask: Tensor, document_ids: Tensor) -> Tensor:
    """True at the positions whose target distribution teaches some row: `i + 1` of a row i supervised at step 0.

    Later steps need no others: row i at step k shares its teacher with row i + k at step 0.
    """
    return F.pad(supervised_rows(loss_mask, document_ids, 0)[:, :-1], (1, 0))
