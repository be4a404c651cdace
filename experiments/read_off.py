"""Numbers read off the curves of recovery runs, to be put beside those of the papers' figures.

    lightning-locality sweep configs/sweeps/staircases.yaml
    python experiments/read_off.py runs/staircases

writes readings.csv into the folder and prints it: for every run and group of magnitudes (singular values, component
norms, local component norms) the last value of each of the largest, and the iteration at which it has first exceeded
half of that; the first iteration at which the reconstruction error is below 0.5, 0.1, 0.01 and 0.001, its minimum and
its last value; and where an unobserved entry is followed, its absolute value when the loss first falls below 0.1, 0.01,
0.001 and 0.0001 (between two measurements on the straight line in logarithms), and the sign of the determinant then.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from lightning_locality.trajectories import Rows, magnitude_groups, read_iterations

Reading = tuple[str, str, float]
LEVELS = (0.5, 0.1, 0.01, 0.001)
LOSSES = (1e-1, 1e-2, 1e-3, 1e-4)


def components(run: str, rows: Rows, most: int) -> Iterator[Reading]:
    """Last values of the largest magnitudes that are not nothing, and when they came."""
    last = rows[-1]
    for names in magnitude_groups(rows).values():
        shown = [name for name in names[:most] if last[name] > 1e-3 * last[names[0]]]
        for name in shown:
            yield run, name, last[name]
            yield run, f"{name} at half", next(row["iteration"] for row in rows if row[name] > last[name] / 2)


def errors(run: str, rows: Rows) -> Iterator[Reading]:
    """When the reconstruction error has fallen how far."""
    name = "reconstruction_error"
    if name not in rows[-1]:
        return
    for level in LEVELS:
        below = next((row["iteration"] for row in rows if row[name] < level), None)
        if below is not None:
            yield run, f"error below {level:g} at", below
    yield run, "least error", min(row[name] for row in rows)
    yield run, "last error", rows[-1][name]


def unseen_entries(run: str, rows: Rows) -> Iterator[Reading]:
    """Absolute value of the entries that are followed, at losses of equal ratios."""
    for name in (key for key in rows[0] if key.startswith("entry/")):
        for level in LOSSES:
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


def main(arguments: Sequence[str] | None = None) -> list[Reading]:
    """Read, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of a sweep, or of one run")
    parser.add_argument("--most", type=int, default=6, help="largest magnitudes of every group")
    options = parser.parse_args(arguments)
    files = sorted(options.folder.glob("*/metrics.csv")) or list(options.folder.glob("metrics.csv"))
    if not files:
        raise ValueError(f"{options.folder} holds no runs with a metrics.csv: run the sweep first")
    readings: list[Reading] = []
    for file in files:
        rows, run = read_iterations(file), file.parent.name
        if rows:
            readings += [*components(run, rows, options.most), *errors(run, rows), *unseen_entries(run, rows)]
    with (options.folder / "readings.csv").open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["run", "quantity", "value"])
        writer.writerows((run, quantity, f"{value:.6g}") for run, quantity, value in readings)
    for run, quantity, value in readings:
        print(f"{run:40} {quantity:45} {value:.5g}")
    return readings


if __name__ == "__main__":
    main()
