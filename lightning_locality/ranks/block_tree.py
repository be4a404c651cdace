"""A network as a tensor over many blocks of pixels: all of it, or the ranks of its matricisations."""

from __future__ import annotations

__all__ = ["grid_tensor", "tree_separation"]

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_locality.ranks.composites import Composites, Network, composites
from lightning_locality.ranks.evaluation import Evaluation
from lightning_locality.ranks.masks import checked_mask
from lightning_locality.ranks.spectra import ROUNDING, NodeSpectra
from lightning_locality.tensors.mode_tree import ModeTree, Node

# forward passes that a grid may take: with more, submatrices say the same
MOST_POINTS = 2**22
# points at which rounding is looked at
NOISE_POINTS = 256


def grid_tensor(model: Network, templates: Tensor, blocks: Tensor, *, evaluation: Evaluation | None = None) -> Tensor:
    r"""Outputs for all combinations of templates in the blocks of an image.

    .. math:: \mathcal{A}_{d_1 \dots d_P c} = f_c \bigl( x_1^{(d_1)}, \dots, x_P^{(d_P)} \bigr)

    The grid tensor of "On the Expressive Power of Deep Learning: A Tensor Analysis" (Cohen, Sharir, Shashua, 2016),
    with whole images as templates: block p of template d is put into block p. :func:`dense_spectra` gives its ranks.

    Args:
        model: Module, or function of networks in evaluation mode; takes ``(n, C, H, W)``, gives ``(n,)`` or
            ``(n, outputs)``; left as it was.
        templates: ``(K, C, H, W)``.
        blocks: ``(P, H, W)``, boolean; every pixel is in one of them, as in :func:`blocks`.
        evaluation: How the network is evaluated; None: the default.

    Returns:
        ``(K, ..., K, outputs)`` with P modes before the outputs, in float64 on the model's device.

    Raises:
        ValueError: More than 2^22 combinations, blocks that are not a partition, a model that does not take the images,
            or outputs that are not finite.

    Example:
        >>> class Product(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x.flatten(1).prod(1)
        >>> templates = torch.tensor([1.0, 2.0])[:, None, None, None].expand(2, 1, 1, 3)
        >>> grid_tensor(Product(), templates, torch.eye(3, dtype=torch.bool)[:, None]).flatten().int().tolist()
        [1, 2, 2, 4, 2, 4, 4, 8]
    """
    labels, parts, number = _labels(blocks, templates), len(blocks), len(templates)
    if number**parts > MOST_POINTS:
        raise ValueError(
            f"templates and blocks make {number}^{parts} combinations, more than {MOST_POINTS}: use fewer of either, "
            "or tree_separation, which takes a few thousand of them"
        )
    with composites(model, templates, labels, evaluation) as network:
        places = number ** torch.arange(parts - 1, -1, -1, device=network.device)
        values = network.map(lambda rows: rows[:, None] // places % number, number**parts)
    return values.reshape(*(number,) * parts, -1)


def tree_separation(
    model: Network,
    images: Tensor,
    blocks: Tensor,
    tree: ModeTree,
    size: int,
    *,
    joint: bool = True,
    seed: int = 0,
    evaluation: Evaluation | None = None,
) -> NodeSpectra:
    r"""Singular values of a random submatrix of every matricisation of the grid tensor.

    For a node with the set I of blocks, rows are contents of the blocks in I and columns contents of the others:

    .. math:: F_{ij} = f \bigl( x_I^{(i)}, x_{I^c}^{(j)} \bigr), \qquad i, j = 1, \dots, k

    The rank of a submatrix is that of the matricisation (generically) if it is below k, else k: raise ``size`` until no
    rank equals it. A binary tree of P blocks takes at most (2 P - 3) k^2 forward passes, and 256 for the noise, where
    the grid tensor takes K^P. Of several outputs, those of one column are put side by side.

    Args:
        model: Module, or function of networks in evaluation mode; takes ``(n, C, H, W)``, gives ``(n,)`` or
            ``(n, outputs)``; left as it was.
        images: ``(K, C, H, W)``, where the contents are taken from.
        blocks: ``(P, H, W)``, boolean; every pixel is in one of them, as in :func:`blocks`.
        tree: Over the blocks.
        size: Rows and columns k of the submatrices; a node of few blocks may have no more contents than it has rows.
        joint: A row takes all blocks of I from one image, a column the others from one image: nearly real images, with
            one seam. Otherwise every block is drawn by itself, as in the grid tensor.
        seed: Of what is drawn.
        evaluation: How the network is evaluated; None: the default.

    Returns:
        For every node but the root its singular values, over the root of the number of rows and columns. Their
        tolerance is three times the Frobenius norm of what moving the images by one unit in the last place changes, or
        of the outputs' own rounding.

    Raises:
        ValueError: A tree of another order than there are blocks, blocks that are not a partition, a size below 2 or,
            with ``joint``, above the number of images, a model that does not take the images, or outputs that are not
            finite.

    Example:
        >>> class Pairs(torch.nn.Module):
        ...     def forward(self, x):
        ...         a, b, c, d = x.flatten(1).unbind(1)
        ...         return a * b + c * d
        >>> images, columns = torch.randn(8, 1, 1, 4), torch.eye(4, dtype=torch.bool)[:, None]
        >>> tree_separation(Pairs(), images, columns, ModeTree.perfect(4), size=6).ranks()
        {(0,): 2, (1,): 2, (2,): 2, (3,): 2, (0, 1): 2, (2, 3): 2}
    """
    labels, parts = _labels(blocks, images), len(blocks)
    if tree.order != parts:
        raise ValueError(f"tree must have as many modes as there are blocks, {parts}, got {tree.order}")
    if size < 2 or (joint and size > len(images)):
        raise ValueError(
            f"size must be at least 2 and, with joint=True, at most the {len(images)} images, got {size}: give more "
            "images, or joint=False"
        )
    generator = torch.Generator().manual_seed(seed)
    cuts = {node: (node, tree.complement(node)) for node in tree.nodes[:-1]}
    # a node and its complement have one matrix, read from either side
    different = dict.fromkeys(min(cut, cut[::-1]) for cut in cuts.values())
    drawn = {cut: _contents(cut, len(images), size, joint, generator) for cut in different}
    # combinations that several nodes ask for are evaluated once
    everything = torch.cat([_crossed(*drawn[cut], cut).flatten(0, 1) for cut in drawn])
    choices, places = torch.unique(everything, dim=0, return_inverse=True)
    with composites(model, images, labels, evaluation) as network:
        values = network.map(_taking(choices, network), len(choices))
        noise = _noise(network, choices, values, generator)
    counts = [len(rows) * len(columns) for rows, columns in drawn.values()]
    matrices = dict(zip(drawn, places.to(values.device).split(counts), strict=True))
    spectra, tolerance = dict[Node, Tensor](), dict[Node, float]()
    for node, cut in cuts.items():
        known = cut if cut in drawn else cut[::-1]
        rows, columns = map(len, drawn[known])
        matrix = values[matrices[known]].reshape(rows, columns, -1)
        matrix = (matrix if cut in drawn else matrix.transpose(0, 1)) / (rows * columns) ** 0.5
        spectra[node] = torch.linalg.svdvals(matrix.flatten(1).mT)
        largest = float(spectra[node][0])
        tolerance[node] = max(ROUNDING, 3 * noise / largest) if largest > 0 else ROUNDING
    return NodeSpectra(spectra, tolerance)


def _labels(blocks: Tensor, images: Tensor) -> Tensor:
    """Number of the block that every pixel is in."""
    if blocks.ndim != 3 or len(blocks) < 2:
        raise ValueError(f"blocks must be boolean (P, H, W) with two blocks or more, got {tuple(blocks.shape)}")
    for k, block in enumerate(blocks):
        checked_mask(block, images, f"blocks[{k}]")
    times = blocks.sum(0)
    if bad := int((times != 1).sum()):
        raise ValueError(f"blocks must hold every pixel once, and {bad} pixels are in none or in several")
    return blocks.long().argmax(0)


def _contents(
    cut: tuple[Node, Node], number: int, size: int, joint: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Image numbers of the blocks on either side: rows ``(k, |I|)`` and columns ``(k, P - |I|)``."""
    first, second = (_side(len(side), number, size, joint, generator) for side in cut)
    return first, second


def _side(parts: int, number: int, size: int, joint: bool, generator: torch.Generator) -> Tensor:
    if joint:
        return torch.randperm(number, generator=generator)[:size, None].expand(-1, parts)
    if number**parts <= 4 * size:
        # all different, of those there are
        rows = torch.randperm(number**parts, generator=generator)[:size, None]
        return rows // number ** torch.arange(parts) % number
    found = torch.randint(number, (0, parts))
    while len(found) < size:
        more = torch.randint(number, (size, parts), generator=generator)
        found = torch.unique(torch.cat([found, more]), dim=0)
    return found[torch.randperm(len(found), generator=generator)[:size]]


def _crossed(rows: Tensor, columns: Tensor, cut: tuple[Node, Node]) -> Tensor:
    """Choices ``(k, l, P)`` of all pairs of a row and a column."""
    choices = rows.new_empty(len(rows), len(columns), rows.shape[1] + columns.shape[1])
    choices[..., list(cut[0])] = rows[:, None]
    choices[..., list(cut[1])] = columns[None]
    return choices


def _taking(choices: Tensor, network: Composites) -> Callable[[Tensor], Tensor]:
    choices = choices.to(network.device)
    return lambda rows: choices[rows]


def _noise(network: Composites, choices: Tensor, values: Tensor, generator: torch.Generator) -> float:
    """What rounding changes, at least that of the outputs; root mean square over the points, summed over outputs."""
    some = torch.randperm(len(choices), generator=generator)[:NOISE_POINTS]
    seed = int(torch.randint(2**31, (), generator=generator))
    moved = network.map(_taking(choices[some], network), len(some), nudge=seed) - values[some.to(values.device)]
    rounded = network.eps * values
    return max(float(change.square().sum(1).mean().sqrt()) for change in (moved, rounded))
