"""Singular values at the nodes of a factored tensor, collected group by group."""

from __future__ import annotations

__all__ = [
    "ROUNDING",
    "FactoredTree",
    "Inheritance",
    "NodeValues",
    "assembled",
    "check_finite",
    "doubled",
    "factored",
    "factors_of",
    "padded",
    "scaled",
    "singular_values",
]

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from lightning_locality.ranks.spectra import NodeSpectra
from lightning_locality.tensors.chain import Chain
from lightning_locality.tensors.contraction import NodeGroup, node_groups
from lightning_locality.tensors.cp import CP
from lightning_locality.tensors.factorization import Factorization
from lightning_locality.tensors.hierarchical import HierarchicalTensorFactorization
from lightning_locality.tensors.mode_tree import ModeTree, Node


@final
@dataclass(frozen=True)
class FactoredTree:
    r"""The nodes of a tree in groups of equal shape, and the weights of each group in float64.

    .. math:: U_\nu = \left( \bigodot_{c \in C(\nu)} U_c \right) W_\nu, \qquad U_{\{n\}} = W_{\{n\}},
        \qquad \mathcal{W} = U_{[N]}

    Args:
        tree: The tree.
        shape: Sizes of the modes.
        groups: Children before parents, the root alone in the last one.
        weights: For every group ``(n, R_node or D, R_parent)``, of the root ``(1, R, 1)``.
    """

    tree: ModeTree
    shape: tuple[int, ...]
    groups: tuple[NodeGroup, ...]
    weights: tuple[Tensor, ...]

    @classmethod
    def of_hierarchical(cls, model: HierarchicalTensorFactorization) -> Self:
        """A hierarchical factorisation over its own tree; keeps the graph of its parameters.

        Args:
            model: The factorisation.
        """
        groups = tuple(model.groups)
        weights = tuple(doubled(group.chain).expand(len(group.nodes), -1, -1) for group in groups)
        return cls(model.tree, model.shape, groups, weights)

    @classmethod
    def of_cp(cls, model: CP, tree: ModeTree) -> Self:
        """A sum of rank-one tensors over any tree: identities at the interior nodes, ones at the root.

        Args:
            model: The factorisation.
            tree: Of the same order.
        """
        factors = factors_of(model)
        widths, depths = dict.fromkeys(tree.interior, model.rank), dict.fromkeys(tree.nodes, 1)
        # one matrix per group: the chains of these groups are not used
        made = node_groups(tree, model.shape, widths, depths, shared=True).to(factors[0].device)
        groups = tuple(made)
        identity = torch.eye(model.rank, dtype=torch.float64, device=factors[0].device)
        weights = [
            torch.stack([factors[node[0]] for node in group.nodes])
            if group.leaf
            else identity.expand(len(group.nodes), -1, -1)
            for group in groups[:-1]
        ]
        return cls(tree, model.shape, groups, (*weights, identity.new_ones(1, model.rank, 1)))

    def gather(self, group: NodeGroup, outputs: Sequence[Tensor]) -> list[Tensor]:
        """What earlier groups gave ``(n', rows, ...)``, for every child ``(n, rows, ...)``, with rows of zeros added.

        Args:
            group: The parents.
            outputs: Of all earlier groups; where a child's nodes come from several groups, rows may differ.
        """
        if group.aligned:
            return group.gather(outputs)
        gathered = []
        for child, sources in enumerate(group.sources_of_child):
            found = [outputs[k] for k in sources]
            if len(found) > 1:
                rows = max(output.shape[1] for output in found)
                found = [torch.cat([padded(output, rows) for output in found])]
            gathered.append(found[0].index_select(0, group.get_buffer(f"places_{child}")))
        return gathered


def factored(model: HierarchicalTensorFactorization | CP, tree: ModeTree | None = None) -> FactoredTree:
    """A factorisation over a tree.

    Args:
        model: The factorisation.
        tree: For CP; None for the tree without nodes between the modes and the root.
    """
    if isinstance(model, HierarchicalTensorFactorization):
        return FactoredTree.of_hierarchical(model)
    return FactoredTree.of_cp(model, ModeTree([range(model.order)]) if tree is None else tree)


def check_finite(model: Factorization) -> None:
    """Raise ValueError where weights are not finite."""
    # one number, so that a device is waited for once
    wrong = int(torch.stack([(~weight.isfinite()).sum() for weight in model.parameters()]).sum())
    if wrong:
        raise ValueError(f"weights must be finite to be measured, and {wrong} are not: has the training diverged?")


@final
class Inheritance:
    """What the nodes of every group are given by their parents, on the way down.

    Args:
        groups: Children before parents.
    """

    def __init__(self, groups: Sequence[NodeGroup]) -> None:
        self._lengths = [len(group.nodes) for group in groups]
        self._pieces: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def give(self, group: NodeGroup, child: int, values: Tensor) -> None:
        """To one child of every node of a group.

        Args:
            group: The parents.
            child: Which child, counted from 0.
            values: ``(n, rows, ...)``.
        """
        if group.aligned:
            length = self._lengths[group.sources[0]]
            places = torch.arange(child, length, len(group.sizes), device=values.device)
            self._pieces.setdefault(group.sources[0], []).append((places, values))
            return
        places, sources, start = group.get_buffer(f"places_{child}"), group.sources_of_child[child], 0
        for k in sources:
            piece = (places, values)
            if len(sources) > 1:
                held = (places >= start) & (places < start + self._lengths[k])
                piece = (places[held] - start, values[held])
            self._pieces.setdefault(k, []).append(piece)
            start += self._lengths[k]

    def take(self, k: int) -> Tensor:
        """All that a group has been given ``(n, rows, ...)``, rows of zeros added where they differ.

        Args:
            k: The group.
        """
        places, values = zip(*self._pieces.pop(k), strict=True)
        if len(values) == 1:
            joined, order = cast(Tensor, values[0]), cast(Tensor, places[0])
        else:
            rows = max(value.shape[1] for value in values)
            joined, order = torch.cat([padded(value, rows) for value in values]), torch.cat(places)
        return joined.index_select(0, order.argsort())


def padded(matrices: Tensor, rows: int) -> Tensor:
    """Matrices ``(n, k, R)`` with rows of zeros added: ``(n, rows, R)``."""
    return F.pad(matrices, (0, 0, 0, rows - matrices.shape[1])) if matrices.shape[1] < rows else matrices


def scaled(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Every matrix ``(n, k, R)`` divided by a power of two that is close to its largest entry, and the exponents.

    At order 4096 plain products underflow; powers of two, and whole numbers ``(n,)`` as their logarithms, cost no
    digits. The divisor is a constant to autograd.
    """
    exponents = torch.frexp(matrices.detach().abs().amax((1, 2)))[1].clamp(-1000, 1000).to(matrices.dtype)
    return matrices * torch.exp2(-exponents)[:, None, None], exponents


def doubled(chain: Chain) -> Tensor:
    """The weights of a chain, cast to float64 before its factors are multiplied."""
    if chain.vectors.dtype == torch.float64:
        return cast(Tensor, chain())
    return cast(Tensor, functional_call(chain, {name: w.double() for name, w in chain.named_parameters()}, ()))


def factors_of(model: CP) -> list[Tensor]:
    """Matrices ``(D_n, R)`` of a sum of rank-one tensors, in float64."""
    found: dict[int, Tensor] = {}
    kinds = list(zip(model.shape, model.depth, strict=True))
    for kind, group in zip(dict.fromkeys(kinds), model.groups, strict=True):
        modes: Iterable[int] = (mode for mode, other in enumerate(kinds) if other == kind)
        found |= dict(zip(modes, doubled(cast(Chain, group)).unbind(), strict=True))
    return [found[mode] for mode in range(model.order)]


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
