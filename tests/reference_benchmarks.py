"""Benchmarks in tests: scripts that import each other by their plain names, what they read and what they write."""

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks"
NANO_TARGET = ROOT / "examples" / "nano-target"


@contextmanager
def benchmark(name: str) -> Iterator[ModuleType]:
    """The script `benchmarks/{name}.py`; it and those that it imports, whose names are common ones, are forgotten."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        try:
            yield importlib.import_module(name)
        finally:
            for path in FOLDER.glob("*.py"):
                sys.modules.pop(path.stem, None)


def ask_for(name: str) -> list[dict]:
    """A conversation about a function of that name."""
    answer = f"def {name}(x):\n    return x"
    return [{"role": "user", "content": f"Write `{name}(x)`."}, {"role": "assistant", "content": answer}]


def write_prompts(path: Path, chats: dict[str, list[list[dict]]]) -> Path:
    """Held-out conversations of each source, as JSONL."""
    rows = [{"source": source, "messages": messages} for source, each in chats.items() for messages in each]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_table(path: Path) -> list[list[str]]:
    """The rows of the markdown table that a benchmark wrote, its header first."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
