"""Conversations as training rows: which tokens there are, and which of them the assistant produced.

A dataset row is a conversation, `messages` or `conversations`, a list of `{role, content}` or `{from, value}`. The
target's own chat template turns it into tokens and marks the assistant's (`{% generation %}`), which become the
`loss_mask`. Whatever can be wrong with the data is found here, before any model is loaded.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from jinja2 import TemplateError
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

CONVERSATION_COLUMNS = ("messages", "conversations")
ROLES = {"human": "user", "gpt": "assistant"}
FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
# Part of the cache key: change it whenever the same input gives other rows.
TOKENIZATION_VERSION = 1


def load_conversations(dataset: str, split: str = "train") -> Dataset:
    """
    Rows of a file, a directory or a Hub dataset.

    Args:
        dataset (`str`): A `.jsonl`, `.json` (one object per line) or `.parquet` file, a directory of such files or one
            written by `Dataset.save_to_disk`, or the id of a dataset on the Hub.
        split (`str`, *optional*, defaults to `"train"`): Split of a Hub dataset or a saved `DatasetDict`.

    Raises:
        ValueError: If there is no such dataset, it is empty, or a line is not a JSON object.
    """
    path = Path(dataset)
    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        rows = _load_saved(path, split)
    elif path.exists():
        rows = _load_files(_data_files(path))
    else:
        rows = _load_from_hub(dataset, split)
    if len(rows) == 0:
        raise ValueError(f"The dataset {dataset} has no rows.")
    return rows


def check_json_lines(path: Path) -> None:
    """
    Reads every line once, because the Arrow reader does not say which line is broken.

    Raises:
        ValueError: Names the first line that is not a JSON object, or says that there is none.
    """
    has_rows = False
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"Line {number} of {path} is not valid JSON: {error}.") from None
            if not isinstance(row, dict):
                raise ValueError(f"Line {number} of {path} must be a JSON object, got {type(row).__name__}.")
            has_rows = True
    if not has_rows:
        raise ValueError(f"The dataset {path} is empty.")


def parse_conversation(row: dict, number: int) -> list[dict[str, str]]:
    """
    The messages of a dataset row, as `{role, content}`.

    Args:
        row (`dict`): With `messages` or `conversations`.
        number (`int`): Position in the dataset from 1, for the error.

    Raises:
        ValueError: If the row holds no conversation, or one without an assistant turn.
    """
    column = next((name for name in CONVERSATION_COLUMNS if row.get(name)), None)
    if column is None:
        raise ValueError(f"Row {number} must have `messages` or `conversations`, got the columns {sorted(row)}.")
    messages = [_parse_message(message, number) for message in row[column]]
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"Row {number} has no assistant turn; there is nothing to learn from it.")
    return messages


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Requires a chat template that marks what the assistant says.

    Raises:
        ValueError: If there is no template, or it has no `{% generation %}` blocks.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "The tokenizer has no chat template. Save one beside the target as chat_template.jinja, with "
            "`{% generation %}` and `{% endgeneration %}` around what the assistant says."
        )
    template = tokenizer.get_chat_template()
    if "endgeneration" not in template:
        raise ValueError(
            "The tokenizer's chat template does not mark what the assistant says. Put `{% generation %}` and "
            "`{% endgeneration %}` around the assistant's content and end-of-turn token in the target's "
            "chat_template.jinja."
        )


def tokenize_conversations(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """
    Training rows with `input_ids`, `loss_mask` and `length`, cached on disk under the content of data and tokenizer.

    Args:
        rows (`Dataset`): From `load_conversations`.
        tokenizer (`PreTrainedTokenizerBase`): The target's.
        max_length (`int`): Longer conversations are cut at the end.

    Returns:
        `Dataset` without the rows that have no supervised position; their number is logged.

    Raises:
        ValueError: If a row holds no usable conversation, or no row is left.
    """
    check_chat_template(tokenizer)

    def tokenize(row: dict, index: int) -> dict:
        return tokenize_conversation(parse_conversation(row, index + 1), index + 1, tokenizer, max_length)

    key = _cache_key(rows, tokenizer, max_length)
    tokenized = rows.map(
        tokenize,
        with_indices=True,
        remove_columns=rows.column_names,
        new_fingerprint=key,
        desc="Tokenizing conversations",
    )
    kept = tokenized.filter(
        lambda loss_masks: [_has_supervised_row(loss_mask) for loss_mask in loss_masks],
        input_columns="loss_mask",
        batched=True,
        new_fingerprint=f"{key}-supervised",
        desc="Dropping unsupervised rows",
    )
    if len(kept) == 0:
        raise ValueError(
            f"No conversation has two assistant tokens in a row within its first {max_length} tokens. "
            "Raise `--max-length`, or check that the chat template's `{% generation %}` blocks hold the answers."
        )
    if len(kept) < len(tokenized):
        logger.info("Dropped %d of %d rows without a supervised position.", len(tokenized) - len(kept), len(tokenized))
    return kept


def tokenize_conversation(
    messages: list[dict[str, str]], number: int, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict:
    """One training row: tokens, 1 where the assistant produced the token, and their number."""
    try:
        encoded = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    except TemplateError as error:
        raise ValueError(f"The chat template refuses row {number}: {error}.") from None
    input_ids = encoded["input_ids"][:max_length]
    return {"input_ids": input_ids, "loss_mask": encoded["assistant_masks"][:max_length], "length": len(input_ids)}


def content_hash(rows: Dataset) -> str:
    """SHA-256 of the tokens and masks that are trained on, in their order."""
    digest = hashlib.sha256()
    for batch in rows.select_columns(["input_ids", "loss_mask"]).with_format("numpy").iter(1000):
        for input_ids, loss_mask in zip(batch["input_ids"], batch["loss_mask"], strict=True):
            digest.update(np.stack([input_ids, loss_mask]).astype("<i8").tobytes())
    return digest.hexdigest()


class PaddingCollator:
    """
    Pads the rows of a batch on the right, to the longest of them.

    Args:
        pad_token_id (`int`): Any id of the target; padding is masked wherever it could matter.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        lengths = [len(row["input_ids"]) for row in rows]
        shape = len(rows), max(lengths)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "loss_mask": torch.zeros(shape, dtype=torch.long),
        }
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            batch["input_ids"][index, :length] = torch.as_tensor(row["input_ids"])
            batch["attention_mask"][index, :length] = 1
            batch["loss_mask"][index, :length] = torch.as_tensor(row["loss_mask"])
        return batch


class LengthGroupedSampler(Sampler[int]):
    """
    Random order in which the rows of a batch have similar lengths, a pure function of seed and epoch.

    Rows are shuffled, sorted within pools of 50 batches, and the batches are shuffled again: little padding, no order
    from long to short, and a resumed run sees the same rows as an uninterrupted one.

    Args:
        lengths (`list[int]`): Length of every row in tokens.
        batch_size (`int`): Rows of a batch over all processes.
        seed (`int`): Seed of the order.
    """

    BATCHES_PER_POOL = 50

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

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
        for index in order:
            yield from batches[index].tolist()


def _load_saved(path: Path, split: str) -> Dataset:
    saved = load_from_disk(str(path))
    if not isinstance(saved, DatasetDict):
        return saved
    if split not in saved:
        raise ValueError(f"The dataset {path} has no split {split!r}; it has {sorted(saved)}.")
    return saved[split]


def _data_files(path: Path) -> list[Path]:
    """The file itself, or the data files of a directory, all of one format."""
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in FILE_FORMATS)
    if not files or any(file.suffix not in FILE_FORMATS for file in files):
        raise ValueError(f"The dataset {path} must be, or hold, files of the types {sorted(FILE_FORMATS)}.")
    if len({FILE_FORMATS[file.suffix] for file in files}) > 1:
        raise ValueError(f"The directory {path} mixes JSON and Parquet files; keep one of the two.")
    return files


def _load_files(files: list[Path]) -> Dataset:
    file_format = FILE_FORMATS[files[0].suffix]
    if file_format == "json":
        for file in files:
            check_json_lines(file)
    return load_dataset(file_format, data_files=[str(file) for file in files], split="train")


def _load_from_hub(dataset: str, split: str) -> Dataset:
    if dataset.startswith((".", "/", "~")) or Path(dataset).suffix in FILE_FORMATS:
        raise ValueError(f"The dataset {dataset} does not exist.")
    try:
        return load_dataset(dataset, split=split)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"The dataset {dataset} is neither a local path nor loadable from the Hub: {reason}"
        ) from error


def _parse_message(message: dict, number: int) -> dict[str, str]:
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"Row {number} has a message without `role` and `content` (or `from` and `value`) as text.")
    return {"role": ROLES.get(role, role), "content": content}


def _has_supervised_row(loss_mask: list[int]) -> bool:
    """Two assistant tokens in a row, after at least one other token: see `supervised_rows` at step 0."""
    mask = np.asarray(loss_mask[1:])
    return bool((mask[1:] * mask[:-1]).any())


def _cache_key(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    parts = [
        rows._fingerprint,
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.get_chat_template(),
        str(max_length),
        str(TOKENIZATION_VERSION),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]
