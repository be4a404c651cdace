"""Running values over batches, epochs and devices, as torchmetrics."""

from __future__ import annotations

__all__ = ["MeanSpectralQuantity", "PooledCutShare", "PooledParticipationRatio", "SpectralQuantity"]

from abc import ABC
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_locality.ranks.cuts import PairMoments, VarianceComponents, pair_moments, variance_components
from lightning_locality.ranks.spectra import (
    effective_rank,
    entanglement_entropy,
    participation_ratio,
    stable_rank,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SpectralQuantity = Literal["effective_rank", "participation_ratio", "stable_rank", "entanglement_entropy"]


class _AbstractRunning(Metric, ABC):
    """Sums in float64, added up over devices."""

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    plot_lower_bound = 0.0

    def _add_sums(self, *names: str) -> None:
        for name in names:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def plot(self, val: Any = None, ax: Axes | None = None) -> tuple[Any, Any]:
        """Draw values of :meth:`compute` or :meth:`forward` with matplotlib.

        Args:
            val: One value or several, one after another; None for the value so far.
            ax: Where to draw; None for a new figure.

        Returns:
            The figure and its axes.
        """
        return self._plot(val, ax)


@final
class MeanSpectralQuantity(_AbstractRunning):
    r"""Mean of a quantity of spectra, each spectrum counting once.

    .. math:: \frac{1}{n} \sum_{i=1}^n q(\sigma^{(i)})

    Args:
        quantity: Name of the function of :mod:`lightning_locality.ranks.spectra`.
        kwargs: What :class:`torchmetrics.Metric` takes.

    Raises:
        ValueError: An unknown quantity, or spectra with values that are not finite (the mean so far stays).

    Example:
        >>> metric = MeanSpectralQuantity("stable_rank")
        >>> metric.update(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        >>> metric.update(torch.tensor([[3.0, 0.0, 0.0]]))
        >>> round(metric.compute().item(), 6)
        1.333333
    """

    sum: Tensor
    count: Tensor

    def __init__(self, quantity: SpectralQuantity = "effective_rank", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        match quantity:
            case "effective_rank":
                self._function = effective_rank
            case "participation_ratio":
                self._function = participation_ratio
            case "stable_rank":
                self._function = stable_rank
            case "entanglement_entropy":
                self._function = entanglement_entropy
            case _:
                raise ValueError(
                    "quantity must be effective_rank, participation_ratio, stable_rank or entanglement_entropy, "
                    f"got {quantity!r}"
                )
        self.quantity = quantity
        self._add_sums("sum", "count")

    def update(self, spectra: Tensor) -> None:
        """Take spectra.

        Args:
            spectra: Singular values ``(..., R)``; R may differ from call to call.
        """
        if bad := int((~spectra.isfinite()).any(-1).sum()):
            raise ValueError(f"spectra has {bad} spectra with values that are not finite: leave them out")
        values = self._function(spectra.detach())
        self.sum = self.sum + values.sum()
        self.count = self.count + values.numel()

    def compute(self) -> Tensor:
        """Mean so far ``()``; NaN of nothing."""
        return self.sum / self.count


@final
class PooledParticipationRatio(_AbstractRunning):
    r"""Participation ratio of a function of two blocks from many small mixing matrices.

    .. math:: \operatorname{PR} = \overline{(\textstyle\sum_k \sigma_k^2)^2} \Big/ \,
        \overline{\textstyle\sum_k \sigma_k^4}

    Numerator and denominator are estimated without bias by :func:`~lightning_locality.ranks.cuts.pair_moments` and
    averaged before they are divided: a mean of ratios of small matrices is biased. Every matrix counts the same.

    Args:
        centred: Of that part of the function that crosses the cut.
        kwargs: What :class:`torchmetrics.Metric` takes.

    Raises:
        ValueError: A matrix that :func:`~lightning_locality.ranks.cuts.pair_moments` refuses (the value so far
            stays).

    Example:
        >>> metric = PooledParticipationRatio()
        >>> for seed in range(3):
        ...     metric.update(torch.randn(8, 1, generator=torch.Generator().manual_seed(seed)) * torch.arange(6))
        >>> round(metric.compute().item(), 6)  # one product
        1.0
    """

    plot_lower_bound = 1.0
    s2sq: Tensor
    s4: Tensor

    def __init__(self, centred: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.centred = centred
        self._add_sums("s2sq", "s4")

    def update(self, matrix: Tensor) -> None:
        """Take one mixing matrix.

        Args:
            matrix: ``(K, L)`` or ``(K, L, C)``, of samples that are independent of those of other matrices.
        """
        moments = pair_moments(matrix.detach(), self.centred)
        self.s2sq, self.s4 = self.s2sq + moments.s2sq, self.s4 + moments.s4

    def compute(self) -> Tensor:
        """Ratio so far ``()``; NaN where the samples are too few for a positive denominator."""
        return PairMoments(self.s2sq, self.s4).participation_ratio


@final
class PooledCutShare(_AbstractRunning):
    r"""Share of a function's variance that crosses the cut between two blocks, from many small mixing matrices.

    .. math:: S_{IJ} = \bar v_{IJ} / (\bar v_I + \bar v_J + \bar v_{IJ})

    The components are estimated without bias by :func:`~lightning_locality.ranks.cuts.variance_components` and
    averaged before they are divided. Every matrix counts the same.

    Args:
        kwargs: What :class:`torchmetrics.Metric` takes.

    Raises:
        ValueError: A matrix that :func:`~lightning_locality.ranks.cuts.variance_components` refuses (the value
            so far stays).

    Example:
        >>> metric = PooledCutShare()
        >>> metric.update(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))  # a sum of two functions: nothing crosses
        >>> metric.compute().item()
        0.0
    """

    inside: Tensor
    outside: Tensor
    crossing: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_sums("inside", "outside", "crossing")

    def update(self, matrix: Tensor) -> None:
        """Take one mixing matrix.

        Args:
            matrix: ``(K, L)`` or ``(K, L, C)``, of samples that are independent of those of other matrices.
        """
        inside, outside, crossing = variance_components(matrix.detach())
        self.inside, self.outside = self.inside + inside, self.outside + outside
        self.crossing = self.crossing + crossing

    def compute(self) -> Tensor:
        """Share so far ``()``; as an unbiased estimate it may fall a little below 0."""
        return VarianceComponents(self.inside, self.outside, self.crossing).share
