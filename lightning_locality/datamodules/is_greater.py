"""IsGreater: is the class number of the left one of two far-apart images ahead of the right one's?"""

from __future__ import annotations

__all__ = ["IsGreater"]

from typing import Any, Literal, final, get_args

import torch
from torch import Tensor

from lightning_locality.datamodules.class_law import AbstractClassLaw

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
