"""Estimate the CP ranks of the tensors that completion runs end with, and of the observed entries padded with zeros.

The rank is estimated as in "Implicit Regularization in Deep Learning May Not Be Explainable by Norms" (Razin, Cohen,
2020): the smallest number of components with which alternating least squares, from random vectors and for at most 1000
sweeps, comes within a mean squared error of 1e-6 (by doubling and bisection, so errors are taken to fall with the
rank). The baseline "zeros elsewhere" is the paper's "linear" one.

    lightning-locality sweep configs/sweeps/completion_rank_one.yaml
    python results/completion_rank_one/cp_ranks.py runs/completion_rank_one

The script writes ranks.csv and ranks.pdf and .png into the folder of the sweep.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from tensorly.cp_tensor import cp_to_tensor
from tensorly.decomposition import parafac

from lightning_locality.datamodules.tensor_recovery import TensorRecovery
from lightning_locality.plotting import observations
from lightning_locality.plotting.style import save_figure
from lightning_locality.results import read_settings

BASELINE = "zeros elsewhere"
Array = NDArray[np.float64]


def fits(tensor: Array, rank: int, tolerance: float = 1e-6, sweeps: int = 1000) -> bool:
    """Return whether alternating least squares with this many components comes within the mean squared error."""
    # with more components than the tensor has, the systems are singular but for a little ridge
    found = parafac(tensor, rank, n_iter_max=sweeps, init="random", tol=1e-9, random_state=0, l2_reg=1e-9)
    return bool(np.mean((cp_to_tensor(found) - tensor) ** 2) < tolerance)


def cp_rank(tensor: Array, tolerance: float = 1e-6, sweeps: int = 1000) -> int:
    """Find the smallest number of components that fit, by doubling and bisection; 0 for zero within the tolerance."""
    if np.mean(tensor**2) < tolerance:
        return 0
    # always enough
    low, high, enough = 0, 1, tensor.size // max(tensor.shape)
    while high < enough and not fits(tensor, high, tolerance, sweeps):
        low, high = high, min(2 * high, enough)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(tensor, middle, tolerance, sweeps):
            high = middle
        else:
            low = middle
    return high


def run_rows(folder: Path, with_baseline: bool) -> list[dict[str, Any]]:
    """Return rank and error of the end of a run, and of the baseline on the same observations."""
    config = read_settings(folder)
    data = config["data"]["init_args"]
    planted = config["model"]["init_args"]["model"]
    module, _, name = planted["class_path"].rpartition(".")
    settings = {**planted["init_args"], "dtype": None, "device": None}
    model = getattr(import_module(module), name)(**settings).double()
    stored = torch.load(folder / "last.ckpt", weights_only=True, map_location="cpu")["state_dict"]
    model.load_state_dict({key.removeprefix("model."): value for key, value in stored.items()})
    problem = TensorRecovery(**data).problem
    target = problem.target
    if target is None:
        raise ValueError(f"{folder}: the target is too large to be written out")
    tensors = {f"initial scale {settings['init_scale']:g}": model.to_tensor().detach()}
    if with_baseline:
        tensors[BASELINE] = torch.zeros_like(target)
        tensors[BASELINE][tuple(problem.train.indices.T)] = problem.train.values
    rows = []
    for variant, tensor in tensors.items():
        row = {"variant": variant, "observations": data["observations"], "seed": data["seed"]}
        error = float((tensor - target).norm() / target.norm())
        rows.append({**row, "reconstruction_error": error, "cp rank": cp_rank(tensor.numpy())})
    return rows


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Estimate, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the sweep")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--baselines", type=int, help="seeds for which the baseline's rank is estimated (default: all)")
    options = parser.parse_args(arguments)
    folders = sorted(path.parent for path in options.folder.glob("*/summary.json"))
    if not folders:
        raise ValueError(f"{options.folder} holds no finished runs: run the sweep first")
    # the baseline does not depend on the start: once per problem
    drawn = [read_settings(folder)["data"]["init_args"] for folder in folders]
    problems = [(data["observations"], data["seed"]) for data in drawn]
    wanted = sorted({data["seed"] for data in drawn})[: options.baselines]
    first = [problem not in problems[:k] and problem[1] in wanted for k, problem in enumerate(problems)]
    with ProcessPoolExecutor(options.processes) as pool:
        found = [row for rows in pool.map(run_rows, folders, first) for row in rows]
    rows = sorted(found, key=lambda row: (row["variant"], row["observations"], row["seed"]))
    table = pd.DataFrame(rows)
    table.to_csv(options.folder / "ranks.csv", index=False, lineterminator="\r\n")
    save_figure(observations(table)[0], options.folder / "ranks")
    return rows


if __name__ == "__main__":
    main()
