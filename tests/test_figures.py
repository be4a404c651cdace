"""Figures of training, and how figures are saved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lightning_locality.plotting import accuracy_curves, example_inputs, training_curves
from lightning_locality.plotting.style import interval, line_style, save_figure

HISTORY = pd.DataFrame(
    {"train/accuracy": [0.5, 0.75], "val/accuracy": [0.25, 0.5], "train/loss": [0.7, 0.6]},
    index=pd.Index([0, 1], name="epoch"),
)


def test_training_curves_hold_the_numbers() -> None:
    accuracy, loss, regularizer = training_curves(HISTORY).axes
    labels = [axes.get_ylabel() for axes in (accuracy, loss, regularizer)]
    assert labels == ["accuracy (%)", "loss", "regulariser $R$"]
    lines = {line.get_label(): line.get_xydata().tolist() for line in accuracy.lines}
    assert lines == {"train": [[1, 50], [2, 75]], "val": [[1, 25], [2, 50]]}
    assert [line.get_ydata().tolist() for line in loss.lines] == [[0.7, 0.6]]
    assert not regularizer.lines


def test_training_curves_have_a_line_for_every_regulariser() -> None:
    columns = {"train/regularizer/near": [1.0, 0.5], "val/regularizer/far": [1.0, 0.75], "test/regularizer/far": [1, 2]}
    axes = training_curves(HISTORY.assign(**columns)).axes[2]
    lines = {line.get_label(): line.get_ydata().tolist() for line in axes.lines}
    assert lines == {"train/near": [1.0, 0.5], "val/far": [1.0, 0.75]}
    assert {text.get_text() for text in axes.get_legend().get_texts()} == lines.keys()
    assert len({line.get_linestyle() for line in axes.lines}) == 2


def test_accuracy_curves_have_a_line_for_every_run() -> None:
    figure = accuracy_curves({"a": [HISTORY, HISTORY], "b": [HISTORY]})
    train, val = figure.axes[:2]
    assert [line.get_ydata().tolist() for line in train.lines[:3]] == [[50, 75]] * 3
    assert [line.get_ydata().tolist() for line in val.lines[:3]] == [[25, 50]] * 3
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    assert [line.get_color() for line in legend.get_lines()] == [train.lines[k].get_color() for k in (0, 2)]


def test_many_kinds_of_run_have_lines_of_their_own_and_panels_as_high_as_few() -> None:
    few, many = (accuracy_curves({f"kind {k}": [HISTORY] for k in range(number)}) for number in (2, 15))
    styles = {(line.get_color(), line.get_linestyle()) for line in many.axes[0].lines[:15]}
    assert len(styles) == 15
    heights = []
    for figure in (few, many):
        figure.draw_without_rendering()
        heights.append(figure.axes[0].get_position().height * figure.get_figheight())
    assert heights[1] > 0.9 * heights[0] > 1.0


def test_chance_is_that_of_two_classes_or_not_drawn() -> None:
    for least, lines, bottom in ((0.45, 2, 30), (0.1, 1, 0)):
        figure = accuracy_curves({"a": [HISTORY.assign(**{"train/accuracy": least, "val/accuracy": 0.5})]})
        assert len(figure.axes[0].lines) == lines
        assert figure.axes[0].get_ylim()[0] == bottom


def test_outline_runs_round_the_mask() -> None:
    mask = np.zeros((2, 4, 6), dtype=bool)
    mask[:, 1:3, 2:5] = True
    for channels in (1, 3):
        figure = example_inputs(np.zeros((2, channels, 4, 6)), ["x", "y"], (mask, ~mask))
        edges = {tuple(map(tuple, line.get_xydata().tolist())) for line in figure.axes[0].lines}
        around_box = 2 * (2 + 3)
        inner = {e for e in edges if all(1.5 <= x <= 4.5 and 0.5 <= y <= 2.5 for x, y in e)}
        assert len(inner) == around_box
        assert len(edges) == around_box + 2 * (4 + 6)  # J, the rest, has the border of the picture as well


def test_saved_as_pdf_with_embedded_fonts_and_png(tmp_path: Path) -> None:
    save_figure(training_curves(HISTORY), tmp_path / "new" / "weight_0.1")
    pdf = (tmp_path / "new" / "weight_0.1.pdf").read_bytes()
    assert b"/FontFile2" in pdf
    assert b"/Type3" not in pdf
    assert (tmp_path / "new" / "weight_0.1.png").stat().st_size > 1000


def test_spreads() -> None:
    values = pd.Series([0.0, 2.0, 5.0, 9.0])
    for spread, low, high in (
        ("range", 0.0, 9.0),
        ("quartiles", 1.5, 6.0),
        ("std", 4 - 11.5**0.5, 4 + 11.5**0.5),
        ("sem", 4 - (46 / 12) ** 0.5, 4 + (46 / 12) ** 0.5),
    ):
        assert interval(values, spread, "mean") == pytest.approx((low, high))
    assert interval(values, "std", "median")[0] == pytest.approx(3.5 - 11.5**0.5)
    for own, spread in ((values, "none"), (values[:1], "std")):
        assert np.isnan(interval(own, spread, "mean")).all()


def test_the_first_56_lines_look_different() -> None:
    assert len({str(line_style(number)) for number in range(56)}) == 56
