"""Where the dashes and discs of Pathfinder pictures lie, drawn for a batch of pictures in lock step."""

from __future__ import annotations

__all__ = ["Placement", "place"]

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_locality.datamodules.canvas import Canvas, Flags
from lightning_locality.datamodules.curves import PathfinderCurves
from lightning_locality.datamodules.draws import Draws
from lightning_locality.datamodules.strokes import DEGREES, Integers

MAX_MISSES = 16  # places tried before all free ones are listed
MAX_FAILURES = 20_000  # attempts at target curves in a row without one that succeeds


@dataclass(frozen=True)
class Placement:
    """Dashes and discs of ``B`` pictures.

    Args:
        label: 1 where both discs lie on one curve ``(B,)``.
        at: Pixel ``(B, P, 2)``, (down, right), that a dash is placed by: the start of the first dash of a curve,
            the end of all others. The first two times ``path_length`` are those of the two target curves.
        stroke: Direction number ``(B, P)`` in :class:`~lightning_locality.datamodules.strokes.Strokes`, -1 where
            there is no dash.
        discs: Centres ``(B, 2, 2)`` of the two discs.
    """

    label: Integers
    at: Integers
    stroke: Integers
    discs: Integers


def place(curves: PathfinderCurves, seed: int, stream: int, index: Sequence[int]) -> Placement:
    """Place the pictures ``index``; each depends on ``seed``, ``stream`` and its own number alone."""
    return _Batch(curves, seed, stream, index).place()


class _Batch:
    """Pictures under way.

    While the target curves grow, grid c of the canvas is what curve c must avoid: all of the other curve, and its
    own dashes but the last. Afterwards grid 0 is what a distractor must avoid, and grid 1 the same without the
    distractor under way, to which grid 0 returns when the distractor finds no way on.
    """

    def __init__(self, curves: PathfinderCurves, seed: int, stream: int, index: Sequence[int]) -> None:
        self.curves = curves
        self.draws = Draws(seed, stream, index)
        self.canvas = Canvas(curves, self.draws, len(index))
        self.rows = np.arange(len(index))
        self.label = self.draws.below(self.rows, 2)
        if curves.balanced:
            # an odd picture has the other label than the one before
            odd = np.flatnonzero(np.asarray(index) % 2)
            before = Draws(seed, stream, [int(index[row]) - 1 for row in odd.tolist()])
            self.label[odd] = 1 - before.below(np.arange(len(odd)), 2)
        self.marked = self.draws.below(self.rows, 2)
        self.at = np.zeros((len(index), curves.max_paddles), dtype=np.int64)
        self.stroke = np.full((len(index), curves.max_paddles), -1, dtype=np.int64)
        self.joint = np.zeros((len(index), 2), dtype=np.int64)  # where the newest dash of a curve joins it

    def place(self) -> Placement:
        """All of it."""
        self._targets()
        self._distractors()
        tables, length = self.canvas.tables, self.curves.path_length
        at = np.stack(np.divmod(self.at, tables.side), axis=2) - tables.guard
        other = np.where(self.label == 1, self.marked, 1 - self.marked)
        ends = [at[self.rows, self.marked * length], at[self.rows, other * length + length - 1]]
        at[self.stroke < 0] = 0
        return Placement(self.label, at, self.stroke, np.stack(ends, axis=1))

    def _targets(self) -> None:
        """Grow the two target curves in turns; where one finds no way on, start both again."""
        length, canvas = self.curves.path_length, self.canvas
        placed = np.zeros(len(self.rows), dtype=np.int64)  # dashes of both curves
        rows, failures = self.rows, 0
        while rows.size:
            fresh = rows[placed[rows] == 0]
            placed[self._start(fresh)] = 2
            growing = rows[placed[rows] > 0]
            dash, curve = np.divmod(placed[growing], 2)
            slot = curve * length + dash
            before_at, before = self.at[growing, slot - 1], self.stroke[growing, slot - 1]
            found, joint, at, stroke = canvas.grow(growing, curve, self.joint[growing, curve], before)
            placed[growing[~found]] = 0
            growing, curve, slot = growing[found], curve[found], slot[found]
            joint, at, stroke = joint[found], at[found], stroke[found]
            canvas.cover(growing, curve, before_at[found], before[found])
            canvas.cover(growing, 1 - curve, at, stroke)
            self.joint[growing, curve], self.at[growing, slot] = joint, at
            self.stroke[growing, slot] = stroke
            placed[growing] += 1
            done = placed[rows] == 2 * length
            failures = 0 if done.any() else failures + int((placed[rows] == 0).sum())
            rows = rows[~done]
            if failures > MAX_FAILURES:
                raise ValueError(
                    f"two curves of path_length={length} do not fit in window={self.curves.window} with padding="
                    f"{self.curves.padding}: {failures} attempts in a row failed; choose a smaller path_length or a "
                    "larger window"
                )
        # each grid still misses the last dash of its own curve; from here on both hold everything
        for number in (0, 1):
            last = number * length + length - 1
            canvas.cover(self.rows, np.full_like(self.rows, number), self.at[:, last], self.stroke[:, last])

    def _start(self, rows: Integers) -> Integers:
        """Clear ``rows`` and set the first dashes of both curves; the rows where that succeeded."""
        curves, canvas, draws = self.curves, self.canvas, self.draws
        tables = canvas.tables
        canvas.clear(rows)
        first = draws.below(rows, DEGREES)
        low = curves.start_border - tables.low[first]
        extent = curves.window - curves.start_border - tables.high[first] - low
        down, right = np.divmod(draws.below(rows, extent[:, 0] * extent[:, 1]), extent[:, 1])
        at = tables.flat(low + tables.guard + np.stack([down, right], axis=1))
        second = draws.below(rows, DEGREES)
        angle = np.deg2rad(draws.below(rows, DEGREES))
        aside = np.stack([np.sin(angle), np.cos(angle)], axis=1) * curves.seed_distance
        other = at + tables.flat(np.rint(np.round(aside, 9)).astype(np.int64))
        zero = np.zeros_like(rows)
        canvas.cover(rows, zero + 1, at, first)
        started = ~canvas.touches(rows, zero + 1, other, second)
        canvas.cover(rows, zero, other, second)
        for curve, (start, stroke) in enumerate([(at, first), (other, second)]):
            slot = curve * curves.path_length
            self.at[rows, slot], self.stroke[rows, slot] = start, stroke
            self.joint[rows, curve] = start + tables.backward[stroke]
        return rows[started]

    def _distractors(self) -> None:
        """Place distractors one after the other; one that does not fit after all tries is left out."""
        curves, canvas = self.curves, self.canvas
        length, count = curves.paddles_per_distractor, len(self.rows)
        largest = canvas.tables.area.shape[1] * curves.max_paddles
        interior = (canvas.end - canvas.border) ** 2
        may_fill = interior - largest < curves.stop_with_availability * curves.window**2
        self.number = np.zeros(count, dtype=np.int64)  # distractors placed or left out
        self.tries = np.zeros(count, dtype=np.int64)  # of this distractor
        self.placed = np.zeros(count, dtype=np.int64)  # dashes of this try
        self.misses = np.zeros(count, dtype=np.int64)  # places without room in this try
        self.heading = np.zeros(count, dtype=np.int64)  # direction of the first dash of this try
        rows = self.rows if curves.distractor_count else self.rows[:0]
        while rows.size:
            fresh = rows[(self.placed[rows] == 0) & (self.misses[rows] == 0)]
            if may_fill:
                full = [canvas.free_share(row) < curves.stop_with_availability for row in fresh]
                self.number[fresh[full]] = curves.distractor_count
                rows, fresh = rows[self.number[rows] < curves.distractor_count], fresh[~np.array(full, dtype=bool)]
            self.heading[fresh] = self.draws.below(fresh, DEGREES)
            self._seed(rows[self.placed[rows] == 0])
            growing = rows[(self.placed[rows] > 0) & (self.placed[rows] < length)]
            self._extend(growing)
            complete = rows[self.placed[rows] == length]
            self._finish(complete)
            rows = rows[self.number[rows] < curves.distractor_count]

    def _slot(self, rows: Integers, dash: Integers) -> Integers:
        slot: Integers = 2 * self.curves.path_length + self.number[rows] * self.curves.paddles_per_distractor + dash
        return slot

    def _seed(self, rows: Integers) -> None:
        """Try one place for the first dash of a distractor: uniform over the places with room."""
        canvas, tables = self.canvas, self.canvas.tables
        side = canvas.end - canvas.border
        offset = np.stack(np.divmod(self.draws.below(rows, side * side), side), axis=1)
        at = tables.flat(offset + canvas.border)
        stroke, zero = self.heading[rows], np.zeros_like(rows)
        room = canvas.room(rows, zero, at, stroke)
        self.misses[rows[~room]] += 1
        for number in np.flatnonzero(~room & (self.misses[rows] >= MAX_MISSES)):
            places = canvas.places(int(rows[number]), int(stroke[number]))
            if places.size:
                choice = self.draws.below(rows[number : number + 1], places.size)
                at[number], room[number] = places[choice[0]], True
            else:
                self._give_up(rows[number : number + 1])
        rows, at, stroke = rows[room], at[room], stroke[room]
        slot = self._slot(rows, zero[room])
        self.at[rows, slot], self.stroke[rows, slot] = at, stroke
        self.joint[rows, 0] = at + tables.backward[stroke]
        self.placed[rows] = 1

    def _extend(self, rows: Integers) -> None:
        """Add a dash to the distractors under way."""
        slot, grid = self._slot(rows, self.placed[rows]), np.zeros_like(rows)
        last_at, last = self.at[rows, slot - 1], self.stroke[rows, slot - 1]
        found, joint, at, stroke = self.canvas.grow(rows, grid, self.joint[rows, 0], last)
        self._give_up(rows[~found])
        rows, slot = rows[found], slot[found]
        self.canvas.cover(rows, grid[found], last_at[found], last[found])
        self.joint[rows, 0], self.at[rows, slot], self.stroke[rows, slot] = joint[found], at[found], stroke[found]
        self.placed[rows] += 1

    def _give_up(self, rows: Integers) -> None:
        """Take back the distractors under way; the next try, or the next distractor after the last try."""
        for dash in range(self.curves.paddles_per_distractor):
            written = rows[self.placed[rows] > dash]
            slot = self._slot(written, np.full_like(written, dash))
            self.canvas.settle(written, self.at[written, slot], self.stroke[written, slot])
            self.stroke[written, slot] = -1
        self.tries[rows] += 1
        self.number[rows[self.tries[rows] > self.curves.distractor_retries]] += 1
        self._next(rows, keep=self.tries[rows] <= self.curves.distractor_retries)

    def _finish(self, rows: Integers) -> None:
        """Enter the completed distractors in both grids."""
        zero = np.zeros_like(rows)
        for dash in range(self.curves.paddles_per_distractor):
            slot = self._slot(rows, zero + dash)
            self.canvas.cover(rows, zero, self.at[rows, slot], self.stroke[rows, slot])
            self.canvas.cover(rows, zero + 1, self.at[rows, slot], self.stroke[rows, slot])
        self.number[rows] += 1
        self._next(rows, keep=np.zeros(len(rows), dtype=bool))

    def _next(self, rows: Integers, keep: Flags) -> None:
        self.tries[rows[~keep]] = 0
        self.placed[rows], self.misses[rows] = 0, 0
