"""The figure of a sweep."""

from __future__ import annotations

__all__ = ["SweepFigure"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import yaml
from matplotlib.figure import Figure

from lightning_locality.figures import accuracy_curves, read_metrics, save_figure
from lightning_locality.outcomes import against_depth, completion_against_observations, rank_against_fit
from lightning_locality.results import FinishedRun
from lightning_locality.suggest import nearest
from lightning_locality.trajectories import Bound, component_curves, read_iterations, value_against_loss

Kind = Literal["accuracy", "components", "value", "depth", "rank", "observations"]
_OPTIONS: dict[Kind, tuple[str, ...]] = {
    "accuracy": (),
    "components": ("groups", "top", "x"),
    "value": ("entry", "least", "split"),
    "depth": ("x", "by"),
    "rank": ("by", "scale", "trivial"),
    "observations": ("by", "x"),
}


@dataclass(frozen=True)
class SweepFigure:
    """Which figure a sweep draws of its runs.

    Args:
        kind: ``"accuracy"``: accuracy against epoch. ``"components"``: magnitudes and error against iteration, a
            column per run. ``"value"``: an unobserved entry against the loss, with the lower bound of the problem.
            ``"depth"``, ``"rank"``, ``"observations"``: how the runs end against what was varied.
        options: Of the function that draws it (:mod:`~lightning_locality.trajectories`,
            :mod:`~lightning_locality.outcomes`).
    """

    kind: Kind = "accuracy"
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, content: Any, where: str) -> Self:
        """From the entry ``figure: {kind: components, top: 5}`` of a sweep file.

        Args:
            content: The entry; None for the default.
            where: Named in messages.

        Raises:
            ValueError: Unknown kind or option.
        """
        if content is None:
            return cls()
        if not isinstance(content, dict) or "kind" not in content:
            raise ValueError(f"{where}: figure must be a mapping with a kind, as {{kind: components}}, got {content!r}")
        kind, kinds = content["kind"], get_args(Kind)
        if kind not in kinds:
            raise ValueError(f"{where}: unknown kind of figure {kind!r}{nearest(str(kind), kinds)}; known: {kinds}")
        options = {key: value for key, value in content.items() if key != "kind"}
        known = _OPTIONS[kind]
        for key in options:
            if key not in known:
                raise ValueError(
                    f"{where}: figure {kind!r} has no option {key!r}{nearest(str(key), known)}; known: {known}"
                )
        return cls(kind, options)

    def save(self, runs: Sequence[FinishedRun], folder: Path) -> Path | None:
        """Draw the runs that have metrics into ``FOLDER/KIND.pdf`` and ``.png``.

        Args:
            runs: The runs.
            folder: Where the figure goes.

        Returns:
            The picture; None where there is nothing to draw yet.
        """
        started = [run for run in runs if (run.folder / "metrics.csv").exists()]
        figure = self._draw(started) if started else None
        if figure is None:
            return None
        save_figure(figure, folder / self.kind)
        return folder / f"{self.kind}.png"

    def _draw(self, runs: Sequence[FinishedRun]) -> Figure | None:
        if self.kind == "accuracy":
            return accuracy_curves(_by_variant(runs, [read_metrics(run.folder / "metrics.csv") for run in runs]))
        rows = [read_iterations(run.folder / "metrics.csv") for run in runs]
        runs, rows = [run for run, own in zip(runs, rows, strict=True) if own], [own for own in rows if own]
        if not runs:
            return None
        last = [{"variant": run.variant, **own[-1], **run.point} for run, own in zip(runs, rows, strict=True)]
        match self.kind:
            case "components":
                single = len({run.variant for run in runs}) == len(runs)
                titles = [run.variant if single else run.folder.name for run in runs]
                return component_curves(dict(zip(titles, rows, strict=True)), **self.options)
            case "value":
                return value_against_loss(_by_variant(runs, rows), bounds=_bounds(runs), **self.options)
            case "depth":
                return against_depth(last, **self.options)
            case "rank":
                return rank_against_fit(last, **self.options)
            case "observations":
                return completion_against_observations(last, **self.options)


def _by_variant(runs: Sequence[FinishedRun], rows: Sequence[Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for run, own in zip(runs, rows, strict=True):
        found.setdefault(run.variant, []).append(own)
    return found


def _bounds(runs: Sequence[FinishedRun]) -> dict[str, Bound]:
    """Lower bound of every variant's problem, one for all in black where they share the problem."""
    problems = {run.variant: _problem(run.folder / "config.yaml") for run in runs}
    known = {variant: problem for variant, problem in problems.items() if problem is not None}
    if len(set(known.values())) == 1:
        return {"lower bound": _bound(*next(iter(known.values())))}
    return {variant: _bound(*problem) for variant, problem in known.items()}


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
