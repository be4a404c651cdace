"""Contraction of a tensor over a mode tree, by one batched operation per group of similar nodes."""

from __future__ import annotations

__all__: list[str] = []

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_locality.tensors.chain import Chain
from lightning_locality.tensors.mode_tree import ModeTree, Node, node_name

# entries of the largest tensor that is formed; larger sizes count as equal when nodes are grouped
MAX_SIZE = 2**32
# outputs by number of the group, in any collection
Outputs = Sequence[Tensor] | Mapping[int, Tensor]
PerNode = Mapping[Node, int]


class NodeGroup(nn.Module):
    """Nodes of the same height, in depth-first order, whose weights and whose children's sizes agree.

    ``sizes`` are the numbers of entries under each child, or that of a leaf; ``sources`` the group and the position
    therein of every child, node by node, empty for leaves; ``lengths`` the numbers of nodes of all groups; the weights
    in ``chain`` are ``(n, R_node or D, R_parent)``, or ``(1, ...)`` if the nodes share them.
    """

    modes: Tensor

    def __init__(
        self, nodes: Sequence[Node], sizes: Node, sources: Sequence[tuple[int, int]], lengths: list[int], chain: Chain
    ) -> None:
        super().__init__()
        self.nodes, self.sizes, self.size, self.chain = tuple(nodes), sizes, math.prod(sizes), chain
        self.leaf = not sources
        modes = [node[0] for node in nodes] if self.leaf else []
        self.register_buffer("modes", torch.tensor(modes, dtype=torch.long, device="cpu"), persistent=False)
        self.sources = tuple(sorted({group for group, _ in sources}))
        # the children of consecutive nodes are consecutive in one group: nothing has to be moved
        places = [place for _, place in sources]
        self.aligned = len(self.sources) == 1 and places == list(range(lengths[self.sources[0]]))
        # the groups that hold the first children of all nodes, the second ones and so on
        self.sources_of_child = [self.sources] * len(sizes) if self.aligned else []
        for child in range(0 if self.leaf or self.aligned else len(sizes)):
            of_child = sources[child :: len(sizes)]
            groups = tuple(sorted({group for group, _ in of_child}))
            start = {group: sum(lengths[other] for other in groups[:k]) for k, group in enumerate(groups)}
            index = torch.tensor([start[group] + place for group, place in of_child], device="cpu")
            self.register_buffer(f"places_{child}", index, persistent=False)
            self.sources_of_child.append(groups)

    def weight(self) -> Tensor:
        """The weights ``(n, R_node or D, R_parent)``."""
        return cast(Tensor, self.chain().expand(len(self.nodes), -1, -1))

    def gather(self, outputs: Outputs, join: Callable[[list[Tensor]], Tensor] = torch.cat) -> list[Tensor]:
        """Gather outputs ``(n', ...)`` of earlier groups, joined if several: one ``(n, ...)`` per child."""
        if self.aligned:
            output = outputs[self.sources[0]]
            return list(output.reshape(len(self.nodes), len(self.sizes), *output.shape[1:]).unbind(1))
        gathered = []
        for child, groups in enumerate(self.sources_of_child):
            joined = outputs[groups[0]] if len(groups) == 1 else join([outputs[group] for group in groups])
            gathered.append(joined.index_select(0, self.get_buffer(f"places_{child}")))
        return gathered

    def product(self, outputs: Outputs) -> Tensor:
        """Elementwise product over the children; unlike that of ``torch.prod``, its gradient does not divide."""
        return reduce(torch.mul, self.gather(outputs))

    def expand(self, tables: Outputs, weight: Tensor) -> Tensor:
        r"""Form intermediate tensors :math:`U_\nu = (\bigodot_{c \in C(\nu)} U_c) W_\nu` from those of the children.

        These are ``(n, D_c, R)``, with rows in depth-first order of their modes.
        """
        children = self.gather(tables)
        if weight.shape[2] > 1:
            return _khatri_rao(children) @ weight
        # one column: a matrix product of two halves avoids the Khatri-Rao product of all children
        sizes, half = [child.shape[1] for child in children], 1
        while math.prod(sizes[:half]) < math.prod(sizes[half + 1 :]):
            half += 1
        left, right = _khatri_rao(children[:half]), _khatri_rao(children[half:])
        return ((left * weight.mT) @ right.mT).flatten(1).unsqueeze(2)

    def scatter(self, values: Sequence[Tensor], outputs: dict[int, Tensor]) -> None:
        """Write values ``(n, ...)``, one per child, to the outputs of the groups that the children belong to."""
        if self.aligned:
            outputs[self.sources[0]] = torch.stack(list(values), 1).flatten(0, 1)
            return
        for child, groups in enumerate(self.sources_of_child):
            joined = torch.cat([outputs[group] for group in groups])
            joined[self.get_buffer(f"places_{child}")] = values[child]
            lengths = [len(outputs[group]) for group in groups]
            outputs |= dict(zip(groups, torch.split(joined, lengths), strict=True))


def node_groups(
    tree: ModeTree, shape: Sequence[int], widths: PerNode, depths: PerNode, outputs: int = 1, shared: bool = False
) -> Sequence[NodeGroup]:
    """Group a tree's nodes, children first, with ``outputs`` columns at the root; ``shared``: one matrix per group."""
    place = {mode: k for k, mode in enumerate(tree.traversal)}
    size, members = dict[Node, int](), dict[tuple[Any, ...], list[Node]]()
    for node in sorted(tree.nodes, key=lambda node: (tree.height(node), min(place[mode] for mode in node))):
        children = tree.children(node)
        sizes = tuple(size[child] for child in children) or (shape[node[0]],)
        size[node] = min(math.prod(sizes), MAX_SIZE + 1)
        columns = outputs if node == tree.root else widths[tree.parent(node)]
        rows = widths[node] if children else sizes[0]
        members.setdefault((tree.height(node), rows, columns, depths[node], sizes), []).append(node)
    groups, found = list[NodeGroup](), dict[Node, tuple[int, int]]()
    lengths = [len(nodes) for nodes in members.values()]
    for k, ((_, rows, columns, depth, sizes), nodes) in enumerate(members.items()):
        sources = [found[child] for node in nodes for child in tree.children(node)]
        chain = Chain((1 if shared else len(nodes), rows, columns), depth)
        groups.append(NodeGroup(nodes, sizes, sources, lengths, chain))
        found |= {node: (k, position) for position, node in enumerate(nodes)}
    # a module, typed by what it holds
    return cast(Sequence[NodeGroup], nn.ModuleList(groups))


def per_node(
    name: str, value: int | Sequence[int] | Mapping[Any, int], tree: ModeTree, leaves: bool = False
) -> PerNode:
    """Expand one number, or numbers by level or by node (a tuple, or ``"0-1"`` as in YAML), to one for every node."""
    levels = (tree.leaves, *tree.levels) if leaves else tree.levels
    nodes = [node for level in levels for node in level]
    if isinstance(value, Mapping):
        # a leaf may be given by its mode alone
        keys = [key if isinstance(key, Sequence) else (key,) for key in value]
        written = [key if isinstance(key, str) else node_name(tuple(cast(Node, key))) for key in keys]
        named = dict(zip(written, value.values(), strict=True))
        for wrong in named.keys() - {node_name(node) for node in nodes}:
            raise ValueError(f"{name} has a value for {wrong}, which is no such node of the tree: remove it")
        found = {node: named.get(node_name(node), 0) for node in nodes}
    else:
        numbers = list(value) if isinstance(value, Sequence) else [operator.index(value)] * len(levels)
        if len(numbers) != len(levels):
            first = "the leaves" if leaves else f"node {node_name(nodes[0])}"
            each = f"one for each of the {len(levels)} levels of the tree from the bottom up, beginning with {first}"
            raise ValueError(f"{name} must be one number, or {each}; got {numbers}")
        found = {node: number for level, number in zip(levels, numbers, strict=True) for node in level}
    for node, number in found.items():
        if number < 1:
            got = f"got {number or 'none'} for node {node_name(node)}"
            raise ValueError(f"{name} must be at least 1 at every node, {got}")
    return found


def _khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """Column-wise Kronecker products ``(n, D_1 D_2 ..., R)`` of ``(n, D_c, R)``."""
    return reduce(lambda a, b: (a.unsqueeze(2) * b.unsqueeze(1)).flatten(1, 2), factors)


class EntryQuery:
    """Entries at indices ``(B, N)``; operands are rows ``(n, B)`` of the tables."""

    def __init__(self, indices: Tensor) -> None:
        self.by_mode = indices.long().T

    def operands(self, group: NodeGroup) -> Tensor:
        """Indices of the modes of a group of leaves."""
        return self.by_mode[group.modes]

    def join(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        """Row-major indices of the parents, whose children have these sizes."""
        rows = operands[0]
        for operand, size in zip(operands[1:], sizes[1:], strict=True):
            rows = rows * size + operand
        return rows

    def gather(self, table: Tensor, operands: Tensor) -> Tensor:
        """Rows ``(n, B, R)`` of tables ``(n, D, R)``."""
        n, size, width = table.shape
        if n > 1:
            operands = operands + size * torch.arange(n, device=operands.device).unsqueeze(1)
        # not advanced indexing, whose gradient is several times slower
        return F.embedding(operands, table.reshape(n * size, width))

    def should_materialize(self, group: NodeGroup, weight: Tensor) -> bool:
        """Whether the table has fewer rows than there are queries."""
        # forming 16 entries of one column, by a matrix product, takes the time of gathering, multiplying and summing a
        # row of all components (a rough figure, widths of 10 to 500)
        return group.size <= self.by_mode.shape[1] * (16 if weight.shape[2] == 1 else 1)


class RankOneQuery:
    """Inner products with rank-one tensors, one ``(B, D_n)`` per mode; operands are vectors ``(n, B, D)``."""

    def __init__(self, vectors: Sequence[Tensor]) -> None:
        self.vectors = vectors

    def operands(self, group: NodeGroup) -> Tensor:
        """Vectors of the modes of a group of leaves."""
        return torch.stack([self.vectors[node[0]] for node in group.nodes])

    def join(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        """Kronecker products for the parents."""
        return reduce(lambda a, b: (a.unsqueeze(3) * b.unsqueeze(2)).flatten(2), operands)

    def gather(self, table: Tensor, operands: Tensor) -> Tensor:
        """Matrix products ``(n, B, R)`` with tables ``(n, D, R)``."""
        return operands @ table

    def should_materialize(self, group: NodeGroup, weight: Tensor) -> bool:
        """Whether a joined vector is shorter than the number of components."""
        return 2 * group.size <= weight.shape[1] and group.size <= self.vectors[0].shape[0]


def contract(groups: Iterable[NodeGroup], query: EntryQuery | RankOneQuery) -> Tensor:
    """Contract the tensor of every output with a batch of B operands, from the leaves to the root: ``(B, outputs)``."""
    operands, tables, values = dict[int, Tensor](), dict[int, Tensor](), dict[int, Tensor]()
    for k, group in enumerate(groups):
        weight = group.weight()
        if group.leaf:
            operands[k], tables[k] = query.operands(group), weight
        # by the intermediate tensors where forming these costs less than it saves
        elif tables.keys() >= set(group.sources) and query.should_materialize(group, weight):
            operands[k] = query.join(group.gather(operands), group.sizes)
            tables[k] = group.expand(tables, weight)
        else:
            for source in group.sources:
                if source not in values:
                    values[source] = query.gather(tables[source], operands[source])
            values[k] = group.product(values) @ weight
    return values[k][0] if k in values else query.gather(tables[k], operands[k])[0]
