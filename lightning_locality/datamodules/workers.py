"""Pathfinder pictures in order, drawn by several processes."""

from __future__ import annotations

__all__ = ["draw_in_order", "usable_cores"]

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import ExitStack
from typing import IO

import numpy as np

from lightning_locality.datamodules.curves import PathfinderCurves
from lightning_locality.datamodules.pictures import pictures
from lightning_locality.datamodules.strokes import Bytes

FEWEST = 1024  # so few pictures take no longer than the start of another process


def usable_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def draw_in_order(
    curves: PathfinderCurves, seed: int, split: str, count: int, workers: int | None = None, at_once: int = 128
) -> Generator[tuple[Bytes, Bytes], None, None]:
    """Pictures and labels 0..count-1 in order, ``at_once`` at a time, the same whatever the number of workers.

    A worker is a new interpreter that is given its orders through a pipe: unlike a fork it is safe beside
    threads, and unlike :mod:`multiprocessing`'s other ways it does not run the caller's script again.

    Args:
        curves: Parameters of the pictures.
        seed: Seed of the pictures.
        split: Split of the pictures.
        count: Number of pictures.
        workers: Processes that draw; None: one per usable core, fewer for few pictures.
        at_once: Pictures placed in lock step and handed over together; about 0.3 MB each.

    Yields:
        Images ``(n, size, size)`` and labels ``(n,)``.
    """
    if workers is None:
        workers = min(usable_cores(), -(-count // FEWEST))
    workers = min(workers, -(-count // at_once))
    if workers <= 1:
        for start in range(0, count, at_once):
            yield pictures(curves, seed, split, range(start, min(start + at_once, count)))
        return
    order = {"curves": dataclasses.asdict(curves), "seed": seed, "split": split, "count": count}
    with ExitStack() as stack:
        started = []
        for first in range(workers):
            complaints = stack.enter_context(tempfile.TemporaryFile())
            process = stack.enter_context(_worker(complaints))
            stack.callback(process.kill)
            assert process.stdin is not None
            work = order | {"first": first * at_once, "step": workers * at_once, "at_once": at_once}
            process.stdin.write(json.dumps(work).encode())
            process.stdin.close()
            started.append((process, complaints))
        for number, start in enumerate(range(0, count, at_once)):
            process, complaints = started[number % workers]
            assert process.stdout is not None
            images = np.empty((min(at_once, count - start), curves.size, curves.size), dtype=np.uint8)
            labels = np.empty(len(images), dtype=np.uint8)
            for part in (images, labels):
                if process.stdout.readinto(part.reshape(-1).data) < part.nbytes:  # type: ignore[attr-defined]
                    complaints.seek(0)
                    raise RuntimeError(
                        f"a process that draws pictures ended early (exit status {process.wait()}); with "
                        f"workers=1 none is started; it said:\n{complaints.read().decode(errors='replace')}"
                    )
            yield images, labels


def _worker(complaints: IO[bytes]) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    program = f"from {__spec__.name} import _serve; _serve()"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=complaints,
        env=os.environ | {"PYTHONPATH": path},
    )


def _serve() -> None:
    """What a worker does: every so many pictures, images and labels as bytes to the standard output."""
    order = json.load(sys.stdin)
    curves = PathfinderCurves(**order["curves"])
    for start in range(order["first"], order["count"], order["step"]):
        index = range(start, min(start + order["at_once"], order["count"]))
        for part in pictures(curves, order["seed"], order["split"], index):
            sys.stdout.buffer.write(part.tobytes())
        sys.stdout.buffer.flush()
