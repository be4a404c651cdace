"""Interrupts while a process is started, and terminations."""

from __future__ import annotations

import os
import signal

import pytest

from lightning_locality.interrupts import delayed_interrupts, terminated_like_interrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_for_the_end_of_the_block(number: signal.Signals) -> None:
    started = []

    def start() -> None:
        with delayed_interrupts():
            os.kill(os.getpid(), number)
            started.append("process")
        started.append("after")

    with pytest.raises(KeyboardInterrupt), terminated_like_interrupted():
        start()
    assert started == ["process"]


def test_handlers_are_those_from_before() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with terminated_like_interrupted(), delayed_interrupts():
        pass
    with pytest.raises(ValueError, match="own"), delayed_interrupts():
        raise ValueError("own")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
