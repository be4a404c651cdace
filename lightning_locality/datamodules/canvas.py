"""The ground on which curves of Pathfinder pictures grow: what is covered, and where a curve can go on."""

from __future__ import annotations

__all__ = ["Canvas", "Flags", "Tables"]

import functools

import numpy as np
from numpy.typing import NDArray

from lightning_locality.datamodules.curves import PathfinderCurves
from lightning_locality.datamodules.draws import Draws
from lightning_locality.datamodules.strokes import DEGREES, Integers, Strokes, up

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
