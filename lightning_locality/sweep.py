"""A grid of runs, each a process of its own on submitit."""

from __future__ import annotations

__all__ = ["Run", "Sweep", "sweep"]

import json
import shlex
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.live import Live

from lightning_locality.callbacks.history import written_whole
from lightning_locality.claim import Claim
from lightning_locality.interrupts import delayed_interrupts, terminated_like_interrupted
from lightning_locality.jobs import Jobs, LocalJobs, SlurmJobs, Submitted
from lightning_locality.old_results import Progress, collect, progress_table, result_table
from lightning_locality.sweep_plan import Run, Sweep

_TABLE_WIDTH = 130


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
    jobs: Jobs = SlurmJobs(plan) if (cluster or plan.cluster) == "slurm" else LocalJobs(plan, parallel or plan.parallel)
    plan.folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    # one sweep at a time: two may begin or end together
    alone = plan.folder / ".collect"
    with Claim(alone, wait=True):
        _report_other_settings(plan, console)
    try:
        failed = _run_all(plan, jobs, console)
    except KeyboardInterrupt:
        done = sum(run.finished for run in plan.runs)
        console.print(
            f"interrupted: {done} of {len(plan.runs)} runs are finished; the same command goes on from there",
            soft_wrap=True,
            highlight=False,
        )
        raise SystemExit(130) from None
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


def _run_all(plan: Sweep, jobs: Jobs, console: Console) -> list[tuple[Run, str]]:
    """Run what has not finished; returns the failed runs with the ends of their logs."""
    waiting = [run for run in plan.runs if not run.finished]
    running = jobs.found(waiting)
    known = {submitted.run.folder for submitted in running}
    waiting = [run for run in waiting if run.folder not in known]
    failed: list[tuple[Run, str]] = []
    progress = Progress(plan.runs, jobs.at_once)
    with ExitStack() as stack:
        stack.enter_context(terminated_like_interrupted())
        live = stack.enter_context(Live(console=console, auto_refresh=False, transient=True))
        stack.callback(lambda: jobs.interrupted(running) if running else None)
        while waiting or running:
            waiting = [run for run in waiting if not run.finished]
            held = {run.folder for run in waiting if Claim.held(run.claim)}
            free = [run for run in waiting if run.folder not in held][: max(0, jobs.places - len(running))]
            if free:
                with delayed_interrupts():
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


def _states(jobs: Jobs, running: Sequence[Submitted], failed: Sequence[tuple[Run, str]]) -> list[tuple[Run, str]]:
    return [*((one.run, jobs.state(one)) for one in running), *((run, "failed") for run, _ in failed)]


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
