"""Rendering of Pathfinder pictures: stamp the dashes and discs, then reduce the picture to its final size."""

from __future__ import annotations

__all__: list[str] = []

import functools
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from lightning_locality.datamodules.pathfinder.parameters import PathfinderCurves

Integers = NDArray[np.int64]
Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]

INK_SCALE = 1 << 12  # ink is an integer number of 1/4096, so that pictures do not depend on rounding
DEGREES = 360


@functools.lru_cache(maxsize=8)
class Strokes:
    """Stamps of a dash in each of about 410 directions, and of a disc.

    A dash points along one of 360 whole degrees (the first of a curve; placed by its start) or one of the whole-pixel
    steps of the circle of radius ``paddle_length + margin`` (all others; placed by their end). It has a stamp of ink (a
    line drawn ``antialias`` times larger and reduced, in units of 1/4096; filtering makes it exceed 1 in places) and
    one of the area that it keeps free (the same of the line dilated by ``margin``, in 1/255). Offsets ``(D, P, 2)`` are
    (down, right) from its place; the values ``(D, P)`` decrease and are padded with 0 at a pixel outside the stamp.
    """

    def __init__(self, curves: PathfinderCurves) -> None:
        (margin,) = curves.margins
        radius = curves.paddle_length + margin
        # one sample per pixel of arc, floored to the pixel it lies in
        angles = np.deg2rad(np.arange(0, DEGREES, DEGREES / (2 * radius * np.pi)))
        circle = np.stack([np.sin(angles), np.cos(angles)], axis=1) * radius
        # 9 decimals: what is a whole number in exact arithmetic stays one on every machine
        self.steps: Integers = np.unique(np.floor(np.round(circle, 9)).astype(np.int64), axis=0)
        # radians, clockwise from the right
        self.directions = np.concatenate([np.deg2rad(np.arange(-180, 180)), np.arctan2(*self.steps.T)])
        self.unit: Floats = np.stack([np.sin(self.directions), np.cos(self.directions)], axis=1)
        lines, areas = _lines(curves, np.where(np.arange(len(self.unit))[:, None] < DEGREES, self.unit, -self.unit))
        self.ink_offsets, self.ink = _sparse(np.rint(lines * INK_SCALE).astype(np.int64))
        self.area_offsets, area = _sparse(areas)
        self.area: Bytes = area.astype(np.uint8)
        offsets, values = _sparse(_disc(curves)[None])
        self.disc_offsets, self.disc = offsets[0], values[0] * INK_SCALE // 255


def ceil(values: Floats) -> Integers:
    """Round up, except that a value within 1e-9 of a whole number is that number."""
    return np.ceil(np.round(values, 9)).astype(np.int64)


def _lines(curves: PathfinderCurves, directions: Floats) -> tuple[Floats, Integers]:
    """Ink and area of a line in each direction ``(D, 2)``, as ``(D, S, S)`` with its start in the middle."""
    scale, side, reach = curves.antialias, 2 * curves.half_stamp + 1, curves.margins[0] * curves.antialias
    width = round(curves.paddle_thickness * scale)
    centre = curves.half_stamp * scale
    large = 2 * centre + 1
    ends = centre + ceil(directions * (curves.paddle_length * scale))
    drawn = np.zeros((len(directions), large, large), dtype=np.uint8)
    for number, (down, right) in enumerate(ends.tolist()):
        picture = Image.new("L", (large, large), 0)
        ImageDraw.Draw(picture).line([(centre, centre), (right, down)], fill=255, width=width)
        drawn[number] = np.asarray(picture)
    padded = np.pad(drawn, ((0, 0), (reach, reach), (reach, reach)))
    dilated = drawn.copy()
    for down in range(-reach, reach + 1):
        for right in range(-reach, reach + 1):
            if down**2 + right**2 <= reach**2:
                window = padded[:, reach + down : reach + down + large, reach + right : reach + right + large]
                np.maximum(dilated, window, out=dilated)
    ink = np.stack([_reduced(line.astype(np.float32), side) for line in drawn])
    return ink.astype(np.float64) / 255, np.stack([_reduced(area, side) for area in dilated]).astype(np.int64)


def _reduced(picture: NDArray[np.float32] | Bytes, side: int) -> NDArray[np.float32] | Bytes:
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS))


def _disc(curves: PathfinderCurves) -> Integers:
    """A disc, 0 to 255, in the middle of a square with an odd side."""
    scale, half = curves.antialias, math.ceil(curves.marker_radius) + 4
    at = np.arange((2 * half + 1) * scale) - half * scale
    inside = at[:, None] ** 2 + at[None, :] ** 2 <= (curves.marker_radius * scale) ** 2
    return _reduced(np.where(inside, 255, 0).astype(np.uint8), 2 * half + 1).astype(np.int64)


def _sparse(stamps: Integers) -> tuple[Integers, Integers]:
    """Offsets ``(D, P, 2)`` from the middle and values ``(D, P)`` of the positive pixels, largest first."""
    side = stamps.shape[1]
    flat = stamps.reshape(len(stamps), -1)
    count = int((flat > 0).sum(axis=1).max())
    order = np.argsort(-flat, axis=1, kind="stable")[:, :count]
    values = np.take_along_axis(flat, order, axis=1)
    offsets = np.stack(np.divmod(order, side), axis=2) - side // 2
    # padding must not be a pixel of the stamp: writing it would undo what the stamp has written there
    offsets[values <= 0] = -(side // 2) - 1
    return offsets, np.maximum(values, 0)


def render(curves: PathfinderCurves, at: Integers, stroke: Integers, discs: Integers, contrast: Integers) -> Bytes:
    """Render pictures ``(B, size, size)`` of a placement, each divided by its maximum before it is reduced."""
    canvas = _Canvas(curves)
    # few at a time, so that a sheet is still in the cache when it is reduced
    parts = (slice(start, start + 16) for start in range(0, len(at), 16))
    sheets = (sheet for p in parts for sheet in canvas.stamp(at[p], stroke[p], discs[p], contrast[p]))
    return np.stack([canvas.reduce(sheet) for sheet in sheets])


def segment(curves: PathfinderCurves, at: Integers, stroke: Integers, classes: Integers) -> Bytes:
    """Classes ``(B, size, size)`` of pixels at least half as bright as their dash, given those of the dashes; else 0.

    A pixel of a reduced picture has the highest class among its parts.
    """
    canvas = _Canvas(curves)
    parts = (slice(start, start + 16) for start in range(0, len(at), 16))
    return np.concatenate([canvas.segment(at[p], stroke[p], classes[p]) for p in parts])


@functools.lru_cache(maxsize=8)
class _Canvas:
    """A canvas whose pixels are sorted by their phase within the squares that become one pixel.

    Both passes of the separable filter are then sums of whole contiguous planes.
    """

    def __init__(self, curves: PathfinderCurves) -> None:
        self.strokes, self.size = Strokes(curves), curves.size
        self.factor = factor = curves.reduction
        # the second curve may start anywhere within the window, so a stamp reaches at most this far outside
        self.guard = -(-max(curves.half_stamp + 2, math.ceil(curves.marker_radius) + 5) // factor)
        self.plane = curves.size + 2 * self.guard
        pixel, phase = np.divmod(np.arange(self.plane * factor), factor)
        self.row = (phase * factor * self.plane + pixel) * self.plane
        self.column = phase * self.plane**2 + pixel
        # a triangle around the middle of each square, twice as wide as the square, in integers of sum 2 factor^2
        weights = {tap: 2 * factor - abs(2 * tap + 1 - factor) for tap in range(-factor, 2 * factor)}
        self.taps = [(tap % factor, self.guard + tap // factor, w) for tap, w in weights.items() if w > 0]

    def stamp(self, at: Integers, stroke: Integers, discs: Integers, contrast: Integers) -> Bytes:
        """Sheets ``(B, row phase, column phase, rows, columns)`` of pictures, 255 at their brightest pixel."""
        strokes, sheets = self.strokes, self._blank(len(at))
        flat, dash = sheets.reshape(-1), strokes.ink[stroke, 0] * contrast // INK_SCALE
        brightest = np.where(stroke < 0, 0, dash).max(axis=1, initial=int(strokes.disc[0]))[:, None]

        def add(rows: Integers, centres: Integers, offsets: Integers, ink: Integers) -> None:
            position = self._positions(sheets, rows, centres, offsets)
            flat[position] = np.maximum(flat.take(position), (ink * 255 // brightest[rows]).astype(np.uint8))

        for slot in range(stroke.shape[1]):
            there = np.flatnonzero(stroke[:, slot] >= 0)
            kind, light = stroke[there, slot], contrast[there, slot, None]
            add(there, at[there, slot], strokes.ink_offsets[kind], strokes.ink[kind] * light // INK_SCALE)
        for number in (0, 1):
            add(np.arange(len(at)), discs[:, number], strokes.disc_offsets, strokes.disc)
        return sheets

    def segment(self, at: Integers, stroke: Integers, classes: Integers) -> Bytes:
        """The highest class ``(B, size, size)`` in each pixel."""
        sheets, inner = self._blank(len(at)), slice(self.guard, self.guard + self.size)
        flat = sheets.reshape(-1)
        for slot in range(stroke.shape[1]):
            there = np.flatnonzero(stroke[:, slot] >= 0)
            kind = stroke[there, slot]
            position = self._positions(sheets, there, at[there, slot], self.strokes.ink_offsets[kind])
            ink = self.strokes.ink[kind]
            covered = 2 * ink >= ink[:, :1]
            flat[position[covered]] = np.broadcast_to(classes[there, slot, None], covered.shape)[covered]
        whole: Bytes = sheets[..., inner, inner].max(axis=(1, 2))
        return whole

    def _blank(self, count: int) -> Bytes:
        return np.zeros((count, self.factor, self.factor, self.plane, self.plane), dtype=np.uint8)

    def _positions(self, sheets: Bytes, rows: Integers, centres: Integers, offsets: Integers) -> Integers:
        pixels = centres[:, None] + offsets + self.guard * self.factor
        position: Integers = (
            rows[:, None] * sheets[0].size + self.row.take(pixels[..., 0]) + self.column.take(pixels[..., 1])
        )
        return position

    def reduce(self, sheet: Bytes) -> Bytes:
        """One final picture ``(size, size)``: reduced along rows, then along columns, each rounded to bytes."""
        total = 2 * self.factor**2
        rows = np.full((self.factor, self.plane, self.size), total // 2, dtype=np.uint16)
        for phase, start, weight in self.taps:
            rows += np.multiply(sheet[:, phase, :, start : start + self.size], weight, dtype=np.uint16)
        rows //= total
        both = np.full((self.size, self.size), total // 2, dtype=np.uint16)
        for phase, start, weight in self.taps:
            both += rows[phase, start : start + self.size] * np.uint16(weight)
        return (both // total).astype(np.uint8)
