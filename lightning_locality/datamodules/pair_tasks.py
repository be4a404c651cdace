"""DistantHalves: are the left and the right half, moved apart, of the same image?"""

from __future__ import annotations

__all__ = [
    "AbstractClassLaw",
    "Box",
    "DistantHalves",
    "IsGreater",
    "LabelledPairs",
    "SameClass",
    "SameParity",
    "draw_by_law",
]

from abc import abstractmethod
from typing import Any, Literal, NamedTuple, final, get_args

import torch
from torch import Tensor

from lightning_locality.datamodules.base import Split
from lightning_locality.datamodules.image_pairs import AbstractImagePairs, Box, Pairs, draw_pairs
from lightning_locality.datamodules.source_images import ClassImages


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


@final
class SameClass(AbstractImagePairs):
    r"""Two images at a horizontal distance on an empty canvas; label 1 if they are of the same class.

    A task that needs two far-apart regions: neither image alone tells anything about the label. Training
    and validation pairs are of the source's official training images, which are divided between the two;
    test pairs are of its official test images. Pair i of a split depends on ``seed``, on the split and on i
    alone. The defaults are the published experiment's (CIFAR-10, 32x32 images on 224x224, 5,000 training
    and 10,000 test pairs, normalised and then pasted on zeros), without two of its defects:
    ``distinct=False, validation_is_test=True`` brings them back.

    With images of s pixels and distance d on a canvas of height H and width W, the left image begins at
    column W//2 - s - d//2, the right one at s + d after that, both at row (H - s)//2. ``distractors=k`` (ours)
    puts k images of classes that say nothing in between.

    Source: Implicit Regularization in Hierarchical Tensor Factorization and Deep Convolutional Neural
    Networks (Noam Razin, Asaf Maman, Nadav Cohen, 2022), the experiments on "Is Same Class".

    The arguments are those of :class:`AbstractImagePairs`, where they are documented.

    Raises:
        UnknownSourceError: If there is no such source.
        ValueError: If the pair does not fit the canvas, or a number is out of its range.

    Example:
        >>> data = SameClass(source="cifar10", root="data", distance=160)
        >>> data.image_shape, data.num_classes
        ((3, 224, 224), 2)
        >>> data.boxes  # top, left, height, width
        ((96, 0, 32, 32), (96, 192, 32, 32))
    """

    @property
    def class_names(self) -> tuple[str, str]:
        """What the labels 0 and 1 mean."""
        return ("different", "same class")

    def pairs(self, split: Split) -> Pairs:
        """Pairs of a split, as indices into ``images(part(split))``; known after ``setup``."""
        left, right, *_, same = self.table(split)
        return Pairs(left, right, same)

    def draw_labelled(
        self, labels: Tensor, candidates: Tensor, size: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :func:`draw_pairs`."""
        return draw_pairs(labels, candidates, size, generator, distinct=self.distinct, balanced=self.balanced)


@final
class SameParity(AbstractClassLaw):
    r"""Two images at a distance; label 1 if the numbers of their classes are both even or both odd (ours).

    To compare the images is not enough: classes that look different may have the same label. The parity of the left
    image is a fair coin and so is the label; they fix the parity of the right one. A class is then uniform among the
    n(p) classes of its parity p. So a class c has probability 1 / (2 n(c mod 2)) on either side under either label,
    whatever classes are drawn from: one image alone says nothing about the label.

    The arguments are those of :class:`AbstractImagePairs`, with the defaults of :class:`SameClass`.

    Raises:
        UnknownSourceError: If there is no such source.
        ValueError: If the pair does not fit the canvas, a number is out of its range, or (at ``setup``) all classes
            are even or all are odd.

    Example:
        >>> data = SameParity(source="mnist", distance=96)
        >>> data.boxes
        ((96, 32, 32, 32), (96, 160, 32, 32))
        >>> data.law(torch.tensor([1, 3, 4]))[1]  # both odd, or both even
        tensor([[0.1250, 0.1250, 0.0000],
                [0.1250, 0.1250, 0.0000],
                [0.0000, 0.0000, 0.5000]], dtype=torch.float64)
    """

    @property
    def class_names(self) -> tuple[str, str]:
        """What the labels 0 and 1 mean."""
        return ("one even, one odd", "same parity")

    def law(self, classes: Tensor) -> Tensor:
        """Probability ``(2, C, C)`` of each left and right class given the label.

        Raises:
            ValueError: If there are no even or no odd classes.
        """
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


Order = Literal["circle", "line"]


@final
class IsGreater(AbstractClassLaw):
    r"""Two images at a distance; label 1 if the class number of the left one is ahead of the right one's (ours).

    The numbers are the places 0..C-1 of the C classes in ascending order; ties are excluded. On a line of numbers no
    choice of pairs hides the label from one image: E[left - right] is positive given label 1 and negative given
    label 0, so one of the two means, and with it one side's distribution, depends on the label (the largest is never
    the smaller one). Two orders are offered:

    ``circle``: the classes stand on a circle as numbers do on the face of a clock, and the left one is ahead if it
    follows the right one by 1 to (C-1)//2 steps. Digits: 3 is ahead of 1 and 9, and 8 is ahead of 6. Pairs
    are uniform among those with the label; C//2 steps are left out where C is even, and ties. Every class then has
    probability 1/C on either side under either label: one image alone says nothing.

    ``line``: left number > right number, for neighbours only: (k+1, k) or (k, k+1), k uniform. A side of a class in
    the middle says nothing; the smallest and the largest class do, and one image alone is right with probability
    1/2 + 1/(2(C-1)), 0.556 for ten classes. That is the least possible: the two differences of means add up to at
    least 2 steps, so one is at least 1, and a mean over C numbers moves by at most C-1 times the distance in total
    variation of the two distributions.

    Args:
        source: As for :class:`SameClass`.
        order: ``circle``: ahead by less than half of the circle of classes; ``line``: the greater of two neighbours.
        options: The other arguments of :class:`AbstractImagePairs`, by name, with the defaults of :class:`SameClass`;
            ``distinct`` has no effect, as the classes are never the same.

    Raises:
        UnknownSourceError: If there is no such source.
        ValueError: If the pair does not fit the canvas, a number is out of its range, or (at ``setup``) there are
            fewer than three classes.

    Example:
        >>> data = IsGreater(source="mnist", distance=96)
        >>> data.law(torch.arange(3))[1] * 3  # 1 is ahead of 0, 2 of 1, 0 of 2
        tensor([[0., 0., 1.],
                [1., 0., 0.],
                [0., 1., 0.]], dtype=torch.float64)
    """

    def __init__(self, source: str = "cifar10", *, order: Order = "circle", **options: Any) -> None:
        super().__init__(source, **options)
        if order not in get_args(Order):
            raise ValueError(f"order must be one of {', '.join(get_args(Order))}, got {order!r}")
        self.order = order

    @property
    def class_names(self) -> tuple[str, str]:
        """What the labels 0 and 1 mean."""
        return ("behind", "ahead") if self.order == "circle" else ("smaller", "greater")

    def law(self, classes: Tensor) -> Tensor:
        """Probability ``(2, C, C)`` of each left and right class given the label.

        Raises:
            ValueError: If there are fewer than three classes, of which one image would tell the label.
        """
        count = len(classes)
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
