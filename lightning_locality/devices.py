"""The GPUs of this machine, shared out among runs."""

from __future__ import annotations

__all__ = ["Devices"]

import os
from collections.abc import Sequence
from typing import Self, final


@final
class Devices:
    """Groups of GPUs, each lent to one run at a time, or to several where there are more runs than groups.

    Args:
        names: The GPUs, as ``CUDA_VISIBLE_DEVICES`` names them; none on a machine without.
        per_run: GPUs of one run. Those that do not fill a group stay idle.

    Raises:
        ValueError: Fewer GPUs than one run needs, GPUs named twice, ``per_run`` below 1.

    Example:
        >>> devices = Devices(["0", "1", "2", "3"], per_run=2)
        >>> devices.take(), devices.take()
        (('0', '1'), ('2', '3'))
        >>> devices.give(("2", "3"))
        >>> devices.take()
        ('2', '3')
    """

    def __init__(self, names: Sequence[str], per_run: int = 1) -> None:
        if per_run < 1:
            raise ValueError(f"devices_per_run must be at least 1, got {per_run}")
        if len(set(names)) < len(names):
            raise ValueError(f"devices must be named once each, got {', '.join(names)}")
        if names and len(names) < per_run:
            raise ValueError(f"devices_per_run is {per_run}, but there are {len(names)} devices ({', '.join(names)})")
        groups = [tuple(names[start : start + per_run]) for start in range(0, len(names) - per_run + 1, per_run)]
        self._runs = dict.fromkeys(groups, 0)

    @classmethod
    def here(cls, per_run: int = 1, names: Sequence[str] | None = None) -> Self:
        """The GPUs that this process may use, all of them unless some are named.

        Args:
            per_run: GPUs of one run.
            names: Instead of all.
        """
        if names is not None:
            return cls(names, per_run)
        # here, because it takes a second or two; counting makes no CUDA context
        import torch

        count = torch.cuda.device_count()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        found = visible.split(",") if visible else [str(index) for index in range(count)]
        return cls([name.strip() for name in found[:count]], per_run)

    def __len__(self) -> int:
        """Number of groups."""
        return len(self._runs)

    def take(self) -> tuple[str, ...]:
        """A group with the fewest runs on it; empty where there are no GPUs."""
        if not self._runs:
            return ()
        group = min(self._runs, key=lambda one: self._runs[one])
        self._runs[group] += 1
        return group

    def give(self, group: tuple[str, ...]) -> None:
        """Take a group back.

        Args:
            group: What :meth:`take` has returned.
        """
        if group:
            self._runs[group] -= 1
