"""Sweeps with runs that only pretend: who runs what, where, how often, and what SLURM is asked for."""

from __future__ import annotations

import csv
import fcntl
import io
import itertools
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import submitit
import torch
import yaml
from pytorch_lightning import Trainer
from rich.console import Console

from lightning_locality import sweep as sweeps
from lightning_locality.callbacks.stopping import StopOnceFitted
from lightning_locality.claim import Claim
from lightning_locality.cli import main
from lightning_locality.devices import Devices
from lightning_locality.interrupts import terminated_like_interrupted
from lightning_locality.jobs import LocalJobs, SlurmJobs
from lightning_locality.old_results import Progress, progress_table
from lightning_locality.run_job import RunJob, prepared
from lightning_locality.sweep import Run, Sweep

# takes the place of a run in its process: notes what it was given, takes its time, leaves a summary or fails
FAKE = """
import json, os, pathlib, sys, time
if sys.orig_argv[1:4] == ["-m", "lightning_locality", "fit"]:
    folder = pathlib.Path(next(a.split("=", 1)[1] for a in sys.orig_argv if a.startswith("--run_dir=")))
    note = {"run": folder.name, "start": time.time(), "arguments": sys.orig_argv[4:]}
    note["env"] = {k: v for k, v in os.environ.items() if k.startswith(("CUDA", "SLURM", "OMP", "MASTER"))}
    with open(os.environ["FAKE_NOTES"] + ".started", "a") as file:
        file.write(f"{os.getppid()} {os.getpid()}\\n")
    time.sleep(float(os.environ.get("FAKE_SECONDS", "0.2")))
    note["end"] = time.time()
    with open(os.environ["FAKE_NOTES"], "a") as file:
        file.write(json.dumps(note) + "\\n")
    if "bad" in folder.name:
        print("it broke", file=sys.stderr, flush=True)
        os._exit(2)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "summary.json.part"
    part.write_text(json.dumps({"metrics": {"test/accuracy": 0.5}, "epochs": 1, "seconds": 1.0}))
    os.replace(part, folder / "summary.json")
    os._exit(0)
"""


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """File with a line for every run that was started; runs pretend."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(FAKE)
    package = str(Path(sweeps.__file__).parent.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), package]))
    monkeypatch.setenv("FAKE_NOTES", str(tmp_path / "notes"))
    return tmp_path / "notes"


def read(notes: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in notes.read_text().splitlines()]


def write(path: Path, **content: object) -> Path:
    path.write_text(yaml.safe_dump({"devices": [], "parallel": 2, **content}, sort_keys=False))
    return path


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_devices_are_lent_in_groups_and_shared_evenly_when_short() -> None:
    devices = Devices(["a", "b", "c", "d", "e"], per_run=2)
    assert len(devices) == 2  # e stays idle
    taken = [devices.take() for _ in range(5)]
    assert Counter(taken) == {("a", "b"): 3, ("c", "d"): 2}
    devices.give(("a", "b"))
    devices.give(("a", "b"))
    assert devices.take() == ("a", "b")
    assert Devices([]).take() == ()
    Devices([]).give(())
    with pytest.raises(ValueError, match="devices_per_run is 3, but there are 2 devices"):
        Devices(["0", "1"], per_run=3)
    with pytest.raises(ValueError, match="once each"):
        Devices(["0", "0"])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Devices(["0"], per_run=0)


def test_visible_devices_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [Devices.here().take(), len(Devices.here())] == [("0",), 2]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-1f")
    assert Devices.here(per_run=2).take() == ("5", "GPU-1f")
    assert len(Devices.here(names=["1"])) == 1


def test_a_claim_ends_with_its_process_and_with_those_that_inherit_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / ".claim"
    assert not Claim.held(path)
    code = (
        "import sys, time; from pathlib import Path; from lightning_locality.claim import Claim; "
        "c = Claim(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    assert Claim.held(path)
    with pytest.raises(BlockingIOError):
        Claim(path)
    assert path.read_text().split()[1] == str(other.pid)
    other.kill()
    other.wait()
    other.stdout.close()
    assert not Claim.held(path)
    claim = Claim(path)
    child = subprocess.Popen(["sleep", "60"], pass_fds=[claim.descriptor])
    claim.release()
    assert Claim.held(path)
    child.kill()
    child.wait()
    assert not Claim.held(path)


def test_who_only_looks_takes_no_claim_from_a_job(tmp_path: Path) -> None:
    """A look has the lock for an instant; sweeps look at every run that waits, again and again."""
    path = tmp_path / ".claim"
    Claim(path).release()
    look = os.open(path, os.O_RDONLY)
    fcntl.flock(look, fcntl.LOCK_SH)
    threading.Timer(0.03, os.close, (look,)).start()
    Claim(path).release()


def test_a_file_system_without_locks_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("lightning_locality.claim.fcntl.flock", none)
    with pytest.warns(UserWarning, match="has no locks: start no second sweep"):
        Claim(tmp_path / ".claim").release()
    assert not Claim.held(tmp_path / ".claim")


def test_what_a_killed_start_left_is_cleared(tmp_path: Path) -> None:
    names = ("config.yaml", "config.0.yaml", "metrics.csv", "best.ckpt")
    for name in (*names, ".claim", "note.txt"):
        (tmp_path / name).write_text("a,b\n1,2\n3,")
    (tmp_path / "last.ckpt").write_bytes(b"PK\x03\x04 cut off")
    assert prepared(tmp_path) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [".claim", "note.txt"]
    with zipfile.ZipFile(tmp_path / "last.ckpt", "w") as file:
        file.writestr("a", "b")
    (tmp_path / "metrics.csv").write_text("a,b\n1,2\n3,")
    assert prepared(tmp_path) == tmp_path / "last.ckpt"
    assert (tmp_path / "metrics.csv").read_text() == "a,b\n1,2\n"


def test_a_job_leaves_alone_what_others_hold_or_have_finished(tmp_path: Path, notes: Path) -> None:
    run = Run("v", {}, ("fit", f"--run_dir={tmp_path / 'r'}"), tmp_path / "r")
    with Claim(run.claim):
        assert RunJob(run)() == "taken"
    assert not notes.exists()
    assert RunJob(run, ("3", "4"), 2)() == "finished"
    (note,) = read(notes)
    assert (note["env"]["CUDA_VISIBLE_DEVICES"], note["env"]["OMP_NUM_THREADS"]) == ("3,4", "2")
    assert RunJob(run)() == "finished"
    assert len(read(notes)) == 1
    bad = Run("v", {}, ("fit", f"--run_dir={tmp_path / 'bad'}"), tmp_path / "bad")
    assert [RunJob(bad)(), RunJob(bad)()] == ["failed", "failed"]  # is tried again
    assert Counter(note["run"] for note in read(notes)) == {"r": 1, "bad": 2}


def test_what_killed_a_run_is_in_its_log(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "60")
    run = Run("v", {}, ("fit", f"--run_dir={tmp_path / 'r'}"), tmp_path / "r")
    start = subprocess.Popen

    def killed(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        process = start(*args, **options)
        process.kill()
        return process

    monkeypatch.setattr("lightning_locality.run_job.subprocess.Popen", killed)
    assert RunJob(run)() == "failed"
    assert "ended by signal 9 (Killed)" in capfd.readouterr().err


def test_a_run_interrupted_while_it_is_started_ends(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "60")
    run = Run("v", {}, ("fit", f"--run_dir={tmp_path / 'r'}"), tmp_path / "r")
    start = subprocess.Popen
    started = []

    def interrupted(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        process = start(*args, **options)
        started.append(process)
        os.kill(os.getpid(), signal.SIGINT)
        return process

    monkeypatch.setattr("lightning_locality.run_job.subprocess.Popen", interrupted)
    # also where the tests run in the background of a script, which ignores interrupts
    with pytest.raises(KeyboardInterrupt), terminated_like_interrupted():
        RunJob(run)()
    assert [process.poll() for process in started] == [-signal.SIGTERM]
    assert not Claim.held(run.claim)


def test_a_job_whose_time_is_up_is_queued_again(tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM signals the job and what it has started; here submitit's local jobs stand for it."""
    monkeypatch.setenv("FAKE_SECONDS", "1.5")
    run = Run("v", {}, ("fit", f"--run_dir={tmp_path / 'r'}"), tmp_path / "r")
    executor = submitit.AutoExecutor(tmp_path / "log", "local")
    executor.update_parameters(timeout_min=60)
    job = executor.submit(RunJob(run))
    started = Path(f"{notes}.started")  # the process of the job, and that of the run
    while not started.exists() or not started.read_text().endswith("\n"):
        assert not job.done()
        time.sleep(0.02)
    for process in started.read_text().split():
        os.kill(int(process), signal.SIGUSR2)
    assert job.result() == "finished"
    assert "preempted" in job.stderr()
    assert len(started.read_text().splitlines()) == 2
    assert len(read(notes)) == 1  # the first start did not come to its end


def test_local_runs_share_the_devices(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "1")  # as in an allocation, where Lightning would start nothing by itself
    path = write(tmp_path / "grid.yaml", devices=[6, 7], parallel=None, grid={"data.seed": [0, 1, 2, 3]})
    main(["sweep", str(path), f"--out={tmp_path / 'out'}"])
    found = read(notes)
    assert sorted(note["run"] for note in found) == [f"run-seed={n}" for n in range(4)]
    for device in ("6", "7"):
        own = sorted((n["start"], n["end"]) for n in found if n["env"]["CUDA_VISIBLE_DEVICES"] == device)
        assert len(own) >= 1
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(own))
    assert {n["env"]["CUDA_VISIBLE_DEVICES"] for n in found} == {"6", "7"}
    assert not any(name.startswith("SLURM") for note in found for name in note["env"])
    assert len(rows(tmp_path / "out")) == 4
    last = [line for line in capsys.readouterr().out.splitlines() if line.startswith("finished: run-seed=")][-1]
    assert "4 done, 0 running, 0 failed, 0 waiting" in last


def test_several_devices_per_run(tmp_path: Path, notes: Path) -> None:
    path = write(tmp_path / "grid.yaml", devices=[4, 5, 6, 7], parallel=None, devices_per_run=2, grid={"a.b": [0, 1]})
    main(["sweep", str(path), f"--out={tmp_path / 'out'}"])
    found = {note["env"]["CUDA_VISIBLE_DEVICES"]: note["arguments"] for note in read(notes)}
    assert found.keys() == {"4,5", "6,7"}
    assert all("--trainer.devices=2" in arguments for arguments in found.values())


def test_two_sweeps_at_once_run_everything_once(tmp_path: Path, notes: Path) -> None:
    path = write(tmp_path / "grid.yaml", grid={"data.seed": list(range(4))})
    command = [sys.executable, "-m", "lightning_locality", "sweep", str(path), f"--out={tmp_path / 'out'}"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    for process in both:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        assert "4 of 4" in output
    assert Counter(note["run"] for note in read(notes)) == {f"run-seed={n}": 1 for n in range(4)}
    assert [row["seed"] for row in rows(tmp_path / "out")] == [str(n) for n in range(4)]


def test_a_killed_sweep_goes_on(tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed with its runs, and killed alone, when the runs go on and the next sweep waits for them."""
    path = write(tmp_path / "grid.yaml", grid={"data.seed": list(range(4))})
    command = [sys.executable, "-m", "lightning_locality", "sweep", str(path), f"--out={tmp_path / 'out'}"]
    claims = [tmp_path / "out" / f"run-seed={n}" / ".claim" for n in range(4)]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    monkeypatch.setenv("FAKE_SECONDS", "1.5")
    for alone in (False, True):
        process = subprocess.Popen(command, start_new_session=True, **quiet)
        deadline = time.monotonic() + 60
        while not any(Claim.held(claim) for claim in claims):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        if alone:
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    monkeypatch.setenv("FAKE_SECONDS", "0.1")
    subprocess.run(command, check=True, timeout=120, **quiet)
    assert Counter(note["run"] for note in read(notes)) == {f"run-seed={n}": 1 for n in range(4)}
    assert len(rows(tmp_path / "out")) == 4


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_runs_end_with_a_sweep_that_is_stopped(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch, how: signal.Signals
) -> None:
    path = write(tmp_path / "grid.yaml", grid={"data.seed": [0, 1]})
    command = [sys.executable, "-m", "lightning_locality", "sweep", str(path), f"--out={tmp_path / 'out'}"]
    claims = [tmp_path / "out" / f"run-seed={n}" / ".claim" for n in range(2)]
    monkeypatch.setenv("FAKE_SECONDS", "120")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not all(Claim.held(claim) for claim in claims):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(how)
    said, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.endswith("interrupted: 0 of 2 runs are finished; the same command goes on from there\n")
    assert "Traceback" not in errors
    while any(Claim.held(claim) for claim in claims):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not notes.exists()


def test_runs_end_with_a_sweep_that_is_stopped_while_it_starts_them(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "grid.yaml", grid={"data.seed": [0, 1]})
    claims = [tmp_path / "out" / f"run-seed={n}" / ".claim" for n in range(2)]
    monkeypatch.setenv("FAKE_SECONDS", "120")
    deadline = time.monotonic() + 60
    submit = LocalJobs.submit

    def interrupted(jobs: LocalJobs, runs: Any) -> Any:
        submitted = submit(jobs, runs)
        while not all(Claim.held(claim) for claim in claims):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
        return submitted

    monkeypatch.setattr(LocalJobs, "submit", interrupted)
    with pytest.raises(SystemExit, match="130"):
        main(["sweep", str(path), f"--out={tmp_path / 'out'}"])
    while any(Claim.held(claim) for claim in claims):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not notes.exists()


# a SLURM of one machine: the tasks of an array one after the other, at once
SBATCH = """#!{python}
import os, re, subprocess, sys
script = open(sys.argv[1]).read()
open({folder!r} + "/sbatch.txt", "a").write(script + "\\n=====\\n")
array = re.search(r"--array=0-(\\d+)", script)
for task in range(int(array.group(1)) + 1 if array else 1):
    env = dict(os.environ, SLURM_JOB_ID=str(900 + task), SLURM_PROCID="0", SLURM_NTASKS="1", SLURM_JOB_NAME="submitit")
    if array:
        env.update(SLURM_ARRAY_JOB_ID="77", SLURM_ARRAY_TASK_ID=str(task))
    subprocess.Popen(["bash", sys.argv[1]], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("Submitted batch job", 77 if array else 900)
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
import pathlib
state = pathlib.Path({folder!r}, "state")
print("JobID|State|NodeList")
for task in range(9):
    print(f"77_{{task}}|{{state.read_text() if state.exists() else 'RUNNING'}}|node")
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder with what sbatch was given; the programs of SLURM are on the path, and pretend."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT)):
        program = folder / name
        program.write_text(text.format(python=sys.executable, folder=str(folder)))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(SlurmJobs, "poll", 0.3)
    return folder


def test_slurm_is_asked_for_one_array(
    tmp_path: Path, notes: Path, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"partition": "gpu", "time": 90, "cpus_per_task": 8, "mem": "32GB", "array_parallelism": 2}
    path = write(
        tmp_path / "grid.yaml",
        cluster="slurm",
        slurm={**options, "account": "science"},
        devices_per_run=4,
        variants={"good": {}, "bad": {}},
        grid={"data.seed": [0, 1]},
    )
    with pytest.raises(SystemExit):
        main(["sweep", str(path), f"--out={tmp_path / 'out'}"])
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


def test_a_sweep_on_slurm_follows_the_jobs_of_an_earlier_one(tmp_path: Path, notes: Path, slurm: Path) -> None:
    plan = Sweep.read(write(tmp_path / "grid.yaml", cluster="slurm", grid={"a.seed": [0, 1, 2]}), tmp_path / "out")
    for number, run in enumerate(plan.runs):
        run.folder.mkdir(parents=True)
        if number < 2:
            (run.folder / ".job").write_text(f"77_{number}")
    jobs = SlurmJobs(plan)
    (slurm / "state").write_text("PENDING")
    assert [one.run.folder for one in jobs.found(plan.runs)] == [run.folder for run in plan.runs[:2]]
    assert [jobs.state(one) for one in jobs.found(plan.runs)] == ["queued", "queued"]
    jobs.found(plan.runs)[0].job.watcher.clear()
    (slurm / "state").write_text("CANCELLED by 3")
    assert jobs.found(plan.runs) == []


@pytest.mark.parametrize(
    ("content", "expected"),
    [
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
        Sweep.read(write(tmp_path / "grid.yaml", **content))


def test_gpus_of_a_kind_are_left_to_submitit(tmp_path: Path, slurm: Path) -> None:
    options = {"gpus_per_node": "a100:2"}
    plan = Sweep.read(write(tmp_path / "grid.yaml", slurm=options, devices_per_run=2), tmp_path / "out")
    with pytest.raises(ValueError, match="gpus_per_node"):
        SlurmJobs(plan)


def test_slurm_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> None:
    path = write(tmp_path / "grid.yaml", slurm={"partitoin": "gpu"})
    for expected in ("srun", "partitoin"):
        with pytest.raises(SystemExit):
            main(["sweep", str(path), f"--out={tmp_path / 'out'}", "--cluster=slurm"])
        assert expected in capsys.readouterr().err
        if expected == "srun":
            request.getfixturevalue("slurm")


def test_axes_that_share_their_last_word_keep_their_names(tmp_path: Path) -> None:
    plan = Sweep.read(write(tmp_path / "grid.yaml", grid={"data.seed": [0, 1], "model.seed": [0, 1], "a.size": [8]}))
    assert dict(plan.runs[1].point) == {"data.seed": 0, "model.seed": 1, "size": 8}
    assert plan.runs[1].folder.name == "run-data.seed=0-model.seed=1-size=8"


def test_dry_run_says_what_has_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "grid.yaml", grid={"a.seed": [0, 1]})
    (tmp_path / "out" / "run-seed=0").mkdir(parents=True)
    (tmp_path / "out" / "run-seed=0" / "summary.json").write_text("{}")
    main(["sweep", str(path), f"--out={tmp_path / 'out'}", "--dry-run"])
    assert [line.endswith("  # finished") for line in capsys.readouterr().out.splitlines()] == [True, False]


def test_other_settings_of_a_finished_run_are_said(
    tmp_path: Path, notes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "grid.yaml", set={"trainer.max_epochs": 1})
    main(["sweep", str(path), f"--out={tmp_path / 'out'}"])
    assert "other settings" not in capsys.readouterr().out
    write(path, set={"trainer.max_epochs": 2})
    main(["sweep", str(path), f"--out={tmp_path / 'out'}"])
    shown = capsys.readouterr().out
    assert "run was started with other settings (--trainer.max_epochs=1, --trainer.max_epochs=2)" in shown
    assert len(read(notes)) == 1


def test_other_settings_of_a_run_that_goes_on_are_said(
    tmp_path: Path, notes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out" / "run"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "last.ckpt", "w") as file:
        file.writestr("a", "b")
    (folder / ".settings.json").write_text(json.dumps(["--trainer.max_epochs=1"]))
    path = write(tmp_path / "grid.yaml", set={"trainer.max_epochs": 2})
    main(["sweep", str(path), f"--out={tmp_path / 'out'}"])
    assert "and goes on with the new ones" in capsys.readouterr().out
    (note,) = read(notes)
    assert {"--trainer.max_epochs=2", f"--ckpt_path={folder / 'last.ckpt'}"} <= set(note["arguments"])


def test_sweeps_that_begin_together_note_the_settings_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    note = sweeps._report_other_settings
    monkeypatch.setattr(
        sweeps,
        "_report_other_settings",
        lambda plan, console: (held.append(Claim.held(plan.folder / ".collect")), note(plan, console)),
    )
    (tmp_path / "out" / "run").mkdir(parents=True)
    (tmp_path / "out" / "run" / "summary.json").write_text('{"metrics": {}}')
    main(["sweep", str(write(tmp_path / "grid.yaml")), f"--out={tmp_path / 'out'}"])
    assert held == [True]


def test_the_jobs_of_two_sweeps_have_files_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Submitit names them by process, of which another machine, or this one later, may have the same number."""
    plan = Sweep.read(write(tmp_path / "grid.yaml"), tmp_path / "out")
    folders = {LocalJobs(plan, 1).executor.folder}
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    folders.add(LocalJobs(plan, 1).executor.folder)
    assert len(folders) == 2
    assert {folder.parent for folder in folders} == {tmp_path / "out" / "log"}


def test_a_number_that_is_being_written_does_not_stop_the_table(tmp_path: Path) -> None:
    run = Run("v", {}, (), tmp_path)
    whole = "epoch,step,train/accuracy\n0,3,0.5\n1,7,2.5e-01\n"
    for size in range(len(whole) + 1):
        (tmp_path / "metrics.csv").write_text(whole[:size])
        table = progress_table([run], [(run, "running")], Progress([run], 1))
    assert list(table.columns[2].cells) == ["epoch 2, training 25 %"]


def test_the_title_of_the_table_is_one_line(tmp_path: Path) -> None:
    run, progress = Run("v", {}, (), tmp_path), Progress([], 1, lambda: 0.0)
    progress.update([])
    console = Console(width=100, file=io.StringIO())
    console.print(progress_table([run], [], progress))
    assert "0 done, 0 running, 0 failed, 0 waiting; 0 s" in console.file.getvalue()


def test_progress_counts_and_estimates(tmp_path: Path) -> None:
    now = [100.0]
    runs = [Run("v", {}, (), tmp_path / str(n)) for n in range(6)]
    progress = Progress(runs, 2, lambda: now[0])
    states = [(runs[0], "running"), (runs[1], "running")]
    progress.update(states)
    assert str(progress) == "0 done, 2 running, 0 failed, 4 waiting; 0 s"
    now[0] = 110.0
    runs[0].folder.mkdir()
    (runs[0].folder / "summary.json").write_text("{}")
    progress.update([(runs[1], "running"), (runs[2], "running")])
    # run 1 has used up the 10 s of the first; run 2 and the three that wait need 40 s on two places
    assert str(progress) == "1 done, 2 running, 0 failed, 3 waiting; 10 s, about 20 s left"
    now[0] = 120.0
    progress.update([(runs[1], "failed"), *((run, "failed") for run in runs[2:])])
    assert str(progress) == "1 done, 0 running, 5 failed, 0 waiting; 20 s, about 0 s left"


def test_a_run_that_had_stopped_once_fitted_has_no_epoch_to_go() -> None:
    callback, trainer = StopOnceFitted(checks=2), Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
    module: Any = SimpleNamespace()
    callback.load_state_dict({"count": 1})
    callback.on_train_start(trainer, module)
    assert not trainer.should_stop
    callback.load_state_dict({"count": 2})
    callback.on_train_start(trainer, module)
    assert trainer.should_stop
