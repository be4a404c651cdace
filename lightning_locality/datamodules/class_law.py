"""Pairs whose classes follow a written-out law given the label, so that what one image tells can be computed."""

from __future__ import annotations

__all__ = ["AbstractClassLaw", "LabelledPairs", "draw_by_law"]

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_locality.datamodules.base import Split
from lightning_locality.datamodules.class_images import ClassImages
from lightning_locality.datamodules.image_pairs import AbstractImagePairs


class LabelledPairs(NamedTuple):
    """Pairs of images: indices ``(N,)`` of the left and the right one, and labels."""

    left: Tensor
    right: Tensor
    label: Tensor


def draw_by_law(
    labels: Tensor,
    candidates: Tensor,
    size: int,
    generator: torch.Generator,
    law: Tensor,
    *,
    distinct: bool = True,
    balanced: bool = False,
) -> LabelledPairs:
    """Random pairs: the label a fair coin, then the two classes by the law, then a uniform image of each.

    Where each class of a side is as likely under label 0 as under label 1, the image of that side is independent of
    the label: given its class it is uniform, also where ``distinct`` forbids the pair of an image with itself. Pair i
    takes row i of the generator's stream, so more pairs begin with the same pairs.

    Args:
        labels: Class of every image ``(M,)``.
        candidates: Indices of the images that may be drawn ``(K,)``.
        size: Number of pairs.
        generator: Source of randomness, on the CPU.
        law: ``(2, C, C)``: for each label the probability of every left and right class, in ascending order of the
            classes of the candidates.
        distinct: Two images of one class are two images; if not, they may be the same one.
        balanced: Of pairs 0 and 1, 2 and 3, and so on exactly one is positive; if not, each by a fair coin.

    Raises:
        ValueError: If the law is none, or ``distinct`` and a class that meets itself has a single image.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> law = torch.tensor([[[0.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]]])
        >>> left, right, label = draw_by_law(torch.tensor([4, 7]), torch.arange(2), 100, generator, law)
        >>> torch.equal(left, label), torch.equal(right, 1 - label)
        (True, True)
    """
    images = ClassImages.of(labels, candidates)
    count = len(images.classes)
    # written so that a law with NaN is refused
    if law.shape != (2, count, count) or not ((law >= 0).all() and (law.sum((1, 2)) - 1).abs().max() < 1e-6):
        raise ValueError(
            f"law must be a table of probabilities of {count}x{count} classes, which sum to 1, for each of two labels; "
            f"got shape {tuple(law.shape)}: {law.tolist()}"
        )
    if distinct:
        images.refuse_lonely((law.diagonal(dim1=1, dim2=2) > 0).any(0))
    # columns: coin, the two classes, left image, right image; float64 resolves every image index
    uniform = torch.rand((size, 4), dtype=torch.float64, generator=generator).unbind(1)
    label = (uniform[0] < 0.5).long()
    if balanced:
        label[1::2] = 1 - label[::2][: size // 2]
    # a cell of probability 0 adds nothing to the sum and is never the first above the uniform number
    sums = law.to(torch.float64).flatten(1).cumsum(1)
    sums = sums / sums[:, -1:]
    point = uniform[1].contiguous()
    negative, positive = (torch.searchsorted(row, point, right=True) for row in sums)
    cell = torch.where(label == 1, positive, negative)
    return LabelledPairs(*images.two((cell // count, cell % count), (uniform[2], uniform[3]), distinct), label)


class AbstractClassLaw(AbstractImagePairs):
    """A pair task by its law: which two classes are drawn given the label; arguments as :class:`AbstractImagePairs`."""

    @abstractmethod
    def law(self, classes: Tensor) -> Tensor:
        """Probability of each left and right class given the label.

        Args:
            classes: Class numbers that are drawn, ascending, ``(C,)``.

        Returns:
            ``(2, C, C)``, float64: label, left class, right class.

        Raises:
            ValueError: If the task cannot be made of these classes.
        """

    def pairs(self, split: Split) -> LabelledPairs:
        """Pairs of a split, as indices into ``images(part(split))``; known after ``setup``."""
        left, right, *_, label = self.table(split)
        return LabelledPairs(left, right, label)

    def draw_labelled(
        self, labels: Tensor, candidates: Tensor, size: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :func:`draw_by_law`."""
        law = self.law(torch.unique(labels[candidates]))
        return draw_by_law(labels, candidates, size, generator, law, distinct=self.distinct, balanced=self.balanced)
