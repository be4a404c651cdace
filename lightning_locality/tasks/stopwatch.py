"""How long a run has taken, over all its parts."""

from __future__ import annotations

__all__ = ["Stopwatch"]

import time
from typing import Any

from pytorch_lightning import Callback


class Stopwatch(Callback):
    """Count the seconds of a run that is continued on from those at the checkpoint that it continues from.

    What a killed part did after its last checkpoint is done again, and counts once.
    """

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._earlier = 0.0

    @property
    def seconds(self) -> float:
        """Time since the start, with that of the earlier parts."""
        return self._earlier + time.monotonic() - self._started

    def state_dict(self) -> dict[str, Any]:
        """The seconds so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on from the checkpoint's."""
        self._earlier = float(state_dict["seconds"])
