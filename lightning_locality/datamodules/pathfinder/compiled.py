"""The target curves of Pathfinder pictures, compiled by Numba: the same dashes as in lock step, one picture at a time.

Where 14 dashes hardly fit, one of 340 (``lra128_hard``) to 1,600 (``lra64_hard``) attempts succeeds, and an array
operation per step is too slow.
"""

from __future__ import annotations

__all__: list[str] = []

import functools
from typing import Any, NamedTuple

import numba
import numpy as np

from lightning_locality.datamodules.pathfinder.parameters import PathfinderCurves
from lightning_locality.datamodules.pathfinder.placement import DEAD_END, TOUCH, WEIGHT_SCALE, Tables
from lightning_locality.datamodules.pathfinder.rendering import DEGREES, Strokes

# unsigned: an index that may be negative keeps the compiler from using vector instructions
U = np.uint64

_inline = numba.njit(inline="always")


class TargetTables(NamedTuple):
    """Arguments of the compiled function: D directions of a dash, each with C candidates for the next one."""

    side: int  # columns of a grid
    length: int  # dashes per curve
    retries: int
    dead_end: int  # a curve ends if the weights of its candidates add up to less
    blank: Any  # (side^2,), an empty grid
    area: Any  # (D, S, W), what a dash keeps free, around the place by which it is placed
    touch_above: Any  # (D, S, W), a dash touches a pixel of larger value
    origin: Any  # (360,), the first place where a first dash of a direction may start
    extent: Any  # (360, 2), rows and columns of such places
    aside: Any  # (360,), from the start of the first curve to that of the second one
    onward: Any  # (D,)
    backward: Any  # (D,)
    candidate: Any  # (D, C)
    candidate_at: Any  # (D, C)
    weight: Any  # (D, C)
    near_at: Any  # (N,)


@functools.lru_cache(maxsize=8)
def target_tables(curves: PathfinderCurves) -> TargetTables:
    """The tables, with stamps as squares whose rows are whole vectors of a processor."""
    tables, strokes, middle = Tables(curves), Strokes(curves), curves.half_stamp
    area = np.zeros((len(strokes.area), 2 * middle + 1, -(-(2 * middle + 1) // 16) * 16), np.uint8)
    direction, pixel = np.nonzero(strokes.area)
    down, right = (strokes.area_offsets[direction, pixel] + middle).T
    area[direction, down, right] = strokes.area[direction, pixel]
    above = np.where(area >= TOUCH - 255, np.minimum(TOUCH - 1 - area.astype(np.int64), 255), 255)
    own: dict[str, Any] = {
        "length": curves.path_length,
        "retries": curves.paddle_retries,
        "dead_end": -(-255 * WEIGHT_SCALE // DEAD_END),
        "blank": tables.blank.reshape(-1),
        "area": area,
        "touch_above": above.astype(np.uint8),
    }
    return TargetTables(**own, **{name: getattr(tables, name) for name in TargetTables._fields if name not in own})


@_inline
def _below(bound, source, words, used):
    """The next number of ``RandomStreams``."""
    if used[0] == len(words):
        for number in range(len(words)):
            words[number] = U(source.random() * 2.0**32)  # the upper half of a word: random() has its upper 53 bits
        used[0] = 0
    word = words[used[0]]
    used[0] += 1
    return np.int64((word * U(bound)) >> U(32))


@_inline
def _cover(grid, at, area, side):
    pixel = U(at - (area.shape[0] // 2) * (side + 1))
    for row in range(U(area.shape[0])):
        for column in range(U(area.shape[1])):
            grid[pixel + column] = max(grid[pixel + column], area[row, column])
        pixel += U(side)


@_inline
def _clear(grid, at, area, side, blank):
    pixel = U(at - (area.shape[0] // 2) * (side + 1))
    for _ in range(U(area.shape[0])):
        for column in range(U(area.shape[1])):
            grid[pixel + column] = blank[pixel + column]
        pixel += U(side)


@_inline
def _touches(grid, at, above, side):
    pixel = U(at - (above.shape[0] // 2) * (side + 1))
    for row in range(U(above.shape[0])):
        touching = np.uint8(0)
        for column in range(U(above.shape[1])):
            touching = max(touching, np.uint8(grid[pixel + column] > above[row, column]))
        if touching:
            return True
        pixel += U(side)
    return False


def _place_targets(tables, source, words, used, grids, at, stroke, limit):
    """Grow both target curves of one picture in turns until both are whole.

    Args:
        tables: See the class.
        source: Generator of the picture.
        words: Its numbers that are not used yet, from ``used[0]`` on.
        used: Array of one.
        grids: (2, side^2), which get all dashes.
        at: (2, length), which gets their places.
        stroke: (2, length), which gets their directions.
        limit: Failures after which it gives up unless a curve has come seven eighths of the way.

    Returns:
        Number of failures, or -1 if it gave up.
    """
    # once: to read a field in the loops costs a third of the time
    side, length, retries, dead_end, blank, area, touch_above, origin, extent = tables[:9]
    aside, onward, backward, candidate, candidate_at, weight, near_at = tables[9:]
    joint, weights = np.zeros(2, np.int64), np.empty(weight.shape[1], np.int64)
    grids[0] = blank
    grids[1] = blank
    failures, deepest = 0, 0
    while True:
        first = _below(DEGREES, source, words, used)
        rows, columns = extent[first]
        fits = rows > 0 and columns > 0
        spot = _below(rows * columns if fits else 1, source, words, used)
        if not fits:
            columns = 1
        at[0, 0] = origin[first] + spot // columns * side + spot % columns
        stroke[0, 0], stroke[1, 0] = first, _below(DEGREES, source, words, used)
        at[1, 0] = at[0, 0] + aside[_below(DEGREES, source, words, used)]
        placed = 2
        for curve in range(2):
            _cover(grids[1 - curve], at[curve, 0], area[stroke[curve, 0]], side)
            joint[curve] = at[curve, 0] + backward[stroke[curve, 0]]
        growing = fits and not _touches(grids[1], at[1, 0], touch_above[stroke[1, 0]], side)
        while growing and placed < 2 * length:
            dash, curve = placed // 2, placed % 2
            before = stroke[curve, dash - 1]
            joint[curve] += onward[before]
            # the circle around the joint: how free and how straight on its pixels are
            total, ends, straight = 0, candidate_at[before], weight[before]
            for choice in range(len(ends)):
                end, covered = joint[curve] + ends[choice], np.uint8(0)
                for near in range(len(near_at)):
                    covered = max(covered, grids[curve, U(end + near_at[near])])
                total += (255 - np.int64(covered)) * straight[choice]
                weights[choice] = total
            growing = False
            for _ in range(retries + 1 if total >= dead_end else 0):
                sample, choice = _below(total, source, words, used), 0
                while weights[choice] <= sample:
                    choice += 1
                end, ahead = joint[curve] + ends[choice], candidate[before, choice]
                if not _touches(grids[curve], end, touch_above[ahead], side):
                    growing = True
                    break
            if growing:
                at[curve, dash], stroke[curve, dash] = end, ahead
                _cover(grids[curve], at[curve, dash - 1], area[before], side)
                _cover(grids[1 - curve], end, area[ahead], side)
                placed += 1
        if growing:
            for curve in range(2):
                _cover(grids[curve], at[curve, length - 1], area[stroke[curve, length - 1]], side)
            return failures
        failures, deepest = failures + 1, max(deepest, placed)
        if failures > limit and 4 * deepest < 7 * length:
            return -1
        for number in range(placed):
            place, covered = at[number % 2, number // 2], area[stroke[number % 2, number // 2]]
            _clear(grids[0], place, covered, side, blank)
            _clear(grids[1], place, covered, side, blank)


try:
    place_targets = numba.njit(_place_targets, cache=True)
except RuntimeError:  # no folder for the compiled code can be written
    place_targets = numba.njit(_place_targets)
