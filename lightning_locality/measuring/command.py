"""The rank command: measurements of checkpoints, resumable, on one or several devices."""

from __future__ import annotations

__all__ = ["gathered", "rank"]

import json
import multiprocessing
import platform
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from rich.console import Console

from lightning_locality.measuring.measurements import Measurement, Settings, What, measurements
from lightning_locality.measuring.progress import RankProgress
from lightning_locality.measuring.results import Measured, Parts, summary_table, write_results
from lightning_locality.measuring.trained import Trained
from lightning_locality.ranks.evaluation import Evaluation

_PACKAGES = ("lightning-locality", "torch", "pytorch-lightning", "tensorly")
_LISTS = ("--checkpoint", "--label", "--what")
_WIDTH = 120
Plan = list[tuple[str, Trained, list[Measurement]]]


def gathered(args: Sequence[str]) -> list[str]:
    """Arguments in which options that take several values occur once, as the parser wants them.

    Args:
        args: As typed: ``--checkpoint A --checkpoint B`` or ``--checkpoint A B``.

    Example:
        >>> gathered(["--checkpoint", "a", "--out=x", "--checkpoint=b", "c"])
        ['--out=x', '--checkpoint=["a", "b", "c"]']
    """
    found: dict[str, list[str]] = {}
    others: list[str] = []
    current: list[str] | None = None
    for word in args:
        name, equals, value = word.partition("=")
        if name in _LISTS:
            current = found.setdefault(name, [])
            current += [value] if equals else []
        elif current is not None and not word.startswith("-"):
            current.append(word)
        else:
            current = None
            others.append(word)
    return [*others, *(f"{name}={json.dumps(values)}" for name, values in found.items())]


def rank(
    checkpoint: list[str],
    out: Path | None = None,
    label: list[str] | None = None,
    what: list[What] | None = None,
    images: int | None = None,
    size: int | None = None,
    repetitions: int = 1,
    patch: int | None = None,
    samples: int | None = None,
    method: Literal["linear", "exact"] = "linear",
    pairs: int | None = None,
    tree: Literal["quadrants", "strips"] | None = None,
    rtol: float = 1e-2,
    seed: int = 0,
    float64: bool = False,
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
    devices: int = 1,
    memory: float | None = None,
    chunk: int | None = None,
) -> None:
    """Measure the hierarchical tensor rank of trained models, and over what distance they model interactions.

    A factorisation is measured exactly: singular values and ranks at every node of its tree, and norms of its
    components. A network is measured on images of its test split: the share of its variance that crosses cuts of
    the image (halves, quarters, checkerboards), and the strength of the interaction of patches against their distance.

    The folder gets ranks.csv (a number in a row), ranks.json (everything) and figures, with the checkpoints side by
    side. What has been measured is kept in its parts: after an interruption the same command goes on, and one with
    other settings or checkpoints measures only what is new.

    Args:
        checkpoint: A checkpoint in the folder of a run (runs/a/last.ckpt); may be given several times.
        out: Folder for the results; for a single checkpoint ranks/ in the folder of its run if not given.
        label: What the checkpoints are called in tables and figures, one each; the folders of the runs if not given.
        what: Kinds of measurement (nodes, components, cuts, profile); all that apply if not given.
        images: Number of test images; 256, or all where there are fewer, if not given.
        size: Images on each side of a cut, which costs size * size forward passes; 64, or half the images where
            there are fewer, if not given.
        repetitions: Independent draws of these images per cut.
        patch: Side of the patches of the profile in pixels; chosen by the size of the images if not given.
        samples: Images of the profile; 64, or all where there are fewer, if not given.
        method: Of the profile: linear by gradients, exact by forward passes alone, which is to be trusted for networks
            that are sure of their answer.
        pairs: Pairs of patches at a distance that the exact profile takes, drawn; all if not given.
        tree: Estimate the ranks between groups of blocks as well: 4 x 4 blocks merged in quadrants, or 8 strips.
        rtol: Singular values above this part of the largest count in the trees and the summary; the table has the
            ranks up to rounding as well.
        seed: Of all draws.
        float64: Evaluate networks in float64.
        accelerator: Where; auto takes a GPU if there is one.
        devices: How many of them share the work; the numbers are the same.
        memory: GiB that an evaluation may take; 1 on the CPU and 80 % of what is free on a GPU if not given.
        chunk: Images per call of the network; as many as the memory allows if not given.
    """
    for name, value in (("repetitions", repetitions), ("devices", devices), ("chunk", 1 if chunk is None else chunk)):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if memory is not None and not memory > 0:
        raise ValueError(f"--memory must be a positive number of GiB, got {memory}")
    if not 0 <= rtol < 1:
        raise ValueError(f"--rtol must be a part of the largest singular value, 0 up to 1, got {rtol}")
    if not checkpoint:
        raise ValueError("--checkpoint: name at least one, for example runs/a/last.ckpt")
    if out is None and len(checkpoint) > 1:
        raise ValueError(f"--out: say in which folder the results of {len(checkpoint)} checkpoints belong")
    kinds = None if what is None else tuple(what)
    settings = Settings(kinds, images, size, repetitions, patch, samples, method, pairs, tree, seed, float64)
    device = "cuda" if accelerator == "gpu" or (accelerator == "auto" and torch.cuda.is_available()) else "cpu"
    if device == "cuda" and torch.cuda.device_count() < devices:
        raise ValueError(f"--accelerator {accelerator} --devices {devices}: there are {torch.cuda.device_count()} GPUs")
    paths = [Path(path) for path in checkpoint]
    folder = paths[0].parent / "ranks" if out is None else out
    plan, parts, console = _planned(paths, label, settings), Parts(folder / "parts"), Console()
    before = set(multiprocessing.active_children())
    try:
        if devices == 1:
            _measure(plan, parts, settings, memory, chunk, torch.device(device), None)
        elif any(environment.detect() for environment in (TorchElasticEnvironment, SLURMEnvironment)):
            fabric = Fabric(accelerator=device, devices=devices, strategy="ddp")
            fabric.launch()
            _measure(plan, parts, settings, memory, chunk, fabric.device, fabric)
            # left open, its threads may abort the process while it shuts down
            torch.distributed.destroy_process_group()
            if fabric.global_rank > 0:
                return
        elif _missing(plan, parts):
            # not started by way of sys.argv, which may be that of another program
            fabric = Fabric(accelerator=device, devices=devices, strategy="ddp_spawn")
            work = partial(_work, paths=paths, labels=label, parts=parts, settings=settings, memory=memory, chunk=chunk)
            failure = fabric.launch(work)
            if failure is not None:
                raise failure
    except KeyboardInterrupt:
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        total = sum(len(todo) for _, _, todo in plan)
        console.print(
            f"interrupted: {total - len(_missing(plan, parts))} of {total} measurements are done and kept in "
            f"{parts.folder}; the same command goes on from there",
            soft_wrap=True,
            highlight=False,
        )
        raise SystemExit(130) from None
    files = _report(plan, parts, folder, settings, rtol, console)
    console.print(f"In {folder}: {', '.join(path.name for path in files)}.", soft_wrap=True, highlight=False)


def _planned(paths: Sequence[Path], labels: Sequence[str] | None, settings: Settings) -> Plan:
    trained = [Trained(path) for path in paths]
    names = _names(trained) if labels is None else list(labels)
    if len(names) != len(paths):
        raise ValueError(
            f"--label names {len(names)} checkpoints, and there are {len(paths)}: name each of them, or none"
        )
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"--label: {count} checkpoints are called {name!r}; give each a name of its own")
    return [(name, one, measurements(one, settings)) for name, one in zip(names, trained, strict=True)]


def _names(trained: Sequence[Trained]) -> list[str]:
    """The folders of the runs, with as much around them as it takes to tell them apart."""
    paths = [one.path.resolve() for one in trained]
    for path, count in Counter(paths).items():
        if count > 1:
            raise ValueError(f"--checkpoint {path} is given {count} times")
    ways: list[Callable[[Path], str]] = [
        lambda path: path.parent.name,
        lambda path: f"{path.parent.name}/{path.stem}",
        lambda path: f"{path.parent.parent.name}/{path.parent.name}",
    ]
    found = ([way(path) for path in paths] for way in ways)
    return next((names for names in found if len(set(names)) == len(names)), [str(path) for path in paths])


def _missing(plan: Plan, parts: Parts) -> list[tuple[int, int]]:
    """Measurements that are still to be made, by checkpoint and place."""
    return [
        (k, place)
        for k, (_, _, todo) in enumerate(plan)
        for place, one in enumerate(todo)
        if parts.read(one.name, one.digest) is None
    ]


def _work(
    fabric: Fabric,
    paths: Sequence[Path],
    labels: Sequence[str] | None,
    parts: Parts,
    settings: Settings,
    memory: float | None,
    chunk: int | None,
) -> Exception | None:
    """What each of several processes does; an exception is handed over, to be raised where the user is."""
    try:
        with fabric.rank_zero_first():  # data may have to be fetched
            plan = _planned(paths, labels, settings)
        _measure(plan, parts, settings, memory, chunk, fabric.device, fabric)
    except (ValueError, OSError) as error:
        if fabric.global_rank > 0:
            raise
        return error
    return None


def _measure(
    plan: Plan,
    parts: Parts,
    settings: Settings,
    memory: float | None,
    chunk: int | None,
    device: torch.device,
    fabric: Fabric | None,
) -> None:
    """Make and keep the missing measurements; of several processes all work and the first one writes."""
    missing = _missing(plan, parts)
    if fabric is not None:
        # looked up once: the first process may write while another still looks
        missing = fabric.broadcast(missing)
    first = fabric is None or fabric.global_rank == 0
    dtype = torch.float64 if settings.float64 else None
    with (
        warnings.catch_warnings(),
        RankProgress([plan[k][2][place].work for k, place in missing], shown=first) as progress,
    ):
        # Lightning 2.6 with torch 2.15
        warnings.filterwarnings("ignore", message=".*all_gather is deprecated")
        for k, place in missing:
            label, _, todo = plan[k]
            one = todo[place]
            started = time.time()
            progress.start(f"{label}: {one.name}", one.cost)
            try:
                record = one.compute(device, Evaluation(chunk, dtype, progress.advance))
            except (ValueError, MemoryError) as error:
                raise ValueError(f"{label}, {one.name}: {error}") from error
            record["seconds"] = round(time.time() - started, 3)
            record["device"] = _device_name(device)
            record["processes"] = 1 if fabric is None else fabric.world_size
            if first:
                parts.write(one.name, one.digest, record)
            progress.finish()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"


def _report(plan: Plan, parts: Parts, folder: Path, settings: Settings, rtol: float, console: Console) -> list[Path]:
    measured = []
    for label, trained, todo in plan:
        records = {one.name: parts.read(one.name, one.digest) for one in todo}
        model = trained.factorization or trained.network
        about = {
            "path": str(trained.path),
            "sha256": trained.digest,
            "config_sha256": trained.config_digest,
            "model": f"{type(model).__module__}.{type(model).__qualname__}",
        }
        measured.append(Measured(label, about, {name: record for name, record in records.items() if record}))
    versions = {package: version(package) for package in _PACKAGES}
    files = write_results(folder, measured, rtol, {"settings": asdict(settings), "versions": versions})
    # where there is no terminal rich would wrap the table at 80 columns
    (console if console.is_terminal else Console(width=_WIDTH)).print(summary_table(measured, rtol))
    return files
