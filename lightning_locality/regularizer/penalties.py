"""Penalties with their weights, under the names by which they are logged: shared by the task and the callback."""

from __future__ import annotations

__all__: list[str] = []

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, SupportsFloat

from torch import Tensor, nn

from lightning_locality.regularizer.anti_locality import AntiLocality
from lightning_locality.regularizer.patches import GivenPatches

COLUMN = "regularizer"
_RESERVED = frozenset(dir(nn.ModuleDict()))


def weighted_penalties(penalty: Any, weight: float | Mapping[str, float]) -> dict[str, tuple[AntiLocality, float]]:
    """Return penalty and weight by column: ``regularizer`` of a single penalty, ``regularizer/NAME`` of several.

    Args:
        penalty: An AntiLocality, a mapping of names to them, or None for none.
        weight: One for all, or one for every name.

    Raises:
        ValueError: Something else than penalties, unsuitable names, or weights that are negative or of other names.
    """
    several = isinstance(penalty, (Mapping, nn.ModuleDict))
    named = dict(penalty.items()) if several else {} if penalty is None else {"": penalty}
    for name, one in named.items():
        if not isinstance(one, AntiLocality):
            raise ValueError(f"penalty must be an AntiLocality, or a mapping of names to them, got {one!r:.100}")
        # torch forbids dots in names of modules, and names that a ModuleDict has itself
        if several and (not isinstance(name, str) or not name or "." in name or name in _RESERVED):
            raise ValueError(f"penalty: {name!r} cannot be the name of a penalty; choose a word such as 'far'")
    weights = dict(weight) if isinstance(weight, Mapping) else dict.fromkeys(named or [""], weight)
    for value in weights.values():
        if not (isinstance(value, SupportsFloat) and value >= 0):
            raise ValueError(f"weight must be 0 or more, got {weight!r}: the term is minimised together with the loss")
    if isinstance(weight, Mapping) and (not several or weights.keys() != named.keys()):
        wanted = f"have the names of penalty, {', '.join(named)}" if several else "be a number for a single penalty"
        raise ValueError(f"weight must {wanted}, got {weight}")
    if several and not named:
        raise ValueError("penalty is an empty mapping: name at least one AntiLocality, or pass None for none")
    return {f"{COLUMN}/{name}" if several else COLUMN: (one, float(weights[name])) for name, one in named.items()}


def bind_boxes(penalties: Iterable[AntiLocality], data: Any) -> None:
    """Give the boxes of a data module to every GivenPatches without any; ValueError if it has none."""
    for patches in (penalty.patches for penalty in penalties):
        if isinstance(patches, GivenPatches) and patches.boxes is None:
            if (boxes := getattr(data, "boxes", None)) is None:
                lack = f"the data module {type(data).__name__} names none" if data else "there is no data module"
                raise ValueError(
                    f"GivenPatches has no boxes and {lack}: pass boxes=[(top, left, height, width), ...] or take "
                    "another rule such as FarField"
                )
            patches.bind(boxes)


class DonorCheck:
    """Whether a training batch has a donor for its samples; warns of the first batch of one sample."""

    def __init__(self) -> None:
        self.warned = False

    def __call__(self, x: Tensor, batch_idx: int) -> bool:
        """Return whether there are two samples; ValueError if the first batch of an epoch has only one."""
        if len(x) < 2 and batch_idx == 0:
            raise ValueError(
                "the first training batch has 1 sample, and the penalty needs a second one as donor: choose a "
                "batch_size of at least 2"
            )
        if len(x) < 2 and not self.warned:
            self.warned = True
            warnings.warn(
                f"training batch {batch_idx} has 1 sample and no donor for it: the penalty is left out there, as in "
                "all such batches; drop_last=True drops an incomplete last batch",
                stacklevel=2,
            )
        return len(x) > 1
