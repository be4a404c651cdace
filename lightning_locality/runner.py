"""One run: Lightning's command line over tasks and data modules, and the directory that holds its results."""

from __future__ import annotations

__all__ = ["run"]

import csv
import difflib
import inspect
import json
import os
import platform
import re
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import datetime
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NoReturn

import filelock
import numpy as np
import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import distributed, nn

import lightning_locality
from lightning_locality.callbacks.history import MetricsFile, Stopwatch, use_atomic_checkpoints
from lightning_locality.callbacks.stopping import StopAfter
from lightning_locality.datamodules.base import AbstractImageDataModule
from lightning_locality.plotting.recovery import component_curves, magnitude_groups
from lightning_locality.plotting.style import save_figure
from lightning_locality.plotting.training import example_inputs, training_curves
from lightning_locality.regularizer.anti_locality import AntiLocality
from lightning_locality.regularizer.patches import AbstractPatches
from lightning_locality.results import atomic_write, flatten, history, last_metrics, read_settings, write_json

_PROGRAM = "lightning-locality"
_PACKAGES = ("lightning-locality", "torch", "torchvision", "pytorch-lightning")
_TRACES = ("config.yaml", "metrics.csv", "last.ckpt", "best.ckpt")
_RANKS = ("RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK")
_SHARED_DIR = "LIGHTNING_LOCALITY_RUN_DIR"
_PARENT_PIPE = "LIGHTNING_LOCALITY_PARENT_PIPE"
_IN_USE = 75  # EX_TEMPFAIL of sysexits.h, which Windows lacks
_EXAMPLES = 4
_EXPECTED_WARNINGS = (
    ".*treespec, LeafSpec.*",  # Lightning 2.6 with torch 2.15
    "Checkpoint directory .* exists and is not empty",  # it holds the configuration before the first checkpoint
    "The dirpath has changed",  # a checkpoint of one run may be tested, or resumed, in another folder
    "Be aware that when using `ckpt_path`",  # testing needs no checkpoint callback
    ".*but have no `validation_step`",  # a module may do without validation
    ".*smaller than the logging interval.*",  # metrics are logged per epoch
    "LightningCLI's args parameter",  # the command line hands over a part of sys.argv
    ".*does not have many workers.*",  # batches are index tensors; workers would cost more than they bring
)


def _is_first_process() -> bool:
    """Whether this process has rank 0, before Lightning has set up its strategy."""
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


class RunDirectory:
    """Directory of a run: ``path``, else the folder of the checkpoint, else ``runs/DATE_TIME``.

    All processes of a launch choose the same one, one launch at a time trains in it, and it holds one run.
    """

    def __init__(self, path: str | None, checkpoint: str | None) -> None:
        if path or checkpoint:
            self.path = Path(path or Path(str(checkpoint)).parent)
        elif not _is_first_process() and _SHARED_DIR in os.environ:
            self.path = Path(os.environ[_SHARED_DIR])
        else:
            launch = os.environ.get("TORCHELASTIC_RUN_ID") or os.environ.get("SLURM_JOB_ID")
            if launch in (None, "none"):
                launch = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
            self.path = Path("runs") / launch
            # processes that Lightning starts inherit it
            os.environ[_SHARED_DIR] = str(self.path)

    def refuse_used(self) -> None:
        """Raise FileExistsError if the directory holds an earlier run."""
        found = [name for name in _TRACES if (self.path / name).exists()]
        if found:
            raise FileExistsError(
                f"run_dir {self.path} holds an earlier run ({', '.join(found)}): choose another --run_dir, or continue "
                f"that run with --run_dir {self.path} --ckpt_path last"
            )

    def lock(self) -> filelock.BaseFileLock:
        """Lock the directory until the lock is released; exit with status 75 if another process is training in it."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            print(f"{_PROGRAM}: run_dir {self.path} is in use by another process", file=sys.stderr)
            raise SystemExit(_IN_USE) from None
        return lock

    def keep_earlier_config(self) -> None:
        """Rename the configuration of the earlier part of a resumed run, which the new one would replace."""
        config = self.path / "config.yaml"
        if config.exists():
            config.rename(self.path / f"config.{len(list(self.path.glob('config.*.yaml')))}.yaml")


def _find_checkpoint(name: str, run_dir: str | None) -> Path:
    """Return the path of a checkpoint given as a path, or as ``last`` or ``best`` of a run directory."""
    path = Path(name)
    if name in ("last", "best"):
        if run_dir is None:
            raise FileNotFoundError(f"--ckpt_path {name}: name its run by --run_dir, or give the checkpoint's path")
        path = Path(run_dir) / f"{name}.ckpt"
    if not path.is_file():
        raise FileNotFoundError(f"--ckpt_path {name}: there is no file {path}")
    return path


class LocalityCLI(LightningCLI):
    """Lightning's command line; every run has a directory, and a checkpoint never overrides what was typed."""

    run_dir: Path
    fit_started: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.stopwatch = Stopwatch()
        with ExitStack() as self._held:
            super().__init__(*args, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of a run."""
        run_dir = (
            "Directory for config, metrics, checkpoints and figures (default: runs/<date and time>, or the folder of "
            "the checkpoint if --ckpt_path is given)."
        )
        test = "Test after fit, with the last weights (as published) or the best on validation."
        labels = "Labels copied to summary.json, by which tables and figures group runs."
        parser.add_argument("--run_dir", type=str | None, default=None, help=run_dir)
        parser.add_argument("--test_after_fit", type=Literal["no", "last", "best"], default="no", help=test)
        parser.add_argument("--labels", type=dict[str, Any] | None, default=None, help=labels)

    def _parse_ckpt_path(self) -> None:
        """Keep what was typed and warn if the checkpoint differs; Lightning would take the checkpoint's settings."""
        if not self.config.get("subcommand"):
            return
        config = self.config[self.config.subcommand]
        if not config.get("ckpt_path"):
            return
        path = _find_checkpoint(config.ckpt_path, config.run_dir)
        config.ckpt_path = str(path)
        stored = torch.load(path, weights_only=True, map_location="cpu").get("hyper_parameters", {})
        typed = config.get("model") or {}
        typed = json.loads(json.dumps(typed.as_dict() if hasattr(typed, "as_dict") else typed, default=str))
        values = _comparable({"class_path": typed.get("class_path"), **(typed.get("init_args") or {})})
        trained = _comparable({"class_path": stored.pop("_class_path", None), **stored})
        for name in sorted(values.keys() & trained.keys()):
            if values[name] != trained[name]:
                rank_zero_warn(
                    f"{name}: the checkpoint {path} was trained with {trained[name]!r}, the command line says "
                    f"{values[name]!r}; the command line's value is used"
                )

    def before_instantiate_classes(self) -> None:
        """Choose the run directory, and refuse what would lose results or mislead."""
        config = self.config[self.subcommand]
        checkpoint = config.get("ckpt_path")
        if self.subcommand in ("validate", "test", "predict") and not checkpoint:
            raise ValueError(
                f"{self.subcommand} without a checkpoint would measure a network with random weights: pass "
                "--ckpt_path runs/NAME/best.ckpt (or last.ckpt), or --run_dir runs/NAME --ckpt_path best"
            )
        self.directory = RunDirectory(config.run_dir, checkpoint)
        self.run_dir = self.directory.path
        self.recorded = self.subcommand == "fit" and not config.trainer.fast_dev_run
        if self.subcommand != "fit":
            self.save_config_callback = None
        if self.recorded and _is_first_process():
            self._held.enter_context(self.directory.lock())
        if self.recorded and not checkpoint:
            self.directory.refuse_used()
        config.run_dir = str(self.run_dir)
        if not sys.stdout.isatty():
            for name in ("enable_progress_bar", "enable_model_summary"):
                if config.trainer[name] is None:
                    config.trainer[name] = False

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the metrics file and the best and last checkpoints to the configured loggers and callbacks."""
        config = self._get(self.config_init, "trainer", default={})
        logger, callbacks = config.get("logger"), list(config.get("callbacks") or [])
        keeps = config.get("enable_checkpointing") is False or any(isinstance(c, ModelCheckpoint) for c in callbacks)
        if logger is not False:
            typed = [] if logger in (None, True) else [logger] if isinstance(logger, Logger) else list(logger)
            # only a fit has a history; the other commands write their scores to files of their own
            own = [MetricsFile(self.run_dir)] if self.recorded else []
            kwargs["logger"] = [*own, *typed]
            callbacks += own
        if self.recorded:
            callbacks += [self.stopwatch] if keeps else [self.stopwatch, *self._checkpoints()]
        root = str(config.get("default_root_dir") or self.run_dir)
        return use_atomic_checkpoints(super().instantiate_trainer(callbacks=callbacks, default_root_dir=root, **kwargs))

    def _checkpoints(self) -> list[ModelCheckpoint]:
        """Keep the last epoch, and the best one if the model names a metric to monitor."""
        monitor = getattr(self.model, "monitor", None)
        # after the whole epoch, so that a resumed run repeats nothing
        common: dict[str, Any] = {"save_on_train_epoch_end": True, "enable_version_counter": False}
        last = ModelCheckpoint(dirpath=self.run_dir, filename="last", **common)
        if monitor is None:
            return [last]
        return [ModelCheckpoint(dirpath=self.run_dir, filename="best", monitor=monitor, mode="max", **common), last]

    def before_fit(self) -> None:
        """Keep the configuration of the part of the run that is resumed."""
        if self.trainer.is_global_zero and self.recorded:
            self.directory.keep_earlier_config()
        self.fit_started = time.time()

    def after_fit(self) -> None:
        """Test if requested, and write figures and summary."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, StopAfter) and callback.stopped for callback in callbacks):
            rank_zero_info(f"out of time; continue with --run_dir {self.run_dir} --ckpt_path last")
            return
        scores = self._scores()
        counts: dict[str, float] = {"epochs": self.trainer.current_epoch}
        own_summary = getattr(self.model, "summary", None)
        if own_summary is not None:
            metrics, more = own_summary(time.time() - self.fit_started)
            scores, counts = scores | metrics, counts | more
        choice = self._get(self.config, "test_after_fit")
        if choice != "no":
            checkpoint = self.trainer.checkpoint_callback
            path = getattr(checkpoint, "best_model_path", "") if choice == "best" else ""
            results = self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=path or None, verbose=False)
            scores |= {key: float(value) for key, value in results[0].items()}
        if self.trainer.is_global_zero and self.recorded:
            if own_summary is None:  # a run killed after its last epoch measures nothing again
                scores = last_metrics(self.run_dir) | scores
            _write_figures(self.run_dir, self.model, self.datamodule)
            self._write_summary(scores, counts)  # last: a run that has one is finished
            rank_zero_info(", ".join([*_in_words(scores, counts), f"run folder: {self.run_dir}"]))

    def _write_summary(self, scores: dict[str, float], counts: dict[str, float]) -> None:
        device = self.trainer.strategy.root_device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
        config = read_settings(self.run_dir)
        write_json(
            self.run_dir / "summary.json",
            {
                "labels": self._get(self.config, "labels") or {},
                "metrics": scores,
                **counts,
                "steps": self.trainer.global_step,
                "seconds": round(self.stopwatch.seconds, 1),
                "device": {"name": name, "processes": self.trainer.world_size, "threads": torch.get_num_threads()},
                "versions": {package: version(package) for package in _PACKAGES},
                "seeds": {k: v for k, v in flatten(config) if k.split(".")[-1] in ("seed", "seed_everything")},
                "config": config,
            },
        )

    def predict(self, **kwargs: Any) -> None:
        """Predict, and write the class probabilities as a table."""
        _write_predictions(self.run_dir / "predictions.csv", self.trainer.predict(**kwargs) or [])

    def after_validate(self) -> None:
        """Write the scores next to the checkpoint."""
        self._write_scores("validate")

    def after_test(self) -> None:
        """Write the scores next to the checkpoint."""
        self._write_scores("test")

    def _write_scores(self, name: str) -> None:
        if self.trainer.is_global_zero:
            checkpoint = self._get(self.config, "ckpt_path")
            self.run_dir.mkdir(parents=True, exist_ok=True)
            write_json(self.run_dir / f"{name}.json", {"checkpoint": checkpoint, "metrics": self._scores()})

    def _scores(self) -> dict[str, float]:
        return {key: float(value) for key, value in self.trainer.callback_metrics.items()}


def _comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that are given, by dotted name, and classes by their name alone: modules may move."""
    given = {name: value for name, value in flatten(settings) if value is not None}
    return {k: v.rpartition(".")[2] if k.endswith("class_path") else v for k, v in given.items()}


def _in_words(scores: dict[str, float], counts: dict[str, float]) -> list[str]:
    if "iterations" in counts:
        errors = [f"{name} {scores[name]:.3g}" for name in ("train/loss", "reconstruction_error") if name in scores]
        return [f"{counts['iterations']:.0f} iterations ({counts['iterations_per_second']:.0f} per second)", *errors]
    return [f"{counts['epochs']:.0f} epochs", *(f"{k} {v:.4f}" for k, v in scores.items() if k.endswith("accuracy"))]


def _write_predictions(path: Path, batches: Sequence[Any]) -> None:
    """Write class probabilities, one row per sample in the order of the test images; every process must call it.

    Process r of W predicts every W-th sample, from the r-th.
    """
    parts = [[row for batch in batches for row in batch.tolist()]]
    if distributed.is_available() and distributed.is_initialized():
        mine, parts = parts[0], [[] for _ in range(distributed.get_world_size())]
        distributed.all_gather_object(parts, mine)
        if distributed.get_rank() != 0:
            return
    rows = sorted((k * len(parts) + rank, *row) for rank, part in enumerate(parts) for k, row in enumerate(part))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        writer = csv.writer(file)
        writer.writerow(["index", *(f"probability_{k}" for k in range(len(rows[0]) - 1 if rows else 0))])
        writer.writerows(rows)


def _write_figures(folder: Path, model: LightningModule, data: LightningDataModule | None) -> None:
    """Draw the curves of a run, and inputs with the patches of its penalty outlined, into ``FOLDER/figures``."""
    if (folder / "metrics.csv").exists():
        measurements = history(folder, "iteration")
        if magnitude_groups(measurements.columns):
            save_figure(component_curves({folder.name: measurements}), folder / "figures" / "dynamics")
        else:
            save_figure(training_curves(history(folder)), folder / "figures" / "training")
    if not isinstance(data, AbstractImageDataModule):
        return
    penalty = getattr(model, "penalty", None)
    images, labels = data.batch("validation", torch.arange(min(_EXAMPLES, data.size("validation"))))
    masks = None
    if isinstance(penalty, AntiLocality) and len(images) > 1:
        generator = torch.Generator().manual_seed(penalty.seed)
        pair = penalty.patches.draw(images, images.roll(-1, 0), generator)
        shape = (len(images), *images.shape[2:])
        i, j = (mask.squeeze(1).expand(shape).cpu().numpy() for mask in pair)
        masks = (i, j)
    names = getattr(data, "class_names", None)
    titles = [names[label] if names else f"label {label}" for label in labels.tolist()]
    save_figure(example_inputs(np.asarray(images.cpu()), titles, masks), folder / "figures" / "examples")


# jsonargparse 4.39 says "Key 'x' is not expected", 4.53 "Option 'x' is not accepted"
_UNKNOWN = re.compile(r"(?:[Oo]ption|[Kk]ey) '([\w.]+)'|dot import path string: (\w+)")
_CLASS_PATH = re.compile(r"class_path '([\w.]+)\.(\w+)'")


class SuggestingParser(LightningArgumentParser):
    """Lightning's parser, which also suggests the option, argument or class that was probably meant."""

    def error(self, message: str, *args: Any, **kwargs: Any) -> NoReturn:
        """Append the nearest known name of every unknown one to the message."""
        text = str(message)
        known = {
            cls.__name__
            for base in (LightningModule, LightningDataModule, nn.Module, AbstractPatches)
            for cls in _subclasses(base)
        }
        for module, name in _CLASS_PATH.findall(text):
            known |= inspect.signature(getattr(import_module(module), name)).parameters.keys()
        subcommands = [c for a in self._actions if isinstance(a.choices, dict) for c in a.choices.values()]
        options = {action.dest for parser in (self, *subcommands) for action in parser._actions}
        known |= options | {option.rpartition(".")[0] for option in options}
        for unknown in dict.fromkeys(a or b for a, b in _UNKNOWN.findall(text)):
            if near := difflib.get_close_matches(unknown, known, n=1):
                text += f"\nDid you mean {near[0]!r}?"
        super().error(text, *args, **kwargs)


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def exit_with_parent() -> None:
    """End this process when its parent ends, if the parent has announced a pipe to its standard input.

    A sweep that is killed thus takes its runs with it. Processes that this one starts do not read the pipe.
    """
    if os.environ.pop(_PARENT_PIPE, None) is None:
        return

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def run(args: Sequence[str]) -> LocalityCLI:
    """Run one subcommand (``fit``, ``validate``, ``test`` or ``predict``) with its arguments.

    Args:
        args: As typed, the subcommand first.

    Returns:
        The command line object, with its ``trainer``, ``model``, ``datamodule`` and ``run_dir``.

    Raises:
        SystemExit: With status 75 if another process is training in the run directory.
    """
    exit_with_parent()
    # jsonargparse finds a class by its bare name once it is imported
    for name in lightning_locality.__all__:
        getattr(lightning_locality, name)
    with warnings.catch_warnings():
        # Lightning 2.6 itself uses names that jsonargparse 5 will remove; the bound below 5 covers it
        warnings.filterwarnings("ignore", module="pytorch_lightning.cli")
        for message in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        return LocalityCLI(
            LightningModule,
            LightningDataModule,
            parser_class=SuggestingParser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            parser_kwargs={
                "prog": _PROGRAM,
                **{name: {"prog": f"{_PROGRAM} {name}"} for name in LightningCLI.subcommands()},
            },
            args=list(args),
        )
