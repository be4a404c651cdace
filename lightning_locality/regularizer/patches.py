"""Pairs of image patches: where input gradients are compared (I), and what is replaced (J).

Legend: B batch, C channels, H height, W width, N drawn pairs (1 or B). The gap of two boxes is the number of
pixels between them along the axis on which they are farther apart; boxes with a gap of 0 touch, also at a corner.
"""

from __future__ import annotations

__all__ = [
    "AbstractPatches",
    "AdjacentPatches",
    "Box",
    "ContentPatches",
    "FarField",
    "GivenPatches",
    "PatchPair",
    "RandomPatches",
    "UniformPatches",
    "box_content",
    "box_mask",
    "check_boxes",
    "check_fit",
    "checked_boxes",
    "draw_content",
    "leaves_room",
    "leaves_room_for_pixel",
    "outside",
    "uniform_integers",
    "uniform_pair",
]

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

Box = tuple[int, int, int, int]
"""``(top, left, height, width)`` in pixels."""


def box_mask(boxes: Sequence[Tensor | int], height: int, width: int, device: torch.device) -> Tensor:
    """Masks ``(N, 1, H, W)`` of the boxes ``(top, left, height, width)``, each a number or a tensor ``(N,)``."""
    top, left, tall, wide = (_column(number, device) for number in boxes)
    row, column = torch.arange(height, device=device), torch.arange(width, device=device)
    rows = (row >= top) & (row < top + tall)
    columns = (column >= left) & (column < left + wide)
    return (rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1)


def _column(number: Tensor | int, device: torch.device) -> Tensor:
    # non_blocking: copying a few numbers must not wait for the device
    return torch.as_tensor(number).to(device, non_blocking=True).reshape(-1, 1)


def check_boxes(boxes: Sequence[Box], height: int, width: int, name: str = "boxes") -> None:
    """Boxes lie inside the image and do not overlap; ``ValueError`` otherwise."""
    for box in boxes:
        top, left, tall, wide = box
        if min(top, left) < 0 or min(tall, wide) < 1 or top + tall > height or left + wide > width:
            raise ValueError(
                f"{name}: (top, left, height, width) = {tuple(box)} is not a box inside an image of {height} x {width} "
                "pixels; top and left count from 0, height and width from 1"
            )
    for a, b in combinations(boxes, 2):
        if a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]:
            raise ValueError(f"{name}: {tuple(a)} and {tuple(b)} overlap; move one so that they share no pixel")


def checked_boxes(boxes: Sequence[Box]) -> list[Box]:
    """Two or more disjoint boxes as tuples of numbers; ``ValueError`` otherwise."""
    if len(boxes) < 2:
        raise ValueError(f"boxes must be at least two, to take I and J from, got {list(boxes)}")
    if any(len(box) != 4 for box in boxes):
        raise ValueError(f"boxes must be (top, left, height, width) each, got {list(boxes)}")
    rows, columns = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
    check_boxes(boxes, rows, columns)
    return [(int(a), int(b), int(c), int(d)) for a, b, c, d in boxes]


def check_fit(size: int, distance: int, height: int, width: int) -> None:
    """Two boxes of this size fit with this gap between them."""
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


def uniform_integers(low: Tensor | int, high: Tensor | int, number: int, generator: torch.Generator) -> Tensor:
    """Integers ``(number,)``, uniform in low..high (both included), each with its own bounds."""
    uniform = torch.rand(number, generator=generator, dtype=torch.float64)
    span = torch.as_tensor(high) - torch.as_tensor(low) + 1
    return torch.minimum((uniform * span).long(), span - 1) + low


def outside(window: Sequence[Tensor], hole: Sequence[Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions ``(N,)``, uniform over a window without a hole; both ``(top, bottom, left, right)``, included.

    Counted row by row, first the rows without the hole, then what the hole leaves of the others.
    """
    top, bottom, left, right = window
    hole_top, hole_bottom = torch.maximum(hole[0], top), torch.minimum(hole[1], bottom)
    hole_left, hole_right = torch.maximum(hole[2], left), torch.minimum(hole[3], right)
    hole_rows = (hole_bottom - hole_top + 1).clamp(min=0)
    hole_columns = (hole_right - hole_left + 1).clamp(min=0)
    rows, columns = bottom - top + 1, right - left + 1
    full = (rows - hole_rows) * columns
    index = uniform_integers(0, full + hole_rows * (columns - hole_columns) - 1, len(rows), generator)

    row = index.div(columns, rounding_mode="floor") + top
    full_row = torch.where((hole_rows > 0) & (row >= hole_top), row + hole_rows, row)
    beside = (columns - hole_columns).clamp(min=1)
    column = (index - full) % beside + left
    cut_row = (index - full).div(beside, rounding_mode="floor") + hole_top
    cut_column = torch.where((hole_columns > 0) & (column >= hole_left), column + hole_columns, column)
    whole = index < full
    return torch.where(whole, full_row, cut_row), torch.where(whole, index % columns + left, cut_column)


def uniform_pair(
    size: Tensor, distance: Tensor, height: int, width: int, adjacent: bool, generator: torch.Generator
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Corners of I, uniform over the positions that leave room for J, and of J, uniform over its own."""
    zero, reach = torch.zeros_like(size), size + distance
    window = (zero, height - size, zero, width - size)
    without_partner = (height - size - reach + 1, reach - 1, width - size - reach + 1, reach - 1)
    i = outside(window, without_partner, generator)
    if adjacent:
        window = (
            (i[0] - size).clamp(min=0),
            torch.minimum(i[0] + size, window[1]),
            (i[1] - size).clamp(min=0),
            torch.minimum(i[1] + size, window[3]),
        )
    near = (i[0] - reach + 1, i[0] + reach - 1, i[1] - reach + 1, i[1] + reach - 1)
    return i, outside(window, near, generator)


def box_content(x: Tensor, donated: Tensor, size: int) -> Tensor:
    """Squared difference of sample and donor, summed over each box position ``(B, H - size + 1, W - size + 1)``.

    As integers, 2^24 at most: their cumulative sum is exact and rising on every device, so that a box without
    content cannot be drawn for one with it.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    squares = (x.to(exact) - donated.to(exact)).square().sum(1, keepdim=True).nan_to_num()
    content = F.avg_pool2d(squares, size, stride=1).squeeze(1)
    largest = content.amax((1, 2), keepdim=True)
    return (content / torch.where(largest > 0, largest, torch.ones_like(largest)) * 2**24).ceil().long()


def draw_content(content: Tensor, allowed: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Corners ``(B,)`` on the device, in proportion to the content among the allowed; uniform where there is none."""
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


def leaves_room(positions: int, reach: int, device: torch.device) -> Tensor:
    """Positions along one axis that have another one at least ``reach`` away."""
    place = torch.arange(positions, device=device)
    return torch.maximum(place, positions - 1 - place) >= reach


def leaves_room_for_pixel(positions: int, size: int, distance: int, device: torch.device) -> Tensor:
    """Positions of a box along one axis that leave a pixel at least ``distance`` away from it."""
    place = torch.arange(positions, device=device)
    # the box takes place..place + size - 1 of positions + size - 1 pixels
    return torch.maximum(place, positions - 1 - place) > distance


class PatchPair(NamedTuple):
    """Boolean masks ``(N, 1, H, W)``, N = 1 for the whole batch or B.

    Args:
        i: Where gradients are compared.
        j: What is replaced by the donor's content.
    """

    i: Tensor
    j: Tensor


class AbstractPatches(ABC):
    """A rule that draws where gradients are compared (I) and what is replaced (J)."""

    @abstractmethod
    def draw(self, x: Tensor, donated: Tensor, generator: torch.Generator) -> PatchPair:
        """Draw one pair for the batch, or one per sample.

        Args:
            x: Samples ``(B, C, H, W)``.
            donated: The donor of every sample ``(B, C, H, W)``.
            generator: CPU generator; the draw is a function of its state and, for content rules, of the images.
        """


def _checked_size(size: int, name: str = "size") -> int:
    if size < 1:
        raise ValueError(f"{name} must be at least 1 pixel, got {size}")
    return size


def _checked_range(distance: int | tuple[int, int | None], name: str, least: int = 0) -> tuple[int, int | None]:
    low, high = (distance, distance) if isinstance(distance, int) else distance
    if low < least or (high is not None and high < low):
        raise ValueError(f"{name} must be rising and at least {least} pixels, got {distance}")
    return low, high


def _draw_uniform(
    x: Tensor, size: Tensor, distance: Tensor, generator: torch.Generator, adjacent: bool = False
) -> PatchPair:
    height, width = x.shape[-2:]
    i, j = uniform_pair(size, distance, height, width, adjacent, generator)
    mask_i, mask_j = (box_mask((*corner, size, size), height, width, x.device) for corner in (i, j))
    return PatchPair(mask_i, mask_j)


@final
class GivenPatches(AbstractPatches):
    """I and J are two different ones of the given boxes, by the generator (a fair coin for two boxes).

    Source: "Implicit Regularization in Hierarchical Tensor Factorization and Deep Convolutional Neural Networks"
    (Razin, Maman, Cohen, 2022), the IsSameClass experiment: the boxes are the two images.

    Args:
        boxes: Two or more disjoint boxes ``(top, left, height, width)`` in pixels; None: :meth:`bind` gives them
            later (the classification task binds the boxes of its data).

    Raises:
        ValueError: Fewer than two boxes, boxes that overlap or leave the image, or a draw without boxes.

    >>> pair = GivenPatches([(0, 0, 2, 2), (0, 6, 2, 2)]).draw(torch.zeros(4, 1, 2, 8), torch.zeros(4, 1, 2, 8),
    ...                                                       torch.Generator().manual_seed(0))
    >>> (pair.i | pair.j)[0, 0, 0].tolist()
    [True, True, False, False, False, False, True, True]
    """

    def __init__(self, boxes: Sequence[Box] | None = None) -> None:
        self.given = boxes is not None
        self.boxes = None if boxes is None else checked_boxes(boxes)

    def bind(self, boxes: Sequence[Box]) -> None:
        """Take the boxes of the data; boxes given to the constructor stay."""
        if not self.given:
            self.boxes = checked_boxes(boxes)

    def draw(self, x: Tensor, donated: Tensor, generator: torch.Generator) -> PatchPair:
        """Two of the boxes, for the whole batch."""
        if self.boxes is None:
            raise ValueError("GivenPatches has no boxes: pass boxes=[...], or call bind(boxes) before the first draw")
        height, width = x.shape[-2:]
        check_boxes(self.boxes, height, width)
        i, j = torch.randperm(len(self.boxes), generator=generator)[:2].tolist()
        return PatchPair(*(box_mask(self.boxes[k], height, width, x.device) for k in (i, j)))


@final
class UniformPatches(AbstractPatches):
    """I uniform over the positions of a square box, J uniform over those at least ``distance`` away from I.

    Positions of I that leave no room for J are left out. Source: "Implicit Regularization in Hierarchical Tensor
    Factorization and Deep Convolutional Neural Networks" (Razin, Maman, Cohen, 2022), the Pathfinder experiment
    (size 2, distance 0: disjoint, one pair per batch).

    Args:
        size: Side of the boxes, in pixels.
        distance: Least gap between I and J, in pixels; 0 is disjoint.
        per_sample: A pair for every sample instead of one for the batch.

    Raises:
        ValueError: Sizes or distances that are negative or do not fit the image.
    """

    def __init__(self, size: int = 2, distance: int = 0, per_sample: bool = False) -> None:
        self.size, self.per_sample = _checked_size(size), per_sample
        self.distance = _checked_range(distance, "distance")[0]

    def draw(self, x: Tensor, donated: Tensor, generator: torch.Generator) -> PatchPair:
        """One pair, or one per sample."""
        check_fit(self.size, self.distance, *x.shape[-2:])
        size = torch.full((len(x) if self.per_sample else 1,), self.size)
        return _draw_uniform(x, size, torch.full_like(size, self.distance), generator)


@final
class AdjacentPatches(AbstractPatches):
    """I uniform over the positions of a square box, J uniform over those that touch I (side or corner).

    Args:
        size: Side of the boxes, in pixels.
        per_sample: A pair for every sample instead of one for the batch.

    Raises:
        ValueError: A size that is negative or does not fit the image twice.
    """

    def __init__(self, size: int = 2, per_sample: bool = False) -> None:
        self.size, self.per_sample = _checked_size(size), per_sample

    def draw(self, x: Tensor, donated: Tensor, generator: torch.Generator) -> PatchPair:
        """One pair, or one per sample."""
        check_fit(self.size, 0, *x.shape[-2:])
        size = torch.full((len(x) if self.per_sample else 1,), self.size)
        return _draw_uniform(x, size, torch.zeros_like(size), generator, adjacent=True)


@final
class RandomPatches(AbstractPatches):
    """As :class:`UniformPatches`, with the size, and then the least distance, drawn uniformly as well.

    Args:
        sizes: Smallest and largest side of the boxes, in pixels.
        distances: Smallest and largest least gap between I and J, in pixels; None is the largest that fits the
            image with the drawn size.
        per_sample: A pair for every sample instead of one for the batch.

    Raises:
        ValueError: Ranges that fall, are negative or do not fit the image.
    """

    def __init__(
        self,
        sizes: tuple[int, int] = (2, 14),
        distances: tuple[int, int | None] = (0, None),
        per_sample: bool = False,
    ) -> None:
        self.sizes, self.per_sample = _checked_range(sizes, "sizes", least=1), per_sample
        self.distances = _checked_range(distances, "distances")

    def draw(self, x: Tensor, donated: Tensor, generator: torch.Generator) -> PatchPair:
        """One pair, or one per sample."""
        height, width = x.shape[-2:]
        smallest, largest = self.sizes
        assert largest is not None
        low, high = self.distances
        check_fit(largest, low if high is None else high, height, width)
        number = len(x) if self.per_sample else 1
        size = uniform_integers(smallest, largest, number, generator)
        fitting = max(height, width) - 2 * size
        distance = uniform_integers(low, fitting if high is None else high, number, generator)
        return _draw_uniform(x, size, distance, generator)


@final
class ContentPatches(AbstractPatches):
    """Boxes where the donor's content differs, per sample: J, then I at least ``distance`` away from it.

    Each in proportion to the squared difference between sample and donor, summed over the box; uniform for a
    sample that differs nowhere. Positions of J that leave no room for I are left out.

    Args:
        size: Side of the boxes, in pixels.
        distance: Least gap between I and J, in pixels; 0 is disjoint.

    Raises:
        ValueError: Sizes or distances that are negative or do not fit the image.
    """

    def __init__(self, size: int = 2, distance: int = 0) -> None:
        self.size, self.distance = _checked_size(size), _checked_range(distance, "distance")[0]

    def draw(self, x: Tensor, donated: Tensor, generator: torch.Generator) -> PatchPair:
        """One pair per sample."""
        height, width = x.shape[-2:]
        check_fit(self.size, self.distance, height, width)
        content = box_content(x, donated, self.size)
        reach = self.size + self.distance
        rows, columns = (leaves_room(n, reach, x.device) for n in content.shape[1:])
        top, left = draw_content(content, rows.unsqueeze(1) | columns, generator)
        row, column = (torch.arange(n, device=x.device) for n in content.shape[1:])
        far_rows = (row - top.unsqueeze(1)).abs() >= reach
        far_columns = (column - left.unsqueeze(1)).abs() >= reach
        i = draw_content(content, far_rows.unsqueeze(2) | far_columns.unsqueeze(1), generator)
        masks = (box_mask((*corner, self.size, self.size), height, width, x.device) for corner in (i, (top, left)))
        return PatchPair(*masks)


@final
class FarField(AbstractPatches):
    """J drawn as in :class:`ContentPatches`, I every pixel at least a distance away from J: no knowledge needed.

    The distance is drawn once per batch, J per sample. Positions of J that leave no pixel for I are left out.

    Args:
        size: Side of J, in pixels; about that of an object.
        distance: Least gap between J and a pixel of I, in pixels: a number, or a range to draw it from, in which
            None stands for the largest at which the far side still has room for a box as wide as J, which is
            ``max(H, W) - 2 size``.

    Raises:
        ValueError: Sizes or distances that are negative or do not fit the image.
    """

    def __init__(self, size: int = 14, distance: int | tuple[int, int | None] = (0, None)) -> None:
        self.size, self.distance = _checked_size(size), _checked_range(distance, "distance")

    def draw(self, x: Tensor, donated: Tensor, generator: torch.Generator) -> PatchPair:
        """One pair per sample."""
        height, width = x.shape[-2:]
        if self.size > min(height, width) or self.size >= max(height, width):
            raise ValueError(
                f"size {self.size} does not fit: J must leave pixels for I in an image of {height} x {width} pixels, "
                f"so it is at most {min(height, width, max(height, width) - 1)}"
            )
        most = max(height, width) - self.size - 1
        low, high = self.distance
        high = max(low, max(height, width) - 2 * self.size) if high is None else high
        if high > most:
            raise ValueError(
                f"distance {high} does not fit: with a J of {self.size} x {self.size} in an image of {height} x "
                f"{width} pixels it is at most {most}"
            )
        # an integer on the CPU: nothing waits for the device
        distance = int(uniform_integers(low, high, 1, generator))
        content = box_content(x, donated, self.size)
        # the farthest pixel is a box of one pixel: its gap is known from where J ends
        rows, columns = (leaves_room_for_pixel(n, self.size, distance, x.device) for n in content.shape[1:])
        top, left = draw_content(content, rows.unsqueeze(1) | columns, generator)
        near = box_mask(
            (top - distance, left - distance, self.size + 2 * distance, self.size + 2 * distance),
            height,
            width,
            x.device,
        )
        return PatchPair(~near, box_mask((top, left, self.size, self.size), height, width, x.device))
