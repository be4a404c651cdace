from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_locality.cli import main
from lightning_locality.old_results import Progress, collect, progress_table, result_table
from lightning_locality.plotting.style import read_metrics
from lightning_locality.run_job import prepared
from lightning_locality.sweep import Run, Sweep
from lightning_locality.sweep_figure import SweepFigure

CONFIGS = Path(__file__).parent.parent / "configs"
TINY = {
    "trainer.max_epochs": 1,
    "data.train": 32,
    "data.validation": 16,
    "data.test": 16,
    "data.batch_size": 16,
}


@pytest.fixture(autouse=True)
def single_precision() -> None:
    """As a user runs it."""
    torch.set_default_dtype(torch.float32)


def write(path: Path, **content: object) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_grid_is_the_product_with_variants_fastest(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("")
    (tmp_path / "b.yaml").write_text("")
    path = write(
        tmp_path / "grid.yaml",
        configs=["a.yaml"],
        set={"trainer.max_epochs": 2},
        variants={"plain": {"set": {"model.weight": 0}}, "with, term": {"configs": ["b.yaml"]}},
        grid={"seed_everything, data.seed": [0, 1], "data.distance": [8]},
    )
    plan = Sweep.read(path, tmp_path / "out")
    assert [run.variant for run in plan.runs] == ["plain", "with, term"] * 2
    assert [dict(run.point) for run in plan.runs[::2]] == [
        {"seed_everything": 0, "distance": 8},
        {"seed_everything": 1, "distance": 8},
    ]
    assert plan.runs[3].arguments == (
        "fit",
        f"--config={tmp_path / 'a.yaml'}",
        f"--config={tmp_path / 'b.yaml'}",
        "--trainer.max_epochs=2",
        "--seed_everything=1",
        "--data.seed=1",
        "--data.distance=8",
        f"--run_dir={tmp_path / 'out' / 'with__term-seed_everything=1-distance=8'}",
    )
    assert len({run.folder for run in plan.runs}) == 4


def test_base_is_overridden_entry_by_entry(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", out="x", parallel=3, grid={"seed_everything": [0]})
    plan = Sweep.read(write(tmp_path / "child.yaml", base="base.yaml", grid={"seed_everything": [1, 2]}))
    assert plan.folder == Path("x")
    assert plan.parallel == 3
    assert [run.point["seed_everything"] for run in plan.runs] == [1, 2]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"gird": {}}, "did you mean 'grid'"),
        ({"variants": {"a": {"sets": {}}}}, "did you mean 'set'"),
        ({"configs": ["none.yaml"]}, "does not exist"),
        ({"figure": "components"}, "must be a mapping with a kind"),
        ({"figure": {"kind": "component"}}, "did you mean 'components'"),
        ({"figure": {"kind": "components", "group": ["a"]}}, "did you mean 'groups'"),
        ({"figure": {"kind": "accuracy", "top": 3}}, "has no option 'top'"),
    ],
)
def test_errors(tmp_path: Path, content: dict[str, object], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Sweep.read(write(tmp_path / "grid.yaml", **content))


def test_missing_file_and_bad_parallel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sweep", str(tmp_path / "none.yaml")])
    assert "no sweep file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["sweep", str(CONFIGS / "sweeps" / "quickstart.yaml"), "--parallel=0", f"--out={tmp_path}"])
    assert "parallel must be at least 1, got 0" in capsys.readouterr().err


def test_dry_run_prints_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["sweep", str(CONFIGS / "sweeps" / "quickstart.yaml"), "--dry_run=true", f"--out={tmp_path / 'o'}"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("lightning-locality fit --config=") for line in lines)
    assert not (tmp_path / "o").exists()


def test_collect_is_tidy_and_leaves_out_unfinished_runs(tmp_path: Path) -> None:
    runs = [Run("v", {"seed": n}, (), tmp_path / str(n)) for n in range(3)]
    for run, accuracy in zip(runs[:2], (0.5, 0.75), strict=True):
        run.folder.mkdir()
        summary = {"epochs": 3, "seconds": 2.0, "metrics": {"test/accuracy": accuracy}}
        (run.folder / "summary.json").write_text(json.dumps(summary))
    rows = collect(runs, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open() as file:
        stored = list(csv.DictReader(file))
    assert [row["test/accuracy"] for row in stored] == ["0.5", "0.75"]
    assert list(stored[0]) == ["run", "variant", "seed", "epochs", "seconds", "test/accuracy"]
    table = result_table(runs, rows)
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells == ["v", "2 of 3", "-", "62.5 (50.0 to 75.0)", "-", "2"]


def test_a_failed_run_is_reported_and_another_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real runs: one that fails does not stop the other, which then continues as if it had not ended."""
    path = write(
        tmp_path / "grid.yaml",
        configs=[str(CONFIGS / "quickstart.yaml")],
        set=TINY,
        variants={"good": {}, "bad": {"set": {"data.distance": 1000}}},
    )
    with pytest.raises(SystemExit):
        main(["sweep", str(path), f"--out={tmp_path / 'out'}", "--parallel=2"])
    output = capsys.readouterr()
    assert "1 of 2 runs failed" in output.err
    assert "distance" in output.out
    assert (tmp_path / "out" / "accuracy.png").exists()
    with (tmp_path / "out" / "results.csv").open() as file:
        (before,) = csv.DictReader(file)
    good = Sweep.read(path, tmp_path / "out").runs[0]
    (good.folder / "summary.json").unlink()
    # killed after its checkpoint and before its last rows, which Lightning writes later
    metrics = good.folder / "metrics.csv"
    history = read_metrics(metrics)
    kept = [line for line in metrics.read_text().splitlines(keepends=True) if "train/accuracy" in line]
    metrics.write_text("".join(kept))  # the header alone: there is one epoch
    main([*good.arguments, f"--ckpt_path={prepared(good.folder)}"])  # as the job of a sweep
    assert (good.folder / "config.0.yaml").exists()
    assert read_metrics(metrics) == history
    # as it had, also what it did not measure again
    collect([good], tmp_path / "again.csv")
    with (tmp_path / "again.csv").open() as file:
        (again,) = csv.DictReader(file)
    for row in (before, again):
        del row["seconds"]
    assert again == before
    assert {"train/accuracy", "val/accuracy", "test/loss"} <= again.keys()
    summary = json.loads((good.folder / "summary.json").read_text())
    assert summary["seeds"]["seed_everything"] == 0
    assert summary["config"]["data"]["init_args"]["train"] == 32
    assert {"versions", "device", "seconds"} <= summary.keys()


@pytest.mark.slow
def test_a_sweep_killed_at_random_moments_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    """Every metric of every run, bit for bit, and the history of its epochs."""
    path = write(
        tmp_path / "grid.yaml",
        devices=[],
        parallel=2,
        configs=[str(CONFIGS / "quickstart.yaml")],
        set={**TINY, "trainer.max_epochs": 20},
        variants={"plain": {"set": {"model.weight": 0}}, "regularised": {}},
        grid={"seed_everything, data.seed, model.penalty.seed": [1]},
    )
    command = [sys.executable, "-m", "lightning_locality", "sweep", str(path), f"--out={tmp_path / 'killed'}"]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    plan = Sweep.read(path, tmp_path / "whole")
    for run in plan.runs:  # undisturbed, in this process
        main(list(run.arguments))
    collect(plan.runs, tmp_path / "whole" / "results.csv")
    dice = random.Random(0)

    def rows_so_far() -> int:
        return sum(len(path.read_text().splitlines()) for path in (tmp_path / "killed").glob("*/metrics.csv"))

    # counted in epochs, so that a slow machine is not killed in its starts alone; the first one is, perhaps
    for rows in (0, *(dice.randint(1, 15) for _ in range(2))):
        process = subprocess.Popen(command, start_new_session=True, **quiet)
        before = rows_so_far()
        while process.poll() is None and rows_so_far() < before + rows:
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 0.3) if rows else dice.uniform(0, 6))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, timeout=600, **quiet)
    tables = []
    for name in ("whole", "killed"):
        with (tmp_path / name / "results.csv").open(newline="") as file:
            tables.append([{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)])
    assert len(tables[0]) == 2
    assert tables[0] == tables[1]
    for row in tables[0]:
        histories = [read_metrics(tmp_path / name / row["run"] / "metrics.csv") for name in ("whole", "killed")]
        assert [epoch["epoch"] for epoch in histories[0]][:20] == list(range(20))
        assert histories[0] == histories[1]
    # something was continued, or this shows nothing
    assert list((tmp_path / "killed").glob("*/config.0.yaml"))


def recovery_run(folder: Path, variant: str, point: dict[str, object], rows: list[dict[str, float]]) -> Run:
    folder.mkdir(parents=True)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    summary = {"iterations": rows[-1]["iteration"], "seconds": 2.0, "metrics": rows[-1]}
    (folder / "summary.json").write_text(json.dumps(summary))
    return Run(variant, point, (), folder)


def test_recovery_runs_are_tabled_by_loss_and_error(tmp_path: Path) -> None:
    row = {"iteration": 50, "train/loss": 1e-5, "reconstruction_error": 0.25}
    runs = [recovery_run(tmp_path / str(n), "v", {"seed": n}, [{**row, "train/loss": n * 1e-5}]) for n in (1, 3)]
    rows = collect(runs, tmp_path / "results.csv")
    table = result_table(runs, rows)
    assert [column.header for column in table.columns] == [
        "run",
        "finished",
        "training loss",
        "error",
        "iterations",
        "seconds",
    ]
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells[:4] == ["v", "2 of 2", "2e-05 (1e-05 to 3e-05)", "0.25 (0.25 to 0.25)"]
    with (tmp_path / "results.csv").open() as file:
        assert [row["reconstruction_error"] for row in csv.DictReader(file)] == ["0.25", "0.25"]


def test_progress_of_a_recovery_run_is_read_from_the_end_of_its_metrics(tmp_path: Path) -> None:
    rows = [{"iteration": n, "train/loss": 1 / (n + 1), "reconstruction_error": 0.5} for n in range(5000)]
    run = recovery_run(tmp_path / "a", "v", {}, rows)
    (run.folder / "summary.json").unlink()
    with (run.folder / "metrics.csv").open("a") as file:
        file.write("5000,0.1")  # half a row
    table = progress_table([run], [(run, "running")], Progress([run], 1))
    assert list(table.columns[2].cells) == ["iteration 4999, loss 0.0002, error 0.5"]


@pytest.mark.parametrize(
    ("kind", "axes"), [("components", 4), ("value", 1), ("depth", 3), ("rank", 2), ("observations", 1)]
)
def test_figures_of_recovery_runs(kind: str, axes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"iteration": 0, "train/loss": 1.0, "test/loss": 1.0, "component/1": 1.0, "entry/0-0": 1.0}
    row["reconstruction_error"] = 1.0
    last = {**row, "iteration": 25, "train/loss": 0.01, "entry/0-0": 7.0}
    point = {"depth": 2, "rank": 3, "observations": 50}
    runs = [recovery_run(tmp_path / v, v, point, [row, last]) for v in ("a", "b")]
    problem = {"rows": 2, "cols": 2, "z": 1.0, "z_prime": 1.0, "eps": 0.0}
    for run in runs:
        (run.folder / "config.yaml").write_text(yaml.safe_dump({"data": {"init_args": problem}}))
    drawn = []
    monkeypatch.setattr(
        "lightning_locality.sweep_figure.save_figure", lambda figure, stem: drawn.append((figure, stem))
    )
    picture = SweepFigure.read({"kind": kind}, "here").save(runs, tmp_path)
    assert picture == tmp_path / f"{kind}.png"
    ((figure, stem),) = drawn
    assert (len(figure.axes), stem) == (axes, tmp_path / kind)
    if kind == "value":
        first, _, bound = figure.axes[0].lines
        assert first.get_xydata().tolist() == [[1, 1], [0.01, 7]]
        loss = bound.get_xdata()[0]
        q = (2 * loss) ** 0.5
        assert bound.get_ydata()[0] == pytest.approx((1 - q) ** 2 / q, rel=1e-12)  # papers' problem, z = z' = 1
        assert bound.get_label() == "lower bound"
    if kind == "components":
        assert [panel.get_title() for panel in figure.axes[:2]] == ["a", "b"]
    if kind in ("depth", "rank", "observations"):
        assert {line.get_xdata()[0] for line in figure.axes[-1].lines if line.get_marker() != "None"} == {
            {"depth": 2, "rank": 3, "observations": 50}[kind]
        }


def test_a_figure_that_cannot_be_drawn_hides_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = {"kind": "xy", "x": "depth", "y": "test/accuracy"}
    grid = write(tmp_path / "s.yaml", out=str(tmp_path / "runs"), figure=figure, grid={"data.distance": [0]})
    (run,) = Sweep.read(grid).runs
    run.folder.mkdir(parents=True)
    (run.folder / "summary.json").write_text(json.dumps({"metrics": {"test/accuracy": 0.75}}))
    with pytest.raises(SystemExit) as stop:
        main(["sweep", str(grid)])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert "--x: there is no column 'depth'" in printed.err
    assert "75.0" in printed.out


def test_nothing_to_draw_before_the_first_metrics(tmp_path: Path) -> None:
    runs = [Run("a", {}, (), tmp_path / "a")]
    assert SweepFigure().save(runs, tmp_path) is None
    assert SweepFigure("depth").save(runs, tmp_path) is None


def test_runs_without_accuracies_have_no_figure_of_them(tmp_path: Path) -> None:
    row = {"epoch": 0, "iteration": 0, "train/loss": 1.0}
    assert SweepFigure().save([recovery_run(tmp_path / "a", "a", {}, [row])], tmp_path) is None
    assert not (tmp_path / "accuracy.png").exists()
