"""Stored features as training data: the rows of a directory that `scripts/prepare_features.py` wrote.

Every row brings the target's states along, read from memory-mapped shards in any order. Shards are checked when the
directory is opened, before training begins: their headers (there, complete, of this request, of the right shapes) and
their SHA-256, in threads, each process its share. That reads every file once, at 0.9 GB per second and core (measured
on a server's CPU): a terabyte takes two and a half minutes on eight cores, or as long as the disk needs to read it.

Shapes: T tokens of a document, Dt the target's hidden.
"""

import os
from bisect import bisect_right
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from .feature_manifest import HEAD_NAME, Manifest
from .feature_shards import REPAIR, Shard, check_shard, count_taught, file_sha256, is_taught
from .state_storage import decode_states

MAX_OPEN_SHARDS = 16
MAX_CHECKING_THREADS = 8


class FeatureDataset(torch.utils.data.Dataset):
    """
    Documents with the states of their target, in random access.

    Args:
        directory (`Path`): Where the shards are; checked already, by `open_features`.
        manifest ([`Manifest`]): What it says about itself.
    """

    def __init__(self, directory: Path, manifest: Manifest):
        self.directory = directory
        self.manifest = manifest
        self.first_documents = [shard.first_document for shard in manifest.shards]
        self.files: OrderedDict[int, object] = OrderedDict()
        lengths = self._of_all_shards("lengths")
        input_ids, loss_mask = self._of_all_shards("input_ids"), self._of_all_shards("loss_mask")
        self.lengths = lengths.tolist()
        self.rows = token_rows(input_ids, loss_mask, lengths)
        # Where a document begins in its shard: tokens, and taught positions.
        self.token_starts = starts_in_shards(self.lengths, manifest.shards)
        self.taught_starts = starts_in_shards(count_taught(loss_mask, lengths).tolist(), manifest.shards)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int | str) -> dict[str, Tensor] | list[int]:
        """
        One row, or a column of tokens.

        Args:
            index (`int` or `str`): A row, or `"length"`, `"input_ids"` or `"loss_mask"`.

        Returns:
            `input_ids (T,)`, `loss_mask (T,)`, `length`, `aux_hidden_states (T, 3 * Dt)` and `last_hidden_states
            (T, Dt)`, zeros where nobody is taught; states in the dtype that was stored, 8-bit ones in the target's.
        """
        if isinstance(index, str):
            return self.rows[index]
        shard = self.manifest.shards[bisect_right(self.first_documents, index) - 1]
        file = self._open(shard)
        tokens = slice(self.token_starts[index], self.token_starts[index] + self.lengths[index])
        loss_mask = file.get_slice("loss_mask")[tokens].long()
        taught = is_taught(loss_mask)
        first_taught = self.taught_starts[index]
        taught_states = self._states(file, "last_hidden_states", slice(first_taught, first_taught + int(taught.sum())))
        last_hidden_states = taught_states.new_zeros(len(taught), taught_states.shape[-1])
        last_hidden_states[taught] = taught_states
        return {
            "input_ids": file.get_slice("input_ids")[tokens].long(),
            "loss_mask": loss_mask,
            "length": self.lengths[index],
            "aux_hidden_states": self._states(file, "aux_hidden_states", tokens),
            "last_hidden_states": last_hidden_states,
        }

    def select_columns(self, names: list[str]) -> Dataset:
        """Columns of tokens as a `Dataset`, to count and to hash them as those of other training data."""
        return self.rows.select_columns(names)

    def __getstate__(self) -> dict:
        """Without open files: a worker process opens its own."""
        return self.__dict__ | {"files": OrderedDict()}

    def _states(self, file, name: str, rows: slice) -> Tensor:
        """Stored states `(rows, W)`."""
        stored = file.get_slice(name)[rows]
        if stored.dtype != torch.int8:
            return stored
        return decode_states(stored, file.get_slice(f"{name}_scales")[rows], self.manifest.target_dtype)

    def _open(self, shard: Shard):
        """The shard's file; those not used for longest are closed."""
        if shard.index in self.files:
            self.files.move_to_end(shard.index)
            return self.files[shard.index]
        if len(self.files) == MAX_OPEN_SHARDS:
            self.files.popitem(last=False)
        self.files[shard.index] = safe_open(self.directory / shard.name, framework="pt")
        return self.files[shard.index]

    def _of_all_shards(self, name: str) -> Tensor:
        """One tensor of every shard, one behind the other."""
        return torch.cat([self._open(shard).get_tensor(name) for shard in self.manifest.shards])


def token_rows(input_ids: Tensor, loss_mask: Tensor, lengths: Tensor) -> Dataset:
    """Tokens and masks `(S,)` of documents as rows, as training without stored features has them."""
    offsets = pa.array(np.concatenate([[0], lengths.cumsum(dim=0).numpy()]))
    columns = {
        name: pa.LargeListArray.from_arrays(offsets, pa.array(values.numpy()))
        for name, values in (("input_ids", input_ids), ("loss_mask", loss_mask))
    }
    return Dataset(pa.table(columns | {"length": lengths.numpy()}))


def starts_in_shards(sizes: list[int], shards: list[Shard]) -> list[int]:
    """Where each document begins in its shard, if document i takes `sizes[i]` places."""
    starts: list[int] = []
    for shard in shards:
        own = sizes[shard.first_document : shard.first_document + shard.num_documents]
        starts += list(accumulate(own, initial=0))[:-1]
    return starts


def open_features(
    directory: str, process_index: int = 0, num_processes: int = 1, show_progress: bool = True
) -> FeatureDataset:
    """
    Checks stored features and opens them.

    Args:
        directory (`str`): Where `scripts/prepare_features.py` wrote.
        process_index (`int`, *optional*, defaults to 0), num_processes (`int`, *optional*, defaults to 1): Every
            process verifies its share of the checksums.
        show_progress (`bool`, *optional*, defaults to `True`): Whether to show a bar meanwhile.

    Raises:
        ValueError: If they are not complete, or names the first file that is missing, damaged or foreign.
    """
    path = Path(directory)
    manifest = Manifest.read(path)
    if not manifest.complete:
        raise ValueError(
            f"The features in {path} are not complete. Run scripts/prepare_features.py again with the same arguments: "
            "it keeps the shards that are there."
        )
    for shard in manifest.shards:
        check_shard(path / shard.name, shard, manifest.shard_format)
    check_head(path, manifest)
    entries = list(zip(manifest.shards, manifest.checksums, strict=True))[process_index::num_processes]
    with ThreadPoolExecutor(min(MAX_CHECKING_THREADS, os.cpu_count() or 1)) as threads:
        checks = threads.map(lambda entry: check_checksum(path / entry[0].name, entry[1]), entries)
        for _ in tqdm(checks, "Verifying features", len(entries), disable=not show_progress, unit="shard"):
            pass
    return FeatureDataset(path, manifest)


def check_head(directory: Path, manifest: Manifest) -> None:
    """
    Requires the target's head to be there unchanged.

    Raises:
        ValueError: If it is not.
    """
    if not (directory / HEAD_NAME).is_file():
        raise ValueError(f"{directory / HEAD_NAME} is missing. {REPAIR}")
    check_checksum(directory / HEAD_NAME, manifest.head_sha256)


def check_checksum(path: Path, expected: str) -> None:
    """
    Reads a whole file.

    Raises:
        ValueError: If its SHA-256 is not the expected one.
    """
    if file_sha256(path) != expected:
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one that was recorded. {REPAIR}")
