"""IsSameClass: do two far-apart images on one canvas show the same class?"""

from __future__ import annotations

__all__ = ["Box", "SameClass"]

from typing import final

import torch
from torch import Tensor

from lightning_locality.datamodules.base import Split
from lightning_locality.datamodules.image_pairs import AbstractImagePairs, Box
from lightning_locality.datamodules.pairs import Pairs, draw_pairs


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
