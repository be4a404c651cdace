"""The term against locality and the rules that choose its patches."""

# names for users are listed once, in the `__all__` of their modules
# ruff: noqa: F403

from lightning_locality.regularizer.anti_locality import *
from lightning_locality.regularizer.patches import *
