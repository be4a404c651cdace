"""Dashes and discs of Pathfinder pictures: rendered once per direction, then only copied."""

from __future__ import annotations

__all__ = ["DEGREES", "Bytes", "Floats", "Integers", "Strokes", "up"]

import functools

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from lightning_locality.datamodules.pathfinder.parameters import PathfinderCurves

Integers = NDArray[np.int64]
Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]

INK_SCALE = 1 << 12  # ink is kept in whole numbers of 1/4096, so that pictures do not depend on rounding
DEGREES = 360


class Strokes:
    r"""Everything about a dash that depends on its direction alone, for the finite set of directions.

    A dash points in one of 360 whole degrees (the first of a curve) or along one of the whole-pixel steps of the
    circle of radius ``paddle_length + margin`` (all others), about 410 directions in all. For each there is a
    stamp of ink (a line drawn ``antialias`` times larger, reduced with a Lanczos filter) and a stamp of the
    area that it keeps free (the line dilated by ``margin``, reduced likewise). A dash in a whole degree is placed
    by its start, one along a step by its end; offsets are (down, right) of that pixel.

    Stamps are lists of pixels, the largest value first, filled up to one length with a pixel outside the stamp
    and the value 0.

    Args:
        curves: Parameters of the pictures.

    Attributes:
        steps: Pixels ``(N, 2)`` of the circle, as offsets from its centre.
        directions: Direction ``(D,)`` of growth in radians, clockwise from the right.
        reach: Offset ``(D, 2)`` in pixels from the pixel that a dash is placed by to its other end, not rounded.
        ink_offsets: Pixels ``(D, P, 2)`` of a dash.
        ink: Their brightness ``(D, P)`` in units of 1/4096; filtering makes it exceed 1 in places.
        area_offsets: Pixels ``(D, Q, 2)`` of the area that a dash keeps free.
        area: Their share of being covered ``(D, Q)``, 0 to 255.
        disc_offsets: Pixels ``(R, 2)`` of a marker disc.
        disc: Their brightness ``(R,)`` in units of 1/4096.
    """

    def __init__(self, curves: PathfinderCurves) -> None:
        radius = curves.paddle_length + curves.margin
        # one sample per pixel of arc, each cut down to the pixel it lies in
        angles = np.deg2rad(np.arange(0, DEGREES, DEGREES / (2 * radius * np.pi)))
        circle = np.stack([np.sin(angles), np.cos(angles)], axis=1) * radius
        self.steps: Integers = np.unique(_down(circle), axis=0)
        whole = np.deg2rad(np.arange(-180, 180))
        self.directions: Floats = np.concatenate([whole, np.arctan2(self.steps[:, 0], self.steps[:, 1])])
        unit = np.stack([np.sin(self.directions), np.cos(self.directions)], axis=1)
        self.unit: Floats = unit
        drawn = np.where(np.arange(len(unit))[:, None] < DEGREES, unit, -unit)
        self.reach: Floats = drawn * curves.paddle_length
        lines, areas = _lines(curves, drawn)
        self.ink_offsets, self.ink = _sparse(np.rint(lines * (curves.contrast * INK_SCALE)).astype(np.int64))
        self.area_offsets, area = _sparse(areas)
        self.area: Bytes = area.astype(np.uint8)
        offsets, values = _sparse(_disc(curves)[None])
        self.disc_offsets, self.disc = offsets[0], values[0] * INK_SCALE // 255

    @staticmethod
    @functools.lru_cache(maxsize=8)
    def of(curves: PathfinderCurves) -> Strokes:
        """The strokes of a set of parameters, rendered at the first call."""
        return Strokes(curves)


def _down(values: Floats) -> Integers:
    # 9 decimals: what is a whole number in exact arithmetic stays one on every machine
    return np.floor(np.round(values, 9)).astype(np.int64)


def up(values: Floats) -> Integers:
    """The next whole number, where a value within 1e-9 of one counts as whole."""
    return np.ceil(np.round(values, 9)).astype(np.int64)


def _lines(curves: PathfinderCurves, directions: Floats) -> tuple[Floats, Integers]:
    """Ink and area of a line in each direction ``(D, 2)``, as ``(D, S, S)`` with its start in the middle."""
    scale, half = curves.antialias, curves.half_stamp
    large, side = 2 * half * scale + 1, 2 * half + 1
    centre = half * scale
    ends = centre + up(directions * (curves.paddle_length * scale))
    drawn = np.zeros((len(directions), large, large), dtype=np.uint8)
    for number, (down, right) in enumerate(ends.tolist()):
        picture = Image.new("L", (large, large), 0)
        ImageDraw.Draw(picture).line([(centre, centre), (right, down)], fill=255, width=curves.paddle_thickness * scale)
        drawn[number] = np.asarray(picture)
    reach = curves.margin * scale
    padded = np.pad(drawn, ((0, 0), (reach, reach), (reach, reach)))
    covered = drawn.copy()
    for down in range(-reach, reach + 1):
        for right in range(-reach, reach + 1):
            if down**2 + right**2 <= reach**2:
                window = padded[:, reach + down : reach + down + large, reach + right : reach + right + large]
                np.maximum(covered, window, out=covered)
    shape = (side, side)
    smooth = Image.Resampling.LANCZOS
    ink = [np.asarray(Image.fromarray(p.astype(np.float32)).resize(shape, smooth)) for p in drawn]
    area = [np.asarray(Image.fromarray(p).resize(shape, smooth)) for p in covered]
    return np.stack(ink).astype(np.float64) / 255, np.stack(area).astype(np.int64)


def _disc(curves: PathfinderCurves) -> Integers:
    """A disc 0 to 255 in a square with an odd side, its coordinate in the middle."""
    scale, half = curves.antialias, curves.marker_radius + 4
    at = np.arange((2 * half + 1) * scale) - half * scale
    inside = at[:, None] ** 2 + at[None, :] ** 2 <= (curves.marker_radius * scale) ** 2
    drawn = Image.fromarray(np.where(inside, 255, 0).astype(np.uint8))
    return np.asarray(drawn.resize((2 * half + 1, 2 * half + 1), Image.Resampling.LANCZOS)).astype(np.int64)


def _sparse(stamps: Integers) -> tuple[Integers, Integers]:
    """Offsets ``(D, P, 2)`` from the middle and values ``(D, P)`` of the positive pixels, largest first."""
    side = stamps.shape[1]
    flat = stamps.reshape(len(stamps), -1)
    count = int((flat > 0).sum(axis=1).max())
    order = np.argsort(-flat, axis=1, kind="stable")[:, :count]
    values = np.take_along_axis(flat, order, axis=1)
    offsets = np.stack(np.divmod(order, side), axis=2) - side // 2
    # the filling must not be a pixel of the stamp: writing it would undo what the stamp has written there
    offsets[values <= 0] = -(side // 2) - 1
    return offsets, np.maximum(values, 0)
