"""Numbers read off the curves of recovery runs, to be put beside those of the papers' figures."""

from __future__ import annotations

__all__ = ["Reading", "readings"]

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise

from lightning_locality.trajectories import Rows, magnitude_groups

Reading = tuple[str, str, float]
_LEVELS = (0.5, 0.1, 0.01, 0.001)
_LOSSES = (1e-1, 1e-2, 1e-3, 1e-4)


def readings(run: str, rows: Rows, most: int = 6) -> list[Reading]:
    """Numbers read off the curves of one run.

    For every group of magnitudes (singular values, component norms, local component norms) the last value of each of
    the largest, and the iteration at which it has first exceeded half of that; the first iteration at which the
    reconstruction error is below 0.5, 0.1, 0.01 and 0.001, its minimum and its last value; and where an unobserved
    entry is followed, its absolute value when the loss first falls below 0.1, 0.01, 0.001 and 0.0001 (between two
    measurements on the straight line in logarithms), and the sign of the determinant then.

    Args:
        run: Its name.
        rows: As :func:`~lightning_locality.trajectories.read_iterations` gives them.
        most: Largest magnitudes of every group.

    Returns:
        Name of the run, quantity, value.
    """
    return [*_components(run, rows, most), *_errors(run, rows), *_unseen_entries(run, rows)]


def _components(run: str, rows: Rows, most: int) -> Iterator[Reading]:
    """Last values of the largest magnitudes that are not nothing, and when they came."""
    last = rows[-1]
    for names in magnitude_groups(rows).values():
        shown = [name for name in names[:most] if last[name] > 1e-3 * last[names[0]]]
        for name in shown:
            yield run, name, last[name]
            yield run, f"{name} at half", next(row["iteration"] for row in rows if row[name] > last[name] / 2)


def _errors(run: str, rows: Rows) -> Iterator[Reading]:
    """When the reconstruction error has fallen how far."""
    name = "reconstruction_error"
    if name not in rows[-1]:
        return
    for level in _LEVELS:
        below = next((row["iteration"] for row in rows if row[name] < level), None)
        if below is not None:
            yield run, f"error below {level:g} at", below
    yield run, "least error", min(row[name] for row in rows)
    yield run, "last error", rows[-1][name]


def _unseen_entries(run: str, rows: Rows) -> Iterator[Reading]:
    """Absolute value of the entries that are followed, at losses of equal ratios."""
    for name in (key for key in rows[0] if key.startswith("entry/")):
        for level in _LOSSES:
            for before, after in pairwise(rows):
                if before["train/loss"] > level >= after["train/loss"]:
                    yield run, f"|{name}| at loss {level:g}", _between(before, after, name, level)
                    if "determinant" in after:
                        yield run, f"sign of the determinant at loss {level:g}", math.copysign(1, after["determinant"])
                    break


def _between(before: Mapping[str, float], after: Mapping[str, float], name: str, level: float) -> float:
    high, low = (math.log(row["train/loss"]) for row in (before, after))
    share = (high - math.log(level)) / (high - low)
    start, end = (math.log(abs(row[name]) or 1e-300) for row in (before, after))
    return math.exp(start + share * (end - start))
