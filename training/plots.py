"""Training curves as a picture: loss, accuracy per TTT step, simulated acceptance length.

Drawn from the Trainer's log history, which a checkpoint carries along: the curves of a resumed run are whole.
"""

import os
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import TrainerCallback

CURVES_FILE = "training_curves.png"
SIZE_INCHES = (13, 4)
DOTS_PER_INCH = 120
# Up to here every point is marked, so that short runs show something.
MAX_MARKED_POINTS = 30


class CurvesCallback(TrainerCallback):
    """Draws the curves into every checkpoint."""

    def on_save(self, args, state, control, **kwargs):
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and has_curves(state.log_history):
            draw_curves(state.log_history, checkpoint / CURVES_FILE)


def has_curves(log_history: list[dict]) -> bool:
    """True if anything was logged that `draw_curves` draws."""
    return any("loss" in entry for entry in log_history)


def draw_curves(log_history: list[dict], path: Path) -> None:
    """
    Writes the three panels.

    Args:
        log_history (`list[dict]`): As the Trainer keeps it.
        path (`Path`): A PNG file, replaced at once.
    """
    # Without pyplot there is no global state and no display: the figure draws itself with Agg.
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    losses, accuracies, lengths = figure.subplots(1, 3)
    draw_panel(losses, log_history, {"loss": "training loss", "eval_loss": "evaluation loss"})
    losses.set_title("Loss")
    losses.set_ylabel("loss, weighted over TTT steps")
    steps = sorted(
        {
            int(name.removeprefix("accuracy_"))
            for entry in log_history
            for name in entry
            if name.startswith("accuracy_")
        }
    )
    draw_panel(accuracies, log_history, {f"accuracy_{step}": f"TTT step {step}" for step in steps})
    accuracies.set_title("Accuracy per TTT step")
    accuracies.set_ylabel("share of top-1 hits")
    accuracies.set_ylim(0, 1)
    draw_panel(lengths, log_history, {"simulated_acceptance_length": "training rows"})
    lengths.set_title("Simulated acceptance length")
    lengths.set_ylabel("tokens per round, bonus token included")
    lengths.set_ylim(bottom=1)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=DOTS_PER_INCH, format="png")
    os.replace(partial, path)


def draw_panel(axes: Axes, log_history: list[dict], labels: dict[str, str]) -> None:
    """One line for each logged name that occurs, with its label."""
    for index, (name, label) in enumerate(labels.items()):
        points = [(entry["step"], entry[name]) for entry in log_history if name in entry]
        if not points:
            continue
        marker = "o" if len(points) <= MAX_MARKED_POINTS else None
        color = f"C{index % 10}"
        axes.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=3, linewidth=1.5, color=color)
    axes.set_xlabel("optimizer step")
    axes.grid(alpha=0.3)
    if len(axes.lines) > 1:
        axes.legend(fontsize="small", ncols=2 if len(axes.lines) > 4 else 1)
