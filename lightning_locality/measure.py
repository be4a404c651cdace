"""The rank command: measure ranks and interaction distances of trained models."""

from __future__ import annotations

__all__ = ["rank"]

import copy
import itertools
import json
import platform
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, Literal

import pandas as pd
import torch
from jsonargparse.typing import PositiveInt
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lightning_locality.measurements import (
    ImageSource,
    Measurement,
    Record,
    TrainedModel,
    load_model,
    load_run,
    measurements,
)
from lightning_locality.plotting.ranks import cut_figure, profile_figure, spectra_figure, tree_figure
from lightning_locality.plotting.style import save_figure
from lightning_locality.ranks import Evaluation, InteractionProfile, NodeSpectra, measuring
from lightning_locality.results import atomic_write, gather, versions, write_json
from lightning_locality.tensors.mode_tree import ModeTree, Node, node_name

# label of a model -> name of a measurement -> its record
Records = Mapping[str, Mapping[str, Record]]

# options that only go with --model
_ELSEWHERE = ("weights", "images", "image_size", "mean", "std")
_SEVERAL = ("--checkpoint", "--label", "--what", "--model", "--weights", "--mean", "--std")
_FLAGS = ("--untrained", "--float64")
_OPTION = re.compile(r"^--([a-z]+-[a-z-]+)(?==|$)")
_COLUMNS = ["checkpoint", "quantity", "key", "value", "standard_error", "low", "high"]


def rank(
    checkpoint: list[str] | None = None,
    model: list[str] | None = None,
    weights: list[str] | None = None,
    images: str | None = None,
    image_size: PositiveInt | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    out: Path | None = None,
    label: list[str] | None = None,
    untrained: bool = False,
    what: list[Literal["nodes", "components", "cuts", "profile"]] | None = None,
    layer: str | None = None,
    number: PositiveInt | None = None,
    size: int | None = None,
    repetitions: PositiveInt = 1,
    patch: int | None = None,
    samples: int | None = None,
    method: Literal["linear", "exact"] = "linear",
    pairs: int | None = None,
    tree: Literal["quadrants", "strips"] | None = None,
    rtol: float = 1e-2,
    seed: int = 0,
    float64: bool = False,
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
    devices: PositiveInt = 1,
    chunk: PositiveInt | None = None,
) -> None:
    """Measure the hierarchical tensor rank of trained models, and the distances over which they model interactions.

    A factorisation is measured exactly: singular values and ranks at every node of its tree, and norms of its
    components. A network is measured on images of its test split: the share of its variance that crosses cuts of
    the image (halves, quarters, checkerboards), and how strongly patches interact as a function of their distance.

    Runs of this package are given by --checkpoint. Any other network is given by --model, with --weights and --images.

    The output folder gets ranks.csv (one number per row), ranks.json (everything) and figures that compare the
    models. Finished measurements are cached in its subfolder parts: re-run an interrupted command to resume it;
    with other settings or models, only what is new is measured.

    Args:
        checkpoint: Checkpoint in a run directory (runs/a/last.ckpt); may be given several times.
        model: A network that was not trained here: torchvision.models.resnet18, timm/resnet18, my_code.Net (class, or
            function annotated with what it returns), or a YAML file with class_path and init_args. Arguments follow
            as --model.num_classes 10.
        weights: File of a state dict (torch or safetensors), or a Lightning checkpoint; may be given several times.
            No code in it is executed. Without weights, the network is measured as initialised under --seed.
        images: What --model is measured on: folder:DIR (pictures, with or without class folders), file:FILE.npz,
            digits, or cifar10, mnist, ... in $LIGHTNING_LOCALITY_DATA.
        image_size: Height and width in pixels to resize these images to; the default leaves them.
        mean: Mean of each channel, 0 to 1, subtracted; the default is that of timm's network, else of ImageNet.
        std: Standard deviation of each channel, divided by; the default likewise.
        out: Output folder; required unless there is one checkpoint, whose default is ranks/ in its run directory.
        label: Names in tables and figures, one for each checkpoint or file of weights; the default is the run
            directory's name, or that of the network.
        untrained: Also measure every model as it was before training, on the same images: built with the seed and
            configuration of its run, or for --model with --seed.
        what: Kinds of measurement (nodes, components, cuts, profile); the default is all that apply.
        layer: Cuts and profile of the outputs of this layer of the network, such as layer3; the default is its own.
        number: Number of test images; the default is 256, or all if there are fewer.
        size: Images on each side of a cut (size * size forward passes); the default is 64, or half of all if fewer.
        repetitions: Independent draws of these images per cut.
        patch: Side of the profile's patches in pixels; the default depends on the size of the images.
        samples: Images of the profile; the default is 64, or all if there are fewer.
        method: linear, by gradients, or exact, by forward passes, the one to trust if predictions are confident.
        pairs: Number of patch pairs that the exact profile samples per distance; the default is all.
        tree: Also estimate ranks between groups of blocks of the image: 4 x 4 merged into quadrants, or 8 strips.
        rtol: A singular value counts in the tree figures and the summary if it exceeds this fraction of the largest;
            the table also has the ranks up to rounding.
        seed: Seed of every random choice.
        float64: Evaluate networks in float64.
        accelerator: Where to measure; auto uses a GPU if there is one.
        devices: Number of devices that share the measurements; the numbers do not depend on it.
        chunk: Images per call of the network, halved when memory runs out; the default depends on their size.
    """
    if images is not None and images.isdigit():
        # the number's former name
        number, images = int(images), None
    # all options: nothing else is local yet
    settings = SimpleNamespace(**locals())
    if not 0 <= rtol < 1:
        raise ValueError(f"--rtol must be a fraction of the largest singular value, 0 up to 1, got {rtol}")
    if bool(checkpoint) == bool(model):
        raise ValueError("name either --checkpoint, such as runs/a/last.ckpt, or the --model of weights from elsewhere")
    workers = _devices(accelerator, devices)
    paths: list[Path | None] = [Path(path) for path in checkpoint or weights or ()] or [None]
    loading: Callable[..., TrainedModel] = load_run
    if model:
        if images is None or out is None:
            raise ValueError(f"--model {model[0]} needs --images, such as folder:DIR, and --out, a folder for results")
        if untrained and not weights:
            raise ValueError(f"--untrained compares with --weights: without them, {model[0]} is untrained anyway")
        loading = partial(load_model, model, data=ImageSource(images, image_size, mean, std), seed=seed)
    elif given := [f"--{name.replace('_', '-')}" for name in _ELSEWHERE if getattr(settings, name) is not None]:
        raise ValueError(f"{', '.join(given)}: only for --model; a run is measured on the test images of its own data")
    if out is None and len(paths) > 1:
        raise ValueError(f"--out: name the folder for the results of {len(paths)} checkpoints")
    folder = Path(str(paths[0])).parent / "ranks" if out is None else out
    runs: dict[str, TrainedModel] = {}
    plan: list[Measurement] = []
    shared = None
    for name, path in zip(_labels(paths, label, model), paths, strict=True):
        for initial in (False, True)[: 1 + untrained]:
            run = loading(path, initial=initial)
            if initial and any(run.about == other.about | {"path": run.name} for other in runs.values()):
                continue
            own = f"{name} (untrained)" if initial else name
            run.images = shared if initial or model else None
            runs[own] = run
            plan += measurements(own, run, settings, folder / "parts")
            shared = run.images
    # without a terminal rich would wrap the table at 80 columns
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    # equal checkpoints under two labels share a result
    missing = list({one.path: one for one in plan if one.result() is None}.values())
    try:
        _measure_all(missing, workers, Evaluation(chunk, torch.float64 if float64 else None), console)
    except KeyboardInterrupt:
        done = sum(one.result() is not None for one in plan)
        where = f"{done} of {len(plan)} measurements are done and kept in {folder / 'parts'}"
        console.print(f"interrupted: {where}; re-run the same command to resume", soft_wrap=True)
        raise SystemExit(130) from None
    records = {name: {one.name: one.result() or {} for one in plan if one.label == name} for name in runs}
    files = _write(folder, records, runs, settings)
    console.print(_summary(records, rtol))
    console.print(f"In {folder}: {', '.join(files)}.", soft_wrap=True)


def gathered(args: Sequence[str]) -> list[str]:
    """Rewrite a command line as the parser expects it: several values as one JSON list, flags with a value.

    Example:
        >>> gathered(["--checkpoint", "a", "--out=x", "--checkpoint=b", "c", "--untrained"])
        ['--out=x', '--checkpoint=["a", "b", "c"]', '--untrained=true']
        >>> gathered(["--image-size=8", "--model", "my_code.Net", "--model.width", "3"])
        ['--image_size=8', '--model=["my_code.Net", "width=3"]']
    """
    words = [_OPTION.sub(lambda name: f"--{name[1].replace('-', '_')}", arg) for arg in args]
    others, values = gather(words, lambda name: name in (*_SEVERAL, *_FLAGS) or name.startswith("--model."))
    for name in [name for name in values if name.startswith("--model.")]:
        values.setdefault("--model", []).append(f"{name[8:]}={' '.join(values.pop(name)) or 'true'}")
    several = {name: json.dumps(given) for name, given in values.items() if name not in _FLAGS}
    flags = {name: " ".join(values[name]) or "true" for name in _FLAGS if name in values}
    return [*others, *(f"{name}={value}" for name, value in (several | flags).items())]


def _labels(paths: Sequence[Path | None], given: Sequence[str] | None, model: Sequence[str] | None) -> list[str]:
    """Labels as given, or the folders of the runs with as much of their paths as it takes to tell them apart.

    For ``model``, its name, or of several files of weights theirs.
    """
    full = [Path(str(path)).resolve() for path in paths]
    for path, count in Counter(full).items():
        if count > 1:
            raise ValueError(f"--{'weights' if model else 'checkpoint'} {path} is given {count} times")
    if given is None and model:
        name = re.split(r"[./]", model[0].removesuffix(".yaml"))[-1]
        return _distinct([name] * len(full), [path.stem for path in full], [*map(str, full)])
    if given is None:
        runs = [path.parent for path in full]
        with_stem = [f"{run.name}/{path.stem}" for run, path in zip(runs, full, strict=True)]
        with_parent = [f"{run.parent.name}/{run.name}" for run in runs]
        return _distinct([run.name for run in runs], with_stem, with_parent, [*map(str, full)])
    if len(given) != len(paths):
        raise ValueError(f"--label names {len(given)} models, and there are {len(paths)}: name all or none")
    for name, count in Counter(given).items():
        if count > 1:
            raise ValueError(f"--label: several models are called {name!r}; give each a name of its own")
    return list(given)


def _distinct(*ways: list[str]) -> list[str]:
    """Return the first way of naming that names everything differently."""
    return next(names for names in ways if len(set(names)) == len(names))


def _devices(accelerator: str, count: int) -> list[torch.device]:
    if accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available()):
        return [torch.device("cpu")] * count
    if torch.cuda.device_count() < count:
        raise ValueError(f"--accelerator {accelerator} --devices {count}: there are {torch.cuda.device_count()} GPUs")
    return [torch.device("cuda", number) for number in range(count)]


def _measure_all(
    missing: Sequence[Measurement], devices: Sequence[torch.device], evaluation: Evaluation, console: Console
) -> None:
    """Measure and cache; one thread per device takes the next measurement from the common list."""
    pending, stopped, numbers = iter(missing), threading.Event(), itertools.count(1)
    progress = Progress(console=console, transient=True, disable=not console.is_terminal)
    bar = progress.add_task("measurements", total=len(missing))

    def work(device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        for one in pending:
            if stopped.is_set():
                return
            measure(one, device)

    def measure(one: Measurement, device: torch.device) -> None:
        def advance(done: int, total: int) -> None:
            if stopped.is_set():
                raise CancelledError
            progress.update(own, completed=done, total=total)

        own, started = progress.add_task(f"{one.label}: {one.name}", total=None), time.monotonic()
        # devices have weights of their own
        model = (copy.deepcopy(one.model) if len(devices) > 1 else one.model).to(device)
        try:
            record = one.function(model, replace(evaluation, progress=advance))
        except (ValueError, MemoryError) as error:
            raise ValueError(f"{one.label}, {one.name}: {error}") from error
        seconds = time.monotonic() - started
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
        one.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(one.path) as file:
            file.write(json.dumps(record | {"seconds": round(seconds, 3), "device": name}))
        progress.remove_task(own)
        progress.advance(bar)
        line = f"{one.label}: {one.name} ({next(numbers)} of {len(missing)}): {seconds:.1f} s"
        progress.console.print(line, soft_wrap=True, markup=False)

    # precision and random state are global: set here, they stay set until the last thread has finished
    with measuring(torch.nn.Identity()), progress, ThreadPoolExecutor(len(devices)) as pool:
        try:
            for future in as_completed([pool.submit(work, device) for device in devices]):
                future.result()
        finally:
            stopped.set()


def _write(folder: Path, records: Records, runs: Mapping[str, TrainedModel], settings: Any) -> list[str]:
    """Write ``ranks.csv``, ``ranks.json`` and the figures; return their names, those of figures as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "ranks.csv") as file:
        _table(records, settings.rtol).to_csv(file, index=False, lineterminator="\r\n")
    checkpoints: dict[str, Any] = {}
    for label, own in records.items():
        kept = {name: {key: record[key] for key in record if key != "rows"} for name, record in own.items()}
        checkpoints[label] = {**runs[label].about, "measurements": kept}
    document = {
        "settings": vars(settings),
        "versions": versions("torch", "pytorch-lightning", "tensorly"),
        "rtol": settings.rtol,
        "checkpoints": checkpoints,
    }
    # numbers that are not finite, which JSON does not have, become null
    write_json(folder / "ranks.json", json.loads(json.dumps(document, default=str), parse_constant=lambda _: None))
    figures = _figures(records, settings.rtol)
    for name, figure in figures.items():
        save_figure(figure, folder / name)
    return ["ranks.csv", "ranks.json", *(f"{name}.png" for name in figures)]


def _table(records: Records, rtol: float) -> pd.DataFrame:
    """One number per row; the rows of spectra are followed by their ranks at ``rtol``."""
    rows = []
    for label, own in records.items():
        for record in own.values():
            rows += [[label, *row] for row in record["rows"]]
            if record["type"] == "spectra":
                quantity, ranks = f"{record['prefix']}rank_at_{rtol:g}", _ranks(_spectra(record), rtol)
                before, none = f"{record['within']}/" if record["within"] else "", [None] * 3
                rows += [[label, quantity, f"{before}{node_name(node)}", value, *none] for node, value in ranks.items()]
    # as objects, so that whole numbers stay whole
    return pd.DataFrame(rows, columns=_COLUMNS, dtype=object)


def _spectra(record: Record) -> NodeSpectra:
    content = record["content"]
    nodes = {name: tuple(map(int, name.split("-"))) for name in content["values"]}
    values = {nodes[name]: torch.tensor(values).double() for name, values in content["values"].items()}
    tolerance = {nodes[name]: value for name, value in content["tolerance"].items()}
    return NodeSpectra(values, tolerance, content["log_scale"])


def _ranks(spectra: NodeSpectra, rtol: float) -> dict[Node, int]:
    """Ranks at a relative size, but never one that counts rounding."""
    numerical = spectra.ranks()
    return {node: min(rank, numerical[node]) for node, rank in spectra.ranks(rtol).items()}


def _figures(records: Records, rtol: float) -> dict[str, Figure]:
    every = [(label, record) for label, own in records.items() for record in own.values()]
    figures: dict[str, Figure] = {}
    for prefix in ("", "block_"):
        spectra = {
            f"{label}, {record['within']}" if record["within"] else label: _spectra(record)
            for label, record in every
            if record["type"] == "spectra" and record["prefix"] == prefix
        }
        if spectra:
            figures[f"{prefix}spectra"] = spectra_figure(spectra)
        trees: dict[ModeTree, dict[str, dict[Node, int]]] = {}
        for label, one in spectra.items():
            # cuts that overlap form no tree
            with suppress(ValueError):
                trees.setdefault(ModeTree(list(one)), {})[label] = _ranks(one, rtol)
        for number, (tree, ranks) in enumerate(trees.items(), start=1):
            name = f"{prefix}tree" if number == 1 else f"{prefix}tree_{number}"
            figures[name] = tree_figure(tree, ranks, f"rank at {rtol:g}")
    profiles: dict[str, InteractionProfile] = {}
    cuts: dict[str, dict[str, Any]] = {}
    for label, record in every:
        if record["type"] == "profile":
            profiles[label] = InteractionProfile.from_dict(record["content"])
        elif record["type"] == "cut":
            cuts.setdefault(label, {})[record["name"]] = SimpleNamespace(**record["content"])
    if profiles:
        figures["profile"] = profile_figure(profiles)
    if cuts:
        figures["cuts"] = cut_figure(cuts)
    return figures


def _summary(records: Records, rtol: float) -> Table:
    """The headline numbers of every checkpoint."""
    table = Table("checkpoint", "measured", "result")
    for label, own in records.items():
        lines = [line for name, record in own.items() for line in _headlines(name, record, rtol)]
        table.add_section()
        for number, line in enumerate(lines):
            table.add_row("" if number else label, *line)
    return table


def _headlines(name: str, record: Record, rtol: float) -> Iterator[tuple[str, str]]:
    content = record["content"]
    match record["type"]:
        case "spectra":
            spectra = _spectra(record)
            numbers: dict[str, list[float]] = {
                "rank": [*spectra.ranks().values()],
                f"rank at {rtol:g}": [*_ranks(spectra, rtol).values()],
                "effective rank": [float(one["effective_rank"]) for one in spectra.table()],
            }
            for quantity, values in numbers.items():
                yield f"{name}: {quantity}", f"{min(values):.3g} to {max(values):.3g}, median {median(values):.3g}"
        case "cut":
            yield name, f"{100 * content['share']:.3g} % +- {100 * content['standard_error']:.3g} %"
        case "profile" if content["mean_distance"] is None:
            yield name, "no interaction between patches"
        case "profile":
            low, high = content["mean_distance_low"], content["mean_distance_high"]
            band = "" if low is None or high is None else f" ({low:.3g} to {high:.3g})"
            equal = f"{content['uniform_mean_distance']:.3g} if all pairs were equal"
            yield "mean distance", f"{content['mean_distance']:.3g} px{band}, {equal}"
            yield "r50, r90", f"{content['r50']:g} px, {content['r90']:g} px"
