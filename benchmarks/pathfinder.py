"""Speed and memory of the Pathfinder pictures, compared with a straightforward twin that draws one at a time.

    python benchmarks/pathfinder.py                          # milliseconds per picture on one core, every setting
    python benchmarks/pathfinder.py --memory 100000          # also peak memory while that many are written

The table goes to the terminal and, with everything needed to repeat it, to benchmarks/results/pathfinder.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from joblib import cpu_count

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from pathfinder_twin import SlowPicture

from lightning_locality.datamodules.pathfinder import placement
from lightning_locality.datamodules.pathfinder.parameters import PathfinderCurves
from lightning_locality.datamodules.pathfinder.placement import at_once, draw
from lightning_locality.datamodules.pathfinder.store import PictureStore


def milliseconds(work: Callable[[], Any]) -> float:
    """Processor time, which on a machine that does other things too is what one free core takes."""
    start = time.process_time()
    work()
    return 1000 * (time.process_time() - start)


def peak_memory() -> float:
    """Largest resident memory of this process so far, in MB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


SETTINGS = {
    "icml2022": (3, 5, 7, 9),
    **dict.fromkeys(("lra32", "lra64", "lra128", "lra256"), (6, 9, 14)),
    "pathx": (14,),
    "linsley300": (6, 9, 14, 20, 25),
}


def speed(preset: str, length: int, count: int, twins: int) -> dict[str, Any]:
    curves = PathfinderCurves.preset(preset, length)
    first = milliseconds(lambda: draw(curves, 0, "train", [0], False))  # dashes are rendered once
    made: list[Any] = []
    step = at_once(curves)
    parts = [range(count)[start : start + step] for start in range(0, count, step)]
    work = lambda: made.extend(draw(curves, 0, "train", part, False)[0] for part in parts)
    whole = milliseconds(work) / count
    compiled, placement.COMPILED = placement.COMPILED, False
    lock_step = milliseconds(work) / count
    placement.COMPILED = compiled
    targets = milliseconds(lambda: [draw(curves, 0, "train", part) for part in parts]) / count
    twin: list[SlowPicture] = []
    slow = milliseconds(lambda: twin.extend(SlowPicture(curves, 0, 0, number) for number in range(twins)))
    for number, picture in enumerate(twin):
        assert np.array_equal(picture.image, made[0][number]), "the twin draws another picture"
    return {
        "preset": preset,
        "path_length": length,
        "size": curves.size,
        "ms": round(whole, 3),
        "lock_step_ms": round(lock_step, 3),
        "with_targets_ms": round(targets, 3),
        "twin_ms": round(slow / twins, 1) if twins else None,
        "first_picture_ms": round(first, 1),
        "pictures": count,
        "twin_pictures": twins,
        "ink_percent": round(100 * float(np.mean(made[0] > 0)), 2),
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
    parser.add_argument("--presets", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--pictures", type=int, default=1024, help="pictures per setting")
    parser.add_argument("--twins", type=int, default=1, help="pictures drawn by the twin, for comparison")
    parser.add_argument("--memory", type=int, default=0, help="write that many pictures and report the peak memory")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pathfinder.json")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/pathfinder.py", *sys.argv[1:]]),
        "hardware": {"processor": processor(), "cores": cpu_count(), "load": round(os.getloadavg()[0], 2)},
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "numba": version("numba") if placement.COMPILED else "not installed: all in lock step",
        },
        "unit": "ms of processor time per finished picture, one core, one process",
    }
    rows = []
    print("setting     path length  size        ms   in lock step   with targets   slow twin   (ms per picture)")
    for preset in options.presets:
        for length in SETTINGS[preset]:
            row = speed(preset, length, options.pictures, options.twins)
            slow = "-" if row["twin_ms"] is None else row["twin_ms"]
            times = f"{row['ms']:10.3f}{row['lock_step_ms']:15.3f}{row['with_targets_ms']:15.3f}{slow:>12}"
            print(f"{preset:12}{length:11}{row['size']:6}{times}")
            rows.append(row)
    result["speed"] = rows
    if options.memory:
        result["memory"] = memory(options.memory)
        print(result["memory"])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
