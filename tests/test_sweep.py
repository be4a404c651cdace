"""Sweeps through the command line: everything runs once, whatever is killed, and is collected.

Most runs only pretend, which takes a tenth of a second instead of several; the first tests start real ones.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock, Timeout

from lightning_locality import sweep as sweeps
from lightning_locality.cli import main
from lightning_locality.results import history, write_results
from lightning_locality.sweep_file import SweepFile

CONFIGS = Path(__file__).parent.parent / "configs"
# some seconds, with a checkpoint every 50 iterations
RECOVERY: dict[str, Any] = {
    "configs": [str(CONFIGS / "recovery" / "matrix.yaml")],
    "set": {
        "data.shape": [8, 8],
        "data.observations": 32,
        "data.epoch_length": 1,
        "model.model.shape": [8, 8],
        "model.steps": 50,
        "model.max_iterations": 3000,
    },
}
TINY = {
    "trainer.max_epochs": 20,
    "data.train": 32,
    "data.validation": 16,
    "data.test": 16,
    "data.batch_size": 16,
}
QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

# takes the place of a fit: locks its directory, ends with its parent, notes its arguments, and finishes or fails
PRETENDED_FIT = """
import json, os, pathlib, sys, threading, time
if sys.orig_argv[1:4] == ["-m", "lightning_locality", "fit"]:
    import filelock
    folder = pathlib.Path(next(a.split("=", 1)[1] for a in sys.orig_argv if a.startswith("--run_dir=")))
    def end_with_parent():
        os.read(0, 1)
        os._exit(1)
    if os.environ.get("LIGHTNING_LOCALITY_PARENT_PIPE"):
        threading.Thread(target=end_with_parent, daemon=True).start()
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        os._exit(75)
    note = {"run": folder.name, "pid": os.getpid(), "start": time.time(), "arguments": sys.orig_argv[4:]}
    note["env"] = {k: v for k, v in os.environ.items() if k.startswith(("CUDA", "SLURM", "OMP", "MASTER"))}
    (folder / "started").write_text(f"{os.getppid()} {os.getpid()}")
    time.sleep(float(os.environ.get("FAKE_SECONDS", "0.1")))
    note["end"] = time.time()
    with open(os.environ["FAKE_NOTES"], "a") as file:
        file.write(json.dumps(note) + "\\n")
    if "bad" in folder.name:
        print("it broke", file=sys.stderr, flush=True)
        os._exit(2)
    if "killed" in folder.name:
        os.kill(os.getpid(), 9)
    part = folder / "summary.json.part"
    part.write_text(json.dumps({"metrics": {"test/loss": 0.5}, "epochs": 1, "seconds": 1.0}))
    os.replace(part, folder / "summary.json")
    os._exit(0)
"""


@pytest.fixture(autouse=True)
def single_precision() -> None:
    """As a user runs it."""
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """File with a line for every run that was started; runs pretend."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(PRETENDED_FIT)
    package = str(Path(sweeps.__file__).parent.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), package]))
    monkeypatch.setenv("FAKE_NOTES", str(tmp_path / "notes"))
    return tmp_path / "notes"


def read(notes: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []


def write(path: Path, **content: object) -> Path:
    path.write_text(yaml.safe_dump({"devices": [], "parallel": 2, **content}, sort_keys=False))
    return path


def rows(folder: Path) -> list[dict[str, str]]:
    """Of results.csv, without the time that the runs took."""
    with (folder / "results.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def locked(folder: Path) -> bool:
    try:
        with FileLock(folder / ".lock", timeout=0):
            return False
    except Timeout:
        return True


def started(grid: Path, out: Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lightning_locality", "sweep", str(grid), f"--out={out}"]
    return subprocess.Popen(command, text=True, **options)


def in_turn(grid: Path, out: Path) -> None:
    """Start two sweeps at once, and wait for both."""
    both = [started(grid, out, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]
    for process in both:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output


def failing(*args: str, status: int = 2) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["sweep", *args])
    assert stop.value.code == status


def stop_once(condition: Callable[[], object], number: signal.Signals) -> threading.Thread:
    """Signal this process as soon as the condition holds."""

    def stop() -> None:
        until(condition)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop)
    thread.start()
    return thread


def test_a_real_run_ends_with_its_killed_sweep_and_is_finished_once_by_two(tmp_path: Path) -> None:
    path, out = write(tmp_path / "grid.yaml", **RECOVERY, grid={"model.model.depth": [2]}), tmp_path / "out"
    folder = out / "run-depth=2"
    (run,) = SweepFile.read(path, out).runs()
    process = started(path, out, **QUIET)
    until((folder / "last.ckpt").exists)
    process.kill()
    process.wait()
    until(lambda: not locked(folder), seconds=20)
    assert not run.finished
    with FileLock(folder / ".lock"), pytest.raises(SystemExit) as stop:
        main([*run.arguments, f"--ckpt_path={folder / 'last.ckpt'}"])
    assert stop.value.code == 75  # as a run that another sweep has begun
    in_turn(path, out)
    assert sorted(file.name for file in folder.glob("config*.yaml")) == ["config.0.yaml", "config.yaml"]
    assert json.loads((folder / "summary.json").read_text())["labels"] == {"variant": "run", "depth": 2}
    (undisturbed,) = SweepFile.read(path, tmp_path / "whole").runs()
    main(list(undisturbed.arguments))
    write_results(tmp_path / "whole" / "results.csv", {undisturbed.folder: undisturbed.labels})
    assert rows(tmp_path / "whole") == rows(out)
    assert history(undisturbed.folder, "iteration").equals(history(folder, "iteration"))


@pytest.mark.slow
def test_a_sweep_killed_at_random_moments_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    """Every metric of every run, bit for bit, and the history of its epochs."""
    path = write(
        tmp_path / "grid.yaml",
        configs=[str(CONFIGS / "quickstart.yaml")],
        set=TINY,
        variants={"plain": {"set": {"model.weight": 0}}, "regularised": {}},
        grid={"seed_everything, data.seed, model.penalty.seed": [1]},
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    runs = SweepFile.read(path, whole).runs()
    for run in runs:  # undisturbed, in this process
        main(list(run.arguments))
    write_results(whole / "results.csv", {run.folder: run.labels for run in runs})
    dice = random.Random(0)

    def rows_so_far() -> int:
        return sum(len(path.read_text().splitlines()) for path in killed.glob("*/metrics.csv"))

    def arrived(process: subprocess.Popen[str], rows: int) -> bool:
        return process.poll() is not None or rows_so_far() >= rows

    # counted in epochs, so that a slow machine is not killed in its starts alone; the first one is, perhaps
    for more in (0, *(dice.randint(1, 15) for _ in range(3))):
        process = started(path, killed, start_new_session=True, **QUIET)
        until(partial(arrived, process, rows_so_far() + more), seconds=600)
        time.sleep(dice.uniform(0, 0.3) if more else dice.uniform(0, 6))
        if process.poll() is None:
            # alone, or with its runs
            process.kill() if dice.random() < 0.5 else os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    in_turn(path, killed)
    assert len(rows(whole)) == 2
    assert rows(whole) == rows(killed)
    for row in rows(whole):
        histories = [history(out / row["run"]) for out in (whole, killed)]
        assert list(histories[0].index)[:20] == list(range(20))
        assert histories[0].equals(histories[1])
    # something was resumed, or this shows nothing
    assert list(killed.glob("*/config.0.yaml"))


def test_killed_sweeps_leave_no_run_and_two_run_everything_once(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = write(tmp_path / "grid.yaml", grid={"data.seed": list(range(4))}), tmp_path / "out"
    monkeypatch.setenv("FAKE_SECONDS", "1")
    process = started(path, out, **QUIET)
    until(lambda: len(list(out.glob("*/started"))) == 2)
    process.kill()
    process.wait()
    monkeypatch.setenv("FAKE_SECONDS", "0.3")
    in_turn(path, out)  # those that were going on would have noted it by now
    assert Counter(note["run"] for note in read(notes)) == {f"run-seed={n}": 1 for n in range(4)}
    assert [row["seed"] for row in rows(out)] == [str(n) for n in range(4)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_runs_end_with_an_interrupted_sweep(
    tmp_path: Path,
    notes: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    """Also where a script has started it in the background, and it ignores interrupts."""
    out = tmp_path / "out"
    path = write(tmp_path / "grid.yaml", grid={"data.seed": [0, 1, 2]})
    monkeypatch.setenv("FAKE_SECONDS", "60")
    handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_IGN
    before = [signal.signal(signal.SIGINT, handler), signal.getsignal(signal.SIGTERM)]
    try:
        thread = stop_once(lambda: len(list(out.glob("*/started"))) == 2, number)
        failing(str(path), f"--out={out}", status=130)
        thread.join()
    finally:
        assert signal.getsignal(signal.SIGTERM) == before[1]
        signal.signal(signal.SIGINT, before[0])
    expected = "interrupted: 0 of 3 runs are finished; re-run the same command to resume\n"
    assert capsys.readouterr().out.endswith(expected)
    assert not any(locked(out / f"run-seed={n}") for n in range(3))
    assert not notes.exists()


def test_failed_runs_are_reported_and_tried_again(
    tmp_path: Path, notes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write(tmp_path / "grid.yaml", variants=dict.fromkeys(("good", "bad", "killed"))), tmp_path / "out"
    failing(str(path), f"--out={out}")
    shown = capsys.readouterr()
    assert "2 of 3 runs failed; re-run the same command to try them again and skip the rest" in shown.err
    assert "failed: bad\nit broke\n" in shown.out
    assert "failed: killed\nended by signal 9 (Killed)\n" in shown.out
    assert "finished: good (" in shown.out
    assert "1 done, 2 failed, 0 to go" in shown.out
    assert rows(out) == [{"run": "good", "variant": "good", "epochs": "1", "test/loss": "0.5"}]
    failing(str(path), f"--out={out}")
    assert Counter(note["run"] for note in read(notes)) == {"good": 1, "bad": 2, "killed": 2}


def test_runs_share_the_devices_and_the_cores(tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "1")  # as in an allocation, where Lightning would start nothing by itself
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(12), raising=False)
    grid, out = {"data.seed": [0, 1, 2, 3]}, tmp_path / "out"
    main(["sweep", str(write(tmp_path / "a.yaml", devices=[6, 7], parallel=None, grid=grid)), f"--out={out}"])
    found = read(notes)
    assert sorted(note["run"] for note in found) == [f"run-seed={n}" for n in range(4)]
    assert {note["env"]["CUDA_VISIBLE_DEVICES"] for note in found} == {"6", "7"}
    for device in ("6", "7"):
        own = sorted((n["start"], n["end"]) for n in found if n["env"]["CUDA_VISIBLE_DEVICES"] == device)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(own))
    assert {note["env"]["OMP_NUM_THREADS"] for note in found} == {"6"}
    assert not any(name.startswith("SLURM") for note in found for name in note["env"])
    notes.unlink()
    # 8 fills no group
    devices: dict[str, Any] = {"devices": [4, 5, 6, 7, 8], "devices_per_run": 2, "parallel": None}
    main(["sweep", str(write(tmp_path / "b.yaml", **devices, grid={"a.b": [0, 1]})), f"--out={out}"])
    pairs = {note["env"]["CUDA_VISIBLE_DEVICES"]: note["arguments"] for note in read(notes)}
    assert pairs.keys() == {"4,5", "6,7"}
    assert all("--trainer.devices=2" in arguments for arguments in pairs.values())


def test_device_errors_and_visible_devices(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for devices, expected in (
        ({"devices": [0, 1], "devices_per_run": 3}, "devices_per_run is 3, but there are 2 devices (0, 1)"),
        ({"devices": [0, 0]}, "devices must be named once each, got 0, 0"),
    ):
        failing(str(write(tmp_path / "grid.yaml", **devices)), f"--out={tmp_path / 'out'}")
        assert expected in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-1f")
    path = write(tmp_path / "grid.yaml", devices=None, parallel=None, devices_per_run=2)
    main(["sweep", str(path), f"--out={tmp_path / 'out'}"])
    assert [note["env"]["CUDA_VISIBLE_DEVICES"] for note in read(notes)] == ["5,GPU-1f"]


def test_other_settings_are_said(tmp_path: Path, notes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A finished run is kept; one with a checkpoint continues; the traces of one without are cleared."""
    out, variants = tmp_path / "out", dict.fromkeys(("done", "new", "cut"))
    path = write(tmp_path / "grid.yaml", set={"a": 1}, variants=variants)
    for name in ("new", "cut"):
        (out / name).mkdir(parents=True)
        for trace in ("config.yaml", "config.0.yaml", "metrics.csv", "best.ckpt", "note.txt"):
            (out / name / trace).write_text("1,2")
    (out / "cut" / "last.ckpt").write_bytes(b"PK\x03\x04 cut off")
    main(["sweep", str(path), f"--out={out}"])
    assert "other settings" not in capsys.readouterr().out
    left = {file.name for name in ("new", "cut") for file in (out / name).iterdir()}
    assert left == {".claim", ".lock", ".settings.json", "damaged", "log.txt", "note.txt", "started", "summary.json"}
    # a damaged checkpoint may be of use, and what belongs to it: nothing is deleted
    kept = {file.name for file in (out / "cut" / "damaged").iterdir()}
    assert kept == {"config.yaml", "config.0.yaml", "metrics.csv", "best.ckpt", "last.ckpt"}
    (out / "new" / "summary.json").unlink()
    with zipfile.ZipFile(out / "new" / "last.ckpt", "w") as file:
        file.writestr("a", "b")
    write(path, set={"a": 2, "b": "x"}, variants=variants)
    notes.unlink()
    main(["sweep", str(path), f"--out={out}"])
    shown = capsys.readouterr().out
    begin = "was started with other settings (a: was 1, now 2; b: was not set, now x) and"
    assert f"done {begin} is kept: remove its folder to run it anew" in shown
    assert f"new {begin} continues with the new ones: remove its folder to run it anew" in shown
    (note,) = read(notes)
    assert {"--a=2", "--b=x", f"--ckpt_path={out / 'new' / 'last.ckpt'}"} <= set(note["arguments"])


def finished(run: Any, metrics: dict[str, float], **counts: float) -> None:
    run.folder.mkdir(parents=True)
    (run.folder / "summary.json").write_text(json.dumps({"metrics": metrics, **counts}))


def test_tables_have_a_row_for_what_varied_other_than_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, grid = tmp_path / "out", {"seed_everything, data.seed": [0, 1], "model.weight": [0, 3]}
    path = write(tmp_path / "grid.yaml", grid=grid)
    for run, accuracy in zip(SweepFile.read(path, out).runs(), (0.5, 0.75, 0.625, 1.0), strict=True):
        finished(run, {"train/accuracy": 1.0, "test/accuracy": accuracy}, epochs=3, seconds=2.0)
        (run.folder / "metrics.csv").write_text("epoch,step,val/accuracy\n0,1,0.5\n")
    finished(SweepFile.read(write(tmp_path / "old.yaml", grid={"gone": [1]}), out).runs()[0], {})
    main(["sweep", str(path), f"--out={out}"])
    shown = capsys.readouterr().out
    assert f"In {out}: results.csv, accuracy.png, and a folder for every run" in shown
    assert (out / "accuracy.png").is_file()
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines()]
    assert [line for line in lines if line] == [
        ["weight=0", "2 of 2", "100.0 (100.0 to 100.0)", "56.2 (50.0 to 62.5)", "-", "2"],
        ["weight=3", "2 of 2", "100.0 (100.0 to 100.0)", "87.5 (75.0 to 100.0)", "-", "2"],
    ]
    # what the sweep no longer has is left out
    assert (out / "results.csv").read_text().splitlines() == [
        "run,variant,seed_everything,weight,epochs,seconds,train/accuracy,test/accuracy",
        "run-seed_everything=0-weight=0,run,0,0,3,2.0,1.0,0.5",
        "run-seed_everything=0-weight=3,run,0,3,3,2.0,1.0,0.75",
        "run-seed_everything=1-weight=0,run,1,0,3,2.0,1.0,0.625",
        "run-seed_everything=1-weight=3,run,1,3,3,2.0,1.0,1.0",
    ]


def test_every_regulariser_has_a_column_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "grid.yaml", variants=dict.fromkeys(("none", "one", "two")))
    names: list[tuple[str, ...]] = [(), ("",), ("/near", "/far")]
    for run, own in zip(SweepFile.read(path, tmp_path / "out").runs(), names, strict=True):
        values = {f"test/regularizer{name}": 0.25 + 0.25 * k for k, name in enumerate(own)}
        finished(run, {"test/accuracy": 0.5, **values}, epochs=1, seconds=2.0)
    main(["sweep", str(path), f"--out={tmp_path / 'out'}"])
    shown = capsys.readouterr().out
    (heading,) = [line for line in shown.splitlines() if "finished" in line and "┃" in line]
    assert [cell.strip() for cell in heading.split("┃")[4:-2]] == [
        "test",
        "R on test",
        "R on test, near",
        "R on test, far",
    ]
    lines = [[cell.strip() for cell in line.split("│")[4:-2]] for line in shown.splitlines() if "1 of 1" in line]
    assert lines == [["50.0", "-", "-", "-"], ["50.0", "0.25", "-", "-"], ["50.0", "-", "0.25", "0.50"]]


def test_recovery_runs_are_tabled_by_loss_and_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "grid.yaml", variants={"v": None}, grid={"seed": [1, 3]})
    for seed, run in zip((1, 3), SweepFile.read(path, tmp_path / "out").runs(), strict=True):
        finished(run, {"train/loss": seed * 1e-5, "reconstruction_error": 0.25}, iterations=50, seconds=2.0)
    main(["sweep", str(path), f"--out={tmp_path / 'out'}"])
    shown = capsys.readouterr().out
    assert [name in shown for name in ("training loss", "error", "iterations", "test loss")] == [
        True,
        True,
        True,
        False,
    ]
    (line,) = [line for line in shown.splitlines() if "2 of 2" in line]
    cells = [cell.strip() for cell in line.split("│")[1:-1]]
    assert cells == ["v", "2 of 2", "2e-05 (1e-05 to 3e-05)", "0.25 (0.25 to 0.25)", "50 (50 to 50)", "2"]


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
    runs = SweepFile.read(path, tmp_path / "out").runs()
    assert [run.labels for run in runs] == [
        {"variant": variant, "seed_everything": seed, "distance": 8}
        for seed in (0, 1)
        for variant in ("plain", "with, term")
    ]
    assert runs[3].arguments == (
        "fit",
        f"--config={tmp_path / 'a.yaml'}",
        f"--config={tmp_path / 'b.yaml'}",
        "--trainer.max_epochs=2",
        "--seed_everything=1",
        "--data.seed=1",
        "--data.distance=8",
        f"--run_dir={tmp_path / 'out' / 'with__term-seed_everything=1-distance=8'}",
        '--labels={"variant": "with, term", "seed_everything": 1, "distance": 8}',
    )
    assert len({run.folder for run in runs}) == 4
    # options that share their last word keep their names; text keeps its form
    path = write(tmp_path / "grid.yaml", grid={"data.seed": [0, 1], "model.seed": [0, 1], "a.size": ["1e-3"]})
    run = SweepFile.read(path).runs()[1]
    assert dict(run.labels) == {"variant": "run", "data.seed": 0, "model.seed": 1, "size": "1e-3"}
    assert (run.folder, "--a.size=1e-3" in run.arguments) == (
        Path("runs/grid/run-data.seed=0-model.seed=1-size=1e-3"),
        True,
    )


def test_base_is_overridden_entry_by_entry(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", out="x", parallel=3, grid={"seed_everything": [0]})
    (tmp_path / "child.yaml").write_text("{base: base.yaml, grid: {seed_everything: [1, 2]}}")
    plan = SweepFile.read(tmp_path / "child.yaml")
    assert (plan.folder, plan.parallel) == (Path("x"), 3)
    assert [run.labels["seed_everything"] for run in plan.runs()] == [1, 2]


def test_dry_run_prints_the_commands_and_what_has_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid, out = str(CONFIGS / "sweeps" / "quickstart.yaml"), tmp_path / "o"
    main(["sweep", grid, "--dry_run=true", f"--out={out}"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("lightning-locality fit --config=") for line in lines)
    assert not out.exists()
    finished(SweepFile.read(Path(grid), out).runs()[1], {})
    main(["sweep", grid, "--dry-run", f"--out={out}"])
    assert [line.endswith("  # finished") for line in capsys.readouterr().out.splitlines()] == [
        False,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"gird": {}}, "unknown key 'gird' .did you mean 'grid'"),
        ({"variants": {"a": {"sets": {}}}}, "did you mean 'set'"),
        ({"figure": "components"}, "must be a mapping with a kind"),
        ({"figure": {"kind": "component"}}, "did you mean 'components'"),
        ({"figure": {"kind": "components", "group": ["a"]}}, "did you mean 'groups'"),
        ({"figure": {"kind": "accuracy", "x": "depth"}, "grid": {"a.distance": [1]}}, "no column 'depth'"),
        ({"variants": ["a"]}, "variants must be a mapping of names to configs and set"),
        ({"configs": ["none.yaml"]}, "does not exist"),
        ({"cluster": "slrum"}, "cluster must be one of local, slurm"),
        ({"slurm": {"time": "4 hours"}}, "whole number of minutes, got '4 hours'"),
        ({"slurm": {"nodes": 2}}, "nodes follows from devices_per_run"),
        ({"slurm": ["gpu"]}, "slurm must be a mapping"),
        ({"slurm": {"gpus_per_node": 1}, "devices_per_run": 2}, "gpus_per_node is 1, but devices_per_run 2"),
        ({"devices_per_run": 0}, "devices_per_run must be at least 1, got 0"),
        ({"parallel": "all"}, "parallel must be at least 1, got 'all'"),
        ({"devices": 2}, "devices must be a list of GPUs"),
        ({"set": {"trainer.devices": 1}, "devices_per_run": 2}, "devices_per_run is 2, but trainer.devices 1"),
        ({"grid": {"a": 1}}, "a must be a list of values"),
        ({"grid": ["a"]}, "grid must be a mapping"),
        ({"grid": {"a": [1, 1]}}, "two runs would share the folder"),
        ({"variants": {"a b": {}, "a,b": {}}}, "two runs would share the folder"),
    ],
)
def test_errors_of_the_file(tmp_path: Path, content: dict[str, object], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        SweepFile.read(write(tmp_path / "grid.yaml", **content)).runs()


def test_missing_file_and_bad_parallel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failing(str(tmp_path / "none.yaml"))
    assert "there is no file" in capsys.readouterr().err
    failing(str(CONFIGS / "sweeps" / "quickstart.yaml"), "--parallel=0", f"--out={tmp_path}")
    assert "parallel must be at least 1, got 0" in capsys.readouterr().err


# a SLURM of one machine: the tasks of an array at once
SBATCH = """#!{python}
import os, re, subprocess, sys
if "scontrol" in sys.argv[0]:
    tasks, script = [int(sys.argv[2].split("_")[1])], {folder!r} + "/script.sh"
    open({folder!r} + "/requeued", "a").write(sys.argv[2] + "\\n")
else:
    text = open(sys.argv[1]).read()
    script = {folder!r} + "/script.sh"
    open(script, "w").write(text)
    open({folder!r} + "/sbatch.txt", "a").write(text + "\\n=====\\n")
    tasks = range(int(re.search(r"--array=0-(\\d+)", text).group(1)) + 1)
for task in tasks:
    env = dict(os.environ, SLURM_JOB_ID=str(900 + task), SLURM_PROCID="0", SLURM_NTASKS="1", SLURM_JOB_NAME="submitit")
    env.update(SLURM_ARRAY_JOB_ID="77", SLURM_ARRAY_TASK_ID=str(task))
    subprocess.Popen(["bash", script], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("Submitted batch job 77")
"""
SRUN = """#!{python}
import os, sys
words, files = sys.argv[1:], {{}}
while words[0].startswith("-"):
    word = words.pop(0)
    if word in ("--output", "--error"):
        name = words.pop(0).replace("%A", "77").replace("%a", os.environ.get("SLURM_ARRAY_TASK_ID", "0"))
        files[word] = name.replace("%j", os.environ["SLURM_JOB_ID"]).replace("%t", "0")
for number, word in ((1, "--output"), (2, "--error")):
    os.dup2(os.open(files[word], os.O_CREAT | os.O_APPEND | os.O_WRONLY), number)
os.execvp(words[0], words)
"""
SACCT = """#!{python}
print("JobID|State|NodeList")
for task in range(9):
    print(f"77_{{task}}|RUNNING|node")
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder with what sbatch was given; the programs of SLURM are on the path, and pretend."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("scontrol", SBATCH), ("srun", SRUN), ("sacct", SACCT)):
        program = folder / name
        program.write_text(text.format(python=sys.executable, folder=str(folder)))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setitem(sweeps._POLL, "slurm", 0.3)
    return folder


def test_slurm_runs_one_array(tmp_path: Path, notes: Path, slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"partition": "gpu", "time": 90, "cpus_per_task": 8, "mem": "32GB", "array_parallelism": 2}
    path = write(
        tmp_path / "grid.yaml",
        cluster="slurm",
        slurm={**options, "account": "science"},
        devices_per_run=4,
        variants={"good": {}, "bad": {}},
        grid={"data.seed": [0, 1]},
    )
    failing(str(path), f"--out={tmp_path / 'out'}")
    shown = capsys.readouterr()
    assert "2 of 4 runs failed" in shown.err
    assert "it broke" in shown.out
    (script,) = (slurm / "sbatch.txt").read_text().split("\n=====\n")[:-1]
    asked = {line for line in script.splitlines() if line.startswith("#SBATCH")}
    assert asked >= {
        "#SBATCH --array=0-3%2",
        "#SBATCH --partition=gpu",
        "#SBATCH --time=90",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --mem=32GB",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --account=science",
        "#SBATCH --job-name=out",
        "#SBATCH --nodes=1",
    }
    assert not any("ntasks" in line for line in asked)
    found = read(notes)
    assert Counter(n["run"] for n in found) == {f"{v}-seed={n}": 1 for v in ("good", "bad") for n in (0, 1)}
    # the run is one task that starts its own processes, not one of SLURM's
    assert not any(name.startswith("SLURM") for note in found for name in note["env"])
    assert all("--trainer.devices=4" in note["arguments"] for note in found)
    assert [row["variant"] for row in rows(tmp_path / "out")] == ["good", "good"]


def test_a_job_on_slurm_whose_time_is_up_is_requeued_and_outlives_the_sweep(
    tmp_path: Path, notes: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SLURM signals the job and what it has started."""
    path, out = write(tmp_path / "grid.yaml", grid={"data.seed": [0, 1]}), tmp_path / "out"
    marks = [out / f"run-seed={n}" / "started" for n in range(2)]
    monkeypatch.setenv("FAKE_SECONDS", "1")
    thread = stop_once(lambda: all(mark.exists() and mark.read_text() for mark in marks), signal.SIGTERM)
    failing(str(path), f"--out={out}", "--cluster=slurm", status=130)
    thread.join()
    assert "jobs 77 stay with SLURM: squeue shows them, scancel ends them" in capsys.readouterr().out
    for process in marks[0].read_text().split():  # the process of the job, and that of the run
        os.kill(int(process), signal.SIGUSR2)
    until(lambda: len(read(notes)) == 2)  # the first start did not come to its end
    assert (slurm / "requeued").read_text() == "77_0\n"
    main(["sweep", str(path), f"--out={out}", "--cluster=slurm"])
    assert len(read(notes)) == 2
    assert len(rows(out)) == 2


def test_slurm_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> None:
    path = write(tmp_path / "grid.yaml", slurm={"partitoin": "gpu"})
    for expected in ("srun", "partitoin"):
        failing(str(path), f"--out={tmp_path / 'out'}", "--cluster=slurm")
        assert expected in capsys.readouterr().err
        if expected == "srun":
            request.getfixturevalue("slurm")


def test_a_variant_that_is_no_mapping_is_named_before_its_figure(tmp_path: Path) -> None:
    content = {"variants": {"a": 3}, "grid": {"seed": [0]}, "figure": {"kind": "xy", "x": "seed", "y": "test/accuracy"}}
    with pytest.raises(ValueError, match="variant 'a': expected a mapping with keys out of configs, set, got 3"):
        SweepFile.read(write(tmp_path / "a.yaml", **content))


@pytest.mark.parametrize("x", ["distance", "data.distance", "weight", "data.canvas"])
def test_a_figure_may_use_options_by_either_name_and_settings_by_their_full_one(tmp_path: Path, x: str) -> None:
    grid = {"data.distance": [0, 8]}
    variants = {"a": {"set": {"model.weight": 0}}, "b": {"set": {"model.weight": 3}}}
    figure = {"kind": "xy", "x": x, "y": "test/accuracy"}
    assert len(SweepFile.read(write(tmp_path / "a.yaml", grid=grid, variants=variants, figure=figure)).runs()) == 4
    with pytest.raises(ValueError, match="distanse"):
        SweepFile.read(write(tmp_path / "b.yaml", grid=grid, figure={**figure, "x": "distanse"}))


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, notes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "out" / "a"
    run.mkdir(parents=True)
    (run / "last.ckpt").write_bytes(b"PK\x03\x04 cut off")
    with zipfile.ZipFile(run / "best.ckpt", "w") as file:
        file.writestr("a", "b")
    main(["sweep", str(write(tmp_path / "grid.yaml", variants={"a": None})), f"--out={tmp_path / 'out'}"])
    (note,) = read(notes)
    assert f"--ckpt_path={run / 'best.ckpt'}" in note["arguments"]
    assert "continues from best.ckpt" in capsys.readouterr().out
    assert (run / "last.ckpt").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("out: 3", "out must be a folder, got 3"),
        ("base: wrong.yaml", "leads back to the file itself"),
        ("out: s\nout: t", "'out' is given twice in the mapping of line 1"),
        ("[" * 3000 + "]" * 3000, "nest"),
        ("grid: {a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], b: *a, c: *a, d: *a, e: *a, f: *a}", "1,000,000 runs, more"),
        ("\n".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}' if k else 'x'] * 9)}]" for k in range(9)), "100,000 values"),
        ("set: &s {a: *s}", "100,000 values"),
    ],
)
def test_files_that_are_no_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    failing(str(tmp_path / "wrong.yaml"))
    assert message in capsys.readouterr().err
