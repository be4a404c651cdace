"""Float32 as such: without the shorter numbers that backends may put in its place."""

from __future__ import annotations

__all__ = ["exact_float32"]

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32, no bfloat16 and no autocast in place of float32 inside; afterwards all is as before.

    Torch has two sets of names for TF32 and refuses to answer one when the other says something else, so that inside
    both say the same: whatever a network asks, it gets an answer.
    """
    cuda, cpu, cudnn = torch.backends.cuda.matmul, torch.backends.mkldnn, torch.backends.cudnn
    # names that torch has no types for
    backends: list[Any] = [cuda, cpu.matmul, cpu.conv, cudnn.conv, cudnn.rnn]  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        _exact(backends)
        matmul = torch.get_float32_matmul_precision()
        try:
            convolutions = cudnn.allow_tf32
        except RuntimeError:
            # it says yes, and the new names, just set, say no
            convolutions = True
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32 = False
        _exact(backends)
        try:
            with ExitStack() as stack:
                for kind in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
                    stack.enter_context(torch.autocast(kind, enabled=False))
                yield
        finally:
            cudnn.allow_tf32 = convolutions
            torch.set_float32_matmul_precision(matmul)
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _exact(backends: list[Any]) -> None:
    for backend in backends:
        backend.fp32_precision = "ieee"
