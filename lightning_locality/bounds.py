"""Lower bounds of an unobserved entry, for the problems of recovery runs."""

from __future__ import annotations

__all__ = ["lower_bounds"]

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lightning_locality.trajectories import Bound


def lower_bounds(labels: Mapping[Path, str]) -> dict[str, Bound]:
    """Lower bound of every label's problem, one for all in black where they share the problem.

    Args:
        labels: Folder of a run, with its ``config.yaml`` -> how the run is called in the figure.

    Returns:
        What :func:`~lightning_locality.trajectories.value_against_loss` takes; empty where no problem has a bound.
    """
    problems = {label: _problem(folder / "config.yaml") for folder, label in labels.items()}
    known = {label: problem for label, problem in problems.items() if problem is not None}
    if len(set(known.values())) == 1:
        return {"lower bound": _bound(*next(iter(known.values())))}
    return {label: _bound(*problem) for label, problem in known.items()}


def _problem(config: Path) -> tuple[float, float, float, bool] | None:
    """z, z', eps of the run's data module and whether it is larger than 2x2, where it is one with a bound."""
    content = yaml.safe_load(config.read_text()) if config.is_file() else {}
    data = (content.get("data") or {}).get("init_args") or {}
    if not {"rows", "cols", "z", "z_prime", "eps"} <= data.keys() or data["rows"] != data["cols"]:
        return None
    return data["z"], data["z_prime"], data["eps"], data["rows"] > 2


def _bound(z: float, z_prime: float, eps: float, larger: bool) -> Bound:
    # here, because the data modules load Lightning
    from lightning_locality.datamodules.two_by_two import lower_bound

    def bound(losses: Any) -> Any:
        values = [lower_bound(float(loss), z, z_prime, eps, larger=larger) for loss in losses]
        return np.where(np.asarray(values) > 0, values, np.nan)

    return bound
