"""Complete the tensors of completion runs by the sum of nuclear norms and by masked alternating least squares.

The baselines see the same entries as gradient descent. Alternating least squares is told the number of components:
once the true one, once twice as many.

    lightning-locality sweep configs/sweeps/completion_baselines.yaml
    python results/completion_baselines/make.py runs/completion_baselines

The script writes baselines.csv, its figure, and dynamics.pdf and .png of one run, with the baselines as lines, into the
folder of the sweep.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from lightning_locality.datamodules.tensor_recovery import TensorRecovery
from lightning_locality.plotting import dynamics, observations
from lightning_locality.plotting.style import save_figure
from lightning_locality.results import read_runs, read_settings
from lightning_locality.tasks import cp_als_completion, nuclear_norm_completion


def baseline_errors(data: dict[str, Any]) -> dict[str, float]:
    """Return the reconstruction errors of the baselines on the observations of a data module with these arguments."""
    problem, rank = TensorRecovery(**data).problem, data["rank"]
    if problem.target is None:
        raise ValueError("the target is too large to be written out")
    target: Tensor = problem.target
    completed = {"sum of nuclear norms": nuclear_norm_completion(problem.train, target.shape)}
    for number in (rank, 2 * rank):
        name = f"alternating least squares, {number} components"
        completed[name] = cp_als_completion(problem.train, target.shape, number)
    return {name: float((tensor - target).norm() / target.norm()) for name, tensor in completed.items()}


def main(arguments: Sequence[str] | None = None) -> pd.DataFrame:
    """Complete, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the sweep")
    parser.add_argument("--observations", type=int, default=1024, help="of the run whose dynamics are drawn")
    options = parser.parse_args(arguments)
    runs = read_runs([options.folder])
    runs = runs[runs["finished"]]
    rows, lines = [], dict[Path, dict[str, float]]()
    for run in runs.to_dict("records"):
        data = read_settings(run["folder"])["data"]["init_args"]
        lines[run["folder"]] = baseline_errors(data)
        errors = {run["variant"]: run["reconstruction_error"], **lines[run["folder"]]}
        point = {"observations": data["observations"], "seed": data["seed"]}
        rows += [{"variant": name, **point, "reconstruction_error": error} for name, error in errors.items()]
    table = pd.DataFrame(rows)
    table.to_csv(options.folder / "baselines.csv", index=False, lineterminator="\r\n")
    save_figure(observations(table, width="column")[0], options.folder / "baselines")
    drawn = runs[runs["observations"] == options.observations].head(1)
    if len(drawn):
        reference = lines[drawn["folder"].iloc[0]]
        figure, numbers = dynamics(drawn, loss=False, reference=reference)
        save_figure(figure, options.folder / "dynamics")
        numbers.to_csv(options.folder / "dynamics.csv", index=False, lineterminator="\r\n")
    return table


if __name__ == "__main__":
    main()
