r"""Cut share and test accuracy of the networks of a sweep, side by side: does the one tell the other?

    lightning-locality sweep configs/sweeps/quickstart_seeds.yaml
    lightning-locality rank --checkpoint runs/quickstart_seeds/*/last.ckpt --images 1024 --samples 256 \
        --repetitions 4 --patch 8 --method exact --out ranks_seeds
    python experiments/share_and_accuracy.py runs/quickstart_seeds ranks_seeds --out seeds.csv
    lightning-locality figure xy seeds.csv --x cut_share --y test_accuracy --group variant --points

The rows are those of the sweep's results.csv; the shares are those across the cut between left and right.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Network:
    """One trained network: what it was trained on, how well it does, what crosses the middle."""

    variant: str
    seed: int
    train_accuracy: float
    test_accuracy: float
    cut_share: float
    standard_error: float


def read(sweep: Path, ranks: Path) -> list[Network]:
    """Pair the sweep's rows with the shares across the cut between left and right."""
    with (ranks / "ranks.csv").open(newline="") as file:
        shares = {
            row["checkpoint"]: (float(row["value"]), float(row["standard_error"]))
            for row in csv.DictReader(file)
            if (row["quantity"], row["key"]) == ("cut_share", "left")
        }
    networks = []
    with (sweep / "results.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            folder = "".join(c if c.isalnum() else "_" for c in row["variant"])
            seed = int(row["seed_everything"])
            accuracies = (float(row["train/accuracy"]), float(row["test/accuracy"]))
            networks.append(Network(row["variant"], seed, *accuracies, *shares[f"{folder}-seed_everything={seed}"]))
    return networks


def main(arguments: Sequence[str] | None = None) -> None:
    """Read and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="folder of the sweep")
    parser.add_argument("ranks", type=Path, help="folder that `lightning-locality rank` wrote")
    parser.add_argument("--out", type=Path, required=True, help="CSV to write")
    options = parser.parse_args(arguments)
    networks = read(options.sweep, options.ranks)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(Network)])
        writer.writerows([f"{x:.4g}" if isinstance(x, float) else x for x in astuple(network)] for network in networks)


if __name__ == "__main__":
    main()
