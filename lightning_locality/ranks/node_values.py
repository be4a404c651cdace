"""Singular values at the nodes of a factored tensor, collected group by group."""

from __future__ import annotations

__all__ = ["ROUNDING", "NodeValues", "assembled", "singular_values"]

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from lightning_locality.ranks.factored import FactoredTree
from lightning_locality.ranks.spectra import NodeSpectra
from lightning_locality.tensors.mode_tree import Node

# what a decomposition rounds, times the condition: values below cannot be told from zero (ours)
ROUNDING = 100 * torch.finfo(torch.float64).eps
# binary logarithm of a norm up to which singular values, small ones too, are float64 numbers
MOST_BITS = 865.0

Found = tuple[Sequence[Node], Tensor, Tensor, Tensor]


@final
class NodeValues:
    """Collects what has the node's singular values, group by group, and gives them a common scale at the end.

    Args:
        form: The factored tensor.
    """

    def __init__(self, form: FactoredTree) -> None:
        self._form = form
        below = form.tree.children(form.tree.root)
        # the children of a binary root cut the modes in the same way
        self._twins = below if len(below) == 2 else None
        self._found: list[Found] = []
        # logarithms of the numbers of rows, which may be too many for a float
        self._sizes: list[float] = []
        for group in form.groups:
            sources = [group.sources] * len(group.sizes) if group.aligned else group.sources_of_child
            below_sizes = [self._sizes[first] for first, *_ in sources]
            self._sizes.append(math.log(group.size) if group.leaf else sum(below_sizes))

    def add(self, k: int, matrices: Tensor, logs: Tensor, spread: Tensor) -> None:
        r"""The nodes of a group.

        Args:
            k: The group.
            matrices: ``(n, rows, columns)`` with the singular values wanted.
            logs: Binary logarithms ``(n,)`` of what they have been divided by.
            spread: :math:`\sum_r \|s_r\| \|z_r\|` ``(n,)``, divided likewise.
        """
        nodes = self._form.groups[k].nodes
        if self._twins is not None and nodes[-1] == self._twins[1]:
            # the last node of its group, as it is the last in a walk
            nodes = nodes[:-1]
            if not nodes:
                return
        matrices = matrices[: len(nodes)]
        values = singular_values(matrices)[:, : self._most(k)]
        self._found.append((nodes, values, logs[: len(nodes)], spread[: len(nodes)]))
        if self._twins is not None and k in self._form.groups[-1].sources and self._twins[0] in nodes:
            place = nodes.index(self._twins[0])
            one = slice(place, place + 1)
            self._found.append((self._twins[1:], values[one], logs[one], spread[one]))

    def spectra(self, rounding: float) -> NodeSpectra:
        """All nodes but the root, in the order of the tree.

        Args:
            rounding: Tolerance per unit of condition.
        """
        return assembled(self._found, self._form.tree.nodes[:-1], rounding)

    def _most(self, k: int) -> int:
        """Shorter side of the matricisations of a group: padding with zeros may have given more values."""
        return max(1, round(math.exp(min(self._sizes[k], self._sizes[-1] - self._sizes[k], 30.0))))


def singular_values(matrices: Tensor) -> Tensor:
    """Descending ``(..., min(k, j))``; a wide matrix is transposed, for which some drivers take longer."""
    values: Tensor = torch.linalg.svdvals(matrices.mT if matrices.shape[-2] < matrices.shape[-1] else matrices)
    return values


def assembled(found: Sequence[Found], order: Sequence[Node], rounding: float) -> NodeSpectra:
    """Spectra on a common scale.

    Args:
        found: Nodes, singular values ``(n, R)``, the binary logarithms ``(n,)`` of what these have been divided by, and
            the sums of absolute values ``(n,)``, divided likewise.
        order: The nodes, in the order wanted.
        rounding: Tolerance per unit of condition.
    """
    if not found:
        return NodeSpectra({}, {}, condition={})
    _, values, logs, _ = found[0]
    norm, shift = float(values[0].norm()), float(logs[0])
    bits = shift + math.log2(norm) if norm > 0 else 0.0
    far = abs(bits) > MOST_BITS
    by_node: dict[Node, Tensor] = {}
    condition: dict[Node, float] = {}
    for nodes, values, logs, spread in found:
        condition |= dict(zip(nodes, _conditions(spread, values[:, 0]), strict=True))
        # zeros have no scale, though that of what they are the product of may be no float64 number
        powers = torch.where(values[:, 0] > 0, logs - shift if far else logs, 0.0)[:, None]
        # in two steps: a power of two may be no float64 number where its product with the values is one
        half = (powers / 2).floor()
        values = (values / norm if far else values) * half.exp2() * (powers - half).exp2()
        by_node |= dict(zip(nodes, values.unbind(), strict=True))
    tolerance = {node: min(1.0, rounding * condition[node]) for node in order}
    return NodeSpectra(
        {node: by_node[node] for node in order},
        tolerance,
        bits * math.log(2) if far else 0.0,
        {node: condition[node] for node in order},
    )


def _conditions(spread: Tensor, largest: Tensor) -> list[float]:
    """Sums of absolute values over largest singular values ``(n,)``; 1 where all is zero."""
    ratio = spread / torch.where(largest > 0, largest, 1.0)
    ratio = torch.where(largest > 0, ratio, torch.where(spread > 0, torch.inf, 1.0))
    found: list[float] = ratio.clamp_min(1.0).tolist()
    return found
