"""Parameters of a Pathfinder picture, with the values of the published experiment."""

from __future__ import annotations

__all__ = ["PathfinderCurves"]

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

_SMALLEST = {"path_length": 2}
_SMALLEST |= dict.fromkeys(("window", "size", "seed_distance", "paddle_length", "paddle_thickness"), 1)
_SMALLEST |= dict.fromkeys(("antialias", "marker_radius", "distractor_length"), 1)
_SMALLEST |= dict.fromkeys(("padding", "margin", "paddle_retries", "distractors", "distractor_retries"), 0)


@dataclass(frozen=True)
class PathfinderCurves:
    r"""Parameters of a picture: two dashed curves, shorter distractors and two discs.

    A curve is ``path_length`` dashes ("paddles"), each turned by at most 90/continuity degrees against the previous
    one, with gaps of twice ``margin``. Both target curves are always drawn. Label 1: the discs lie on the two ends of
    one curve; label 0: on the start of one curve and the end of the other. The defaults are those of the experiment
    cited in :class:`Pathfinder`.

    Args:
        path_length: Dashes per target curve, at least 2; published: 3, 5, 7 and 9.
        window: Side in pixels of the picture before reduction, a multiple of ``size``.
        size: Side in pixels of the final picture, reduced from ``window`` with an antialiased bilinear filter.
        padding: Width in pixels of the border in which no dash starts or ends and which none touches.
        seed_distance: Distance in pixels between the starts of the target curves; that of the first one from the
            border is at least twice as large.
        paddle_length: Length of a dash in pixels.
        paddle_thickness: Thickness of a dash in pixels.
        margin: Distance in pixels that a dash keeps free around itself; the gap in a curve is twice as long.
        continuity: The next dash turns by an angle t with probability proportional to cos(min(continuity t, pi/2))^2.
        contrast: Brightness of a dash before the picture is divided by its maximum; that of the discs is 1.
        antialias: Factor by which dashes and discs are drawn larger and then reduced.
        marker_radius: Radius of the two discs in pixels.
        paddle_retries: Number of times a dash that would touch another is sampled again before its curve is given up.
        distractors: Number of distractor curves; None: as published, 30 / (path_length / 3), rounded up.
        distractor_length: Dashes per distractor; None: as published, path_length / 3, rounded down, at least 1.
        distractor_retries: Number of times a distractor that does not fit is tried again before it is left out.
        stop_with_availability: Add no more distractors once less than this share of the picture is free.
        balanced: Exactly one of the pictures 2k and 2k + 1 has label 1. Published: a fair coin for each picture.

    Raises:
        ValueError: A parameter is out of range, or a curve cannot start in so small a window.

    >>> curves = PathfinderCurves(path_length=7)
    >>> curves.distractor_count, curves.paddles_per_distractor, curves.max_paddles
    (13, 2, 40)
    """

    path_length: int = 9
    window: int = 300
    size: int = 150
    padding: int = 22
    seed_distance: int = 27
    paddle_length: int = 5
    paddle_thickness: int = 2
    margin: int = 3
    continuity: float = 1.8
    contrast: float = 1.0
    antialias: int = 2
    marker_radius: int = 3
    paddle_retries: int = 2
    distractors: int | None = None
    distractor_length: int | None = None
    distractor_retries: int = 4
    stop_with_availability: float = 0.01
    balanced: bool = False

    def __post_init__(self) -> None:
        for name, smallest in _SMALLEST.items():
            value = getattr(self, name)
            if value is None and name in ("distractors", "distractor_length"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
                raise ValueError(f"{name} must be an integer of at least {smallest}, got {value!r}")
        for name in ("continuity", "contrast"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)!r}")
        if self.continuity < 0.5:
            raise ValueError(f"continuity must be at least 0.5 (a turn is at most 180 degrees), got {self.continuity}")
        if not 0 <= self.stop_with_availability <= 1:
            raise ValueError(f"stop_with_availability is a share between 0 and 1, got {self.stop_with_availability}")
        if self.window % self.size or self.reduction > 11:
            raise ValueError(
                f"window must be 1 to 11 times size, a whole number, got window={self.window}, size={self.size}; "
                f"with this size choose for instance window={2 * self.size}"
            )
        room = self.window - 2 * self.start_border - (2 * self.half_stamp + 1)
        if room < 0:
            raise ValueError(
                f"window={self.window} is too small: curves start at least {self.start_border} pixels from its "
                f"border (padding={self.padding}, twice seed_distance={self.seed_distance}) and a dash needs "
                f"{2 * self.half_stamp + 1} pixels; choose window >= {self.window - room} or a smaller seed_distance"
            )

    @property
    def reduction(self) -> int:
        """Ratio of ``window`` to ``size``."""
        return self.window // self.size

    @property
    def half_stamp(self) -> int:
        """Reach in pixels of a dash with its margin, from the end by which it is placed."""
        return self.paddle_length + self.paddle_thickness + self.margin

    @property
    def start_border(self) -> int:
        """Least distance in pixels of the first dash from the border."""
        return max(self.padding, 2 * self.seed_distance)

    @property
    def distractor_count(self) -> int:
        """Number of distractors to try."""
        return -(-90 // self.path_length) if self.distractors is None else self.distractors

    @property
    def paddles_per_distractor(self) -> int:
        """Number of dashes of a distractor."""
        return max(1, self.path_length // 3) if self.distractor_length is None else self.distractor_length

    @property
    def max_paddles(self) -> int:
        """Number of dashes in a picture if every distractor fits."""
        return 2 * self.path_length + self.distractor_count * self.paddles_per_distractor

    def parameters(self) -> dict[str, Any]:
        """All parameters by name, with None replaced by the published rule's value."""
        resolved = {"distractors": self.distractor_count, "distractor_length": self.paddles_per_distractor}
        return dataclasses.asdict(self) | resolved
