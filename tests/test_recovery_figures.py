"""Figures of recovery runs, and what is read off their curves."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib.axes import Axes

from lightning_locality import plotting
from lightning_locality.plotting.recovery import (
    component_curves,
    curve_summary,
    magnitude_groups,
    number_of_components,
)
from lightning_locality.results import read_runs
from lightning_locality.tensors.deep_matrix import lower_bound


def frame(rows: list[dict[str, float]]) -> pd.DataFrame:
    return pd.DataFrame(rows).set_index("iteration")


CP = frame(
    [
        {"iteration": 0, "reconstruction_error": 1.0, "component/1": 0.1, "component/2": 0.0, "effective rank/0": 1.0},
        {"iteration": 25, "reconstruction_error": 0.5, "component/1": 2.0, "component/2": 0.5, "effective rank/0": 1.5},
    ]
)
TREE = {"iteration": 0, "train/loss": 0.25, "node 0-1/1": 3.0, "node 0-1-2/1": 5.0, "node 0-1-2/10": 1.0, "time": 7.0}
TREE = frame([{**TREE, "node 0-1-2/2": 4.0}])
PROBLEM = {"rows": 2, "cols": 2, "z": 1.0, "z_prime": 1.0, "eps": 0.0}


def lines(axes: Axes) -> list[list[list[float]]]:
    return [line.get_xydata().tolist() for line in axes.lines]


def test_groups_are_the_numbered_magnitudes_with_the_root_first() -> None:
    assert magnitude_groups(CP.columns) == {"component": ["component/1", "component/2"]}
    assert magnitude_groups(TREE.columns) == {
        "node 0-1-2": ["node 0-1-2/1", "node 0-1-2/2", "node 0-1-2/10"],
        "node 0-1": ["node 0-1/1"],
    }


def test_one_run_has_a_panel_per_group_and_one_for_the_error() -> None:
    root, other, loss = component_curves({"run": TREE}, top=2, x="time").axes
    assert lines(root) == [[[7, 5]], [[7, 4]]]
    assert lines(other) == [[[7, 3]]]
    assert lines(loss) == [[[7, 0.25]]]
    names = ["local component norm\n(node 0-1-2)", "local component norm\n(node 0-1)", "training loss"]
    assert [axes.get_ylabel() for axes in (root, other, loss)] == names
    assert loss.get_yscale() == "log"


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


def test_reference_errors_are_lines_of_the_error_alone() -> None:
    reference = {"nuclear norms": 0.3, "zeros": 1.0}
    figure = component_curves({"a": CP.assign(**{"train/loss": 1.0}), "b": TREE}, loss=True, reference=reference)
    a, _, error, no_error, loss, _ = figure.axes
    assert lines(error)[1:] == [[[0, 0.3], [1, 0.3]], [[0, 1], [1, 1]]]
    assert [len(axes.lines) for axes in (a, no_error, loss)] == [2, 1, 1]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["nuclear norms", "zeros"]
    assert not component_curves({"a": CP}).legends


def test_groups_by_name() -> None:
    node, loss = component_curves({"t": TREE}, groups=["node 0-1"]).axes
    assert (node.get_ylabel(), loss.get_ylabel()) == ("local component norm\n(node 0-1)", "training loss")
    with pytest.raises(ValueError, match=r"run 't' has no bond 1; it has \['node 0-1-2', 'node 0-1'\]"):
        component_curves({"t": TREE}, groups=["bond 1"])


def make_runs(folder: Path, entry: str = "0-0", **problems: dict[str, float]) -> Path:
    """A run for every name, whose entry is -2^i and whose loss is 10^-i."""
    for number, (name, problem) in enumerate(problems.items()):
        run = folder / name
        run.mkdir(parents=True)
        rows = [
            {"iteration": i, "train/loss": 10.0**-i, f"entry/{entry}": -(2.0**i), "component/1": i} for i in range(6)
        ]
        pd.DataFrame(rows).to_csv(run / "metrics.csv", index=False)
        labels = {"variant": name.replace("__", ", "), "seed": number}
        (run / "config.yaml").write_text(yaml.safe_dump({"data": {"init_args": problem}, "labels": labels}))
        (run / "summary.json").write_text("{}")
    return folder


def test_value_against_loss_decreasing_to_the_right_with_its_bound(tmp_path: Path) -> None:
    runs = read_runs([make_runs(tmp_path, a=PROBLEM, b=PROBLEM)])
    figure, numbers = plotting.value(runs, least=5e-4)
    (axes,) = figure.axes
    np.testing.assert_allclose(lines(axes)[:2], [[[10.0**-i, 2.0**i] for i in range(4)]] * 2)
    x, y = axes.lines[2].get_data()
    assert (x.min(), x.max()) == pytest.approx((1e-3, 1))
    bound = lower_bound(x, 1.0, 1.0, 0.0)
    np.testing.assert_array_equal(y, np.where(bound > 0, bound, np.nan))
    assert np.isnan(y).any()
    left, right = axes.get_xlim()
    assert left > right
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["a", "b", "lower bound"]
    assert axes.lines[2].get_color() == "black"
    found = numbers[numbers["run"] == "a"].set_index("quantity")["value"]
    assert found["|entry/0-0| at loss 0.01"] == pytest.approx(4, rel=1e-12)


def test_bounds_of_several_problems_have_the_colours_of_their_runs(tmp_path: Path) -> None:
    other = {**PROBLEM, "z": 2.0}
    folder = make_runs(tmp_path, a=PROBLEM, b=other, c=PROBLEM, d={**other, "cols": 3})
    figure, _ = plotting.value(read_runs([folder]))
    (axes,) = figure.axes
    a, b, c, d, *bounds, explained = axes.lines
    assert {line.get_color() for line in bounds} <= {a.get_color(), b.get_color(), c.get_color()}
    assert len(bounds) == 2
    assert d.get_color() not in {line.get_color() for line in bounds}
    assert explained.get_label() == "lower bound"
    # a line for several problems has no bound
    runs = read_runs([folder]).assign(variant=["x", "x", "x", "d"])
    figure, _ = plotting.value(runs)
    assert [line.get_label() for line in figure.axes[0].lines] == ["x", "x", "x", "d"]


def test_value_against_loss_in_panels(tmp_path: Path) -> None:
    names = ("depth 2__x", "depth 2__y__z", "depth 3__x")
    runs = read_runs([make_runs(tmp_path, entry="1-0", **dict.fromkeys(names, PROBLEM))])
    figure, _ = plotting.norm(runs, entry="1-0", split=", ")
    assert [axes.get_title() for axes in figure.axes] == ["depth 2", "depth 3"]
    labels = [[line.get_label() for line in axes.lines if axes.lines] for axes in figure.axes]
    assert labels == [["x", "y, z", "_child2", "lower bound"], ["x", "_child1", "lower bound"]]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["x", "y, z", "lower bound"]
    assert figure.axes[0].get_ylabel() == "|entry (1, 0)|"
    with pytest.raises(ValueError, match=r"no run follows '1-1' \(did you mean '1-0'\?\)"):
        plotting.value(runs, entry="1-1")


def test_dynamics_draws_the_finished_runs_and_reads_them_off(tmp_path: Path) -> None:
    folder = make_runs(tmp_path, a=PROBLEM, b=PROBLEM)
    figure, numbers = plotting.dynamics(read_runs([folder]))
    assert [axes.get_title() for axes in figure.axes[:2]] == ["a", "b"]
    assert figure.get_size_inches()[0] == 3.35
    found = numbers.set_index(["run", "quantity"])["value"]
    assert (found["b", "component/1"], found["b", "component/1 at half"]) == (5, 3)
    (folder / "b" / "summary.json").unlink()
    _, numbers = plotting.components(read_runs([folder]))
    assert set(numbers["run"]) == {"a"}
    with pytest.raises(ValueError, match="no finished recovery runs"):
        plotting.dynamics(read_runs([folder / "b"]))
    with pytest.raises(ValueError, match="--top must be at least 1, got 0"):
        plotting.dynamics(read_runs([folder]), top=0)


def test_number_of_components_counts_what_is_not_small_compared_with_the_largest() -> None:
    rows = pd.DataFrame([{"bond 1/1": 1.0, "bond 1/2": 0.02, "bond 1/3": 0.005, "bond 2/1": 7.0}, {"bond 2/1": 1.0}])
    assert number_of_components(rows).tolist() == [1.5, 1]
    assert number_of_components(CP, threshold=0.3).tolist() == [1, 1]
    assert math.isnan(number_of_components(pd.DataFrame([{"train/loss": 1.0}])).item())


def test_curve_summary() -> None:
    # the loss falls by e every iteration, the entry is the root of 1 / (2 loss), a component comes at iteration 4
    history = frame(
        [
            {
                "iteration": i,
                "train/loss": math.exp(-i),
                "entry/0-0": -math.sqrt(math.exp(i) / 2),
                "determinant": -1e-9,
                "component/1": 2.0 * (i >= 1),
                "component/2": 1.0 * (i >= 4),
                "component/3": 1e-4,
                "reconstruction_error": 0.7**i + 0.005 * (i == 12),
            }
            for i in range(13)
        ]
    )
    found = curve_summary(history).set_index("quantity")["value"]
    assert found["component/1"] == 2
    assert found["component/1 at half"] == 1
    assert found["component/2 at half"] == 4
    assert "component/3" not in found
    assert found["error below 0.5 at"] == 2
    assert found["error below 0.1 at"] == 7
    assert "error below 0.01 at" not in found
    assert found["least error"] == pytest.approx(0.7**12 + 0.005)
    for loss in (1e-1, 1e-2, 1e-3, 1e-4):
        assert found[f"|entry/0-0| at loss {loss:g}"] == pytest.approx(math.sqrt(1 / (2 * loss)), rel=1e-9)
        assert found[f"sign of the determinant at loss {loss:g}"] == -1


def test_runs_without_a_time_are_drawn_against_the_iteration() -> None:
    figure = component_curves({"flow": TREE, "descent": CP}, x="time")
    assert [axes.get_xlabel() for axes in figure.axes][:2] == ["time", "iteration"]
