"""For the former sweep: to be replaced by check_figure and draw_sweep_figure of plotting.command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from lightning_locality.plotting.command import check_figure, draw_sweep_figure
from lightning_locality.results import read_runs


@dataclass(frozen=True)
class SweepFigure:
    """The ``figure`` entry of a sweep."""

    content: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, content: Any, where: str) -> Self:
        """Check the entry, as far as that goes without the grid."""
        try:
            check_figure(content)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        return cls(content)

    def save(self, runs: Sequence[Any], folder: Path) -> Path | None:
        """Draw the runs."""
        labels = {run.folder: {"variant": run.variant, **run.point} for run in runs}
        return draw_sweep_figure(self.content, read_runs(list(labels), labels), folder)
