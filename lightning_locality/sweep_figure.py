"""The figure of a sweep."""

from __future__ import annotations

__all__ = ["SweepFigure"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

from matplotlib.figure import Figure

from lightning_locality.bounds import lower_bounds
from lightning_locality.old_results import FinishedRun, result_row
from lightning_locality.outcomes import against_depth, completion_against_observations, rank_against_fit
from lightning_locality.plotting.cells import write_table
from lightning_locality.plotting.drawn import draw_chart
from lightning_locality.plotting.options import parsed
from lightning_locality.plotting.run_table import Row, RunTable, Value
from lightning_locality.plotting.style import accuracy_curves, read_metrics, save_figure
from lightning_locality.suggest import nearest
from lightning_locality.trajectories import component_curves, read_iterations, value_against_loss

Kind = Literal["accuracy", "xy", "components", "value", "depth", "rank", "observations"]
_OPTIONS: dict[Kind, tuple[str, ...]] = {
    "accuracy": ("x", "group", "panel", "chance", "labels", "width"),
    "xy": ("x", "y", "group", "panel", "over", "log", "statistic", "spread", "labels", "width"),
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
        kind: ``"accuracy"``: accuracy against epoch; with ``x``, test accuracy at the end against what was varied, as
            ``lightning-locality figure accuracy`` draws it. ``"xy"``: as that command does. ``"components"``:
            magnitudes and error against iteration, a column per run.
            ``"value"``: an unobserved entry against the loss, with the lower bound of the problem.
            ``"depth"``, ``"rank"``, ``"observations"``: how the runs end against what was varied.
        options: Of the command, or of the function that draws it (:mod:`~lightning_locality.trajectories`,
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
        figure = cls(kind, options)
        if figure._chart:
            try:
                parsed(figure._arguments)
            except SystemExit as error:
                raise ValueError(f"{where}: figure {kind!r} cannot be drawn with {options}, see above") from error
        return figure

    @property
    def _chart(self) -> bool:
        """Whether it is one of the charts of the figure command."""
        return self.kind == "xy" or (self.kind == "accuracy" and "x" in self.options)

    @property
    def _arguments(self) -> list[str]:
        """As they would be typed after ``lightning-locality figure``."""
        words = [str(self.kind), "."]
        for name, value in self.options.items():
            values = [f"{k}={v}" for k, v in value.items()] if isinstance(value, Mapping) else value
            words += [f"--{name}", *(map(str, values) if isinstance(values, (list, tuple)) else [str(values)])]
        return words

    def save(self, runs: Sequence[FinishedRun], folder: Path) -> Path | None:
        """Draw the runs that have metrics into ``FOLDER/KIND.pdf`` and ``.png``.

        Args:
            runs: The runs.
            folder: Where the figure goes.

        Returns:
            The picture; None where there is nothing to draw yet.
        """
        if self._chart:
            return self._save_chart(runs, folder)
        started = [run for run in runs if (run.folder / "metrics.csv").exists()]
        figure = self._draw(started) if started else None
        if figure is None:
            return None
        save_figure(figure, folder / self.kind)
        return folder / f"{self.kind}.png"

    def _save_chart(self, runs: Sequence[FinishedRun], folder: Path) -> Path | None:
        rows = [Row(_values(result_row(run)), run.folder, run.finished) for run in runs]
        if not any(row.finished for row in rows):
            return None
        varied = dict.fromkeys(name for run in runs for name in run.point)
        drawn = draw_chart(parsed(self._arguments), RunTable(tuple(rows), ("variant", *varied)))
        write_table(drawn.numbers, folder / f"{self.kind}.csv")
        save_figure(drawn.figure, folder / self.kind)
        return folder / f"{self.kind}.png"

    def _draw(self, runs: Sequence[FinishedRun]) -> Figure | None:
        assert self.kind != "xy"  # is a chart
        if self.kind == "accuracy":
            histories = [read_metrics(run.folder / "metrics.csv") for run in runs]
            if not any(name.endswith("/accuracy") for rows in histories for row in rows for name in row):
                return None
            return accuracy_curves(_by_variant(runs, histories))
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
                return value_against_loss(
                    _by_variant(runs, rows),
                    bounds=lower_bounds({run.folder: run.variant for run in runs}),
                    **self.options,
                )
            case "depth":
                return against_depth(last, **self.options)
            case "rank":
                return rank_against_fit(last, **self.options)
            case "observations":
                return completion_against_observations(last, **self.options)


def _values(row: Mapping[str, Any]) -> dict[str, Value]:
    """What a results.csv would say of it: lists as text, nothing for None."""
    known = {name: value for name, value in row.items() if value is not None}
    return {name: v if isinstance(v, (bool, int, float, str)) else str(v) for name, v in known.items()}


def _by_variant(runs: Sequence[FinishedRun], rows: Sequence[Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for run, own in zip(runs, rows, strict=True):
        found.setdefault(run.variant, []).append(own)
    return found
