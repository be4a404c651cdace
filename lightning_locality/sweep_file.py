"""The YAML file of a sweep, and the runs that it describes."""

from __future__ import annotations

__all__ = ["SweepFile"]

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self, final, get_args

from filelock import FileLock, Timeout

from lightning_locality.results import find_config, load_yaml, nearest

Cluster = Literal["local", "slurm"]

MAX_RUNS = 100_000
_FILES = (".lock", "results.csv")  # of the sweep, next to the folders of its runs

_SHAPES = {
    "configs": (list, "a list of configuration files"),
    "set": (dict, "a mapping of options to values"),
    "variants": (dict, "a mapping of names to configs and set"),
    "grid": (dict, "a mapping of options to lists of values"),
    "devices": (list, "a list of GPUs, as [0, 1]"),
    "slurm": (dict, "a mapping, as {partition: gpu, time: 600}"),
}


@final
@dataclass(frozen=True)
class Run:
    """One run: its labels (``variant`` and grid point by short name), its command line and its directory."""

    labels: Mapping[str, Any]
    arguments: tuple[str, ...]
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether the run has written its summary, which it does last."""
        return (self.folder / "summary.json").exists()

    @property
    def settings(self) -> list[str]:
        """The options that the sweep sets, as ``--name=value``."""
        return [a for a in self.arguments[1:] if not a.startswith(("--config=", "--run_dir=", "--labels="))]

    @property
    def held(self) -> bool:
        """Whether another process works on the run."""
        with suppress(Timeout), self.lock(".claim"), self.lock():
            return False
        return True

    def lock(self, name: str = ".lock") -> FileLock:
        """Lock the run directory as a run does, or with ``.claim`` as a sweep, without waiting for it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / name, timeout=0)


@final
@dataclass(frozen=True)
class SweepFile:
    """A grid of runs, as a YAML file describes it with the keys below.

    Args:
        path: The file; configurations are relative to its folder.
        configs: Configuration files of every run.
        set: Option -> value, for every run.
        variants: Name of a row of the results -> ``configs`` and ``set`` of its own.
        grid: Option -> list of values; every variant is run at every combination. Options that share their values are
            one entry: ``seed_everything, data.seed: [0, 1, 2]``.
        out: Folder for the results (default: ``runs/NAME`` of the file).
        figure: Figure drawn of the runs: its ``kind`` and the options of ``lightning-locality figure KIND``.
        parallel: Runs at a time on this machine (default: one per group of GPUs, or per core without GPUs).
        devices: GPUs of this machine to use (default: all).
        devices_per_run: Devices of one run, each with its own process.
        cluster: ``local`` (this machine) or ``slurm``.
        slurm: Options of the jobs as submitit names them: ``partition``, ``time`` in minutes, ``gpus_per_node``,
            ``cpus_per_task``, ``mem``, ``array_parallelism``, ...

    Raises:
        ValueError: A value of the wrong kind.
    """

    path: Path
    configs: Sequence[str] = ()
    set: Mapping[str, Any] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    out: Any = None
    figure: Mapping[str, Any] | None = None
    parallel: int | None = None
    devices: Sequence[int | str] | None = None
    devices_per_run: int = 1
    cluster: Cluster = "local"
    slurm: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (kind, shape) in _SHAPES.items():
            if (value := getattr(self, name)) not in (None, ()) and not isinstance(value, kind):
                self._refuse(f"{name} must be {shape}, got {value!r}")
        for name, own in self.variants.items():
            _check_keys(own or {}, f"{self.path}: variant {str(name)!r}", ("configs", "set"))
        for own in (vars(self), *self.variants.values()):
            configs, options = (own or {}).get("configs") or (), (own or {}).get("set") or {}
            if not isinstance(configs, (list, tuple)) or not all(isinstance(config, str) for config in configs):
                self._refuse(f"configs must be {_SHAPES['configs'][1]}, got {configs!r}")
            if not isinstance(options, dict):
                self._refuse(f"set must be {_SHAPES['set'][1]}, got {options!r}")
        for option, values in self.grid.items():
            if not isinstance(values, list) or not values:
                self._refuse(f"grid: {option} must be a list of values, as [0, 1], got {values!r}")
        for name, count in (("parallel", self.parallel), ("devices_per_run", self.devices_per_run)):
            if count is not None and (type(count) is not int or count < 1):
                self._refuse(f"{name} must be at least 1, got {count!r}")
        if self.out is not None and not isinstance(self.out, (str, Path)):
            self._refuse(f"out must be a folder, got {self.out!r}")
        count = math.prod(map(len, self.grid.values())) * max(1, len(self.variants))
        if count > MAX_RUNS:
            self._refuse(f"the grid has {count:,} runs, more than the {MAX_RUNS:,} that a sweep may have")
        if self.cluster not in get_args(Cluster):
            self._refuse(f"cluster must be one of local, slurm, got {self.cluster!r}")
        for name, value in self.slurm.items():
            if name in ("nodes", "tasks_per_node", "ntasks_per_node"):
                self._refuse(f"slurm: {name} follows from devices_per_run: leave it out (a run has one node)")
            if name in ("time", "timeout_min") and (not isinstance(value, int) or value < 1):
                self._refuse(f"slurm: {name} must be a whole number of minutes, got {value!r}")
            if name == "gpus_per_node" and isinstance(value, int) and 0 < value < self.devices_per_run:
                self._refuse(f"slurm: gpus_per_node is {value}, but devices_per_run {self.devices_per_run}")
        if self.figure is not None:
            from lightning_locality.plotting.command import check_figure  # here because matplotlib takes a second

            try:
                grid = [option.strip() for options in self.grid for option in options.split(",")]
                varied = [name for variant in self.variants.values() for name in (variant or {}).get("set") or {}]
                check_figure(self.figure, list(dict.fromkeys(["variant", *self._axes, *grid, *self.set, *varied])))
            except ValueError as error:
                self._refuse(str(error))

    def _refuse(self, message: str) -> None:
        raise ValueError(f"{self.path}: {message}")

    @classmethod
    def read(
        cls, path: Path, out: Path | None = None, parallel: int | None = None, cluster: Cluster | None = None
    ) -> Self:
        """Read a sweep file; the other arguments replace its entries unless None.

        It has the keys of this class, and may name a ``base``: another sweep file, whose entries hold unless it has
        them itself.

        Raises:
            FileNotFoundError: Neither a file nor a sweep that comes with the package.
            ValueError: Unknown keys or values of the wrong kind.
        """
        path = find_config(path, "sweeps/")
        content = _load(path)
        for name, value in (("out", out), ("parallel", parallel), ("cluster", cluster)):
            content[name] = content.get(name) if value is None else value
        return cls(path, **{name: value for name, value in content.items() if value is not None})

    @property
    def folder(self) -> Path:
        """Folder that holds the run directories and ``results.csv``."""
        return Path(self.out or Path("runs") / self.path.stem)

    @property
    def _axes(self) -> list[str]:
        """Short name of each grid entry: the last word of its first option, or the whole option if ambiguous."""
        firsts = [entry.split(",")[0].strip() for entry in self.grid]
        words = [first.split(".")[-1] for first in firsts]
        return [word if words.count(word) == 1 else first for first, word in zip(firsts, words, strict=True)]

    def runs(self) -> list[Run]:
        """List every variant at every point of the grid, variants varying fastest.

        Raises:
            ValueError: A configuration that does not exist, or runs that would share a directory.
        """
        runs: dict[Path, Run] = {}
        for values in itertools.product(*self.grid.values()):
            entries = zip(self.grid, values, strict=True)
            options = {option.strip(): value for entry, value in entries for option in entry.split(",")}
            point = dict(zip(self._axes, values, strict=True))
            for variant, own in (self.variants or {"run": None}).items():
                run = self._run({"variant": str(variant), **point}, own or {}, options)
                if run.folder in runs:
                    self._refuse(
                        f"two runs would share the folder {run.folder}: give the variants names that differ in letters "
                        "or digits, and every value of the grid once"
                    )
                runs[run.folder] = run
        return list(runs.values())

    def _run(self, labels: Mapping[str, Any], own: Mapping[str, Any], point: Mapping[str, Any]) -> Run:
        configs = [self.path.parent / name for name in (*self.configs, *(own.get("configs") or ()))]
        for config in configs:
            if not config.is_file():
                self._refuse(f"variant {labels['variant']!r} names {config}, which does not exist")
        devices = {"trainer.devices": self.devices_per_run} if self.devices_per_run > 1 else {}
        options = {**devices, **self.set, **(own.get("set") or {}), **point}
        if devices and (count := options["trainer.devices"]) != self.devices_per_run:
            self._refuse(f"devices_per_run is {self.devices_per_run}, but trainer.devices {count!r}: leave one out")
        name = "-".join(str(v) if key == "variant" else f"{key}={v}" for key, v in labels.items())
        name = "".join(c if c.isalnum() or c in ".-=" else "_" for c in name)
        if not name.strip(".") or name in _FILES:
            self._refuse(f"variant {labels['variant']!r} cannot be the name of a folder of its own in {self.folder}")
        folder = self.folder / name
        arguments = ["fit", *(f"--config={config}" for config in configs)]
        arguments += [f"--{key}={v if isinstance(v, str) else json.dumps(v)}" for key, v in options.items()]
        arguments += [f"--run_dir={folder}", f"--labels={json.dumps(labels)}"]
        return Run(labels, tuple(arguments), folder)


def _load(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read the content of a sweep file, completed by that of its base; ``above`` are the files whose base it is."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no sweep file {path}")
    if (resolved := path.resolve()) in above:
        raise ValueError(f"{path}: base leads back to the file itself")
    content = load_yaml(path)
    _check_keys(content, str(path), ("base", *(one.name for one in fields(SweepFile) if one.name != "path")))
    base = content.pop("base", None)
    return {**_load(path.parent / str(base), (*above, resolved)), **content} if base else content


def _check_keys(content: Any, where: str, known: Sequence[str]) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected a mapping with keys out of {', '.join(known)}, got {content!r}")
    for key in content:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(str(key), known)}; known: {', '.join(known)}")
