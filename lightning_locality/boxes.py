"""Square boxes in an image: their masks, what fits, and where they are drawn.

Legend: B batch, H height, W width, N drawn boxes (1 or B). The gap of two boxes is the number of pixels between
them along the axis on which they are farther apart; boxes with a gap of 0 touch, also at a corner.
"""

from __future__ import annotations

__all__ = [
    "Box",
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

from collections.abc import Sequence
from itertools import combinations

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
