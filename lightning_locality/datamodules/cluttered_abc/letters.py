"""Letters of cluttered pictures: middle lines of glyphs, moved and bent, and drawn with strokes of one thickness."""

from __future__ import annotations

__all__: list[str] = []

import functools
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from scipy.special import ndtr, ndtri

from lightning_locality.datamodules.cluttered_abc.parameters import ClutteredLetters, font_file
from lightning_locality.datamodules.pathfinder.rendering import Bytes, Floats, Integers

Flags = NDArray[np.bool_]

STREAMS = {"train": 32, "validation": 33, "test": 34}  # others than Pathfinder's
BLOCK = 512
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
BETWEEN = 4  # points per pixel of a middle line: strokes stay whole however far it is stretched
OVERLAP_DILATION = 1.4  # of the thickness
LANDSCAPE_GRID = 32  # points in each direction at which the range of a landscape is found


class Random:
    """The random numbers of one picture, from the counter-based generator Philox 4x64.

    Its key is (``seed``, ``stream`` 2^56 + picture number), as for Pathfinder; the upper half of each word is used.
    """

    def __init__(self, seed: int, stream: int, number: int) -> None:
        self.source = np.random.Philox(key=[seed, (stream << 56) | number])
        self.words, self.used = np.empty(0, np.int64), 0

    def take(self, count: int) -> Integers:
        """The next ``count`` numbers of 32 bits."""
        if self.used + count > len(self.words):
            fresh = (self.source.random_raw(max(BLOCK, count)) >> np.uint64(32)).astype(np.int64)
            self.words, self.used = np.concatenate([self.words[self.used :], fresh]), 0
        self.used += count
        return self.words[self.used - count : self.used]

    def below(self, bound: int) -> int:
        """A number, uniform in 0..bound-1."""
        return int(self.take(1)[0]) * bound >> 32

    def uniform(self, count: int) -> Floats:
        """Numbers between 0 and 1, never either."""
        return (self.take(count) + 0.5) / 2**32

    def normal(self, count: int) -> Floats:
        """Normal numbers that lie within two standard deviations."""
        low = ndtr(-2.0)
        values: Floats = ndtri(low + self.uniform(count) * (1 - 2 * low))
        return values


class Glyph(NamedTuple):
    """The middle line of a letter's strokes, relative to the middle of the letter's box."""

    points: Floats  # (P, 2), (down, right) in pixels of the font
    height: float
    width: float


class Letter(NamedTuple):
    """A drawn letter: its strokes in the smallest box that holds them with ``reach`` pixels around."""

    strokes: Flags  # (H, W)
    dilated: Flags  # (H, W), by which overlaps are measured
    centre: tuple[int, int]  # mean place of its strokes in the box
    reach: int  # how far the dilated letter may extend beyond the strokes


@functools.lru_cache(maxsize=512)
def glyph(font: str, size: int, letter: str) -> Glyph:
    """The middle line of a capital letter."""
    face = ImageFont.truetype(str(font_file(font)), size, layout_engine=ImageFont.Layout.BASIC)
    picture = Image.new("L", (3 * size, 3 * size))
    ImageDraw.Draw(picture).text((size, size // 2), letter, font=face, fill=255)
    ink = np.asarray(picture) > 127
    if not ink.any():
        raise ValueError(f"fonts: {font} has no letter {letter!r}")
    (top, bottom), (left, right) = ((where[0], where[-1]) for where in (np.flatnonzero(ink.any(1 - a)) for a in (0, 1)))
    line = thin(np.pad(ink[top : bottom + 1, left : right + 1], 1))
    pixels = [np.argwhere(line).astype(float)]
    for down, across in ((0, 1), (1, 0), (1, 1), (1, -1)):
        joined = line & np.roll(line, (-down, -across), axis=(0, 1))
        start = np.argwhere(joined)
        pixels += [start + np.array([down, across]) * step / BETWEEN for step in range(1, BETWEEN)]
    middle = np.array([(bottom - top) / 2 + 1, (right - left) / 2 + 1])
    return Glyph(np.concatenate(pixels) - middle, float(bottom - top), float(right - left))


def thin(shape: Flags) -> Flags:
    """The middle line of a shape with a border of background, connected as the shape is.

    Source: "A fast parallel algorithm for thinning digital patterns" (Zhang, Suen, 1984).
    """
    line = shape.copy()
    around = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))  # clockwise from above
    while True:
        before = line.sum()
        for step in (0, 1):
            ring = np.stack([np.roll(line, (-down, -right), axis=(0, 1)) for down, right in around])
            count, turns = ring.sum(axis=0), (~ring & np.roll(ring, -1, axis=0)).sum(axis=0)
            up, across, below, back = ring[::2]
            first, second = (
                (up & across & below, across & below & back)
                if step == 0
                else (
                    up & across & back,
                    up & below & back,
                )
            )
            line = line & ~((count >= 2) & (count <= 6) & (turns == 1) & ~first & ~second)
        if line.sum() == before:
            return line


class Affine(NamedTuple):
    """A random affine map: powers of 1/2, degrees and coefficients, each (down, right)."""

    powers: Floats
    degrees: float
    shear: Floats

    @classmethod
    def sample(cls, random: Random, scale: float, rotation: float, shear: float) -> Affine:
        """Sample it; both powers have the same sign, and so have both coefficients."""
        signs = [1 - 2 * random.below(2) for _ in (0, 1)]
        values = random.normal(5)
        return cls(signs[0] * scale * np.abs(values[:2]), rotation * values[2], signs[1] * shear * np.abs(values[3:]))

    def and_then(self, other: Affine) -> Affine:
        """Both together; powers, angles and coefficients add."""
        return Affine(self.powers + other.powers, self.degrees + other.degrees, self.shear + other.shear)

    def matrix(self) -> Floats:
        """The matrix ``(2, 2)`` that maps (down, right): it scales, turns counter-clockwise, and shears."""
        cosine, sine = math.cos(math.radians(self.degrees)), math.sin(math.radians(self.degrees))
        turn = np.array([[cosine, -sine], [sine, cosine]])
        matrix: Floats = np.array([[1, self.shear[0]], [self.shear[1], 1]]) @ turn @ np.diag(0.5**self.powers)
        return matrix


def bend(letters: ClutteredLetters, points: Floats, shape: Glyph, affine: Affine, random: Random) -> Floats:
    """Points ``(P, 2)`` of a transformed letter, moved along the gradient of a random landscape around it."""
    longest = max(shape.height, shape.width)
    # the landscape's box: half the longer side around the letter, and what its rotation and shear need
    tilt = math.radians(45 + affine.degrees % 90)
    grown = max(1.0, 2**0.5 * math.sin(tilt) + 0.05)
    height, width = (shape.height + longest) * grown, (shape.width + longest) * grown
    box = np.array([height + width * abs(affine.shear[0]), width + height * abs(affine.shear[1])])
    count = letters.distortion_bumps
    signs = np.where(random.take(count) >> 31, 1.0, -1.0)
    centres = (random.uniform(2 * count).reshape(count, 2) - 0.5) * box
    ticks = (np.arange(LANDSCAPE_GRID) + 0.5) / LANDSCAPE_GRID - 0.5
    # separable: exp(-(y^2 + x^2)) is a product
    rows, columns = (
        np.exp(-(((ticks * box[axis])[:, None] - centres[:, axis]) ** 2) / letters.distortion_width**2)
        for axis in (0, 1)
    )
    landscape = (rows * signs) @ columns.T
    down, right = (points[:, axis, None] - centres[:, axis] for axis in (0, 1))
    bumps = signs * np.exp(-(down**2 + right**2) / letters.distortion_width**2)
    slope = (-2 / letters.distortion_width**2) * np.stack([(bumps * step).sum(axis=1) for step in (down, right)], 1)
    moved: Floats = points + 40.8 * letters.distortion * longest / np.ptp(landscape) * slope
    return moved


def draw_letter(letters: ClutteredLetters, shape: Glyph, affine: Affine, random: Random) -> Letter | None:
    """Transform and draw a letter; None if it is larger than the picture."""
    points = bend(letters, shape.points @ affine.matrix().T, shape, affine, random)
    # whole pixels, from coordinates rounded so that the last digits of sines and exponentials do not matter
    pixels = np.floor(np.round(points * 64) / 64).astype(np.int64)
    reach = int(OVERLAP_DILATION * letters.thickness)
    half = letters.thickness / 2
    border = math.ceil(half) + reach
    pixels += border - pixels.min(axis=0)
    shape_of_box = pixels.max(axis=0) + border + 1
    if (shape_of_box - 2 * reach > letters.window).any():
        return None
    background = np.ones(shape_of_box, dtype=bool)
    background[pixels[:, 0], pixels[:, 1]] = False
    strokes: Flags = ndimage.distance_transform_edt(background) <= half
    return Letter(strokes, dilate(strokes, reach), _centre(strokes), reach)


def dilate(shape: Flags, steps: int) -> Flags:
    """The pixels from which at most ``steps`` steps to a neighbour in row or column lead into the shape."""
    if not shape.any():
        return shape.copy()
    dilated: Flags = ndimage.distance_transform_cdt(~shape, "taxicab") <= steps
    return dilated


def _centre(strokes: Flags) -> tuple[int, int]:
    down, right = np.nonzero(strokes)
    return int(np.floor(down.mean() + 0.5)), int(np.floor(right.mean() + 0.5))


def ring(radius: int) -> tuple[Bytes, Bytes]:
    """Light and shade of a marker ``(2 R + 3, 2 R + 3)``: the picture is at least the one and at most the other."""
    fine = (np.arange((2 * radius + 3) * 4) + 0.5) / 4 - radius - 1.5
    distance = fine[:, None] ** 2 + fine**2

    def share(inside: Flags) -> Bytes:
        side = 2 * radius + 3
        covered: Bytes = ((inside.reshape(side, 4, side, 4).sum(axis=(1, 3)) * 255 + 8) // 16).astype(np.uint8)
        return covered

    return share(distance <= radius**2), share(distance > (radius - 3) ** 2)
