"""The figure command: finished runs -> figures for print, and the numbers behind them."""

from __future__ import annotations

__all__ = ["check_figure", "draw_figure", "draw_sweep_figure"]

import csv
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from lightning_locality.plotting import growth, recovery
from lightning_locality.plotting.cells import STATISTICS, write_table
from lightning_locality.plotting.drawn import draw_chart
from lightning_locality.plotting.options import INCHES, parsed
from lightning_locality.plotting.run_table import RunTable
from lightning_locality.plotting.style import save_figure

_WIDTH = 130
_PRINTED = 60  # rows of the printed table
# columns by which a table that this command has written is known again
_OWN = (set(STATISTICS), {"run", "quantity", "value"}, {"predicted", "fitted"})


def draw_figure(args: Sequence[str]) -> None:
    """Draw a figure of finished runs into a PDF and a PNG file, with its numbers in a CSV file beside them.

    Args:
        args: As typed, the kind of figure first.

    Raises:
        ValueError: No such file or column, nothing left to draw, or a file that must not be overwritten.
    """
    options = parsed(args)
    notes: list[str] = []
    if options.kind == "growth":
        figure, numbers, name = *_growth(options), "growth"
    else:
        whole = RunTable.read(options.inputs)
        table = whole.where(options.where or ())
        notes += _unfinished(table)
        if options.kind in ("accuracy", "xy"):
            drawn = draw_chart(options, table)
            figure, numbers, name = drawn.figure, drawn.numbers, drawn.name
            notes += drawn.notes
        else:
            figure, numbers = _recovery(options, table)
            name = options.kind
    if options.title:
        figure.suptitle(options.title, fontsize=9)
    stem = _stem(options, name)
    _write(figure, numbers, stem, options.inputs)
    _print(numbers, [*notes, f"{stem}.pdf, {stem.name}.png; the numbers: {stem.name}.csv"])


def check_figure(figure: Mapping[str, Any] | None, columns: Sequence[str]) -> None:
    """Check the ``figure:`` entry of a sweep before its first run.

    Args:
        figure: ``kind`` and the options of that kind; None for the default, accuracy.
        columns: ``variant`` and the short names of the grid, as in results.csv.

    Raises:
        ValueError: Unknown kind or option, wrong value, or a column that neither the grid nor the variants have.
    """
    raise NotImplementedError


def draw_sweep_figure(figure: Mapping[str, Any] | None, runs: pd.DataFrame, folder: Path) -> Path | None:
    """Draw the figure of a sweep into ``FOLDER/KIND.pdf`` and ``.png``, with its numbers in ``KIND.csv``.

    Args:
        figure: As :func:`check_figure` takes it.
        runs: As :func:`~lightning_locality.results.read_runs` reads them.
        folder: Where the files go.

    Returns:
        The picture; None if there is nothing to draw yet.
    """
    raise NotImplementedError


def _recovery(options: Namespace, table: RunTable) -> tuple[Figure, recovery.Numbers]:
    width = INCHES[options.width]
    if options.kind == "dynamics":
        return recovery.dynamics(
            table, magnitudes=options.magnitudes or (), top=options.top, against=options.against, width=width
        )
    if options.kind == "rank":
        by = table.column(options.group or "variant", "--group")
        return recovery.rank(table, group=by, scale=options.scale, trivial=options.trivial, width=width)
    default = ["variant"] if "variant" in table.columns else []
    group = [table.column(name, "--group") for name in (options.group or default)]
    return recovery.norm(table, group=group, entry=options.entry, split=options.split, least=options.least, width=width)


def _growth(options: Namespace) -> tuple[Figure, recovery.Numbers]:
    curves: growth.Curves = {}
    for given in options.inputs:
        path = given / "growth_curves.csv" if given.is_dir() else given
        if not path.is_file():
            raise ValueError(
                f"there is no {path}: `python experiments/growth_exponents.py --out {given}` measures and writes it"
            )
        curves |= growth.read_curves(path)
    rows = [[f.order, f.matrices, f.quantity, f.source, f.predicted, f.fitted] for f in growth.fits(curves)]
    header = ["order", "matrices", "quantity", "source", "predicted", "fitted"]
    return growth.growth_figure(curves, INCHES[options.width]), (header, rows)


def _unfinished(table: RunTable) -> list[str]:
    names = [row.folder.name for row in table.rows if not row.finished and row.folder]
    listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return [f"{_counted(len(names))} not finished and left out: {listed}"] if names else []


def _counted(number: int) -> str:
    return f"{number} run{'s' if number > 1 else ''}"


def _stem(options: Namespace, name: str) -> Path:
    """Path of the figure without ending."""
    if options.out is None:
        first = options.inputs[0]
        return Path(first if first.is_dir() else first.parent) / name
    out = Path(options.out)
    return out.with_suffix("") if out.suffix in (".pdf", ".png", ".csv") else out


def _write(figure: Figure, numbers: recovery.Numbers, stem: Path, inputs: Sequence[Path]) -> None:
    path = stem.with_name(f"{stem.name}.csv")
    if path.is_file():
        with path.open(newline="") as file:
            columns = set(next(csv.reader(file), []))
        inside = any(path.resolve() == given.resolve() for given in inputs)
        if inside or not any(own <= columns for own in _OWN):
            raise ValueError(f"--out: the numbers would overwrite {path}, which is not of this command; choose another")
    write_table(numbers, path)
    save_figure(figure, stem)


def _print(numbers: recovery.Numbers, notes: Sequence[str]) -> None:
    header, rows = numbers
    console = Console()
    table = Table()
    counts = {"n", "runs"} <= set(header)
    shown = [name for name in header if name not in ("sem", "least", "greatest", "n")]
    for name in shown:
        table.add_column(name, justify="left" if name in ("run", "quantity", "variant") else "right")
    for row in rows[:_PRINTED]:
        cells = dict(zip(header, row, strict=True))
        if counts:
            cells["runs"] = f"{cells['n']} of {cells['runs']}"
        table.add_row(*(_cell(cells[name]) for name in shown))
    # where there is no terminal rich would wrap the table at 80 columns
    (console if console.is_terminal else Console(width=_WIDTH)).print(table)
    if len(rows) > _PRINTED:
        console.print(f"and {len(rows) - _PRINTED} more rows")
    for note in notes:
        console.print(note, soft_wrap=True, markup=False, highlight=False)


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
