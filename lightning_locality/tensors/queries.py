"""Entries and inner products of a hierarchical factorisation, by one batched operation per group of nodes."""

from __future__ import annotations

__all__ = ["EntryQuery", "Query", "RankOneQuery", "answer", "expand", "product"]

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import reduce
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_locality.tensors.node_groups import NodeGroup, given


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
