"""Tasks of two distant images: SameClass, SameParity, IsGreater, DistantHalves."""

from __future__ import annotations

__all__ = ["AbstractLabelConditionalPairs", "DistantHalves", "IsGreater", "SameClass", "SameParity"]

from abc import abstractmethod
from typing import Any, Literal, final

import torch
from torch import Tensor

from lightning_locality.datamodules.image_pairs import AbstractImagePairs, Pairs
from lightning_locality.datamodules.source_images import ClassImages

Order = Literal["circle", "line"]
Negatives = Literal["any", "same_class"]


class AbstractLabelConditionalPairs(AbstractImagePairs):
    """A pair task defined by the law of the two classes given the label; arguments of :class:`AbstractImagePairs`."""

    @abstractmethod
    def law(self, classes: Tensor) -> Tensor:
        """Probability ``(2, C, C)``, float64, of each left and right class, of ascending ``(C,)``, given the label."""

    def sample_pairs(self, labels: Tensor, candidates: Tensor, size: int, generator: torch.Generator) -> Pairs:
        """Sample the label by a fair coin, the two classes given the label, then a uniform image of each class.

        If a class is as likely on one side under label 0 as under label 1, the image on that side is independent of the
        label: given its class it is uniform, even if ``distinct`` forbids pairing an image with itself.
        """
        images = ClassImages(labels, candidates)
        law, count = self.law(images.classes), len(images.classes)
        # written so that NaN is rejected
        if law.shape != (2, count, count) or not ((law >= 0).all() and (law.sum((1, 2)) - 1).abs().max() < 1e-6):
            raise ValueError(
                f"law must be a table of probabilities of {count}x{count} classes, which sum to 1, for each of two "
                f"labels; got shape {tuple(law.shape)}: {law.tolist()}"
            )
        if self.distinct:
            images.require_two_images((law.diagonal(dim1=1, dim2=2) > 0).any(0))
        # columns: coin, the two classes, left image, right image; float64 resolves every image index
        uniform = torch.rand((size, 4), dtype=torch.float64, generator=generator).unbind(1)
        label = _coin(uniform[0], self.balanced)
        # a cell of probability 0 adds nothing to the sum and is never the first above the uniform number
        sums = law.to(torch.float64).flatten(1).cumsum(1)
        sums = sums / sums[:, -1:]
        point = uniform[1].contiguous()
        negative, positive = (torch.searchsorted(row, point, right=True) for row in sums)
        cell = torch.where(label == 1, positive, negative)
        return Pairs(*images.two(cell // count, cell % count, (uniform[2], uniform[3]), self.distinct), label)


def _coin(uniform: Tensor, balanced: bool) -> Tensor:
    """Labels ``(N,)`` from uniform numbers; if balanced, one of pairs 0 and 1, of 2 and 3, and so on is positive."""
    label = (uniform < 0.5).long()
    if balanced:
        label[1::2] = 1 - label[::2][: len(label) // 2]
    return label


@final
class SameClass(AbstractImagePairs):
    r"""Two images at a horizontal distance on an empty canvas; label 1 if they are of the same class.

    A task that needs two distant regions: neither image alone tells anything about the label. The defaults are the
    published experiment's (CIFAR-10, 32x32 images on 224x224, 5,000 training and 10,000 test pairs, normalised and
    then pasted on zeros), without two of its defects: ``distinct=False, validation_is_test=True`` restores them. The
    arguments and errors are those of :class:`AbstractImagePairs`.

    Source: Implicit Regularization in Hierarchical Tensor Factorization and Deep Convolutional Neural
    Networks (Noam Razin, Asaf Maman, Nadav Cohen, 2022), the experiments on "Is Same Class".

    Example:
        >>> SameClass(source="cifar10", root="data", distance=160).boxes  # top, left, height, width
        ((96, 0, 32, 32), (96, 192, 32, 32))
    """

    class_names = ("different", "same class")

    def sample_pairs(self, labels: Tensor, candidates: Tensor, size: int, generator: torch.Generator) -> Pairs:
        """Sample the label by a fair coin, a uniform class, its own or a uniform other class, then an image of each."""
        images = ClassImages(labels, candidates)
        number = len(images.classes)
        if number < 2:
            raise ValueError(f"pairs need at least 2 classes, got {images.classes.tolist()}")
        if self.distinct:
            images.require_two_images(torch.ones(number, dtype=torch.bool))
        # columns: coin, left class, right class, left image, right image; float64 resolves every image index
        uniform = torch.rand((size, 5), dtype=torch.float64, generator=generator).unbind(1)
        label = _coin(uniform[0], self.balanced)
        left = (uniform[1] * number).long()
        other = (uniform[2] * (number - 1)).long()
        other = other + (other >= left)
        right = torch.where(label == 1, left, other)
        return Pairs(*images.two(left, right, (uniform[3], uniform[4]), self.distinct), label)


@final
class SameParity(AbstractLabelConditionalPairs):
    r"""Two images at a distance; label 1 if their class numbers are both even or both odd (ours).

    Comparing the images is not enough: classes that look different may share a label. The parity of the left image is
    a fair coin, and a class is uniform among those of its parity, so one image alone says nothing about the label
    (proof in data/README.md). Arguments and errors are those of :class:`AbstractImagePairs`; ``setup`` also raises
    ValueError if all classes are even or all are odd.

    Example:
        >>> data = SameParity(source="mnist", distance=96)
        >>> data.law(torch.tensor([1, 3, 4]))[1]  # both odd, or both even
        tensor([[0.1250, 0.1250, 0.0000],
                [0.1250, 0.1250, 0.0000],
                [0.0000, 0.0000, 0.5000]], dtype=torch.float64)
    """

    class_names = ("one even, one odd", "same parity")

    def law(self, classes: Tensor) -> Tensor:
        """Probability ``(2, C, C)`` of each left and right class given the label."""
        odd = classes % 2 == 1
        count = torch.stack([~odd, odd]).sum(1)
        if count.min() == 0:
            raise ValueError(
                f"classes {classes.tolist()} are all {'odd' if odd.all() else 'even'}: give classes of both parities"
            )
        one = 1 / count[odd.long()].to(torch.float64)
        pair = one[:, None] * one / 2
        same = odd[:, None] == odd
        return torch.stack([pair * ~same, pair * same])


@final
class IsGreater(AbstractLabelConditionalPairs):
    r"""Two images at a distance; label 1 if the class number of the left one is ahead of the right one's (ours).

    The numbers are the ranks 0..C-1 of the C classes in ascending order; ties are excluded. Proofs in data/README.md.

    ``circle``: the classes are arranged like the numbers of a clock face, and the left one is ahead if it follows the
    right one by 1 to (C-1)//2 steps. Digits: 3 is ahead of 1 and 9, and 8 is ahead of 6. Pairs are uniform among those
    with the label; for even C, opposite classes are excluded. One image alone says nothing.

    ``line``: left number > right number, for neighbours only: (k+1, k) or (k, k+1), k uniform. One image alone is right
    with probability 1/2 + 1/(2(C-1)), 0.556 for ten classes, the least that is possible on a line.

    Args:
        source: ``cifar10``, ``mnist``, ``digits``, ``folder:PATH``, ..., see :class:`AbstractImagePairs`.
        order: ``circle``: ahead by less than half of the circle of classes; ``line``: the greater of two neighbours.
        options: Further arguments of :class:`AbstractImagePairs`; ``distinct`` has no effect, as the classes differ.

    Raises:
        ValueError: As for :class:`AbstractImagePairs`, or an unknown ``order``; at ``setup``: fewer than three classes.

    Example:
        >>> data = IsGreater(source="mnist", distance=96)
        >>> data.law(torch.arange(3))[1] * 3  # 1 is ahead of 0, 2 of 1, 0 of 2
        tensor([[0., 0., 1.],
                [1., 0., 0.],
                [0., 1., 0.]], dtype=torch.float64)
    """

    def __init__(self, source: str = "cifar10", *, order: Order = "circle", **options: Any) -> None:
        super().__init__(source, **options)
        self.order = order
        self.class_names = ("behind", "ahead") if order == "circle" else ("smaller", "greater")

    def law(self, classes: Tensor) -> Tensor:
        """Probability ``(2, C, C)`` of each left and right class given the label."""
        count = len(classes)
        # of two classes, one image would tell the label
        if count < 3:
            raise ValueError(f"IsGreater needs at least 3 classes, got {classes.tolist()}: give more")
        place = torch.arange(count)
        steps = place[:, None] - place
        if self.order == "line":
            ahead = steps == 1
        else:
            steps = steps % count
            ahead = (steps >= 1) & (steps <= (count - 1) // 2)
        greater = ahead.to(torch.float64) / ahead.sum()
        return torch.stack([greater.T, greater])


@final
class DistantHalves(AbstractLabelConditionalPairs):
    r"""The left half of an image and a right half at a distance; label 1 if they come from the same image (ours).

    Each half is from a uniform image of a uniform class under both labels: one half alone, its borders included, says
    nothing about the label. At distance 0 the halves touch, and a positive pair is the image itself.

    Args:
        source: ``cifar10``, ``mnist``, ``digits``, ``folder:PATH``, ..., see :class:`AbstractImagePairs`.
        negatives: Class of the other image of a negative pair: ``any``, or ``same_class``, which is harder because the
            class of the halves then says nothing.
        options: Further arguments of :class:`AbstractImagePairs`. ``image_size`` is that of the whole image and must be
            even; distractors are alternately left and right halves; ``distinct=False`` allows a negative pair to come
            from one image by chance.

    Raises:
        ValueError: As for :class:`AbstractImagePairs`, or unknown ``negatives``, or an odd ``image_size``.

    Example:
        >>> DistantHalves(source="cifar10", distance=160).boxes  # top, left, height, width
        ((96, 16, 32, 16), (96, 192, 32, 16))
    """

    class_names = ("two images", "same image")

    def __init__(self, source: str = "cifar10", *, negatives: Negatives = "any", **options: Any) -> None:
        super().__init__(source, **options)
        self.negatives = negatives

    @property
    def columns(self) -> tuple[slice, slice]:
        """The left and the right half; ValueError if ``image_size`` is odd."""
        if self.image_size % 2:
            raise ValueError(f"image_size must be even, to be halved, got {self.image_size}")
        half = self.image_size // 2
        return slice(0, half), slice(half, 2 * half)

    def law(self, classes: Tensor) -> Tensor:
        """Probability ``(2, C, C)`` of each left and right class given the label."""
        count = len(classes)
        same = torch.eye(count, dtype=torch.float64) / count
        return torch.stack([same if self.negatives == "same_class" else torch.full_like(same, 1 / count**2), same])

    def sample_pairs(self, labels: Tensor, candidates: Tensor, size: int, generator: torch.Generator) -> Pairs:
        """Sample by the law, with the same image on both sides of a positive pair."""
        left, right, label = super().sample_pairs(labels, candidates, size, generator)
        return Pairs(left, torch.where(label == 1, left, right), label)
