"""What sequences have beyond the frontier, kept until all have passed it; see `ragged.py`.

Shapes: B batch, P new tokens, A waiting tokens, V the target's vocabulary.
"""

import torch
from torch import Tensor


class Waiting:
    """
    A record of each chosen token, in order of the text: scores or logits.

    Args:
        is_wanted (`bool`): Where nobody wants them, nothing is kept.
    """

    def __init__(self, is_wanted: bool):
        self.is_wanted = is_wanted
        self.records: Tensor | None = None

    def add(self, records: Tensor, leads: list[int]) -> None:
        """
        Keeps `records (B, P, V)`; each sequence's begin as many places behind the frontier's next as it leads.

        **Effects**: what stood there is overwritten.
        """
        if self.is_wanted:
            self.records = write_rows(records[:, :0] if self.records is None else self.records, records, leads)

    def at(self, place: int) -> Tensor | None:
        """`(B, V)`, so many places behind the frontier's next token; `None` where nobody wants it."""
        # A copy: a view would keep the records of the whole round.
        return self.records[:, place].clone() if self.is_wanted else None

    def forget(self, num_committed: int, num_waiting: int) -> None:
        """Drops what the frontier has passed, and what lies beyond the sequence that is furthest."""
        if self.is_wanted:
            self.records = self.records[:, num_committed : num_committed + num_waiting]


def write_rows(written: Tensor, new: Tensor, starts: list[int]) -> Tensor:
    """Writes `new (B, P, ...)` into the rows of `written (B, A, ...)`, into each from its own place on."""
    if len(set(starts)) == 1:
        return torch.cat([written[:, : starts[0]], new], dim=1)
    written = torch.cat([written, torch.zeros_like(new)], dim=1)
    places = torch.tensor(starts, device=new.device)[:, None] + torch.arange(new.shape[1], device=new.device)
    places = places.view(*places.shape, *[1] * (new.dim() - 2)).expand_as(new)
    return written.scatter(1, places, new)
