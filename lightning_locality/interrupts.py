"""Interrupts that lose no process: what is being started is known before one is answered."""

from __future__ import annotations

__all__ = ["delayed_interrupts", "terminated_like_interrupted"]

import signal
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """Raise ``KeyboardInterrupt`` in the block where the process is terminated, as where it is interrupted.

    A sweep started in the background of a script ignores interrupts, and so would its jobs, which it ends by them.
    """
    earlier = [signal.signal(number, signal.default_int_handler) for number in _SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(_SIGNALS, earlier, strict=True):
            signal.signal(number, handler)


@contextmanager
def delayed_interrupts() -> Iterator[None]:
    """Answer an interrupt or a termination at the end of the block, by the handler from before.

    A process whose start is cut off before it has a name runs on with nobody to end it.
    """
    waiting: list[int] = []
    earlier = [signal.signal(number, lambda number, _: waiting.append(number)) for number in _SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(_SIGNALS, earlier, strict=True):
            signal.signal(number, handler)
        if waiting:
            signal.raise_signal(waiting[0])
