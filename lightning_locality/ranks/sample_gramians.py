"""Gramians of samples, embedded mode by mode, on both sides of the nodes of a tree.

Legend: M samples, N modes (features, or pixels with all their channels), C channels, H height, W width.
"""

from __future__ import annotations

__all__ = ["checked_samples", "pixel_tree", "sample_gramians"]

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_locality.tensors.mode_tree import ModeTree, Node

_MOST_NODES = 32  # 4 levels of a binary tree, 2 of quadrants: what the paper averages over
_MOST_ENTRIES = 2**24  # of a chunk of Gramians: 128 MiB


def pixel_tree(height: int, width: int, levels: int = 2) -> ModeTree:
    r"""The tree of an image's quadrants, their quadrants and so on; the modes are the pixels, row by row.

    A side that is odd leaves its larger half at the end; one of a single pixel is no longer halved.

    Args:
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        levels: How often quadrants are made; the pixels hang below the last ones.

    Raises:
        ValueError: An image of one pixel or fewer, or no level.

    Example:
        >>> pixel_tree(2, 4, levels=1).interior[:-1]
        ((0, 1), (2, 3), (4, 5), (6, 7))
    """
    if min(height, width) < 1 or height * width < 2:
        raise ValueError(f"height and width must hold at least two pixels, got {height} x {width}")
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")
    nodes: list[list[int]] = [[pixel] for pixel in range(height * width)]
    blocks = [(range(height), range(width))]
    for _ in range(levels):
        blocks = [(rows, columns) for above in blocks for rows in _halved(above[0]) for columns in _halved(above[1])]
        nodes += [[row * width + column for row in rows for column in columns] for rows, columns in blocks]
    return ModeTree(nodes)


def checked_samples(samples: Tensor, tree: ModeTree | None, theta: float) -> tuple[Tensor, ModeTree]:
    """Samples as ``(N, C, M)`` in float64, and their tree; arguments and errors as in ``ranks.data``."""
    if samples.ndim not in (2, 4) or len(samples) < 2:
        raise ValueError(
            f"samples must be features (M, N) or images (M, C, H, W), two samples at least, got {tuple(samples.shape)}"
        )
    if not samples.is_floating_point():
        raise ValueError(
            f"samples must be floating, got {samples.dtype}: scale them to units of about 1, bytes by images / 255"
        )
    unknown = int((~samples.isfinite()).sum())
    if unknown:
        raise ValueError(f"samples must be finite, and {unknown} of {samples.numel()} values are not")
    if not 0 < theta < math.inf:
        raise ValueError(f"theta must be a positive angle in half turns per unit, got {theta}")
    modes = (samples.unsqueeze(1) if samples.ndim == 2 else samples.flatten(2)).detach().double().permute(2, 1, 0)
    if tree is None:
        tree = ModeTree.perfect(len(modes)) if samples.ndim == 2 else pixel_tree(*samples.shape[2:])
    if tree.order != len(modes):
        raise ValueError(
            f"tree has order {tree.order} and samples of shape {tuple(samples.shape)} have {len(modes)} modes "
            "(the features, or the pixels with all their channels)"
        )
    return modes, tree


def sample_gramians(
    modes: Tensor, tree: ModeTree, levels: int | None, theta: float
) -> Iterator[tuple[Node, Tensor, Tensor]]:
    r"""Every measured node, parents first, with the Gramians ``(M, M)`` of its own modes and of all others.

    .. math:: (G_A)_{mm'} = \prod_{n \in A} \cos \pi\theta (x_n^m - x_n^{m'})

    One sweep up and one down. Diagonals are 1: an entry that underflows is 0 beside them, and no logarithm is needed.

    Args:
        modes: Samples ``(N, C, M)``; the embedding of a mode is the tensor product of its channels'.
        tree: Of order N.
        levels: How far down from the root; None: while there are at most 32 nodes, and at least one level.
        theta: Angle per unit of the samples, in half turns.

    Raises:
        ValueError: No level.
    """
    if levels is not None and levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")
    measured = _measured(tree, levels)
    angles = math.pi * theta * modes
    embedded = torch.stack([angles.cos(), angles.sin()], -1)
    inner = dict[Node, Tensor]()
    for depth, nodes in reversed(list(enumerate(measured, 1))):
        for node in nodes:
            children = tree.children(node) if depth < len(measured) else ()
            if children:
                inner[node] = inner[children[0]].clone()
                for child in children[1:]:
                    inner[node] *= inner[child]
            else:
                inner[node] = _product(embedded[list(node)].flatten(0, 1))
    del embedded
    parents = dict.fromkeys((tree.root, *(node for nodes in measured[:-1] for node in nodes)))
    outer: dict[Node, Tensor | None] = {tree.root: None}
    for node in parents:
        children, before = tree.children(node), outer.pop(node)
        # products of the siblings before and behind, never a division: entries may be 0
        behind: list[Tensor | None] = [None]
        for child in reversed(children[1:]):
            behind.append(_times(behind[-1], inner[child]))
        for child in children:
            rest = behind.pop()
            others = before if rest is None else _times(before, rest)
            assert others is not None
            if child in parents:
                outer[child] = others
            yield child, inner[child], others
            before = _times(before, inner[child])


def _measured(tree: ModeTree, levels: int | None) -> list[tuple[Node, ...]]:
    """Nodes by their depth below the root."""
    measured, below = list[tuple[Node, ...]](), tree.children(tree.root)
    while below and (levels is None or len(measured) < levels):
        if levels is None and measured and sum(map(len, measured)) + len(below) > _MOST_NODES:
            break
        measured.append(below)
        below = tuple(child for node in below for child in tree.children(node))
    return measured


def _times(factor: Tensor | None, other: Tensor) -> Tensor:
    return other if factor is None else factor * other


def _product(embedded: Tensor) -> Tensor:
    """Hadamard product of the Gramians of embedded features ``(F, M, 2)``."""
    count = embedded.shape[1]
    product = torch.ones(count, count, dtype=embedded.dtype, device=embedded.device)
    step = max(1, _MOST_ENTRIES // count**2)
    for start in range(0, len(embedded), step):
        chunk = embedded[start : start + step]
        product *= (chunk @ chunk.mT).prod(0)
    return product


def _halved(side: range) -> tuple[range, ...]:
    middle = len(side) // 2
    return (side[:middle], side[middle:]) if middle else (side,)
