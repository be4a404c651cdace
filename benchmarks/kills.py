"""Commands killed (SIGKILL) at random times and run again: do they end as if nothing had happened?

    python benchmarks/kills.py                                  # 20 kills of each command, about an hour on one core
    python benchmarks/kills.py --kills 5 --of fit,sweep         # fewer, of some

A command is run once undisturbed, twice: as typed, and in a process that has imported the package before. The time
that this saves is its start-up, and the second end must equal the first. Then, for every kill, a fresh folder: a fifth
of the kills fall into the start-up of the command as typed, the others at uniformly random times into a process that
has imported. Every second kill takes the process alone and leaves those that it has started to themselves. The same
command, for a fit with --ckpt_path last, is run again until it ends. Compared bit by bit: weights and optimisers of
last.ckpt and best.ckpt, metrics.csv, summary.json but for seconds, speed and the path of the checkpoint, ranks.csv,
results.csv but for seconds, and files of data. A table goes to the terminal and, with all that is needed to repeat it,
to benchmarks/results/kills.json. Ends with status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hardware
import torch
import yaml

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SMALL = ["--data.train=96", "--data.validation=64", "--data.test=64", "--data.batch_size=32"]
FIT = ["fit", f"--config={CONFIGS / 'quickstart.yaml'}", *SMALL]
RECOVERY = ["fit", f"--config={CONFIGS / 'recovery' / 'matrix.yaml'}", "--model.steps=50", "--data.epoch_length=2"]
RECOVERY += ["--data.shape=[16,16]", "--data.observations=128", "--model.model.shape=[16,16]"]
GRID = {
    "configs": [str(CONFIGS / "recovery" / "matrix.yaml")],
    "set": {option[2:].split("=")[0]: yaml.safe_load(option.split("=")[1]) for option in RECOVERY[2:]},
    "grid": {"seed_everything": [0, 1]},
    "out": "runs",
    "devices": [],
    "parallel": 2,
}
TIMES = ("seconds", "iterations_per_second")  # what depends on the clock


@dataclass(frozen=True)
class Command:
    """A command that is killed, and what it leaves."""

    arguments: Sequence[str]
    left: Sequence[str]  # patterns of the files that are compared
    inputs: Mapping[str, str] = field(default_factory=dict)  # files of the folder in which it runs
    resumed: bool = False  # by --ckpt_path last, and not by the same command


def commands(size: float = 1.0) -> dict[str, Command]:
    """Every command by name; ``size`` scales how long it takes."""
    run = ("run/metrics.csv", "run/summary.json", "run/*.ckpt")
    epochs, iterations = f"--trainer.max_epochs={round(24 * size)}", round(12000 * size)
    recovery = [*RECOVERY, f"--model.max_iterations={iterations}", "--run_dir=run"]
    grid = {**GRID, "set": {**GRID["set"], "model.max_iterations": iterations}}
    rank = ["rank", "--checkpoint=trained/last.ckpt", "--out=ranks", f"--number={round(64 * size)}", "--size=8"]
    pathfinder = ["make-data", "pathfinder", "--root=data", "--preset=lra32", "--workers=2", "--validation=64"]
    export = ["make-data", "export", "--data=SameClass", "--data.source=digits", "--data.classes=[0,1]", "--out=images"]
    numbers = [f"--data.{name}={round(n * size)}" for name, n in (("train", 3000), ("validation", 500), ("test", 500))]
    return {
        "fit": Command([*FIT, epochs, "--test_after_fit=best", "--run_dir=run"], run, resumed=True),
        "recovery": Command(recovery, run, resumed=True),
        "sweep": Command(
            ["sweep", "grid.yaml"],
            ("runs/results.csv", *(f"runs/*/{p[4:]}" for p in run)),
            {"grid.yaml": yaml.safe_dump(grid)},
        ),
        "make-data": Command([*pathfinder, f"--train={round(6000 * size)}", "--test=64"], ("data/pathfinder/[!.]*/*",)),
        "export": Command(
            [*export, *numbers, "--data.image_size=8", "--data.canvas=[8,80]", "--data.distance=64"], ("images/**/*",)
        ),
        "rank": Command([*rank, f"--samples={round(64 * size)}"], ("ranks/ranks.csv",)),
    }


def prepare(folder: Path, command: Command, trained: Path) -> None:
    """Make the folder in which a command runs."""
    folder.mkdir(parents=True)
    for name, text in command.inputs.items():
        (folder / name).write_text(text)
    if command.arguments[0] == "rank":
        (folder / "trained").symlink_to(trained)


def _run(arguments: Sequence[str], folder: Path) -> None:
    """Run a command in this process, a new one, in a session of its own."""
    os.setsid()
    os.chdir(folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    from lightning_locality.cli import main

    # as in a process of its own, of which a process of data-parallel training or joblib would start another
    sys.argv = ["lightning-locality", *arguments]
    main(list(arguments))


def start(
    arguments: Sequence[str], folder: Path, imported: bool
) -> multiprocessing.process.BaseProcess | subprocess.Popen[bytes]:
    """Start a command, as typed or in a fork of this process, which has imported everything."""
    if imported:
        process = multiprocessing.get_context("fork").Process(target=_run, args=(arguments, folder))
        process.start()
        return process
    with (folder / "log.txt").open("ab") as log:
        command = [sys.executable, "-m", "lightning_locality", *arguments]
        return subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )


def wait(process: Any, seconds: float | None = None) -> int | None:
    """Exit status of a process; None if it still runs after so many seconds."""
    if isinstance(process, subprocess.Popen):
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
    process.join(seconds)
    code: int | None = process.exitcode
    return code


def again(command: Command, folder: Path) -> list[str] | None:
    """The arguments that take up a killed command, after what its messages advise; None if it has ended."""
    if not command.resumed:
        return [*command.arguments]
    run = folder / "run"
    if (run / "summary.json").exists():
        return None
    if (run / "last.ckpt").exists():
        return [*command.arguments, "--ckpt_path=last"]
    if run.exists():
        shutil.rmtree(run)  # before the first checkpoint: nothing to continue
    return [*command.arguments]


def content(folder: Path, command: Command) -> dict[str, str]:
    """Everything that is compared, by the name of its file, as text or digest."""
    found = {}
    for path in sorted({path for pattern in command.left for path in folder.glob(pattern) if path.is_file()}):
        if path.suffix == ".ckpt":
            stored = torch.load(path, weights_only=True)
            found |= {
                f"{name} of {path.relative_to(folder)}": _digest(stored[name])
                for name in ("state_dict", "optimizer_states")
            }
            continue
        text = path.read_bytes()
        if path.name == "summary.json":
            summary = {key: value for key, value in json.loads(text).items() if key not in TIMES}
            summary["config"].pop("ckpt_path", None)
            text = json.dumps(summary, indent=1).encode()
        elif path.name == "results.csv":
            rows = [
                {k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(text.decode().splitlines())
            ]
            text = json.dumps(rows, indent=1).encode()
        name = str(path.relative_to(folder))
        found[name] = text.decode() if path.suffix in (".json", ".csv") else hashlib.sha256(text).hexdigest()
    return found


def _digest(value: Any) -> str:
    """Digest of nested tensors and numbers."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    if isinstance(value, Mapping):
        value = [(str(key), _digest(one)) for key, one in value.items()]
    elif isinstance(value, (list, tuple)):
        value = [_digest(one) for one in value]
    return hashlib.sha256(repr(value).encode()).hexdigest()


def undisturbed(command: Command, folder: Path, trained: Path, imported: bool) -> tuple[float, dict[str, str]]:
    """Seconds of an undisturbed command, and what it leaves."""
    prepare(folder, command, trained)
    clock = time.monotonic()
    code = wait(start(command.arguments, folder, imported))
    seconds = time.monotonic() - clock
    if code:
        raise SystemExit(f"{' '.join(command.arguments)} failed:\n{(folder / 'log.txt').read_text()[-2000:]}")
    found = content(folder, command)
    if not found:
        raise SystemExit(f"{' '.join(command.arguments)} left nothing at {', '.join(command.left)}")
    return seconds, found


def killed(
    command: Command, folder: Path, trained: Path, window: float, imported: bool, alone: bool, draw: random.Random
) -> dict[str, Any]:
    """Kill a command within ``window`` seconds of its start, and run it again until it ends."""
    for ended in range(10):  # noqa: B007
        shutil.rmtree(folder, ignore_errors=True)
        prepare(folder, command, trained)
        process = start(command.arguments, folder, imported)
        moment = draw.random() * window
        if wait(process, moment) is None:
            break
        window *= 0.9  # it was faster than the undisturbed one
    else:
        raise SystemExit(f"{' '.join(command.arguments)} ended ten times before it was killed")
    with_children = os.kill if alone else os.killpg
    with_children(process.pid, signal.SIGKILL)
    wait(process)
    left = sorted(path.name for path in folder.rglob("*") if path.is_file())
    record = {"seconds": round(moment, 2), "start_up": not imported, "alone": alone, "ended_before": ended}
    record["left"] = left[:12] + ([f"and {len(left) - 12} more"] if len(left) > 12 else [])
    codes = []
    while (arguments := again(command, folder)) is not None:
        codes.append(wait(start(arguments, folder, imported=True)))
        if codes[-1] == 0 or len(codes) == 3:
            break
    record["ends"] = codes
    if codes and codes[-1] != 0:
        record["log"] = (folder / "log.txt").read_text(errors="replace")[-1500:]
    return record


def measure(name: str, command: Command, kills: int, folder: Path, trained: Path, seed: int) -> dict[str, Any]:
    """Kill one command so many times; the record of each kill, and of what differed."""
    draw = random.Random(f"{seed} {name}")
    typed, expected = undisturbed(command, folder / "typed", trained, imported=False)
    faster, repeated = undisturbed(command, folder / "imported", trained, imported=True)
    result: dict[str, Any] = {"command": " ".join(command.arguments).replace(f"{CONFIGS.parent}/", "")}
    result |= {"seconds": round(typed, 1), "seconds_imported": round(faster, 1), "compared": len(expected)}
    result["undisturbed_differences"] = differences(expected, repeated)
    result["kills"] = []
    for number in range(kills):
        early = number % 5 == 4
        window = max(typed - faster, 0.5) if early else faster
        where = folder / f"kill {number}"
        record = killed(command, where, trained, window, not early, number % 2 == 0, draw)
        record["differences"] = differences(expected, content(where, command))
        result["kills"].append(record)
        shutil.rmtree(where)
        said = f"differs: {', '.join(record['differences'])}" if record["differences"] else "equal"
        print(f"{name}: kill {number + 1} of {kills} after {record['seconds']:.1f} s: {said}", flush=True)
    return result


def differences(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Name what differs, of tables and JSON with the first line that does."""
    said = []
    for key in sorted(expected.keys() | found.keys()):
        a, b = expected.get(key, "missing").splitlines(), found.get(key, "missing").splitlines()
        if a != b:
            lines = next(pair for pair in itertools.zip_longest(a, b) if pair[0] != pair[1])
            said.append(f"{key} ({str(lines[0])[:300]} | {str(lines[1])[:300]})")
    return said


def failures(result: Mapping[str, Any]) -> int:
    """Number of the ends of a command that were not equal to the undisturbed one."""
    return sum(bool(record["differences"]) for record in result["kills"]) + bool(result["undisturbed_differences"])


def train(folder: Path) -> Path:
    """A trained network for the command rank."""
    arguments = [*FIT, "--trainer.max_epochs=2", f"--run_dir={folder / 'trained'}"]
    folder.mkdir(parents=True, exist_ok=True)
    if wait(start(arguments, folder, imported=True)):
        raise SystemExit((folder / "log.txt").read_text())
    return folder / "trained"


def imports() -> None:
    """Import what the commands need, for the forks, which have a single thread; so the commands as typed do."""
    for name in ("runner", "sweep", "measure", "cli", "datamodules.pathfinder.module", "datamodules.base", "plotting"):
        importlib.import_module(f"lightning_locality.{name}")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def main() -> None:
    known = commands()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills of each command")
    parser.add_argument("--of", default=",".join(known), help="commands, separated by commas")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times")
    parser.add_argument("--size", type=float, default=1.0, help="factor of how long each command takes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kills.json")
    options = parser.parse_args()
    if unknown := set(options.of.split(",")) - known.keys():
        parser.error(f"--of {','.join(sorted(unknown))}: there are {', '.join(known)}")
    imports()
    content_before = json.loads(options.out.read_text()) if options.out.exists() else {}
    results = content_before.get("commands", {})
    print(f"seed {options.seed}")
    for name in options.of.split(","):
        with tempfile.TemporaryDirectory() as folder:
            trained = train(Path(folder) / "rank") if name == "rank" else Path(folder)
            result = measure(name, commands(options.size)[name], options.kills, Path(folder), trained, options.seed)
        results[name] = {"seed": options.seed, "size": options.size, **result}
        document = {
            "command": hardware.command("benchmarks/kills.py"),
            "hardware": {"processor": hardware.processor_name(), "cores": os.cpu_count()},
            "versions": hardware.versions("torch", "pytorch-lightning", "numpy", "pandas", "joblib"),
            "commands": results,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    print("command      kills  in start-up  run again more than once  different")
    for name, result in results.items():
        counts = Counter(early=0)
        for record in result["kills"]:
            counts["early"] += record["start_up"]
            counts["again"] += len(record["ends"]) > 1
        print(f"{name:12}{len(result['kills']):6}{counts['early']:13}{counts['again']:26}{failures(result):11}")
    sys.exit(any(failures(result) for result in results.values()))


if __name__ == "__main__":
    main()
