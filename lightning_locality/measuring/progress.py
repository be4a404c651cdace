"""How far a list of measurements is: a bar on a terminal, a line per measurement elsewhere."""

from __future__ import annotations

__all__ = ["RankProgress"]

import time
from collections.abc import Sequence
from typing import Any, Self, final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@final
class RankProgress:
    """Shows what is being measured, how much is done and the time that remains.

    Args:
        work: What each measurement costs, in any unit.
        shown: Whether anything is printed: one of several processes is enough.
        console: Where.

    Example:
        >>> import io
        >>> progress = RankProgress([2.0, 1.0], console=Console(file=io.StringIO()))
        >>> with progress:
        ...     progress.start("a: nodes")
        ...     progress.advance(1, 2)
        ...     half = progress.share
        ...     progress.finish()
        >>> round(half, 3), round(progress.share, 3)
        (0.333, 0.667)
    """

    def __init__(self, work: Sequence[float], shown: bool = True, console: Console | None = None) -> None:
        self.work, self.shown = list(work), shown
        self.console = Console() if console is None else console
        self._number, self._rows, self._last, self._cost = 0, 0, 0, 1.0
        self._started = self._item_started = time.monotonic()
        self._name = ""
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        if self.shown and self.work and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
            times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
            # speed over a long time: one measurement's passes are not as fast as another's
            self._bar = Progress(*columns, *times, console=self.console, transient=True, speed_estimate_period=600)
            self._task = self._bar.add_task("", total=sum(self.work))
            self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def share(self) -> float:
        """How much of the work is done, 0 to 1."""
        total = sum(self.work)
        return self._done() / total if total else 1.0

    def _done(self) -> float:
        before = sum(self.work[: self._number])
        return (
            before + min(self._cost * self._rows, self.work[self._number]) if self._number < len(self.work) else before
        )

    def start(self, name: str, cost: float = 1.0) -> None:
        """Begin the next measurement.

        Args:
            name: What is shown.
            cost: Work of one evaluation.
        """
        self._name, self._cost, self._item_started = name, cost, time.monotonic()
        self._rows = self._last = 0
        if self._bar is not None:
            self._bar.update(self._task, description=f"{name} ({self._number + 1} of {len(self.work)})")

    def advance(self, done: int, count: int) -> None:
        """Note that of ``count`` evaluations of a network ``done`` are made; the next ones start from 0 again.

        Args:
            done: How many.
            count: Of how many.
        """
        self._rows += done - self._last if done >= self._last else done
        self._last = done if done < count else 0
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done())

    def finish(self) -> None:
        """End the measurement."""
        self._number += 1
        self._rows = 0
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done())
        elif self.shown:
            now = time.monotonic()
            left = (now - self._started) * (1 / self.share - 1) if self.share > 0 else 0.0
            rest = f", about {left:.0f} s left" if self._number < len(self.work) else ""
            line = f"{self._name} ({self._number} of {len(self.work)}): {now - self._item_started:.1f} s{rest}"
            self.console.print(line, soft_wrap=True, markup=False, highlight=False)
