"""Singular values of the matricisations of a tensor at the nodes of a tree."""

from __future__ import annotations

__all__ = ["NodeSpectra"]

from collections.abc import Iterator, Mapping
from typing import final

import torch
from torch import Tensor

from lightning_locality.ranks.quantities import (
    effective_rank,
    entanglement_entropy,
    numerical_rank,
    participation_ratio,
    stable_rank,
)
from lightning_locality.tensors.mode_tree import Node, node_name


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
