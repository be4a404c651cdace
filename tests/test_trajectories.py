from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from lightning_locality.outcomes import (
    against_depth,
    completion_against_observations,
    number_of_components,
    rank_against_fit,
)
from lightning_locality.plotting.style import save_figure
from lightning_locality.trajectories import component_curves, magnitude_groups, read_iterations, value_against_loss

CP = [
    {"iteration": 0, "reconstruction_error": 1.0, "component/1": 0.1, "component/2": 0.0, "effective rank/0": 1.0},
    {"iteration": 25, "reconstruction_error": 0.5, "component/1": 2.0, "component/2": 0.5, "effective rank/0": 1.5},
]
TREE = [{"iteration": 0, "train/loss": 0.25, "node 0-1/1": 3.0, "node 0-1-2/1": 5.0, "node 0-1-2/10": 1.0, "time": 7.0}]
TREE[0]["node 0-1-2/2"] = 4.0


def lines(axes: object) -> list[list[list[float]]]:
    return [line.get_xydata().tolist() for line in axes.lines]  # type: ignore[attr-defined]


def test_rows_are_merged_by_iteration_and_sorted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("iteration,a,b\n25,1,\n0,5,6\n25,,2\n25,3,\n,9,9\n")
    assert read_iterations(path) == [{"iteration": 0, "a": 5, "b": 6}, {"iteration": 25, "a": 3, "b": 2}]
    path.write_text("epoch,a\n0,1\n")
    assert read_iterations(path) == []


def test_groups_are_the_numbered_magnitudes_with_the_root_first() -> None:
    assert magnitude_groups(CP) == {"component": ["component/1", "component/2"]}
    assert magnitude_groups(TREE) == {
        "node 0-1-2": ["node 0-1-2/1", "node 0-1-2/2", "node 0-1-2/10"],
        "node 0-1": ["node 0-1/1"],
    }


def test_one_run_has_a_panel_per_group_and_one_for_the_error() -> None:
    root, other, loss = component_curves({"run": TREE}, top=2, x="time").axes
    assert lines(root) == [[[7, 5]], [[7, 4]]]
    assert lines(other) == [[[7, 3]]]
    assert lines(loss) == [[[7, 0.25]]]
    assert [axes.get_title() for axes in (root, other)] == ["node 0-1-2", "node 0-1"]
    assert (root.get_ylabel(), loss.get_ylabel(), loss.get_yscale()) == ("local component norm", "training loss", "log")


def test_several_runs_have_a_column_each() -> None:
    figure = component_curves({"a": CP, "b": TREE})
    a, b, error, loss = figure.axes
    assert lines(a) == [[[0, 0.1], [25, 2]], [[0, 0], [25, 0.5]]]
    assert lines(b)[0] == [[0, 5]]
    assert lines(error) == [[[0, 1], [25, 0.5]]]
    assert lines(loss) == [[[0, 0.25]]]
    assert (a.get_title(), a.get_ylabel()) == ("a", "component norm")
    assert (b.get_title(), b.get_ylabel()) == ("b", "local component norm\n(node 0-1-2)")


def test_more_runs_than_columns_continue_below() -> None:
    figure = component_curves({str(n): CP for n in range(5)})
    grid = np.array(figure.axes).reshape(4, 4)
    drawn = [[len(axes.lines) for axes in line] for line in grid]
    assert drawn == [[2] * 4, [1] * 4, [2, 0, 0, 0], [1, 0, 0, 0]]
    assert not any(axes.axison for axes in grid[2:, 1:].flat)


def test_groups_asked_for() -> None:
    assert [axes.get_title() for axes in component_curves({"t": TREE}, groups=["node 0-1"]).axes] == ["node 0-1", ""]
    with pytest.raises(ValueError, match=r"run 't' has no bond 1; it has \['node 0-1-2', 'node 0-1'\]"):
        component_curves({"t": TREE}, groups=["bond 1"])


def test_value_against_loss_decreasing_to_the_right_with_its_bound() -> None:
    rows = [{"train/loss": 1.0, "entry/0-0": -0.5}, {"train/loss": 0.01, "entry/0-0": 7.0}]
    figure = value_against_loss({"a": [rows, rows], "b": [rows]}, bounds={"bound": np.sqrt, "b": np.square})
    (axes,) = figure.axes
    assert lines(axes)[:3] == [[[1, 0.5], [0.01, 7]]] * 3
    for drawn, bound in zip(axes.lines[3:], (np.sqrt, np.square), strict=True):
        x, y = drawn.get_data()
        assert (x.min(), x.max()) == pytest.approx((0.01, 1))
        np.testing.assert_allclose(y, bound(x))
    assert axes.lines[4].get_color() == axes.lines[2].get_color() != axes.lines[0].get_color()
    left, right = axes.get_xlim()
    assert left > right
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["a", "b", "bound"]


def test_value_against_loss_in_panels() -> None:
    rows = [{"train/loss": 1.0, "entry/1-0": 2.0}]
    labels = ("depth 2, x", "depth 2, y, z", "depth 3, x")
    figure = value_against_loss({key: [rows] for key in labels}, entry="1-0", split=", ", bounds={"all": np.sqrt})
    assert [axes.get_title() for axes in figure.axes] == ["depth 2", "depth 3"]
    texts = [[t.get_text() for t in axes.get_legend().get_texts()] for axes in figure.axes]
    assert texts == [["x", "y, z", "all"], ["x", "all"]]
    assert figure.axes[0].get_ylabel() == "|entry (1, 0)|"


def test_bounds_in_the_colours_of_runs_are_explained() -> None:
    rows = [{"train/loss": 1.0, "entry/0-0": 2.0}]
    figure = value_against_loss({"p, a": [rows], "q, b": [rows]}, split=", ", bounds={"q, b": np.sqrt})
    texts = [[t.get_text() for t in axes.get_legend().get_texts()] for axes in figure.axes]
    assert texts == [["a"], ["b", "lower bound"]]


def test_number_of_components_counts_what_is_not_small_beside_the_largest() -> None:
    assert number_of_components({"bond 1/1": 1.0, "bond 1/2": 0.02, "bond 1/3": 0.005, "bond 2/1": 7.0}) == 1.5
    assert number_of_components(CP[1], threshold=0.3) == 1
    assert math.isnan(number_of_components({"train/loss": 1.0}))


def test_against_depth_draws_mean_and_range() -> None:
    rows = [
        {"variant": "v", "depth": depth, "effective rank/0": rank, "effective rank/1": rank + 2, "component/1": 1.0}
        for depth, rank in ((2, 3.0), (1, 5.0), (1, 8.0))
    ]
    rank, count, error = against_depth(rows).axes
    assert lines(rank) == [[[1, 7.5], [2, 4]]]
    band = rank.collections[0].get_paths()[0].vertices
    assert {tuple(v) for v in band.tolist()} >= {(1, 6), (1, 9), (2, 4)}
    assert lines(count) == [[[1, 1], [2, 1]]]
    assert lines(error) == []


def test_rank_against_fit_scales_the_errors_and_draws_the_trivial_one() -> None:
    rows = [
        {"variant": v, "source": s, "rank": r, "train/loss": e, "test/loss": 0.4}
        for v in ("original", "random labels")
        for s in ("mnist", "fashion_mnist")
        for r, e in ((1, 0.2), (1, 0.4), (5, 0.1))
    ]
    figure = rank_against_fit(rows)
    assert len(figure.axes) == 4
    train, test = figure.axes[:2]
    original, labels, trivial = lines(train)
    assert original == labels
    np.testing.assert_allclose(original, [[1, 0.075], [5, 0.025]])
    assert [y for _, y in trivial] == [0.09, 0.09]
    band = train.collections[0].get_paths()[0].vertices
    assert sorted({round(y, 12) for x, y in band.tolist() if x == 1}) == [0.05, 0.1]
    np.testing.assert_allclose(lines(test)[0], [[1, 0.1], [5, 0.1]])


def test_completion_draws_median_and_quartiles_and_ranks_where_there_are_any() -> None:
    rows = [{"variant": "v", "observations": "50", "reconstruction_error": e} for e in (1.0, 2.0, 3.0, 4.0, 10.0)]
    (error,) = completion_against_observations(rows).axes
    assert lines(error) == [[[50, 3]]]
    band = error.collections[0].get_paths()[0].vertices
    assert {tuple(v) for v in band.tolist()} == {(50, 2), (50, 4)}
    with_rank = [{**row, "cp rank": 2} for row in rows]
    assert lines(completion_against_observations(with_rank).axes[1]) == [[[50, 2]]]


def test_figures_are_saved_with_embedded_fonts(tmp_path: Path) -> None:
    save_figure(component_curves({"a": CP}), tmp_path / "a")
    assert b"/FontFile2" in (tmp_path / "a.pdf").read_bytes()


def test_value_against_loss_down_to_a_least_loss() -> None:
    rows = [{"train/loss": 10.0**-k, "entry/0-0": float(k + 1)} for k in range(6)]
    (axes,) = value_against_loss({"a": [rows]}, least=5e-4).axes
    assert [x for x, _ in lines(axes)[0]] == pytest.approx([1, 1e-1, 1e-2, 1e-3])
