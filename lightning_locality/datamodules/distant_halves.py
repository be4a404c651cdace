"""DistantHalves: are the left and the right half, moved apart, of the same image?"""

from __future__ import annotations

__all__ = ["DistantHalves"]

from typing import Any, Literal, final, get_args

import torch
from torch import Tensor

from lightning_locality.datamodules.class_law import AbstractClassLaw

Negatives = Literal["any", "same_class"]


@final
class DistantHalves(AbstractClassLaw):
    r"""The left half of an image and a right half at a distance; label 1 if it is the same image's (ours).

    The left half is of a uniform image of a uniform class. A positive right half is of the same image. A negative one
    is of another image: of a class drawn anew (``any``) or of the same class (``same_class``), which is harder, as the
    class of the halves then says nothing. Either way the right half, too, is of a uniform image of a uniform class
    under both labels: one half alone, its borders included, says nothing about the label. At distance 0 the halves
    touch, and a positive pair is the image itself.

    Args:
        source: As for :class:`SameClass`.
        negatives: The other image of a negative pair: of ``any`` class, or of the ``same_class``.
        options: The other arguments of :class:`AbstractImagePairs`, by name, with the defaults of :class:`SameClass`.
            ``image_size`` is that of the whole image and must be even; distractors are left and right halves of other
            draws in turn; ``distinct=False`` lets a negative pair be of one image by chance.

    Raises:
        UnknownSourceError: If there is no such source.
        ValueError: If the halves do not fit the canvas, or a number is out of its range.

    Example:
        >>> data = DistantHalves(source="cifar10", distance=160)
        >>> data.boxes  # top, left, height, width
        ((96, 16, 32, 16), (96, 192, 32, 16))
    """

    def __init__(self, source: str = "cifar10", *, negatives: Negatives = "any", **options: Any) -> None:
        super().__init__(source, **options)
        if negatives not in get_args(Negatives):
            raise ValueError(f"negatives must be one of {', '.join(get_args(Negatives))}, got {negatives!r}")
        self.negatives = negatives

    @property
    def class_names(self) -> tuple[str, str]:
        """What the labels 0 and 1 mean."""
        return ("two images", "same image")

    @property
    def columns(self) -> tuple[slice, slice]:
        """The left and the right half.

        Raises:
            ValueError: If the image has no middle.
        """
        if self.image_size % 2:
            raise ValueError(f"image_size must be even, to be halved, got {self.image_size}")
        half = self.image_size // 2
        return slice(0, half), slice(half, 2 * half)

    def law(self, classes: Tensor) -> Tensor:
        """Probability ``(2, C, C)`` of each left and right class given the label."""
        count = len(classes)
        same = torch.eye(count, dtype=torch.float64) / count
        return torch.stack([same if self.negatives == "same_class" else torch.full_like(same, 1 / count**2), same])

    def draw_labelled(
        self, labels: Tensor, candidates: Tensor, size: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """By the law, with the same image on both sides of a positive pair."""
        left, right, label = super().draw_labelled(labels, candidates, size, generator)
        return left, torch.where(label == 1, left, right), label
