"""Acceptance length of heads that differ in one thing: each is trained and evaluated by the documented commands.

A table is a set of recipes under one budget and the same seeds. Prompts are held out, decoding is greedy, chains have
at most seven drafts; where the prompts name their source, every source counts the same. What lies in `--work-dir`
already is not made again, so that a table can be interrupted, or trained on another machine; what was made with other
settings is refused.

    python benchmarks/acceptance.py losses --target examples/nano-target --dataset outputs/demo/data/train.jsonl \\
        --prompts outputs/demo/data/heldout.jsonl --training --max-steps 300 --max-length 384 --num-ttt-steps 4

`--jobs` trains several heads at once; `--curve` also evaluates the checkpoints on the way, of
which `--training --save-steps 300 --save-total-limit 100` leaves some. An interrupted training goes on from its last
checkpoint.
"""

import argparse
import fcntl
import json
import os
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from harness import write_table

from eagle3_mla.training.files import replace_file

ROOT = Path(__file__).resolve().parents[1]
STANDARD, LATENT = ["--attention-backend", "sdpa"], ["--attention-backend", "sdpa_mla"]
OWN_TOKEN = ["--embed-residual", "--fc-norm"]
TABLES = {
    "heads": {
        "standard": STANDARD,
        "MLA, 8x smaller": LATENT,
        "standard, own token past the attention": [*STANDARD, *OWN_TOKEN],
        "MLA, 8x smaller, own token past the attention": [*LATENT, *OWN_TOKEN],
    },
    "losses": {
        loss: [*LATENT, *OWN_TOKEN, "--loss", loss]
        for loss in ("forward_kl", "cross_entropy", "lk_alpha", "lk_lambda")
    },
}
NUM_ASSISTANT_TOKENS = 7


@dataclass(frozen=True)
class Score:
    """
    What a head reaches.

    Args:
        acceptance_length (`float`): Mean over the sources of the prompts.
        by_depth (`list[float]`): Acceptance at each depth, likewise.
        by_source (`dict[str, float]`): Acceptance length of each source.
    """

    acceptance_length: float
    by_depth: list[float]
    by_source: dict[str, float]


def latent_recipes(full_latent_dim: int) -> dict[str, list[str]]:
    """Four sizes of the latent, and both forms of RoPE; `full_latent_dim` is the default's four times, `G * d`."""
    quarter = full_latent_dim // 4
    recipes = {"standard": [*STANDARD, *OWN_TOKEN]}
    for latent_dim, rope_dim in [(quarter // 2, 0), (quarter, 0), (2 * quarter, 0), (quarter, quarter // 2)]:
        sizes = ["--mla-latent-dim", str(latent_dim), "--mla-rope-dim", str(rope_dim)]
        factor = 2 * full_latent_dim / (latent_dim + rope_dim)
        recipes[f"MLA, C = {latent_dim}, R = {rope_dim}, {factor:.1f}x smaller"] = [*LATENT, *OWN_TOKEN, *sizes]
    return recipes


def recipes_of(table: str, target: Path) -> dict[str, list[str]]:
    """Name and flags of every head in the table."""
    if table != "latents":
        return TABLES[table]
    config = json.loads((target / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return latent_recipes(config["num_key_value_heads"] * head_dim)


def run(log: Path, script: str, *arguments: object) -> None:
    """
    One of the project's commands on one thread of the CPU, its output in `log`.

    The command holds a lock on its log, so that one which outlives a killed benchmark is not joined by a second.

    Raises:
        RuntimeError: If it fails, or if another process is still at it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]
    with log.open("a") as output:
        try:
            fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"Another process still writes {log}. Wait for it, or end it.") from None
        threads = os.environ | {"OMP_NUM_THREADS": "1"}
        finished = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=threads, check=False)
    if finished.returncode != 0:
        raise RuntimeError(f"{script} ended with exit code {finished.returncode}; its output is in {log}.")


def is_made(directory: Path, request: list[str]) -> bool:
    """
    Whether `directory` was filled by `request`. **Effects**: notes the request beside it.

    Raises:
        RuntimeError: If it was begun by another request: a table would then not say how it was made.
    """
    note = directory.with_name(f"{directory.name}.request.json")
    if not note.exists():
        write_note(note, request, made=False)
    known = json.loads(note.read_text())
    if known["request"] != request:
        changed = sorted(set(known["request"]) ^ set(request))
        raise RuntimeError(
            f"{directory} was begun with other settings ({' '.join(changed)}). Give another --work-dir."
        )
    return known["made"]


def mark_made(directory: Path, request: list[str]) -> None:
    """Notes that the request was carried out."""
    write_note(directory.with_name(f"{directory.name}.request.json"), request, made=True)


def write_note(note: Path, request: list[str], made: bool) -> None:
    note.parent.mkdir(parents=True, exist_ok=True)
    replace_file(note, json.dumps({"request": request, "made": made}))


def train(arguments: argparse.Namespace, flags: list[str], seed: int, output_dir: Path) -> None:
    """Trains a head that is not there yet, from its last checkpoint if it has one."""
    flags = [flag.replace("sdpa", arguments.kernel) for flag in flags]
    models = ["--model-path", str(arguments.target), "--dataset", *arguments.dataset]
    request = [*models, *flags, "--seed", str(seed), *arguments.training]
    if is_made(output_dir, request):
        return
    own = ["--output-dir", output_dir, "--disable-tqdm", "True"]
    if (output_dir / "checkpoint").exists():
        own.append("--resume-from-checkpoint")
    run(output_dir / "train.log", "train_eagle3.py", *own, *request)
    mark_made(output_dir, request)


def split_by_source(prompts: Path, directory: Path) -> dict[str, Path]:
    """A file for each `source` that the prompts name; one file where they name none."""
    rows = defaultdict(list)
    for line in filter(str.strip, prompts.read_text(encoding="utf-8").splitlines()):
        rows[json.loads(line).get("source", "prompts")].append(line)
    directory.mkdir(parents=True, exist_ok=True)
    files = {source: directory / f"{source}.jsonl" for source in sorted(rows)}
    for source, file in files.items():
        file.write_text("\n".join(rows[source]) + "\n", encoding="utf-8")
    return files


def evaluate(arguments: argparse.Namespace, head: Path, backend: str, source: str, prompts: Path) -> dict:
    """What `scripts/eval_eagle.py` says of one head on one source."""
    output_dir = head / f"eval-{source}"
    models = ["--target-model-path", str(arguments.target), "--attention-backend", backend]
    chain = ["--num-assistant-tokens", str(NUM_ASSISTANT_TOKENS), "--max-new-tokens", str(arguments.max_new_tokens)]
    samples = ["--dataset", str(prompts), "--num-samples", str(arguments.num_samples)]
    device = [] if arguments.device is None else ["--device", arguments.device]
    request = [*models, *chain, *samples, *device]
    if not is_made(output_dir, request):
        own = ["--draft-checkpoint", head, "--output-dir", output_dir]
        run(output_dir / "eval.log", "eval_eagle.py", *own, *request)
        mark_made(output_dir, request)
    return json.loads((output_dir / "results.json").read_text())


def score(results: dict[str, dict]) -> Score:
    """Means over the sources, each depth as far as all of them get."""
    lengths = {source: each["acceptance_length"] for source, each in results.items()}
    depths = zip(*(each["acceptance_by_depth"] for each in results.values()), strict=False)
    return Score(sum(lengths.values()) / len(lengths), [sum(depth) / len(depth) for depth in depths], lengths)


def evaluate_all(arguments: argparse.Namespace, heads: dict[Path, str], prompts: dict[str, Path]) -> dict[Path, Score]:
    """The score of every head, given with the backend that reads it."""
    pairs = list(product(heads, prompts))
    with ThreadPoolExecutor(arguments.evaluation_jobs) as pool:
        found = list(
            pool.map(lambda pair: evaluate(arguments, pair[0], heads[pair[0]], pair[1], prompts[pair[1]]), pairs)
        )
    results = defaultdict(dict)
    for (head, source), each in zip(pairs, found, strict=True):
        results[head][source] = each
    return {head: score(by_source) for head, by_source in results.items()}


def steps_of(head: Path) -> dict[int, Path]:
    """The checkpoints of a head by their optimizer steps."""
    return {int(path.name.removeprefix("checkpoint-")): path for path in sorted(head.glob("checkpoint-*"))}


def row(name: str, scores: list[Score]) -> list[str]:
    """Means over the seeds; the acceptance length of each seed behind its mean."""
    lengths = [score.acceptance_length for score in scores]
    cells = [name, f"{sum(lengths) / len(lengths):.3f}", " ".join(f"{length:.3f}" for length in lengths)]
    cells.append(
        " ".join(f"{sum(depth) / len(depth):.2f}" for depth in zip(*(s.by_depth for s in scores), strict=False))
    )
    if len(scores[0].by_source) > 1:
        cells += [f"{sum(s.by_source[source] for s in scores) / len(scores):.2f}" for source in scores[0].by_source]
    return cells


def curve_rows(names: dict[str, list[Path]], scores: dict[Path, Score]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of acceptance length against optimizer steps, means over the seeds; empty where one lacks."""
    steps = sorted({step for heads in names.values() for head in heads for step in steps_of(head)})
    rows = [[name, *(mean_at(step, heads, scores) for step in steps)] for name, heads in names.items()]
    return ["head", *(f"step {step}" for step in steps)], rows


def mean_at(step: int, heads: list[Path], scores: dict[Path, Score]) -> str:
    checkpoints = [steps_of(head).get(step) for head in heads]
    if None in checkpoints:
        return ""
    lengths = [scores[checkpoint].acceptance_length for checkpoint in checkpoints]
    return f"{sum(lengths) / len(lengths):.3f}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=[*TABLES, "latents"])
    parser.add_argument("--target", required=True, type=Path)
    parser.add_argument("--dataset", required=True, nargs="+", help="to train on")
    parser.add_argument("--prompts", required=True, type=Path, help="JSONL of held-out conversations")
    parser.add_argument("--only", nargs="+", type=int, help="numbers of the heads in the table, from 0; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--num-samples", type=int, default=40, help="prompts of each source")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--device", help="of the evaluation; default: the GPU if there is one")
    parser.add_argument(
        "--kernel", default="sdpa", choices=["sdpa", "flex_attention", "eager"], help="of the training"
    )
    parser.add_argument("--jobs", type=int, default=1, help="heads trained at once")
    parser.add_argument("--evaluation-jobs", type=int, default=1, help="evaluations at once")
    parser.add_argument("--curve", action="store_true", help="evaluate the checkpoints of the trainings too")
    parser.add_argument("--work-dir", type=Path, default=Path("outputs/acceptance"))
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/acceptance_TABLE.md")
    parser.add_argument(
        "--training", nargs=argparse.REMAINDER, default=[], help="flags that all trainings share; last"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    prompts = split_by_source(arguments.prompts, arguments.work_dir / "prompts")
    recipes = list(recipes_of(arguments.table, arguments.target).items())
    chosen = range(len(recipes)) if arguments.only is None else arguments.only
    if not set(chosen) <= set(range(len(recipes))):
        raise SystemExit(f"`--only` must name heads from 0 to {len(recipes) - 1}, got {arguments.only}.")
    names, jobs = defaultdict(list), []
    for number, seed in product(chosen, arguments.seeds):
        name, flags = recipes[number]
        head = arguments.work_dir / arguments.table / f"{number}-seed{seed}"
        names[name].append(head)
        jobs.append((flags, seed, head))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda job: train(arguments, *job), jobs))
    heads = {head: flags[1] for flags, _, head in jobs}
    if arguments.curve:
        heads |= {path: backend for head, backend in list(heads.items()) for path in steps_of(head).values()}
    scores = evaluate_all(arguments, heads, prompts)
    columns = ["head", "acceptance length", "by seed", "acceptance by depth"]
    columns += list(prompts) if len(prompts) > 1 else []
    rows = [row(name, [scores[head] for head in seeds]) for name, seeds in names.items()]
    output = arguments.output or Path(f"benchmarks/results/acceptance_{arguments.table}.md")
    note = __doc__.split("\n\n")[1]
    write_table(output, f"Acceptance length: {arguments.table}", columns, rows, note)
    if arguments.curve:
        curve = output.with_stem(f"{output.stem}_curve")
        write_table(curve, f"Acceptance length while training: {arguments.table}", *curve_rows(names, scores), note)
    print(output.read_text())


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:
        sys.exit(f"error: {error}")
