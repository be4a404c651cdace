"""Low-rank tensors to be recovered."""

from __future__ import annotations

__all__ = ["TargetFormat", "planted_tensor"]

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch

from lightning_locality.tensors.cp import CP
from lightning_locality.tensors.deep_matrix import DeepMatrix
from lightning_locality.tensors.factorization import Factorization, per_mode
from lightning_locality.tensors.hierarchical import HierarchicalTensorFactorization
from lightning_locality.tensors.mode_tree import ModeTree, node_name
from lightning_locality.tensors.tensor_train import TensorTrain
from lightning_locality.tensors.tucker import Tucker

TargetFormat = Literal["matrix", "cp", "tucker", "tt", "ht"]


def planted_tensor(
    target: TargetFormat,
    shape: Sequence[int],
    rank: int | Sequence[int],
    tree: ModeTree | None = None,
    norm: float = 1.0,
    seed: int = 0,
) -> Factorization:
    r"""A tensor of given rank and Frobenius norm: all weights N(0, 1), then scaled by one number.

    The ranks are those numbers exactly, with probability one: of the matrix; CP rank at most; of the Tucker
    matricisations; of the tensor train's bonds; or local components of a hierarchical tensor, which bound the
    ranks at the children of their nodes.

    Source: the laws for ``matrix`` (:math:`U V^\top`), ``cp`` and ``ht`` are those of Implicit Regularization in
    Hierarchical Tensor Factorization and Deep Convolutional Neural Networks (Noam Razin, Asaf Maman, Nadav Cohen,
    2022); ``tucker`` and ``tt`` follow the same rule, which is ours.

    Args:
        target: The format.
        shape: Sizes of the modes.
        rank: ``matrix``, ``cp``: a number. ``tucker``: one for all modes or one each. ``tt``: likewise for the
            bonds. ``ht``: one for all levels of interior nodes or one each, from the bottom up.
        tree: Of ``ht``; None for the perfect binary one that merges neighbours.
        norm: Frobenius norm.
        seed: Of the weights.

    Returns:
        The factorisation, in float64 on the CPU, not to be trained.

    Raises:
        ValueError: A rank that no tensor of this shape has or needs, a tree of another order, a norm that is not
            positive.

    Example:
        >>> tensor = planted_tensor("tucker", (3, 4, 5), rank=(1, 2, 2), norm=7.0).to_tensor()
        >>> round(tensor.norm().item(), 12), torch.linalg.matrix_rank(tensor.flatten(1)).item()
        (7.0, 1)
    """
    if target not in get_args(TargetFormat):
        raise ValueError(f"target must be one of {', '.join(get_args(TargetFormat))}, got {target!r}")
    if len(shape) == 0 or min(shape) < 1:
        raise ValueError(f"shape must hold sizes of at least 1, got {tuple(shape)}")
    order, number = len(shape), per_mode("rank", rank, 1) if target in ("matrix", "cp") else ()
    if tree is not None and target != "ht":
        raise ValueError(f"tree belongs to target 'ht', got one with target {target!r}: leave it out")
    law: dict[str, Any] = {"init_scale": 1.0, "seed": seed, "dtype": torch.float64, "device": "cpu"}
    planted: Factorization
    match target:
        case "matrix":
            if order != 2:
                raise ValueError(f"shape of target 'matrix' must hold 2 sizes, got {tuple(shape)}")
            _check("rank", number[0], min(shape))
            planted = DeepMatrix(shape, depth=2, hidden=number[0], **law)
        case "cp":
            _check("rank", number[0], math.prod(shape) // max(shape))
            planted = CP(shape, number[0], **law)
        case "tucker":
            ranks = per_mode("rank", rank, order)
            for mode, here in enumerate(ranks):
                _check(f"rank of mode {mode}", here, min(shape[mode], math.prod(ranks) // here))
            planted = Tucker(shape, ranks, **law)
        case "tt":
            bonds = (1, *per_mode("rank", rank, order - 1), 1)
            for bond in range(1, order):
                left, right = bonds[bond - 1] * shape[bond - 1], bonds[bond + 1] * shape[bond]
                _check(f"rank of bond {bond}", bonds[bond], min(left, right))
            planted = TensorTrain(shape, bonds[1:-1], **law)
        case "ht":
            tree = ModeTree.perfect(order) if tree is None else tree
            if tree.order != order:
                raise ValueError(
                    f"tree has {tree.order} modes, shape has {order} sizes ({tuple(shape)}): give a tree of that order"
                )
            widths = _widths(tree, shape, rank)
            planted = HierarchicalTensorFactorization(tree, shape, widths, **law)
    planted.normalize_(norm)
    return planted.requires_grad_(False)


def _check(name: str, value: int, largest: int) -> None:
    if value > largest:
        raise ValueError(
            f"{name} must be at most {largest}: with this shape (and the other ranks) more adds nothing, got {value}"
        )


def _widths(tree: ModeTree, shape: Sequence[int], rank: int | Sequence[int]) -> dict[tuple[int, ...], int]:
    """Local components of every interior node, which are a CP decomposition over its children and its parent."""
    ranks = per_mode("rank", rank, len(tree.levels))
    widths = {node: width for level, width in zip(tree.levels, ranks, strict=True) for node in level}
    for node, width in widths.items():
        sizes = [1 if node == tree.root else widths[tree.parent(node)]]
        for child in tree.children(node):
            entries = math.prod(shape[mode] for mode in child)
            # the vectors of a child span no more dimensions than it has components
            sizes.append(min(entries, widths.get(child, entries)))
        _check(f"rank at node {node_name(node)}", width, math.prod(sizes) // max(sizes))
    return widths
