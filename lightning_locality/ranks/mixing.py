"""A network's outputs when one block of pixels comes from one image and the rest from another."""

from __future__ import annotations

__all__ = ["mixing_matrix"]

import torch
from torch import Tensor

from lightning_locality.ranks.composites import Composites, Network, composites
from lightning_locality.ranks.evaluation import Evaluation
from lightning_locality.ranks.masks import checked_mask


def mixing_matrix(
    model: Network, images_i: Tensor, images_j: Tensor, mask: Tensor, *, evaluation: Evaluation | None = None
) -> Tensor:
    r"""Outputs for all pairs of a block I and its complement J.

    .. math:: F_{ijc} = f_c \bigl( x_I^{(i)}, x_J^{(j)} \bigr)

    If f is a sum of R products of a function of block I and one of block J, the rank of F is at most R, and R for
    enough samples. F over the root of K L approaches the operator between functions of either block whose kernel is f.

    Args:
        model: Module, or function of networks in evaluation mode; takes ``(n, C, H, W)``, gives ``(n,)`` or
            ``(n, outputs)``; left as it was.
        images_i: Where block I is taken from, ``(K, C, H, W)``.
        images_j: Where block J is taken from, ``(L, C, H, W)``.
        mask: ``(H, W)``, True in block I.
        evaluation: How the network is evaluated; None: the default.

    Returns:
        ``(K, L, outputs)`` in float64, on the model's device. It takes K L forward passes.

    Raises:
        ValueError: Images of different sizes, a mask that does not fit them or covers all or nothing, a model that
            does not take them, or outputs that are not finite.

    Example:
        >>> class Product(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x[:, 0, 0, 0] * x[:, 0, 0, 1]
        >>> images = torch.tensor([1.0, 2.0, 3.0])[:, None, None, None].expand(3, 1, 1, 2)
        >>> mixing_matrix(Product(), images, images, torch.tensor([[True, False]]))[..., 0].int().tolist()
        [[1, 2, 3], [2, 4, 6], [3, 6, 9]]
    """
    mask = checked_mask(mask, images_i)
    if images_j.ndim != 4 or images_i.shape[1:] != images_j.shape[1:] or not len(images_i) or not len(images_j):
        raise ValueError(
            "images_i and images_j must be images (B, C, H, W) of one size, at least one each, got "
            f"{tuple(images_i.shape)} and {tuple(images_j.shape)}"
        )
    images = torch.cat([images_i, images_j.to(images_i)])
    with composites(model, images, (~mask).long(), evaluation) as network:
        return paired(network, len(images_i), len(images_j))


def paired(
    network: Composites, rows: int, columns: int, start: int = 0, nudge: int | None = None, behind: int | None = None
) -> Tensor:
    """Outputs ``(K, L, C)``: block 0 from images start, start + 1, ..., block 1 from those that follow.

    Args:
        network: With two blocks.
        rows: K.
        columns: L.
        start: The first image.
        nudge: See :meth:`Composites.map`.
        behind: From which image on block 1 is taken; None: start + K.
    """
    behind = start + rows if behind is None else behind
    values = network.map(
        lambda k: torch.stack([start + k // columns, behind + k % columns], dim=1), rows * columns, nudge
    )
    return values.reshape(rows, columns, -1)
