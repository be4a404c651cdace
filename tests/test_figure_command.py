"""The figure command and the figure of a sweep: columns, statistics, tables and pictures."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_locality import plotting
from lightning_locality.cli import main
from lightning_locality.plotting.command import check_figure, plot_sweep_figure
from lightning_locality.plotting.style import save_figure
from lightning_locality.results import read_runs

DISTANCES, WEIGHTS, SEEDS = (0, 40, 160), (0, 0.1, 10), (0, 1, 2, 3)
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that commands draw, kept instead of being written."""
    figures: list[Figure] = []
    monkeypatch.setattr("lightning_locality.plotting.command.save_figure", lambda figure, stem: figures.append(figure))
    return figures


def write_csv(path: Path, rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def table(path: Path, rows: Any) -> pd.DataFrame:
    return read_runs([write_csv(path / "r.csv", rows)])


def rows() -> pd.DataFrame:
    """A sweep in an unhelpful order; one run has failed, one has diverged."""
    points = [
        (d, w, s) for s in SEEDS for w in reversed(WEIGHTS) for d in reversed(DISTANCES) if (d, w, s) != (160, 0.1, 3)
    ]
    frame = pd.DataFrame(points, columns=["data.distance", "model.weight", "seed_everything"])
    frame.insert(0, "variant", "run")
    values = np.random.default_rng(0).uniform(0.5, 1, len(frame))
    values[points.index((0, 10, 1))] = math.nan
    return frame.assign(**{"epochs": 3, "seconds": 1.5, "train/accuracy": 1.0, "test/accuracy": values})


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "sweep" / "results.csv", rows()).parent


def lines(panel: Axes) -> list[Any]:
    """The lines without those that hold error bars."""
    return [line for line in panel.lines if not line.get_label().startswith("_")]


def fails(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["figure", *args])
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err, re.DOTALL)


def test_the_table_is_that_of_pandas_and_runs_are_counted(
    sweep: Path, drawn: list[Figure], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["figure", "accuracy", str(sweep), "--chance", "none"])
    found = pd.read_csv(sweep / "test_accuracy_against_distance.csv")
    assert list(found) == [
        *("model.weight", "data.distance", "mean", "std", "sem", "median", "least", "greatest", "n", "runs")
    ]
    places = found[["model.weight", "data.distance"]].to_numpy().tolist()
    assert places == [[weight, distance] for weight in WEIGHTS for distance in DISTANCES]
    groups = pd.read_csv(sweep / "results.csv").groupby(["model.weight", "data.distance"])["test/accuracy"]
    wanted = [groups.mean(), groups.std(ddof=0), groups.sem(), groups.median(), groups.min(), groups.max()]
    np.testing.assert_allclose(found.iloc[:, 2:8], np.array(wanted).T, rtol=1e-12)
    assert found["n"].tolist() == [4, 4, 4, 4, 4, 3, 3, 4, 4]
    assert set(found["runs"]) == {4}
    # the figure draws the same numbers
    (panel,) = drawn[0].axes
    for weight, line in zip(WEIGHTS, lines(panel), strict=True):
        own = found[found["model.weight"] == weight]
        np.testing.assert_allclose(line.get_xydata(), np.array([own["data.distance"], 100 * own["mean"]]).T)
    bars = [c.get_segments() for c in panel.collections]
    np.testing.assert_allclose(
        np.array(bars)[..., 1].reshape(-1, 2),
        100 * np.array([found["mean"] - found["std"], found["mean"] + found["std"]]).T,
    )
    printed = capsys.readouterr().out
    assert printed.count("3 of 4") == 2
    assert printed.count("4 of 4") == 7
    assert "averaged over seed_everything (0, 1, 2, 3)" in printed


def test_groups_levels_and_legend(tmp_path: Path) -> None:
    runs = table(tmp_path, [{"x": x, "accuracy": v, "g": g} for g in "ba" for x, v in ((10, 0.1), (2, 0.3), (2, 0.5))])
    figure, _ = plotting.accuracy(runs, x="x", y="accuracy", group="g")
    (panel,) = figure.axes
    first, second, level = lines(panel)
    # groups in order of appearance, x by size
    np.testing.assert_allclose([first.get_xydata(), second.get_xydata()], [[[2, 40], [10, 10]]] * 2)
    assert level.get_ydata() == [50, 50]
    for bars in panel.collections:  # a single run has none
        np.testing.assert_allclose([own for own in bars.get_segments() if len(own)], [[[2, 30], [2, 50]]])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["b", "a", "chance"]
    assert figure.legends[0].get_title().get_text() == "g"
    assert figure.get_size_inches()[0] == 3.35
    for chance in (None, "none"):
        (panel,) = plotting.accuracy(runs, x="x", y="accuracy", group=["g"], chance=chance)[0].axes
        assert len(lines(panel)) == 2


def test_panels_where_and_bools(tmp_path: Path) -> None:
    rows = [
        {"lr": lr, "augment": a, "model": m, "seconds": 1.0, "loss": lr + 10 * a + (m == "b")}
        for a in (True, False)
        for m in ("b", "a")
        for lr in (0.1, 1.5)
    ]
    path = write_csv(tmp_path / "r.csv", rows)
    args = ["xy", str(path), "--x", "augment", "--y", "loss", "--panel", "model", "--group", "lr", "--out"]
    main(["figure", *args, str(tmp_path / "all.pdf")])
    found = pd.read_csv(tmp_path / "all.csv")
    assert found.iloc[:4][["model", "lr", "augment", "mean", "n"]].to_numpy().tolist() == [
        ["b", 0.1, False, 1.1, 1],
        ["b", 0.1, True, 11.1, 1],
        ["b", 1.5, False, 2.5, 1],
        ["b", 1.5, True, 12.5, 1],
    ]
    assert found["model"].tolist() == ["b"] * 4 + ["a"] * 4
    main(["figure", *args, str(tmp_path / "some"), "--where", "model=a", "lr=1.50", "augment=True"])
    found = pd.read_csv(tmp_path / "some.csv")
    assert (found["model"].tolist(), found["mean"].tolist(), found["std"].isna().all()) == (["a"], [11.5], True)
    main(["figure", *args, str(tmp_path / "both"), "--where", "lr=1.5", "lr=0.1", "model=a"])
    assert len(pd.read_csv(tmp_path / "both.csv")) == 4


def test_several_inputs_are_joined_and_told_apart(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_csv(tmp_path / "other" / "results.csv", rows().assign(**{"test/accuracy": 0.75}))
    args = ["figure", "accuracy", str(sweep), str(other), str(other.parent), "--where", "weight=0", "distance=40"]
    main([*args, "--group", "input", "--out", str(tmp_path / "both")])
    found = pd.read_csv(tmp_path / "both.csv", index_col="input")
    assert set(found.index) == {"sweep", "other"}
    assert found.loc["other", ["mean", "n"]].tolist() == [0.75, 4]
    capsys.readouterr()
    main(["figure", "accuracy", str(sweep), str(other), "--out", str(tmp_path / "all")])
    assert "averaged over input (sweep, other), seed_everything (0, 1, 2, 3)" in capsys.readouterr().out
    fails(["accuracy", str(sweep), str(other), "--over", "seed_everything"], "input varies as well", capsys)


def test_settings_are_columns(tmp_path: Path) -> None:
    for distance in (0, 8):
        run = tmp_path / f"d{distance}"
        run.mkdir()
        (run / "config.yaml").write_text(yaml.safe_dump({"data": {"init_args": {"distance": distance}}}))
        (run / "summary.json").write_text(json.dumps({"metrics": {"test/accuracy": 0.5 + distance / 100}}))
    main(["figure", "xy", str(tmp_path), "--x", "data.distance", "--y", "accuracy", "--out", str(tmp_path / "f")])
    assert pd.read_csv(tmp_path / "f.csv")[["data.distance", "mean"]].to_numpy().tolist() == [[0, 0.5], [8, 0.58]]


def test_per_cent_is_not_taken_for_a_share(tmp_path: Path) -> None:
    for factor, label in ((1, "test accuracy (%)"), (100, "test accuracy")):
        own = [{"x": x, "test/accuracy": factor * y} for x, y in ((0, 0.75), (1, 1.0), (2, math.nan))]
        (panel,) = plotting.xy(table(tmp_path, own), "x", "accuracy")[0].axes
        assert panel.lines[0].get_xydata().tolist() == [[0, 75], [1, 100]]
        assert panel.get_ylabel() == label


def test_unfinished_runs_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sweep that was killed: no results.csv, some runs with a summary, one without."""
    for distance in (0, 80):
        for seed in (0, 1):
            run = tmp_path / f"far-{distance}-{seed}"
            run.mkdir()
            labels = {"variant": "far, plain", "distance": distance, "weight": 1e-5, "seed": seed}
            (run / "config.yaml").write_text(yaml.safe_dump({"labels": labels}))
            (run / "metrics.csv").write_text("epoch,test/accuracy\n0,0.1\n")
            if (distance, seed) != (80, 1):
                summary = {"metrics": {"test/accuracy": 0.5 + seed / 10}, "epochs": 1, "labels": labels}
                (run / "summary.json").write_text(json.dumps(summary))
    main(["figure", "accuracy", str(tmp_path), "--group", "variant", "weight", "--out", str(tmp_path / "f")])
    found = pd.read_csv(tmp_path / "f.csv")[["variant", "weight", "distance", "mean", "n", "runs"]]
    assert found.to_numpy().tolist() == [["far, plain", 1e-5, 0, 0.55, 2, 2], ["far, plain", 1e-5, 80, 0.5, 1, 2]]
    assert "1 run not finished and left out: far-80-1" in capsys.readouterr().out


def test_default_groups_are_weight_and_variant_unless_one_tells_the_other(tmp_path: Path) -> None:
    own = rows()
    both = table(tmp_path, pd.concat([own.assign(variant="small"), own.assign(variant="large")]))
    assert list(plotting.accuracy(both)[1])[:3] == ["variant", "model.weight", "data.distance"]
    same = table(tmp_path, own.assign(variant=own["model.weight"].map(lambda w: f"R {w}" if w else "plain")))
    assert list(plotting.accuracy(same)[1])[:2] == ["model.weight", "data.distance"]


def test_wrong_input(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (sweep / "results.csv").read_bytes()
    for args, message in (
        (["accuracy", "SWEEP/nothing"], "there is no file or folder .*nothing"),
        (["accuracy", "SWEEP/.."], "sweep/.. has neither a results.csv nor run directories"),
        (
            ["accuracy", "SWEEP", "--x", "depth"],
            "--x: there is no column 'depth'; there are run, variant, data.distance",
        ),
        (["accuracy", "SWEEP", "--x", "epoch"], "no run directory with accuracies by epoch; choose one of"),
        (["accuracy", "SWEEP", "--y", "variant"], "--y: variant is not a number: 'run'"),
        (["accuracy", "SWEEP", "--where", "distance=41"], "no run is left; data.distance is 0, 40, 160"),
        (["accuracy", "SWEEP", "--where", "distance"], "expected COLUMN=VALUE, got 'distance'"),
        (["accuracy", "SWEEP", "--group", "distance"], "data.distance is used twice"),
        (["accuracy", "SWEEP", "--log", "x"], "data.distance has 0, which has no logarithm"),
        (
            ["xy", "SWEEP", "--x", "variant", "--y", "seconds", "--log", "xy"],
            "variant has 'run', which has no logarithm",
        ),
        (["accuracy", "SWEEP", "--labels", "foo=bar"], "--labels: 'foo' is not in the figure; there are"),
        (["accuracy", "SWEEP", "--labels", "foo"], "--labels: expected NAME=TEXT, got 'foo'"),
        (["accuracy", "SWEEP", "--out", "SWEEP/results"], "would overwrite .*results.csv"),
        (["accuracy", "SWEEP", "--group", "variant", "--over", "seed_everything"], "model.weight varies as well"),
        (["accuracy", "SWEEP", "--width", "page"], "width.:.*page"),
        (["xy", "SWEEP", "--x", "distance"], "required: .*y"),
        (["dynamics", "SWEEP"], "no finished recovery runs with a metrics.csv"),
        (["norm", "SWEEP"], "no finished recovery runs with a metrics.csv"),
        (["rank", "SWEEP"], "no column 'rank'"),
        (["bars", "SWEEP"], "invalid choice: 'bars'"),
    ):
        fails([arg.replace("SWEEP", str(sweep)) for arg in args], message, capsys)
    assert (sweep / "results.csv").read_bytes() == before
    assert [path.name for path in sweep.iterdir()] == ["results.csv"]


def test_files(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.csv").write_text("a,b\n1,2\n")
    fails(["accuracy", str(sweep), "--out", str(tmp_path / "mine")], "would overwrite", capsys)
    assert (tmp_path / "mine.csv").read_text() == "a,b\n1,2\n"
    command = ["figure", "accuracy", str(sweep), "--out", str(tmp_path / "f_0.1"), "--width", "text"]
    main(command)
    monkeypatch.setattr("lightning_locality.plotting.command.save_figure", save_figure)
    main([*command, "--title", "A title"])  # its own may be written again
    assert {path.suffix for path in tmp_path.glob("f_0.1.*")} == {".csv", ".pdf", ".png"}
    pdf = (tmp_path / "f_0.1.pdf").read_bytes()
    assert b"/FontFile2" in pdf
    assert b"/Type3" not in pdf
    (box,) = set(re.findall(rb"/MediaBox \[ ?0 0 ([\d.]+)", pdf))
    assert float(box) == pytest.approx(6.9 * 72, abs=0.01)


@pytest.mark.parametrize(("groups", "width", "inches"), [(1, "column", 3.35), (8, "column", 3.35), (5, "text", 6.9)])
def test_everything_fits_and_can_be_read(groups: int, width: Any, inches: float, tmp_path: Path) -> None:
    own = [
        {"m": f"a network of kind {g}", "x": x, "y": g + x, "p": p}
        for g in range(groups)
        for x in (1, 2)
        for p in (0, 1)
    ]
    figure, _ = plotting.xy(table(tmp_path, own), "x", "y", group=["m"], panel="p", width=width)
    figure.draw_without_rendering()
    renderer = FigureCanvasAgg(figure).get_renderer()
    (legend,) = figure.legends
    box = legend.get_window_extent(renderer)
    assert figure.get_size_inches()[0] == inches
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    for panel in figure.axes:
        inside = panel.get_tightbbox(renderer)
        assert inside.y0 >= box.y1 - 1, "the legend lies over a panel"
        assert inside.height > 0.9 * figure.dpi
        texts = [panel.xaxis.label, panel.yaxis.label, panel.title, *panel.get_xticklabels(), *panel.get_yticklabels()]
        assert all(text.get_fontsize() >= 7 for text in [*texts, *legend.get_texts()])
    first, second = (panel.title.get_window_extent(renderer) for panel in figure.axes)
    assert not first.overlaps(second)


@pytest.mark.parametrize("number", [2, 15])
def test_names_can_be_read(number: int, tmp_path: Path) -> None:
    own = [{"m": f"a remedy that has a long name, {m}", "y": float(m)} for m in range(number)]
    figure, _ = plotting.xy(table(tmp_path, own), "m", "y")
    figure.draw_without_rendering()
    (panel,) = figure.axes
    names = panel.get_yticklabels()
    assert [name.get_text().replace("\n", " ") for name in names] == [row["m"] for row in own]
    boxes = [name.get_window_extent() for name in names]
    assert all(above.y0 > below.y1 for above, below in pairwise(boxes))
    assert all(box.x0 >= 0 for box in boxes)
    assert panel.get_window_extent().width > 0.3 * figure.bbox.width
    assert [[x for x, _ in line.get_xydata()] for line in panel.lines][:1] == [[row["y"] for row in own]]
    assert panel.lines[0].get_linestyle() == "None"


def test_the_mean_may_lie_outside_the_quartiles(tmp_path: Path) -> None:
    runs = table(tmp_path, [{"x": 1, "y": y} for y in (0.0, 0.0, 0.0, 0.0, 10.0)])
    (panel,) = plotting.xy(runs, "x", "y", spread="quartiles")[0].axes
    assert panel.lines[0].get_xydata().tolist() == [[1, 2]]
    assert panel.collections[0].get_segments()[0].tolist() == [[1, 0], [1, 0]]


def test_points_are_not_joined(tmp_path: Path) -> None:
    runs = table(tmp_path, [{"x": x, "y": x * x} for x in (1.0, 2.0, 3.0)])
    for points, style in ((False, "-"), (True, "None")):
        (panel,) = plotting.xy(runs, "x", "y", points=points)[0].axes
        assert panel.lines[0].get_linestyle() == style
        assert panel.lines[0].get_xydata().tolist() == [[1, 1], [2, 4], [3, 9]]


def test_few_places_are_named_themselves(tmp_path: Path) -> None:
    for places, log in (((0, 40, 160), "none"), ((0.001, 0.1, 1), "x")):
        runs = table(tmp_path, [{"x": x, "y": 1.0} for x in places])
        (panel,) = plotting.xy(runs, "x", "y", log=log)[0].axes
        assert [text.get_text() for text in panel.get_xticklabels()] == [f"{place:g}" for place in places]
        assert not any(text.get_text() for text in panel.get_xticklabels(minor=True))


def bands(panel: Any) -> set[tuple[float, float]]:
    return {tuple(v) for band in panel.collections for v in np.round(band.get_paths()[0].vertices, 12).tolist()}


def test_depth_draws_median_and_range(tmp_path: Path) -> None:
    own = [
        {"variant": "v", "depth": d, "effective rank/0": rank, "effective rank/1": rank + 2, "component/1": 1.0}
        for d, rank in ((2, 3.0), (1, 5.0), (1, 8.0))
    ]
    figure, numbers = plotting.depth(table(tmp_path, own))
    rank, count, error = figure.axes
    assert rank.lines[0].get_xydata().tolist() == [[1, 7.5], [2, 4]]
    assert bands(rank) >= {(1, 6), (1, 9)}
    assert count.lines[0].get_xydata().tolist() == [[1, 1], [2, 1]]
    assert not error.lines
    found = numbers[numbers["quantity"] == "effective rank"]
    assert found[["variant", "depth", "median", "least", "greatest"]].to_numpy().tolist() == [
        ["v", 1, 7.5, 6, 9],
        ["v", 2, 4, 4, 4],
    ]


def test_rank_scales_the_errors_and_draws_the_trivial_one(tmp_path: Path) -> None:
    own = [
        {"variant": v, "source": s, "rank": r, "seed": k, "seconds": 1, "train/loss": r + k, "test/loss": 2 * r + k}
        for s in ("mnist", "fashion_mnist")
        for v in ("original", "random labels")
        for r in (1, 5)
        for k in (0, 2)
    ]
    figure, numbers = plotting.rank(table(tmp_path, own))
    assert [axes.get_title() for axes in figure.axes] == ["mnist", "mnist", "fashion mnist", "fashion mnist"]
    train = figure.axes[0]
    original, labels, trivial = (line.get_xydata().tolist() for line in train.lines)
    assert original == labels == [[1, 0.5], [5, 1.5]]
    assert [y for _, y in trivial] == [0.09, 0.09]
    assert bands(train) >= {(1, 0.25), (1, 0.75)}
    assert (train.get_ylabel(), figure.axes[1].get_ylabel()) == ("training error", "test error")
    assert len(numbers) == 2 * 2 * 2 * 2
    for row in numbers.itertuples():  # not scaled
        assert row.mean == {"train/loss": 1, "test/loss": 2}[row.quantity] * row.rank + 1
        assert (row.std, row.n, row.runs) == (1.0, 2, 2)


def test_observations_draw_median_and_quartiles_and_ranks_if_there_are_any(tmp_path: Path) -> None:
    own = [{"variant": "v", "observations": 50, "reconstruction_error": e} for e in (1.0, 2.0, 3.0, 4.0, 10.0)]
    (error,) = plotting.observations(table(tmp_path, own))[0].axes
    assert error.lines[0].get_xydata().tolist() == [[50, 3]]
    assert bands(error) == {(50, 2), (50, 4)}
    with_rank = table(tmp_path, [{**row, "cp rank": 2} for row in own])
    assert plotting.observations(with_rank)[0].axes[1].lines[0].get_xydata().tolist() == [[50, 2]]
    with pytest.raises(ValueError, match="none of the runs has reconstruction_error"):
        plotting.observations(table(tmp_path, [{"variant": "v", "observations": 50}]))


def test_a_sweep_draws_the_same_chart(tmp_path: Path, drawn: list[Figure]) -> None:
    labels = {
        tmp_path / f"{d}{w}{s}": {"variant": "v", "distance": d, "weight": w, "seed": s}
        for d in (0, 80)
        for w in (0, 1)
        for s in (0, 1)
    }
    figure = {"kind": "accuracy", "x": "distance", "group": ["weight"], "labels": {"weight": "λ"}}
    check_figure(figure, ["variant", "distance", "weight", "seed"])
    assert plot_sweep_figure(figure, read_runs(list(labels), labels), tmp_path) is None
    for folder in list(labels)[:-1]:
        folder.mkdir()
        (folder / "metrics.csv").write_text("epoch,train/accuracy\n0,0.5\n1,0.75\n")
        accuracy = 0.5 + 0.1 * labels[folder]["seed"]
        (folder / "summary.json").write_text(json.dumps({"metrics": {"test/accuracy": accuracy}, "seconds": 7}))
    runs = read_runs(list(labels), labels)
    assert plot_sweep_figure(figure, runs, tmp_path) == tmp_path / "accuracy.png"
    found = pd.read_csv(tmp_path / "accuracy.csv")[["weight", "distance", "mean", "n", "runs"]]
    assert found.to_numpy().tolist() == [
        [0, 0, 0.55, 2, 2],
        [0, 80, 0.55, 2, 2],
        [1, 0, 0.55, 2, 2],
        [1, 80, 0.5, 1, 2],
    ]
    plot_sweep_figure({"kind": "xy", "x": "distance", "y": "seconds"}, runs, tmp_path)
    assert set(pd.read_csv(tmp_path / "xy.csv")["mean"]) == {7}
    # by default against the epoch, if there is no distance
    plain = {folder: {"variant": f"v{own['seed']}"} for folder, own in labels.items()}
    assert plot_sweep_figure(None, read_runs(list(plain), plain), tmp_path) == tmp_path / "accuracy.png"
    assert [len(axes.lines) for axes in drawn[-1].axes] == [7 + 1, 1]
    found = pd.read_csv(tmp_path / "accuracy.csv")
    assert list(found) == ["run", "variant", "epoch", "train/accuracy"]
    assert found["epoch"].tolist() == [1, 2] * 7


def test_a_sweep_of_runs_without_accuracies_has_no_default_figure(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for metric in ("train/loss", "test/accuracy"):  # without a metrics.csv, too, there are no accuracies by epoch
        (tmp_path / "a" / "summary.json").write_text(json.dumps({"metrics": {metric: 1.0}}))
        assert plot_sweep_figure(None, read_runs([tmp_path]), tmp_path) is None
    with pytest.raises(ValueError, match="no run directory with accuracies by epoch"):
        plot_sweep_figure({"kind": "accuracy"}, read_runs([tmp_path]), tmp_path)


def test_the_figure_of_a_sweep_is_checked_before_its_runs() -> None:
    columns = ["variant", "distance", "model.weight", "seed"]
    for figure in (
        None,
        {"kind": "accuracy", "x": "distance", "group": "weight", "chance": "none"},
        {"kind": "accuracy", "x": "epoch"},
        {"kind": "xy", "x": "train/accuracy", "y": "test/accuracy"},
        {"kind": "xy", "x": "seconds", "y": "reconstruction_error", "log": "xy", "over": ["seed"]},
        {"kind": "components", "top": 5, "groups": ["bond 1"]},
        {"kind": "value", "least": 9e-5, "split": ", "},
    ):
        check_figure(figure, columns)
    for figure, message in (
        ("components", "must be a mapping with a kind"),
        ({"kind": "component"}, r"unknown kind of figure 'component' \(did you mean 'components'\?\)"),
        ({"kind": "components", "group": ["a"]}, r"has no option 'group' \(did you mean 'groups'\?\)"),
        ({"kind": "accuracy", "top": 3}, "has no option 'top'"),
        (
            {"kind": "accuracy", "x": "distnce"},
            r"figure 'accuracy': x: there is no column 'distnce' \(did you mean 'dist",
        ),
        ({"kind": "xy", "x": "depth", "y": "test/accuracy"}, "there is no column 'depth'"),
        ({"kind": "xy", "x": "distance"}, "figure 'xy' cannot be drawn"),
        ({"kind": "depth", "group": "kind"}, "there is no column 'kind'"),
        ({"kind": "accuracy", "over": ["seeds"]}, "there is no column 'seeds'"),
        ({"kind": "accuracy", "log": "z"}, "figure 'accuracy' cannot be drawn"),
        ({"kind": "components", "top": "many"}, "figure 'components' cannot be drawn"),
    ):
        with pytest.raises(ValueError, match=message):
            check_figure(figure, columns)


def test_the_figures_of_all_sweeps_can_be_drawn() -> None:
    for path in sorted((ROOT / "configs" / "sweeps").glob("*.yaml")):
        content = yaml.safe_load(path.read_text())
        if "figure" in content:
            # the short names of the grid of this file, or those of its base
            names = {key.split(",")[0].split(".")[-1] for key in content.get("grid") or {}}
            check_figure(
                content["figure"],
                ["variant", *names, *("depth", "distance", "path_length", "weight", "rank", "observations")],
            )


def test_the_command_needs_neither_torch_nor_lightning() -> None:
    code = (
        "import sys, lightning_locality.cli, lightning_locality.plotting.command; "
        "heavy = {'torch', 'pytorch_lightning', 'tensorly'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
