"""Acceptance length of heads that differ in one thing: each is trained and evaluated by the documented commands.

A table is a set of recipes under one budget and the same seeds. Prompts are held out, decoding is greedy, chains have
at most seven drafts; where the prompts name their source, every source counts the same. A head that lies in
`--work-dir` already is not trained again, so that a table can be interrupted, or trained on another machine.

    python benchmarks/acceptance.py losses --target examples/nano-target --dataset outputs/demo/data/train.jsonl \\
        --prompts outputs/demo/data/heldout.jsonl --training --max-steps 300 --max-length 384 --num-ttt-steps 4
"""

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from harness import write_table

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


def run(script: str, *arguments: object) -> None:
    """One of the project's commands; it ends this one if it fails."""
    subprocess.run([sys.executable, ROOT / "scripts" / script, *map(str, arguments)], check=True)


def train(arguments: argparse.Namespace, flags: list[str], seed: int, output_dir: Path) -> None:
    if (output_dir / "model.safetensors").exists():
        return
    datasets = ["--dataset", *arguments.dataset]
    own = [*flags, "--seed", str(seed), "--output-dir", str(output_dir), "--disable-tqdm", "True"]
    run("train_eagle3.py", "--model-path", arguments.target, *datasets, *own, *arguments.training)


def split_by_source(prompts: Path, directory: Path) -> dict[str, Path]:
    """A file for each `source` that the prompts name; one file where they name none."""
    rows = defaultdict(list)
    for line in prompts.read_text(encoding="utf-8").splitlines():
        rows[json.loads(line).get("source", "prompts")].append(line)
    directory.mkdir(parents=True, exist_ok=True)
    files = {source: directory / f"{source}.jsonl" for source in sorted(rows)}
    for source, file in files.items():
        file.write_text("\n".join(rows[source]) + "\n", encoding="utf-8")
    return files


def evaluate(arguments: argparse.Namespace, head: Path, backend: str, prompts: dict[str, Path]) -> Score:
    lengths, depths = {}, []
    for source, file in prompts.items():
        output_dir = head / f"eval-{source}"
        models = ["--draft-checkpoint", head, "--target-model-path", arguments.target, "--attention-backend", backend]
        chain = ["--num-assistant-tokens", NUM_ASSISTANT_TOKENS, "--max-new-tokens", arguments.max_new_tokens]
        samples = ["--dataset", file, "--num-samples", arguments.num_samples, "--output-dir", output_dir]
        run("eval_eagle.py", *models, *chain, *samples)
        results = json.loads((output_dir / "results.json").read_text())
        lengths[source] = results["acceptance_length"]
        depths.append(results["acceptance_by_depth"])
    by_depth = [sum(depth) / len(depth) for depth in zip(*depths, strict=False)]  # to where all get
    return Score(sum(lengths.values()) / len(lengths), by_depth, lengths)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=[*TABLES, "latents"])
    parser.add_argument("--target", required=True, type=Path)
    parser.add_argument("--dataset", required=True, nargs="+", help="to train on")
    parser.add_argument("--prompts", required=True, type=Path, help="JSONL of held-out conversations")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--num-samples", type=int, default=40, help="prompts of each source")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--work-dir", type=Path, default=Path("outputs/acceptance"))
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/acceptance_TABLE.md")
    parser.add_argument(
        "--training", nargs=argparse.REMAINDER, default=[], help="flags that all trainings share; last"
    )
    arguments = parser.parse_args()
    prompts = split_by_source(arguments.prompts, arguments.work_dir / "prompts")
    columns = ["head", "acceptance length", "by seed", "acceptance by depth"]
    columns += list(prompts) if len(prompts) > 1 else []
    output = arguments.output or Path(f"benchmarks/results/acceptance_{arguments.table}.md")
    rows = []
    for number, (name, flags) in enumerate(recipes_of(arguments.table, arguments.target).items()):
        scores = []
        for seed in arguments.seeds:
            head = arguments.work_dir / arguments.table / f"{number}-seed{seed}"
            train(arguments, flags, seed, head)
            scores.append(evaluate(arguments, head, flags[1], prompts))
        rows.append(row(name, scores))
        print(*rows[-1], flush=True)
        write_table(output, f"Acceptance length: {arguments.table}", columns, rows, __doc__.split("\n\n")[1])


if __name__ == "__main__":
    main()
