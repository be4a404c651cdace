"""Features rearranged so that data become less entangled under canonical partitions."""

from __future__ import annotations

__all__ = ["feature_correlations", "rearrange_features"]

import torch
from torch import Tensor

from lightning_locality.arguments import checked
from lightning_locality.datamodules.base import seeded_generator

# local minima: of large graphs all starts found the same cut, of small ones they do not, and cost little
_STARTS, _FEW = 10, 100


@checked
def feature_correlations(samples: Tensor) -> Tensor:
    r"""Absolute Pearson correlations of all pairs of features, ``(N, N)`` in float64, with zeros on the diagonal.

    Their sum over the pairs that a partition separates is its surrogate entanglement (Alexander et al., see
    :func:`rearrange_features`). A constant feature has correlation 0 with all others; of pixels with several channels,
    the mean over the channels is taken (ours).

    Args:
        samples: Features ``(M, N)`` or images ``(M, C, H, W)``, N = H W, floating, in any unit; at least two samples.

    Raises:
        ValueError: Another shape, fewer than two samples, integers, or values that are not finite.

    Example:
        >>> feature_correlations(torch.tensor([[0.0, 5.0, 1.0], [1.0, 3.0, 1.0], [2.0, 1.0, 1.0]])).round().tolist()
        [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    if not isinstance(samples, Tensor):
        raise TypeError(f"samples must be a tensor, got {type(samples).__name__}: pass torch.as_tensor(...)")
    if samples.ndim not in (2, 4) or len(samples) < 2:
        raise ValueError(
            f"samples must be features (M, N) or images (M, C, H, W), at least two samples, got {tuple(samples.shape)}"
        )
    if not samples.is_floating_point():
        raise ValueError(f"samples must be floating, got {samples.dtype}: convert them by samples.float()")
    if bad := int((~samples.isfinite()).sum()):
        raise ValueError(f"samples must be finite, and {bad} of {samples.numel()} values are not")
    channels = (samples.unsqueeze(1) if samples.ndim == 2 else samples.flatten(2)).detach().unbind(1)
    total = torch.zeros(2 * channels[0].shape[1:], dtype=torch.float64, device=samples.device)
    for values in channels:
        # from the first sample: of a constant feature exactly zeros are left, whatever the mean rounds to
        centred = (values - values[:1]).double()
        centred -= centred.mean(0)
        unit = torch.nn.functional.normalize(centred, dim=0)
        total += (unit.mT @ unit).abs()
    return (total / len(channels)).fill_diagonal_(0)


@checked
def rearrange_features(samples: Tensor, grid: tuple[int, int] | None = None, *, seed: int = 0) -> Tensor:
    r"""Order of features in which correlated ones come to lie together, as a locally connected network needs.

    "What Makes Data Suitable for a Locally Connected Neural Network? A Necessary and Sufficient Condition Based on
    Quantum Entanglement" (Alexander, De La Vega, Razin, Cohen, 2023): such a network can fit data if and only if they
    are little entangled under the canonical partitions of their features, those of a tree of halves (of images,
    quadrants). Instead of the entanglement, the surrogate

    .. math:: \sum_{n \in A,\, m \notin A} |\mathrm{corr}(x_n, x_m)|

    is minimised from the coarsest partition to the finest: the complete graph of the features, weighted by absolute
    correlations, is bisected by a minimum balanced cut, either half in the same way, and so on. Theirs are surrogate,
    graph and recursion. Ours are exact halves at every level, so that the order fits the grid, and the partitioner:
    networkx's Kernighan-Lin bisection from random starts, the best of ten up to a hundred features and one above, where
    the paper has METIS (and for images one cut into four parts). Which half comes first is left to chance, as in the
    paper: what was near lies in the same block again, but blocks lie in any order.

    Time and memory are O(N^2): about ten seconds for the 784 pixels of MNIST on one core of an AMD EPYC.

    Args:
        samples: Features ``(M, N)`` or images ``(M, C, H, W)``, N = H W, floating, in any unit; training samples only.
        grid: Height and width of the image that the features are laid on; ``(1, N)``, a sequence, by default, and of
            images their own.
        seed: Seed of the starts. The same seed and samples give the same order.

    Returns:
        The number of the old feature at every new place, ``(N,)``, int64, of a grid row by row: ``samples[:, order]``,
        and of images ``samples.flatten(2)[..., order].reshape(samples.shape)``, are rearranged.

    Raises:
        ValueError: Samples as in :func:`feature_correlations`, or a grid that does not hold N features.

    Example:
        >>> signals = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
        >>> order = rearrange_features(signals[:, [0, 1, 1, 0, 1, 0, 0, 1]])
        >>> sorted([sorted(order[:4].tolist()), sorted(order[4:].tolist())])
        [[0, 3, 5, 6], [1, 2, 4, 7]]
    """
    weights = feature_correlations(samples).cpu()
    height, width = grid or ((1, len(weights)) if samples.ndim == 2 else samples.shape[2:])
    if min(height, width) < 1 or height * width != len(weights):
        raise ValueError(f"grid must hold the {len(weights)} features of samples, got {height} x {width}")
    generator = seeded_generator(seed, "rearrangement")

    def arrange(features: Tensor, height: int, width: int, axis: int) -> Tensor:
        """Lay the features on ``height`` x ``width`` places, after a cut across ``axis``, if it has two places."""
        if len(features) == 1:
            return features.reshape(1, 1)
        axis = axis if (height, width)[axis] > 1 else 1 - axis
        # of an odd side the larger half comes last, as in pixel_tree
        sides = ((height, width)[axis] // 2, -(-(height, width)[axis] // 2))
        shapes = [(side, width) if axis == 0 else (height, side) for side in sides]
        halves = _bisect(weights, features, shapes[0][0] * shapes[0][1], generator)
        parts = [arrange(half, *shape, 1 - axis) for half, shape in zip(halves, shapes, strict=True)]
        return torch.cat(parts, axis)

    return arrange(torch.arange(len(weights)), height, width, 0).reshape(-1).to(samples.device)


def _bisect(weights: Tensor, features: Tensor, first: int, generator: torch.Generator) -> list[Tensor]:
    """Cut features ``(K,)`` into ``first`` and the others so that little weight is between the two."""
    import networkx as nx  # only where it is needed

    graph = nx.from_numpy_array(weights[features][:, features].numpy())
    found = list[tuple[float, list[Tensor]]]()
    for _ in range(_STARTS if len(features) <= _FEW else 1):
        order = torch.randperm(len(features), generator=generator).tolist()
        halves = nx.community.kernighan_lin_bisection(graph, (set(order[:first]), set(order[first:])))
        # sizes are kept, but not the order of the two
        parts = [features[sorted(half)] for half in sorted(halves, key=lambda half: len(half) != first)]
        found.append((float(weights[parts[0]][:, parts[1]].sum()), parts))
    return min(found, key=lambda cut: cut[0])[1]
