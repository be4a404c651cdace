"""Singular values of the matricisations of a tensor at the nodes of a tree."""

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

from lightning_locality.tensors.mode_tree import Node, node_name

# what a float64 decomposition rounds, relative to the largest value (ours)
ROUNDING = 100 * torch.finfo(torch.float64).eps


def numerical_rank(spectrum: Tensor, rtol: float | Tensor = ROUNDING) -> Tensor:
    r"""Number of singular values above a share of the largest one; 0 for a spectrum of zeros.

    .. math:: \#\{k : \sigma_k > \text{rtol} \cdot \sigma_1\}

    Args:
        spectrum: Singular values ``(..., R)``, in any order.
        rtol: The share: a number, or one for every spectrum ``(...)``.

    Returns:
        ``(...)``, int64.

    Raises:
        ValueError: Values that are not finite, which an integer could not show.

    Example:
        >>> numerical_rank(torch.tensor([3.0, 1e-3, 1e-20])).item(), numerical_rank(torch.zeros(3)).item()
        (2, 0)
    """
    values = _finite(spectrum).double()
    share = torch.as_tensor(rtol, dtype=torch.float64, device=values.device)
    return (values > share[..., None] * values.amax(-1, keepdim=True)).sum(-1)


def epsilon_rank(spectrum: Tensor, epsilon: float) -> Tensor:
    r"""Least rank of a matrix within a relative Frobenius distance.

    .. math:: \min \Bigl\{ r : \sum_{k > r} \sigma_k^2 \le \epsilon^2 \sum_k \sigma_k^2 \Bigr\}

    Args:
        spectrum: Singular values ``(..., R)``, in any order.
        epsilon: The distance, relative to the norm.

    Returns:
        ``(...)``, int64.

    Raises:
        ValueError: Values that are not finite, or a distance below 0.

    Example:
        >>> epsilon_rank(torch.tensor([4.0, 3.0, 0.1]), epsilon=0.1).item()
        2
    """
    if not epsilon >= 0:
        raise ValueError(f"epsilon must be at least 0, a distance relative to the norm, got {epsilon}")
    squares = _scaled(_finite(spectrum)).square().sort(-1).values
    # summed from the smallest up: what is left out must not be lost beside what is kept
    left_out = squares.cumsum(-1) <= epsilon**2 * squares.sum(-1, keepdim=True)
    return squares.shape[-1] - left_out.sum(-1)


def effective_rank(spectrum: Tensor) -> Tensor:
    r"""Exponential of the entropy of the normalised singular values; 0 for a spectrum of zeros.

    .. math:: \operatorname{erank}(\sigma) = \exp \Bigl( -\sum_r p_r \ln p_r \Bigr), \qquad
        p_r = \sigma_r / \sum_{r'} \sigma_{r'}

    Source: "The effective rank: a measure of effective dimensionality" (Roy, Vetterli, 2007). Values below the
    rounding of a float64 decomposition, :math:`100 \cdot 2^{-52} \sigma_1` (ours), are left out, so that noise does
    not count.

    Args:
        spectrum: Singular values ``(..., R)``.

    Returns:
        ``(...)``, between 1 and R.

    Example:
        >>> effective_rank(torch.tensor([5.0, 5.0, 0.0])).round(decimals=6)
        tensor(2., dtype=torch.float64)
    """
    values = _scaled(spectrum)
    shares, total = _shares(torch.where(values <= ROUNDING, 0.0, values))
    return torch.where(total == 0, 0.0, torch.special.entr(shares).sum(-1).exp())


def entanglement_entropy(spectrum: Tensor) -> Tensor:
    r"""Entropy of the normalised squares of the singular values, in nats; 0 for a spectrum of zeros.

    .. math:: S = -\sum_r q_r \ln q_r, \qquad q_r = \sigma_r^2 / \sum_{r'} \sigma_{r'}^2

    Of a matricisation: the quantum entanglement of its two groups of modes (What Makes Data Suitable for a Locally
    Connected Neural Network?, Alexander, De La Vega, Razin, Cohen, 2023).

    Args:
        spectrum: Singular values ``(..., R)``.

    Returns:
        ``(...)``, between 0 and ln R.

    Example:
        >>> entanglement_entropy(torch.tensor([2.0, 2.0])).exp().round(decimals=6)
        tensor(2., dtype=torch.float64)
    """
    shares, _ = _shares(_scaled(spectrum).square())
    entropy: Tensor = torch.special.entr(shares).sum(-1)
    return entropy


def participation_ratio(spectrum: Tensor) -> Tensor:
    r"""Inverse sum of squares of the normalised squares (exponential of the Rényi-2 entropy); 0 for zeros.

    .. math:: \operatorname{PR} = \Bigl( \sum_r \sigma_r^2 \Bigr)^2 \Big/ \sum_r \sigma_r^4

    Args:
        spectrum: Singular values ``(..., R)``.

    Returns:
        ``(...)``, between 1 and R.

    Example:
        >>> participation_ratio(torch.tensor([1.0, 1.0, 1.0, 0.0])).item()
        3.0
    """
    shares, total = _shares(_scaled(spectrum).square())
    return torch.where(total == 0, 0.0, 1 / torch.where(total == 0, 1.0, shares.square().sum(-1)))


def stable_rank(spectrum: Tensor) -> Tensor:
    r"""Squared Frobenius norm over squared spectral norm; 0 for a spectrum of zeros.

    .. math:: \sum_r \sigma_r^2 / \sigma_1^2

    Args:
        spectrum: Singular values ``(..., R)``.

    Returns:
        ``(...)``, between 1 and R.

    Example:
        >>> stable_rank(torch.tensor([2.0, 1.0])).item()
        1.25
    """
    return _scaled(spectrum).square().sum(-1)


def _finite(spectrum: Tensor) -> Tensor:
    if bad := int((~spectrum.isfinite()).sum()):
        raise ValueError(f"spectrum has {bad} of {spectrum.numel()} values that are not finite: look where it is from")
    return spectrum


def _scaled(spectrum: Tensor) -> Tensor:
    """In float64, the largest value 1: squares then neither overflow nor vanish altogether."""
    values = spectrum.double()
    largest = values.amax(-1, keepdim=True)
    return values / torch.where(largest == 0, 1.0, largest)


def _shares(values: Tensor) -> tuple[Tensor, Tensor]:
    total = values.sum(-1)
    return values / torch.where(total == 0, 1.0, total).unsqueeze(-1), total


@final
class NodeSpectra(Mapping[Node, Tensor]):
    r"""Node -> singular values of the matricisation there, descending, in float64.

    A node is a tuple of modes. The ranks at all nodes of a tree but the root are the hierarchical tensor rank
    ("Implicit Regularization in Hierarchical Tensor Factorization and Deep Convolutional Neural Networks", Razin,
    Maman, Cohen, 2022).

    Args:
        values: The singular values, divided by ``exp(log_scale)``.
        tolerance: Node -> relative size below which a singular value cannot be told from rounding.
        log_scale: Logarithm of what all values have been divided by: 0 unless the tensor's norm is not a float64.
        condition: Node -> condition number of the factored form, where the values come from one.

    Example:
        >>> spectra = NodeSpectra({(0,): torch.tensor([2.0, 1e-17])}, {(0,): 1e-13})
        >>> spectra.rank((0,)), spectra.rank((0,), rtol=1e-18)
        (1, 2)
        >>> spectra.ranks()
        {(0,): 1}
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

    def rank(self, node: Node, rtol: float | None = None) -> int:
        """Numerical rank at a node: number of singular values above ``rtol`` times the largest.

        Args:
            node: Which node.
            rtol: None for the node's tolerance.
        """
        return int(numerical_rank(self[node], self.tolerance[node] if rtol is None else rtol))

    def ranks(self, rtol: float | None = None) -> dict[Node, int]:
        """Numerical rank at every node: the hierarchical tensor rank.

        Args:
            rtol: None for the tolerance of every node.
        """
        found: dict[Node, int] = {}
        for nodes, values in self._stacked():
            share = torch.tensor([self.tolerance[node] if rtol is None else rtol for node in nodes]).to(values)
            found |= dict(zip(nodes, numerical_rank(values, share).tolist(), strict=True))
        return {node: found[node] for node in self}

    def table(self) -> list[dict[str, str | float]]:
        """Every node in a row: its name, rank, tolerance, effective rank, entropy and so on, and largest value.

        ``entanglement_entropy`` is in nats; ``largest`` is divided by ``exp(log_scale)``.
        """
        ranks, rows = self.ranks(), dict[Node, dict[str, str | float]]()
        for nodes, values in self._stacked():
            columns = {
                "effective_rank": effective_rank(values),
                "participation_ratio": participation_ratio(values),
                "stable_rank": stable_rank(values),
                "entanglement_entropy": entanglement_entropy(values),
                "largest": values.amax(-1),
            }
            lists = {name: column.tolist() for name, column in columns.items()}
            for k, node in enumerate(nodes):
                rows[node] = {"node": node_name(node), "rank": ranks[node], "tolerance": self.tolerance[node]}
                rows[node] |= {name: column[k] for name, column in lists.items()}
        return [rows[node] for node in self]

    def _stacked(self) -> Iterator[tuple[list[Node], Tensor]]:
        """Nodes with equally many singular values, and these as one tensor: one operation for thousands of nodes."""
        by_length: dict[int, list[Node]] = {}
        for node, values in self.items():
            by_length.setdefault(len(values), []).append(node)
        for nodes in by_length.values():
            yield nodes, torch.stack([self[node] for node in nodes])
