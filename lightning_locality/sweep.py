"""A grid of runs, each a process of its own on submitit."""

from __future__ import annotations

__all__ = ["Run", "Sweep", "sweep"]

import json
import os
import shlex
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import submitit
from rich.console import Console
from rich.live import Live

from lightning_locality.claim import Claim
from lightning_locality.devices import Devices
from lightning_locality.results import Progress, collect, progress_table, result_table
from lightning_locality.run_job import RunJob
from lightning_locality.sweep_plan import Run, Sweep
from lightning_locality.whole import written_whole

_POLL = {"local": 0.5, "slurm": 5.0}  # seconds between looks at the jobs
_LOG_LINES = 6
_TABLE_WIDTH = 130
_WEEK = 7 * 24 * 60  # minutes
_REQUEUES = 50  # times that a job on SLURM may run out of its time and go on
_ALIVE = ("PENDING", "RUNNING", "REQUEUED", "SUSPENDED", "CONFIGURING", "COMPLETING", "PREEMPTED")


def sweep(
    grid: Path,
    out: Path | None = None,
    parallel: int | None = None,
    cluster: Literal["local", "slurm"] | None = None,
    dry_run: bool = False,
) -> None:
    """Run every point of a grid in a process of its own, and collect the results.

    A run that has finished is skipped, one that was killed continues from its last checkpoint, one that another
    sweep works on is left to it, and one that fails is reported with the last lines of its log and does not stop the
    others.

    Args:
        grid: YAML file that describes the runs (see configs/sweeps/quickstart.yaml for an example).
        out: Folder for the runs and their results.csv; the file's own if not given.
        parallel: Runs at a time on this machine; if not given the file's own, or one per GPU (per group of
            devices_per_run GPUs), or per core where there are no GPUs. The cores are shared out; so are the GPUs.
        cluster: This machine (local) or SLURM (slurm), where the runs are the jobs of one array; the file's own if
            not given.
        dry_run: Print the commands instead of running them.
    """
    plan = Sweep.read(grid, out)
    if dry_run:
        for run in plan.runs:
            print(shlex.join(["lightning-locality", *run.arguments]) + ("  # finished" if run.finished else ""))
        return
    if parallel is not None and parallel < 1:
        raise ValueError(f"parallel must be at least 1, got {parallel}")
    jobs: _Jobs = _Slurm(plan) if (cluster or plan.cluster) == "slurm" else _Local(plan, parallel or plan.parallel)
    plan.folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    # one sweep at a time: two may begin or end together
    alone = plan.folder / ".collect"
    with Claim(alone, wait=True):
        _report_other_settings(plan, console)
    failed = _run_all(plan, jobs, console)
    with Claim(alone, wait=True):
        rows = collect(plan.runs, plan.folder / "results.csv")
    # where there is no terminal rich would wrap the table at 80 columns
    wide = console if console.is_terminal else Console(width=_TABLE_WIDTH)
    wide.print(result_table(plan.runs, rows))
    for run, log in failed:
        console.print(f"failed: {run.folder.name}\n{log}", soft_wrap=True, markup=False)
    with Claim(alone, wait=True):
        picture = plan.figure.save(plan.runs, plan.folder)
    shown = f", {picture.name}" if picture else ""
    folders = "a folder for every run, with figures of its own (figures/*.png)"
    console.print(f"In {plan.folder}: results.csv{shown}, and {folders}.", soft_wrap=True)
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(plan.runs)} runs failed; the same command tries them again and skips the rest"
        )


@final
@dataclass(frozen=True)
class _Submitted:
    """A run whose job has been submitted."""

    run: Run
    job: Any
    devices: tuple[str, ...] = ()

    def outcome(self) -> str:
        """How it ended."""
        if self.run.finished:
            return "finished"
        # waits for the result where the file system is slow, and says what killed the job where there is none
        return "failed" if self.job.exception() else str(self.job.result())

    def end_of_log(self) -> str:
        """Last lines of what it wrote."""
        text = (self.job.stderr() or self.job.stdout() or "").strip()
        return "\n".join(text.splitlines()[-_LOG_LINES:]) or f"no log (state {self.job.state})"


@final
class _Local:
    """Jobs on this machine: as many as there is place for."""

    poll = _POLL["local"]

    def __init__(self, plan: Sweep, parallel: int | None) -> None:
        self.devices = Devices.here(plan.devices_per_run, plan.devices)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.places = parallel or len(self.devices) or max(1, cores // plan.devices_per_run)
        self.at_once = self.places
        share = max(1, cores // (self.places * plan.devices_per_run))
        self.threads = None if "OMP_NUM_THREADS" in os.environ else share
        # submitit names its files by process, and another sweep or machine may have a process of the same number
        own = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{socket.gethostname()}_{os.getpid()}"
        self.executor = submitit.AutoExecutor(folder=plan.folder / "log" / own, cluster="local")
        self.executor.update_parameters(timeout_min=_WEEK)

    def submit(self, runs: Sequence[Run]) -> list[_Submitted]:
        """Start runs, no more than there is place for."""
        submitted = []
        for run in runs:
            devices = self.devices.take()
            job = self.executor.submit(RunJob(run, devices, self.threads))
            submitted.append(_Submitted(run, job, devices))
        return submitted

    def done(self, submitted: _Submitted) -> bool:
        """Whether a job has ended; its devices are free again then."""
        if not submitted.job.done():
            return False
        self.devices.give(submitted.devices)
        return True

    def state(self, submitted: _Submitted) -> str:
        """What a job is doing."""
        return "running"

    def found(self, runs: Sequence[Run]) -> list[_Submitted]:
        """Nothing: what an earlier sweep has started here holds its claim."""
        return []

    def interrupted(self, running: Sequence[_Submitted]) -> None:
        """Runs end with the sweep."""
        for submitted in running:
            submitted.job.cancel()


@final
class _Slurm:
    """Jobs of one array on SLURM: all at once."""

    poll = _POLL["slurm"]

    def __init__(self, plan: Sweep) -> None:
        options = dict(plan.slurm)
        if plan.devices_per_run > 1 and not options.keys() & {"gpus_per_node", "gpus_per_task", "gres"}:
            options["gpus_per_node"] = plan.devices_per_run
        generic = submitit.AutoExecutor._typed_parameters()
        try:
            self.executor = submitit.AutoExecutor(plan.folder / "log", "slurm", slurm_max_num_timeout=_REQUEUES)
            self.executor.update_parameters(
                name=plan.folder.name, **{k if k in generic else f"slurm_{k}": v for k, v in options.items()}
            )
        except (NameError, AssertionError, RuntimeError) as error:
            raise ValueError(f"slurm: {error}") from error
        self.places = len(plan.runs)
        self.at_once = min(self.places, options.get("array_parallelism", self.places))

    def submit(self, runs: Sequence[Run]) -> list[_Submitted]:
        """Queue runs as one array."""
        with self.executor.batch():
            jobs = [self.executor.submit(RunJob(run)) for run in runs]
        for run, job in zip(runs, jobs, strict=True):
            run.folder.mkdir(parents=True, exist_ok=True)
            with written_whole(run.folder / ".job") as file:
                file.write(job.job_id)
        return [_Submitted(run, job) for run, job in zip(runs, jobs, strict=True)]

    def done(self, submitted: _Submitted) -> bool:
        """Whether a job has ended, or left what it was to leave (SLURM is asked rarely)."""
        return submitted.run.finished or bool(submitted.job.done())

    def state(self, submitted: _Submitted) -> str:
        """What a job is doing."""
        running = submitted.job.state.upper().startswith("RUNNING") or Claim.held(submitted.run.claim)
        return "running" if running else "queued"

    def found(self, runs: Sequence[Run]) -> list[_Submitted]:
        """Jobs that an earlier sweep has queued and SLURM still has."""
        stored = [(run, run.folder / ".job") for run in runs]
        jobs = [
            _Submitted(run, submitit.SlurmJob(self.executor.folder, path.read_text().strip()))
            for run, path in stored
            if path.is_file()
        ]
        return [one for one in jobs if one.job.state.upper().startswith(_ALIVE)]

    def interrupted(self, running: Sequence[_Submitted]) -> None:
        """Jobs go on; the same command follows them."""
        numbers = sorted({str(submitted.job.job_id).split("_")[0] for submitted in running})
        print(f"jobs {', '.join(numbers)} go on: the same command follows them, scancel ends them")


_Jobs = _Local | _Slurm


def _run_all(plan: Sweep, jobs: _Jobs, console: Console) -> list[tuple[Run, str]]:
    """Run what has not finished; returns the failed runs with the ends of their logs."""
    waiting = [run for run in plan.runs if not run.finished]
    running = jobs.found(waiting)
    known = {submitted.run.folder for submitted in running}
    waiting = [run for run in waiting if run.folder not in known]
    failed: list[tuple[Run, str]] = []
    progress = Progress(plan.runs, jobs.at_once)
    with ExitStack() as stack:
        stack.enter_context(_terminated_like_interrupted())
        live = stack.enter_context(Live(console=console, auto_refresh=False, transient=True))
        stack.callback(lambda: jobs.interrupted(running) if running else None)
        while waiting or running:
            waiting = [run for run in waiting if not run.finished]
            held = {run.folder for run in waiting if Claim.held(run.claim)}
            free = [run for run in waiting if run.folder not in held][: max(0, jobs.places - len(running))]
            if free:
                running += jobs.submit(free)
                submitted = {run.folder for run in free}
                waiting = [run for run in waiting if run.folder not in submitted]
            elsewhere = [(run, "running elsewhere") for run in waiting if run.folder in held]
            states = [*elsewhere, *_states(jobs, running, failed)]
            progress.update(states)
            if console.is_terminal:
                live.update(progress_table(plan.runs, states, progress), refresh=True)
            if not (waiting or running):
                break
            time.sleep(jobs.poll)
            for one in [one for one in running if jobs.done(one)]:
                running.remove(one)
                outcome = one.outcome()
                if outcome == "taken":
                    waiting.append(one.run)
                    continue
                if outcome == "failed":
                    failed.append((one.run, one.end_of_log()))
                if outcome == "stopped" or not console.is_terminal:
                    progress.update([*elsewhere, *_states(jobs, running, failed)])
                    console.print(f"{outcome}: {one.run.folder.name} ({progress})", soft_wrap=True, markup=False)
    return failed


def _states(jobs: _Jobs, running: Sequence[_Submitted], failed: Sequence[tuple[Run, str]]) -> list[tuple[Run, str]]:
    return [*((one.run, jobs.state(one)) for one in running), *((run, "failed") for run, _ in failed)]


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """So that the runs end with the sweep when it is terminated, not only when it is interrupted."""
    # a sweep started in the background of a script ignores interrupts, and so would its jobs, which it ends by them
    signals = (signal.SIGTERM, signal.SIGINT)
    earlier = [signal.signal(number, signal.default_int_handler) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, earlier, strict=True):
            signal.signal(number, handler)


def _report_other_settings(plan: Sweep, console: Console) -> None:
    """Say which runs have begun with other settings than the sweep now has; note the settings of the others."""
    for run in plan.runs:
        settings = [word for word in run.arguments[1:] if not word.startswith(("--config=", "--run_dir="))]
        path = run.folder / ".settings.json"
        if run.finished or (run.folder / "last.ckpt").exists():
            stored = json.loads(path.read_text()) if path.is_file() else settings
            if changed := ", ".join(sorted(set(stored) ^ set(settings))):
                now = "is kept" if run.finished else "goes on with the new ones"
                console.print(
                    f"{run.folder.name} was started with other settings ({changed}) and {now}: remove its folder "
                    "to run it anew",
                    soft_wrap=True,
                    markup=False,
                )
        else:
            run.folder.mkdir(parents=True, exist_ok=True)
            with written_whole(path) as file:
                file.write(json.dumps(settings))
