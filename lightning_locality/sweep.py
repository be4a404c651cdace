"""A grid of runs, each a process of its own on submitit."""

from __future__ import annotations

__all__ = ["Run", "Sweep", "sweep"]

import itertools
import json
import os
import shlex
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import submitit
import yaml
from rich.console import Console
from rich.live import Live

from lightning_locality.results import collect, progress_table, result_table
from lightning_locality.suggest import nearest
from lightning_locality.sweep_figure import SweepFigure

_SWEEP_KEYS = ("base", "out", "parallel", "configs", "set", "variants", "grid", "figure")
_VARIANT_KEYS = ("configs", "set")
_POLL = 0.5  # seconds between looks at the jobs
_LOG_LINES = 6
_TABLE_WIDTH = 130


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Args:
        variant: Name of the row it belongs to.
        point: The values of the grid at this run, by the last word of the option's name.
        arguments: What follows ``lightning-locality`` on the command line.
        folder: Folder of the run.
    """

    variant: str
    point: Mapping[str, Any]
    arguments: tuple[str, ...]
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether the run has left its summary."""
        return (self.folder / "summary.json").exists()


@dataclass(frozen=True)
class Sweep:
    """Runs that belong together.

    Args:
        runs: Every variant at every point of the grid, variants varying fastest.
        folder: Folder that holds the folders of the runs.
        parallel: Runs at a time; None for one per core.
        figure: What is drawn of them.
    """

    runs: tuple[Run, ...]
    folder: Path
    parallel: int | None
    figure: SweepFigure = field(default_factory=SweepFigure)

    @classmethod
    def read(cls, path: Path, out: Path | None = None) -> Self:
        """Read a sweep file.

        Args:
            path: YAML with ``out`` (folder for the results), ``parallel`` (runs at a time), ``configs``
                (configuration files, relative to this one), ``set`` (option -> value), ``variants`` (name of
                a row -> ``configs`` and ``set`` of its own) and ``grid`` (option -> list of values; every
                variant is run at every combination). Several options that share their values are one entry
                of the grid: ``seed_everything, data.seed: [0, 1, 2]``. ``figure`` says what is drawn
                (``kind``, see :class:`~lightning_locality.sweep_figure.SweepFigure`, and its options). ``base``
                names another sweep file whose entries hold where this one has none.
            out: Folder for the results, instead of the file's.

        Raises:
            ValueError: Unknown keys, or a configuration that does not exist.
        """
        content = _load(path)
        folder = out or Path(content.get("out") or Path("runs") / path.stem)
        variants = content.get("variants") or {"run": None}
        grid = content.get("grid") or {}
        runs = []
        for values in itertools.product(*grid.values()):
            point = dict(zip(grid, values, strict=True))
            named = {_short(keys): value for keys, value in point.items()}
            for variant, settings in variants.items():
                own = _mapping(settings or {}, f"{path}: variant {variant!r}", _VARIANT_KEYS)
                names = [*(content.get("configs") or ()), *(own.get("configs") or ())]
                configs = [path.parent / name for name in names]
                for config in configs:
                    if not config.is_file():
                        raise ValueError(f"{path}: variant {variant!r} names {config}, which does not exist")
                options = {**(content.get("set") or {}), **(own.get("set") or {})}
                options |= {key.strip(): value for keys, value in point.items() for key in keys.split(",")}
                name = _slug("-".join([variant, *(f"{axis}={value}" for axis, value in named.items())]))
                arguments = (
                    "fit",
                    *(f"--config={config}" for config in configs),
                    *(f"--{key}={v if isinstance(v, str) else json.dumps(v)}" for key, v in options.items()),
                    f"--run_dir={folder / name}",
                )
                runs.append(Run(variant, named, arguments, folder / name))
        return cls(tuple(runs), folder, content.get("parallel"), SweepFigure.read(content.get("figure"), str(path)))


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no sweep file {path}")
    content = _mapping(yaml.safe_load(path.read_text()), str(path), _SWEEP_KEYS)
    base = content.pop("base", None)
    return {**_load(path.parent / base), **content} if base else content


def _mapping(content: Any, where: str, known: Sequence[str]) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected a mapping with keys out of {', '.join(known)}, got {content!r}")
    for key in content:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(str(key), known)}; known: {', '.join(known)}")
    return content


def _short(keys: str) -> str:
    """Last word of the first of several options that share a value."""
    return keys.split(",")[0].split(".")[-1].strip()


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in ".-=" else "_" for c in text)


def _execute(run: Run) -> None:
    """The job: fit, continuing from the last checkpoint of a run that was killed."""
    # here, so that only the processes of the runs load Lightning
    from lightning_locality.runner import run as train

    last = run.folder / "last.ckpt"
    if not last.exists():  # what a start that was killed early has left would only stop this one
        for name in ("config.yaml", "metrics.csv"):
            (run.folder / name).unlink(missing_ok=True)
    train([*run.arguments, *([f"--ckpt_path={last}"] if last.exists() else [])])


def sweep(grid: Path, out: Path | None = None, parallel: int | None = None, dry_run: bool = False) -> None:
    """Run every point of a grid in a process of its own, and collect the results.

    A run that has finished is skipped, one that was killed continues from its last checkpoint, and one that
    fails is reported with the last lines of its log and does not stop the others.

    Args:
        grid: YAML file that describes the runs (see configs/sweeps/quickstart.yaml for an example).
        out: Folder for the runs and their results.csv; the file's own if not given.
        parallel: Runs at a time; the file's own, or the number of cores, if not given. The cores are shared out.
        dry_run: Print the commands instead of running them.
    """
    plan = Sweep.read(grid, out)
    if dry_run:
        for run in plan.runs:
            print(shlex.join(["lightning-locality", *run.arguments]))
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parallel = next(n for n in (parallel, plan.parallel, cores) if n is not None)
    if parallel < 1:
        raise ValueError(f"parallel must be at least 1, got {parallel}")
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores // parallel))
    plan.folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    failed = _run_all(plan, parallel, console)
    rows = collect(plan.runs, plan.folder / "results.csv")
    picture = plan.figure.save(plan.runs, plan.folder)
    # where there is no terminal rich would wrap the table at 80 columns
    wide = console if console.is_terminal else Console(width=_TABLE_WIDTH)
    wide.print(result_table(plan.runs, rows))
    shown = f", {picture.name}" if picture else ""
    folders = "a folder for every run, with figures of its own (figures/*.png)"
    console.print(f"In {plan.folder}: results.csv{shown}, and {folders}.", soft_wrap=True)
    for run, log in failed:
        console.print(f"failed: {run.folder.name}\n{log}", soft_wrap=True, markup=False)
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(plan.runs)} runs failed; the same command tries them again and skips the rest"
        )


def _run_all(plan: Sweep, parallel: int, console: Console) -> list[tuple[Run, str]]:
    """Run what has not finished; returns the failed runs with the ends of their logs."""
    executor = submitit.AutoExecutor(folder=plan.folder / "log", cluster="local")
    executor.update_parameters(timeout_min=7 * 24 * 60)
    waiting = [run for run in plan.runs if not run.finished]
    running: list[tuple[Run, Any]] = []
    failed: list[tuple[Run, str]] = []
    started = time.time()
    # so that the runs end with the sweep when it is terminated, not only when it is interrupted
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            while waiting or running:
                while waiting and len(running) < parallel:
                    run = waiting.pop(0)
                    running.append((run, executor.submit(_execute, run)))
                time.sleep(_POLL)
                for run, job in [pair for pair in running if pair[1].done()]:
                    running.remove((run, job))
                    if job.exception():
                        failed.append((run, _end_of_log(job)))
                    if not console.is_terminal:
                        state = "failed" if job.exception() else "done"
                        console.print(f"{state}: {run.folder.name}", soft_wrap=True)
                if console.is_terminal:
                    states = [(run, "running") for run, _ in running] + [(run, "failed") for run, _ in failed]
                    live.update(progress_table(plan.runs, states, time.time() - started), refresh=True)
    finally:
        for _, job in running:
            job.cancel()
    return failed


def _end_of_log(job: Any) -> str:
    text = (job.stderr() or job.stdout() or "").strip()
    return "\n".join(text.splitlines()[-_LOG_LINES:])
