"""The figure command: columns, cells, statistics, tables and figures."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lightning_locality.bounds import lower_bounds
from lightning_locality.cli import main
from lightning_locality.plotting.cells import Axes, cells
from lightning_locality.plotting.chart import Chart
from lightning_locality.plotting.drawn import draw_chart
from lightning_locality.plotting.growth import fits, read_curves, write_curves
from lightning_locality.plotting.options import parsed
from lightning_locality.plotting.run_table import RunTable, ordered
from lightning_locality.plotting.style import line_style
from lightning_locality.sweep_figure import SweepFigure
from lightning_locality.sweep_plan import Run

STATISTICS = ["mean", "std", "sem", "median", "least", "greatest", "n", "runs"]
DISTANCES, WEIGHTS, SEEDS = (0, 40, 160), (0, 0.1, 10), (0, 1, 2, 3)


def accuracy(distance: int, weight: float, seed: int) -> float:
    return 0.5 + 0.001 * (160 - distance) * (1 + weight) / 11 + 0.01 * seed**2 * (1 + distance / 160)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def runs() -> list[dict[str, Any]]:
    """A sweep in an unhelpful order; one run has failed, one has diverged."""
    rows = []
    for seed in SEEDS:
        for weight in reversed(WEIGHTS):
            for distance in reversed(DISTANCES):
                if (distance, weight, seed) == (160, 0.1, 3):
                    continue
                value = math.nan if (distance, weight, seed) == (0, 10, 1) else accuracy(distance, weight, seed)
                point = {"variant": "run", "data.distance": distance, "model.weight": weight, "seed_everything": seed}
                rows.append({**point, "epochs": 3, "seconds": 1.5, "train/accuracy": 1.0, "test/accuracy": value})
    return rows


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    write_csv(tmp_path / "sweep" / "results.csv", runs())
    return tmp_path / "sweep"


def fails(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["figure", *args])
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_table_is_exact_and_runs_are_counted(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["figure", "accuracy", str(sweep)])
    rows = read_csv(sweep / "test_accuracy_against_distance.csv")
    assert list(rows[0]) == ["model.weight", "data.distance", *STATISTICS]
    places = [(float(row["model.weight"]), int(row["data.distance"])) for row in rows]
    assert places == [(weight, distance) for weight in WEIGHTS for distance in DISTANCES]
    for row in rows:
        weight, distance = float(row["model.weight"]), int(row["data.distance"])
        lost = {(0.1, 160): 3, (10, 0): 1}.get((weight, distance))
        values = [accuracy(distance, weight, seed) for seed in SEEDS if seed != lost]
        wanted = {
            "mean": statistics.fmean(values),
            "std": statistics.pstdev(values),
            "sem": statistics.stdev(values) / math.sqrt(len(values)),
            "median": statistics.median(values),
            "least": min(values),
            "greatest": max(values),
            "n": len(values),
            "runs": 4,
        }
        for name, value in wanted.items():
            assert float(row[name]) == pytest.approx(value, rel=1e-12), (row, name)
    printed = capsys.readouterr().out
    assert printed.count("3 of 4") == 2
    assert printed.count("4 of 4") == 7
    assert "averaged over seed_everything (0, 1, 2, 3)" in printed


def test_the_figure_holds_the_table(tmp_path: Path) -> None:
    rows = [{"x": x, "y": v, "g": g} for g in ("b", "a") for x, v in ((10, 1.0), (2, 3.0), (2, 5.0))]
    table = RunTable.read([write_csv(tmp_path / "r.csv", rows)])
    axes = Axes("x", "y", ("g",))
    figure = Chart(axes, scale=100.0, level=(0.5, "chance")).draw(cells(table, axes))
    (panel,) = figure.axes
    first, second, level = panel.lines
    # groups in order of appearance, x by size
    assert first.get_xydata().tolist() == second.get_xydata().tolist() == [[2, 400], [10, 100]]
    assert level.get_ydata() == [50, 50]
    (bar, *_) = (c.get_segments() for c in panel.collections)
    assert [segment.tolist() for segment in bar] == [[[2, 300], [2, 500]]]  # a single run has no bar
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["b", "a", "chance"]
    assert figure.legends[0].get_title().get_text() == "g"
    assert figure.get_size_inches()[0] == 3.35


@pytest.mark.parametrize(
    ("spread", "low", "high"),
    [
        ("range", 0.0, 9.0),
        ("quartiles", 1.5, 6.0),
        ("std", 4 - 11.5**0.5, 4 + 11.5**0.5),
        ("sem", 4 - (46 / 12) ** 0.5, 4 + (46 / 12) ** 0.5),
    ],
)
def test_spreads(spread: Any, low: float, high: float, tmp_path: Path) -> None:
    table = RunTable.read([write_csv(tmp_path / "r.csv", [{"x": 1, "y": v} for v in (0.0, 2.0, 5.0, 9.0)])])
    axes = Axes("x", "y")
    figure = Chart(axes, spread=spread).draw(cells(table, axes))
    ((segment,),) = (c.get_segments() for c in figure.axes[0].collections)
    np.testing.assert_allclose(segment, [[1, low], [1, high]])


def test_values_sort_by_kind_and_size_and_texts_as_in_the_sweep() -> None:
    assert ordered([10, "z", 9.5, True, "a", None, False, 9.5, "z", -1]) == [False, True, -1, 9.5, 10, "z", "a", None]


def test_a_table_saved_by_a_spreadsheet(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("x,loß\n1,2\n", encoding="utf-8-sig")
    assert RunTable.read([tmp_path / "r.csv"]).columns == ("x", "loß")


def test_columns_by_their_last_part(sweep: Path) -> None:
    table = RunTable.read([sweep])
    assert table.column("distance") == table.column("data.distance") == "data.distance"
    with pytest.raises(ValueError, match=r"--y: 'accuracy' may be train/accuracy or test/accuracy; give the full name"):
        table.column("accuracy", "--y")
    with pytest.raises(ValueError, match=r"no column 'distnce' \(did you mean 'distance'\?\); there are variant, data"):
        table.column("distnce")


def test_panels_where_and_bools(tmp_path: Path) -> None:
    rows = [
        {"lr": lr, "augment": a, "model": m, "seconds": 1.0, "loss": lr + 10 * a + (m == "b")}
        for a in (True, False)
        for m in ("b", "a")
        for lr in (0.1, 1.0)
    ]
    path = write_csv(tmp_path / "r.csv", rows)
    args = ["xy", str(path), "--x", "augment", "--y", "loss", "--panel", "model", "--group", "lr", "--out"]
    main(["figure", *args, str(tmp_path / "all.pdf"), "--log", "y"])
    found = [[row[k] for k in ("model", "lr", "augment", "mean", "n")] for row in read_csv(tmp_path / "all.csv")]
    assert found[:4] == [
        ["b", "0.1", "false", "1.1", "1"],
        ["b", "0.1", "true", "11.1", "1"],
        ["b", "1.0", "false", "2.0", "1"],
        ["b", "1.0", "true", "12.0", "1"],
    ]
    assert [row[0] for row in found] == ["b"] * 4 + ["a"] * 4
    main(["figure", *args, str(tmp_path / "some"), "--where", "model=a", "lr=1.00", "augment=True"])
    assert [(r["model"], r["mean"], r["std"]) for r in read_csv(tmp_path / "some.csv")] == [("a", "11.0", "")]
    main(["figure", *args, str(tmp_path / "both"), "--where", "lr=1", "lr=0.1", "model=a"])
    assert len(read_csv(tmp_path / "both.csv")) == 4


def test_several_inputs_are_joined_and_told_apart(sweep: Path, tmp_path: Path) -> None:
    other = write_csv(tmp_path / "other" / "results.csv", [{**row, "test/accuracy": 0.75} for row in runs()])
    args = ["figure", "accuracy", str(sweep), str(other), str(other.parent), "--where", "weight=0", "distance=40"]
    main([*args, "--group", "input", "--out", str(tmp_path / "both")])
    found = {row["input"]: row for row in read_csv(tmp_path / "both.csv")}
    assert found.keys() == {"sweep", "other"}
    assert (float(found["other"]["mean"]), found["other"]["n"]) == (0.75, "4")


def test_what_was_averaged_names_the_inputs(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_csv(tmp_path / "weight_0.5" / "results.csv", runs()).parent
    main(["figure", "accuracy", str(sweep), str(other), "--out", str(tmp_path / "both")])
    assert "averaged over input (sweep, weight_0.5), seed_everything (0, 1, 2, 3)" in capsys.readouterr().out
    fails(["accuracy", str(sweep), str(other), "--over", "seed_everything"], "input varies as well", capsys)


@pytest.mark.parametrize(("factor", "label"), [(1, "test accuracy (%)"), (100, "test accuracy")])
def test_per_cent_is_not_taken_for_a_share(factor: int, label: str, tmp_path: Path) -> None:
    rows = [{"x": x, "test/accuracy": factor * y} for x, y in ((0, 0.75), (1, 1.0), (2, math.nan))]
    table = RunTable.read([write_csv(tmp_path / "r.csv", rows)])
    options = parsed(["xy", ".", "--x", "x", "--y", "accuracy"])
    (panel,) = draw_chart(options, table).figure.axes
    assert panel.lines[0].get_xydata().tolist() == [[0, 75], [1, 100]]
    assert panel.get_ylabel() == label


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may read everything")
def test_a_neighbour_that_may_not_be_read_does_no_harm(sweep: Path) -> None:
    (sweep / "private").mkdir(mode=0)
    assert len(RunTable.read([sweep]).rows) == len(runs())


def test_values_that_are_none_are_one_group(tmp_path: Path) -> None:
    for seed in (0, 1):
        (tmp_path / f"v-clip=None-seed={seed}").mkdir()
        (tmp_path / f"v-clip=None-seed={seed}" / "config.yaml").write_text("{}")
    point = {"run": "v-clip=None-seed=0", "variant": "v", "clip": "", "seed": 0, "seconds": 3, "y": 1.0}
    write_csv(tmp_path / "results.csv", [point, {**point, "run": "v-clip=0.5-seed=0", "clip": 0.5}])
    table = RunTable.read([tmp_path])
    found = [(cell.group, cell.values, cell.runs) for cell in cells(table, Axes("variant", "y", ("clip",)))]
    assert found == [((0.5,), (1.0,), 2), ((None,), (1.0,), 2)]
    assert [row.finished for row in table.where(["clip=none"]).rows] == [True, False]


def test_unfinished_runs_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sweep that was killed: no results.csv, some runs with a summary, one without."""
    for distance in (0, 80):
        for seed in (0, 1):
            run = tmp_path / f"far__plain-distance={distance}-weight=1e-05-seed={seed}"
            run.mkdir()
            (run / "metrics.csv").write_text("epoch,test/accuracy\n0,0.1\n")
            if (distance, seed) != (80, 1):
                (run / "summary.json").write_text(
                    json.dumps({"metrics": {"test/accuracy": 0.5 + seed / 10}, "epochs": 1})
                )
    main(["figure", "accuracy", str(tmp_path), "--group", "variant", "weight", "--out", str(tmp_path / "f")])
    rows = read_csv(tmp_path / "f.csv")
    found = [(r["variant"], float(r["weight"]), r["distance"], r["mean"], r["n"], r["runs"]) for r in rows]
    assert found == [("far__plain", 1e-5, "0", "0.55", "2", "2"), ("far__plain", 1e-5, "80", "0.5", "1", "2")]
    assert "1 run not finished and left out: far__plain-distance=80-weight=1e-05-seed=1" in capsys.readouterr().out


def test_a_results_file_knows_its_folders_and_the_unfinished(tmp_path: Path) -> None:
    for name in ("a_b-size=2-seed=0", "a_b-size=2-seed=1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("{}")
    # as the YAML of the sweep had it: a text that is a number
    write_csv(tmp_path / "results.csv", [{"variant": "a b", "size": "2", "seed": 0, "seconds": 3, "y": 1.0}])
    done, other = RunTable.read([tmp_path]).rows
    assert done.folder == tmp_path / "a_b-size=2-seed=0"
    assert done.finished
    assert (other.values, other.finished) == ({"variant": "a b", "size": 2, "seed": 1}, False)
    # a column of names tells it directly, and is nothing that was varied
    named = {"run": "a_b-size=2-seed=0", "variant": "x", "seed": 0, "seconds": 3, "y": 1.0}
    write_csv(tmp_path / "results.csv", [named])
    table = RunTable.read([tmp_path])
    assert table.rows[0].folder == tmp_path / "a_b-size=2-seed=0"
    assert table.varied == ("variant", "seed")


def test_default_groups_are_weight_and_variant_unless_one_tells_the_other(sweep: Path, tmp_path: Path) -> None:
    both = [{**row, "variant": model} for row in runs() for model in ("small", "large")]
    main(["figure", "accuracy", str(write_csv(tmp_path / "both.csv", both)), "--out", str(tmp_path / "b")])
    assert list(read_csv(tmp_path / "b.csv")[0])[:3] == ["variant", "model.weight", "data.distance"]
    same = [{**row, "variant": "plain" if row["model.weight"] == 0 else f"R {row['model.weight']}"} for row in runs()]
    main(["figure", "accuracy", str(write_csv(tmp_path / "same.csv", same)), "--out", str(tmp_path / "s")])
    assert list(read_csv(tmp_path / "s.csv")[0])[:2] == ["model.weight", "data.distance"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["accuracy", "SWEEP/nothing"], "there is no file or folder .*nothing"),
        (["accuracy", "SWEEP/.."], "sweep/.. has neither a results.csv nor folders of runs"),
        (["accuracy", "SWEEP", "--x", "depth"], "--x: there is no column 'depth'; there are variant, data.distance"),
        (["accuracy", "SWEEP", "--y", "variant"], "--y: variant is not a number: 'run'"),
        (["accuracy", "SWEEP", "--where", "distance=41"], "no run is left; data.distance is 0, 40, 160"),
        (["accuracy", "SWEEP", "--where", "distance"], "expected COLUMN=VALUE, got 'distance'"),
        (["accuracy", "SWEEP", "--group", "distance"], "data.distance is asked for twice"),
        (["accuracy", "SWEEP", "--log", "x"], "data.distance has 0, which has no logarithm"),
        (["accuracy", "SWEEP", "--labels", "foo=bar"], "--labels: 'foo' is not in the figure; there are"),
        (["accuracy", "SWEEP", "--out", "SWEEP/results"], "would overwrite .*results.csv"),
        (["accuracy", "SWEEP", "--group", "variant", "--over", "seed_everything"], "model.weight varies as well"),
        (["accuracy", "SWEEP", "--width", "page"], "invalid choice: 'page'"),
        (["xy", "SWEEP", "--x", "distance"], "required: --y"),
        (["dynamics", "SWEEP"], "no finished recovery runs with a metrics.csv"),
        (["norm", "SWEEP"], "no finished recovery runs with a metrics.csv"),
        (["rank", "SWEEP"], "no column 'rank'"),
        (["growth", "SWEEP"], "growth_exponents.py --out .*sweep"),
        (["bars", "SWEEP"], "invalid choice: 'bars'"),
    ],
)
def test_wrong_input(sweep: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = (sweep / "results.csv").read_bytes()
    fails([arg.replace("SWEEP", str(sweep)) for arg in args], message, capsys)
    assert (sweep / "results.csv").read_bytes() == before
    assert [path.name for path in sweep.iterdir()] == ["results.csv"]


def test_a_csv_of_somebody_else_stays(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.csv").write_text("a,b\n1,2\n")
    fails(["accuracy", str(sweep), "--out", str(tmp_path / "mine")], "would overwrite", capsys)
    assert (tmp_path / "mine.csv").read_text() == "a,b\n1,2\n"
    for _ in range(2):  # its own may be written again
        main(["figure", "accuracy", str(sweep), "--out", str(tmp_path / "weight_0.1")])
    assert {path.suffix for path in tmp_path.glob("weight_0.1.*")} == {".csv", ".pdf", ".png"}


@pytest.mark.parametrize("groups", [1, 2, 5, 8])
@pytest.mark.parametrize("width", [3.35, 6.9])
def test_everything_fits_and_can_be_read(groups: int, width: float, tmp_path: Path) -> None:
    rows = [
        {"m": f"a network of kind {g}", "x": x, "y": g + x, "p": p}
        for g in range(groups)
        for x in (1, 2)
        for p in (0, 1)
    ]
    table = RunTable.read([write_csv(tmp_path / "r.csv", rows)])
    axes = Axes("x", "y", ("m",), "p")
    figure = Chart(axes, width=width).draw(cells(table, axes))
    figure.savefig(tmp_path / "f.png")
    renderer = figure.canvas.get_renderer()
    (legend,) = figure.legends
    box = legend.get_window_extent(renderer)
    assert figure.get_size_inches()[0] == width
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    for panel in figure.axes:
        inside = panel.get_tightbbox(renderer)
        assert inside.y0 >= box.y1 - 1, "the legend lies over a panel"
        assert inside.height > 0.9 * figure.dpi
        texts = [panel.xaxis.label, panel.yaxis.label, panel.title, *panel.get_xticklabels(), *panel.get_yticklabels()]
        assert all(text.get_fontsize() >= 7 for text in [*texts, *legend.get_texts()])
    left, right = (panel.title.get_window_extent(renderer) for panel in figure.axes)
    assert left.x1 < right.x0
    styles = {tuple(map(str, line_style(number).values())) for number in range(56)}
    assert len(styles) == 56


@pytest.mark.parametrize(("number", "angle"), [(2, 0.0), (6, 30.0), (15, 90.0)])
def test_names_along_the_axis_can_be_read(number: int, angle: float, tmp_path: Path) -> None:
    rows = [{"m": f"remedy number {m}", "y": float(m)} for m in range(number)]
    table = RunTable.read([write_csv(tmp_path / "r.csv", rows)])
    axes = Axes("m", "y")
    figure = Chart(axes, width=3.35).draw(cells(table, axes))
    figure.savefig(tmp_path / "f.png")
    names = figure.axes[0].get_xticklabels()
    assert [name.get_text() for name in names] == [row["m"] for row in rows]
    assert {name.get_rotation() for name in names} == {angle}
    # lines of text at an angle stand sin(angle) of their places apart
    places = [name.get_transform().transform(name.get_position())[0] for name in names]
    apart = min(b - a for a, b in pairwise(places)) * (math.sin(math.radians(angle)) if angle else 1.0)
    assert apart >= (names[0].get_fontsize() / 72 * figure.dpi if angle else names[0].get_window_extent().width)
    assert figure.axes[0].get_window_extent().height > 0.9 * figure.dpi


def test_texts_along_the_axis_are_not_joined(tmp_path: Path) -> None:
    rows = [{"m": m, "y": y} for m, y in (("second", 2.0), ("first", 1.0))]
    table = RunTable.read([write_csv(tmp_path / "r.csv", rows)])
    axes = Axes("m", "y")
    (panel,) = Chart(axes).draw(cells(table, axes)).axes
    assert panel.lines[0].get_xydata().tolist() == [[0, 2], [1, 1]]
    assert panel.lines[0].get_linestyle() == "None"
    assert [text.get_text() for text in panel.get_xticklabels()] == ["second", "first"]


def test_points_are_not_joined(tmp_path: Path) -> None:
    rows = [{"x": x, "y": x * x} for x in (1.0, 2.0, 3.0)]
    write_csv(tmp_path / "r.csv", rows)
    look = []
    for option in ([], ["--points"]):
        options = parsed(["xy", str(tmp_path / "r.csv"), "--x", "x", "--y", "y", *option])
        (panel,) = draw_chart(options, RunTable.read(options.inputs)).figure.axes
        look.append((panel.lines[0].get_linestyle(), panel.lines[0].get_xydata().tolist()))
    assert look == [("-", [[1, 1], [2, 4], [3, 9]]), ("None", [[1, 1], [2, 4], [3, 9]])]


@pytest.mark.parametrize(
    ("places", "log", "names"),
    [
        ((0, 40, 160), "none", ["0", "40", "160"]),
        ((0.001, 0.1, 1), "x", ["0.001", "0.1", "1"]),
        (tuple(range(50, 511, 46)), "x", ["50", "100", "200", "500"]),
    ],
)
def test_few_places_are_named_themselves(places: tuple[float, ...], log: Any, names: list[str], tmp_path: Path) -> None:
    table = RunTable.read([write_csv(tmp_path / "r.csv", [{"x": x, "y": 1.0} for x in places])])
    axes = Axes("x", "y")
    figure = Chart(axes, log=log).draw(cells(table, axes))
    figure.savefig(tmp_path / "f.png")
    (panel,) = figure.axes
    low, high = panel.get_xlim()
    shown = [t.get_text() for t in panel.get_xticklabels() if low <= t.get_position()[0] <= high]
    assert shown == names
    assert not any(text.get_text() for text in panel.get_xticklabels(minor=True))


def test_fonts_are_embedded_as_true_type(sweep: Path) -> None:
    main(["figure", "accuracy", str(sweep), "--out", str(sweep / "f"), "--width", "text", "--title", "A title"])
    pdf = (sweep / "f.pdf").read_bytes()
    assert b"/FontFile2" in pdf
    assert b"/Type3" not in pdf
    (box,) = set(re.findall(rb"/MediaBox \[ ?0 0 ([\d.]+)", pdf))
    assert float(box) == pytest.approx(6.9 * 72, abs=0.01)


def recovery_sweep(folder: Path) -> Path:
    problem = {"rows": 2, "cols": 2, "z": 1.0, "z_prime": 1.0, "eps": 0.0}
    rows = []
    for variant, factor in (("depth 2", 1.0), ("depth 3", 2.0)):
        run = folder / variant.replace(" ", "_")
        measured = [
            {
                "iteration": i,
                "train/loss": 10.0**-i,
                "component/1": factor * i,
                "reconstruction_error": 1 / (1 + i),
                "entry/0-0": -factor * 2**i,
            }
            for i in range(5)
        ]
        write_csv(run / "metrics.csv", measured)
        (run / "config.yaml").write_text(yaml.safe_dump({"data": {"init_args": problem}}))
        (run / "summary.json").write_text("{}")
        rows.append({"variant": variant, "epochs": 1, "iterations": 4, "seconds": 1.0, **measured[-1]})
    write_csv(folder / "results.csv", rows)
    return folder


def test_dynamics_draws_the_runs_and_reads_them_off(tmp_path: Path) -> None:
    folder = recovery_sweep(tmp_path / "r")
    main(["figure", "dynamics", str(folder)])
    found = {(row["run"], row["quantity"]): float(row["value"]) for row in read_csv(folder / "dynamics.csv")}
    assert found["depth 3", "component/1"] == 8
    assert found["depth 3", "component/1 at half"] == 3
    assert found["depth 2", "error below 0.5 at"] == 2
    assert found["depth 2", "last error"] == 0.2
    main(["figure", "dynamics", str(folder / "depth_2"), "--out", str(tmp_path / "one")])  # one run
    assert {row["run"] for row in read_csv(tmp_path / "one.csv")} == {"depth_2"}


def test_dynamics_leaves_unfinished_runs_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = recovery_sweep(tmp_path / "r")
    (folder / "depth_3" / "summary.json").unlink()
    (folder / "results.csv").unlink()
    main(["figure", "dynamics", str(folder)])
    assert {row["run"] for row in read_csv(folder / "dynamics.csv")} == {"depth_2"}
    assert "1 run not finished and left out: depth_3" in capsys.readouterr().out
    fails(["dynamics", str(folder / "depth_3")], "no finished recovery runs", capsys)


def test_a_label_of_several_problems_has_no_bound(tmp_path: Path) -> None:
    problem = {"rows": 2, "cols": 2, "z": 1.0, "z_prime": 1.0, "eps": 0.0}
    for name, z in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump({"data": {"init_args": {**problem, "z": z}}}))
    (tmp_path / "d").mkdir()
    folders = [tmp_path / name for name in "abcd"]
    bounds = lambda *labels: list(lower_bounds(dict(zip(folders, labels, strict=False))))
    assert bounds("one", "two") == ["lower bound"]
    assert bounds("one", "one", "two") == ["one", "two"]
    assert bounds("one", "two", "two") == ["one"]
    assert bounds("one", "two", "three", "none") == ["one", "two", "three"]


def test_norm_draws_the_entry_with_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = recovery_sweep(tmp_path / "r")
    drawn = []
    monkeypatch.setattr("lightning_locality.plotting.command.save_figure", lambda figure, stem: drawn.append(figure))
    main(["figure", "norm", str(folder), "--where", "variant=depth 3"])
    (axes,) = drawn[0].axes
    entry, bound = axes.lines
    assert entry.get_xydata().tolist() == [[10.0**-i, 2.0 * 2**i] for i in range(5)]
    loss, value = bound.get_xdata()[0], bound.get_ydata()[0]
    q = math.sqrt(2 * loss)
    assert value == pytest.approx((1 - q) ** 2 / q, rel=1e-12)
    found = {row["quantity"]: float(row["value"]) for row in read_csv(folder / "norm.csv")}
    assert found["|entry/0-0| at loss 0.01"] == pytest.approx(8, rel=1e-12)


def test_rank_draws_both_errors(tmp_path: Path) -> None:
    rows = [
        {"variant": v, "source": s, "rank": r, "seed": k, "seconds": 1, "train/loss": r + k, "test/loss": 2 * r + k}
        for s in ("mnist", "digits")
        for v in ("original", "random labels")
        for r in (1, 5)
        for k in (0, 2)
    ]
    main(["figure", "rank", str(write_csv(tmp_path / "results.csv", rows))])
    found = read_csv(tmp_path / "rank.csv")
    assert len(found) == 2 * 2 * 2 * 2
    for row in found:
        factor = {"train/loss": 1, "test/loss": 2}[row["quantity"]]
        assert float(row["mean"]) == factor * int(row["rank"]) + 1
        assert (float(row["std"]), row["n"], row["runs"]) == (1.0, "2", "2")


def test_growth_is_drawn_from_the_curves(tmp_path: Path) -> None:
    sizes = np.geomspace(0.01, 1, 12)
    laws = {(2, 0, "component norm"): 1.0, (3, 1, "component norm"): 5 / 3, (3, 1, "norm of the vectors"): 7 / 3}
    curves: Any = {case: ((sizes, sizes**p), (sizes, 2 * sizes**p)) for case, p in laws.items()}
    write_curves(curves, tmp_path / "growth_curves.csv")
    assert fits(read_curves(tmp_path / "growth_curves.csv")) == fits(curves)
    main(["figure", "growth", str(tmp_path)])
    for row in read_csv(tmp_path / "growth.csv"):
        exponent = laws[int(row["order"]), int(row["matrices"]), row["quantity"]]
        assert float(row["predicted"]) == pytest.approx(exponent, rel=1e-14)
        assert float(row["fitted"]) == pytest.approx(exponent, rel=1e-10)
    assert b"/FontFile2" in (tmp_path / "growth.pdf").read_bytes()
    with pytest.raises(ValueError, match="holds no growth curves"):
        read_curves(tmp_path / "growth.csv")


def test_a_sweep_draws_the_same_chart(tmp_path: Path) -> None:
    plan = [
        Run("v", {"distance": d, "weight": w, "seed": s}, (), tmp_path / f"{d}{w}{s}")
        for d in (0, 80)
        for w in (0, 1)
        for s in (0, 1)
    ]
    figure = SweepFigure.read(
        {"kind": "accuracy", "x": "distance", "group": ["weight"], "labels": {"weight": "λ"}}, "here"
    )
    assert figure.save(plan, tmp_path) is None
    for run in plan[:-1]:
        run.folder.mkdir()
        (run.folder / "summary.json").write_text(
            json.dumps({"metrics": {"test/accuracy": 0.5 + 0.1 * run.point["seed"]}})
        )
    assert figure.save(plan, tmp_path) == tmp_path / "accuracy.png"
    found = [
        (r["weight"], r["distance"], float(r["mean"]), r["n"], r["runs"]) for r in read_csv(tmp_path / "accuracy.csv")
    ]
    assert found == [
        ("0", "0", 0.55, "2", "2"),
        ("0", "80", 0.55, "2", "2"),
        ("1", "0", 0.55, "2", "2"),
        ("1", "80", 0.5, "1", "2"),
    ]
    (tmp_path / "000" / "summary.json").write_text(json.dumps({"metrics": {"test/accuracy": 0.5}, "seconds": 7}))
    times = SweepFigure.read({"kind": "xy", "x": "distance", "y": "seconds"}, "here")
    assert times.save(plan[:1], tmp_path)
    assert [float(row["mean"]) for row in read_csv(tmp_path / "xy.csv")] == [7]
    with pytest.raises(ValueError, match="here: figure 'xy' cannot be drawn"):
        SweepFigure.read({"kind": "xy", "x": "distance"}, "here")


def test_the_command_needs_neither_torch_nor_lightning(sweep: Path) -> None:
    code = (
        f"import sys, lightning_locality.cli as c; c.main(['figure', 'accuracy', {str(sweep)!r}]); "
        "heavy = {'torch', 'pytorch_lightning', 'tensorly'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
