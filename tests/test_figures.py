from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lightning_locality.plotting.style import (
    accuracy_curves,
    example_inputs,
    read_metrics,
    save_figure,
    training_curves,
)

ROWS = [
    {"epoch": 0.0, "train/accuracy": 0.5, "val/accuracy": 0.25, "train/loss": 0.7},
    {"epoch": 1.0, "train/accuracy": 0.75, "val/accuracy": 0.5, "train/loss": 0.6},
]


def test_read_metrics_merges_the_rows_of_an_epoch_and_takes_the_last_value(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,a,b\n0,1,0.5,\n0,1,,2.0\n1,3,0.25,\n1,3,0.125,\n,4,9,9\n")
    assert read_metrics(path) == [
        {"epoch": 0.0, "step": 1.0, "a": 0.5, "b": 2.0},
        {"epoch": 1.0, "step": 3.0, "a": 0.125},
    ]


def test_training_curves_hold_the_numbers() -> None:
    accuracy, loss, regularizer = training_curves(ROWS).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in accuracy.lines}
    assert lines == {"train": [[1, 50], [2, 75]], "val": [[1, 25], [2, 50]]}
    assert [line.get_ydata().tolist() for line in loss.lines] == [[0.7, 0.6]]
    assert not regularizer.lines


def test_accuracy_curves_have_a_line_for_every_run() -> None:
    figure = accuracy_curves({"a": [ROWS, ROWS], "b": [ROWS]})
    train, val = figure.axes[:2]
    assert [line.get_ydata().tolist() for line in train.lines[:3]] == [[50, 75]] * 3
    assert [line.get_ydata().tolist() for line in val.lines[:3]] == [[25, 50]] * 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_many_kinds_of_run_have_lines_of_their_own_and_panels_as_high_as_few() -> None:
    few, many = (accuracy_curves({f"kind {k}": [ROWS] for k in range(number)}) for number in (2, 15))
    styles = {(line.get_color(), line.get_linestyle()) for line in many.axes[0].lines[:15]}
    assert len(styles) == 15
    heights = []
    for figure in (few, many):
        figure.draw_without_rendering()
        heights.append(figure.axes[0].get_position().height * figure.get_figheight())
    assert heights[1] > 0.9 * heights[0] > 1.0


@pytest.mark.parametrize(("least", "lines", "bottom"), [(0.45, 2, 30), (0.1, 1, 0)])
def test_chance_is_that_of_two_classes_or_not_drawn(least: float, lines: int, bottom: float) -> None:
    figure = accuracy_curves({"a": [[{"epoch": 0, "train/accuracy": least, "val/accuracy": 0.5}]]})
    assert len(figure.axes[0].lines) == lines
    assert figure.axes[0].get_ylim()[0] == bottom


@pytest.mark.parametrize("channels", [1, 3])
def test_outline_runs_round_the_mask(channels: int) -> None:
    images = np.zeros((2, channels, 4, 6))
    mask = np.zeros((2, 4, 6), dtype=bool)
    mask[:, 1:3, 2:5] = True
    figure = example_inputs(images, ["x", "y"], (mask, ~mask))
    edges = {tuple(map(tuple, line.get_xydata().tolist())) for line in figure.axes[0].lines}
    around_box = 2 * (2 + 3)
    inner = {e for e in edges if all(1.5 <= x <= 4.5 and 0.5 <= y <= 2.5 for x, y in e)}
    assert len(inner) == around_box
    assert len(edges) == around_box + 2 * (4 + 6)  # J, the rest, has the border of the picture as well


def test_saved_as_pdf_with_embedded_fonts_and_png(tmp_path: Path) -> None:
    save_figure(training_curves(ROWS), tmp_path / "new" / "name")
    pdf = (tmp_path / "new" / "name.pdf").read_bytes()
    assert b"/FontFile2" in pdf
    assert b"/Type3" not in pdf
    assert (tmp_path / "new" / "name.png").stat().st_size > 1000
