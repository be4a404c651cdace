"""Pairs of image patches: where input gradients are compared (I), and what is replaced (J).

Legend: B batch, C channels, H height, W width, N sampled pairs (1 or B). The gap of two boxes is the number of pixels
between them along the axis on which they are farther apart; boxes with a gap of 0 touch, also at a corner.
"""

from __future__ import annotations

__all__ = [
    "AbstractPatches",
    "AdjacentPatches",
    "ContentPatches",
    "FarField",
    "GivenPatches",
    "RandomPatches",
    "UniformPatches",
]

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_locality.arguments import Checked

Box = tuple[int, int, int, int]
"""``(top, left, height, width)`` in pixels."""


class PatchPair(NamedTuple):
    """Boolean masks ``(N, 1, H, W)``: where gradients are compared (i), and what is replaced by the donor's (j)."""

    i: Tensor
    j: Tensor


class AbstractPatches(Checked, ABC):
    """A rule that samples where gradients are compared (I) and what is replaced (J).

    The rules raise ValueError for sizes or distances that are negative, descending or do not fit the image.
    """

    @abstractmethod
    def draw(self, x: Tensor, donated: Tensor, generator: torch.Generator) -> PatchPair:
        """Sample one pair for the batch, or one per sample, from samples and their donors, both ``(B, C, H, W)``.

        The pair is a function of the state of the CPU generator and, for content rules, of the images.
        """


def box_mask(boxes: Sequence[Tensor | int], image: Tensor) -> Tensor:
    """Masks ``(N, 1, H, W)`` of boxes ``(top, left, height, width)``, numbers or ``(N,)``, in images of this size."""
    # non_blocking: copying a few numbers must not synchronise with the device
    top, left, tall, wide = (torch.as_tensor(n).to(image.device, non_blocking=True).reshape(-1, 1) for n in boxes)
    y, x = (torch.arange(n, device=image.device) for n in image.shape[-2:])
    rows = (y >= top) & (y < top + tall)
    return (rows.unsqueeze(2) & ((x >= left) & (x < left + wide)).unsqueeze(1)).unsqueeze(1)


def check_boxes(boxes: Sequence[Box], height: int, width: int, name: str = "boxes") -> None:
    """Raise ValueError unless the boxes lie inside the image and do not overlap."""
    for box in boxes:
        top, left, tall, wide = (check_integer(number, name) for number in box)
        if min(top, left) < 0 or min(tall, wide) < 1 or top + tall > height or left + wide > width:
            raise ValueError(
                f"{name}: (top, left, height, width) = {top, left, tall, wide} is not a box inside an image of "
                f"{height} x {width} pixels; top and left count from 0, height and width from 1"
            )
    for a, b in combinations(boxes, 2):
        if a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]:
            raise ValueError(f"{name}: {tuple(a)} and {tuple(b)} overlap; move one so that they share no pixel")


def check_integer(number: Any, name: str) -> int:
    try:
        return operator.index(number)
    except TypeError:
        raise ValueError(f"{name} must be a whole number of pixels, got {number!r}") from None


def _check_size(size: int) -> int:
    if (size := check_integer(size, "size")) < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    return size


def _check_distance(distance: int) -> int:
    return _check_range(check_integer(distance, "distance"), "distance")[0]


def _check_range(distance: int | tuple[int, int | None], name: str, smallest: int = 0) -> tuple[int, int | None]:
    ends = tuple(distance) if isinstance(distance, Sequence) else (distance, distance)
    if len(ends) != 2:
        raise ValueError(f"{name} must be a number of pixels, or the smallest and the largest, got {distance}")
    low, high = check_integer(ends[0], name), None if ends[1] is None else check_integer(ends[1], name)
    if low < smallest or (high is not None and high < low):
        raise ValueError(f"{name} must be ascending and at least {smallest} pixels, got {distance}")
    return low, high


def _check_fit(size: int, distance: int, height: int, width: int) -> None:
    """Raise ValueError unless two boxes of this size fit with this gap between them."""
    largest = max(min(height, width, max(height, width) // 2), 0)
    if size > largest:
        raise ValueError(
            f"size {size} does not fit: two disjoint boxes in an image of {height} x {width} pixels are at most "
            f"{largest} x {largest}"
        )
    if 2 * size + distance > max(height, width):
        raise ValueError(
            f"distance {distance} does not fit: between two boxes of {size} x {size} in an image of {height} x {width} "
            f"pixels it is at most {max(height, width) - 2 * size}"
        )


def _uniform_integers(low: Tensor | int, high: Tensor | int, number: int, generator: torch.Generator) -> Tensor:
    """Integers ``(number,)``, uniform in low..high (both included), each with its own bounds."""
    uniform = torch.rand(number, generator=generator, dtype=torch.float64)
    span = torch.as_tensor(high) - torch.as_tensor(low) + 1
    return torch.minimum((uniform * span).long(), span - 1) + low


def _outside(window: Sequence[Tensor], hole: Sequence[Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions ``(N,)``, uniform over a window without a hole; both ``(top, bottom, left, right)``, included."""
    # positions are numbered row by row, first the rows without the hole, then what the hole leaves of the others
    top, bottom, left, right = window
    hole_top, hole_bottom = torch.maximum(hole[0], top), torch.minimum(hole[1], bottom)
    hole_left, hole_right = torch.maximum(hole[2], left), torch.minimum(hole[3], right)
    hole_rows = (hole_bottom - hole_top + 1).clamp(min=0)
    hole_columns = (hole_right - hole_left + 1).clamp(min=0)
    rows, columns = bottom - top + 1, right - left + 1
    full = (rows - hole_rows) * columns
    index = _uniform_integers(0, full + hole_rows * (columns - hole_columns) - 1, len(rows), generator)
    row = index.div(columns, rounding_mode="floor") + top
    full_row = torch.where((hole_rows > 0) & (row >= hole_top), row + hole_rows, row)
    remaining = (columns - hole_columns).clamp(min=1)
    column = (index - full) % remaining + left
    cut_row = (index - full).div(remaining, rounding_mode="floor") + hole_top
    cut_column = torch.where((hole_columns > 0) & (column >= hole_left), column + hole_columns, column)
    whole = index < full
    return torch.where(whole, full_row, cut_row), torch.where(whole, index % columns + left, cut_column)


def _uniform_pair(
    x: Tensor, size: Tensor, distance: Tensor, generator: torch.Generator, adjacent: bool = False
) -> PatchPair:
    """I uniform over the positions that leave room for J, and J uniform over its own."""
    height, width = x.shape[-2:]
    zero, reach = torch.zeros_like(size), size + distance
    window = (zero, height - size, zero, width - size)
    without_partner = (height - size - reach + 1, reach - 1, width - size - reach + 1, reach - 1)
    i = _outside(window, without_partner, generator)
    if adjacent:
        top, left = ((corner - size).clamp(min=0) for corner in i)
        window = (top, torch.minimum(i[0] + size, window[1]), left, torch.minimum(i[1] + size, window[3]))
    near = (i[0] - reach + 1, i[0] + reach - 1, i[1] - reach + 1, i[1] + reach - 1)
    j = _outside(window, near, generator)
    return PatchPair(*(box_mask((*corner, size, size), x) for corner in (i, j)))


def _content(x: Tensor, donated: Tensor, size: int) -> Tensor:
    """Squared difference of sample and donor, summed over each box position ``(B, H - size + 1, W - size + 1)``.

    As integers of at most 2^24: their cumulative sum is exact and monotone on every device, so that a box without
    content cannot be sampled in place of one with content.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    squares = (x.to(exact) - donated.to(exact)).square().sum(1, keepdim=True).nan_to_num()
    # along one axis, then the other: 2 size numbers for each position in place of size^2
    content = F.avg_pool2d(F.avg_pool2d(squares, (size, 1), stride=1), (1, size), stride=1).squeeze(1)
    largest = content.amax((1, 2), keepdim=True)
    return (content / torch.where(largest > 0, largest, torch.ones_like(largest)) * 2**24).ceil().long()


def _by_content(content: Tensor, allowed: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Corners ``(B,)``, in proportion to the content among the allowed positions; uniform if there is none."""
    weight = (content * allowed).flatten(1)
    weight = torch.where(weight.any(1, keepdim=True), weight, allowed.expand_as(content).flatten(1).long())
    cumulated = weight.cumsum(1)
    # the numbers come from the CPU generator, so that they are the same on every device
    number = torch.randint(2**30, (len(weight), 1), generator=generator).to(weight.device, non_blocking=True)
    total = cumulated[:, -1:]
    # number / 2^30 of the total, in integers that cannot overflow
    target = number * (total >> 30) + (number * (total & (2**30 - 1)) >> 30)
    index = torch.searchsorted(cumulated, target, right=True).squeeze(1)
    return index.div(content.shape[2], rounding_mode="floor"), index % content.shape[2]


def _with_room(content: Tensor, reach: int) -> Tensor:
    """Whether each position ``(H', W')`` has another one at least ``reach`` away along one axis."""
    places = (torch.arange(n, device=content.device) for n in content.shape[1:])
    rows, columns = (torch.maximum(place, len(place) - 1 - place) >= reach for place in places)
    return rows.unsqueeze(1) | columns


@final
class GivenPatches(AbstractPatches):
    """I and J are two different boxes of a given list, at random (a fair coin for two boxes).

    Source: Razin, Maman, Cohen (2022, see :func:`input_gradient_change`), IsSameClass: the boxes are the two images.

    Args:
        boxes: Two or more disjoint boxes ``(top, left, height, width)`` in pixels; None: those of the data, which the
            classification task binds.

    Raises:
        ValueError: Fewer than two boxes, boxes that overlap or leave the image, or a draw without boxes.

    >>> pair = GivenPatches([(0, 0, 2, 2), (0, 6, 2, 2)]).draw(torch.zeros(4, 1, 2, 8), torch.zeros(4, 1, 2, 8),
    ...                                                       torch.Generator().manual_seed(0))
    >>> (pair.i | pair.j)[0, 0, 0].tolist()
    [True, True, False, False, False, False, True, True]
    """

    def __init__(self, boxes: Sequence[Box] | None = None) -> None:
        self.boxes: list[Box] | None = None
        self.given = False
        if boxes is not None:
            self.bind(boxes)
            self.given = True

    def bind(self, boxes: Sequence[Box]) -> None:
        """Use the boxes of the data, unless boxes were passed to the constructor."""
        if self.given:
            return
        if len(boxes) < 2:
            raise ValueError(f"boxes must be at least two, to take I and J from, got {list(boxes)}")
        if any(len(box) != 4 for box in boxes):
            raise ValueError(f"boxes must be (top, left, height, width) each, got {list(boxes)}")
        check_boxes(boxes, max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes))
        self.boxes = [(int(a), int(b), int(c), int(d)) for a, b, c, d in boxes]

    def draw(self, x: Tensor, donated: Tensor, generator: torch.Generator) -> PatchPair:
        """Two of the boxes, for the whole batch."""
        if self.boxes is None:
            raise ValueError("GivenPatches has no boxes: pass boxes=[...], or call bind(boxes) before the first draw")
        check_boxes(self.boxes, *x.shape[-2:])
        chosen = torch.randperm(len(self.boxes), generator=generator)[:2].tolist()
        return PatchPair(*(box_mask(self.boxes[k], x) for k in chosen))


@final
class UniformPatches(AbstractPatches):
    """I uniform over the positions of a square box, J uniform over those at least ``distance`` away from I.

    Positions of I that leave no room for J are excluded. Source: Razin, Maman, Cohen (2022, see
    :func:`input_gradient_change`), Pathfinder (size 2, distance 0: disjoint, one pair per batch).

    Args:
        size: Side of the boxes, in pixels.
        distance: Minimum gap between I and J, in pixels; 0 is disjoint.
        per_sample: Sample a pair for every sample instead of one for the batch.
    """

    def __init__(self, size: int = 2, distance: int = 0, per_sample: bool = False) -> None:
        self.size, self.distance = _check_size(size), _check_distance(distance)
        self.per_sample = per_sample

    def draw(self, x: Tensor, donated: Tensor, generator: torch.Generator) -> PatchPair:
        """One pair, or one per sample."""
        _check_fit(self.size, self.distance, *x.shape[-2:])
        size = torch.full((len(x) if self.per_sample else 1,), self.size)
        return _uniform_pair(x, size, torch.full_like(size, self.distance), generator)


@final
class AdjacentPatches(AbstractPatches):
    """I uniform over the positions of a square box, J uniform over those that touch I (side or corner).

    Args:
        size: Side of the boxes, in pixels.
        per_sample: Sample a pair for every sample instead of one for the batch.
    """

    def __init__(self, size: int = 2, per_sample: bool = False) -> None:
        self.size, self.per_sample = _check_size(size), per_sample

    def draw(self, x: Tensor, donated: Tensor, generator: torch.Generator) -> PatchPair:
        """One pair, or one per sample."""
        _check_fit(self.size, 0, *x.shape[-2:])
        size = torch.full((len(x) if self.per_sample else 1,), self.size)
        return _uniform_pair(x, size, torch.zeros_like(size), generator, adjacent=True)


@final
class RandomPatches(AbstractPatches):
    """Like :class:`UniformPatches`, with the size, and then the minimum distance, sampled uniformly as well.

    Args:
        sizes: Smallest and largest side of the boxes, in pixels.
        distances: Smallest and largest minimum gap between I and J, in pixels; None: the largest that fits the
            image with the sampled size.
        per_sample: Sample a pair for every sample instead of one for the batch.
    """

    def __init__(
        self, sizes: tuple[int, int] = (2, 14), distances: tuple[int, int | None] = (0, None), per_sample: bool = False
    ) -> None:
        self.sizes, self.per_sample = _check_range(sizes, "sizes", smallest=1), per_sample
        self.distances = _check_range(distances, "distances")

    def draw(self, x: Tensor, donated: Tensor, generator: torch.Generator) -> PatchPair:
        """One pair, or one per sample."""
        (smallest, largest), (low, high) = self.sizes, self.distances
        assert largest is not None
        _check_fit(largest, low if high is None else high, *x.shape[-2:])
        number = len(x) if self.per_sample else 1
        size = _uniform_integers(smallest, largest, number, generator)
        fitting = max(x.shape[-2:]) - 2 * size
        distance = _uniform_integers(low, fitting if high is None else high, number, generator)
        return _uniform_pair(x, size, distance, generator)


@final
class ContentPatches(AbstractPatches):
    """Boxes where sample and donor differ, per sample: J, then I at least ``distance`` away from it.

    Each is sampled in proportion to the squared difference between sample and donor, summed over the box; uniformly
    for a sample that equals its donor. Positions of J that leave no room for I are excluded.

    Args:
        size: Side of the boxes, in pixels.
        distance: Minimum gap between I and J, in pixels; 0 is disjoint.
    """

    def __init__(self, size: int = 2, distance: int = 0) -> None:
        self.size, self.distance = _check_size(size), _check_distance(distance)

    def draw(self, x: Tensor, donated: Tensor, generator: torch.Generator) -> PatchPair:
        """One pair per sample."""
        _check_fit(self.size, self.distance, *x.shape[-2:])
        content = _content(x, donated, self.size)
        reach = self.size + self.distance
        top, left = _by_content(content, _with_room(content, reach), generator)
        side = 2 * reach - 1
        near = box_mask((top - reach + 1, left - reach + 1, side, side), content).squeeze(1)
        i = _by_content(content, ~near, generator)
        return PatchPair(*(box_mask((*corner, self.size, self.size), x) for corner in (i, (top, left))))


@final
class FarField(AbstractPatches):
    """J as in :class:`ContentPatches`, I every pixel at least a distance away from J: needs no knowledge of the task.

    Size and distance are sampled once per batch, J per sample. Positions of J that leave no pixel for I are excluded.

    Args:
        size: Side of J, in pixels, about that of an object: a number, or a range to sample it from, uniformly in its
            logarithm, in which None is half of the longer side of the image or, if that is less, the shorter one.
        distance: Minimum gap between J and a pixel of I, in pixels: a number, or a range to sample it from, in which
            None is the largest that leaves room for a box as wide as J on the far side, ``max(H, W) - 2 size``.
    """

    def __init__(
        self, size: int | tuple[int, int | None] = 14, distance: int | tuple[int, int | None] = (0, None)
    ) -> None:
        self.size = _check_range(size, "size", smallest=1) if isinstance(size, Sequence) else _check_size(size)
        self.distance = _check_range(distance, "distance")

    def draw(self, x: Tensor, donated: Tensor, generator: torch.Generator) -> PatchPair:
        """One pair per sample."""
        height, width = x.shape[-2:]
        size = self.size
        if not isinstance(size, int):
            low, high = size
            if high is None:
                high = max(1, min(height, width, max(height, width) // 2))
                low = min(low, high)
            ratio = float(torch.rand((), generator=generator, dtype=torch.float64))
            size = min(high, int(low * ((high + 1) / low) ** ratio))
        if size > min(height, width) or size >= max(height, width):
            raise ValueError(
                f"size {size} does not fit: J must leave pixels for I in an image of {height} x {width} pixels, "
                f"so it is at most {min(height, width, max(height, width) - 1)}"
            )
        largest = max(height, width) - size - 1
        low, high = self.distance
        high = max(low, max(height, width) - 2 * size) if high is None else high
        if high > largest:
            raise ValueError(
                f"distance {high} does not fit: with a J of {size} x {size} in an image of {height} x "
                f"{width} pixels it is at most {largest}"
            )
        # an integer on the CPU: nothing synchronises with the device
        distance = int(_uniform_integers(low, high, 1, generator))
        content = _content(x, donated, size)
        # a position leaves a pixel beyond the gap exactly if the box can move by more than the gap
        top, left = _by_content(content, _with_room(content, distance + 1), generator)
        side = size + 2 * distance
        near = box_mask((top - distance, left - distance, side, side), x)
        return PatchPair(~near, box_mask((top, left, size, size), x))
