"""Rows into batches: in which order they come, how the last batch is filled, and how they are laid out.

Shapes: B batch, T tokens.
"""

from collections.abc import Iterator
from itertools import chain, islice, repeat
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler


class PaddingCollator:
    """
    Pads the rows of a batch on the right, to the longest of them.

    A row is one document, or several with `document_ids` that number them from 1.

    Args:
        pad_token_id (`int`): Any id of the target; padding is masked wherever it could matter.
        multiple_of (`int`, *optional*, defaults to 1): Batches are as long as a multiple of this. Compiled kernels see
            fewer shapes; with the greatest length of a row, one.
    """

    def __init__(self, pad_token_id: int, multiple_of: int = 1):
        self.pad_token_id = pad_token_id
        self.multiple_of = multiple_of

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        """`input_ids`, `loss_mask` and `document_ids`, `(B, T)` each; padding is document 0."""
        longest = max(len(row["input_ids"]) for row in rows)
        shape = len(rows), -(-longest // self.multiple_of) * self.multiple_of
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "document_ids": torch.zeros(shape, dtype=torch.long),
            "loss_mask": torch.zeros(shape, dtype=torch.long),
        }
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["input_ids"][index, :length] = torch.as_tensor(row["input_ids"])
            batch["document_ids"][index, :length] = torch.as_tensor(row.get("document_ids", 1))
            batch["loss_mask"][index, :length] = torch.as_tensor(row["loss_mask"])
        return batch


class FillableRows(Dataset):
    """
    Rows to train on, and behind the last one a row that supervises nothing: the shortest, with its mask empty.

    Args:
        rows (`Dataset`): With `input_ids`, `loss_mask` and `length`.
    """

    def __init__(self, rows: Any):
        self.rows = rows
        self.lengths = list(rows["length"])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict:
        """A row; the one that supervises nothing at `len(self)`."""
        if index < len(self):
            return self.rows[index]
        shortest = self.rows[self.lengths.index(min(self.lengths))]
        return shortest | {"loss_mask": [0] * len(shortest["loss_mask"])}


class LengthGroupedSampler(Sampler[int]):
    """
    Random order in which the rows of a batch have similar lengths, a pure function of seed and epoch.

    Rows are shuffled, sorted within pools of 50 batches, and the batches are shuffled again: little padding, no order
    from long to short, and a resumed run sees the same rows as an uninterrupted one. The last batch is as large as the
    others, so that no process has to repeat rows of others.

    Args:
        lengths (`list[int]`): Length of every row in tokens.
        batch_size (`int`): Rows of a batch over all processes and micro-batches.
        seed (`int`): Seed of the order.
        drop_last (`bool`, *optional*, defaults to `False`): Leave rows that make no batch out, rather than fill it
            with the index behind the last row, the one of [`FillableRows`] that supervises nothing.
    """

    BATCHES_PER_POOL = 50

    def __init__(self, lengths: list[int], batch_size: int, seed: int, drop_last: bool = False):
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        num_rows = len(self.lengths) if self.drop_last else len(self.lengths) + self.batch_size - 1
        return num_rows // self.batch_size * self.batch_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        shuffled = torch.randperm(len(self.lengths), generator=generator)
        lengths = torch.tensor(self.lengths)
        pools = shuffled.split(self.BATCHES_PER_POOL * self.batch_size)
        ordered = torch.cat([pool[lengths[pool].argsort(stable=True)] for pool in pools])
        batches = list(ordered.split(self.batch_size))
        # The short last batch stays last, or it would shift the borders of the others.
        num_full = len(self.lengths) // self.batch_size
        order = torch.randperm(num_full, generator=generator).tolist() + list(range(num_full, len(batches)))
        rows = chain.from_iterable(batches[index].tolist() for index in order)
        return islice(chain(rows, repeat(len(self.lengths))), len(self))
