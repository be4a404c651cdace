"""Parameters of a picture of two cluttered letters, with the values of the published settings."""

from __future__ import annotations

__all__ = ["PRESETS", "ClutteredLetters"]

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_locality.arguments import Checked, checked
from lightning_locality.datamodules.pathfinder.parameters import check_least, without_tuples

# What differs between the settings, which are "baseline-", "ix1-" and "ix2" in the authors' program; all else is in the
# defaults below. The spread of a letter's affine map is the same in all three. They differ in how much of it the two
# letters share, and in how freely these are placed.
_HALF = 2**-0.5
PRESETS: dict[str, dict[str, Any]] = {
    "easy": {},
    "intermediate": {
        **dict.fromkeys(("global_scale", "letter_scale"), 0.5 * _HALF),
        **dict.fromkeys(("global_rotation", "letter_rotation"), 30.0 * _HALF),
        **dict.fromkeys(("global_shear", "letter_shear"), 0.2 * _HALF),
        "radius": (40, 70),
        "first_angle": (-60, 60),
        "separation": 110,
    },
    "hard": {
        **dict.fromkeys(("global_scale", "global_rotation", "global_shear"), 0.001),
        "letter_scale": 0.5,
        "letter_rotation": 30.0,
        "letter_shear": 0.2,
        "radius": (30, 80),
        "first_angle": None,
        "separation": 60,
    },
}
_SMALLEST = {"window": 40, "size": 1, "thickness": 1, "distortion_bumps": 1, "patch": 1, "marker_radius": 4}
_SPREADS = ("global_scale", "letter_scale", "global_rotation", "letter_rotation", "global_shear", "letter_shear")


@dataclass(frozen=True)
class ClutteredLetters(Checked):
    r"""Parameters of a picture: two capital letters that barely overlap, in pieces, and two ring-shaped markers.

    The middle line of each letter is scaled, turned, sheared and bent, and drawn with strokes of one thickness. The
    letters' centres lie on a circle around that of the picture. Both are then cut into square patches, some of which
    are left out; the others are displaced. The defaults are those of the easy setting of the work cited in
    :class:`ClutteredABC`. Lengths are in pixels of a picture of side ``window``.

    Args:
        window: Side of the picture before reduction, a multiple of ``size`` and of ``patch``.
        size: Side of the final picture; each of its pixels is the mean of a square.
        fonts: Font files, one of which is drawn for each picture; a name without a folder is one of matplotlib's own.
        font_sizes: Size of each font in pixels.
        thickness: Thickness of strokes.
        global_scale: Spread of the power of 1/2 by which both letters are scaled, in each direction by its own.
            Spreads are standard deviations of a normal distribution that is cut off at two of them.
        letter_scale: The same for each letter, in addition; likewise the following two.
        global_rotation: Spread of the angle in degrees by which both letters are turned.
        letter_rotation: The same for each letter.
        global_shear: Spread of the two coefficients by which both letters are sheared.
        letter_shear: The same for each letter.
        distortion: A point moves by 40.8 ``distortion`` m times the gradient of a landscape of range 1, where m is the
            larger side of the letter before it is scaled.
        distortion_width: Width w of the landscape's bumps exp(-d^2 / w^2), which have random places and signs.
        distortion_bumps: Number of bumps.
        radius: Least and greatest radius of the circle on which the letters lie.
        first_angle: Least and greatest angle of the first letter in whole degrees, clockwise from the right; None: any.
        separation: The letters' angles differ by more than this number of degrees, at most 179.
        min_overlap: Least share of the smaller letter that the other one covers, both dilated by 1.4 ``thickness``.
        max_overlap: Upper limit of that share.
        patch: Side of a patch.
        patch_threshold: A patch is drawn if more than this share of it is ink.
        omission: Probability that a patch is left out.
        jitter: Standard deviation of the displacement of patches in each direction, cut off at two of them.
        marker_radius: Outer radius of the markers, rings of 3 pixels.

    Raises:
        ValueError: A parameter is out of range, or a font does not exist.

    >>> ClutteredLetters.preset("hard").separation, ClutteredLetters().separation
    (60, 170)
    """

    window: int = 350
    size: int = 350
    fonts: tuple[str, ...] = ("DejaVuSans.ttf", "DejaVuSansMono.ttf")
    font_sizes: tuple[int, ...] = (226, 254)
    thickness: int = 7
    global_scale: float = 0.5
    letter_scale: float = 0.001
    global_rotation: float = 30.0
    letter_rotation: float = 0.001
    global_shear: float = 0.2
    letter_shear: float = 0.001
    distortion: float = 0.24
    distortion_width: float = 3000.0**0.5
    distortion_bumps: int = 10
    radius: tuple[float, float] = (50, 60)
    first_angle: tuple[int, int] | None = (-30, 30)
    separation: int = 170
    min_overlap: float = 0.01
    max_overlap: float = 0.15
    patch: int = 5
    patch_threshold: float = 0.3
    omission: float = 0.2
    jitter: float = 2.0
    marker_radius: int = 11

    def __post_init__(self) -> None:
        for name in ("fonts", "font_sizes", "radius", "first_angle"):
            value = getattr(self, name)
            if isinstance(value, list):  # as YAML has them; a tuple can be a key of a cache
                object.__setattr__(self, name, tuple(value))
        check_least(self, _SMALLEST)
        for name in (*_SPREADS, "distortion", "distortion_width", "jitter"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value!r}")
            object.__setattr__(self, name, float(value))
        if self.distortion_width == 0:
            raise ValueError("distortion_width must be positive, got 0; distortion=0 leaves the letters straight")
        for name in ("min_overlap", "max_overlap", "patch_threshold", "omission"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is a share of at least 0 and below 1, got {getattr(self, name)!r}")
        if self.min_overlap >= self.max_overlap:
            raise ValueError(
                f"min_overlap must be below max_overlap, got min_overlap={self.min_overlap}, "
                f"max_overlap={self.max_overlap}"
            )
        if self.window % self.size or self.window % self.patch:
            raise ValueError(
                f"window must be a multiple of size and of patch, got window={self.window}, size={self.size}, "
                f"patch={self.patch}; a window of 350 suits sizes 350, 175, 70 and 50"
            )
        if not 0 <= self.separation < 180:
            raise ValueError(f"separation must be between 0 and 179 degrees, got {self.separation!r}")
        for name, least in (("radius", 0), ("first_angle", -360)):
            value = getattr(self, name)
            if value is not None and not (least <= value[0] <= value[1] <= max(self.window, 360)):
                raise ValueError(f"{name} must be a least and a greatest value of at least {least}, got {value!r}")
        object.__setattr__(self, "radius", tuple(map(float, self.radius)))  # as the command line has them
        if not self.fonts or len(self.fonts) != len(self.font_sizes) or min(self.font_sizes) < 20:
            raise ValueError(
                "fonts must be at least one file, with a size of at least 20 pixels for each in font_sizes, got "
                f"fonts={self.fonts!r}, font_sizes={self.font_sizes!r}"
            )
        for font in self.fonts:
            if not font_file(font).is_file():
                raise ValueError(f"fonts: {font_file(font)} does not exist; give a path, or one of matplotlib's own")

    @classmethod
    @checked
    def preset(cls, name: str, **changes: Any) -> ClutteredLetters:
        """The parameters of a published setting: ``easy``, ``intermediate`` or ``hard``, with ``changes``."""
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**PRESETS[name] | changes)

    @property
    def reduction(self) -> int:
        """Ratio of ``window`` to ``size``."""
        return self.window // self.size

    @property
    def label(self) -> str:
        """The setting's name and the side of the picture, such as ``easy350``; ``letters350`` if it is none of them."""
        whole = dataclasses.replace(self, size=self.window)
        names = [name for name in PRESETS if whole == type(self).preset(name)]
        return f"{names[0] if names else 'letters'}{self.size}"

    def parameters(self) -> dict[str, Any]:
        """All parameters by name, tuples as lists, fonts as names of files; and checksums of the fonts."""
        values = dataclasses.asdict(self) | {"fonts": [Path(font).name for font in self.fonts]}
        values["fonts_sha256"] = [hashlib.sha256(font_file(font).read_bytes()).hexdigest()[:16] for font in self.fonts]
        return without_tuples(values)


def font_file(name: str) -> Path:
    """The path of a font: as given, or among matplotlib's own if only a name is given."""
    path = Path(name)
    if path.name != name:
        return path
    from matplotlib import get_data_path

    return Path(get_data_path(), "fonts", "ttf", name)
