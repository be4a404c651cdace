from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml

from lightning_locality.cli import main
from lightning_locality.results import collect, result_table
from lightning_locality.sweep import Run, Sweep

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
    assert list(stored[0]) == ["variant", "seed", "epochs", "seconds", "test/accuracy"]
    table = result_table(runs, rows)
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells == ["v", "2 of 3", "-", "62.5 (50.0 to 75.0)", "-", "2"]


def test_runs_skips_finished_reports_failed_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One sweep in three calls: a run that fails does not stop the other, and is tried again alone."""
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
    stamp = (tmp_path / "out" / "good" / "summary.json").stat().st_mtime_ns
    write(
        path,
        configs=[str(CONFIGS / "quickstart.yaml")],
        set=TINY,
        variants={"good": {}, "bad": {"set": {"model.weight": 0}}},
    )
    main(["sweep", str(path), f"--out={tmp_path / 'out'}"])
    assert (tmp_path / "out" / "good" / "summary.json").stat().st_mtime_ns == stamp
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {"good", "bad"}
    assert (tmp_path / "out" / "accuracy.png").exists()
    # a run killed before its summary continues from its checkpoint instead of starting again
    (tmp_path / "out" / "good" / "summary.json").unlink()
    main(["sweep", str(path), f"--out={tmp_path / 'out'}"])
    assert (tmp_path / "out" / "good" / "config.0.yaml").exists()
    with (tmp_path / "out" / "results.csv").open() as file:
        again = {row["variant"]: row for row in csv.DictReader(file)}
    assert again["good"]["test/loss"] == rows["good"]["test/loss"]
