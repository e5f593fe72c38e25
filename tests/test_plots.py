"""The training curves: three panels with what was logged, in every checkpoint, in the result and in its card."""

import json
import sys

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from reference_runs import run, training_flags

from eagle3_mla.training import plots
from eagle3_mla.training.card import CARD_FILE

LOG_HISTORY = [
    {"step": 10, "loss": 3.0, "accuracy_0": 0.1, "accuracy_1": 0.05, "simulated_acceptance_length": 1.1},
    {"step": 20, "loss": 2.0, "accuracy_0": 0.4, "accuracy_1": 0.30, "simulated_acceptance_length": 1.6},
    {"step": 20, "train_runtime": 3.0, "train_loss": 2.5},
]


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures that are saved during a test."""
    saved = []
    savefig = Figure.savefig

    def keep(self, *args, **kwargs):
        saved.append(self)
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


@pytest.fixture
def command(own_dataset_cache, tmp_path) -> dict[str, str]:
    steps = {"max_steps": "4", "save_steps": "2", "logging_steps": "1"}
    return training_flags(tmp_path, per_device_train_batch_size="2", **steps)


def curves(figure: Figure) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Points of every line by panel and label."""
    return {axes.get_title(): {line.get_label(): points(line) for line in axes.lines} for axes in figure.axes}


def points(line) -> list[tuple[float, float]]:
    return [tuple(point) for point in line.get_xydata().tolist()]


def test_three_panels_show_what_was_logged(figures, tmp_path):
    plots.draw_curves(LOG_HISTORY, tmp_path / "curves.png")
    assert curves(figures[0]) == {
        "Loss": {"training loss": [(10, 3.0), (20, 2.0)]},
        "Accuracy per TTT step": {
            "TTT step 0": [(10, 0.1), (20, 0.4)],
            "TTT step 1": [(10, 0.05), (20, 0.3)],
        },
        "Simulated acceptance length": {"training rows": [(10, 1.1), (20, 1.6)]},
    }
    assert all(axes.get_xlabel() == "optimizer step" and axes.get_ylabel() for axes in figures[0].axes)
    assert [axes.get_legend() is not None for axes in figures[0].axes] == [False, True, False]


def test_the_picture_is_a_png_of_more_than_one_colour_and_nothing_else_is_left(tmp_path):
    plots.draw_curves(LOG_HISTORY, tmp_path / "curves.png")
    picture = imread(tmp_path / "curves.png")
    height, width, _ = picture.shape
    assert width > 1200
    assert height > 400
    assert picture.std() > 0.05
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_no_display_is_asked_for(tmp_path):
    """`pyplot` chooses a backend for the whole process, and a machine without a display may not have it."""
    sys.modules.pop("matplotlib.pyplot", None)
    plots.draw_curves(LOG_HISTORY, tmp_path / "curves.png")
    assert "matplotlib.pyplot" not in sys.modules


def test_a_history_without_losses_has_no_curves():
    assert not plots.has_curves([{"step": 1, "train_runtime": 1.0}])
    assert plots.has_curves(LOG_HISTORY)


def test_every_checkpoint_the_result_and_its_card_show_the_curves(command, tmp_path):
    assert run(command) == 0
    for name in (".", "checkpoint-2", "checkpoint-4", "checkpoint"):
        assert (tmp_path / "out" / name / plots.CURVES_FILE).is_file()
    assert f"({plots.CURVES_FILE})" in (tmp_path / "out" / CARD_FILE).read_text()


def test_curves_of_a_resumed_run_are_whole(command, tmp_path, figures):
    flags = command | {"--save-total-limit": "1"}
    assert run(flags, "--max-steps", "2") == 0
    figures.clear()
    assert run(flags, "--resume-from-checkpoint") == 0
    log = [json.loads(line) for line in (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()]
    losses = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    assert [step for step, _ in losses] == [1, 2, 3, 4]
    assert curves(figures[-1])["Loss"]["training loss"] == losses
