"""Where rows come from: JSON Lines, JSON and Parquet files, directories, saved datasets, and the Hub.

Training needs random access, so streaming a Hub dataset means: read its first rows, keep them on disk, and read no
more. Rows come out as they were stored; what they mean is decided in `conversations.py` and `tokenization.py`.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi

from .json_text import load_json, refusing_depth

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def load_conversations(
    dataset: str, split: str = "train", config: str | None = None, streaming: bool = False, max_rows: int | None = None
) -> Dataset:
    """
    Rows of a file, a directory or a Hub dataset.

    Args:
        dataset (`str`): A `.jsonl`, `.json` (one object per line, or one list of objects) or `.parquet` file, a
            directory of such files or one written by `Dataset.save_to_disk`, or the id of a dataset on the Hub.
        split (`str`, *optional*, defaults to `"train"`): Split of a Hub dataset or a saved `DatasetDict`.
        config (`str`, *optional*): Configuration of a Hub dataset that has several.
        streaming (`bool`, *optional*, defaults to `False`): Read no more than the first `max_rows` rows of a Hub
            dataset, and keep them in the cache of `datasets` under the commit that they come from.
        max_rows (`int`, *optional*): Only the first rows; all by default.

    Raises:
        ValueError: If there is no such dataset, it is empty, or it cannot be read.
    """
    path = Path(dataset)
    if path.exists() and (config is not None or streaming):
        raise ValueError(
            f"`--dataset-config` and `--streaming` are for datasets on the Hub; {dataset} is a local path."
        )
    if path.exists() and split != "train" and not (path / "dataset_dict.json").exists():
        raise ValueError(
            f"`--dataset-split` must be train for {dataset}, got {split}: files have no splits. Leave it out, or give "
            "one for each dataset."
        )
    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        rows = _load_saved(path, split)
    elif path.exists():
        rows = _load_files(_data_files(path))
    else:
        rows = _load_from_hub(dataset, split, config, max_rows if streaming else None)
    if len(rows) == 0:
        raise ValueError(f"The dataset {dataset} has no rows.")
    # A saved dataset may be set to give arrays.
    rows = rows.with_format(None)
    return rows if max_rows is None else rows.select(range(min(max_rows, len(rows))))


def check_json(path: Path) -> None:
    """
    Reads a file of JSON once, because the Arrow reader does not say which line is broken.

    Raises:
        ValueError: Names the first line, or the item of a list, that is not a JSON object, or says that there is none.
    """
    try:
        with path.open(encoding="utf-8") as file:
            is_list = file.read(1024).lstrip().startswith("[") and path.suffix == ".json"
            file.seek(0)
            has_rows = _check_json_list(file.read(), path) if is_list else _check_json_lines(file, path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start} of a block.") from None
    if not has_rows:
        raise ValueError(f"The dataset {path} is empty.")


def _check_json_lines(lines: Iterator[str], path: Path) -> bool:
    """Whether there is a row."""
    has_rows = False
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"Line {number} of {path}"
            with refusing_depth(place):
                row = _parse_json(line, place)
            if not isinstance(row, dict):
                raise ValueError(f"{place} must be a JSON object, got {type(row).__name__}.")
            has_rows = True
    return has_rows


def _check_json_list(text: str, path: Path) -> bool:
    """Whether there is a row."""
    with refusing_depth(str(path)):
        rows = _parse_json(text, str(path))
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"Item {number} of {path} must be a JSON object, got {type(row).__name__}.")
    return bool(rows)


def _parse_json(text: str, place: str) -> object:
    constants: list[str] = []
    try:
        value = load_json(text, parse_constant=constants.append)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not valid JSON: {error}.") from None
    except ValueError as error:
        raise ValueError(f"{place} {error}.") from None
    if constants:
        raise ValueError(f"{place} holds {constants[0]}, which is not JSON. Leave the field out or write null.")
    return value


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
            check_json(file)
    try:
        return load_dataset(file_format, data_files=[str(file) for file in files], split="train")
    except (DatasetsError, ValueError) as error:
        reason = _one_line(error.__cause__ or error)
        raise ValueError(
            f"The files {', '.join(str(file) for file in files)} cannot be read together as rows: {reason}. "
            "Give each column one type in all rows, or store it as a JSON string."
        ) from error


def _load_from_hub(dataset: str, split: str, config: str | None, num_streamed: int | None) -> Dataset:
    """A split of a Hub dataset, or its first `num_streamed` rows."""
    if dataset.startswith((".", "/", "~")) or Path(dataset).suffix in FILE_FORMATS:
        raise ValueError(f"The dataset {dataset} does not exist.")
    try:
        if num_streamed is None:
            return load_dataset(dataset, config, split=split)
        source = {"dataset": dataset, "config": config, "split": split, "revision": _hub_commit(dataset)}
        return Dataset.from_generator(_stream_rows, gen_kwargs=source | {"num_rows": num_streamed})
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"The dataset {dataset} is neither a local path nor loadable from the Hub: {_one_line(error)}"
        ) from error


def _hub_commit(dataset: str) -> str:
    """The commit that is now on the Hub; it is part of the key under which streamed rows are cached."""
    return HfApi().dataset_info(dataset).sha


def _stream_rows(dataset: str, config: str | None, split: str, revision: str, num_rows: int) -> Iterator[dict]:
    yield from load_dataset(dataset, config, split=split, revision=revision, streaming=True).take(num_rows)


def _one_line(error: BaseException) -> str:
    """The error's text without line breaks, and without its tail where it is long."""
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else f"{text[:400]} ..."
