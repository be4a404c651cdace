"""Parameters of a Pathfinder picture, with the values of the published settings."""

from __future__ import annotations

__all__ = ["PRESETS", "PathfinderCurves"]

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from lightning_locality.arguments import Checked, checked

_SMALLEST = {"path_length": 2}
_SMALLEST |= dict.fromkeys(("window", "size", "seed_distance", "paddle_length", "antialias", "distractor_length"), 1)
_SMALLEST |= dict.fromkeys(("padding", "paddle_retries", "distractors", "distractor_retries"), 0)

# What differs from the defaults below, and the number of dashes in all distractors together, by which their number
# follows from their length. The sources: LRA is "Long Range Arena: A Benchmark for Efficient Transformers" (Tay et al.,
# 2021), the documentation of its builders; what they leave open are the defaults of the program that drew the pictures
# of Linsley et al. (2018), without its single dashes, as its own script has them and all who drew LRA's pictures anew.
_LRA = {"padding": 1, "paddle_thickness": 1.0, "continuity": 1.8, "paddle_length": 5, "antialias": 2}
PRESETS: dict[str, tuple[dict[str, Any], int | None]] = {
    # the experiment cited in Pathfinder
    "icml2022": ({}, None),
    "lra32": (
        _LRA
        | {"window": 32, "seed_distance": 7, "paddle_length": 2, "marker_radius": 1.5, "paddle_thickness": 0.5}
        | {"margin": 1, "continuity": 1.0, "contrast": 2.0, "paddle_contrast": 0.75},
        20,
    ),
    "lra64": (_LRA | {"window": 64, "seed_distance": 12, "marker_radius": 2.5, "margin": 1, "contrast": 0.8}, 22),
    "lra128": (
        _LRA
        | {"window": 128, "seed_distance": 20, "marker_radius": 3.0, "paddle_thickness": 1.5}
        | {"margin": (2, 3), "contrast": 0.9},
        35,
    ),
    "lra256": (_LRA | {"window": 256, "padding": 22, "marker_radius": 5.0, "paddle_thickness": 2.0}, 30),
    # Linsley et al. (2018) by the program's script: 15 distractors, whatever the length
    "linsley300": ({"marker_radius": 5.0, "size": 300, "distractors": 15}, None),
}
# Path-X: lra128 with twice the dashes in distractors. The builder's documentation has 35, LRA's issue 38 says 35 * 2.
PRESETS["pathx"] = PRESETS["lra128"][0], 70
_LENGTHS = {"easy": 6, "intermediate": 9, "hard": 14}


@dataclass(frozen=True)
class PathfinderCurves(Checked):
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
        paddle_thickness: Thickness of a dash in pixels; times ``antialias`` a whole number.
        margin: Distance in pixels that a dash keeps free around itself; the gap in a curve is twice as long. Of
            several one is drawn for each picture.
        continuity: The next dash turns by an angle t with probability proportional to cos(min(continuity t, pi/2))^2.
        contrast: Brightness of the dashes before the picture is divided by its maximum; that of the discs is 1.
            Of several one is drawn for each target curve (two of a list that has each twice) and for each dash of a
            distractor.
        paddle_contrast: Factor of the brightness of the target curves' dashes; of several one is drawn for each pair of
            dashes of the two curves.
        antialias: Factor by which dashes and discs are drawn larger and then reduced.
        marker_radius: Radius of the two discs in pixels.
        paddle_retries: Number of times a dash that would touch another is sampled again before its curve is given up.
        distractors: Number of distractor curves; None: as published, 30 / (path_length / 3), rounded up.
        distractor_length: Dashes per distractor; None: as published, path_length / 3, rounded down, at least 1.
        distractor_retries: Number of times a distractor that does not fit is tried again before it is left out.
        single_paddles: After the distractors, fill the picture with single dashes: 150 of margin 4, in inverse
            proportion to the area of a dash for other margins, less those in curves (``use_single_paddles`` of the
            first program).
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
    paddle_thickness: float = 2
    margin: int | tuple[int, ...] = 3
    continuity: float = 1.8
    contrast: float | tuple[float, ...] = 1.0
    paddle_contrast: float | tuple[float, ...] = 1.0
    antialias: int = 2
    marker_radius: float = 3
    paddle_retries: int = 2
    distractors: int | None = None
    distractor_length: int | None = None
    distractor_retries: int = 4
    single_paddles: bool = False
    stop_with_availability: float = 0.01
    balanced: bool = False

    def __post_init__(self) -> None:
        check_least(self, _SMALLEST)
        for name in ("paddle_thickness", "continuity", "marker_radius"):
            self._set(name, _positive(name, getattr(self, name)))
        for name in ("contrast", "paddle_contrast"):
            values = [_positive(name, value) for value in _several(name, getattr(self, name))]
            self._set(name, values[0] if len(values) == 1 else tuple(values))
        if min(_several("margin", self.margin)) < 0:
            raise ValueError(f"margin must be at least 0, got {self.margin!r}")
        self._set("margin", self.margins[0] if len(self.margins) == 1 else self.margins)
        if (self.paddle_thickness * self.antialias) % 1:
            raise ValueError(
                "paddle_thickness times antialias must be a whole number, got "
                f"paddle_thickness={self.paddle_thickness}, antialias={self.antialias}"
            )
        if self.continuity < 0.5:
            raise ValueError(f"continuity must be at least 0.5 (a turn is at most 180 degrees), got {self.continuity}")
        if not 0 <= self.stop_with_availability <= 1:
            raise ValueError(f"stop_with_availability is a share between 0 and 1, got {self.stop_with_availability}")
        if self.window % self.size or self.reduction > 11:
            raise ValueError(
                f"window must be 1 to 11 times size, a whole number, got window={self.window}, size={self.size}; "
                f"with this size choose for instance window={2 * self.size}"
            )
        area = 2 * self.path_length * self.paddle_length * self.paddle_thickness
        if area > self.window**2:
            raise ValueError(
                f"path_length={self.path_length} is too long: two curves cover {area:,.0f} pixels, and a picture has "
                f"{self.window**2:,}"
            )
        # the smallest square that a dash needs with its margin lies along the diagonal
        needed = math.ceil(self.paddle_length / 2**0.5 + 2 * min(self.margins) + self.paddle_thickness - 2)
        room = self.window - 2 * self.start_border - max(needed, 1)
        if room < 0:
            raise ValueError(
                f"window={self.window} is too small: curves start at least {self.start_border} pixels from its "
                f"border (padding={self.padding}, twice seed_distance={self.seed_distance}) and a dash needs "
                f"about {needed} pixels; choose window >= {self.window - room} or a smaller seed_distance"
            )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    @checked
    def preset(cls, name: str, path_length: int | None = None, **changes: Any) -> PathfinderCurves:
        """The parameters of a published setting by its name.

        Args:
            name: ``icml2022`` (Razin, Maman, Cohen, 2022: the defaults), ``lra32``, ``lra64``, ``lra128`` and
                ``lra256`` (Tay et al., 2021), ``pathx`` (its 128 pixels with 70 dashes in distractors where the
                builder's documentation has 35, as LRA's issue 38 corrects), or ``linsley300`` (Linsley et al., 2018).
                Those of LRA also with ``_easy``, ``_intermediate`` or ``_hard``: 6, 9 or 14 dashes.
            path_length: Dashes per target curve; None: 9 for ``icml2022``, else 14.
            changes: Other parameters that differ from the setting.

        Raises:
            ValueError: No setting has that name, or a parameter is out of range.

        >>> PathfinderCurves.preset("lra32_easy").path_length, PathfinderCurves.preset("pathx").distractor_count
        (6, 17)
        """
        setting, _, level = name.partition("_")
        if setting not in PRESETS or (level and (level not in _LENGTHS or not setting.startswith("lra"))):
            levels = ", ".join(f"_{level}" for level in _LENGTHS)
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, of LRA also with {levels}, got {name!r}")
        if level and path_length is not None:
            raise ValueError(f"preset={name!r} has a path length, leave out path_length={path_length}")
        known, dashes = PRESETS[setting]
        standard = cls.path_length if setting == "icml2022" else _LENGTHS[level or "hard"]
        own = {"path_length": standard if path_length is None else path_length}
        if "window" in known:
            own["size"] = known["window"]
        curves = cls(**known | own | changes)
        if dashes is None or "distractors" in changes:
            return curves
        return dataclasses.replace(curves, distractors=dashes // curves.paddles_per_distractor)

    @property
    def reduction(self) -> int:
        """Ratio of ``window`` to ``size``."""
        return self.window // self.size

    @property
    def half_stamp(self) -> int:
        """Reach in pixels of a dash with its margin, from the end by which it is placed."""
        return self.paddle_length + math.ceil(self.paddle_thickness) + max(self.margins)

    @property
    def margins(self) -> tuple[int, ...]:
        """The margins of which one is drawn for each picture."""
        return tuple(_several("margin", self.margin))

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
    def single_count(self) -> int:
        """Number of single dashes to try."""
        if not self.single_paddles:
            return 0
        area = 7.5 + 13 * max(self.margins) + 4 * max(self.margins) ** 2
        return max(
            0, int(150 * (123.5 / area)) - 2 * self.path_length - self.distractor_count * self.paddles_per_distractor
        )

    @property
    def max_paddles(self) -> int:
        """Number of dashes in a picture if every distractor fits."""
        return 2 * self.path_length + self.distractor_count * self.paddles_per_distractor + self.single_count

    @property
    def label(self) -> str:
        """How folders of pictures with these parameters begin."""
        return f"length{self.path_length}"

    def parameters(self) -> dict[str, Any]:
        """All parameters by name, with None replaced by the published rule's value and tuples as lists."""
        resolved = {"distractors": self.distractor_count, "distractor_length": self.paddles_per_distractor}
        return without_tuples(dataclasses.asdict(self) | resolved)


def check_least(parameters: Any, smallest: dict[str, int]) -> None:
    """Raise ValueError if a field is too small; None is not."""
    for name, least in smallest.items():
        value = getattr(parameters, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value!r}")


def without_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """The values as JSON has them, tuples as lists."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _several(name: str, value: Any) -> list[Any]:
    values = list(value) if isinstance(value, tuple | list) else [value]
    if not values:
        raise ValueError(f"{name} must be a number or a list of at least one, got {value!r}")
    return values


def _positive(name: str, value: Any) -> float:
    if value <= 0:
        raise ValueError(f"{name} must be positive, got {value!r}")
    return float(value)
