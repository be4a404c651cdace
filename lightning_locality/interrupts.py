"""Interrupts that lose no process: what is being started is known before one is answered."""

from __future__ import annotations

__all__ = ["delayed_interrupts", "terminated_like_interrupted"]

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def terminated_like_interrupted() -> AbstractContextManager[None]:
    """Raise ``KeyboardInterrupt`` in the block where the process is terminated, as where it is interrupted.

    A sweep started in the background of a script ignores interrupts, and so would its jobs, which it ends by them.
    """
    return _handled_by(signal.default_int_handler)


@contextmanager
def delayed_interrupts() -> Iterator[None]:
    """Answer an interrupt or a termination at the end of the block, by the handler from before.

    A process whose start is cut off before it has a name runs on with nobody to end it.
    """
    waiting: list[int] = []
    try:
        with _handled_by(lambda number, _: waiting.append(number)):
            yield
    finally:
        if waiting:
            signal.raise_signal(waiting[0])


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    earlier = [signal.signal(number, handler) for number in _SIGNALS]
    try:
        yield
    finally:
        for number, before in zip(_SIGNALS, earlier, strict=True):
            signal.signal(number, before)
