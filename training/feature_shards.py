"""One shard of stored features: consecutive documents with their tokens, masks and target states, in one file.

Documents lie one behind the other. The last hidden state is kept at the positions that teach somebody
(`taught_positions`) only; which those are follows from the loss mask. A shard is written under another name and
renamed, so that it is complete under its own name or not there at all.

    tensor                shape         dtype
    lengths               (n,)          int64                    tokens of each document
    input_ids             (S,)          int32
    loss_mask             (S,)          uint8
    aux_hidden_states     (S, 3 * Dt)   the storage dtype
    last_hidden_states    (M, Dt)       the storage dtype        rows of taught positions
    *_hidden_states_scales              bfloat16                 for 8-bit storage, see `state_storage`

Shapes: n documents of a shard, S their tokens, M their taught positions, T tokens of a document, Dt the target's
hidden.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .documents import taught_positions
from .files import file_sha256, rename_flushed
from .state_storage import bytes_per_state, encode_states, num_groups

STATES = ("aux_hidden_states", "last_hidden_states")
# One key: the order of several is not the same from process to process, and files must be.
METADATA_KEY = "eagle3_mla_features"
REPAIR = "Run scripts/prepare_features.py again with the same arguments: it writes what is missing or damaged."
SAFETENSORS_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
}


@dataclass(frozen=True)
class Shard:
    """
    Place and size of one shard, known before it is written.

    Args:
        index (`int`): Its number.
        name (`str`): Its file.
        first_document (`int`): Row of the data with which it begins.
        num_documents (`int`), num_tokens (`int`), num_taught (`int`): What it holds.
    """

    index: int
    name: str
    first_document: int
    num_documents: int
    num_tokens: int
    num_taught: int


@dataclass(frozen=True)
class ShardFormat:
    """
    What all shards of a directory share.

    Args:
        hidden_size (`int`): Width of one state of the target.
        storage_dtype (`torch.dtype`): Of the states.
        request_sha256 (`str`): Identity of target, data and settings; written into every shard.
    """

    hidden_size: int
    storage_dtype: torch.dtype
    request_sha256: str

    def tensors(self, shard: Shard) -> dict[str, tuple[torch.dtype, list[int]]]:
        """Dtype and shape of every tensor of `shard`."""
        tensors = {
            "lengths": (torch.int64, [shard.num_documents]),
            "input_ids": (torch.int32, [shard.num_tokens]),
            "loss_mask": (torch.uint8, [shard.num_tokens]),
        }
        widths = 3 * self.hidden_size, self.hidden_size
        for name, num_rows, width in zip(STATES, (shard.num_tokens, shard.num_taught), widths, strict=True):
            tensors[name] = self.storage_dtype, [num_rows, width]
            if self.storage_dtype == torch.int8:
                tensors[f"{name}_scales"] = torch.bfloat16, [num_rows, num_groups(width)]
        return tensors

    def num_bytes(self, shard: Shard) -> int:
        """Size of the file, but for a header of less than 4 KiB."""
        return features_num_bytes(
            self.hidden_size, self.storage_dtype, shard.num_documents, shard.num_tokens, shard.num_taught
        )

    def metadata(self, shard: Shard) -> dict[str, str]:
        identity = {"request_sha256": self.request_sha256, "shard": shard.index}
        return {METADATA_KEY: json.dumps(identity, sort_keys=True)}


def features_num_bytes(
    hidden_size: int, storage_dtype: torch.dtype, num_documents: int, num_tokens: int, num_taught: int
) -> int:
    """Bytes of `num_tokens` tokens, `num_taught` of them at taught positions: `3 Dt`, and there `Dt`, numbers each."""
    per_token = 5 + bytes_per_state(3 * hidden_size, storage_dtype)
    return 8 * num_documents + num_tokens * per_token + num_taught * bytes_per_state(hidden_size, storage_dtype)


def is_taught(loss_mask: Tensor) -> Tensor:
    """True at the taught positions of one document, `(T,)`."""
    return taught_positions(loss_mask[None].long(), torch.ones_like(loss_mask[None], dtype=torch.long))[0]


def count_taught(loss_mask: Tensor, lengths: Tensor) -> Tensor:
    """Taught positions of each document, `(n,)`, of masks one behind the other, `(S,)`."""
    document_ids = torch.arange(1, len(lengths) + 1).repeat_interleave(lengths)  # (S,)
    taught = taught_positions(loss_mask[None].long(), document_ids[None])[0]
    return document_ids[taught].sub(1).bincount(minlength=len(lengths))


def plan_shards(rows: Dataset, tokens_per_shard: int) -> list[Shard]:
    """Cuts the rows, in their order, into shards of at most `tokens_per_shard` tokens, or of one longer document."""
    sizes: list[list[int]] = []  # first document, documents, tokens, taught positions
    document = 0
    for batch in rows.select_columns(["loss_mask"]).with_format("numpy").iter(1000):
        lengths = torch.tensor([len(loss_mask) for loss_mask in batch["loss_mask"]])
        num_taught = count_taught(torch.from_numpy(np.concatenate(batch["loss_mask"])), lengths)
        for size in zip(lengths.tolist(), num_taught.tolist(), strict=True):
            if not sizes or sizes[-1][2] + size[0] > tokens_per_shard:
                sizes.append([document, 0, 0, 0])
            for place, added in enumerate((1, *size), start=1):
                sizes[-1][place] += added
            document += 1
    return [Shard(index, shard_name(index, len(sizes)), *size) for index, size in enumerate(sizes)]


def shard_name(index: int, num_shards: int) -> str:
    return f"features-{index:05d}-of-{num_shards:05d}.safetensors"


def write_shard(path: Path, shard: Shard, shard_format: ShardFormat, documents: Iterable[dict[str, Tensor]]) -> str:
    """
    Writes one shard and renames it to `path`.

    Args:
        path (`Path`): Where it goes.
        shard (`Shard`), shard_format (`ShardFormat`): What it holds, and how.
        documents (`Iterable[dict[str, Tensor]]`): `input_ids (T,)`, `loss_mask (T,)`, `aux_hidden_states (T, 3 * Dt)`
            and `last_hidden_states (T, Dt)` of every document.

    Returns:
        `str`: The file's SHA-256.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in shard_format.tensors(shard)}
    for document in documents:
        loss_mask = document["loss_mask"]
        parts["lengths"].append(torch.tensor([len(loss_mask)]))
        parts["input_ids"].append(document["input_ids"].int())
        parts["loss_mask"].append(loss_mask.to(torch.uint8))
        taught = is_taught(loss_mask).to(document["last_hidden_states"].device)
        states = document["aux_hidden_states"], document["last_hidden_states"][taught]
        for name, values in zip(STATES, states, strict=True):
            stored, scales = encode_states(values, shard_format.storage_dtype)
            parts[name].append(stored.cpu())
            if scales is not None:
                parts[f"{name}_scales"].append(scales.cpu())
    tensors = {name: torch.cat(chunks).contiguous() for name, chunks in parts.items()}
    expected = shard_format.tensors(shard)
    assert {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()} == expected
    return save_atomically(tensors, path, shard_format.metadata(shard))


def save_atomically(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> str:
    """Writes a safetensors file under another name, flushes it to the disk and renames it; returns its SHA-256."""
    incomplete = path.with_name(f".incomplete-{path.name}")
    try:
        incomplete.touch()
        mode = incomplete.stat().st_mode
        save_file(tensors, incomplete, metadata)
        # safetensors makes files that only their owner can read.
        incomplete.chmod(mode)
        digest = file_sha256(incomplete)
        rename_flushed(incomplete, path)
    finally:
        incomplete.unlink(missing_ok=True)
    return digest


def check_shard(path: Path, shard: Shard, shard_format: ShardFormat) -> None:
    """
    Reads the header of a shard.

    Raises:
        ValueError: Names the shard if it is missing, truncated, of other features, or its tensors are not those
            expected.
    """
    if not path.is_file():
        raise ValueError(f"The shard {path} is missing. {REPAIR}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            found = {name: (entry.get_dtype(), entry.get_shape()) for name, entry in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"The shard {path} is damaged: {error}. {REPAIR}") from None
    if metadata != shard_format.metadata(shard):
        raise ValueError(
            f"The shard {path} is foreign: it was written for another target, other data, other settings or another "
            f"place. {REPAIR}"
        )
    for name, (dtype, shape) in shard_format.tensors(shard).items():
        if found.get(name) != (SAFETENSORS_DTYPES[dtype], shape):
            raise ValueError(
                f"The shard {path} is damaged: `{name}` must be {SAFETENSORS_DTYPES[dtype]} of shape {shape}, got "
                f"{found.get(name)}. {REPAIR}"
            )
