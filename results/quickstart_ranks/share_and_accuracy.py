r"""Pair the cut share of the networks of a sweep with their test accuracy: does one predict the other?

    lightning-locality sweep configs/sweeps/quickstart_seeds.yaml
    lightning-locality rank --checkpoint runs/quickstart_seeds/*/last.ckpt --number 1024 --samples 256 \
        --repetitions 4 --patch 8 --method exact --out ranks_seeds
    python results/quickstart_ranks/share_and_accuracy.py runs/quickstart_seeds ranks_seeds --out seeds.csv
    lightning-locality figure xy seeds.csv --x cut_share --y test_accuracy --group variant --points

The rows are the runs of the sweep; the shares are those across the cut between left and right.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from lightning_locality.results import read_runs

_COLUMNS = {
    "variant": "variant",
    "seed_everything": "seed",
    "train/accuracy": "train_accuracy",
    "test/accuracy": "test_accuracy",
    "value": "cut_share",
    "standard_error": "standard_error",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, pair and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="folder of the sweep")
    parser.add_argument("ranks", type=Path, help="folder that `lightning-locality rank` wrote")
    parser.add_argument("--out", type=Path, required=True, help="CSV to write")
    options = parser.parse_args(arguments)
    ranks = pd.read_csv(options.ranks / "ranks.csv")
    shares = ranks[(ranks["quantity"] == "cut_share") & (ranks["key"] == "left")]
    networks = read_runs([options.sweep]).merge(shares, left_on="run", right_on="checkpoint", validate="1:1")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    networks[list(_COLUMNS)].rename(columns=_COLUMNS).to_csv(options.out, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
