"""The nodes of a factored tensor in batches, and the assembly of their spectra."""

from __future__ import annotations

__all__: list[str] = []

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lightning_locality.ranks.spectra import ROUNDING, NodeSpectra, singular_values
from lightning_locality.tensors import CP, Factorization, HierarchicalTensorFactorization, ModeTree, Node
from lightning_locality.tensors.contraction import NodeGroup, node_groups

Scaled = tuple[Tensor, Tensor]  # matrices (n, ...), and the binary logarithms (n,) of their divisors


@final
@dataclass(frozen=True)
class FactoredTree:
    r"""The nodes of a tree in groups of equal shape, and the weights of each group in float64.

    .. math:: U_\nu = \left( \bigodot_{c \in C(\nu)} U_c \right) W_\nu, \qquad U_{\{n\}} = W_{\{n\}},
        \qquad \mathcal{W} = U_{[N]}
    """

    tree: ModeTree
    # children before parents, the root alone in the last one
    groups: tuple[NodeGroup, ...]
    # (n, R_node or D, R_parent), of the root (1, R, 1)
    weights: tuple[Tensor, ...]

    def gather(self, group: NodeGroup, outputs: Sequence[Scaled]) -> list[Scaled]:
        """Outputs of earlier groups ``(n', rows, R)``, for every child ``(n, rows, R)``, padded to equal rows."""
        matrices, logs = zip(*outputs, strict=True)
        return list(zip(group.gather(matrices, _concatenate), group.gather(logs), strict=True))


def factored(model: HierarchicalTensorFactorization | CP, tree: ModeTree | None = None) -> FactoredTree:
    """The form of a factorisation over its own tree or, for CP, any; keeps the graph of the parameters."""
    if isinstance(model, HierarchicalTensorFactorization):
        groups = tuple(model.groups)
        own = (float64_weight(group.chain).expand(len(group.nodes), -1, -1) for group in groups)
        return FactoredTree(model.tree, groups, tuple(own))
    # the factors at the leaves, identities at the interior nodes, ones at the root
    tree = ModeTree([range(model.order)]) if tree is None else tree
    factors = float64_factors(model)
    widths, depths = dict.fromkeys(tree.interior, model.rank), dict.fromkeys(tree.nodes, 1)
    # one matrix per group: the chains of these groups are not used
    made = node_groups(tree, model.shape, widths, depths, shared=True)
    groups = tuple(group.to(factors[0].device) for group in made)
    identity = torch.eye(model.rank, dtype=torch.float64, device=factors[0].device)
    weights = []
    for group in groups[:-1]:
        leaves = [factors[node[0]] for node in group.nodes if group.leaf]
        weights.append(torch.stack(leaves) if leaves else identity.expand(len(group.nodes), -1, -1))
    return FactoredTree(tree, groups, (*weights, identity.new_ones(1, model.rank, 1)))


def check_finite(model: Factorization) -> None:
    """Raise ValueError if weights are not finite."""
    # one number, so that the device is waited for once
    if wrong := int(torch.stack([(~weight.isfinite()).sum() for weight in model.parameters()]).sum()):
        raise ValueError(f"weights must be finite to be measured, and {wrong} are not: has the training diverged?")


def float64_weight(chain: nn.Module) -> Tensor:
    """The columns of a :class:`Chain`, cast to float64 before its factors are multiplied."""
    if next(chain.parameters()).dtype == torch.float64:
        return cast(Tensor, chain())
    return cast(Tensor, functional_call(chain, {name: w.double() for name, w in chain.named_parameters()}, ()))


def float64_factors(model: CP) -> list[Tensor]:
    """Matrices ``(D_n, R)`` of a sum of rank-one tensors, in float64."""
    kinds = list(zip(model.shape, model.depth, strict=True))
    stacked = (iter(float64_weight(group).unbind()) for group in model.groups)
    of_kind = dict(zip(dict.fromkeys(kinds), stacked, strict=True))
    return [next(of_kind[kind]) for kind in kinds]


def scaled(values: Tensor) -> Scaled:
    """Divide every item of a batch ``(n, ...)`` by a power of two close to its largest entry; return the exponents.

    At order 4096 plain products underflow; powers of two, and whole numbers ``(n,)`` as their logarithms, cost no
    digits. The divisor is a constant to autograd.
    """
    largest = values.detach().abs().amax(tuple(range(1, values.ndim)))
    exponents = torch.frexp(largest)[1].clamp(-1000, 1000).to(values.dtype)
    return values * torch.exp2(-exponents).reshape(-1, *[1] * (values.ndim - 1)), exponents


def _concatenate(outputs: Sequence[Tensor]) -> Tensor:
    """Join batches of matrices ``(n, rows, ...)``, padding them with rows of zeros to equal numbers of rows."""
    if len(outputs) == 1:
        return outputs[0]
    rows = max(output.shape[1] for output in outputs)
    return torch.cat([F.pad(output, (0, 0, 0, rows - output.shape[1])) for output in outputs])


@final
class Inheritance:
    """Values that the nodes of every group receive from their parents on the way down; groups children first."""

    def __init__(self, groups: Sequence[NodeGroup]) -> None:
        self._lengths = [len(group.nodes) for group in groups]
        self._pieces: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def give(self, group: NodeGroup, child: int, values: Tensor) -> None:
        """Give ``(n, rows, ...)`` to one child, counted from 0, of every node of a group."""
        sources, start = group.sources_of_child[child], 0
        if group.aligned:
            places = torch.arange(child, self._lengths[sources[0]], len(group.sizes), device=values.device)
        else:
            places = group.get_buffer(f"places_{child}")
        for k in sources:
            piece = (places, values)
            if len(sources) > 1:
                held = (places >= start) & (places < start + self._lengths[k])
                piece = (places[held] - start, values[held])
            self._pieces.setdefault(k, []).append(piece)
            start += self._lengths[k]

    def take(self, k: int) -> Tensor:
        """Everything given to group k, ``(n, rows, ...)``, padded to equal rows."""
        places, values = zip(*self._pieces.pop(k), strict=True)
        return _concatenate(values).index_select(0, torch.cat(places).argsort())


class ScaledSpectra(NamedTuple):
    """Spectra of n nodes, each divided by a power of two."""

    nodes: Sequence[Node]
    # descending (n, R), and the binary logarithms of their divisors (n,)
    values: Tensor
    logs: Tensor
    # sums of absolute values (n,), divided likewise: over the largest singular value they are the condition
    spread: Tensor


@final
class GroupSpectra:
    """Collects matrices that have the singular values of the nodes, group by group."""

    def __init__(self, form: FactoredTree) -> None:
        self._form = form
        # the children of a binary root cut the modes in the same way: only the first is decomposed
        below = form.tree.children(form.tree.root)
        self._twins = below if len(below) == 2 else None
        self._found: list[ScaledSpectra] = []
        # logarithms of the numbers of rows, which a float may not hold
        self._sizes: list[float] = []
        for group in form.groups:
            children = [self._sizes[first] for first, *_ in group.sources_of_child]
            self._sizes.append(math.log(group.size) if group.leaf else sum(children))

    def add(self, k: int, matrices: Tensor, logs: Tensor, spread: Tensor) -> None:
        """Add the nodes of group k: matrices ``(n, rows, columns)`` with their singular values, logs and spread."""
        nodes = self._form.groups[k].nodes
        if self._twins is not None and nodes[-1] == self._twins[1]:
            # last in its group because last in a walk through the tree
            nodes = nodes[:-1]
        if nodes:
            n = len(nodes)
            # the shorter side of the matricisations: padding with zeros may have given more values
            most = max(1, round(math.exp(min(self._sizes[k], self._sizes[-1] - self._sizes[k], 30.0))))
            values = singular_values(matrices[:n])[:, :most]
            self._found.append(ScaledSpectra(nodes, values, logs[:n], spread[:n]))

    def spectra(self, rounding: float) -> NodeSpectra:
        """All nodes but the root, in the order of the tree; ``rounding`` is the tolerance per unit of condition."""
        found = self._found
        if self._twins is not None:
            first, second = self._twins
            nodes, *numbers = next(spectra for spectra in found if first in spectra.nodes)
            place = slice(nodes.index(first), nodes.index(first) + 1)
            found = [*found, ScaledSpectra((second,), *(number[place] for number in numbers))]
        return assemble(found, self._form.tree.nodes[:-1], rounding)


def assemble(found: Sequence[ScaledSpectra], order: Sequence[Node], rounding: float = ROUNDING) -> NodeSpectra:
    """Bring spectra to a common scale, in this order of nodes; ``rounding`` is the tolerance per unit of condition."""
    if not found:
        return NodeSpectra({}, {}, condition={})
    _, values, logs, _ = found[0]
    norm, shift = float(values[0].norm()), float(logs[0])
    bits = shift + math.log2(norm) if norm > 0 else 0.0
    # beyond, small singular values are no float64 numbers
    far = abs(bits) > 865.0
    by_node: dict[Node, Tensor] = {}
    condition: dict[Node, float] = {}
    for nodes, values, logs, spread in found:
        largest, alive = values[:, 0], values[:, 0] > 0
        # 1 if both are zero
        ratio = torch.where(spread > 0, torch.inf, 1.0).where(~alive, spread / largest.where(alive, 1.0))
        condition |= dict(zip(nodes, ratio.clamp_min(1.0).tolist(), strict=True))
        # zeros have no scale, though a float64 may not hold that of their factors
        powers = torch.where(alive, logs - shift if far else logs, 0.0)[:, None]
        # in two steps: a float64 may hold the product but not the power of two alone
        half = (powers / 2).floor()
        values = (values / norm if far else values) * half.exp2() * (powers - half).exp2()
        by_node |= dict(zip(nodes, values.unbind(), strict=True))
    return NodeSpectra(
        {node: by_node[node] for node in order},
        {node: min(1.0, rounding * condition[node]) for node in order},
        bits * math.log(2) if far else 0.0,
        {node: condition[node] for node in order},
    )
