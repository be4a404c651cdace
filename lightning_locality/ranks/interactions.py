"""How strongly a network makes patches interact, by their distance."""

from __future__ import annotations

__all__ = ["InteractionProfile"]

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Self, final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@final
@dataclass(frozen=True, eq=False)
class InteractionProfile:
    """Strength of interaction of image patches against their distance, made by ``interaction_profile``.

    All tensors are float64 on the CPU unless said otherwise; D is the number of distances, m that of patches. What
    is not known is not a number: the shares, radii and mean distance of a network that is additive over the patches,
    bands without bootstraps, the input-gradient change by the exact method.

    Args:
        distance: Chebyshev distance of the positions of two patches, in pixels ``(D,)``.
        strength: Mean normalised interaction of the pairs at a distance ``(D,)``, 0 none. By the exact method at most
            1, up to sampling; the linear one may go beyond where the network is far from affine in a patch.
        low: Lower end of its 95 % band over samples ``(D,)``.
        high: Upper end ``(D,)``.
        share: Share of all interaction that is at a distance ``(D,)``.
        cumulative: Share up to a distance ``(D,)``.
        uniform: What ``cumulative`` would be were all pairs to interact equally ``(D,)``.
        gradient_change: Mean change of direction of a patch's input gradient ``(D,)``: 0 none, 1 orthogonal.
        pairs: Number of pairs at a distance, int64 ``(D,)``.
        mean_distance: Of the interaction, in pixels.
        mean_distance_low: Lower end of its 95 % band over samples.
        mean_distance_high: Upper end.
        r50: Least of the distances up to which half of the interaction lies, in pixels; nothing is interpolated.
        r90: Likewise for nine tenths.
        uniform_mean_distance: Mean distance were all pairs to interact equally, in pixels.
        patch: Side of a patch, in pixels.
        grid: Rows and columns of patches.
        method: How it was measured.
        samples: Number of images, each with a donor.
        matrix: Interaction of patches A and B ``(m, m)``, patches row by row; not a number where the pair was left
            out. On the diagonal a patch's total effect.

    Example:
        >>> from lightning_locality.ranks.profile import interaction_profile
        >>> product = lambda x: x[:, 0, 0, 0] * x[:, 0, 0, 2]
        >>> images = torch.randn(8, 1, 1, 3, generator=torch.Generator().manual_seed(0))
        >>> profile = interaction_profile(product, images, patch=1)
        >>> profile.share.tolist(), profile.mean_distance, profile.r50
        ([0.0, 1.0], 2.0, 2.0)
    """

    distance: Tensor
    strength: Tensor
    low: Tensor
    high: Tensor
    share: Tensor
    cumulative: Tensor
    uniform: Tensor
    gradient_change: Tensor
    pairs: Tensor
    mean_distance: float
    mean_distance_low: float
    mean_distance_high: float
    r50: float
    r90: float
    uniform_mean_distance: float
    patch: int
    grid: tuple[int, int]
    method: Literal["linear", "exact"]
    samples: int
    matrix: Tensor

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw strength and its band against distance.

        Args:
            axes: Where; None: new ones, of a figure of their own: ``axes.figure``, which a notebook shows and
                ``axes.figure.savefig(path)`` writes.

        Returns:
            The axes.
        """
        from lightning_locality.rank_figures import draw_profile

        if axes is None:
            from matplotlib.figure import Figure

            axes = Figure(layout="constrained").subplots()
        draw_profile(axes, self)
        return axes

    def to_dict(self) -> dict[str, Any]:
        """All values as lists and numbers that JSON knows, with None for what is not a number."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The profile that :meth:`to_dict` was called on, to the last bit.

        Args:
            values: What :meth:`to_dict` gave, also by way of JSON.

        Raises:
            ValueError: Names that are missing or not known.
        """
        known = {field.name: str(field.type) for field in fields(cls)}
        if set(values) != set(known):
            raise ValueError(
                f"values are not of an InteractionProfile: missing {sorted(set(known) - set(values))}, unknown "
                f"{sorted(set(values) - set(known))}; pass what to_dict() gave"
            )
        return cls(**{name: _restored(values[name], kind, name == "pairs") for name, kind in known.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(value: Any) -> Any:
    if isinstance(value, list):
        return [_numbers(one) for one in value]
    return math.nan if value is None else value


def _restored(value: Any, kind: str, whole: bool) -> Any:
    if kind == "Tensor":
        return torch.tensor(_numbers(value), dtype=torch.int64 if whole else torch.float64)
    if kind == "float":
        return _numbers(value)
    return tuple(value) if kind.startswith("tuple") else value
