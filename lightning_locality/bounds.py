"""Lower bounds of an unobserved entry, for the problems of recovery runs."""

from __future__ import annotations

__all__ = ["lower_bounds"]

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lightning_locality.trajectories import Bound

_Problem = tuple[float, float, float, bool]


def lower_bounds(labels: Mapping[Path, str]) -> dict[str, Bound]:
    """Lower bound of every label's problem, one for all in black where they share the problem.

    Args:
        labels: Folder of a run, with its ``config.yaml`` -> how the run is called in the figure.

    Returns:
        What :func:`~lightning_locality.trajectories.value_against_loss` takes; nothing for labels whose runs have
        several problems, or one without a bound.
    """
    problems: dict[str, set[_Problem | None]] = {}
    for folder, label in labels.items():
        problems.setdefault(label, set()).add(_problem(folder / "config.yaml"))
    every = set().union(*problems.values())
    if len(every) == 1 and (shared := every.pop()) is not None:
        return {"lower bound": _bound(*shared)}
    single = {label: next(iter(own)) for label, own in problems.items() if len(own) == 1}
    return {label: _bound(*problem) for label, problem in single.items() if problem is not None}


def _problem(config: Path) -> _Problem | None:
    """z, z', eps of the run's data module and whether it is larger than 2x2, where it is one with a bound."""
    content = yaml.safe_load(config.read_text()) if config.is_file() else {}
    data = (content.get("data") or {}).get("init_args") or {}
    if not {"rows", "cols", "z", "z_prime", "eps"} <= data.keys() or data["rows"] != data["cols"]:
        return None
    return data["z"], data["z_prime"], data["eps"], data["rows"] > 2


def _bound(z: float, z_prime: float, eps: float, larger: bool) -> Bound:
    # here, because the data modules load Lightning
    from lightning_locality.datamodules.unbounded import lower_bound

    def bound(losses: Any) -> Any:
        values = [lower_bound(float(loss), z, z_prime, eps, larger=larger) for loss in losses]
        return np.where(np.asarray(values) > 0, values, np.nan)

    return bound
