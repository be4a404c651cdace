"""Finished Pathfinder pictures: drawn from their placement and reduced to their final size."""

from __future__ import annotations

__all__ = ["STREAMS", "draw", "pictures"]

import functools
from collections.abc import Sequence

import numpy as np

from lightning_locality.datamodules.pathfinder.dashes import Bytes, Integers, Strokes
from lightning_locality.datamodules.pathfinder.parameters import PathfinderCurves
from lightning_locality.datamodules.pathfinder.placement import Placement, place

STREAMS = {"train": 0, "validation": 1, "test": 2}


def pictures(curves: PathfinderCurves, seed: int, split: str, index: Sequence[int]) -> tuple[Bytes, Bytes]:
    """Pictures ``(B, size, size)`` and labels ``(B,)``; each depends on seed, split and its own number alone.

    Args:
        curves: Parameters of the pictures.
        seed: 0 to 2^64 - 1.
        split: ``train``, ``validation`` or ``test``: disjoint streams of pictures.
        index: Picture numbers ``(B,)``. They are placed in lock step; 64 to 256 at once are fastest.

    >>> images, labels = pictures(PathfinderCurves(), seed=0, split="test", index=range(4))
    >>> images.shape, labels.shape, int(images.max())
    ((4, 150, 150), (4,), 214)
    """
    placement = place(curves, seed, STREAMS[split], index)
    return draw(curves, placement), placement.label.astype(np.uint8)


def draw(curves: PathfinderCurves, placement: Placement) -> Bytes:
    """Pictures ``(B, size, size)`` of dashes and discs, each divided by its maximum before it is reduced."""
    sheet = Sheet.of(curves)
    images = np.empty((len(placement.label), curves.size, curves.size), dtype=np.uint8)
    # few at a time, so that a sheet is still in the cache when it is reduced
    for start in range(0, len(images), 16):
        part = slice(start, start + 16)
        sheets = sheet.ink(placement.at[part], placement.stroke[part], placement.discs[part])
        for image, drawn in zip(images[part], sheets, strict=True):
            image[:] = sheet.reduce(drawn)
    return images


class Sheet:
    """An empty drawing, its pixels sorted by their phase within the squares that are averaged to one pixel.

    The filter of the reduction is separable; on pixels sorted in this way both of its passes are sums of whole
    contiguous planes.

    Args:
        curves: Parameters of the pictures.
    """

    def __init__(self, curves: PathfinderCurves) -> None:
        self.strokes, self.size = Strokes.of(curves), curves.size
        self.factor = factor = curves.reduction
        # a second curve may start anywhere within the window, so a stamp ends at most this far outside
        self.guard = -(-max(curves.half_stamp + 2, curves.marker_radius + 5) // factor)
        self.plane = curves.size + 2 * self.guard
        pixel, phase = np.divmod(np.arange(self.plane * factor), factor)
        self.row = (phase * factor * self.plane + pixel) * self.plane
        self.column = phase * self.plane**2 + pixel
        # a triangle round the middle of each square, as wide as two of them, in whole numbers that sum to 2 factor^2
        weights = {tap: 2 * factor - abs(2 * tap + 1 - factor) for tap in range(-factor, 2 * factor)}
        self.taps = [(tap % factor, self.guard + tap // factor, w) for tap, w in weights.items() if w > 0]

    @staticmethod
    @functools.lru_cache(maxsize=8)
    def of(curves: PathfinderCurves) -> Sheet:
        """The sheet of a set of parameters, worked out at the first call."""
        return Sheet(curves)

    def _flat(self, at: Integers, offsets: Integers) -> Integers:
        """Positions in a flat sheet of the pixels ``offsets`` round the places ``at``."""
        pixels = at + offsets + self.guard * self.factor
        flat: Integers = self.row.take(pixels[..., 0]) + self.column.take(pixels[..., 1])
        return flat

    def ink(self, at: Integers, stroke: Integers, discs: Integers) -> Bytes:
        """Sheets ``(B, row phase, column phase, rows, columns)`` of pictures, 255 at their brightest pixel."""
        strokes, count = self.strokes, len(at)
        sheets = np.zeros((count, self.factor, self.factor, self.plane, self.plane), dtype=np.uint8)
        pixels = sheets.reshape(-1)
        origin = np.arange(count)[:, None] * sheets[0].size
        brightest = np.where(stroke < 0, 0, strokes.ink[stroke, 0]).max(axis=1, initial=int(strokes.disc[0]))
        for slot in range(stroke.shape[1]):
            there = np.flatnonzero(stroke[:, slot] >= 0)
            kind = stroke[there, slot]
            position = origin[there] + self._flat(at[there, slot, None], strokes.ink_offsets[kind])
            ink = (strokes.ink[kind] * 255 // brightest[there, None]).astype(np.uint8)
            pixels[position] = np.maximum(pixels.take(position), ink)
        disc = (strokes.disc * 255 // brightest[:, None]).astype(np.uint8)
        for number in (0, 1):
            position = origin + self._flat(discs[:, number, None], strokes.disc_offsets)
            pixels[position] = np.maximum(pixels.take(position), disc)
        return sheets

    def reduce(self, sheet: Bytes) -> Bytes:
        """One finished picture ``(size, size)``; first along rows, then along columns, each rounded to bytes."""
        total = 2 * self.factor**2
        rows = np.full((self.factor, self.plane, self.size), total // 2, dtype=np.uint16)
        for phase, start, weight in self.taps:
            rows += np.multiply(sheet[:, phase, :, start : start + self.size], weight, dtype=np.uint16)
        rows //= total
        both = np.full((self.size, self.size), total // 2, dtype=np.uint16)
        for phase, start, weight in self.taps:
            both += rows[phase, start : start + self.size] * np.uint16(weight)
        return (both // total).astype(np.uint8)
