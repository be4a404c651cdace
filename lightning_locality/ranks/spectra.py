"""Singular values of the matricisations of a tensor at the nodes of a tree, and what they say about its ranks.

Example:
    >>> spectrum = torch.tensor([2.0, 1.0, 1e-20])
    >>> numerical_rank(spectrum).item(), epsilon_rank(spectrum, epsilon=0.5).item()
    (2, 1)
    >>> for measure in (effective_rank, entanglement_entropy, participation_ratio, stable_rank):
    ...     print(measure.__name__, round(measure(spectrum).item(), 3))
    effective_rank 1.89
    entanglement_entropy 0.5
    participation_ratio 1.471
    stable_rank 1.25
"""

from __future__ import annotations

__all__ = [
    "NodeSpectra",
    "effective_rank",
    "entanglement_entropy",
    "epsilon_rank",
    "numerical_rank",
    "participation_ratio",
    "stable_rank",
]

from collections.abc import Iterator, Mapping
from typing import final

import torch
from torch import Tensor

from lightning_locality.arguments import checked
from lightning_locality.ranks.conversion import as_tensor
from lightning_locality.tensors.mode_tree import Node, node_name

# rounding of a float64 decomposition, relative to the largest value (ours)
ROUNDING = 100 * torch.finfo(torch.float64).eps


@checked
def numerical_rank(spectrum: Tensor, rtol: float | Tensor = ROUNDING) -> Tensor:
    r"""Number of singular values above a fraction of the largest one; 0 for a spectrum of zeros.

    .. math:: \#\{k : \sigma_k > \text{rtol} \cdot \sigma_1\}

    Args:
        spectrum: Singular values ``(..., R)``, in any order; the result is ``(...)``, int64.
        rtol: The fraction: one number, or one per spectrum ``(...)``.

    Raises:
        ValueError: If a value is not finite, which an integer could not show.
    """
    values = _finite(spectrum).double()
    fraction = torch.as_tensor(rtol, dtype=torch.float64, device=values.device)
    return (values > fraction[..., None] * values.amax(-1, keepdim=True)).sum(-1)


@checked
def epsilon_rank(spectrum: Tensor, epsilon: float) -> Tensor:
    r"""Lowest rank of a matrix within a relative Frobenius distance.

    .. math:: \min \Bigl\{ r : \sum_{k > r} \sigma_k^2 \le \epsilon^2 \sum_k \sigma_k^2 \Bigr\}

    Args:
        spectrum: Singular values ``(..., R)``, in any order; the result is ``(...)``, int64.
        epsilon: The distance, relative to the norm.

    Raises:
        ValueError: If a value is not finite or the distance is negative.
    """
    if not epsilon >= 0:
        raise ValueError(f"epsilon must be at least 0, a distance relative to the norm, got {epsilon}")
    squares = _scaled(_finite(spectrum)).square().sort(-1).values
    # from the smallest up: small values would vanish when added to large ones
    discarded = squares.cumsum(-1) <= epsilon**2 * squares.sum(-1, keepdim=True)
    return squares.shape[-1] - discarded.sum(-1)


@checked
def effective_rank(spectrum: Tensor) -> Tensor:
    r"""Exponential of the entropy of normalised singular values ``(..., R)``: from 1 to R, or 0 for all zeros.

    .. math:: \operatorname{erank}(\sigma) = \exp \Bigl( -\sum_r p_r \ln p_r \Bigr), \qquad
        p_r = \sigma_r / \sum_{r'} \sigma_{r'}

    Source: "The effective rank: a measure of effective dimensionality" (Roy, Vetterli, 2007). Values below the
    rounding of a float64 decomposition, :math:`100 \cdot 2^{-52} \sigma_1`, do not count (ours).
    """
    values = _scaled(spectrum)
    shares, total = _shares(torch.where(values <= ROUNDING, 0.0, values))
    return torch.where(total == 0, 0.0, torch.special.entr(shares).sum(-1).exp())


@checked
def entanglement_entropy(spectrum: Tensor) -> Tensor:
    r"""Entropy of the normalised squares of singular values ``(..., R)``, in nats: from 0 to ln R.

    .. math:: S = -\sum_r q_r \ln q_r, \qquad q_r = \sigma_r^2 / \sum_{r'} \sigma_{r'}^2

    For a matricisation this is the quantum entanglement of its two groups of modes: "What Makes Data Suitable for a
    Locally Connected Neural Network?" (Alexander, De La Vega, Razin, Cohen, 2023).
    """
    shares, _ = _shares(_scaled(spectrum).square())
    entropy: Tensor = torch.special.entr(shares).sum(-1)
    return entropy


@checked
def participation_ratio(spectrum: Tensor) -> Tensor:
    r"""Exponential of the Rényi-2 entropy of normalised squares of ``(..., R)``: from 1 to R, or 0 for all zeros.

    .. math:: \operatorname{PR} = \Bigl( \sum_r \sigma_r^2 \Bigr)^2 \Big/ \sum_r \sigma_r^4
    """
    shares, total = _shares(_scaled(spectrum).square())
    return torch.where(total == 0, 0.0, 1 / torch.where(total == 0, 1.0, shares.square().sum(-1)))


@checked
def stable_rank(spectrum: Tensor) -> Tensor:
    r"""Squared Frobenius norm over squared spectral norm of ``(..., R)``: from 1 to R, or 0 for all zeros.

    .. math:: \sum_r \sigma_r^2 / \sigma_1^2
    """
    return _scaled(spectrum).square().sum(-1)


def _finite(spectrum: Tensor) -> Tensor:
    spectrum = as_tensor(spectrum, "spectrum")
    if bad := int((~spectrum.isfinite()).sum()):
        raise ValueError(f"spectrum has {bad} of {spectrum.numel()} values that are not finite: check its source")
    return spectrum


def _scaled(spectrum: Tensor) -> Tensor:
    """Convert to float64 and divide by the largest value, so that squares neither overflow nor all vanish."""
    values = as_tensor(spectrum, "spectrum").double()
    largest = values.amax(-1, keepdim=True)
    return values / torch.where(largest == 0, 1.0, largest)


def _shares(values: Tensor) -> tuple[Tensor, Tensor]:
    """Divide by the sum along the last dimension; return the sum as well."""
    total = values.sum(-1)
    return values / torch.where(total == 0, 1.0, total).unsqueeze(-1), total


def singular_values(matrices: Tensor) -> Tensor:
    """Descending ``(..., min(k, j))``; wide matrices are transposed, as some drivers take longer for them."""
    values: Tensor = torch.linalg.svdvals(matrices.mT if matrices.shape[-2] < matrices.shape[-1] else matrices)
    return values


@final
class NodeSpectra(Mapping[Node, Tensor]):
    r"""Mapping from nodes to the singular values of the matricisation there, descending, in float64.

    A node is a tuple of modes. The ranks at all nodes of a tree but the root are the hierarchical tensor rank
    ("Implicit Regularization in Hierarchical Tensor Factorization and Deep Convolutional Neural Networks", Razin,
    Maman, Cohen, 2022).

    Args:
        values: The singular values, divided by ``exp(log_scale)``.
        tolerance: Node -> relative size below which a singular value is indistinguishable from rounding.
        log_scale: Logarithm of the common divisor of all values: 0 unless a float64 cannot hold the tensor's norm.
        condition: Node -> condition number of the factored form, if the values come from one.

    Example:
        >>> spectra = NodeSpectra({(0,): torch.tensor([2.0, 1e-17])}, {(0,): 1e-13})
        >>> spectra.rank((0,)), spectra.rank((0,), rtol=1e-18), spectra.ranks()
        (1, 2, {(0,): 1})
    """

    def __init__(
        self,
        values: Mapping[Node, Tensor],
        tolerance: Mapping[Node, float],
        log_scale: float = 0.0,
        condition: Mapping[Node, float] | None = None,
    ) -> None:
        self._values, self.tolerance, self.log_scale = dict(values), dict(tolerance), log_scale
        self.condition = dict(condition) if condition is not None else None

    def __getitem__(self, node: Node) -> Tensor:
        return self._values[node]

    def __iter__(self) -> Iterator[Node]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        scale = f", log_scale {self.log_scale:.6g}" if self.log_scale else ""
        return f"<NodeSpectra of {len(self)} nodes{scale}>"

    @checked
    def rank(self, node: Node, rtol: float | None = None) -> int:
        """Number of singular values above ``rtol`` (None: the node's tolerance) times the largest."""
        return int(numerical_rank(self[node], self.tolerance[node] if rtol is None else rtol))

    @checked
    def ranks(self, rtol: float | None = None) -> dict[Node, int]:
        """Rank at every node, with ``rtol`` (None: the node's tolerance): the hierarchical tensor rank."""
        found: dict[Node, int] = {}
        for nodes, values in self._stacked():
            fraction = torch.tensor([self.tolerance[node] if rtol is None else rtol for node in nodes]).to(values)
            found |= dict(zip(nodes, numerical_rank(values, fraction).tolist(), strict=True))
        return {node: found[node] for node in self}

    def table(self) -> list[dict[str, str | float]]:
        """One row per node: its name, rank, tolerance, effective rank, entropy and so on, and largest value.

        ``entanglement_entropy`` is in nats; ``largest`` is divided by ``exp(log_scale)``.
        """
        ranks, rows = self.ranks(), dict[Node, dict[str, str | float]]()
        measures = (effective_rank, participation_ratio, stable_rank, entanglement_entropy)
        for nodes, values in self._stacked():
            columns = {function.__name__: function(values).tolist() for function in measures}
            columns["largest"] = values.amax(-1).tolist()
            for node, *numbers in zip(nodes, *columns.values(), strict=True):
                rows[node] = {"node": node_name(node), "rank": ranks[node], "tolerance": self.tolerance[node]}
                rows[node] |= dict(zip(columns, numbers, strict=True))
        return [rows[node] for node in self]

    def _stacked(self) -> Iterator[tuple[list[Node], Tensor]]:
        """Nodes with equally many singular values, and these stacked: one operation for thousands of nodes."""
        by_length: dict[int, list[Node]] = {}
        for node, values in self.items():
            by_length.setdefault(len(values), []).append(node)
        for nodes in by_length.values():
            yield nodes, torch.stack([self[node] for node in nodes])
