"""Dependence between the two sides of labelled data at the nodes of a tree of features or pixels.

M samples, N modes (features, or pixels with all their channels), A the modes of a node, A^c the others, C channels,
H height, W width.
"""

from __future__ import annotations

__all__ = ["data_alignment", "data_entanglement", "data_spectra", "pixel_tree"]

import math
from collections.abc import Iterator
from functools import reduce
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from lightning_locality.arguments import checked
from lightning_locality.ranks.conversion import as_tensor
from lightning_locality.ranks.gram import all_but_one
from lightning_locality.ranks.spectra import NodeSpectra, entanglement_entropy
from lightning_locality.tensors.mode_tree import ModeTree, Node

_EPS = torch.finfo(torch.float64).eps
_MAX_NODES = 32  # 4 levels of a binary tree, 2 of quadrants: those the paper averages over
_MAX_ENTRIES = 2**24  # of a chunk of Gramians: 128 MiB


@checked
def pixel_tree(height: int, width: int, levels: int = 2) -> ModeTree:
    """The tree of an image's quadrants, their quadrants and so on; the modes are the pixels, row by row.

    An odd side has its larger half at the end, a single pixel is not halved. After ``levels`` levels of quadrants, the
    pixels are the children of the last ones. Fewer than two pixels, or no levels, raise a ValueError.

    Example:
        >>> pixel_tree(2, 4, levels=1).interior[:-1]
        ((0, 1), (2, 3), (4, 5), (6, 7))
    """
    if min(height, width) < 1 or height * width < 2:
        raise ValueError(f"height and width must hold at least two pixels, got {height} x {width}")
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")

    def halves(side: range) -> list[range]:
        middle = len(side) // 2
        return [side[:middle], side[middle:]] if middle else [side]

    nodes, blocks = list[list[int]](), [(range(height), range(width))]
    for _ in range(levels):
        blocks = [(rows, columns) for above in blocks for rows in halves(above[0]) for columns in halves(above[1])]
        nodes += [[row * width + column for row in rows for column in columns] for rows, columns in blocks]
    return ModeTree(nodes)


def _checked_samples(samples: Tensor, tree: ModeTree | None, theta: float) -> tuple[Tensor, ModeTree]:
    """Samples as ``(N, C, M)`` in float64, and their tree."""
    samples = as_tensor(samples, "samples")
    if samples.ndim not in (2, 4) or len(samples) < 2:
        raise ValueError(
            f"samples must be features (M, N) or images (M, C, H, W), at least two samples, got {tuple(samples.shape)}"
        )
    if not samples.is_floating_point():
        raise ValueError(
            f"samples must be floating, got {samples.dtype}: scale them to units of about 1, bytes by images / 255"
        )
    if bad := int((~samples.isfinite()).sum()):
        raise ValueError(f"samples must be finite, and {bad} of {samples.numel()} values are not")
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
    """Every measured node, parents first, with the Gramians ``(M, M)`` of its own modes and of all others.

    One sweep up and one down, for samples ``(N, C, M)``. Diagonals are 1: an entry that underflows is 0 in comparison.
    """
    if levels is not None and levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")
    families = _families(tree, levels)
    angles = math.pi * theta * modes
    embedded = torch.stack([angles.cos(), angles.sin()], -1)
    inner = dict[Node, Tensor]()
    for node in reversed(list(chain(*families.values()))):
        if node in families:
            inner[node] = reduce(torch.mul, [inner[child] for child in families[node]])
        else:
            inner[node] = _product(embedded[list(node)].flatten(0, 1))
    del embedded
    outer = {tree.root: torch.ones_like(next(iter(inner.values())))}
    for node, children in families.items():
        products = all_but_one(outer.pop(node), [inner[child] for child in children], torch.mul)
        for child, others in zip(children, products, strict=True):
            if child in families:
                outer[child] = others
            yield child, inner[child], others


def _families(tree: ModeTree, levels: int | None) -> dict[Node, tuple[Node, ...]]:
    """Nodes -> their measured children, parents first; without levels at most 32 children, or all of the root's."""
    families = level = {tree.root: tree.children(tree.root)}
    for _ in range(1, tree.order if levels is None else levels):
        level = {node: tree.children(node) for node in chain(*level.values()) if tree.children(node)}
        if not level or (levels is None and len(list(chain(*families.values(), *level.values()))) > _MAX_NODES):
            break
        families = families | level
    return families


def _product(embedded: Tensor) -> Tensor:
    """Hadamard product of the Gramians of embedded features ``(F, M, 2)``."""
    count = embedded.shape[1]
    product = torch.ones(count, count, dtype=embedded.dtype, device=embedded.device)
    step = max(1, _MAX_ENTRIES // count**2)
    for start in range(0, len(embedded), step):
        chunk = embedded[start : start + step]
        product *= (chunk @ chunk.mT).prod(0)
    return product


@checked
def data_spectra(
    samples: Tensor,
    labels: Tensor,
    tree: ModeTree | None = None,
    *,
    theta: float = 0.085,
    levels: int | None = None,
    positive: int | None = None,
) -> NodeSpectra:
    r"""Singular values of the empirical data tensor at the nodes of a tree, without the tensor.

    .. math:: \mathcal{D} = \frac1M \sum_m y_m \bigotimes_n \phi(x_n^m), \qquad
        \phi(x) = (\cos \pi\theta x, \sin \pi\theta x)

    .. math:: \sigma_A = \sigma \bigl( G_A^{1/2} \operatorname{diag}(y) \, G_{A^c}^{1/2} \bigr) / M, \qquad
        (G_A)_{mm'} = \prod_{n \in A} \cos \pi\theta (x_n^m - x_n^{m'})

    Source: "What Makes Data Suitable for a Locally Connected Neural Network? A Necessary and Sufficient Condition
    Based on Quantum Entanglement" (Alexander, De La Vega, Razin, Cohen, 2023). Several channels of a pixel are one mode
    with the tensor product of their embeddings (ours). Time is O(M^2) per feature and O(M^3) per node, memory 16 M^2
    bytes per node; the paper uses a thousand samples.

    Args:
        samples: Features ``(M, N)``, or images ``(M, C, H, W)`` whose modes are the pixels, row by row; floating,
            scaled to a range or standard deviation of about 1.
        labels: ``(M,)``: bool, 0 and 1, or -1 and 1; or classes, with ``positive``.
        tree: Over the modes; None: the perfect binary tree for features, :func:`pixel_tree` for images.
        theta: Angle of the embedding per unit of the samples, in half turns.
        levels: Number of levels measured below the root; None: as many as have at most 32 nodes, and at least one.
        positive: The class to tell from the rest.

    Returns:
        For every node but the root, larger nodes first, its singular values above rounding: about 1e-7, the square
        root of that of a Gramian.

    Raises:
        ValueError: If an argument is of another kind, shape or range, or if samples are not finite.

    Example:
        >>> samples = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
        >>> data_spectra(samples, torch.tensor([1, 1]), theta=0.5)[(0,)].round(decimals=6).tolist()
        [0.5, 0.5]
    """
    modes, tree = _checked_samples(samples, tree, theta)
    signs = _signs(labels, positive, modes)
    count = len(signs)
    values, tolerance = dict[Node, Tensor](), dict[Node, float]()
    for node, inner, outer in sample_gramians(modes, tree, levels, theta):
        other = tree.complement(node)
        if other in values:
            # the two children of a binary root share one matrix up to transposition
            values[node], tolerance[node] = values[other].clone(), tolerance[other]
            continue
        (left, left_norm), (right, right_norm) = _root(inner), _root(outer)
        found = torch.linalg.svdvals((left * signs) @ right.mT) / count
        rounding = math.sqrt(count * _EPS) * left_norm * right_norm / count
        largest = float(found[0])
        # if the samples cancel, the remainder is rounding
        values[node] = found if largest > rounding else torch.zeros_like(found)
        tolerance[node] = min(1.0, rounding / largest) if largest else 1.0
    return NodeSpectra(values, tolerance)


@checked
def data_entanglement(
    samples: Tensor,
    labels: Tensor,
    tree: ModeTree | None = None,
    *,
    theta: float = 0.085,
    levels: int | None = None,
    positive: int | None = None,
    order: Literal[1, 2] = 1,
) -> dict[Node, float]:
    r"""Entanglement of labelled data under the canonical partitions of a tree, in nats.

    .. math:: S_1 = -\sum_k q_k \ln q_k, \qquad S_2 = -\ln \sum_k q_k^2
        = \ln \frac{(y^\top (G_A \circ G_{A^c}) \, y)^2}{\operatorname{tr} (Y G_A Y G_{A^c})^2}, \qquad
        q_k = \sigma_k^2 / \sum_l \sigma_l^2

    with ``Y = diag(y)``, and the rest and the source as in :func:`data_spectra`. Low entanglement at all nodes is
    necessary and sufficient for a locally connected (tree) network to fit the data. Order 1 is the paper's; order 2,
    whose exponential is the participation ratio, needs no decomposition and is never above order 1.

    The arguments and errors are those of :func:`data_spectra`, and ``order``: 1 for the entropy of the spectrum, 2 for
    the Rényi-2 entropy. The result is 0 for a product and for data that cancel, and at most ln min(M, dimensions).
    Numbers can be compared at one angle and one M only: see docs/measuring.md.

    Example:
        >>> samples = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
        >>> entropies = data_entanglement(samples, torch.tensor([True, False]), theta=0.5)
        >>> {node: round(math.exp(value), 6) for node, value in entropies.items()}
        {(0,): 2.0, (1,): 2.0}
    """
    if order == 1:
        spectra = data_spectra(samples, labels, tree, theta=theta, levels=levels, positive=positive)
        return {node: float(entanglement_entropy(values)) for node, values in spectra.items()}
    modes, tree = _checked_samples(samples, tree, theta)
    signs = _signs(labels, positive, modes)
    found = dict[Node, float]()
    for node, inner, outer in sample_gramians(modes, tree, levels, theta):
        both = inner * outer
        total = float(signs @ both @ signs)
        crossing = (inner * signs) @ (outer * signs)
        rounding = len(signs) * _EPS * float(both.abs().sum())
        purity = float((crossing * crossing.mT).sum()) / total**2 if total > rounding else 1.0
        found[node] = max(0.0, -math.log(purity))
    return found


@checked
def data_alignment(
    samples: Tensor, tree: ModeTree | None = None, *, theta: float = 0.085, levels: int | None = None
) -> dict[Node, float]:
    r"""Debiased centred kernel alignment of the two sides of every canonical partition: 0 if independent.

    .. math:: \frac{\operatorname{HSIC}_u(G_A, G_{A^c})}
        {\sqrt{\operatorname{HSIC}_u(G_A, G_A) \operatorname{HSIC}_u(G_{A^c}, G_{A^c})}}, \qquad
        \operatorname{HSIC}_u(K, L) = \frac{\langle \tilde K, \tilde L \rangle}{M (M - 3)}

    with the Gramians of :func:`data_spectra` and the U-centred :math:`\tilde K`, which makes the estimate unbiased.
    Sources: "Feature Selection via Dependence Maximization" (Song, Smola, Gretton, Bedo, Borgwardt, 2012); alignment
    "Similarity of Neural Network Representations Revisited" (Kornblith, Norouzi, Lee, Hinton, 2019).

    It measures how much one side of the samples tells about the other, and needs no labels. Time and memory are O(M^2)
    per node. The arguments and errors are those of :func:`data_spectra`, with at least 4 samples; the result is between
    -1 and 1, and 0 if one side is constant.

    Example:
        >>> x = torch.linspace(0.0, 1.0, 8)
        >>> {node: round(value, 6) for node, value in data_alignment(torch.stack([x, 1 - x], 1)).items()}
        {(0,): 1.0, (1,): 1.0}
    """
    modes, tree = _checked_samples(samples, tree, theta)
    if len(samples) < 4:
        raise ValueError(f"samples must be at least 4 for an unbiased estimate, got {len(samples)}")
    found = dict[Node, float]()
    for node, inner, outer in sample_gramians(modes, tree, levels, theta):
        (left, left_norm), (right, right_norm) = _centred(inner), _centred(outer)
        scale = left_norm * right_norm
        found[node] = float((left * right).sum()) / scale if scale else 0.0
    return found


def _signs(labels: Tensor, positive: int | None, modes: Tensor) -> Tensor:
    """Labels as -1 and 1, in float64 on the samples' device."""
    labels = as_tensor(labels, "labels")
    if labels.shape != modes.shape[2:]:
        raise ValueError(f"labels must be ({modes.shape[2]},), one for every sample, got {tuple(labels.shape)}")
    values = set(labels.tolist())
    if positive is not None:
        if positive not in values:
            raise ValueError(f"positive must be one of the labels, got {positive}: they are {sorted(values)}")
        labels = labels == positive
    elif not (values <= {0, 1} or values <= {-1, 1}):
        raise ValueError(
            f"labels must be 0 and 1, or -1 and 1, got {sorted(values)}: name the class to tell from the rest with "
            "positive=..."
        )
    return torch.where(labels > 0, 1.0, -1.0).to(modes)


def _root(gramian: Tensor) -> tuple[Tensor, float]:
    """A factor ``(R, M)`` with this Gramian, without directions below rounding, and its spectral norm."""
    values, vectors = torch.linalg.eigh(gramian)
    kept = values > len(values) * _EPS * values[-1]
    return (vectors[:, kept] * values[kept].sqrt()).mT, math.sqrt(float(values[-1]))


def _centred(gramian: Tensor) -> tuple[Tensor, float]:
    """The U-centred kernel and its Frobenius norm, which is 0 if the kernel is constant up to rounding."""
    count = len(gramian)
    off = gramian.clone().fill_diagonal_(0)
    sums = off.sum(0)
    centred = off - (sums + sums.unsqueeze(1)) / (count - 2) + sums.sum() / ((count - 1) * (count - 2))
    norm = float(centred.fill_diagonal_(0).norm())
    return centred, norm if norm > 100 * _EPS * float(off.norm()) else 0.0
