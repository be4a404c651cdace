"""Boolean masks that cut images of ``height`` x ``width`` pixels into two blocks, or into many.

All raise a ValueError if the image has too few pixels for that cut.

Example:
    >>> for mask in (halves(2, 4), checkerboard(2, 4, size=1), blocks(2, 4, 1, 4)[1], quad_tree(2, 4, levels=1)["1/3"]):
    ...     print(mask.int().tolist())
    [[1, 1, 0, 0], [1, 1, 0, 0]]
    [[1, 0, 1, 0], [0, 1, 0, 1]]
    [[0, 1, 0, 0], [0, 1, 0, 0]]
    [[0, 0, 0, 0], [0, 0, 1, 1]]
"""

from __future__ import annotations

__all__ = ["blocks", "checkerboard", "halves", "quad_tree", "standard_cuts"]

import torch
from torch import Tensor

from lightning_locality.arguments import checked
from lightning_locality.ranks.conversion import as_tensor

MAX_PIXELS = 2**28


@checked
def halves(height: int, width: int, axis: int = 1) -> Tensor:
    """The left half of an image, or the top one along axis 0, as a mask ``(H, W)`` that is True in block I.

    For an odd number of rows or columns it is the smaller one.
    """
    if axis not in (0, 1):
        raise ValueError(f"axis must be 0 (top and bottom) or 1 (left and right), got {axis}")
    _check_size(height, width)
    size = (height, width)[axis]
    if size < 2:
        raise ValueError(f"axis {axis} has {size} pixel in an image of {height} x {width}: halve the other axis")
    first = torch.arange(size) < size // 2
    return (first if axis == 1 else first[:, None]).expand(height, width).clone()


@checked
def checkerboard(height: int, width: int, size: int) -> Tensor:
    """Squares of ``size`` pixels and alternating colour as a mask ``(H, W)``, True in block I with the top left one.

    Those at the right and the lower edge may be cut off.
    """
    _check_size(height, width)
    if not 1 <= size < max(height, width):
        raise ValueError(f"size must be 1 to {max(height, width) - 1} pixels in {height} x {width}, got {size}")
    rows, columns = torch.arange(height) // size, torch.arange(width) // size
    return (rows[:, None] + columns) % 2 == 0


@checked
def blocks(height: int, width: int, rows: int, columns: int) -> Tensor:
    """A grid of P = ``rows`` x ``columns`` rectangles, row by row, as masks ``(P, H, W)``.

    They are as equal as the pixels allow; every pixel is True in one of them.
    """
    _check_size(height, width)
    for name, number, size in (("rows", rows, height), ("columns", columns, width)):
        if not 1 <= number <= size:
            raise ValueError(f"{name} must be 1 to {size} in an image of {height} x {width} pixels, got {number}")
    row, column = torch.arange(height) * rows // height, torch.arange(width) * columns // width
    return (row[:, None] * columns + column) == torch.arange(rows * columns)[:, None, None]


@checked
def quad_tree(height: int, width: int, levels: int) -> dict[str, Tensor]:
    """The parts of an image cut into quarters ``levels`` times, each against the rest of the image.

    Level l has 4^l of them, as masks ``(H, W)`` by name: ``"1/0"`` to ``"1/3"`` are the quadrants row by row, ``"2/0"``
    to ``"2/15"`` theirs, row by row over the whole image, and so on.
    """
    _check_size(height, width)
    if levels < 1 or 2**levels > min(height, width):
        most = min(height, width).bit_length() - 1
        raise ValueError(f"levels must be 1 to {most} in an image of {height} x {width} pixels, got {levels}")
    parts = {level: blocks(height, width, 2**level, 2**level) for level in range(1, levels + 1)}
    return {f"{level}/{k}": part for level, cut in parts.items() for k, part in enumerate(cut)}


@checked
def standard_cuts(height: int, width: int) -> dict[str, Tensor]:
    """Cuts from coarse to fine, as masks ``(H, W)`` by name, for a plot of what crosses them against their scale.

    They are ``"left"`` against right and ``"top"`` against bottom, ``"quadrants"`` (the diagonal ones against the
    others), and ``"checkerboard N"``, N pixels wide: powers of two up to a quarter of the longer side and up to the
    shorter side. Those for which the image has too few pixels are left out.

    Example:
        >>> list(standard_cuts(16, 16))
        ['left', 'top', 'quadrants', 'checkerboard 4', 'checkerboard 2', 'checkerboard 1']
    """
    if height == width == 1:
        raise ValueError("height and width must be more than one pixel, got 1 x 1: nothing can be cut")
    cuts: dict[str, Tensor] = {}
    if width > 1:
        cuts["left"] = halves(height, width, axis=1)
    if height > 1:
        cuts["top"] = halves(height, width, axis=0)
    if min(height, width) > 1:
        cuts["quadrants"] = cuts["left"] == cuts["top"]
    size = 1 << (max(1, min(max(height, width) // 4, min(height, width))).bit_length() - 1)
    while size:
        board = checkerboard(height, width, size)
        # all of these cut a row of two pixels alike
        if not any(torch.equal(board, cut) or torch.equal(board, ~cut) for cut in cuts.values()):
            cuts[f"checkerboard {size}"] = board
        size //= 2
    return cuts


def checked_mask(mask: Tensor, images: Tensor, name: str = "mask") -> Tensor:
    """Return a mask ``(H, W)`` on the device of images ``(B, C, H, W)``, or raise a ValueError if they do not fit."""
    mask = as_tensor(mask, name)
    size, got = tuple(images.shape[2:]), tuple(images.shape)
    if images.ndim != 4:
        raise ValueError(f"images must be (B, C, H, W), whose blocks of pixels can be exchanged, got {got}")
    if mask.dtype != torch.bool:
        raise ValueError(f"{name} must be boolean, True in block I, got {mask.dtype}: compare it, as in {name} > 0")
    if tuple(mask.shape) != size:
        raise ValueError(
            f"{name} must have the images' height and width, {size}, got {tuple(mask.shape)}; it is one for all "
            "channels and all images"
        )
    covered = int(mask.sum())
    if covered in (0, mask.numel()):
        raise ValueError(
            f"{name} must leave pixels on both sides of the cut, got {covered} of {mask.numel()} pixels in block I"
        )
    return mask.to(images.device)


def _check_size(height: int, width: int) -> None:
    if min(height, width) < 1:
        raise ValueError(f"height and width must be at least one pixel, got {height} x {width}")
    if height * width > MAX_PIXELS:
        raise ValueError(f"height and width must give at most {MAX_PIXELS:,} pixels, got {height} x {width}")
