"""SameParity: are the class numbers of two far-apart images both even or both odd?"""

from __future__ import annotations

__all__ = ["SameParity"]

from typing import final

import torch
from torch import Tensor

from lightning_locality.datamodules.class_law import AbstractClassLaw


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
