"""Where the dashes and discs of Pathfinder pictures lie, drawn for a batch of pictures in lock step."""

from __future__ import annotations

__all__ = ["Canvas", "Draws", "Flags", "Placement", "Tables", "place"]

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_locality.datamodules.pathfinder.dashes import DEGREES, Integers, Strokes, up
from lightning_locality.datamodules.pathfinder.parameters import PathfinderCurves

BLOCK = 256


class Draws:
    """A stream of random numbers for each of ``B`` pictures, from the counter-based generator Philox 4x64.

    "Parallel random numbers: as easy as 1, 2, 3" (Salmon, Moraes, Dror, Shaw, 2011). The key of a stream is
    (``seed``, ``stream`` 2^56 + picture number), so streams of different splits are disjoint; of each 64-bit word
    the upper half is used.

    Args:
        seed: 0 to 2^64 - 1.
        stream: Number of the split, 0 to 255.
        index: Picture numbers ``(B,)``, below 2^56.

    >>> one, both = Draws(3, 0, [7]), Draws(3, 0, [5, 7])
    >>> one.below(np.array([0]), 10**6) == both.below(np.array([1]), 10**6)
    array([ True])
    """

    def __init__(self, seed: int, stream: int, index: Sequence[int]) -> None:
        self.sources = [np.random.Philox(key=[seed, (stream << 56) | int(number)]) for number in index]
        self.words = self._block()
        self.used = np.zeros(len(self.sources), dtype=np.int64)

    def _block(self) -> NDArray[np.uint64]:
        words = np.empty((len(self.sources), BLOCK), dtype=np.uint64)
        for row, source in zip(words, self.sources, strict=True):
            row[:] = source.random_raw(BLOCK)
        return words >> np.uint64(32)

    def below(self, rows: NDArray[np.int64], bound: NDArray[np.int64] | int) -> NDArray[np.int64]:
        """The next number of each of ``rows``, uniform in 0..bound-1 (bound at most 2^32)."""
        at = self.used[rows]
        if rows.size and int(at.max()) >= self.words.shape[1]:
            self.words = np.concatenate([self.words, self._block()], axis=1)
        self.used[rows] = at + 1
        words = self.words[rows, at] * np.asarray(bound, dtype=np.uint64)
        return (words >> np.uint64(32)).astype(np.int64)


Flags = NDArray[np.bool_]

WEIGHT_SCALE = 1 << 16  # weights of candidates are whole numbers: the same choice on every machine
FREE = 76  # a pixel covered by at most 0.3 counts as free when a curve looks for a place to start
TOUCH = 459  # two dashes touch where their coverages (255 = whole pixel) add up to 1.8
DEAD_END = 10_000  # no way on when the candidates' weights add up to less than 1 / 10,000


class Tables:
    """What is looked up per direction, with pixels as offsets in a grid of ``side`` columns.

    Args:
        curves: Parameters of the pictures.
    """

    def __init__(self, curves: PathfinderCurves) -> None:
        strokes = Strokes.of(curves)
        length, margin = curves.paddle_length, curves.margin
        # everything that a dash near the border looks at lies within this distance outside the window
        self.guard = length + curves.paddle_thickness + 3 * margin + 6
        self.side = curves.window + 2 * self.guard
        self.area = strokes.area
        self.area_at = self.flat(strokes.area_offsets)
        # values come largest first, and only pixels covered that much can touch
        touching = int((strokes.area >= TOUCH - 255).sum(axis=1).max())
        self.touch_at = self.area_at[:, :touching].copy()
        self.touch_above = np.minimum(TOUCH - 1 - strokes.area[:, :touching].astype(np.int64), 255).astype(np.uint8)
        # of a place to start only the whole pixels are looked at, and the one that the dash is placed by
        whole = strokes.area == 255
        offsets = np.where(whole[..., None], strokes.area_offsets, 0)[:, : max(1, int(whole.sum(axis=1).max()))]
        self.whole_at = self.flat(offsets)
        self.low, self.high = offsets.min(axis=1), offsets.max(axis=1)
        # from the pixel where a dash joins its curve to the one of the next dash, and for a first dash from its
        # start to the pixel where it would have joined
        self.onward = self.flat(up(strokes.unit * (length + 2 * margin)))
        self.backward = self.flat(up(strokes.unit * length) + up(-strokes.unit * (length + margin)))
        turn = np.abs(strokes.directions[:, None] - strokes.directions[None, DEGREES:])
        bend = np.minimum(np.minimum(turn, 2 * np.pi - turn) * curves.continuity, np.pi / 2)
        weight = np.rint(np.cos(bend) ** 2 * WEIGHT_SCALE).astype(np.int64)
        widest = int((weight > 0).sum(axis=1).max())
        chosen = np.sort(np.argsort(-weight, axis=1, kind="stable")[:, :widest], axis=1)
        self.weight = np.take_along_axis(weight, chosen, axis=1)
        self.candidate = chosen + DEGREES
        self.candidate_at = self.flat(strokes.steps)[chosen]
        down, right = np.mgrid[-margin : margin + 1, -margin : margin + 1]
        near = down**2 + right**2 <= margin**2
        self.near_at = self.flat(np.stack([down[near], right[near]], axis=1))

    def flat(self, offsets: Integers) -> Integers:
        """Offsets ``(..., 2)`` as one number."""
        number: Integers = offsets[..., 0] * self.side + offsets[..., 1]
        return number

    @staticmethod
    @functools.lru_cache(maxsize=8)
    def of(curves: PathfinderCurves) -> Tables:
        """The tables of a set of parameters, worked out at the first call."""
        return Tables(curves)


class Canvas:
    """Two grids for each of ``B`` pictures: how much every pixel is covered, 0 to 255, border included.

    A dash is named by its place (a pixel of a grid as one number) and the number of its direction.

    Args:
        curves: Parameters of the pictures.
        draws: Random numbers of the pictures.
        count: Number of pictures.
    """

    def __init__(self, curves: PathfinderCurves, draws: Draws, count: int) -> None:
        self.curves, self.draws, self.tables = curves, draws, Tables.of(curves)
        side, guard = self.tables.side, self.tables.guard
        self.border, self.end = guard + curves.padding, guard + curves.window - curves.padding
        self.blank = np.full((2, side, side), 255, dtype=np.uint8)
        self.blank[:, self.border : self.end, self.border : self.end] = 0
        self.grids = np.empty((count, 2, side, side), dtype=np.uint8)
        self.pixels = self.grids.reshape(-1)

    def clear(self, rows: Integers) -> None:
        """Leave only the border in both grids of the pictures ``rows``."""
        for row in rows:
            self.grids[row] = self.blank

    def origin(self, rows: Integers, grid: Integers) -> Integers:
        """Where the grids of ``rows`` begin in ``pixels``."""
        start: Integers = (2 * rows + grid) * self.tables.side**2
        return start

    def cover(self, rows: Integers, grid: Integers, at: Integers, stroke: Integers) -> None:
        """Enter the area of one dash for each of ``rows``."""
        pixels = (self.origin(rows, grid) + at)[:, None] + self.tables.area_at[stroke]
        self.pixels[pixels] = np.maximum(self.pixels.take(pixels), self.tables.area[stroke])

    def settle(self, rows: Integers, at: Integers, stroke: Integers) -> None:
        """Give grid 0 the values of grid 1 in the area of a dash."""
        pixels = (self.origin(rows, np.ones_like(rows)) + at)[:, None] + self.tables.area_at[stroke]
        self.pixels[pixels - self.tables.side**2] = self.pixels.take(pixels)

    def touches(self, rows: Integers, grid: Integers, at: Integers, stroke: Integers) -> Flags:
        """Whether a dash would touch what is in the grid."""
        pixels = (self.origin(rows, grid) + at)[:, None] + self.tables.touch_at[stroke]
        result: Flags = np.asarray((self.pixels.take(pixels) > self.tables.touch_above[stroke]).any(axis=1))
        return result

    def room(self, rows: Integers, grid: Integers, at: Integers, stroke: Integers) -> Flags:
        """Whether there is room for a curve to start with a dash."""
        pixels = (self.origin(rows, grid) + at)[:, None] + self.tables.whole_at[stroke]
        result: Flags = np.asarray((self.pixels.take(pixels) <= FREE).all(axis=1))
        return result

    def places(self, row: int, stroke: int) -> Integers:
        """All places in grid 0 of a picture where there is room for a curve to start with a dash."""
        free = np.ones((self.end - self.border, self.end - self.border), dtype=bool)
        for down, right in zip(*_split(self.tables.whole_at[stroke], self.tables.side), strict=True):
            window = np.s_[self.border + down : self.end + down, self.border + right : self.end + right]
            free &= self.grids[row, 0][window] <= FREE
        return self.tables.flat(np.argwhere(free) + self.border)

    def free_share(self, row: int) -> float:
        """Share of the picture's pixels that are free in grid 0."""
        return int(np.count_nonzero(self.grids[row, 0] <= FREE)) / self.curves.window**2

    def grow(
        self, rows: Integers, grid: Integers, joint: Integers, stroke: Integers
    ) -> tuple[Flags, Integers, Integers, Integers]:
        """The next dash of a curve: whether there is one, where it joins, its end and its direction.

        The end is drawn from a circle round the joint, with probability proportional to (how free the pixel's
        surroundings are) times (how straight on it lies), and drawn again if the dash would touch another.
        """
        tables = self.tables
        joint = joint + tables.onward[stroke]
        ends = joint[:, None] + tables.candidate_at[stroke]
        pixels = (self.origin(rows, grid)[:, None] + ends)[None] + tables.near_at[:, None, None]
        free = 255 - self.pixels.take(pixels).max(axis=0).astype(np.int64)
        weights = np.cumsum(free * tables.weight[stroke], axis=1)
        total = weights[:, -1]
        found = np.zeros(len(rows), dtype=bool)
        at, onward = joint.copy(), stroke.copy()
        trying = np.flatnonzero(total * DEAD_END >= 255 * WEIGHT_SCALE)
        for _ in range(self.curves.paddle_retries + 1):
            drawn = self.draws.below(rows[trying], total[trying])
            choice = (weights[trying] <= drawn[:, None]).sum(axis=1)
            at[trying] = ends[trying, choice]
            onward[trying] = tables.candidate[stroke[trying], choice]
            found[trying] = ~self.touches(rows[trying], grid[trying], at[trying], onward[trying])
            trying = trying[~found[trying]]
            if not trying.size:
                break
        return found, joint, at, onward


def _split(flat: Integers, side: int) -> tuple[Integers, Integers]:
    """Offsets (down, right), both shorter than half a row, from their one number."""
    down = (flat + side // 2) // side
    return down, flat - down * side


MAX_MISSES = 16  # places tried before all free ones are listed
MAX_FAILURES = 20_000  # attempts at target curves in a row without one that succeeds


@dataclass(frozen=True)
class Placement:
    """Dashes and discs of ``B`` pictures.

    Args:
        label: 1 where both discs lie on one curve ``(B,)``.
        at: Pixel ``(B, P, 2)``, (down, right), that a dash is placed by: the start of the first dash of a curve,
            the end of all others. The first two times ``path_length`` are those of the two target curves.
        stroke: Direction number ``(B, P)`` in :class:`~lightning_locality.datamodules.pathfinder.dashes.Strokes`,
            -1 if there is no dash.
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
