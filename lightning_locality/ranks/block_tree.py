"""A network as a tensor over many blocks of pixels: all of it, or the ranks of its matricisations."""

from __future__ import annotations

__all__ = ["grid_tensor", "tree_separation"]

import torch
from torch import Tensor

from lightning_locality.arguments import checked
from lightning_locality.ranks.conversion import as_tensor
from lightning_locality.ranks.evaluation import Evaluation
from lightning_locality.ranks.masks import checked_mask
from lightning_locality.ranks.spectra import ROUNDING, NodeSpectra
from lightning_locality.ranks.splice import Network, SplicedNetwork, spliced
from lightning_locality.tensors.mode_tree import ModeTree, Node

_MAX_POINTS = 2**22  # forward passes of a grid: beyond, submatrices say the same


@checked
def grid_tensor(model: Network, templates: Tensor, blocks: Tensor, *, evaluation: Evaluation | None = None) -> Tensor:
    r"""Outputs for all combinations of templates in the blocks of an image.

    .. math:: \mathcal{A}_{d_1 \dots d_P c} = f_c \bigl( x_1^{(d_1)}, \dots, x_P^{(d_P)} \bigr)

    The grid tensor of "On the Expressive Power of Deep Learning: A Tensor Analysis" (Cohen, Sharir, Shashua, 2016),
    with whole images as templates: block p of template d is put into block p. It is ``(K, ..., K, outputs)`` with P
    modes before the outputs, in float64 on the model's device; :func:`dense_spectra` gives its ranks.

    Args:
        model: Module, or function of networks in evaluation mode: ``(n, C, H, W)`` to ``(n,)`` or ``(n, outputs)``.
        templates: ``(K, C, H, W)``.
        blocks: ``(P, H, W)``, boolean; every pixel is in one of them, as in :func:`blocks`.
        evaluation: How the network is evaluated; None: the default.

    Raises:
        ValueError: More than 2^22 combinations, blocks that are not a partition, or a model that does not fit.

    Example:
        >>> product = lambda x: x.flatten(1).prod(1)
        >>> templates = torch.tensor([1.0, 2.0])[:, None, None, None].expand(2, 1, 1, 3)
        >>> grid_tensor(product, templates, torch.eye(3, dtype=torch.bool)[:, None]).flatten().int().tolist()
        [1, 2, 2, 4, 2, 4, 4, 8]
    """
    templates, blocks = as_tensor(templates, "templates"), as_tensor(blocks, "blocks")
    labels, parts, number = _labels(blocks, templates), len(blocks), len(templates)
    if number**parts > _MAX_POINTS:
        raise ValueError(
            f"templates and blocks make {number}^{parts} combinations, more than {_MAX_POINTS}: use fewer of either, "
            "or tree_separation, which takes a few thousand of them"
        )
    with spliced(model, templates, labels, evaluation) as network:
        places = number ** torch.arange(parts - 1, -1, -1, device=network.device)
        values = network.map(lambda rows: rows[:, None] // places % number, number**parts)
    return values.reshape(*(number,) * parts, -1)


@checked
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

    The rank of a submatrix is that of the matricisation (generically) if it is below k: raise ``size`` until no rank
    equals it. A binary tree of P blocks takes at most (2 P - 3) k^2 forward passes, and 256 for the noise, while the
    grid tensor takes K^P. Several outputs of one column are put side by side. Values are divided by the root of the
    number of entries; their tolerance is three times the Frobenius norm of the change when the images move by one unit
    in the last place, or of the outputs' own rounding.

    Args:
        model: Module, or function of networks in evaluation mode: ``(n, C, H, W)`` to ``(n,)`` or ``(n, outputs)``.
        images: ``(K, C, H, W)``, from which the contents are taken.
        blocks: ``(P, H, W)``, boolean; every pixel is in one of them, as in :func:`blocks`.
        tree: Over the blocks.
        size: Rows and columns k of the submatrices; a node of few blocks may have fewer contents.
        joint: Take all blocks of a row, and of a column, from one image: nearly real images, with one seam. Otherwise
            every block is sampled independently, as in the grid tensor.
        seed: Seed of the samples.
        evaluation: How the network is evaluated; None: the default.

    Raises:
        ValueError: A size, a tree or a model that does not fit, or blocks that are not a partition.

    Example:
        >>> pairs = lambda x: x[:, 0, 0, 0] * x[:, 0, 0, 1] + x[:, 0, 0, 2] * x[:, 0, 0, 3]
        >>> images, columns = torch.randn(8, 1, 1, 4), torch.eye(4, dtype=torch.bool)[:, None]
        >>> tree_separation(pairs, images, columns, ModeTree.perfect(4), size=6).ranks()
        {(0,): 2, (1,): 2, (2,): 2, (3,): 2, (0, 1): 2, (2, 3): 2}
    """
    images, blocks = as_tensor(images, "images"), as_tensor(blocks, "blocks")
    labels, parts = _labels(blocks, images), len(blocks)
    if tree.order != parts:
        raise ValueError(f"tree must have as many modes as there are blocks, {parts}, got {tree.order}")
    if size < 2 or (joint and size > len(images)):
        raise ValueError(
            f"size must be at least 2 and, with joint=True, at most the {len(images)} images, got {size}: give more "
            "images, or joint=False"
        )
    generator = torch.Generator().manual_seed(int(seed))
    cuts = {node: (node, tree.complement(node)) for node in tree.nodes[:-1]}
    # a node and its complement have one matrix, read from either side
    distinct = dict.fromkeys(min(cut, cut[::-1]) for cut in cuts.values())
    sample = lambda side: _sample_contents(len(side), len(images), size, joint, generator)
    contents = {cut: tuple(map(sample, cut)) for cut in distinct}
    # combinations that several nodes share are evaluated once
    everything = torch.cat([_crossed(rows, columns, cut).flatten(0, 1) for cut, (rows, columns) in contents.items()])
    choices, places = torch.unique(everything, dim=0, return_inverse=True)
    with spliced(model, images, labels, evaluation) as network:
        choices = choices.to(network.device)
        values = network.map(lambda rows: choices[rows], len(choices))
        noise = _noise(network, choices, values, generator)
    counts = [len(rows) * len(columns) for rows, columns in contents.values()]
    matrices = dict[tuple[Node, Node], Tensor]()
    for (cut, (rows, columns)), part in zip(contents.items(), places.to(values.device).split(counts), strict=True):
        matrix = values[part].reshape(len(rows), len(columns), -1) / len(part) ** 0.5
        matrices |= {cut: matrix, cut[::-1]: matrix.transpose(0, 1)}
    spectra = {node: torch.linalg.svdvals(matrices[cut].flatten(1).mT) for node, cut in cuts.items()}
    largest = {node: float(spectrum[0]) for node, spectrum in spectra.items()}
    tolerance = {node: max(ROUNDING, 3 * noise / value) if value > 0 else ROUNDING for node, value in largest.items()}
    return NodeSpectra(spectra, tolerance)


def _labels(blocks: Tensor, images: Tensor) -> Tensor:
    """Return the number of the block that every pixel is in."""
    if blocks.ndim != 3 or len(blocks) < 2:
        raise ValueError(f"blocks must be boolean (P, H, W) with two blocks or more, got {tuple(blocks.shape)}")
    for k, block in enumerate(blocks):
        checked_mask(block, images, f"blocks[{k}]")
    if bad := int((blocks.sum(0) != 1).sum()):
        raise ValueError(f"blocks must hold every pixel once, and {bad} pixels are in none or in several")
    return blocks.long().argmax(0)


def _sample_contents(parts: int, number: int, size: int, joint: bool, generator: torch.Generator) -> Tensor:
    """Return image numbers ``(k, parts)`` for the blocks of one side of a cut, all rows different."""
    if joint:
        return torch.randperm(number, generator=generator)[:size, None].expand(-1, parts)
    if number**parts <= 4 * size:  # as many as there are
        rows = torch.randperm(number**parts, generator=generator)[:size, None]
        return rows // number ** torch.arange(parts) % number
    found = torch.empty(0, parts, dtype=torch.int64)
    while len(found) < size:
        more = torch.randint(number, (size, parts), generator=generator)
        found = torch.unique(torch.cat([found, more]), dim=0)
    return found[torch.randperm(len(found), generator=generator)[:size]]


def _crossed(rows: Tensor, columns: Tensor, cut: tuple[Node, Node]) -> Tensor:
    """Return the choices ``(k, l, P)`` of all pairs of a row and a column."""
    choices = rows.new_empty(len(rows), len(columns), rows.shape[1] + columns.shape[1])
    choices[..., list(cut[0])] = rows[:, None]
    choices[..., list(cut[1])] = columns[None]
    return choices


def _noise(network: SplicedNetwork, choices: Tensor, values: Tensor, generator: torch.Generator) -> float:
    """Effect of rounding, at least that of the outputs; root mean square over 256 points, summed over outputs."""
    some = torch.randperm(len(choices), generator=generator)[:256].to(choices.device)
    seed = int(torch.randint(2**31, (), generator=generator))
    moved = network.map(lambda rows: choices[some[rows]], len(some), rounding_seed=seed) - values[some]
    return max(float(change.square().sum(1).mean().sqrt()) for change in (moved, network.eps * values))
