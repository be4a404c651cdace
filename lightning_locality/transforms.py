"""Random transformations of training images."""

from __future__ import annotations

__all__ = ["RandomShift"]

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_locality.arguments import Checked


class RandomShift(Checked, nn.Module):
    r"""Shift every image by a random number of pixels, filling with zeros, and optionally mirror it at random.

    Image b becomes :math:`x'_b[i, j] = x_b[i + s_b, j + t_b]` with s and t uniform on the integers from -pixels to
    pixels, mirrored left to right with probability 1/2 if ``flip`` is set: the usual augmentation of small images
    (He, Zhang, Ren, Sun, 2016). Samples depend only on ``seed`` and the number of earlier calls, kept in the state
    dict, on every device and rank. In eval mode images pass unchanged. Boxes of a data module do not move along: take a
    patch rule that needs none.

    Args:
        pixels: Largest shift in pixels, or one for rows and one for columns.
        flip: Whether to mirror left to right as well.
        seed: Seed of all samples.

    Raises:
        ValueError: A shift or seed below 0.

    Example:
        >>> shift, x = RandomShift(pixels=(0, 1), seed=0), torch.tensor([[[[1.0, 2.0, 3.0]]]])
        >>> sorted({tuple(row.tolist()) for row in shift(x.repeat(50, 1, 1, 1))[:, 0, 0]})
        [(0.0, 1.0, 2.0), (1.0, 2.0, 3.0), (2.0, 3.0, 0.0)]
    """

    def __init__(self, pixels: int | tuple[int, int] = 4, flip: bool = False, seed: int = 0) -> None:
        super().__init__()
        rows, columns = (pixels, pixels) if isinstance(pixels, int) else pixels
        if min(rows, columns) < 0:
            raise ValueError(f"pixels must be 0 or more, got {pixels}")
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}")
        self.rows, self.columns, self.flip, self.seed = rows, columns, flip, seed
        self._calls = 0

    def get_extra_state(self) -> Tensor:
        """Number of calls so far."""
        return torch.tensor(self._calls, dtype=torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        """Continue after that number of calls."""
        self._calls = int(state)

    def forward(self, x: Tensor) -> Tensor:
        """Transformed images of the same shape ``(B, C, H, W)``."""
        if not self.training:
            return x
        word = np.random.SeedSequence((self.seed, self._calls)).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(word))
        self._calls += 1
        batch, _, height, width = x.shape
        down = torch.randint(2 * self.rows + 1, (batch, 1), generator=generator)
        right = torch.randint(2 * self.columns + 1, (batch, 1), generator=generator)
        mirrored = torch.rand((batch, 1), generator=generator) < (0.5 if self.flip else 0.0)
        place = torch.arange(width)
        place = right + torch.where(mirrored, place.flip(0), place)
        row, column = (n.to(x.device, non_blocking=True) for n in (down + torch.arange(height), place))
        padded = F.pad(x, (self.columns, self.columns, self.rows, self.rows))
        sample = torch.arange(batch, device=x.device)[:, None, None]
        # advanced indices on both sides of a slice put their dimensions first
        return padded[sample, :, row[:, :, None], column[:, None, :]].permute(0, 3, 1, 2)
