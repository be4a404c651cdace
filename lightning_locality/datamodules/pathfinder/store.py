"""Pathfinder pictures in order, drawn by several processes."""

from __future__ import annotations

__all__ = ["CorruptFileError", "ImageFile", "StoredImages", "draw_in_order", "usable_cores"]

import dataclasses
import errno
import hashlib
import io
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_locality.datamodules.pathfinder.dashes import Bytes
from lightning_locality.datamodules.pathfinder.parameters import PathfinderCurves
from lightning_locality.datamodules.pathfinder.rendering import pictures

FORMAT = 1
DAY = 86_400  # an unfinished file untouched for that long belongs to a process that was killed

_verified: set[tuple[str, str, int, int]] = set()


class CorruptFileError(ValueError):
    """A stored file is not what was written: cut short, altered, or made with other parameters."""


class StoredImages(NamedTuple):
    """What a file holds.

    Args:
        images: Bytes ``(N, H, W)``, mapped from the file.
        labels: Labels ``(N,)``.
        mean: Mean of the pixels, scaled to 0..1.
        std: Their standard deviation.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    mean: float
    std: float


class ImageFile:
    """Images of bytes and their labels: a data file, and a JSON file beside it that vouches for it.

    The JSON file is the name of the whole: it holds parameters, shape, mean, standard deviation, the name and
    SHA-256 of the data file and a checksum of itself. It is written last and put in place in one step. The data
    file's name ends with its own checksum, so a new one never takes the place of one in use. It is a ``.npy`` file
    of one row of bytes: all images, then all labels.

    Args:
        path: The JSON file.
        parameters: What the images depend on; a file made with other parameters counts as corrupt.
        shape: Number of images, height and width ``(N, H, W)``.

    Raises:
        ValueError: The path does not end in ``.json`` or the shape holds no pixel.
    """

    def __init__(self, path: Path, parameters: Mapping[str, Any], shape: tuple[int, int, int]) -> None:
        if path.suffix != ".json":
            raise ValueError(f"path must end in .json, got {path}")
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"shape must be (images, height, width), all positive, got {shape}")
        self.path, self.shape = path, shape
        self.parameters: dict[str, Any] = json.loads(json.dumps(parameters))

    @property
    def bytes(self) -> int:
        """Size of the pixels and labels."""
        return self.shape[0] * (self.shape[1] * self.shape[2] + 1)

    def header(self) -> dict[str, Any]:
        """The checked contents of the JSON file, without a look at the data.

        Raises:
            FileNotFoundError: There is none.
            CorruptFileError: It is not as it was written, or was made with other parameters.
        """
        try:
            header = json.loads(self.path.read_bytes())
            checksum = header.pop("checksum")
            data, digest = str(header["data"]), str(header["sha256"])
            named = data.split(".")[-2]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise self._corrupt(f"cannot be read ({error!r})") from error
        if checksum != _checksum(header) or not digest.startswith(named):
            raise self._corrupt("does not agree with its own checksum")
        if header["format"] != FORMAT:
            raise self._corrupt(f"has format {header['format']}, this version of the package reads {FORMAT}")
        if header["parameters"] != self.parameters or header["shape"] != list(self.shape):
            raise self._corrupt("was made with other parameters")
        return dict(header)

    def load(self) -> StoredImages:
        """The images, mapped from the file; its checksum is compared once per process.

        Raises:
            FileNotFoundError: There is no such file.
            CorruptFileError: The file is not as it was written.
        """
        header = self.header()
        data = self.path.with_name(header["data"])
        try:
            status = data.stat()
            seen = (str(data.resolve()), header["sha256"], status.st_size, status.st_mtime_ns)
            if seen not in _verified:
                with data.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                if digest != header["sha256"]:
                    raise self._corrupt(f"vouches for {data.name}, which was altered or cut short")
                _verified.add(seen)
            # copy on write: torch warns of tensors that share read-only memory
            flat = np.load(data, mmap_mode="c")
        except FileNotFoundError as error:
            raise self._corrupt(f"has lost its data file {data.name}") from error
        count, height, width = self.shape
        images, labels = flat[: count * height * width], flat[count * height * width :]
        return StoredImages(images.reshape(self.shape), labels, float(header["mean"]), float(header["std"]))

    def write(self, chunks: Iterable[tuple[NDArray[np.uint8], NDArray[np.uint8]]]) -> None:
        """Write images ``(n, H, W)`` and labels ``(n,)`` given in order; both files or, on any error, neither.

        Raises:
            OSError: The disk is full or cannot be written; what was there before is untouched.
            ValueError: The chunks do not add up to the shape.
        """
        token = f".{secrets.token_hex(4)}.part"
        part, note = (self.path.with_name(f".{self.path.stem}{kind}{token}") for kind in ("", ".json"))
        placed: Path | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._sweep_up()
            digest, moments = self._write_data(part, chunks)
            data = self.path.with_name(f"{self.path.stem}.{digest[:12]}.npy")
            # the same name means the same bytes: an intact file stays, so that a failure below can be undone
            if not data.exists():
                placed = data
            os.replace(part, data)
            header: dict[str, Any] = {"format": FORMAT, "data": data.name, "sha256": digest, "shape": self.shape}
            header |= moments | {"parameters": self.parameters, "layout": "all images, then all labels"}
            with note.open("wb") as file:
                text = json.dumps(header | {"checksum": _checksum(header)}, indent=2)
                _flush(file, text.encode() + b"\n")
            os.replace(note, self.path)
            placed = None
            _flush_folder(self.path.parent)
        except OSError as error:
            size = f"{self.bytes / 1e6:.0f} MB"
            reason = "no space left on the disk" if error.errno == errno.ENOSPC else str(error)
            raise OSError(
                error.errno,
                f"{self.path} could not be written ({size} needed): {reason}; nothing was left behind, choose another "
                "folder or make room",
            ) from error
        finally:
            for unfinished in (part, note, placed):
                if unfinished is not None:
                    with suppress(OSError):
                        unfinished.unlink(missing_ok=True)
        for older in self.path.parent.glob(f"{self.path.stem}.*.npy"):
            if older != data:
                with suppress(OSError):  # still open elsewhere on a system that minds
                    older.unlink()

    def _write_data(
        self, part: Path, chunks: Iterable[tuple[NDArray[np.uint8], NDArray[np.uint8]]]
    ) -> tuple[str, dict[str, float]]:
        start = io.BytesIO()
        np.lib.format.write_array_header_1_0(start, {"descr": "|u1", "fortran_order": False, "shape": (self.bytes,)})
        digest = hashlib.sha256(start.getvalue())
        count, total, squares = 0, 0, 0
        all_labels = []
        with part.open("xb") as file:
            file.write(start.getvalue())
            for images, labels in chunks:
                if images.shape != (len(labels), *self.shape[1:]) or images.dtype != np.uint8:
                    raise ValueError(
                        f"chunks must be bytes (n, {self.shape[1]}, {self.shape[2]}) with n labels, got "
                        f"{images.dtype} {images.shape} with {len(labels)}"
                    )
                pixels = np.ascontiguousarray(images)
                digest.update(pixels.data)
                file.write(pixels.data)
                all_labels.append(np.asarray(labels, dtype=np.uint8))
                count += len(images)
                shown = pixels[pixels > 0].astype(np.int64)
                total, squares = total + int(shown.sum()), squares + int((shown * shown).sum())
            if count != self.shape[0]:
                raise ValueError(f"{self.path} is for {self.shape[0]} images, got {count}")
            labels = np.concatenate(all_labels)
            digest.update(labels.data)
            _flush(file, labels.tobytes())
        pixels_in_all = count * self.shape[1] * self.shape[2]
        mean = total / (255 * pixels_in_all)
        variance = squares / (255**2 * pixels_in_all) - mean**2
        return digest.hexdigest(), {"mean": mean, "std": max(variance, 0.0) ** 0.5}

    def _sweep_up(self) -> None:
        """Remove what processes that were killed have left behind."""
        for left in self.path.parent.glob(f".{self.path.stem}*.part"):
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > DAY:
                    left.unlink()

    def _corrupt(self, what: str) -> CorruptFileError:
        return CorruptFileError(f"{self.path} {what}; delete it, or let prepare_data() make it again")


def _checksum(header: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _flush(file: io.BufferedWriter, last: bytes) -> None:
    """Write, and see that it reached the disk."""
    file.write(last)
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """See that renamed files keep their names after a power cut; not every system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
