"""The square patches that tile an image, and their distances."""

from __future__ import annotations

__all__ = ["PatchGrid"]

from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor

_MOST = 64  # patches that the default side gives at most


@final
@dataclass(frozen=True)
class PatchGrid:
    """Square patches that tile an image, numbered row by row.

    Args:
        height: Of the images, in pixels.
        width: Of the images, in pixels.
        patch: Side of a patch, in pixels; divides height and width.

    Raises:
        ValueError: A side that does not divide both, or that leaves fewer than two patches.

    Example:
        >>> grid = PatchGrid(4, 6, patch=2)
        >>> grid.rows, grid.columns, grid.distances(torch.tensor([[0, 0, 0], [1, 2, 3]])).tolist()
        (2, 3, [1, 2, 1])
        >>> PatchGrid.of(8, 80).patch, PatchGrid.of(224, 224).patch
        (4, 32)
    """

    height: int
    width: int
    patch: int

    def __post_init__(self) -> None:
        if self.patch < 1 or self.height % self.patch or self.width % self.patch or len(self) < 2:
            sides = ", ".join(str(side) for side in _sides(self.height, self.width)) or "none; crop or resize them"
            raise ValueError(
                f"patch must divide images of {self.height} x {self.width} pixels into two patches or more, got "
                f"{self.patch}; possible: {sides}"
            )

    @classmethod
    def of(cls, height: int, width: int, patch: int | None = None) -> Self:
        """The grid with a given side of the patches, or with a default one.

        Args:
            height: Of the images, in pixels.
            width: Of the images, in pixels.
            patch: Side of a patch, in pixels. None: of the sides that give 2 to 64 patches the one nearest to a
                seventh of the images' shorter side (ours), the smaller of two as near.

        Raises:
            ValueError: No such side.
        """
        if patch is None:
            sides = [side for side in _sides(height, width) if height * width <= _MOST * side**2]
            if not sides:
                raise ValueError(
                    f"images of {height} x {width} pixels cannot be divided into 2 to {_MOST} square patches: crop or "
                    "resize them, or give patch= for more patches"
                )
            patch = min(sides, key=lambda side: (abs(side - min(height, width) / 7), side))
        return cls(height, width, patch)

    @property
    def rows(self) -> int:
        """Patches from top to bottom."""
        return self.height // self.patch

    @property
    def columns(self) -> int:
        """Patches from left to right."""
        return self.width // self.patch

    def __len__(self) -> int:
        return self.rows * self.columns

    def pairs(self) -> Tensor:
        """All pairs of different patches ``(2, P)``, the first number below the second, int64."""
        return torch.triu_indices(len(self), len(self), 1)

    def distances(self, pairs: Tensor) -> Tensor:
        """Chebyshev distances ``(P,)`` of the positions of pairs ``(2, P)``, in patches."""
        across = (pairs // self.columns).diff(dim=0).abs()
        along = (pairs % self.columns).diff(dim=0).abs()
        return torch.maximum(across, along)[0]

    def labels(self) -> Tensor:
        """Which patch a pixel is in ``(H, W)``, int64."""
        numbers = torch.arange(len(self)).view(self.rows, self.columns)
        return numbers.repeat_interleave(self.patch, 0).repeat_interleave(self.patch, 1)

    def sums(self, values: Tensor) -> Tensor:
        """Sums ``(B, m)`` of values ``(B, C, H, W)`` over channels and pixels of every patch."""
        tiles = values.reshape(*values.shape[:2], self.rows, self.patch, self.columns, self.patch)
        return tiles.sum((1, 3, 5)).flatten(1)


def _sides(height: int, width: int) -> list[int]:
    """Of patches that tile an image, two or more."""
    return [s for s in range(1, min(height, width) + 1) if height % s == width % s == 0 and height * width > s * s]
