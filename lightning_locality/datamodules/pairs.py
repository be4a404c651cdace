"""Random pairs of images of the same or of different classes, all drawn at once."""

from __future__ import annotations

__all__ = ["Pairs", "draw_pairs"]

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_locality.datamodules.class_images import ClassImages


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
    images = ClassImages.of(labels, candidates)
    number = len(images.classes)
    if number < 2:
        raise ValueError(f"pairs need at least 2 classes, got {images.classes.tolist()}")
    if distinct:
        images.refuse_lonely(torch.ones(number, dtype=torch.bool))
    # columns: coin, left class, right class, left image, right image; float64 resolves every image index
    uniform = torch.rand((size, 5), dtype=torch.float64, generator=generator).unbind(1)
    positive = uniform[0] < 0.5
    if balanced:
        positive[1::2] = ~positive[::2][: size // 2]
    left = (uniform[1] * number).long()
    other = (uniform[2] * (number - 1)).long()
    other = other + (other >= left)
    right = torch.where(positive, left, other)
    return Pairs(*images.two((left, right), (uniform[3], uniform[4]), distinct), positive.long())
