"""Stopping rules: once the training data are fitted, and at the end of a time slot."""

from __future__ import annotations

__all__ = ["StopAfter", "StopOnceFitted"]

import time
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info

from lightning_locality.arguments import Checked


class StopOnceFitted(Checked, Callback):
    """Stop once a training metric has reached a value in a number of consecutive epochs.

    The rule of Razin, Maman, Cohen (2022, see :func:`input_gradient_change`; from the authors' code): training accuracy
    1 for 21 epochs.

    Args:
        monitor: Logged metric, checked at the end of every training epoch; ValueError if it is not logged.
        threshold: The least value that counts as fitted.
        checks: Consecutive checks at or above the threshold, at least 1.
    """

    def __init__(self, monitor: str = "train/accuracy", threshold: float = 1.0, checks: int = 21) -> None:
        if checks < 1:
            raise ValueError(f"checks must be at least 1, got {checks}")
        self.monitor, self.threshold, self.checks, self.count = monitor, threshold, checks, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop at once if the run was killed after its last epoch."""
        trainer.should_stop |= self.count >= self.checks

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count, and stop once the count is reached."""
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            logged = sorted(trainer.callback_metrics)
            raise ValueError(f"monitor={self.monitor!r}, which is not logged; logged are {logged}")
        self.count = self.count + 1 if float(value) >= self.threshold else 0
        if self.count >= self.checks:
            trainer.should_stop = True
            reached = f"{self.monitor} has been at least {self.threshold:g} for {self.checks} checks"
            rank_zero_info(f"stopped after epoch {trainer.current_epoch}: {reached}")

    def state_dict(self) -> dict[str, Any]:
        """The count so far, so that a resumed run stops when an uninterrupted one would."""
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the count."""
        self.count = int(state_dict["count"])


class StopAfter(Checked, Callback):
    """Stop at the end of the first epoch after which the time is up, to be resumed with ``--ckpt_path last``.

    Unlike Lightning's Timer it counts the time of this process only, so that a run can be spread over several slots,
    and it never stops within an epoch, which would make the resumed run inexact. A run that it has stopped is
    unfinished: it is not tested and writes no summary.

    Args:
        seconds: Time since this callback was made, so with the preparation of data; ValueError unless it is positive.
    """

    def __init__(self, seconds: float) -> None:
        if not seconds > 0:
            raise ValueError(f"seconds must be positive, got {seconds}")
        self.seconds, self.stopped, self._start = seconds, False, time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop if the time is up on any process."""
        up = trainer.strategy.reduce_boolean_decision(time.monotonic() - self._start >= self.seconds, all=False)
        last = trainer.max_epochs is not None and trainer.current_epoch + 1 >= trainer.max_epochs > 0
        if up and not last and not trainer.should_stop:
            self.stopped = trainer.should_stop = True
