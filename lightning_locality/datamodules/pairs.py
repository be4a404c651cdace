"""Random pairs of images of the same or of different classes, all drawn at once."""

from __future__ import annotations

__all__ = ["Pairs", "draw_pairs"]

from typing import NamedTuple

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """Pairs of images: indices ``(N,)`` of the left and the right one, and whether their class is the same."""

    left: Tensor
    right: Tensor
    same: Tensor


def draw_pairs(
    labels: Tensor,
    candidates: Tensor,
    size: int,
    generator: torch.Generator,
    *,
    distinct: bool = True,
    balanced: bool = False,
) -> Pairs:
    """Random pairs of images of the same class or of two classes.

    A positive pair: the class uniform, then two images of it. A negative pair: the first class uniform, the
    second uniform among the others, then an image of each. Pair i takes row i of the generator's stream, so
    more pairs begin with the same pairs.

    Args:
        labels: Class of every image ``(M,)``.
        candidates: Indices of the images that may be drawn ``(K,)``.
        size: Number of pairs.
        generator: Source of randomness, on the CPU.
        distinct: The two images of a positive pair are two images; if not, they may be the same one.
        balanced: Of pairs 0 and 1, 2 and 3, and so on exactly one is positive; if not, each by a fair coin.

    Raises:
        ValueError: If there are fewer than two classes, or ``distinct`` and a class has a single image.
    """
    classes, counts = torch.unique(labels[candidates], return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"pairs need at least 2 classes, got {classes.tolist()}")
    if distinct and counts.min() < 2:
        lonely = classes[counts < 2].tolist()
        raise ValueError(
            f"classes {lonely} have a single image to draw from, so no pair of two distinct images: leave them "
            "out (classes=...), hold out another share, or set distinct=False"
        )
    # images of class k: by_class[first[k] : first[k] + counts[k]]
    by_class = candidates[labels[candidates].argsort(stable=True)]
    first = counts.cumsum(0) - counts
    # columns: coin, left class, right class, left image, right image; float64 resolves every image index
    uniform = torch.rand((size, 5), dtype=torch.float64, generator=generator).unbind(1)
    positive = uniform[0] < 0.5
    if balanced:
        positive[1::2] = ~positive[::2][: size // 2]
    left_class = _up_to(uniform[1], torch.tensor(len(classes)))
    other = _up_to(uniform[2], torch.tensor(len(classes) - 1))
    other = other + (other >= left_class)
    right_class = torch.where(positive, left_class, other)
    left = _up_to(uniform[3], counts[left_class])
    excluded = positive & distinct
    right = _up_to(uniform[4], counts[right_class] - excluded.long())
    right = right + (excluded & (right >= left))
    return Pairs(by_class[first[left_class] + left], by_class[first[right_class] + right], positive.long())


def _up_to(uniform: Tensor, count: Tensor) -> Tensor:
    return (uniform * count).long()
