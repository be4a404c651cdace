"""Placement of the dashes and discs of Pathfinder pictures, for a batch of pictures in lock step."""

from __future__ import annotations

__all__: list[str] = []

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lightning_locality.datamodules.pathfinder.parameters import PathfinderCurves
from lightning_locality.datamodules.pathfinder.rendering import (
    DEGREES,
    INK_SCALE,
    Bytes,
    Integers,
    Strokes,
    ceil,
    render,
    segment,
)

Flags = NDArray[np.bool_]

COMPILED = importlib.util.find_spec("numba") is not None  # the same pictures, the ones that are hard to place faster

STREAMS = {"train": 0, "validation": 1, "test": 2}
CONTRASTS, MARGINS = 8, 16  # added to the number of a stream for what is drawn from lists
BLOCK = 256
WEIGHT_SCALE = 1 << 16  # weights of candidates are integers: the same choice on every machine
FREE = 76  # a pixel of coverage up to 0.3 counts as free when a curve looks for a place to start
TOUCH = 459  # two dashes touch if their coverages (255 = whole pixel) add up to 1.8
DEAD_END = 10_000  # a curve cannot continue if the candidates' weights add up to less than 1 / 10,000
MAX_MISSES = 16  # places tried before all free ones are listed
MAX_FAILURES = 20_000  # attempts at target curves; then those that have not come seven eighths of the way are given up


class Placement(NamedTuple):
    """Dashes and discs of ``B`` pictures; the first two times ``path_length`` dashes are those of the target curves."""

    label: Integers  # (B,), 1 if both discs lie on one curve
    at: Integers  # pixel (B, P, 2), (down, right): the start of the first dash of a curve, the end of all others
    stroke: Integers  # number (B, P) of the direction in Strokes, -1 if there is no dash
    discs: Integers  # centres (B, 2, 2): the start of a target curve, the end of the same or of the other one
    contrast: Integers  # brightness (B, P) of a dash, 1 = INK_SCALE


class Targets(NamedTuple):
    """Segmentation and marker positions of ``B`` pictures."""

    # (B, size, size): 1 on the curve that starts at the first disc, 2 on the other target curve, 3 on distractors
    segmentation: Bytes
    markers: NDArray[np.float32]  # (B, 2, 2): centres (row, column) of the two discs in pixels


class HasWindow(Protocol):
    """Parameters of a picture that is drawn on a canvas of this side."""

    @property
    def window(self) -> int:
        """Side in pixels."""


def at_once(setting: HasWindow) -> int:
    """Pictures to place in lock step: the more, the less the last ones cost, with grids of about 64 MB."""
    return max(128, 2**26 // (2 * (setting.window + 40) ** 2))


def place(curves: PathfinderCurves, seed: int, stream: int, index: Sequence[int]) -> Placement:
    """Place the pictures ``index`` of a stream of random numbers; the curves have one margin."""
    return _Batch(curves, seed, stream, index).place()


def draw(
    curves: PathfinderCurves, seed: int, split: str, index: Sequence[int], targets: bool = True
) -> tuple[Bytes, Bytes, Targets]:
    """Pictures ``(B, size, size)``, labels ``(B,)`` and targets, which are empty unless asked for.

    Each depends on seed, split and its own number alone.
    """
    count, length = len(index), curves.path_length
    images, labels = np.empty((count, curves.size, curves.size), np.uint8), np.empty(count, np.uint8)
    known = Targets(np.empty_like(images[: count * targets]), np.empty((count * targets, 2, 2), np.float32))
    for rows, one in _by_margin(curves, seed, STREAMS[split], index):
        label, at, stroke, discs, contrast = place(one, seed, STREAMS[split], [int(index[row]) for row in rows])
        images[rows], labels[rows] = render(one, at, stroke, discs, contrast), label
        if targets:
            classes = np.full(at.shape[:2], 3)
            classes[:, : 2 * length] = np.repeat([1, 2], length)
            second = (discs[:, 0] == at[:, length]).all(axis=1)
            classes[second, : 2 * length] = np.repeat([2, 1], length)
            known.segmentation[rows] = segment(one, at, stroke, classes)
            known.markers[rows] = (discs + 0.5) / one.reduction - 0.5
    return images, labels, known


def _by_margin(
    curves: PathfinderCurves, seed: int, stream: int, index: Sequence[int]
) -> Iterator[tuple[Integers, PathfinderCurves]]:
    """The rows of ``index`` that have drawn each of the margins."""
    rows, margins = np.arange(len(index)), curves.margins
    if len(margins) == 1:
        yield rows, curves
        return
    drawn = RandomStreams(seed, MARGINS + stream, index).below(rows, len(margins))
    for number, margin in enumerate(margins):
        if (drawn == number).any():
            yield np.flatnonzero(drawn == number), dataclasses.replace(curves, margin=margin)


def _contrasts(curves: PathfinderCurves, seed: int, stream: int, index: Sequence[int]) -> Integers:
    """Brightness ``(B, P)`` of every dash, 1 = INK_SCALE."""
    rows, length = np.arange(len(index)), curves.path_length
    random = RandomStreams(seed, CONTRASTS + stream, index)
    curve, paddle = (np.atleast_1d(values) for values in (curves.contrast, curves.paddle_contrast))

    def drawn(values: NDArray[np.float64], number: int) -> NDArray[np.float64]:
        if len(values) == 1:
            return np.full((len(rows), number), values[0])
        return np.stack([values[random.below(rows, len(values))] for _ in range(number)], axis=1)

    own = np.full((len(rows), 2), curve[0])
    if len(curve) > 1:
        first, second = random.below(rows, 2 * len(curve)), random.below(rows, 2 * len(curve) - 1)
        own = curve[np.stack([first, second + (second >= first)], axis=1) // 2]
    # the two first dashes are drawn apart, all others for both curves together
    dashes = drawn(paddle, length + 1)
    other = np.concatenate([dashes[:, length:], dashes[:, 1:length]], axis=1)
    rest = drawn(curve, curves.max_paddles - 2 * length)
    whole = np.concatenate([own[:, :1] * dashes[:, :length], own[:, 1:] * other, rest], axis=1)
    scaled: Integers = np.rint(whole * INK_SCALE).astype(np.int64)
    return scaled


class RandomStreams:
    """A stream of random numbers for each picture, from the counter-based generator Philox 4x64.

    Its key is (``seed``, ``stream`` 2^56 + picture number), so streams of different splits are disjoint; the upper half
    of each 64-bit word is used. Source: "Parallel random numbers: as easy as 1, 2, 3" (Salmon et al., 2011).
    """

    def __init__(self, seed: int, stream: int, index: Sequence[int]) -> None:
        self.sources = [np.random.Philox(key=[seed, (stream << 56) | int(number)]) for number in index]
        self.words = np.empty((len(index), BLOCK), dtype=np.uint64)
        self.used = np.full(len(index), BLOCK)

    def below(self, rows: Integers, bound: Integers | int) -> Integers:
        """The next number of each of ``rows``, uniform in 0..bound-1 (bound at most 2^32)."""
        for row in rows[self.used[rows] == BLOCK].tolist():
            self.words[row], self.used[row] = self.sources[row].random_raw(BLOCK) >> np.uint64(32), 0
        words = self.words[rows, self.used[rows]] * np.asarray(bound, dtype=np.uint64)
        self.used[rows] += 1
        numbers: Integers = (words >> np.uint64(32)).astype(np.int64)
        return numbers


@functools.lru_cache(maxsize=8)
class Tables:
    """Lookup tables per direction; ``flat`` makes offsets of pixels single numbers in a grid of ``side`` columns."""

    def __init__(self, curves: PathfinderCurves) -> None:
        strokes, length, margin = Strokes(curves), curves.paddle_length, curves.margins[0]
        # everything that a dash near the border looks at lies within this distance outside the window
        self.guard = length + math.ceil(curves.paddle_thickness) + 3 * margin + 6
        self.side = curves.window + 2 * self.guard
        self.border, self.end = self.guard + curves.padding, self.guard + curves.window - curves.padding
        self.blank = np.full((self.side, self.side), 255, dtype=np.uint8)
        self.blank[self.border : self.end, self.border : self.end] = 0
        self.area, self.area_at = strokes.area, self.flat(strokes.area_offsets)
        # values decrease, and only pixels covered that much can touch
        touching = int((strokes.area >= TOUCH - 255).sum(axis=1).max())
        self.touch_at = self.area_at[:, :touching].copy()
        self.touch_above = np.minimum(TOUCH - 1 - strokes.area[:, :touching].astype(np.int64), 255).astype(np.uint8)
        # at a place to start only the whole pixels are looked at, and the one by which the dash is placed
        whole = strokes.area == 255
        offsets = np.where(whole[..., None], strokes.area_offsets, 0)[:, : max(1, int(whole.sum(axis=1).max()))]
        self.whole_offsets, self.whole_at = offsets, self.flat(offsets)
        self.low, self.high = offsets.min(axis=1), offsets.max(axis=1)
        # rows and columns in which a first dash may start, none in directions that need more room than there is
        self.extent = np.maximum(curves.window - 2 * curves.start_border - self.high + self.low, 0)
        if not self.extent[:DEGREES].all(axis=1).any():
            raise ValueError(
                f"window={curves.window} is too small: no dash fits between its borders of {curves.start_border} "
                "pixels; choose a larger window, or a smaller seed_distance or padding"
            )
        # the first such place, and from there to the start of the second curve
        self.origin = self.flat(curves.start_border - self.low[:DEGREES] + self.guard)
        angle = np.deg2rad(np.arange(DEGREES))
        aside = np.stack([np.sin(angle), np.cos(angle)], axis=1) * curves.seed_distance
        self.aside = self.flat(np.rint(np.round(aside, 9)).astype(np.int64))
        # from the joint of a dash with its curve to that of the next dash, and for a first dash from its start to
        # the pixel where it would have joined
        self.onward = self.flat(ceil(strokes.unit * (length + 2 * margin)))
        self.backward = self.flat(ceil(strokes.unit * length) + ceil(-strokes.unit * (length + margin)))
        turn = np.abs(strokes.directions[:, None] - strokes.directions[None, DEGREES:])
        bend = np.minimum(np.minimum(turn, 2 * np.pi - turn) * curves.continuity, np.pi / 2)
        weight = np.rint(np.cos(bend) ** 2 * WEIGHT_SCALE).astype(np.int64)
        widest = int((weight > 0).sum(axis=1).max())
        chosen = np.sort(np.argsort(-weight, axis=1, kind="stable")[:, :widest], axis=1)
        self.weight = np.take_along_axis(weight, chosen, axis=1)
        self.candidate, self.candidate_at = chosen + DEGREES, self.flat(strokes.steps)[chosen]
        square = np.mgrid[-margin : margin + 1, -margin : margin + 1].reshape(2, -1).T
        self.near_at = self.flat(square[(square**2).sum(axis=1) <= margin**2])

    def flat(self, offsets: Integers) -> Integers:
        return offsets[..., 0] * self.side + offsets[..., 1]


class _Grids:
    """Two grids for each picture: the coverage of every pixel, 0 to 255, border included.

    A dash is given by its place (a pixel of a grid as a single number) and the number of its direction.
    """

    def __init__(self, curves: PathfinderCurves, random: RandomStreams, count: int) -> None:
        self.curves, self.random, self.tables = curves, random, Tables(curves)
        self.border, self.end = self.tables.border, self.tables.end
        self.grids = np.empty((count, 2, *self.tables.blank.shape), dtype=np.uint8)
        self.flat = self.grids.reshape(-1)

    def pixels(self, rows: Integers, grid: Integers | int, at: Integers | int, offsets: Integers) -> Integers:
        """Positions ``(R, P)`` in ``flat`` of the pixels ``offsets`` around places, in one of the grids of ``rows``."""
        return ((2 * rows + grid) * self.tables.side**2 + at)[:, None] + offsets

    def cover(self, rows: Integers, grid: Integers | int, at: Integers, stroke: Integers) -> None:
        """Add the area of one dash to each of ``rows``."""
        pixels = self.pixels(rows, grid, at, self.tables.area_at[stroke])
        self.flat[pixels] = np.maximum(self.flat.take(pixels), self.tables.area[stroke])

    def restore(self, rows: Integers, at: Integers, stroke: Integers) -> None:
        """Give grid 0 the values of grid 1 in the area of a dash."""
        pixels = self.pixels(rows, 1, at, self.tables.area_at[stroke])
        self.flat[pixels - self.tables.side**2] = self.flat.take(pixels)

    def touches(self, rows: Integers, grid: Integers | int, at: Integers, stroke: Integers) -> Flags:
        """Whether a dash would touch what is in the grid."""
        pixels = self.pixels(rows, grid, at, self.tables.touch_at[stroke])
        touching: Flags = np.any(self.flat.take(pixels) > self.tables.touch_above[stroke], axis=1)
        return touching

    def has_room(self, rows: Integers, at: Integers, stroke: Integers) -> Flags:
        """Whether a curve has room to start with a dash in grid 0."""
        room: Flags = np.all(self.flat.take(self.pixels(rows, 0, at, self.tables.whole_at[stroke])) <= FREE, axis=1)
        return room

    def places(self, row: int, stroke: int) -> Integers:
        """All places in grid 0 of a picture where a curve has room to start with a dash."""
        free = np.ones((self.end - self.border, self.end - self.border), dtype=bool)
        for down, right in self.tables.whole_offsets[stroke]:
            window = np.s_[self.border + down : self.end + down, self.border + right : self.end + right]
            free &= self.grids[row, 0][window] <= FREE
        return self.tables.flat(np.argwhere(free) + self.border)

    def grow(
        self, rows: Integers, grid: Integers, joint: Integers, stroke: Integers
    ) -> tuple[Flags, Integers, Integers, Integers]:
        """The next dash of a curve: whether there is one, its joint, its end and its direction.

        The end is sampled from a circle around the joint with probability proportional to (how free the pixel's
        surroundings are) times (how straight on it lies), and sampled again if the dash would touch another.
        """
        tables = self.tables
        joint = joint + tables.onward[stroke]
        ends = joint[:, None] + tables.candidate_at[stroke]
        pixels = self.pixels(rows, grid, 0, ends)[None] + tables.near_at[:, None, None]
        free = 255 - self.flat.take(pixels).max(axis=0).astype(np.int64)
        weights = np.cumsum(free * tables.weight[stroke], axis=1)
        total = weights[:, -1]
        found = np.zeros(len(rows), dtype=bool)
        at, onward = joint.copy(), stroke.copy()
        trying = np.flatnonzero(total * DEAD_END >= 255 * WEIGHT_SCALE)
        for _ in range(self.curves.paddle_retries + 1):
            sample = self.random.below(rows[trying], total[trying])
            choice = (weights[trying] <= sample[:, None]).sum(axis=1)
            at[trying] = ends[trying, choice]
            onward[trying] = tables.candidate[stroke[trying], choice]
            found[trying] = ~self.touches(rows[trying], grid[trying], at[trying], onward[trying])
            trying = trying[~found[trying]]
            if not trying.size:
                break
        return found, joint, at, onward


class _Clutter(NamedTuple):
    """Distractors to place: their first slot, their number, dashes of each and further tries of each."""

    first: int
    number: int
    dashes: int
    retries: int


class _Batch:
    """Pictures in progress.

    While the target curves grow, grid c holds what curve c must avoid: all of the other curve, and its own dashes but
    the last. Afterwards grid 0 holds what a distractor must avoid, and grid 1 the same without the distractor in
    progress, to which grid 0 returns if that distractor cannot continue.
    """

    def __init__(self, curves: PathfinderCurves, seed: int, stream: int, index: Sequence[int]) -> None:
        self.curves, self.length = curves, curves.path_length
        self.contrast = _contrasts(curves, seed, stream, index)
        self.random = RandomStreams(seed, stream, index)
        self.grids = _Grids(curves, self.random, len(index))
        self.rows = np.arange(len(index))
        self.label = self.random.below(self.rows, 2)
        if curves.balanced:
            # an odd picture has the opposite label of the one before
            odd = np.flatnonzero(np.asarray(index) % 2)
            before = RandomStreams(seed, stream, [int(index[row]) - 1 for row in odd.tolist()])
            self.label[odd] = 1 - before.below(np.arange(len(odd)), 2)
        self.marked = self.random.below(self.rows, 2)
        self.at = np.zeros((len(index), curves.max_paddles), dtype=np.int64)
        self.stroke = np.full_like(self.at, -1)
        self.joint = np.zeros((len(index), 2), dtype=np.int64)  # where the newest dash of a curve joins it

    def place(self) -> Placement:
        curves = self.curves
        self._place_targets()
        first, number, dashes = 2 * self.length, curves.distractor_count, curves.paddles_per_distractor
        self._place_distractors(_Clutter(first, number, dashes, curves.distractor_retries))
        self._place_distractors(_Clutter(first + number * dashes, curves.single_count, 1, curves.paddle_retries))
        at = np.stack(np.divmod(self.at, self.grids.tables.side), axis=2) - self.grids.tables.guard
        other = np.where(self.label == 1, self.marked, 1 - self.marked)
        ends = [at[self.rows, self.marked * self.length], at[self.rows, other * self.length + self.length - 1]]
        at[self.stroke < 0] = 0
        return Placement(self.label, at, self.stroke, np.stack(ends, axis=1), self.contrast)

    def _begin(self, rows: Integers, curve: int, slot: Integers | int, at: Integers, stroke: Integers) -> None:
        """Record the first dash of a curve."""
        self.at[rows, slot], self.stroke[rows, slot] = at, stroke
        self.joint[rows, curve] = at + self.grids.tables.backward[stroke]

    def _extend(self, rows: Integers, curve: Integers, slot: Integers) -> Flags:
        """Add the dash ``slot`` to a curve and cover the one before in its grid; whether there was one to add."""
        found, joint, at, stroke = self.grids.grow(rows, curve, self.joint[rows, curve], self.stroke[rows, slot - 1])
        rows, curve, slot = rows[found], curve[found], slot[found]
        self.grids.cover(rows, curve, self.at[rows, slot - 1], self.stroke[rows, slot - 1])
        self.joint[rows, curve], self.at[rows, slot], self.stroke[rows, slot] = joint[found], at[found], stroke[found]
        return found

    def _place_targets(self) -> None:
        """Grow the two target curves in turns; if one cannot continue, start both again."""
        if COMPILED:
            self._place_compiled()
            return
        placed = np.zeros(len(self.rows), dtype=np.int64)  # dashes of both curves
        rows, failures, deepest = self.rows, 0, 0
        while rows.size:
            placed[self._start_targets(rows[placed[rows] == 0])] = 2
            growing = rows[placed[rows] > 0]
            dash, curve = np.divmod(placed[growing], 2)
            slot = curve * self.length + dash
            found = self._extend(growing, curve, slot)
            placed[growing[~found]] = 0
            growing, curve, slot = growing[found], curve[found], slot[found]
            self.grids.cover(growing, 1 - curve, self.at[growing, slot], self.stroke[growing, slot])
            placed[growing] += 1
            deepest, failures = int(placed.max(initial=deepest)), failures + int((placed[rows] == 0).sum())
            rows = rows[placed[rows] < 2 * self.length]
            if failures > MAX_FAILURES and 4 * deepest < 7 * self.length:
                raise self._too_long(failures)
        # each grid still lacks the last dash of its own curve; from here on both hold everything
        for number, last in ((0, self.length - 1), (1, 2 * self.length - 1)):
            self.grids.cover(self.rows, number, self.at[:, last], self.stroke[:, last])

    def _place_compiled(self) -> None:
        """The same, picture by picture."""
        from lightning_locality.datamodules.pathfinder.compiled import place_targets, target_tables

        tables, random, targets = target_tables(self.curves), self.random, np.s_[: 2 * self.length]
        for row, source in enumerate(random.sources):
            rest = np.random.Generator(source), random.words[row], random.used[row : row + 1]
            found = (array[row, targets].reshape(2, -1) for array in (self.at, self.stroke))
            if place_targets(tables, *rest, self.grids.grids[row].reshape(2, -1), *found, MAX_FAILURES) < 0:
                raise self._too_long(MAX_FAILURES)

    def _too_long(self, failures: int) -> ValueError:
        return ValueError(
            f"two curves of path_length={self.length} do not fit in window={self.curves.window} with padding="
            f"{self.curves.padding}: {failures} attempts in a row failed; choose a smaller path_length or a "
            "larger window"
        )

    def _start_targets(self, rows: Integers) -> Integers:
        """Clear ``rows`` and set the first dashes of both curves; returns the rows in which they do not touch."""
        grids, random, tables = self.grids, self.random, self.grids.tables
        grids.grids[rows] = tables.blank
        first = random.below(rows, DEGREES)
        fits = tables.extent[first].all(axis=1)
        extent = np.where(fits[:, None], tables.extent[first], 1)
        spot = np.stack(np.divmod(random.below(rows, extent[:, 0] * extent[:, 1]), extent[:, 1]), axis=1)
        at = tables.origin[first] + tables.flat(spot)
        second = random.below(rows, DEGREES)
        other = at + tables.aside[random.below(rows, DEGREES)]
        grids.cover(rows, 1, at, first)
        started = fits & ~grids.touches(rows, 1, other, second)
        grids.cover(rows, 0, other, second)
        self._begin(rows, 0, 0, at, first)
        self._begin(rows, 1, self.length, other, second)
        able: Integers = rows[started]
        return able

    def _place_distractors(self, clutter: _Clutter) -> None:
        """Place distractors one after the other; one that does not fit after all tries is left out."""
        curves, self.clutter, length = self.curves, clutter, clutter.dashes
        largest = self.grids.tables.area.shape[1] * curves.max_paddles
        interior = (self.grids.end - self.grids.border) ** 2
        may_fill = interior - largest < curves.stop_with_availability * curves.window**2
        # distractors placed or left out; tries of the current one; of the current try its dashes, the places that
        # had no room for the first one, and that one's direction
        self.number, self.tries, self.placed, self.misses, self.heading = np.zeros((5, len(self.rows)), dtype=np.int64)
        rows = self.rows if clutter.number else self.rows[:0]
        while rows.size:
            fresh = rows[(self.placed[rows] == 0) & (self.misses[rows] == 0)]
            if may_fill:
                free = np.array([np.count_nonzero(self.grids.grids[row, 0] <= FREE) for row in fresh], dtype=np.int64)
                full = free / curves.window**2 < curves.stop_with_availability
                self.number[fresh[full]] = clutter.number
                rows, fresh = rows[self.number[rows] < clutter.number], fresh[~full]
            self.heading[fresh] = self.random.below(fresh, DEGREES)
            self._start_distractors(rows[self.placed[rows] == 0])
            growing = rows[(self.placed[rows] > 0) & (self.placed[rows] < length)]
            found = self._extend(growing, np.zeros_like(growing), self._slot(growing, self.placed[growing]))
            self.placed[growing[found]] += 1
            self._give_up(growing[~found])
            complete = rows[self.placed[rows] == length]
            for dash, grid in product(range(length), (0, 1)):
                slot = self._slot(complete, dash)
                self.grids.cover(complete, grid, self.at[complete, slot], self.stroke[complete, slot])
            self._next(complete)
            rows = rows[self.number[rows] < clutter.number]

    def _slot(self, rows: Integers, dash: Integers | int) -> Integers:
        return self.clutter.first + self.number[rows] * self.clutter.dashes + dash

    def _start_distractors(self, rows: Integers) -> None:
        """Try one place for the first dash of a distractor, uniform over the places with room."""
        grids, side = self.grids, self.grids.end - self.grids.border
        offset = np.stack(np.divmod(self.random.below(rows, side * side), side), axis=1)
        at, stroke = grids.tables.flat(offset + grids.border), self.heading[rows]
        room = grids.has_room(rows, at, stroke)
        self.misses[rows[~room]] += 1
        for number in np.flatnonzero(~room & (self.misses[rows] >= MAX_MISSES)):
            places = grids.places(int(rows[number]), int(stroke[number]))
            if places.size:
                choice = self.random.below(rows[number : number + 1], places.size)
                at[number], room[number] = places[choice[0]], True
            else:
                self._give_up(rows[number : number + 1])
        rows = rows[room]
        self._begin(rows, 0, self._slot(rows, 0), at[room], stroke[room])
        self.placed[rows] = 1

    def _give_up(self, rows: Integers) -> None:
        """Remove the distractors in progress; continue with the next try, or after the last try the next distractor."""
        for dash in range(self.clutter.dashes):
            written = rows[self.placed[rows] > dash]
            slot = self._slot(written, dash)
            self.grids.restore(written, self.at[written, slot], self.stroke[written, slot])
            self.stroke[written, slot] = -1
        self.tries[rows] += 1
        self.placed[rows], self.misses[rows] = 0, 0
        self._next(rows[self.tries[rows] > self.clutter.retries])

    def _next(self, rows: Integers) -> None:
        self.number[rows] += 1
        self.tries[rows], self.placed[rows], self.misses[rows] = 0, 0, 0
