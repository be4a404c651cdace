"""What part of a network's output depends on two blocks of pixels together."""

from __future__ import annotations

__all__ = ["CutShare", "cut_share"]

import math
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from lightning_locality.ranks.composites import Composites, Network, composites
from lightning_locality.ranks.evaluation import Evaluation
from lightning_locality.ranks.masks import checked_mask
from lightning_locality.ranks.mixing import paired
from lightning_locality.ranks.moments import VarianceComponents, pair_moments, variance_components
from lightning_locality.ranks.quantities import ROUNDING

# noise is looked at on a corner of the matrix: a sixteenth of the work at the default size
CORNER = 16


@final
@dataclass(frozen=True)
class CutShare:
    r"""The share of the output's variance that crosses a cut, and what belongs to it; ``float()`` is the share.

    Args:
        share: Crossing over all variance, between 0 and 1 but for the error of sampling.
        standard_error: Of the share, over the choice of images.
        crossing: Variance that neither block explains alone, summed over the outputs.
        inside: Variance due to block I alone.
        outside: Variance due to block J alone.
        participation_ratio: How many products of functions of either block the crossing part is made of: the
            unbiased estimate of :math:`(\sum_k \sigma_k^2)^2 / \sum_k \sigma_k^4`. NaN where the crossing part cannot
            be told from rounding, or where the images are too few for an estimate.
        spectrum: Singular values of the crossing part, over the root of K L, descending ``(R,)``, on the CPU; root mean
            squares over repetitions.
        noise: What of the spectrum may be rounding: values above it count.
        size: Images per block, K = L.
        repetitions: Number of matrices.
    """

    share: float
    standard_error: float
    crossing: float
    inside: float
    outside: float
    participation_ratio: float
    spectrum: Tensor = field(compare=False)
    noise: float
    size: int
    repetitions: int

    def __float__(self) -> float:
        return self.share

    @property
    def rank(self) -> int:
        """Number of values of the spectrum above the noise; a lower bound, at most ``size - 1`` for one output."""
        return int((self.spectrum > self.noise).sum())

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, the rank among them; NaN is None."""
        ratio = None if math.isnan(self.participation_ratio) else self.participation_ratio
        spectrum = self.spectrum.tolist()
        return {**vars(self), "participation_ratio": ratio, "spectrum": spectrum, "rank": self.rank}


def cut_share(
    model: Network,
    images: Tensor,
    mask: Tensor,
    *,
    size: int | None = None,
    repetitions: int = 1,
    seed: int = 0,
    evaluation: Evaluation | None = None,
) -> CutShare:
    r"""Share of the variance of a network's output that crosses a cut through the image.

    .. math:: S_{IJ} = \frac{v_{IJ}}{v_I + v_J + v_{IJ}}, \qquad
        f = f_0 + f_I(x_I) + f_J(x_J) + f_{IJ}(x_I, x_J)

    with v the variances of these parts, block I of one image beside block J of another: 0 if the network adds what it
    makes of either block, and no more than that. Interactions inside a block do not count. The variances are the
    unbiased ones of two crossed random factors, :func:`variance_components`, of a matrix of :func:`mixing_matrix`.

    The standard error is that of a jackknife over rows and over columns; with repetitions, the larger one of this and
    of their spread, over the root of as many of them as have images of their own (ours). A network whose outputs do
    not vary beyond rounding has a share of 0. Rounding is estimated from images moved by one unit in the last place.

    Args:
        model: Module, or function of networks in evaluation mode; takes ``(n, C, H, W)``, gives ``(n,)`` or
            ``(n, outputs)``; left as it was.
        images: ``(B, C, H, W)``, from the distribution on which the question is asked.
        mask: ``(H, W)``, True in block I.
        size: Images K for either block, at least 4; None: 64, or half of all images.
        repetitions: Matrices, of independently drawn images where there are enough; their variances are pooled.
        seed: Of the choice of images.
        evaluation: How the network is evaluated; None: the default. There are ``size ** 2`` forward passes for every
            repetition, and at most 256 more for the noise.

    Raises:
        ValueError: Fewer images than ``2 * size``, a size below 4, no repetitions, a mask that does not fit or covers
            all or nothing, a model that does not take the images, or outputs that are not finite.

    Example:
        >>> near = lambda x: x[:, 0, 0, 0] * x[:, 0, 0, 1] + x[:, 0, 0, 2] * x[:, 0, 0, 3]
        >>> images = torch.randn(100, 1, 1, 4, generator=torch.Generator().manual_seed(0))
        >>> round(float(cut_share(near, images, torch.tensor([[True, True, False, False]]))), 6)
        0.0
    """
    mask = checked_mask(mask, images)
    if size is None:
        size = min(len(images) // 2, 64)
    if size < 4 or 2 * size > len(images):
        raise ValueError(
            f"size must be 4 or more images per block, and 2 x size at most as many as there are, got size={size} and "
            f"{len(images)} images: give more images or a smaller size"
        )
    if repetitions < 1:
        raise ValueError(f"repetitions must be at least 1, got {repetitions}")
    chosen, own = _drawn(len(images), 2 * size, repetitions, seed)
    with composites(model, images[chosen.to(images.device)], (~mask).long(), evaluation) as network:
        matrices = [paired(network, size, size, start) for start in range(0, len(chosen), 2 * size)]
        noise, floor = _noise(network, matrices[0], seed)
    return _summary(matrices, noise, floor, own)


def _drawn(available: int, needed: int, repetitions: int, seed: int) -> tuple[Tensor, float]:
    """Image numbers, and how many repetitions that makes whose images are their own."""
    generator = torch.Generator().manual_seed(seed)
    if repetitions * needed <= available:
        return torch.randperm(available, generator=generator)[: repetitions * needed], repetitions
    draws = [torch.randperm(available, generator=generator)[:needed] for _ in range(repetitions)]
    return torch.cat(draws), available / needed


def _noise(network: Composites, matrix: Tensor, seed: int) -> tuple[float, float]:
    """What rounding may do to the singular values of the crossing part, and of the matrix less its mean."""
    rows = min(CORNER, len(matrix))
    moved = paired(network, rows, rows, nudge=seed, behind=len(matrix)) - matrix[:rows, :rows]
    scale = matrix.square().sum(2).mean().sqrt()
    # the outputs themselves are rounded, and so is the decomposition
    least = scale * max(2 * network.eps / len(matrix) ** 0.5, ROUNDING)
    floors = (3 * _spectrum(part)[0] for part in (_crossing(moved), moved - moved.mean((0, 1))))
    first, second = (float(torch.maximum(floor, least)) for floor in floors)
    return first, second


def _crossing(matrix: Tensor) -> Tensor:
    """The matrix less its mean and what rows and columns explain."""
    matrix = matrix - matrix.mean((0, 1))
    matrix = matrix - matrix.mean(0, keepdim=True)
    return matrix - matrix.mean(1, keepdim=True)


def _spectrum(matrix: Tensor) -> Tensor:
    rows, columns, _ = matrix.shape
    values: Tensor = torch.linalg.svdvals(matrix.reshape(rows, -1).mT)
    return torch.div(values, (rows * columns) ** 0.5)


def _summary(matrices: list[Tensor], noise: float, floor: float, own: float) -> CutShare:
    parts = [variance_components(matrix) for matrix in matrices]
    pooled = VarianceComponents(*(torch.stack(part).mean() for part in zip(*parts, strict=True)))
    spectrum = torch.stack([_spectrum(_crossing(matrix)) for matrix in matrices]).square().mean(0).sqrt()
    varies = any(_spectrum(matrix - matrix.mean((0, 1)))[0] > floor for matrix in matrices)
    ratio, share, error = math.nan, 0.0, 0.0
    if varies:
        share = float(pooled.share)
        variance = torch.stack([_jackknife(matrix) for matrix in matrices]).mean()
        if len(matrices) > 1:
            variance = torch.maximum(variance, torch.stack([part.share for part in parts]).var())
        error = float((variance / own).sqrt())
    if varies and spectrum[0] > noise:
        moments = [pair_moments(matrix) for matrix in matrices]
        s2sq, s4 = (float(sum(part)) for part in zip(*moments, strict=True))
        ratio = s2sq / s4 if s4 > 0 and s2sq > 0 else math.nan
    return CutShare(
        share=share,
        standard_error=error,
        crossing=float(pooled.crossing),
        inside=float(pooled.inside),
        outside=float(pooled.outside),
        participation_ratio=ratio,
        spectrum=spectrum.cpu(),
        noise=noise,
        size=len(matrices[0]),
        repetitions=len(matrices),
    )


def _jackknife(matrix: Tensor) -> Tensor:
    """Variance of the share from leaving out rows, and columns."""
    residual = _crossing(matrix)
    row = matrix.mean(1) - matrix.mean((0, 1))
    column = matrix.mean(0) - matrix.mean((0, 1))
    shares = (_without_each(residual, row, column), _without_each(residual.transpose(0, 1), column, row))
    return torch.stack([(len(share) - 1) ** 2 / len(share) * share.var() for share in shares]).sum()


def _without_each(residual: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """The share without row i, for all i, from the parts of the full matrix (K, L, C), (K, C) and (L, C).

    The parts stay what they are but for means that are not zero any more, which move to the next larger part.
    """
    rows, columns = residual.shape[:2]
    squares = residual.square().sum((1, 2))
    crossing = (squares.sum() - squares * rows / (rows - 1)) / ((rows - 2) * (columns - 1))
    own = row.square().sum(1)
    inside = (own.sum() - own * rows / (rows - 1)) / (rows - 2) - crossing / columns
    moved = torch.einsum("klc,lc->k", residual, column) / (rows - 1)
    outside = (column.square().sum() - 2 * moved + squares / (rows - 1) ** 2) / (columns - 1) - crossing / (rows - 1)
    total = inside + outside + crossing
    return torch.where(total == 0, 0.0, crossing / torch.where(total == 0, 1.0, total))
