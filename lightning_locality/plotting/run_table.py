"""Finished runs as a table: read from CSV files and folders of sweeps, chosen by column and value."""

from __future__ import annotations

__all__ = ["Row", "RunTable", "Value", "ordered", "shown"]

import csv
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from lightning_locality.suggest import nearest

Value = bool | int | float | str

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?(inf|nan)", re.IGNORECASE)
_AXIS = re.compile(r"-(?=[A-Za-z_][\w.]*=)")  # between the parts of the name of a run: far-distance=80-seed=0
_COUNTS = ("epochs", "iterations", "seconds")  # what a run itself has counted; what was varied stands before
_INPUT = "input"
_NAMES = ("run", "folder", _INPUT)  # of runs, not of settings


@dataclass(frozen=True)
class Row:
    """One run.

    Args:
        values: Column -> value; none where the run has none.
        folder: Folder of the run, where it is known.
        finished: Whether the run has come to its end.
    """

    values: Mapping[str, Value]
    folder: Path | None = None
    finished: bool = True


@dataclass(frozen=True)
class RunTable:
    """Runs, a row each.

    Args:
        rows: The runs, also those that have not finished, as far as their folders tell of them.
        varied: Columns of what was varied between the runs; empty where the file does not tell it from results.
    """

    rows: tuple[Row, ...]
    varied: tuple[str, ...] = ()

    @classmethod
    def read(cls, inputs: Sequence[Path]) -> Self:
        """Read and join.

        Args:
            inputs: CSV files with a row per run, folders of sweeps (their ``results.csv`` and the runs that have not
                come into it) or folders of runs. Of several, the column ``input`` says which a row is from.

        Raises:
            ValueError: Nothing there.
        """
        rows: list[Row] = []
        varied: list[str] = []
        seen: set[Path] = set()
        for given in inputs:
            source = given / "results.csv" if (given / "results.csv").is_file() else given
            if source.resolve() in seen:
                continue
            seen.add(source.resolve())
            own, names = _read(given)
            if len(inputs) > 1:
                folder = given.parent if given.name == "results.csv" else given
                label = folder.resolve().name if folder.is_dir() else given.stem
                own = [replace(row, values={_INPUT: label, **row.values}) for row in own]
            rows += own
            varied += [name for name in names if name not in varied]
        return cls(tuple(rows), (*([_INPUT] if len(seen) > 1 else []), *varied))

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row.values))

    def column(self, name: str, option: str = "column") -> str:
        """Full name of a column.

        Args:
            name: The full name, or its last part where that belongs to one column only: ``distance`` for
                ``data.distance``.
            option: Named in messages.

        Raises:
            ValueError: No such column, or several.

        Example:
            >>> RunTable((Row({"data.distance": 80}),)).column("distance")
            'data.distance'
        """
        if name in self.columns:
            return name
        found = [own for own in self.columns if own.endswith((f".{name}", f"/{name}"))]
        if len(found) > 1:
            raise ValueError(f"{option}: {name!r} may be {' or '.join(found)}; give the full name")
        if not found:
            lasts = [re.split(r"[./]", own)[-1] for own in self.columns]
            hint = nearest(name, [*self.columns, *lasts])
            raise ValueError(f"{option}: there is no column {name!r}{hint}; there are {', '.join(self.columns)}")
        return found[0]

    def where(self, conditions: Sequence[str]) -> Self:
        """The rows that meet all conditions.

        Args:
            conditions: ``COLUMN=VALUE``; of several for the same column one must hold.

        Raises:
            ValueError: No condition of this form, no such column, or no row left.
        """
        wanted: dict[str, list[Value]] = {}
        for condition in conditions:
            name, equals, text = condition.partition("=")
            if not equals:
                raise ValueError(f"--where: expected COLUMN=VALUE, got {condition!r}")
            wanted.setdefault(self.column(name, "--where"), []).append(text if (v := _value(text)) is None else v)
        rows = tuple(row for row in self.rows if all(_among(row.values.get(name), vs) for name, vs in wanted.items()))
        if not rows:
            there = [
                f"{name} is {', '.join(shown(v) for v in ordered(r.values.get(name) for r in self.rows))}"
                for name in wanted
            ]
            raise ValueError(f"--where {' '.join(conditions)}: no run is left; {'; '.join(there) or 'there are none'}")
        return replace(self, rows=rows)


def _read(path: Path) -> tuple[list[Row], list[str]]:
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise ValueError(f"there is no file or folder {path}")
    rows, varied = _read_csv(path)
    if not rows:
        raise ValueError(f"{path} has no rows: no run has finished")
    return rows, varied


def _read_csv(path: Path) -> tuple[list[Row], list[str]]:
    folders = {run.name: run for run in path.parent.iterdir() if _is_run(run)}
    with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin it with a mark
        reader = csv.DictReader(file)
        names = list(reader.fieldnames or ())
        varied = names[: min((names.index(name) for name in _COUNTS if name in names), default=0)]
        rows = []
        for line in reader:
            cells = {name: text for name, text in line.items() if name and isinstance(text, str) and text.strip()}
            values = {name: value for name, text in cells.items() if (value := _value(text)) is not None}
            rows.append(Row(values, folders.get(_run_name(cells, varied))))
    return rows, [name for name in varied if name not in _NAMES]


def _read_folder(folder: Path) -> tuple[list[Row], list[str]]:
    """A sweep with its results, one that was cut off before them, or one run."""
    if (folder / "metrics.csv").is_file():
        return [_run(folder, {})], []
    rows, varied = _read_csv(results) if (results := folder / "results.csv").is_file() else ([], [])
    # names of folders have lost what file systems do not take
    known = {(name, _slug(shown(v))): v for row in rows for name, v in row.values.items()}
    there = {row.folder for row in rows}
    others = [_run(run, known) for run in sorted(folder.iterdir()) if _is_run(run) and run not in there]
    if None in there:  # names of another kind: a finished run may be one of the rows
        others = [row for row in others if not row.finished]
    if not rows and not others:
        raise ValueError(
            f"{folder} has neither a results.csv nor folders of runs: give the folder of a sweep, or a CSV"
        )
    if not varied:
        varied = list(dict.fromkeys(name for row in others for name in _point(row.folder.name if row.folder else "")))
    return [*rows, *others], varied


def _is_run(folder: Path) -> bool:
    # not Path.is_file, which raises in a neighbour that may not be read
    return any(os.path.isfile(folder / name) for name in ("summary.json", "metrics.csv", "config.yaml"))


def _run(folder: Path, known: Mapping[tuple[str, str], Value]) -> Row:
    """A run that is in no results.csv."""
    point = {name: known.get((name, text), _value(text)) for name, text in _point(folder.name).items()}
    # an empty cell in results.csv
    values = {name: value for name, value in point.items() if value not in (None, "None")}
    summary = folder / "summary.json"
    if not summary.is_file():
        return Row(values, folder, finished=False)
    content = json.loads(summary.read_text())
    counts = {name: content[name] for name in _COUNTS if name in content}
    return Row({**values, **counts, **content.get("metrics", {})}, folder)


def _point(name: str) -> dict[str, str]:
    """``{"variant": "far", "distance": "80"}`` of ``far-distance=80``."""
    variant, *parts = _AXIS.split(name)
    return {"variant": variant, **{axis: text for axis, _, text in (part.partition("=") for part in parts)}}


def _run_name(cells: Mapping[str, str], varied: Sequence[str]) -> str:
    """Name of the folder of a row of results."""
    if "run" in cells:
        return Path(cells["run"]).name
    axes = [f"{name}={cells[name]}" for name in varied if name != "variant" and name in cells]
    return _slug("-".join([cells.get("variant", ""), *axes]))


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in ".-=" else "_" for c in text)


def _value(text: str) -> Value | None:
    """The value that a cell stands for, None where it is empty."""
    text = text.strip()
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if not _NUMBER.fullmatch(text):
        return text or None
    return int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text)


def _among(value: Value | None, wanted: Sequence[Value]) -> bool:
    if value is None:
        return shown(value) in wanted
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in wanted)


def ordered(values: Iterable[Value | None]) -> list[Any]:
    """Each value once: false, true, numbers by size, texts as they first appear (the order of the sweep), none.

    Example:
        >>> ordered(["b", 10, 2, "a", None, 2, True])
        [True, 2, 10, 'b', 'a', None]
    """
    found = list(dict.fromkeys((isinstance(v, bool), v) for v in values))
    kinds: dict[str, list[Any]] = {"bool": [], "number": [], "text": [], "none": []}
    for is_bool, value in found:
        kind = "bool" if is_bool else "number" if isinstance(value, (int, float)) else "text" if value else "none"
        kinds[kind].append(value)
    return [*sorted(kinds["bool"]), *sorted(kinds["number"]), *kinds["text"], *kinds["none"]]


def shown(value: Value | None) -> str:
    """A value as text: ``true``, ``0.1``, ``none``."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
