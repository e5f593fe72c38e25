"""Several documents in one row: less padding, the same losses and gradients.

Documents are put together once, before training, and the result is a function of their lengths and the seed, so that
a resumed run sees the rows of an uninterrupted one. A document is never divided, and never sees another one in its
row: `document_ids` separates them in attention, positions and loss.
"""

import logging
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class PackedRows(torch.utils.data.Dataset):
    """
    Rows of several documents each, joined when they are asked for.

    Args:
        rows (`Dataset`): Documents with `input_ids`, `loss_mask` and `length`, and whatever else there is one of for
            each token.
        max_length (`int`): Tokens of a row, at most.
        seed (`int`): Of the order in which documents of one length are taken.
    """

    def __init__(self, rows: Any, max_length: int, seed: int):
        self.rows = rows
        self.max_length = max_length
        self.lengths = list(rows["length"])
        self.packs = pack_documents(self.lengths, max_length, seed)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int | str) -> dict[str, Tensor] | list[int]:
        """
        One row, or the column `"length"`.

        Returns:
            `length`, `document_ids (T,)`, which numbers the documents from 1, and the documents' own columns, joined.
        """
        if isinstance(index, str):
            return [sum(self.lengths[document] for document in pack) for pack in self.packs]
        documents = [self.rows[document] for document in self.packs[index]]
        lengths = torch.tensor([document["length"] for document in documents])
        joined = {
            name: torch.cat([torch.as_tensor(document[name]) for document in documents])
            for name in documents[0]
            if name != "length"
        }
        document_ids = torch.arange(1, len(documents) + 1).repeat_interleave(lengths)
        return joined | {"document_ids": document_ids, "length": int(lengths.sum())}

    @property
    def fill_share(self) -> float:
        """Share of the places in rows of `max_length` tokens that hold one."""
        return sum(self.lengths) / (len(self.packs) * self.max_length)


def pack_rows(rows: Any, max_length: int, seed: int) -> PackedRows:
    """Rows of several documents each. **Effects**: logs how full they are."""
    packed = PackedRows(rows, max_length, seed)
    logger.info("Packed %d documents into %d rows, %.1f %% full.", len(rows), len(packed), 100 * packed.fill_share)
    return packed


def pack_documents(lengths: Sequence[int], max_length: int, seed: int) -> list[list[int]]:
    """
    Best fit, the longest first: each document goes where the least room is left that it fits into.

    Args:
        lengths (`Sequence[int]`): Tokens of every document, none above `max_length`.
        max_length (`int`): Tokens of a row.
        seed (`int`): Of the order of documents of one length.

    Returns:
        `list[list[int]]`: Documents of every row; each document is in one row.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(lengths), generator=generator)
    order = shuffled[torch.tensor(lengths)[shuffled].argsort(descending=True, stable=True)].tolist()
    packs: list[list[int]] = []
    packs_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # rising, those that some pack has
    for document in order:
        length = lengths[document]
        place = bisect_left(rooms, length)
        if place == len(rooms):
            room, pack = max_length, len(packs)
            packs.append([])
        else:
            room = rooms[place]
            pack = packs_by_room[room].pop()
            if not packs_by_room[room]:
                del packs_by_room[room], rooms[place]
        packs[pack].append(document)
        room -= length
        if room not in packs_by_room:
            packs_by_room[room] = []
            insort(rooms, room)
        packs_by_room[room].append(pack)
    return packs
