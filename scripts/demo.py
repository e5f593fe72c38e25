"""The whole way of a draft head, from text to numbers, for the small target in examples/nano-target.

Five steps, each a command that can be copied: conversations from the standard library, training, the evaluation of the
trained head and of the released one, one text streamed plainly and assisted. Everything is written to outputs/demo.
`outputs/demo/eval/results.json` is about the head that the demo trains,
`outputs/demo/eval-released/results.json` about the released one.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = Path("outputs/demo")
TARGET = "examples/nano-target"
TRAINED, RELEASED = OUTPUT / "head", Path(".")
TRAINED_RESULTS, RELEASED_RESULTS = OUTPUT / "eval" / "results.json", OUTPUT / "eval-released" / "results.json"
# What two CPU cores do in four to seven minutes. Four steps of training-time test instead of seven: at an acceptance
# length near 2, deeper drafts are rare, and the time is better spent on more conversations.
TRAINING_SCALE = (
    *("--max-steps", "500"),
    *("--max-length", "384"),
    *("--num-ttt-steps", "4"),
    *("--learning-rate", "4e-3"),
)
NUM_STEPS = 5
INTERRUPTED = 130


def prepare_data() -> list[str]:
    return [f"{TARGET}/stdlib_conversations.py", "--output-dir", f"{OUTPUT}/data"]


def train() -> list[str]:
    return [
        "scripts/train_eagle3.py",
        *("--model-path", TARGET),
        *("--attention-backend", "sdpa_mla"),
        *("--dataset", f"{OUTPUT}/data/train.jsonl"),
        *("--output-dir", f"{OUTPUT}/head"),
        *TRAINING_SCALE,
    ]


def evaluate(head: Path, results: Path) -> list[str]:
    return [
        "scripts/eval_eagle.py",
        *("--draft-checkpoint", str(head)),
        *("--target-model-path", TARGET),
        *("--attention-backend", "sdpa_mla"),
        *("--dataset", f"{OUTPUT}/data/heldout.jsonl"),
        *("--num-samples", "20"),
        *("--output-dir", str(results.parent)),
    ]


def stream(head: Path) -> list[str]:
    return [
        "scripts/stream_eagle.py",
        *("--draft-checkpoint", str(head)),
        *("--target-model-path", TARGET),
        *("--prompt", held_out_request()),
    ]


def held_out_request() -> str:
    """The request for one documented function that training has not seen."""
    with (OUTPUT / "data" / "heldout.jsonl").open(encoding="utf-8") as file:
        documented = [row for row in map(json.loads, file) if row["documented"]]
    return documented[len(documented) // 2]["messages"][0]["content"]


def run(console: Console, number: int, title: str, arguments: list[str]) -> None:
    """Prints and runs one command of this Python; ends the demo if it fails."""
    python = os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(ROOT) else "python"
    console.rule(f"{number}/{NUM_STEPS} {title}", align="left")
    console.print(f"$ {shlex.join([python, *arguments])}", highlight=False, markup=False, soft_wrap=True)
    start = time.monotonic()
    code = subprocess.run([sys.executable, *arguments], check=False).returncode
    if code != 0:
        sys.exit(f"The demo stopped: step {number} ({title}) failed with exit code {code}. Its command is above.")
    console.print(f"{title}: {time.monotonic() - start:.0f} s", style="dim", highlight=False)


def summary() -> Table:
    """Both heads side by side; the last two columns are the cache and that of a standard head of the same shape."""
    table = Table(title="Held-out functions, greedy; cache in bytes per token")
    columns = ("head", "acceptance length", "speedup", "lossless", "cache", "standard head's cache")
    for column in columns:
        table.add_column(column, justify="left" if column == "head" else "right")
    for name, path in (("trained in this demo", TRAINED_RESULTS), ("released", RELEASED_RESULTS)):
        results = json.loads(path.read_text(encoding="utf-8"))
        table.add_row(
            name,
            f"{results['acceptance_length']:.2f}",
            f"{results['speedup']:.2f}x",
            "yes" if results["lossless"] else "no",
            f"{results['draft_cache_bytes_per_token']:g}",
            f"{results['standard_cache_bytes_per_token']:g}",
        )
    return table


def main() -> None:
    os.chdir(ROOT)
    console = Console()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    run(console, 1, "conversations from the standard library", prepare_data())
    run(console, 2, "training", train())
    run(console, 3, "evaluation of the trained head", evaluate(TRAINED, TRAINED_RESULTS))
    run(console, 4, "evaluation of the released head", evaluate(RELEASED, RELEASED_RESULTS))
    run(console, 5, "one text, plain and assisted", stream(TRAINED))
    console.print(f"Files are in {OUTPUT}.", highlight=False)
    console.print(summary())


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("The demo was interrupted; `make demo` starts it anew.", file=sys.stderr)
        sys.exit(INTERRUPTED)
