"""The runs of a sweep, read from its file."""

from __future__ import annotations

__all__ = ["Run", "Sweep"]

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, final, get_args

import yaml

from lightning_locality.suggest import nearest
from lightning_locality.sweep_figure import SweepFigure

Cluster = Literal["local", "slurm"]
_SWEEP_KEYS = (
    *("base", "out", "parallel", "cluster", "slurm", "devices", "devices_per_run"),
    *("configs", "set", "variants", "grid", "figure"),
)
_VARIANT_KEYS = ("configs", "set")
# set by devices_per_run: one task starts the processes of all devices of its run
_ONE_TASK = ("nodes", "tasks_per_node", "ntasks_per_node")


@final
@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Args:
        variant: Name of the row it belongs to.
        point: The values of the grid at this run, by the last word of the option's name (by the whole name where
            two options share the word).
        arguments: What follows ``lightning-locality`` on the command line.
        folder: Folder of the run.
    """

    variant: str
    point: Mapping[str, Any]
    arguments: tuple[str, ...]
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether the run has left its summary."""
        return (self.folder / "summary.json").exists()

    @property
    def claim(self) -> Path:
        """File that the process of the run locks."""
        return self.folder / ".claim"


@final
@dataclass(frozen=True)
class Sweep:
    """Runs that belong together.

    Args:
        runs: Every variant at every point of the grid, variants varying fastest.
        folder: Folder that holds the folders of the runs.
        parallel: Runs at a time on this machine; None for one per group of GPUs, or per core where there are none.
        figure: What is drawn of them.
        cluster: Where they run.
        slurm: Options of the jobs on SLURM, in the words of submitit.
        devices_per_run: Devices, with a process each, of one run.
        devices: GPUs of this machine that are used; None for all.
    """

    runs: tuple[Run, ...]
    folder: Path
    parallel: int | None
    figure: SweepFigure = field(default_factory=SweepFigure)
    cluster: Cluster = "local"
    slurm: Mapping[str, Any] = field(default_factory=dict)
    devices_per_run: int = 1
    devices: tuple[str, ...] | None = None

    @classmethod
    def read(cls, path: Path, out: Path | None = None) -> Self:
        """Read a sweep file.

        Args:
            path: YAML with ``out`` (folder for the results), ``configs`` (configuration files, relative to this
                one), ``set`` (option -> value), ``variants`` (name of a row -> ``configs`` and ``set`` of its own)
                and ``grid`` (option -> list of values; every variant is run at every combination). Several options
                that share their values are one entry of the grid: ``seed_everything, data.seed: [0, 1, 2]``.
                ``figure`` says what is drawn (``kind``, see
                :class:`~lightning_locality.sweep_figure.SweepFigure`, and its options). ``base`` names another
                sweep file whose entries hold where this one has none. Where it runs: ``cluster`` (``local`` or
                ``slurm``), ``parallel`` (runs at a time on this machine), ``devices`` (list of its GPUs),
                ``devices_per_run`` and ``slurm`` (options of the jobs as submitit names them: ``partition``,
                ``time`` in minutes, ``gpus_per_node``, ``cpus_per_task``, ``mem``, ``array_parallelism``, ...).
            out: Folder for the results, instead of the file's.

        Raises:
            ValueError: Unknown keys, a configuration that does not exist, or runs that would share a folder.
        """
        content = _load(path)
        folder = out or Path(content.get("out") or Path("runs") / path.stem)
        variants = content.get("variants") or {"run": None}
        grid = _mapping_of_lists(content.get("grid") or {}, path)
        per_run = _positive(content.get("devices_per_run", 1), f"{path}: devices_per_run")
        names = _names(list(grid))
        runs: dict[Path, Run] = {}
        for values in itertools.product(*grid.values()):
            point = dict(zip(grid, values, strict=True))
            named = {names[keys]: value for keys, value in point.items()}
            for variant, settings in variants.items():
                own = _mapping(settings or {}, f"{path}: variant {variant!r}", _VARIANT_KEYS)
                configs = [
                    path.parent / name for name in (*(content.get("configs") or ()), *(own.get("configs") or ()))
                ]
                for config in configs:
                    if not config.is_file():
                        raise ValueError(f"{path}: variant {variant!r} names {config}, which does not exist")
                options: dict[str, Any] = {"trainer.devices": per_run} if per_run > 1 else {}
                options |= {**(content.get("set") or {}), **(own.get("set") or {})}
                options |= {key.strip(): value for keys, value in point.items() for key in keys.split(",")}
                if per_run > 1 and options["trainer.devices"] != per_run:
                    raise ValueError(
                        f"{path}: devices_per_run is {per_run}, but trainer.devices {options['trainer.devices']!r}: "
                        "leave one of them out"
                    )
                name = _slug("-".join([str(variant), *(f"{axis}={value}" for axis, value in named.items())]))
                arguments = (
                    "fit",
                    *(f"--config={config}" for config in configs),
                    *(f"--{key}={v if isinstance(v, str) else json.dumps(v)}" for key, v in options.items()),
                    f"--run_dir={folder / name}",
                )
                if folder / name in runs:
                    raise ValueError(
                        f"{path}: two runs would share the folder {folder / name}: give the variants names that "
                        "differ in letters or digits, and every value of the grid once"
                    )
                runs[folder / name] = Run(str(variant), named, arguments, folder / name)
        cluster: Any = content.get("cluster", "local")
        if cluster not in get_args(Cluster):
            raise ValueError(f"{path}: cluster must be one of {', '.join(get_args(Cluster))}, got {cluster!r}")
        parallel, devices = content.get("parallel"), content.get("devices")
        if devices is not None and not isinstance(devices, list):
            raise ValueError(f"{path}: devices must be a list of GPUs, as [0, 1], got {devices!r}")
        return cls(
            tuple(runs.values()),
            folder,
            None if parallel is None else _positive(parallel, f"{path}: parallel"),
            SweepFigure.read(content.get("figure"), str(path)),
            cluster,
            _slurm(content.get("slurm") or {}, per_run, path),
            per_run,
            None if devices is None else tuple(str(device) for device in devices),
        )


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no sweep file {path}")
    content = _mapping(yaml.safe_load(path.read_text()), str(path), _SWEEP_KEYS)
    base = content.pop("base", None)
    return {**_load(path.parent / base), **content} if base else content


def _mapping(content: Any, where: str, known: Sequence[str]) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected a mapping with keys out of {', '.join(known)}, got {content!r}")
    for key in content:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(str(key), known)}; known: {', '.join(known)}")
    return content


def _mapping_of_lists(grid: Any, path: Path) -> dict[str, list[Any]]:
    if not isinstance(grid, dict):
        raise ValueError(f"{path}: grid must be a mapping of options to lists of values, got {grid!r}")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path}: grid: {key} must be a list of values, as [0, 1], got {values!r}")
    return grid


def _slurm(options: Any, per_run: int, path: Path) -> dict[str, Any]:
    """Options of the jobs, checked as far as that goes without SLURM."""
    if not isinstance(options, dict):
        raise ValueError(f"{path}: slurm must be a mapping, as {{partition: gpu, time: 600}}, got {options!r}")
    for key in _ONE_TASK:
        if key in options:
            raise ValueError(f"{path}: slurm: {key} follows from devices_per_run: leave it out (a run has one node)")
    for key in ("time", "timeout_min"):
        if key in options and (not isinstance(options[key], int) or options[key] < 1):
            raise ValueError(f"{path}: slurm: {key} must be a whole number of minutes, got {options[key]!r}")
    gpus = options.get("gpus_per_node")
    if isinstance(gpus, int) and 0 < gpus < per_run:
        raise ValueError(f"{path}: slurm: gpus_per_node is {gpus}, but devices_per_run {per_run}")
    return options


def _positive(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")
    return value


def _names(keys: Sequence[str]) -> dict[str, str]:
    """Short names of the axes: the last word of the first of several options, where no other axis has it."""
    firsts = {key: key.split(",")[0].strip() for key in keys}
    words = [first.split(".")[-1] for first in firsts.values()]
    return {key: word if words.count(word) == 1 else firsts[key] for key, word in zip(keys, words, strict=True)}


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in ".-=" else "_" for c in text)
