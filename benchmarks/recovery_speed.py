"""Iterations per second of the factorisations, beside twins that train the published way (published_twins.py).

    python benchmarks/recovery_speed.py --out speed.json              # the five cases, one thread, float32
    python benchmarks/recovery_speed.py --cases matrix cp_order_3 --seconds 5
    python benchmarks/recovery_speed.py --device cuda --tables cases sizes   # also where a GPU begins to pay

Both sides start from the same weights and fit the same observations in the same float type, in turn within every
repeat, so that what else the machine does meets both alike. Ours is the whole of what a user runs: Trainer, Recovery
task and data module. The twin is a bare loop of its updates. Sides:

twin       the published way, nothing but updates
ours       nothing but updates (on CUDA with graphs)
measured   ours with all that a run measures, every 25 iterations (every epoch where there are minibatches), into a file
eager      on CUDA: ours without graphs

Before a case is timed, the losses along 400 updates of both sides are compared in float64; if they differ by more
than 1e-9 of the loss, nothing is reported. The binary case is compared with 6,000 samples in batches of 500.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hardware import device_name, versions
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import Logger
from recovery_cases import Case, cases, sizes

from lightning_locality.callbacks.resume import MetricsFile
from lightning_locality.datamodules.tensor_recovery import AbstractRecoveryDataModule
from lightning_locality.tasks.recovery import Recovery
from lightning_locality.tensors import Entries

LARGEST_DIFFERENCE = 1e-9


class Rows(Logger):
    """Keeps the rows of a run."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: dict[int, float] = {}

    name = "rows"
    version = 0

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keep the train loss."""
        if "train/loss" in metrics and step is not None:
            self.losses[step] = float(metrics["train/loss"])

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing."""


class Laps(Callback):
    """Clock after the first training step, which also warms up, and after the last."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.first: float | None = None
        self.last = 0.0
        self.steps = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the clock."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self.last = self.clock()
        if self.first is None:
            self.first = self.last
        else:
            self.steps += 1


def fit(
    task: Recovery,
    data: AbstractRecoveryDataModule,
    training_steps: int,
    device: str,
    logger: Logger | bool = False,
    callback: Callback | None = None,
) -> None:
    """Train through the Trainer."""
    # of loaders without workers
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_utilities")
    trainer = Trainer(
        accelerator="gpu" if device.startswith("cuda") else "cpu",
        devices=1,
        max_epochs=-1,
        max_steps=training_steps,
        logger=logger,
        callbacks=[callback] if callback else [],
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, datamodule=data)


def check(case: Case, device: str, updates: int) -> dict[str, Any]:
    """Losses of both sides in float64: largest relative difference along the way; an error above 1e-9.

    From the published start some losses hardly move within 400 updates, and would agree whatever is computed; there
    a second comparison starts where the tensor is no longer small.
    """
    starts: dict[str, dict[str, Any]] = {"published": {}}
    if case.grown is not None:
        starts["grown"] = {"init_scale": case.grown, "init_of": "product"}
    found = {name: compare(case.checked(), device, updates, name, options) for name, options in starts.items()}
    return {"difference": max(start["difference"] for start in found.values()), "starts": found}


def compare(case: Case, device: str, updates: int, name: str, start: dict[str, Any]) -> dict[str, float]:
    """Losses of both sides from one start."""
    every = 1 if case.batch_size is None else case.every
    data = case.data()
    task = Recovery(
        case.model(dtype=torch.float64, device=device, **start),
        optimizer=case.optimizer(),
        steps=case.steps,
        measure_every=every,
        max_iterations=updates,
        tolerance=None,
        batch_size=case.batch_size,
        effective_ranks=False,
    )
    entries = data.problem.train
    assert isinstance(entries, Entries)
    twin = case.twin(task.model, entries.indices.to(device), entries.values.to(device), task)
    rows = Rows()
    fit(task, data, math.ceil(updates / case.steps), device, rows)
    theirs = twin.losses(updates, every)
    ours = [rows.losses[iteration] for iteration in range(0, updates + 1, every)]
    differences = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
    worst = max(range(len(differences)), key=differences.__getitem__)
    if not differences[worst] <= LARGEST_DIFFERENCE:
        raise AssertionError(
            f"{case.title}: after {worst * every} updates from the {name} start the loss is {ours[worst]!r}, the "
            f"twin's {theirs[worst]!r}: they differ by {differences[worst]:.1e} of it, more than "
            f"{LARGEST_DIFFERENCE:g}; no speed is reported"
        )
    return {"difference": differences[worst], "first_loss": theirs[0], "last_loss": theirs[-1]}


class Sides:
    """What is timed of a case, by name: each gives iterations per second over about so many seconds."""

    def __init__(
        self, case: Case, device: str, dtype: torch.dtype, seconds: float, clock: Callable[[], float], folder: Path
    ) -> None:
        self.case, self.device, self.seconds, self.clock, self.folder = case, device, seconds, clock, folder
        self.data = case.data()
        self.model = case.model(dtype=dtype, device=device)
        self.known: dict[str, float] = {}

    def rate(self, side: str) -> float:
        """Run one side."""
        if side == "twin":
            entries = self.data.problem.train
            assert isinstance(entries, Entries)
            values = entries.values.to(self.device, next(self.model.parameters()).dtype)
            twin = self.case.twin(self.model, entries.indices.to(self.device), values, self._task("ours"))
            if side not in self.known:
                twin.rate(0.0, self.clock)
            self.known[side], _ = twin.rate(self.seconds, self.clock)
        else:
            if side not in self.known:
                self.known[side] = self._fit(side, 3)
            wanted = math.ceil(self.seconds * self.known[side] / self.case.steps)
            self.known[side] = self._fit(side, 1 + max(1, wanted))
        return self.known[side]

    def _task(self, side: str) -> Recovery:
        return Recovery(
            copy.deepcopy(self.model),
            optimizer=self.case.optimizer(),
            steps=self.case.steps,
            measure_every=self.case.every if side == "measured" else 10**9,
            max_iterations=10**9,
            tolerance=None,
            batch_size=self.case.batch_size,
            graph="never" if side == "eager" else "auto",
        )

    def _fit(self, side: str, training_steps: int) -> float:
        laps = Laps(self.clock)
        self.folder.mkdir(parents=True, exist_ok=True)
        logger: Logger | bool = MetricsFile(tempfile.mkdtemp(dir=self.folder)) if side == "measured" else False
        fit(self._task(side), self.data, training_steps, self.device, logger, laps)
        assert laps.first is not None
        return laps.steps * self.case.steps / (laps.last - laps.first)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, and what lies around it."""
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {
        "median": statistics.median(values),
        "quartiles": [quartiles[0], quartiles[2]],
        "range": [min(values), max(values)],
    }


def measure(case: Case, options: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Rates of the sides, in turn, and paired ratios to the twin's; the side "cpu" is ours on the processor."""
    devices = {name: "cpu" if name == "cpu" else options.device for name in names}
    dtype = getattr(torch, options.dtype)
    with tempfile.TemporaryDirectory() as folder:

        def sides_on(device: str) -> Sides:
            clock = time.perf_counter if options.device.startswith("cuda") else time.process_time
            return Sides(case, device, dtype, options.seconds, clock, Path(folder))

        made = {device: sides_on(device) for device in set(devices.values())}
        rates: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(options.repeats):
            for name in names:
                rates[name].append(made[devices[name]].rate(name))
    row: dict[str, Any] = {name: spread(values) for name, values in rates.items()}
    if "twin" in rates:
        for name, values in rates.items():
            if name != "twin":
                row[name]["times_twin"] = spread([a / b for a, b in zip(values, rates["twin"], strict=True)])
    return row


def print_cases(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Table of the cases, beside what was asked for."""
    print(
        f"{'iterations per second':54} {'authors':>8} {'twin':>8} {'ours':>9} {'times':>7} {'(quartiles)':>15}"
        f" {'asked':>6} {'measured':>9} {'eager':>9}  losses differ by"
    )
    for row in rows.values():
        ratio = row["ours"]["times_twin"]
        low, high = ratio["quartiles"]
        others = "".join(
            f" {row[name]['times_twin']['median']:8.1f}x" if name in row else f" {'':9}"
            for name in ("measured", "eager")
        )
        print(
            f"{row['title']:54} {row['published']:8.2f} {row['twin']['median']:8.2f} {row['ours']['median']:9.1f}"
            f" {ratio['median']:6.1f}x ({low:6.1f},{high:6.1f}) {row['target']:5.0f}x{others}  {row['difference']:.1e}"
        )


def fastest(row: Mapping[str, Any]) -> str:
    """Which way wins at a size."""
    names = {"cpu": "cpu", "eager": "cuda", "ours": "cuda graph"}
    return names[max(names, key=lambda name: float(row[name]["median"]))]


def print_sizes(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Which way is the fastest at which size."""
    print(f"\n{'iterations per second, ours':40} {'cpu':>10} {'cuda':>10} {'cuda graph':>10}  fastest")
    for title, row in rows.items():
        numbers = " ".join(f"{row[name]['median']:10.1f}" for name in ("cpu", "eager", "ours"))
        print(f"{title:40} {numbers}  {row['fastest']}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables, write a JSON file."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the processor")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="of the timed sides")
    parser.add_argument("--cases", nargs="+", choices=list(cases()), default=list(cases()))
    parser.add_argument("--seconds", type=float, default=3.0, help="per side and repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps-check", type=int, default=400, help="updates of the comparison in float64")
    parser.add_argument("--tables", nargs="+", choices=("cases", "sizes"), default=["cases"], help="sizes: CUDA only")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to test this program")
    parser.add_argument("--out", type=Path, help="JSON file; an existing one is replaced")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    cuda = options.device.startswith("cuda")
    if "sizes" in options.tables and not cuda:
        parser.error("--tables sizes compares the processor with a GPU: pass --device cuda")

    result: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/recovery_speed.py", *arguments]),
        "device": device_name(options.device),
        "processor": device_name("cpu"),
        "time": "wall clock" if cuda else "processor time of all threads",
        "threads": torch.get_num_threads(),
        "dtype": options.dtype,
        "toy": options.toy,
        "repeats": options.repeats,
        "seconds": options.seconds,
        "updates_compared": options.steps_check,
        "system": platform.system(),
        "versions": versions("torch", "pytorch-lightning", "numpy"),
    }
    print(f"{result['device']}, {result['threads']} threads, {options.dtype}, torch {torch.__version__}", flush=True)
    if options.toy:
        print("toy sizes: the titles are those of the published ones")
    if "cases" in options.tables:
        result["cases"] = {}
        known = cases(options.toy)
        for name in options.cases:
            case = known[name]
            compared = check(case, options.device, options.steps_check)
            row = measure(case, options, ["twin", "ours", "measured", *(["eager"] if cuda else [])])
            fields = {"title": case.title, "target": case.target, "published": case.published}
            result["cases"][name] = fields | compared | row
            print(f"{case.title}: {row['ours']['times_twin']['median']:.1f} times the twin", flush=True)
            save(result, options.out)
        print_cases(result["cases"])
    if "sizes" in options.tables:
        result["sizes"] = {}
        for title, case in sizes(options.toy).items():
            row = measure(case, options, ["cpu", "eager", "ours"])
            result["sizes"][title] = {"fastest": fastest(row)} | row
            save(result, options.out)
        print_sizes(result["sizes"])


def save(result: Mapping[str, Any], path: Path | None) -> None:
    """Write what there is so far."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    # what Lightning says of every Trainer
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    main()
