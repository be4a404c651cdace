"""The term against locality and the rules that choose its patches."""

__all__ = [
    "AbstractPatches",
    "AdjacentPatches",
    "AntiLocality",
    "ContentPatches",
    "FarField",
    "GivenPatches",
    "RandomPatches",
    "UniformPatches",
    "input_gradient_change",
]

from lightning_locality.regularizer.anti_locality import AntiLocality, input_gradient_change
from lightning_locality.regularizer.patches import (
    AbstractPatches,
    AdjacentPatches,
    ContentPatches,
    FarField,
    GivenPatches,
    RandomPatches,
    UniformPatches,
)
