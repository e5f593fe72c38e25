"""Files that are complete under their name or not there at all, and checksums that tell whether they still are."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

READ_BYTES = 2**22


def replace_file(path: Path, text: str) -> None:
    """Writes by way of a temporary name, so that nobody ever reads half a file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def rename_flushed(incomplete: Path, path: Path) -> None:
    """Renames a file after its content has reached the disk."""
    with incomplete.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(incomplete, path)


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def intact_weights(source: str | Path) -> Iterator[None]:
    """
    For reading the weights of a model.

    Raises:
        ValueError: If safetensors cannot read them; names `source`, which its error does not.
    """
    try:
        yield
    except SafetensorError as error:
        reason = str(error).removesuffix(".")
        raise ValueError(
            f"The weights in {source} are damaged or incomplete ({reason}). Copy or download them again."
        ) from error
