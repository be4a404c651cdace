"""Images grouped by their class, for drawing some of given classes."""

from __future__ import annotations

__all__ = ["ClassImages"]

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClassImages:
    """Images by class. A class is meant by its place among the classes that are there, in ascending order.

    Args:
        classes: Class numbers, ascending ``(C,)``.
        counts: Images of each ``(C,)``.
        by_class: Indices of the images, those of one class beside each other ``(K,)``.

    Example:
        >>> images = ClassImages.of(labels=torch.tensor([3, 5, 3]), candidates=torch.arange(3))
        >>> images.classes.tolist(), images.one(torch.tensor([0, 0, 1]), torch.tensor([0.0, 0.9, 0.5])).tolist()
        ([3, 5], [0, 2, 1])
    """

    classes: Tensor
    counts: Tensor
    by_class: Tensor

    @classmethod
    def of(cls, labels: Tensor, candidates: Tensor) -> Self:
        """Group the images ``candidates`` ``(K,)`` by their ``labels`` ``(M,)``, in the order in which they come."""
        own = labels[candidates]
        classes, counts = torch.unique(own, return_counts=True)
        return cls(classes, counts, candidates[own.argsort(stable=True)])

    def one(self, kind: Tensor, uniform: Tensor) -> Tensor:
        """Image of each class ``kind`` ``(N,)`` that a number from [0, 1) ``(N,)``, in float64, picks: ``(N,)``."""
        return self._image(kind, (uniform * self.counts[kind]).long())

    def two(
        self, kinds: tuple[Tensor, Tensor], uniform: tuple[Tensor, Tensor], distinct: bool
    ) -> tuple[Tensor, Tensor]:
        """An image of each of two classes; where ``distinct``, two images also where the classes are the same."""
        left, right = kinds
        place = (uniform[0] * self.counts[left]).long()
        excluded = ((left == right) & distinct).long()
        other = (uniform[1] * (self.counts[right] - excluded)).long()
        other = other + excluded * (other >= place)
        return self._image(left, place), self._image(right, other)

    def refuse_lonely(self, meets_itself: Tensor) -> None:
        """Raise a ValueError if a class of those marked in ``(C,)`` has a single image, and no second one beside it."""
        lonely = self.classes[(self.counts < 2) & meets_itself]
        if len(lonely):
            raise ValueError(
                f"classes {lonely.tolist()} have a single image to draw from, so no pair of two distinct images: leave "
                "them out (classes=...), hold out another share, or set distinct=False"
            )

    def _image(self, kind: Tensor, place: Tensor) -> Tensor:
        first = self.counts.cumsum(0) - self.counts
        return self.by_class[first[kind] + place]
