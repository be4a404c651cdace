"""Figures of recovery runs from their folders: dynamics, unobserved entry against loss, rank against fit."""

from __future__ import annotations

__all__ = ["Numbers", "dynamics", "norm", "rank"]

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure

from lightning_locality.bounds import lower_bounds
from lightning_locality.outcomes import rank_against_fit
from lightning_locality.plotting.cells import Axes, cells, table_rows
from lightning_locality.plotting.run_table import RunTable, shown
from lightning_locality.readings import readings
from lightning_locality.suggest import nearest
from lightning_locality.trajectories import Rows, component_curves, read_iterations, value_against_loss

Numbers = tuple[list[str], list[list[Any]]]

_MOST_RUNS = 16


def dynamics(
    table: RunTable, *, magnitudes: Sequence[str], top: int, against: Literal["iteration", "time"], width: float
) -> tuple[Figure, Numbers]:
    """Magnitudes, reconstruction error and loss against the iteration, a column per run.

    Args:
        table: The runs.
        magnitudes: Which magnitudes; those the runs have.
        top: The largest so many.
        against: Iteration or time.
        width: In inches.

    Returns:
        The figure and its readings.

    Raises:
        ValueError: No recovery runs, or too many for one figure.
    """
    runs = _curves(table)
    if len(runs) > _MOST_RUNS:
        raise ValueError(f"{len(runs)} runs do not fit into one figure: choose up to {_MOST_RUNS} with --where")
    labels = _titles(table, list(runs))
    named = {labels[folder]: rows for folder, rows in runs.items()}
    figure = component_curves(named, groups=magnitudes, top=top, x=against, loss=True, width=width)
    return figure, _readings(named)


def norm(
    table: RunTable, *, group: Sequence[str], entry: str | None, split: str, least: float, width: float
) -> tuple[Figure, Numbers]:
    """Size of an unobserved entry against the loss, with the lower bound of its problem.

    Args:
        table: The runs.
        group: Columns, by full name, that the colours tell apart; the name of the run where there are none.
        entry: Its indices, ``0-0``; the one that is followed, if not given.
        split: Labels are ``PANEL SPLIT LABEL``, with a panel for every PANEL.
        least: Smallest loss that is shown.
        width: In inches.

    Returns:
        The figure and its readings.

    Raises:
        ValueError: No entry is followed, or not this one.
    """
    runs = _curves(table)
    known = sorted({key.removeprefix("entry/") for r in runs.values() for key in r[0] if key.startswith("entry/")})
    if not known:
        raise ValueError("none of the runs follows an unobserved entry (entry/0-0): there is nothing to draw")
    if entry is not None and entry not in known:
        raise ValueError(f"--entry: no run follows {entry!r}{nearest(entry, known)}; there are {', '.join(known)}")
    entry = entry or known[0]
    kept = {folder: rows for folder, rows in runs.items() if f"entry/{entry}" in rows[0]}
    values = {row.folder: row.values for row in table.rows}
    labels = {
        folder: ", ".join(shown(values[folder].get(name)) for name in group) if group else folder.name
        for folder in kept
    }
    labelled: dict[str, list[Rows]] = {}
    for folder, rows in kept.items():
        labelled.setdefault(labels[folder], []).append(rows)
    figure = value_against_loss(
        labelled, entry=entry, split=split, least=least, bounds=lower_bounds(labels), width=width
    )
    return figure, _readings({folder.name: rows for folder, rows in kept.items()})


def rank(table: RunTable, *, group: str, scale: float, trivial: float, width: float) -> tuple[Figure, Numbers]:
    """Training and test error against the number of components, a line of panels per image set.

    Args:
        table: The runs.
        group: Column, by full name, that separates the lines.
        scale: Factor of the errors.
        trivial: Error of the best constant prediction.
        width: In inches.

    Returns:
        The figure, and mean and spread of both errors at every point, not scaled.
    """
    x = table.column("rank", "rank")
    source = next((name for name in table.columns if name.split(".")[-1] == "source"), None)
    names = {x: "rank", **({source: "source"} if source else {})}
    rows = [{names.get(name, name): value for name, value in row.values.items()} for row in table.rows]
    header: list[str] = []
    numbers: list[list[Any]] = []
    for error in ("train/loss", "test/loss"):
        axes = Axes(x, table.column(error), (group,), source)
        header, own = table_rows(axes, cells(table, axes))
        numbers += [[error, *row] for row in own]
    figure = rank_against_fit(rows, by=group, scale=scale, trivial=trivial, width=width)
    return figure, (["quantity", *header], numbers)


def _curves(table: RunTable) -> dict[Path, list[dict[str, float]]]:
    """Measurements of the recovery runs that have finished, by folder."""
    folders = [row.folder for row in table.rows if row.folder is not None and row.finished]
    found = {
        folder: rows
        for folder in folders
        if (folder / "metrics.csv").is_file() and (rows := read_iterations(folder / "metrics.csv"))
    }
    if not found:
        raise ValueError(
            "no finished recovery runs with a metrics.csv in their folder: give the folder of a sweep or of a run"
        )
    return found


def _titles(table: RunTable, folders: Sequence[Path]) -> Mapping[Path, str]:
    """Variants where they tell the runs apart, names of folders where not."""
    variants = {row.folder: str(row.values.get("variant", "")) for row in table.rows if row.folder in folders}
    single = len(set(variants.values())) == len(folders)
    titles = {folder: variants[folder] if single and variants[folder] else folder.name for folder in folders}
    if len(set(titles.values())) < len(folders):
        return {folder: f"{folder.parent.name}/{folder.name}" for folder in folders}
    return titles


def _readings(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> Numbers:
    return ["run", "quantity", "value"], [
        list(reading) for run, rows in runs.items() for reading in readings(run, rows)
    ]
