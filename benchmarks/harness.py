"""What the benchmarks share: timing and memory of a function on the GPU, and the facts that go with a number."""

import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from eagle3_mla.training.files import replace_file
from eagle3_mla.training.release import code_commit

BYTES_PER_GB = 1e9
# In the place of the first number of a row that could not be measured.
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Cost:
    """
    Cost of one call.

    Args:
        first_seconds (`float`): Of the first call, compilation included.
        milliseconds (`float`): Median of the later ones.
        peak_gigabytes (`float`): Most memory that was allocated during one of these, everything included (1e9 bytes).
    """

    first_seconds: float
    milliseconds: float
    peak_gigabytes: float


def measure(make: Callable[[], Callable[[], None]], num_calls: int) -> Cost | None:
    """Cost of what `make` makes over `num_calls` calls after the first; `None` if it does not fit into memory."""
    try:
        function = make()
        first_seconds = timed(function)
        torch.cuda.reset_peak_memory_stats()
        seconds = sorted(timed(function) for _ in range(num_calls))
    except torch.OutOfMemoryError:
        return None
    return Cost(first_seconds, 1000 * seconds[num_calls // 2], torch.cuda.max_memory_allocated() / BYTES_PER_GB)


def timed(function: Callable[[], None]) -> float:
    """Seconds of one call, the device's work included."""
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def wait() -> None:
    """Until the GPU has done what it was given, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matrix_product_rate(size: int = 8192) -> float:
    """Floating-point operations per second of a large bfloat16 matrix product on random data."""
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        torch.mm(left, right)
    seconds = min(timed(lambda: torch.mm(left, right)) for _ in range(10))
    return 2 * size**3 / seconds


def copy_bandwidth(num_bytes: int, device: str) -> float:
    """Bytes per second, read and written, of copying a large tensor."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    copied = torch.empty_like(source)
    copied.copy_(source)
    return 2 * num_bytes / min(timed(lambda: copied.copy_(source)) for _ in range(10))


def write_table(path: Path, title: str, columns: list[str], rows: list[list[str]], note: str) -> None:
    """A markdown file with the table, how it was made and on what; cells that a row lacks at its end stay empty."""
    rows = [row + [""] * (len(columns) - len(row)) for row in rows]
    lines = [f"# {title}", "", note, "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", f"    python {' '.join(sys.argv)}", "", conditions(), ""]
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, "\n".join(lines))


def conditions() -> str:
    """Commit, hardware and versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return (
        f"Commit {code_commit() or 'unknown'}, {device}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}."
    )
