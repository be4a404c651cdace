"""Runs and sweeps as pandas frames: the only reader of run directories."""

from __future__ import annotations

__all__ = ["aggregate", "flatten", "history", "read_runs"]

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pandas as pd
import yaml

_COUNTS = ("epochs", "iterations", "seconds")


@contextmanager
def atomic_write(path: Path) -> Iterator[TextIO]:
    """Open a text file that replaces ``path`` only once it has been written completely.

    Args:
        path: The file; if writing fails, its previous content stays.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "note.txt"
        >>> with atomic_write(path) as file:
        ...     _ = file.write("all")
        ...     before = path.exists()
        >>> before, path.read_text()
        (False, 'all')
    """
    temporary = path.with_name(path.name + ".part")
    # no translation of line ends: csv writes its own
    with temporary.open("w", newline="") as file:
        yield file
    os.replace(temporary, path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=2) + "\n")


def read_runs(paths: Sequence[Path]) -> pd.DataFrame:
    """Read runs, one row each.

    Args:
        paths: Run directories, folders that contain run directories, or CSV files with one row per run.

    Returns:
        Columns ``run`` (name of the folder), ``folder``, ``finished``, the labels of ``summary.json`` (``variant`` and
        the grid point of a sweep), the dotted settings of ``config.yaml``, the counts and the metrics.
        ``frame.attrs["varied"]`` names the labels.

    Raises:
        ValueError: No run there.
    """
    raise NotImplementedError


def history(run: Path, by: str = "epoch") -> pd.DataFrame:
    """Metrics of a run, one row per epoch (or per ``iteration``), the last value logged of each metric.

    Args:
        run: Run directory, with its ``metrics.csv``; the frame is empty if there is none.
        by: Column that identifies a row; it becomes the index, sorted.
    """
    path = run / "metrics.csv"
    if not path.is_file():
        return pd.DataFrame()
    frame = pd.read_csv(path)
    if by not in frame:
        return pd.DataFrame()
    return frame.dropna(subset=[by]).astype({by: int}).groupby(by).last()


def aggregate(
    frame: pd.DataFrame, x: str, y: str, group: str | None = None, statistic: str = "mean", spread: str = "range"
) -> pd.DataFrame:
    """Center and spread of ``y`` over the runs that share ``x`` and ``group``.

    Returns:
        Columns ``group`` (if given), ``x``, the statistic, ``low``, ``high`` and ``runs`` (their number).
    """
    raise NotImplementedError


def flatten(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested settings by dotted name, leaving out ``init_args``, which only structures them.

    Example:
        >>> dict(flatten({"weight": 1, "network": {"class_path": "N", "init_args": {"depth": 2}}}))
        {'weight': 1, 'network.class_path': 'N', 'network.depth': 2}
    """
    if not isinstance(settings, Mapping):
        yield prefix, settings
        return
    for name, value in settings.items():
        yield from flatten(value, prefix if name == "init_args" else f"{prefix}.{name}" if prefix else str(name))


def read_settings(run: Path) -> dict[str, Any]:
    """Configuration of a run as nested settings; empty if it has no ``config.yaml``."""
    path = run / "config.yaml"
    return yaml.safe_load(path.read_text()) or {} if path.is_file() else {}
