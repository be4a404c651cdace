"""Where the runs of a sweep are started and followed: on this machine, or as an array on SLURM."""

from __future__ import annotations

__all__ = ["Jobs", "LocalJobs", "SlurmJobs", "Submitted"]

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import submitit

from lightning_locality.callbacks.history import written_whole
from lightning_locality.claim import Claim
from lightning_locality.devices import Devices
from lightning_locality.run_job import RunJob
from lightning_locality.sweep_plan import Run, Sweep

_LOG_LINES = 6
_PATIENCE = 10.0  # seconds that interrupted jobs have to end
_WEEK = 7 * 24 * 60  # minutes
_REQUEUES = 50  # times that a job on SLURM may run out of its time and go on
_ALIVE = ("PENDING", "RUNNING", "REQUEUED", "SUSPENDED", "CONFIGURING", "COMPLETING", "PREEMPTED")


@final
@dataclass(frozen=True)
class Submitted:
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
class LocalJobs:
    """Jobs on this machine: as many as there is place for."""

    poll = 0.5  # seconds between looks at the jobs

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

    def submit(self, runs: Sequence[Run]) -> list[Submitted]:
        """Start runs, no more than there is place for."""
        submitted = []
        for run in runs:
            devices = self.devices.take()
            with _errors_to(self.executor.folder / "jobs.log"):
                job = self.executor.submit(RunJob(run, devices, self.threads))
            submitted.append(Submitted(run, job, devices))
        return submitted

    def done(self, submitted: Submitted) -> bool:
        """Whether a job has ended; its devices are free again then."""
        if not submitted.job.done():
            return False
        self.devices.give(submitted.devices)
        return True

    def state(self, submitted: Submitted) -> str:
        """What a job is doing."""
        return "running"

    def found(self, runs: Sequence[Run]) -> list[Submitted]:
        """Nothing: what an earlier sweep has started here holds its claim."""
        return []

    def interrupted(self, running: Sequence[Submitted]) -> None:
        """Runs end with the sweep, and before it."""
        for submitted in running:
            submitted.job.cancel()
        deadline = time.monotonic() + _PATIENCE
        while not all(submitted.job.done() for submitted in running) and time.monotonic() < deadline:
            time.sleep(0.05)


@final
class SlurmJobs:
    """Jobs of one array on SLURM: all at once."""

    poll = 5.0

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

    def submit(self, runs: Sequence[Run]) -> list[Submitted]:
        """Queue runs as one array."""
        with self.executor.batch():
            jobs = [self.executor.submit(RunJob(run)) for run in runs]
        for run, job in zip(runs, jobs, strict=True):
            run.folder.mkdir(parents=True, exist_ok=True)
            with written_whole(run.folder / ".job") as file:
                file.write(job.job_id)
        return [Submitted(run, job) for run, job in zip(runs, jobs, strict=True)]

    def done(self, submitted: Submitted) -> bool:
        """Whether a job has ended, or left what it was to leave (SLURM is asked rarely)."""
        return submitted.run.finished or bool(submitted.job.done())

    def state(self, submitted: Submitted) -> str:
        """What a job is doing."""
        running = submitted.job.state.upper().startswith("RUNNING") or Claim.held(submitted.run.claim)
        return "running" if running else "queued"

    def found(self, runs: Sequence[Run]) -> list[Submitted]:
        """Jobs that an earlier sweep has queued and SLURM still has."""
        stored = [(run, run.folder / ".job") for run in runs]
        jobs = [
            Submitted(run, submitit.SlurmJob(self.executor.folder, path.read_text().strip()))
            for run, path in stored
            if path.is_file()
        ]
        return [one for one in jobs if one.job.state.upper().startswith(_ALIVE)]

    def interrupted(self, running: Sequence[Submitted]) -> None:
        """Jobs go on; the same command follows them."""
        numbers = sorted({str(submitted.job.job_id).split("_")[0] for submitted in running})
        print(f"jobs {', '.join(numbers)} go on: the same command follows them, scancel ends them")


Jobs = LocalJobs | SlurmJobs


@contextmanager
def _errors_to(path: Path) -> Iterator[None]:
    """Let processes started here write their errors to a file: submitit's would show a traceback when interrupted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = os.dup(2)
    try:
        with path.open("a") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
