"""Pictures of two cluttered letters: where the letters and markers go, and how the letters are broken up."""

from __future__ import annotations

__all__: list[str] = []

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr

from lightning_locality.datamodules.cluttered_abc.letters import (
    ALPHABET,
    STREAMS,
    Affine,
    Flags,
    Letter,
    Random,
    dilate,
    draw_letter,
    glyph,
    ring,
)
from lightning_locality.datamodules.cluttered_abc.parameters import ClutteredLetters
from lightning_locality.datamodules.pathfinder.placement import Targets
from lightning_locality.datamodules.pathfinder.rendering import Bytes, Integers, ceil
from lightning_locality.datamodules.pathfinder.store import PictureProcess

PROCESS = 1  # increase when the same parameters give other pictures
MAX_TRIES = 10  # places tried for two letters, and radii for the second marker, before all is sampled again
MAX_FAILURES = 2_000  # pairs of letters in a row of which no picture could be made
MARKER_DILATION = 2  # of the thickness: how far markers keep from the other letter
WEIGHT_SCALE = 1 << 16  # weights are integers: the same choice on every machine


class Scene(NamedTuple):
    """All that is in one picture before it is reduced."""

    label: int  # 1 if both markers lie on one letter
    strokes: tuple[Flags, Flags]  # whole letters (window, window)
    pieces: tuple[Flags, Flags]  # the same broken up
    marked: int  # the letter of the first marker
    markers: tuple[tuple[int, int], tuple[int, int]]  # centres (down, right)


def compose(letters: ClutteredLetters, seed: int, split: str, number: int) -> Scene:
    """Sample one picture, which depends on seed, split and number alone."""
    random = Random(seed, STREAMS[split], number)
    label, marked = random.below(2), random.below(2)
    for _ in range(MAX_FAILURES):
        # neither label nor marked letter decides whether a pair of letters is given up
        placed = _place(letters, random)
        if placed is None:
            continue
        strokes, radius = placed
        pieces = _break_up(letters, strokes, random)
        markers = _mark(letters, pieces, label, marked, radius, random)
        if markers is not None:
            return Scene(label, strokes, pieces, marked, markers)
    raise ValueError(
        f"{MAX_FAILURES} pairs of letters did not fit in window={letters.window} with font_sizes={letters.font_sizes}, "
        f"radius={letters.radius}, separation={letters.separation}, min_overlap={letters.min_overlap} and "
        f"max_overlap={letters.max_overlap}; choose smaller letters, or more overlap"
    )


def _place(letters: ClutteredLetters, random: Random) -> tuple[tuple[Flags, Flags], float] | None:
    """Two letters on the canvas that overlap as little as they should, and the radius of their circle."""
    font = random.below(len(letters.fonts))
    low, high = letters.radius
    radius = low + (high - low) * float(random.uniform(1)[0])
    both = Affine.sample(random, letters.global_scale, letters.global_rotation, letters.global_shear)
    drawn: list[Letter] = []
    for _ in (0, 1):
        own = Affine.sample(random, letters.letter_scale, letters.letter_rotation, letters.letter_shear)
        shape = glyph(letters.fonts[font], letters.font_sizes[font], ALPHABET[random.below(len(ALPHABET))])
        letter = draw_letter(letters, shape, both.and_then(own), random)
        if letter is None:
            return None
        drawn.append(letter)
    for _ in range(MAX_TRIES):
        angles = _angles(letters, random)
        corners = [_corner(letters, letter, radius, angle) for letter, angle in zip(drawn, angles, strict=True)]
        if all(corner is not None for corner in corners):
            dilated = [_on_canvas(letters, one, at, one.dilated) for one, at in zip(drawn, corners, strict=True)]
            common = np.count_nonzero(dilated[0] & dilated[1])
            share = common / min(np.count_nonzero(one) for one in dilated)
            if letters.min_overlap <= share < letters.max_overlap:
                strokes = [_on_canvas(letters, one, at, one.strokes) for one, at in zip(drawn, corners, strict=True)]
                return (strokes[0], strokes[1]), radius
    return None


def _angles(letters: ClutteredLetters, random: Random) -> tuple[int, int]:
    """Angles of the two letters in whole degrees."""
    low, high = (0, 359) if letters.first_angle is None else letters.first_angle
    first = low + random.below(high - low + 1)
    return first, first + letters.separation + 1 + random.below(359 - 2 * letters.separation)


def _corner(letters: ClutteredLetters, letter: Letter, radius: float, angle: int) -> tuple[int, int] | None:
    """Where the upper left corner of the letter's box goes; None if strokes would leave the picture."""
    direction = np.array([math.sin(math.radians(angle)), math.cos(math.radians(angle))])
    top, left = (ceil(letters.window / 2 + radius * direction) - letter.centre).tolist()
    height, width = letter.strokes.shape
    inside = min(top, left) + letter.reach >= 0 and max(top + height, left + width) - letter.reach <= letters.window
    return (top, left) if inside else None


def _on_canvas(letters: ClutteredLetters, letter: Letter, corner: tuple[int, int] | None, shape: Flags) -> Flags:
    assert corner is not None
    reach, window = letter.reach, letters.window
    canvas = np.zeros((window + 2 * reach,) * 2, dtype=bool)
    top, left = corner[0] + reach, corner[1] + reach
    canvas[top : top + shape.shape[0], left : left + shape.shape[1]] = shape
    return canvas[reach : reach + window, reach : reach + window]


@functools.lru_cache(maxsize=8)
def _jitters(jitter: float) -> tuple[Integers, int]:
    """Cumulative weights, out of 2^16, of displacements from the lowest on, and the lowest.

    A displacement is a normal number, limited to two standard deviations and rounded towards 0.
    """
    largest = int(2 * jitter)
    steps = np.arange(-largest, largest)
    # the probability of at most this many pixels
    bounds = np.where(steps < 0, steps, steps + 1) / jitter if jitter else steps
    return np.rint(ndtr(bounds) * WEIGHT_SCALE).astype(np.int64), -largest


def _break_up(letters: ClutteredLetters, strokes: tuple[Flags, Flags], random: Random) -> tuple[Flags, Flags]:
    """The letters as displaced square patches; one that holds both letters moves as a whole."""
    side, count = letters.patch, letters.window // letters.patch
    inked = [_sums(one.view(np.uint8), count) > letters.patch_threshold * side**2 for one in strokes]
    places = np.argwhere(inked[0] | inked[1])
    kept = random.take(len(places)) >= round(letters.omission * 2**32)
    weights, lowest = _jitters(letters.jitter)
    moves = np.searchsorted(weights, random.take(2 * len(places)) >> 16, side="right").reshape(-1, 2) + lowest
    corners = np.clip(places * side + moves, 0, letters.window - side)
    down, right = (axis.ravel() for axis in np.mgrid[:side, :side])
    pieces = []
    for one in inked:
        own = corners[kept & one[places[:, 0], places[:, 1]]]
        canvas = np.zeros((letters.window, letters.window), dtype=bool)
        canvas[own[:, :1] + down, own[:, 1:] + right] = True
        pieces.append(canvas)
    return pieces[0], pieces[1]


def _sums(picture: Bytes, count: int) -> Integers:
    """Sums ``(count, count)`` of squares: of rows, which are contiguous, first."""
    rows = picture.reshape(count, -1, len(picture)).sum(axis=1, dtype=np.uint32)
    squares: Integers = rows.reshape(count, count, -1).sum(axis=2, dtype=np.int64)
    return squares


@functools.lru_cache(maxsize=8)
def _central(window: int) -> Integers:
    """Weights of the first marker's places, a normal distribution of a third of the side, out of 2^16."""
    along = (np.arange(window) - (window - 1) / 2) / (window / 3)
    weights: Integers = np.rint(WEIGHT_SCALE * np.exp(-(along[:, None] ** 2 + along**2) / 2)).astype(np.int64)
    return weights


def _mark(
    letters: ClutteredLetters, pieces: tuple[Flags, Flags], label: int, marked: int, radius: float, random: Random
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Centres of the markers; the second one is at a distance at which it could be on either letter."""
    reach = MARKER_DILATION * letters.thickness
    own = pieces[marked] & ~dilate(pieces[1 - marked], reach)
    other = pieces[1 - marked] & ~dilate(pieces[marked], reach)
    if not own.any() or not other.any():
        return None
    spots, others = np.argwhere(own), np.argwhere(other)
    total = np.cumsum(_central(letters.window)[own])
    first = spots[np.searchsorted(total, random.below(int(total[-1])), side="right")]
    farthest = min(max(*first, *(letters.window - 1 - first)), 3 * radius)
    nearest = 2 * letters.marker_radius + 1
    room = int(farthest) - nearest
    if room < 1:
        return None
    squares = [((where - first) ** 2).sum(axis=1) for where in (spots, others)]
    for _ in range(MAX_TRIES):
        away = nearest + random.below(room)
        same, different = ((square >= (away - 1) ** 2) & (square <= (away + 1) ** 2) for square in squares)
        if same.any() and different.any():
            choices = spots[same] if label else others[different]
            second = choices[random.below(len(choices))]
            return (int(first[0]), int(first[1])), (int(second[0]), int(second[1]))
    return None


_rings = functools.lru_cache(maxsize=8)(ring)


def render(letters: ClutteredLetters, scene: Scene) -> Bytes:
    """The picture ``(size, size)``: white pieces on black, and the markers on top."""
    reach = letters.marker_radius + 1
    canvas = np.pad((scene.pieces[0] | scene.pieces[1]).astype(np.uint8) * np.uint8(255), reach)
    light, shade = _rings(letters.marker_radius)
    for down, right in scene.markers:
        part = canvas[down : down + 2 * reach + 1, right : right + 2 * reach + 1]
        part[:] = np.minimum(np.maximum(part, light), shade)
    whole = canvas[reach:-reach, reach:-reach]
    times = letters.reduction
    if times == 1:
        return whole.copy()
    means: Bytes = ((_sums(whole, letters.size) + times**2 // 2) // times**2).astype(np.uint8)
    return means


def segment(letters: ClutteredLetters, scene: Scene) -> Bytes:
    """Classes ``(size, size)``, the highest in each pixel: letter of the first marker 1, other letter 2, both 3."""
    first, second = scene.pieces[scene.marked], scene.pieces[1 - scene.marked]
    classes = first.astype(np.uint8) + np.uint8(2) * second
    whole: Bytes = classes.reshape(letters.size, letters.reduction, letters.size, letters.reduction).max(axis=(1, 3))
    return whole


def draw(
    letters: ClutteredLetters, seed: int, split: str, index: Sequence[int], targets: bool
) -> tuple[Bytes, Bytes, Targets]:
    """Pictures ``(B, size, size)``, labels ``(B,)`` and, if asked for, what is where in them."""
    images, labels = np.empty((len(index), letters.size, letters.size), np.uint8), np.empty(len(index), np.uint8)
    count = len(index) * targets
    known = Targets(np.empty_like(images[:count]), np.empty((count, 2, 2), np.float32))
    for row, number in enumerate(index):
        scene = compose(letters, seed, split, int(number))
        images[row], labels[row] = render(letters, scene), scene.label
        if targets:
            known.segmentation[row] = segment(letters, scene)
            known.markers[row] = (np.array(scene.markers) + 0.5) / letters.reduction - 0.5
    return images, labels, known


CLUTTERED_ABC = PictureProcess("cluttered_abc", "cabc", "Cluttered ABC", PROCESS, draw, min_per_worker=128)
