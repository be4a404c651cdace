"""Speed and memory of the Pathfinder pictures, compared with a straightforward twin that draws one at a time.

    python benchmarks/pathfinder.py                          # milliseconds per picture on one core
    python benchmarks/pathfinder.py --memory 100000          # also peak memory while that many are written

The table goes to the terminal and, with everything needed to repeat it, to benchmarks/results/pathfinder.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from joblib import cpu_count

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from pathfinder_twin import SlowPicture

from lightning_locality.datamodules.pathfinder.parameters import PathfinderCurves
from lightning_locality.datamodules.pathfinder.placement import pictures, place
from lightning_locality.datamodules.pathfinder.rendering import render
from lightning_locality.datamodules.pathfinder.store import AT_ONCE, PictureStore


def milliseconds(work: Callable[[], Any]) -> float:
    """Processor time, which on a machine that does other things too is what one free core takes."""
    start = time.process_time()
    work()
    return 1000 * (time.process_time() - start)


def peak_memory() -> float:
    """Largest resident memory of this process so far, in MB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def speed(length: int, batches: int, twins: int) -> dict[str, Any]:
    curves = PathfinderCurves(path_length=length)
    first = milliseconds(lambda: pictures(curves, 0, "train", [0]))  # dashes are rendered once
    placing, drawing, whole, slow = [], [], [], []
    for number in range(batches):
        index = range(number * AT_ONCE, (number + 1) * AT_ONCE)
        placements = []
        placing.append(milliseconds(lambda i=index, p=placements: p.append(place(curves, 0, 0, i))) / AT_ONCE)  # type: ignore[misc]
        drawing.append(milliseconds(lambda p=placements: render(curves, *p[0][1:])) / AT_ONCE)  # type: ignore[misc]
        images: list[Any] = []
        whole.append(milliseconds(lambda i=index, p=images: p.append(pictures(curves, 0, "train", i))) / AT_ONCE)  # type: ignore[misc]
        if number < twins:
            twin: list[SlowPicture] = []
            slow.append(milliseconds(lambda i=index, t=twin: t.append(SlowPicture(curves, 0, 0, i[0]))))  # type: ignore[misc]
            assert np.array_equal(twin[0].image, images[0][0][0]), "the twin draws another picture"
    return {
        "path_length": length,
        "curves_ms": round(statistics.mean(placing), 4),
        "drawing_ms": round(statistics.mean(drawing), 4),
        "total_ms": round(statistics.mean(whole), 4),
        "total_ms_slowest_batch": round(max(whole), 4),
        "twin_ms": round(statistics.mean(slow), 1) if slow else None,
        "first_picture_ms": round(first, 1),
        "pictures": batches * AT_ONCE,
        "twin_pictures": len(slow),
    }


def memory(count: int) -> dict[str, Any]:
    curves = PathfinderCurves()
    with tempfile.TemporaryDirectory() as folder:
        store = PictureStore(Path(folder), curves, 0, "train", count)
        before, start = peak_memory(), time.perf_counter()
        store.generate(workers=1)
        written, wall = peak_memory(), time.perf_counter() - start
        start = time.perf_counter()
        size = store.load()[0].size
        return {
            "pictures": count,
            "file_mb": round(size / 1e6),
            "peak_mb_before": round(before),
            "peak_mb_after": round(written),
            "write_seconds_one_worker": round(wall, 1),
            "load_seconds_with_checksum": round(time.perf_counter() - start, 2),
        }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[3, 5, 7, 9])
    parser.add_argument("--batches", type=int, default=16, help=f"batches of {AT_ONCE} pictures per length")
    parser.add_argument("--twins", type=int, default=8, help="pictures drawn by the twin, for comparison")
    parser.add_argument("--memory", type=int, default=0, help="write that many pictures and report the peak memory")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pathfinder.json")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/pathfinder.py", *sys.argv[1:]]),
        "hardware": {"processor": processor(), "cores": cpu_count(), "load": round(os.getloadavg()[0], 2)},
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "pillow": PIL.__version__},
        "unit": "ms of processor time per finished 150x150 picture, one core, one process",
    }
    rows = [speed(length, options.batches, options.twins) for length in options.lengths]
    print("path length   curves  drawing    total   slow twin   (ms per picture)")
    for row in rows:
        fast = "".join(f"{row[name]:9.3f}" for name in ("curves_ms", "drawing_ms", "total_ms"))
        print(f"{row['path_length']:11}{fast}{'-' if row['twin_ms'] is None else row['twin_ms']:>12}")
    result["speed"] = rows
    if options.memory:
        result["memory"] = memory(options.memory)
        print(result["memory"])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
