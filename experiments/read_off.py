"""Numbers read off the curves of recovery runs, to be put beside those of the papers' figures.

    lightning-locality sweep configs/sweeps/staircases.yaml
    python experiments/read_off.py runs/staircases

writes readings.csv into the folder and prints it; what is read is told in lightning_locality/readings.py.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from lightning_locality.readings import Reading, readings
from lightning_locality.trajectories import read_iterations


def main(arguments: Sequence[str] | None = None) -> list[Reading]:
    """Read, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of a sweep, or of one run")
    parser.add_argument("--most", type=int, default=6, help="largest magnitudes of every group")
    options = parser.parse_args(arguments)
    files = sorted(options.folder.glob("*/metrics.csv")) or list(options.folder.glob("metrics.csv"))
    if not files:
        raise ValueError(f"{options.folder} holds no runs with a metrics.csv: run the sweep first")
    found: list[Reading] = []
    for file in files:
        rows, run = read_iterations(file), file.parent.name
        if rows:
            found += readings(run, rows, options.most)
    with (options.folder / "readings.csv").open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["run", "quantity", "value"])
        writer.writerows((run, quantity, f"{value:.6g}") for run, quantity, value in found)
    for run, quantity, value in found:
        print(f"{run:40} {quantity:45} {value:.5g}")
    return found


if __name__ == "__main__":
    main()
