"""Entries and inner products of a hierarchical factorisation, by one batched operation per group of nodes."""

from __future__ import annotations

__all__ = [
    "MOST_ENTRIES",
    "EntryQuery",
    "NodeGroup",
    "Query",
    "RankOneQuery",
    "answer",
    "expand",
    "given",
    "node_groups",
    "per_node",
    "product",
]

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_locality.tensors.chain import Chain
from lightning_locality.tensors.mode_tree import ModeTree, Node, node_name

# more entries than this are never written out; sizes beyond it count as equal when nodes are grouped
MOST_ENTRIES = 2**32


@final
class NodeGroup(nn.Module):
    """Nodes of the same height whose weights, and whose children's sizes, agree.

    Args:
        nodes: The nodes, in the order in which a walk through the tree meets them.
        sizes: Number of entries that each child stands for; of a leaf, its own.
        sources: Of every child, one after the other and node by node: its group and its place there. None for
            leaves.
        lengths: Number of nodes of every earlier group.
        chain: The weights ``(n, R_node or D, R_parent)``, or ``(1, ...)`` where the nodes share theirs.
    """

    modes: Tensor

    def __init__(
        self,
        nodes: Sequence[Node],
        sizes: tuple[int, ...],
        sources: Sequence[tuple[int, int]],
        lengths: Sequence[int],
        chain: Chain,
    ) -> None:
        super().__init__()
        self.nodes, self.sizes, self.size, self.chain = tuple(nodes), sizes, math.prod(sizes), chain
        self.leaf = not sources
        modes = [node[0] for node in nodes] if self.leaf else []
        self.register_buffer("modes", torch.tensor(modes, dtype=torch.long, device="cpu"), persistent=False)
        self.sources = tuple(sorted({group for group, _ in sources}))
        # children of consecutive nodes one after the other: nothing has to be moved
        self.aligned = len(self.sources) == 1 and [place for _, place in sources] == list(
            range(lengths[self.sources[0]])
        )
        self.sources_of_child: list[tuple[int, ...]] = []
        for child in range(0 if self.leaf or self.aligned else len(sizes)):
            of_child = sources[child :: len(sizes)]
            groups = tuple(sorted({group for group, _ in of_child}))
            start = {group: sum(lengths[other] for other in groups[:k]) for k, group in enumerate(groups)}
            places = torch.tensor([start[group] + place for group, place in of_child], device="cpu")
            self.register_buffer(f"places_{child}", places, persistent=False)
            self.sources_of_child.append(groups)

    def weight(self) -> Tensor:
        """The weights ``(n, R_node or D, R_parent)``."""
        weight: Tensor = self.chain()
        return weight.expand(len(self.nodes), -1, -1)

    def gather(self, outputs: Sequence[Tensor | None]) -> list[Tensor]:
        """What earlier groups gave ``(n', ...)``, for the children of this one: for every child ``(n, ...)``."""
        if self.aligned:
            output = given(outputs[self.sources[0]])
            return list(output.reshape(len(self.nodes), len(self.sizes), *output.shape[1:]).unbind(1))
        gathered = []
        for child, groups in enumerate(self.sources_of_child):
            found = [given(outputs[group]) for group in groups]
            joined = found[0] if len(found) == 1 else torch.cat(found)
            gathered.append(joined.index_select(0, self.get_buffer(f"places_{child}")))
        return gathered

    def scatter(self, values: Sequence[Tensor], outputs: dict[int, Tensor]) -> None:
        """The way back: put values of the children, for every child ``(n, ...)``, to the groups they come from."""
        if self.aligned:
            outputs[self.sources[0]] = torch.stack(list(values), 1).flatten(0, 1)
            return
        for child, groups in enumerate(self.sources_of_child):
            joined = torch.cat([outputs[group] for group in groups])
            joined[self.get_buffer(f"places_{child}")] = values[child]
            lengths = [len(outputs[group]) for group in groups]
            outputs |= dict(zip(groups, torch.split(joined, lengths), strict=True))


def given(output: Tensor | None) -> Tensor:
    """An output that an earlier group has left."""
    assert output is not None, "groups are visited children first"
    return output


def node_groups(
    tree: ModeTree,
    shape: Sequence[int],
    widths: Mapping[Node, int],
    depths: Mapping[Node, int],
    outputs: int = 1,
    shared: bool = False,
) -> nn.ModuleList:
    """Groups of all nodes of a tree, children before parents, the root alone in the last one.

    Args:
        tree: The tree.
        shape: Sizes of the modes.
        widths: Number of local components R of every interior node.
        depths: Factors of every column of every node.
        outputs: Columns of the root's weights.
        shared: One matrix of weights for all nodes of a group.
    """
    place = {mode: k for k, mode in enumerate(tree.traversal)}
    size: dict[Node, int] = {}
    members: dict[tuple[Any, ...], list[Node]] = {}
    for node in sorted(tree.nodes, key=lambda node: (tree.height(node), min(place[mode] for mode in node))):
        children = tree.children(node)
        sizes = tuple(size[child] for child in children) or (shape[node[0]],)
        size[node] = min(math.prod(sizes), MOST_ENTRIES + 1)
        columns = outputs if node == tree.root else widths[tree.parent(node)]
        rows = widths[node] if children else sizes[0]
        key = (tree.height(node), rows, columns, depths[node], sizes, bool(children))
        members.setdefault(key, []).append(node)
    groups, found = nn.ModuleList(), dict[Node, tuple[int, int]]()
    lengths = [len(nodes) for nodes in members.values()]
    for k, ((_, rows, columns, depth, sizes, _), nodes) in enumerate(members.items()):
        sources = [found[child] for node in nodes for child in tree.children(node)]
        chain = Chain((1 if shared else len(nodes), rows, columns), depth)
        groups.append(NodeGroup(nodes, sizes, sources, lengths, chain))
        found |= {node: (k, position) for position, node in enumerate(nodes)}
    return groups


def per_node(
    value: int | Sequence[int] | Mapping[Any, int], levels: Sequence[Sequence[Node]], name: str, first: str
) -> dict[Node, int]:
    """A number for every node: given once, by level from below, or by node.

    Args:
        value: What was given; nodes may be written as tuples or, as in YAML, as ``"0-1"``.
        levels: The nodes by level.
        name: The argument, for the error.
        first: What the first level holds, for the error.

    Raises:
        ValueError: Another number of values than levels, nodes without a value or values without a node, or
            values below 1.
    """
    nodes = [node for level in levels for node in level]
    if isinstance(value, Mapping):
        named = {key if isinstance(key, str) else node_name(tuple(key)): number for key, number in value.items()}
        for wrong in named.keys() - {node_name(node) for node in nodes}:
            raise ValueError(f"{name} has a value for {wrong}, which is no such node of the tree: remove it")
        found = {node: named.get(node_name(node), 0) for node in nodes}
    elif isinstance(value, int):
        found = dict.fromkeys(nodes, value)
    elif len(value) != len(levels):
        raise ValueError(
            f"{name} must be one number, or one for each of the {len(levels)} levels of the tree from below, "
            f"beginning with {first}; got {list(value)}"
        )
    else:
        found = {node: number for level, number in zip(levels, value, strict=True) for node in level}
    for node, number in found.items():
        if number < 1:
            raise ValueError(
                f"{name} must be at least 1 at every node, got {number or 'none'} for node {node_name(node)}"
            )
    return found


def product(factors: Sequence[Tensor]) -> Tensor:
    """Elementwise product; not ``torch.prod``, whose gradient divides."""
    return reduce(torch.mul, factors)


def _khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """Column-wise Kronecker products ``(n, D_1 D_2 ..., R)`` of ``(n, D_c, R)``."""
    return reduce(lambda a, b: (a.unsqueeze(2) * b.unsqueeze(1)).flatten(1, 2), factors)


def expand(children: Sequence[Tensor], weight: Tensor) -> Tensor:
    r"""The intermediate tensors of a group of nodes, written out.

    .. math:: U_\nu = \left( \bigodot_{c \in C(\nu)} U_c \right) W_\nu

    Args:
        children: Those of the children, each ``(n, D_c, R)``, rows in the order of their modes in a walk.
        weight: ``(n, R, R_parent)``.

    Returns:
        ``(n, prod D_c, R_parent)``.
    """
    if weight.shape[2] > 1:
        return _khatri_rao(children) @ weight
    # one column: a matrix product of two halves needs no Khatri-Rao product of the whole
    sizes, half = [child.shape[1] for child in children], 1
    while math.prod(sizes[:half]) < math.prod(sizes[half + 1 :]):
        half += 1
    left, right = _khatri_rao(children[:half]), _khatri_rao(children[half:])
    return ((left * weight.mT) @ right.mT).flatten(1).unsqueeze(2)


class Query(ABC):
    """What is asked of a tensor: its inner products with rank-one tensors, entries among them.

    A node answers from its intermediate tensors written out ("table") where these are small, and otherwise by the
    product of its children's answers.
    """

    @abstractmethod
    def at_leaves(self, group: NodeGroup) -> Tensor:
        """The question as a group of leaves sees it ``(n, B, ...)``."""

    @abstractmethod
    def join(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        """The question as a parent sees it, from its children's."""

    @abstractmethod
    def look_up(self, table: Tensor, question: Tensor) -> Tensor:
        """Answers ``(n, B, R)`` from a table ``(n, D, R)``."""

    @abstractmethod
    def worth_a_table(self, group: NodeGroup, weight: Tensor) -> bool:
        """Whether writing out the intermediate tensors of a group costs less than it spares."""


@final
class EntryQuery(Query):
    """Entries; a question is the row ``(n, B)`` of the table.

    Args:
        indices: ``(B, N)``.
    """

    # writing out an entry of a table with one column is a step of a matrix product: this many are written in the
    # time in which one row of all components is fetched, multiplied and added up (a rough figure, widths of 10 to 500)
    WRITTEN = 16

    def __init__(self, indices: Tensor) -> None:
        self.by_mode = indices.long().T

    def at_leaves(self, group: NodeGroup) -> Tensor:
        """Indices of the modes."""
        return self.by_mode[group.modes]

    def join(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        """Row-major rows."""
        rows = parts[0]
        for part, size in zip(parts[1:], sizes[1:], strict=True):
            rows = rows * size + part
        return rows

    def look_up(self, table: Tensor, question: Tensor) -> Tensor:
        """Rows of the tables."""
        n, size, width = table.shape
        if n > 1:
            question = question + size * torch.arange(n, device=question.device).unsqueeze(1)
        # not advanced indexing: its gradient is several times slower
        return F.embedding(question, table.reshape(n * size, width))

    def worth_a_table(self, group: NodeGroup, weight: Tensor) -> bool:
        """Where the table has fewer rows than are asked for."""
        return group.size <= self.by_mode.shape[1] * (self.WRITTEN if weight.shape[2] == 1 else 1)


@final
class RankOneQuery(Query):
    """Inner products with rank-one tensors; a question is the vector ``(n, B, D)``.

    Args:
        vectors: One ``(B, D_n)`` per mode.
    """

    def __init__(self, vectors: Sequence[Tensor]) -> None:
        self.vectors = vectors

    def at_leaves(self, group: NodeGroup) -> Tensor:
        """Vectors of the modes."""
        return torch.stack([self.vectors[node[0]] for node in group.nodes])

    def join(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        """Their Kronecker products."""
        return reduce(lambda a, b: (a.unsqueeze(3) * b.unsqueeze(2)).flatten(2), parts)

    def look_up(self, table: Tensor, question: Tensor) -> Tensor:
        """Contractions with the tables."""
        return question @ table

    def worth_a_table(self, group: NodeGroup, weight: Tensor) -> bool:
        """Where a question is shorter than the components are many."""
        return 2 * group.size <= weight.shape[1] and group.size <= self.vectors[0].shape[0]


def answer(groups: Sequence[NodeGroup], query: Query) -> Tensor:
    """Answers of the root ``(B, outputs)``.

    Args:
        groups: Children before parents.
        query: What is asked.
    """
    questions: list[Tensor | None] = []
    tables: list[Tensor | None] = []
    answers: list[Tensor | None] = []
    for group in groups:
        weight = group.weight()
        question, table, value = None, None, None
        if group.leaf:
            question, table = query.at_leaves(group), weight
        elif all(tables[k] is not None for k in group.sources) and query.worth_a_table(group, weight):
            question = query.join(group.gather(questions), group.sizes)
            table = expand(group.gather(tables), weight)
        else:
            for k in group.sources:
                if answers[k] is None:
                    answers[k] = query.look_up(given(tables[k]), given(questions[k]))
            value = product(group.gather(answers)) @ weight
        questions.append(question)
        tables.append(table)
        answers.append(value)
    if answers[-1] is None:
        answers[-1] = query.look_up(given(tables[-1]), given(questions[-1]))
    return given(answers[-1])[0]
