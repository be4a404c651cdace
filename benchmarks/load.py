"""Large and long commands: do memory and time per step stay flat?

    python benchmarks/load.py                                  # all parts: an hour and a half on two cores
    python benchmarks/load.py --of rank,recovery               # some; the others keep what was recorded
    python benchmarks/load.py --of sweep --size 0.01           # a hundredth, to try it

pathfinder: 200,000 pictures of 32 pixels are made. sweep: 200 tiny runs. rank: cuts and profile of a ResNet-18 at 224
pixels. recovery: a million iterations of a deep matrix factorisation. classification: 60,000 steps with the term. Each
is a command as typed, whose processes are watched from outside: resident memory (of the command itself, of its largest
process, of all together, in which shared pages count several times), processor time and progress, by tenths of the
way. Other work on the machine changes the seconds, hardly the processor time. A table goes to the terminal and, with
all that is needed to repeat it, to benchmarks/results/load.json. Ends with status 1 if a bound does not hold.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hardware
import numpy as np
import yaml

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
QUICKSTART, MATRIX = CONFIGS / "quickstart.yaml", CONFIGS / "recovery" / "matrix.yaml"
TICK = os.sysconf("SC_CLK_TCK")
MIB = 2**20


def processes(session: int) -> dict[int, tuple[float, float, float]]:
    """The processes of a session: resident memory and its peak in MiB, and processor seconds, with ended children's."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) != session or fields[0] == "Z":
                continue
            lines = dict(line.split(":", 1) for line in (entry / "status").read_text().splitlines())
        except (OSError, ValueError):
            continue  # it has just ended
        if "VmRSS" in lines:
            now, peak = (int(lines[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
            found[int(entry.name)] = now, peak, sum(map(int, fields[11:15])) / TICK
    return found


def watch(arguments: Sequence[str], folder: Path, progress: Callable[[], float], period: float = 0.5) -> dict[str, Any]:
    """Run a command in a folder; its seconds, memory, and tenths of its way from 0 to 1 as ``progress`` tells it."""
    clock = time.monotonic()
    samples: list[tuple[float, float, float, float]] = []  # progress, seconds, processor seconds, own memory
    largest = together = 0.0
    with (folder / "log.txt").open("wb") as log:
        command = [sys.executable, "-m", "lightning_locality", *arguments]
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
        while process.poll() is None:
            time.sleep(period)
            found = processes(process.pid)
            largest = max([largest, *(peak for _, peak, _ in found.values())])
            together = max(together, sum(now for now, _, _ in found.values()))
            if process.pid in found:
                own = found[process.pid]
                samples.append((progress(), time.monotonic() - clock, own[2], own[0]))
    if process.returncode:
        raise SystemExit(f"{shlex.join(arguments)} failed:\n{(folder / 'log.txt').read_text()[-2000:]}")
    written = shlex.join(arguments).replace(f"{CONFIGS.parent}/", "")
    result: dict[str, Any] = {"command": f"lightning-locality {written}", "load_before": round(os.getloadavg()[0], 2)}
    result |= {"seconds": round(time.monotonic() - clock, 1), "processor_seconds": round(samples[-1][2], 1)}
    result |= {"largest_process_mib": round(largest), "together_mib": round(together)}
    return result | {"tenths": tenths(samples)}


def tenths(samples: Sequence[tuple[float, float, float, float]]) -> list[dict[str, float]]:
    """Seconds, processor seconds and memory of the command itself (median, in MiB) of each tenth of the way."""
    at, others = np.array([s[0] for s in samples]), np.array([s[1:] for s in samples])
    # from the last sample before anything was done
    first = max(int(np.searchsorted(at, 0.0, side="right")) - 1, 0)
    at, others = at[first:], others[first:]
    if len({*at}) < 11:
        return []
    # the first sample of each value: progress is seen in steps
    _, index = np.unique(at, return_index=True)
    edges = np.linspace(0, at[-1], 11)
    clocks = [np.interp(edges, at[index], others[index, column]) for column in (0, 1)]
    found = []
    for k in range(10):
        inside = (at >= edges[k]) & (at <= edges[k + 1])
        memory = float(np.median(others[inside, 2])) if inside.any() else float("nan")
        seconds, busy = (float(clock[k + 1] - clock[k]) for clock in clocks)
        found.append({"seconds": round(seconds, 2), "processor_seconds": round(busy, 2), "mib": round(memory, 1)})
    return found


def last_of(path: Path, column: str) -> float:
    """The last value of a column of a growing table, 0 before there is one."""
    try:
        with path.open("rb") as file:
            names = file.readline().decode().strip().split(",")
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").split("\n")[1:-1]
        values = [row[names.index(column)] for row in csv.reader(lines) if len(row) == len(names)]
        return float(next(value for value in reversed(values) if value))
    except (OSError, ValueError, StopIteration):
        return 0.0


def pathfinder(folder: Path, size: float) -> dict[str, Any]:
    """200,000 pictures in bounded memory."""
    count = round(200_000 * size)
    arguments = ["make-data", "pathfinder", "--preset=lra32", f"--train={count}", "--validation=100", "--test=100"]
    result = watch([*arguments, "--root=data", "--workers=2"], folder, lambda: 0.0)
    files = sum(path.stat().st_size for path in (folder / "data").rglob("*.npy"))
    result |= {"pictures": count, "file_mib": round(files / MIB)}
    # of a process: libraries, and a few parts of the pictures, however many there are
    return result | {"bounds": {"largest process below 1 GiB": result["largest_process_mib"] < 1024}}


def sweep(folder: Path, size: float) -> dict[str, Any]:
    """200 runs."""
    count = max(round(200 * size), 2)
    grid = {
        "configs": [str(MATRIX)],
        "set": {"data.shape": [8, 8], "data.observations": 32, "model.model.shape": [8, 8], "data.rank": 2},
        "grid": {"seed_everything": list(range(count))},
        "out": "runs",
        "devices": [],
        "parallel": 2,
    }
    grid["set"] |= {"model.max_iterations": 100}  # type: ignore[operator]
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    result = watch(["sweep", "grid.yaml"], folder, lambda: len([*folder.glob("runs/*/summary.json")]) / count)
    rows = len((folder / "runs" / "results.csv").read_text().splitlines()) - 1
    result |= {"runs": count, "seconds_per_run": round(result["seconds"] / count, 2)}
    return result | {"bounds": {"every run in results.csv": rows == count, **flat(result["tenths"], clock=False)}}


def rank(folder: Path, size: float) -> dict[str, Any]:
    """A network of 224 pixels."""
    count = max(round(256 * size), 32)
    images = np.random.default_rng(0).integers(0, 256, (count, 224, 224, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", test_images=images, test_labels=np.arange(count) % 2)
    del images
    arguments = ["rank", "--model", "torchvision.models.resnet18", "--images=file:images.npz", "--out=ranks"]
    arguments += [f"--number={count}", "--size=16", "--samples=8"]
    result = watch(arguments, folder, lambda: 0.0) | {"images": count}
    return result | {"bounds": {"largest process below 4 GiB": result["largest_process_mib"] < 4096}}


def recovery(folder: Path, size: float) -> dict[str, Any]:
    """A million iterations."""
    count = round(1_000_000 * size)
    own = ["--data.shape=[16,16]", "--data.observations=128", "--model.model.shape=[16,16]", "--data.epoch_length=20"]
    own += ["--model.steps=250", "--model.measure_every=250", "--model.tolerance=null"]
    arguments = ["fit", f"--config={MATRIX}", *own, f"--model.max_iterations={count}", "--run_dir=run"]
    result = watch(arguments, folder, lambda: last_of(folder / "run" / "metrics.csv", "iteration") / count)
    return result | {"iterations": count, "bounds": flat(result["tenths"])}


def classification(folder: Path, size: float) -> dict[str, Any]:
    """60,000 steps with the term."""
    count = round(60_000 * size)
    own = ["--data.train=800", "--data.validation=16", "--data.test=16", "--data.batch_size=8", "--data.canvas=[8,24]"]
    own += ["--data.distance=8", "--model.network.widths=[4,4]", "--model.network.strides=[2,2]"]
    arguments = ["fit", f"--config={QUICKSTART}", *own, f"--trainer.max_epochs={count // 100}", "--run_dir=run"]
    result = watch(arguments, folder, lambda: last_of(folder / "run" / "metrics.csv", "step") / count)
    return result | {"steps": count, "bounds": flat(result["tenths"])}


def flat(found: Sequence[dict[str, float]], clock: bool = True) -> dict[str, bool]:
    """The bounds of a long run: its last tenth against the second, the first having warmed up."""
    if not found:
        return {}
    bounds = {"memory grows by less than 20 MiB": found[-1]["mib"] - found[1]["mib"] < 20}
    if clock:
        bounds["last tenth at most 1.1 of the first in processor time"] = (
            found[-1]["processor_seconds"] < 1.1 * found[0]["processor_seconds"]
        )
    return bounds


PARTS = {part.__name__: part for part in (pathfinder, rank, recovery, classification, sweep)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--size", type=float, default=1.0, help="factor of every part's size")
    parser.add_argument("--other-work", action="store_true", help="record that the machine did other work: no times")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "load.json")
    options = parser.parse_args()
    if unknown := set(options.of.split(",")) - PARTS.keys():
        parser.error(f"--of {','.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    failed = False
    for name in options.of.split(","):
        with tempfile.TemporaryDirectory() as folder:
            result = PARTS[name](Path(folder), options.size)
        result["other_work"] = options.other_work
        # other parts may be measured at the same time, or elsewhere
        document = json.loads(options.out.read_text()) if options.out.exists() else {"parts": {}}
        document["parts"][name] = {
            "benchmark": hardware.command("benchmarks/load.py"),
            "hardware": {"processor": hardware.processor_name(), "cores": os.cpu_count()},
            "versions": hardware.versions("torch", "torchvision", "pytorch-lightning", "numpy", "pandas", "joblib"),
            **result,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(document, indent=1) + "\n")
        failed |= not all(result["bounds"].values())
        memory = f"{result['largest_process_mib']} MiB in its largest process, {result['together_mib']} MiB together"
        print(f"{name}: {result['seconds']:.0f} s, {memory}", flush=True)
        for tenth in result["tenths"]:
            print(f"    {tenth['seconds']:9.1f} s {tenth['processor_seconds']:9.1f} s busy {tenth['mib']:8.1f} MiB")
        for bound, holds in result["bounds"].items():
            print(f"    {'holds' if holds else 'DOES NOT HOLD'}: {bound}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
