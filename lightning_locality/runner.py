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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from importlib import import_module
from itertools import pairwise
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
from lightning_locality import datamodules
from lightning_locality.callbacks.process_watch import ProcessWatch
from lightning_locality.callbacks.resume import MetricsFile, SavedConfig, Stopwatch, use_atomic_checkpoints
from lightning_locality.callbacks.stopping import StopAfter
from lightning_locality.datamodules.base import AbstractImageDataModule
from lightning_locality.networks import read_weights
from lightning_locality.plotting.recovery import component_curves, magnitude_groups
from lightning_locality.plotting.style import save_figure
from lightning_locality.plotting.training import example_inputs, training_curves
from lightning_locality.regularizer.anti_locality import AntiLocality
from lightning_locality.regularizer.patches import AbstractPatches
from lightning_locality.results import (
    IN_USE,
    PARENT_PIPE,
    atomic_write,
    find_configs,
    flatten,
    history,
    last_metrics,
    read_settings,
    shortened,
    versions,
    write_json,
)

_PROGRAM = "lightning-locality"
# not Any, by which jsonargparse would read a variant "off" as False and "1e-3" as a number
_Labels = dict[str, str | bool | int | float | list | dict | None]  # type: ignore[type-arg]
_TRACES = ("metrics.csv", "last.ckpt", "best.ckpt")
# options of the Trainer that change what is trained, rather than how long, where and how it is shown
_TRAINING = ("accumulate_grad_batches", "callbacks", "devices", "gradient_clip_algorithm", "gradient_clip_val")
_TRAINING += ("limit_train_batches", "num_nodes", "overfit_batches", "precision", "sync_batchnorm")  # type: ignore[assignment]
_RANKS = ("RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK")
_SHARED_DIR = "LIGHTNING_LOCALITY_RUN_DIR"
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


def _choose_run_dir(path: str | None, checkpoint: str | None) -> Path:
    """Return ``path``, else the folder of the checkpoint, else ``runs/DATE_TIME``: the same on all processes."""
    if path or checkpoint:
        return Path(path or Path(str(checkpoint)).parent)
    if not _is_first_process() and _SHARED_DIR in os.environ:
        return Path(os.environ[_SHARED_DIR])
    launch = os.environ.get("TORCHELASTIC_RUN_ID") or os.environ.get("SLURM_JOB_ID")
    if launch in (None, "none"):
        launch = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    # processes that Lightning starts inherit it
    os.environ[_SHARED_DIR] = f"runs/{launch}"
    return Path("runs", str(launch))


def _find_checkpoint(name: str, run_dir: str | None) -> tuple[Path, dict[str, Any]]:
    """Return path and content of a checkpoint given as a path, or as ``last`` or ``best`` of a run directory."""
    path = Path(name)
    if name in ("last", "best"):
        if run_dir is None:
            raise FileNotFoundError(f"--ckpt_path {name}: name its run by --run_dir, or give the checkpoint's path")
        path = Path(run_dir) / f"{name}.ckpt"
    if not path.is_file():
        raise FileNotFoundError(f"--ckpt_path {name}: there is no file {path}")
    try:
        stored = read_weights(path)
    except ValueError as error:
        other = path.with_name("best.ckpt" if path.name == "last.ckpt" else "last.ckpt")
        remedy = f"; {other} may be whole" if other.is_file() else ""
        raise ValueError(f"--ckpt_path {name}: {error}{remedy}") from error
    if missing := {"state_dict", "loops", "callbacks", "global_step"} - stored.keys():
        raise ValueError(f"--ckpt_path {name}: {path} is no checkpoint of Lightning: it has no {sorted(missing)[0]}")
    return path, stored


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
        run_dir = "Folder of config, metrics, checkpoints, figures (default: runs/<date_time>, or that of --ckpt_path)."
        test = "Test after fit, with the last weights (as published) or the best on validation."
        labels = "Labels copied to summary.json, by which tables and figures group runs."
        groups = parser.groups or {}
        groups["model"].title = "What is trained: network, loss, term and optimiser (Classification), or another"
        groups["data"].title = "The data, one of the tasks or another"
        parser.add_argument("--run_dir", type=str | None, default=None, help=run_dir)
        parser.add_argument("--test_after_fit", type=Literal["no", "last", "best"], default="no", help=test)
        parser.add_argument("--labels", type=_Labels | None, default=None, help=labels)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; where that fails for want of a configuration, name that of the run, or say how to give one."""
        args = find_configs(args)
        given = dict(pairwise(word for arg in args for word in arg.split("=", 1)))
        try:
            super().parse_arguments(parser, args)
        except SystemExit as stop:
            if stop.code and not given.keys() & {"-c", "--config"}:
                checkpoint = given.get("--ckpt_path", "last")
                folder = given.get("--run_dir") if checkpoint in ("last", "best") else Path(checkpoint).parent
                config = Path(folder or ".", "config.yaml")
                if config.is_file():
                    print(f"There is no --config; the run's own is --config {config}", file=sys.stderr)
                elif "--model" not in given:
                    none = "There is no --config FILE (lightning-locality configs lists some), and no --model"
                    print(none, file=sys.stderr)
            raise

    def _parse_ckpt_path(self) -> None:
        """Keep what was typed and warn of what differs; Lightning would take the checkpoint's settings of the model."""
        config = self.config[self.config.subcommand]
        if not config.get("ckpt_path"):
            return
        path, stored = _find_checkpoint(config.ckpt_path, config.run_dir)
        config.ckpt_path = str(path)
        new = json.loads(json.dumps(config.as_dict(), default=str))
        if not (old := read_settings(path.parent)):
            arguments = stored.get("hyper_parameters", {})
            typed = new["model"].get("init_args") or {}
            own = {name: value for name, value in arguments.items() if typed.get(name) is not None}
            old = {"model": {"class_path": arguments.get("_class_path", new["model"]["class_path"]), "init_args": own}}
        sections, then = ["model"], "is used"
        if self.config.subcommand == "fit":
            sections, then = ["model", "data", "seed_everything", "trainer"], "continues"
            for settings in (old, new):
                settings["trainer"] = {k: v for k, v in (settings.get("trainer") or {}).items() if k in _TRAINING}
        changes = [change for name in sections if name in old for change in _differences(old[name], new[name], name)]
        if changes:
            last = config.trainer.max_epochs if self.config.subcommand == "fit" else None
            if last is not None and 0 <= last <= stored["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]:
                # the summary would name settings with which nothing was trained
                raise ValueError(
                    f"{path} has all of its {last} epochs, so nothing would be trained with the new settings "
                    f"({'; '.join(changes)}): raise --trainer.max_epochs, or start anew in another --run_dir"
                )
            rank_zero_warn(
                f"{path} was trained with other settings ({'; '.join(changes)}) and {then} with the new ones"
            )

    def before_instantiate_classes(self) -> None:
        """Choose the run directory, and refuse what would lose results or mislead."""
        config = self.config[self.subcommand]
        if not isinstance(config.trainer, type(config)):
            raise ValueError(f"trainer must be a mapping of options, as {{max_epochs: 10}}, got {config.trainer!r}")
        checkpoint = config.get("ckpt_path")
        if self.subcommand in ("validate", "test", "predict") and not checkpoint:
            raise ValueError(
                f"{self.subcommand} without a checkpoint would measure a network with random weights: pass "
                "--ckpt_path runs/NAME/best.ckpt (or last.ckpt), or --run_dir runs/NAME --ckpt_path best"
            )
        self.run_dir = _choose_run_dir(config.run_dir, checkpoint)
        self.recorded = self.subcommand == "fit" and not config.trainer.fast_dev_run
        if self.subcommand != "fit":
            self.save_config_callback = None
        if self.recorded and _is_first_process():
            self._lock_run_dir()
        if self.recorded and not checkpoint and (found := [name for name in _TRACES if (self.run_dir / name).exists()]):
            remedy = "delete it"
            if "last.ckpt" in found:
                remedy = f"continue that run with --run_dir {self.run_dir} --ckpt_path last"
            raise FileExistsError(
                f"run_dir {self.run_dir} holds an earlier run ({', '.join(found)}): choose another --run_dir, or "
                f"{remedy}"
            )
        config.run_dir = str(self.run_dir)
        if not sys.stdout.isatty():
            for name in ("enable_progress_bar", "enable_model_summary"):
                if config.trainer[name] is None:
                    config.trainer[name] = False

    def _lock_run_dir(self) -> None:
        """Lock the run directory until the run ends; exit with status 75 if another process is training in it."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        try:
            self._held.enter_context(filelock.FileLock(self.run_dir / ".lock", timeout=0))
        except filelock.Timeout:
            print(f"{_PROGRAM}: run_dir {self.run_dir} is in use by another process", file=sys.stderr)
            raise SystemExit(IN_USE) from None

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
        callbacks.append(self._held.enter_context(ProcessWatch(self.run_dir, str(self.subcommand))))
        if self.recorded:
            callbacks += [self.stopwatch] if keeps else [self.stopwatch, *self._checkpoints()]
        root = str(config.get("default_root_dir") or self.run_dir)
        try:
            trainer = super().instantiate_trainer(callbacks=callbacks, default_root_dir=root, **kwargs)
        except TypeError as error:
            raise ValueError(f"--trainer: {error}") from error
        return use_atomic_checkpoints(trainer)

    def _checkpoints(self) -> list[ModelCheckpoint]:
        """Keep the last epoch, and the best one if the model names a metric to monitor."""
        # after the whole epoch, so that a resumed run repeats nothing
        common: Any = {"dirpath": self.run_dir, "save_on_train_epoch_end": True, "enable_version_counter": False}
        monitor = getattr(self.model, "monitor", None)
        best = [ModelCheckpoint(filename="best", monitor=monitor, mode="max", **common)] if monitor else []
        return [*best, ModelCheckpoint(filename="last", **common)]

    def before_fit(self) -> None:
        """Note the time."""
        self.fit_started = time.time()

    def after_fit(self) -> None:
        """Test if requested, and write figures and summary."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, StopAfter) and callback.stopped for callback in callbacks):
            rank_zero_info(f"out of time; continue with --run_dir {self.run_dir} --ckpt_path last")
            return
        scores = _floats(self.trainer.callback_metrics)
        counts: dict[str, float] = {"epochs": self.trainer.current_epoch}
        own_summary = getattr(self.model, "run_summary", None)
        if own_summary is not None:
            metrics, more = own_summary(time.time() - self.fit_started)
            scores, counts = scores | metrics, counts | more
        choice = self._get(self.config, "test_after_fit")
        if choice != "no":
            checkpoint = self.trainer.checkpoint_callback
            path = getattr(checkpoint, "best_model_path", "") if choice == "best" else ""
            results = self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=path or None, verbose=False)
            scores |= _floats(results[0])
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
        content = {
            "labels": self._get(self.config, "labels") or {},
            "metrics": scores,
            **counts,
            "steps": self.trainer.global_step,
            "seconds": round(self.stopwatch.seconds, 1),
            "device": {"name": name, "processes": self.trainer.world_size, "threads": torch.get_num_threads()},
            "versions": versions("torch", "torchvision", "pytorch-lightning"),
            "seeds": {k: v for k, v in flatten(config) if k.split(".")[-1] in ("seed", "seed_everything")},
            "config": config,
        }
        write_json(self.run_dir / "summary.json", content)

    def predict(self, **kwargs: Any) -> None:
        """Predict, and write the class probabilities as a table."""
        _write_predictions(self.run_dir / "predictions.csv", self.trainer.predict(**kwargs) or [])

    def after_test(self) -> None:
        """Write the scores next to the checkpoint."""
        if self.trainer.is_global_zero:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            scores = _floats(self.trainer.callback_metrics)
            content = {"checkpoint": self._get(self.config, "ckpt_path"), "metrics": scores}
            write_json(self.run_dir / f"{self.subcommand}.json", content)

    after_validate = after_test


def _floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _differences(old: Any, new: Any, name: str) -> Iterator[str]:
    """Describe the settings that differ; classes by their name alone: modules may move."""
    # of a list of callbacks each is compared, of a list of numbers the whole
    a: Any
    b: Any
    a, b = (dict(enumerate(v)) if isinstance(v, list) and _brief(v) != v else v for v in (old, new))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        comparable = a.keys() == b.keys()
        if "class_path" in a and "class_path" in b:
            # an argument that the class had not in another version is no difference
            comparable, a, b = _brief(a) == _brief(b), a.get("init_args") or {}, b.get("init_args") or {}
        if comparable:
            for key in sorted(a.keys() & b.keys(), key=str):
                yield from _differences(a[key], b[key], f"{name}.{key}")
            return
    if _brief(old) != _brief(new):
        yield f"{name}: was {_brief(old)}, now {_brief(new)}"


def _brief(value: Any) -> Any:
    """Return the name of a class instead of its settings, also in a list, and any other value as it is."""
    if isinstance(value, list):
        return [_brief(one) for one in value]
    return value["class_path"].rpartition(".")[2] if isinstance(value, Mapping) and "class_path" in value else value


def _in_words(scores: dict[str, float], counts: dict[str, float]) -> list[str]:
    if "iterations" in counts:
        errors = [f"{name} {scores[name]:.3g}" for name in ("train/loss", "reconstruction_error") if name in scores]
        return [f"{counts['iterations']:.0f} iterations ({counts['iterations_per_second']:.0f} per second)", *errors]
    epochs = f"{counts['epochs']:.0f} epoch{'s' * (counts['epochs'] != 1)}"
    return [epochs, *(f"{k} {v:.4f}" for k, v in scores.items() if k.endswith("accuracy"))]


def _write_predictions(path: Path, batches: Sequence[Any]) -> None:
    """Write class probabilities, one row per sample in the order of the test images; every process must call it.

    Process r of W predicts every W-th sample, from the r-th.
    """
    mine = [row for batch in batches for row in batch.tolist()]
    parts = [mine]
    if distributed.is_available() and distributed.is_initialized():
        parts = [[]] * distributed.get_world_size()
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
    images, labels = data.batch("validation", torch.arange(min(4, data.size("validation"))))
    penalty, masks = getattr(model, "penalty", None), None
    if isinstance(penalty, nn.ModuleDict):
        penalty = next(iter(penalty.values()))
    if isinstance(penalty, AntiLocality) and len(images) > 1:
        i, j = penalty.patches.draw(images, images.roll(-1, 0), torch.Generator().manual_seed(int(penalty.seed)))
        shape = (len(images), 1, *images.shape[2:])
        masks = (i.expand(shape)[:, 0].cpu().numpy(), j.expand(shape)[:, 0].cpu().numpy())
    names = getattr(data, "class_names", None)
    titles = [names[label] if names else f"label {label}" for label in labels.tolist()]
    save_figure(example_inputs(np.asarray(images.cpu()), titles, masks), folder / "figures" / "examples")


# jsonargparse 4.53 says "Option 'x' is not accepted", earlier ones "Key 'x' is not expected"
_UNKNOWN = re.compile(r"(?:[Oo]ption|[Kk]ey) '([\w.]+)'|dot import path string: (\w+)|arguments: --([\w.]+)")
# of reST: roles, such as :class:`~torch.nn.Module`, links and literals
_MARKUP = re.compile(r":(?:py:)?\w+:`~?(?:[\w.]+\.)?(\w+)`|`([^`<]+?)\s*<[^`]*>`_+|``([^`]+)``")
_CLASS_PATH = re.compile(r"class_path '([\w.]+)\.(\w+)'")
_NO_CLASS = re.compile(r"class_path 'pytorch_lightning\.Lightning|\.Abstract\w+ is abstract")


class SuggestingParser(LightningArgumentParser):
    """Lightning's parser, without abbreviations; it suggests the option, argument or class that was probably meant."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, allow_abbrev=False)

    def format_help(self, *args: Any) -> str:
        """Lightning's help without the markup of reST, and with what ``ckpt_path`` means here."""
        for action in self._actions:
            if action.dest == "ckpt_path":
                action.help = "Checkpoint: its path, or last or best of --run_dir; a fit continues from there."
            # before lines are broken, also within a role
            action.help = action.help and _MARKUP.sub(r"\1\2\3", action.help)
        return _MARKUP.sub(r"\1\2\3", super().format_help(*args))

    def print_usage(self, *args: Any) -> None:
        """Print nothing: 150 lines of options above an error would hide it."""

    def error(self, message: str, *args: Any, **kwargs: Any) -> NoReturn:
        """Append the nearest known name of every unknown one to the message, shortened to what was wrong."""
        text = str(message)
        if _NO_CLASS.search(text):
            text, named = shortened(text), "--model Classification, --data SameClass"
            super().error(f"{text}\nName the class before its options, as in {named}, or give a --config that does")
        bases = (LightningModule, LightningDataModule, nn.Module, AbstractPatches)
        known = {cls.__name__ for base in bases for cls in _subclasses(base)}
        for module, name in _CLASS_PATH.findall(text):
            known |= inspect.signature(getattr(import_module(module), name)).parameters.keys()
        subcommands = [c for a in self._actions if isinstance(a.choices, dict) for c in a.choices.values()]
        options = {action.dest for parser in (self, *subcommands) for action in parser._actions}
        known |= options | {option.rpartition(".")[0] for option in options}
        for unknown in dict.fromkeys("".join(found) for found in _UNKNOWN.findall(text)):
            near = difflib.get_close_matches(unknown, known, n=1)
            if near and near[0] != unknown and (hint := f"Did you mean {near[0]!r}?") not in text:
                text += f"\n{hint}"
        super().error(shortened(text), *args, **kwargs)


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def exit_with_parent() -> None:
    """End this process with its parent if that has announced a pipe to its standard input, as a sweep does."""
    if os.environ.pop(PARENT_PIPE, None) is None:
        return

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def run(args: Sequence[str]) -> LocalityCLI:
    """Run a subcommand (``fit``, ``validate``, ``test`` or ``predict``) with its arguments, as typed.

    Returns:
        The command line object, with its ``trainer``, ``model``, ``datamodule`` and ``run_dir``.

    Raises:
        SystemExit: With status 75 if another process is training in the run directory.
    """
    exit_with_parent()
    # jsonargparse finds a class by its bare name once it is imported
    for face in (lightning_locality, datamodules):
        for name in face.__all__:
            getattr(face, name)
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
            save_config_callback=SavedConfig,
            seed_everything_default=0,
            parser_kwargs={"prog": _PROGRAM} | {c: {"prog": f"{_PROGRAM} {c}"} for c in LightningCLI.subcommands()},
            args=list(args),
        )
