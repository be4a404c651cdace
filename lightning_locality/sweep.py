"""Sweeps: a grid of runs from a YAML file, each in its own process here or on SLURM, collected in ``results.csv``."""

from __future__ import annotations

__all__ = ["sweep"]

import itertools
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

import pandas as pd
from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table

from lightning_locality.results import IN_USE, PARENT_PIPE, atomic_write, read_runs, write_results
from lightning_locality.sweep_file import Cluster, Run, SweepFile

Outcome = Literal["finished", "failed", "stopped", "held"]
Submit = Callable[[Sequence[Run]], Sequence[Any]]  # returns something with done(), result() and exception() per run

_POLL = {"local": 0.2, "slurm": 5.0}  # seconds between looks at the runs
_PATIENCE = 10.0  # seconds that an interrupted run has to end by itself
_REQUEUES = 50  # times that SLURM may requeue a job that has run out of time
_LOG_LINES = 6
# left by a run that was killed before its first checkpoint; they would stop the next attempt
_TRACES = ("config*.yaml", "metrics.csv", "best.ckpt", "last.ckpt")
# heading, column, factor and format of the closing table
_ACCURACY = [
    ("training", "train/accuracy", 100.0, ".1f"),
    ("test", "test/accuracy", 100.0, ".1f"),
    ("R on test", "test/regularizer", 1.0, ".2f"),
]
_RECOVERY = [
    ("training loss", "train/loss", 1.0, ".2g"),
    ("test loss", "test/loss", 1.0, ".2g"),
    ("error", "reconstruction_error", 1.0, ".2g"),
    ("iterations", "iterations", 1.0, ".0f"),
]


def sweep(
    grid: Path,
    out: Path | None = None,
    parallel: int | None = None,
    cluster: Cluster | None = None,
    dry_run: bool = False,
) -> None:
    """Run every point of a grid in its own process, and collect the results.

    Finished runs are skipped, killed ones continue from their last checkpoint, and those of another sweep are left to
    it. A failed run is reported with the end of its log and does not stop the others.

    Args:
        grid: YAML file that describes the runs, or the name of one that comes with the package (quickstart.yaml).
        out: Folder for the runs and their results.csv (default: the file's own).
        parallel: Runs at a time on this machine, which share its cores and GPUs (default: the file's own, or one per
            group of devices_per_run GPUs, or per core without GPUs).
        cluster: This machine (local) or SLURM (slurm), which runs them as one array of jobs (default: the file's own).
        dry_run: Print the commands instead of running them.
    """
    plan = SweepFile.read(grid, out, parallel=parallel, cluster=cluster)
    runs = plan.runs()
    if dry_run:
        for run in runs:
            print(shlex.join(["lightning-locality", *run.arguments]) + ("  # finished" if run.finished else ""))
        return
    console = Console(soft_wrap=True, markup=False, highlight=False)
    for run in runs:
        if changes := _changed_settings(run):
            now = "is kept" if run.finished else "continues with the new ones"
            started = f"{run.folder.name} was started with other settings ({changes})"
            console.print(f"{started} and {now}: remove its folder to run it anew")
    workers = _slurm(plan) if plan.cluster == "slurm" else _this_machine(plan)
    # terminated like interrupted, and interrupted even in the background of a script, which ignores it
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with workers as submit:
            failed = _run_all(runs, submit, console, _POLL[plan.cluster])
    except KeyboardInterrupt:
        done = sum(run.finished for run in runs)
        console.print(f"interrupted: {done} of {len(runs)} runs are finished; re-run the same command to resume")
        raise SystemExit(130) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    from lightning_locality.plotting.command import plot_sweep_figure  # here because matplotlib takes a second

    labels = {run.folder: run.labels for run in runs}
    with FileLock(plan.folder / ".lock"):  # another sweep of this folder may end at the same time
        write_results(plan.folder / "results.csv", labels)
        # without a terminal rich would wrap the table at 80 columns
        wide = Console(width=None if console.is_terminal else 130)
        frame = read_runs(list(labels), labels)
        wide.print(_result_table(frame))
        for folder, log in failed.items():
            console.print(f"failed: {folder.name}\n{log}")
        picture = plot_sweep_figure(plan.figure, frame, plan.folder)
    files = f"results.csv, {picture.name}" if picture else "results.csv"
    console.print(f"In {plan.folder}: {files}, and a folder for every run, with its own figures (figures/*.png).")
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(runs)} runs failed; re-run the same command to try them again and skip the rest"
        )


def _run_all(runs: Sequence[Run], submit: Submit, console: Console, poll: float) -> dict[Path, str]:
    """Run what has not finished; return the ends of the logs of the failed runs by directory."""
    waiting, jobs, failed = list(runs), list[tuple[Run, Any]](), dict[Path, str]()
    started, before = time.monotonic(), sum(run.finished for run in runs)

    def progress() -> str:
        done, seconds = sum(run.finished for run in runs), time.monotonic() - started
        left = len(runs) - done - len(failed)
        rest = f", about {_duration(seconds / (done - before) * left)} left" if done > before else ""
        return f"{done} done, {len(failed)} failed, {left} to go; {_duration(seconds)}{rest}"

    with console.status("") as status:
        while True:
            waiting = [run for run in waiting if not run.finished]
            if free := [run for run in waiting if not run.held]:
                waiting = [run for run in waiting if run not in free]
                jobs += zip(free, submit(free), strict=True)
            if not (waiting or jobs):
                return failed
            if console.is_terminal:
                status.update(progress())
            time.sleep(poll)
            for run, job in [(run, job) for run, job in jobs if job.done()]:
                jobs.remove((run, job))
                error = None if run.finished else job.exception()
                outcome = "finished" if run.finished else "failed" if error else job.result()
                if outcome == "held":
                    waiting.append(run)
                    continue
                if outcome == "failed":
                    log = str(error) if error else (run.folder / "log.txt").read_text(errors="replace")
                    failed[run.folder] = "\n".join(log.strip().splitlines()[-_LOG_LINES:]) or "no log"
                if outcome == "stopped" or not console.is_terminal:
                    console.print(f"{outcome}: {run.folder.name} ({progress()})")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@contextmanager
def _this_machine(plan: SweepFile) -> Iterator[Submit]:
    """Run in threads, each with one subprocess at a time on a group of devices; at the end, end what still runs."""
    groups, size = _device_groups(plan), plan.devices_per_run
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    places = plan.parallel or len(groups) or max(1, cores // size)
    threads = str(max(1, cores // (places * size)))
    variables = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
    free: queue.Queue[tuple[str, ...]] = queue.Queue()
    for group in itertools.islice(itertools.cycle(groups or [()]), places):
        free.put(group)
    stopped = False

    def fit(run: Run) -> Outcome:
        group = free.get()
        try:
            return _fit(run, variables | ({"CUDA_VISIBLE_DEVICES": ",".join(group)} if group else {}), lambda: stopped)
        finally:
            free.put(group)

    pool = ThreadPoolExecutor(places)
    try:
        yield lambda runs: [pool.submit(fit, run) for run in runs]
    finally:
        stopped = True
        pool.shutdown(cancel_futures=True)


def _device_groups(plan: SweepFile) -> list[tuple[str, ...]]:
    """Group the GPUs that this process may use by ``devices_per_run``; those that fill no group stay idle."""
    if plan.devices is not None:
        names = [str(device) for device in plan.devices]
    else:
        import torch  # here because it takes a second or two; counting creates no CUDA context

        count = torch.cuda.device_count()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = [name.strip() for name in visible.split(",")][:count] if visible else [str(n) for n in range(count)]
    size = plan.devices_per_run
    if len({*names}) < len(names):
        raise ValueError(f"devices must be named once each, got {', '.join(names)}")
    if names and len(names) < size:
        raise ValueError(f"devices_per_run is {size}, but there are {len(names)} devices ({', '.join(names)})")
    return [tuple(names[start : start + size]) for start in range(0, len(names) - size + 1, size)]


@contextmanager
def _slurm(plan: SweepFile) -> Iterator[Submit]:
    """Run as the jobs of an array on SLURM, which do not end with this process."""
    import submitit

    options = {"job_name": plan.folder.name, **plan.slurm}
    if plan.devices_per_run > 1 and not options.keys() & {"gpus_per_node", "gpus_per_task", "gres"}:
        options["gpus_per_node"] = plan.devices_per_run
    # submitit's own names, which its executor for SLURM takes in SLURM's words
    if "timeout_min" in options:
        options["time"] = options.pop("timeout_min")
    if "mem_gb" in options:
        options["mem"] = f"{options.pop('mem_gb')}GB"
    try:
        executor = submitit.SlurmExecutor(plan.folder / "log", max_num_timeout=_REQUEUES)
        executor.update_parameters(**options)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"slurm: {error}") from error
    numbers = set[str]()

    def submit(runs: Sequence[Run]) -> Sequence[Any]:
        jobs = executor.map_array(_SlurmJob(), runs)
        numbers.update(str(job.job_id).split("_")[0] for job in jobs)
        return jobs

    try:
        yield submit
    except KeyboardInterrupt:
        if numbers:
            print(f"jobs {', '.join(sorted(numbers))} stay with SLURM: squeue shows them, scancel ends them")
        raise


class _SlurmJob:
    """A run as a job; when its time is up submitit requeues it, and it continues from its last checkpoint."""

    def __call__(self, run: Run) -> Outcome:
        # SLURM sends the signal that time is up to the run as well, which leaves it to the job
        return _fit(run, {}, prefix=("sh", "-c", "trap '' USR2; exec \"$@\"", "sh"))

    def checkpoint(self, run: Run) -> Any:
        """Requeue the same job."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, run)


def _fit(
    run: Run, variables: Mapping[str, str], stopped: Callable[[], bool] = lambda: False, prefix: Sequence[str] = ()
) -> Outcome:
    """Fit in a subprocess, continuing from the last checkpoint of a run that was killed."""
    try:
        # the run locks its directory itself, but only seconds after its start
        with run.lock(".claim"):
            with run.lock():
                if run.finished:
                    return "finished"
                resumed = _prepare(run)
            with (run.folder / "log.txt").open("ab") as log:
                command = [*prefix, sys.executable, "-m", "lightning_locality", *run.arguments, *resumed]
                code = _call(command, variables, log, stopped)
                if code < 0:
                    log.write(f"ended by signal {-code} ({signal.strsignal(-code)})\n".encode())
            return "finished" if run.finished else "held" if code == IN_USE else "failed" if code else "stopped"
    except Timeout:
        return "held"


def _call(command: Sequence[str], variables: Mapping[str, str], log: IO[bytes], stopped: Callable[[], bool]) -> int:
    """Run a command to its end, or until it is stopped; return its exit status.

    At the end of the pipe that is its standard input it exits: it does not outlive this process, even if killed.
    """
    # inside a job a run starts its own processes; SLURM's variables would keep Lightning from it
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
    ours = {"PYTHONUNBUFFERED": "1", PARENT_PIPE: "1"}
    process = subprocess.Popen(
        command, env={**inherited, **ours, **variables}, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
    )
    try:
        while process.poll() is None and not stopped():
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
    finally:
        process.terminate()
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()  # closes the pipe
    return process.returncode


def _prepare(run: Run) -> list[str]:
    """Return the option that continues a killed run; for any other, clear what a killed start left."""
    checkpoints = [path for name in ("last.ckpt", "best.ckpt") if (path := run.folder / name).exists()]
    for path in checkpoints:
        # writing it may have been cut off if the directory is not on the file system of the temporary files
        if zipfile.is_zipfile(path):
            if path.name == "best.ckpt":
                print(f"{run.folder}/last.ckpt is missing or damaged; the run continues from best.ckpt")
            return [f"--ckpt_path={path}"]
    if checkpoints:
        print(f"{checkpoints[0]} is damaged and the run starts anew; what it had is kept in {run.folder}/damaged")
        (run.folder / "damaged").mkdir(exist_ok=True)
    for path in itertools.chain.from_iterable(run.folder.glob(pattern) for pattern in _TRACES):
        if checkpoints:
            path.replace(run.folder / "damaged" / path.name)
        else:
            path.unlink()
    with atomic_write(run.folder / ".settings.json") as file:
        json.dump(run.settings, file)
    return []


def _changed_settings(run: Run) -> str:
    """Describe the options of a started run that differ from the sweep's; empty if none does."""
    path = run.folder / ".settings.json"
    if not path.is_file() or not (run.finished or (run.folder / "last.ckpt").exists()):
        return ""
    old, new = (dict(a[2:].split("=", 1) for a in own) for own in (json.loads(path.read_text()), run.settings))
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return "; ".join(f"{name}: was {old.get(name, 'not set')}, now {new.get(name, 'not set')}" for name in names)


def _result_table(runs: pd.DataFrame) -> Table:
    """Tabulate accuracies, or else losses and errors, by everything that varied but seeds."""
    what, columns = "accuracy in %, last epoch", _ACCURACY
    if "iterations" in runs and "test/accuracy" not in runs:
        what = "loss and reconstruction error, last measurement"
        columns = [column for column in _RECOVERY if column[1] in runs]
    elif several := [str(name) for name in runs if str(name).startswith("test/regularizer/")]:
        own = [(f"R on test, {name.split('/', 2)[2]}", name, 1.0, ".2f") for name in several]
        columns = [column for column in _ACCURACY if column[1] in runs or column[1] != "test/regularizer"] + own
    table = Table("run", title=f"{what}: mean (lowest to highest)")
    for heading in ("finished", *(heading for heading, *_ in columns), "seconds"):
        table.add_column(heading, justify="right")
    varied = [name for name in runs.attrs["varied"] if not name.endswith(("seed", "seed_everything"))]
    keys = [name for name in varied if runs[name].nunique(dropna=False) > 1] or ["variant"]
    for point, group in runs.groupby(keys, sort=False, dropna=False):
        name = ", ".join(str(v) if key == "variant" else f"{key}={v}" for key, v in zip(keys, point, strict=True))
        done = group[group["finished"]]
        cells = [_spread(done, key, scale, digits) for _, key, scale, digits in columns]
        seconds = _spread(done, "seconds", 1, ".0f").partition(" ")[0]  # without the range
        table.add_row(name, f"{len(done)} of {len(group)}", *cells, seconds)
    return table


def _spread(runs: pd.DataFrame, key: str, scale: float, digits: str) -> str:
    if key not in runs or runs[key].isna().all():
        return "-"
    values = scale * runs[key]
    mean = f"{values.mean(skipna=False):{digits}}"
    return mean if len(values) == 1 else f"{mean} ({values.min():{digits}} to {values.max():{digits}})"
