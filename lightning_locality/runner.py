"""One run: Lightning's command line over tasks and data modules, with a folder for what it leaves."""

from __future__ import annotations

__all__ = ["LocalityCLI", "run"]

import json
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

import lightning_locality
from lightning_locality.callbacks.history import KeptRow, MetricsFile, Stopwatch, with_whole_checkpoints
from lightning_locality.callbacks.stopping import StopAfter
from lightning_locality.folder import default_folder, keep_earlier_config, refuse_used, stored_checkpoint
from lightning_locality.parser import SuggestingParser
from lightning_locality.record import last_measured, leaves, read_settings
from lightning_locality.report import write_figures, write_json, write_predictions
from lightning_locality.tasks.recovery import Recovery

_PROGRAM = "lightning-locality"
_PACKAGES = ("lightning-locality", "torch", "torchvision", "pytorch-lightning")


class LocalityCLI(LightningCLI):
    """Lightning's command line; every run has a folder, and a checkpoint never overrides what was typed."""

    run_dir: Path
    stopwatch: Stopwatch
    fit_started: float

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of a run."""
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder for config, metrics, checkpoints and figures (default: runs/<date and time>, or the "
            "checkpoint's folder where --ckpt_path is given).",
        )
        parser.add_argument(
            "--test_after_fit",
            type=Literal["no", "last", "best"],
            default="no",
            help="Test after fit, with the last weights (as published) or the best on validation.",
        )

    def _parse_ckpt_path(self) -> None:
        """Warn where the checkpoint was trained with other settings; use what was typed."""
        if not self.config.get("subcommand"):
            return
        config = self.config[self.config.subcommand]
        if not config.get("ckpt_path"):
            return
        path = stored_checkpoint(config.ckpt_path, config.run_dir)
        config.ckpt_path = str(path)
        stored = torch.load(path, weights_only=True, map_location="cpu").get("hyper_parameters", {})
        typed = config.get("model") or {}
        typed = json.loads(json.dumps(typed.as_dict() if hasattr(typed, "as_dict") else typed, default=str))
        values = dict(leaves({"class_path": typed.get("class_path"), **(typed.get("init_args") or {})}))
        trained = dict(leaves({"class_path": stored.pop("_class_path", None), **stored}))
        for name in sorted(values.keys() & trained.keys()):
            if values[name] is not None and trained[name] is not None and values[name] != trained[name]:
                rank_zero_warn(
                    f"{name}: the checkpoint {path} was trained with {trained[name]!r}, the command line says "
                    f"{values[name]!r}; the command line's value is used"
                )

    def before_instantiate_classes(self) -> None:
        """Choose the run's folder, and refuse what would lose or mislead."""
        self.stopwatch = Stopwatch()
        config = self.config[self.subcommand]
        checkpoint = config.get("ckpt_path")
        if self.subcommand in ("validate", "test", "predict") and not checkpoint:
            raise ValueError(
                f"{self.subcommand} without a checkpoint would measure a network with random weights: pass "
                "--ckpt_path runs/NAME/best.ckpt (or last.ckpt), or --run_dir runs/NAME --ckpt_path best"
            )
        self.run_dir = Path(config.run_dir or default_folder(checkpoint))
        if self.subcommand == "fit" and not checkpoint and not config.trainer.fast_dev_run:
            refuse_used(self.run_dir)
        config.run_dir = str(self.run_dir)
        if self.subcommand != "fit":
            self.save_config_callback = None
        if not sys.stdout.isatty():
            for name in ("enable_progress_bar", "enable_model_summary"):
                if config.trainer[name] is None:
                    config.trainer[name] = False

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the metrics file and the best and last checkpoints to what the configuration asks for."""
        config = self._get(self.config_init, "trainer", default={})
        logger = config.get("logger")
        if logger is not False:
            typed = [] if logger in (None, True) else [logger] if isinstance(logger, Logger) else list(logger)
            # only a fit has a history; scores of the other commands are written as files of their own
            own = [MetricsFile(str(self.run_dir))] if self.subcommand == "fit" else []
            kwargs["logger"] = [*own, *typed]
        extra = list(config.get("callbacks") or [])
        if self.subcommand == "fit":
            checkpoints = config.get("enable_checkpointing") is not False and not config.get("fast_dev_run")
            if checkpoints and not any(isinstance(c, ModelCheckpoint) for c in extra):
                kept = [] if isinstance(self.model, Recovery) else [KeptRow()]
                extra += [*self._checkpoints(), *kept]
            extra.append(self.stopwatch)
        root = str(config.get("default_root_dir") or self.run_dir)
        return with_whole_checkpoints(super().instantiate_trainer(callbacks=extra, default_root_dir=root, **kwargs))

    def _checkpoints(self) -> list[ModelCheckpoint]:
        """Keep the last epoch, and the best one where the model names a metric to monitor."""
        monitor = getattr(self.model, "monitor", None)
        # after the whole epoch, so that a resumed run repeats nothing
        common: dict[str, Any] = {"save_on_train_epoch_end": True, "enable_version_counter": False}
        last = ModelCheckpoint(dirpath=self.run_dir, filename="last", **common)
        if monitor is None:
            return [last]
        return [ModelCheckpoint(dirpath=self.run_dir, filename="best", monitor=monitor, mode="max", **common), last]

    def before_fit(self) -> None:
        """Keep the configuration of the part of the run that is continued."""
        if self.trainer.is_global_zero and not self._get(self.config, "trainer").fast_dev_run:
            keep_earlier_config(self.run_dir)
        self.fit_started = time.time()

    def after_fit(self) -> None:
        """Test if asked to, and leave a summary and figures."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, StopAfter) and callback.stopped for callback in callbacks):
            rank_zero_info(f"out of time; continue with --run_dir {self.run_dir} --ckpt_path last")
            return
        seconds = time.time() - self.fit_started
        choice = self._get(self.config, "test_after_fit")
        scores: dict[str, float] = {key: float(v) for key, v in self.trainer.callback_metrics.items()}
        epochs = self.trainer.current_epoch
        counts: dict[str, float] = {"epochs": epochs}
        if isinstance(self.model, Recovery):
            scores |= self.model.row
            counts["iterations"] = self.model.iteration
            counts["iterations_per_second"] = round(self.model.iterations_done / seconds, 2)
        if choice != "no":
            path = None
            checkpoint = self.trainer.checkpoint_callback
            if choice == "best" and isinstance(checkpoint, ModelCheckpoint) and checkpoint.best_model_path:
                path = checkpoint.best_model_path
            results = self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=path, verbose=False)
            scores |= {key: float(value) for key, value in results[0].items()}
        if self.trainer.is_global_zero and not self._get(self.config, "trainer").fast_dev_run:
            write_figures(self.run_dir, self.model, self.datamodule)
            self._write_summary(scores, counts)  # last: a run that has one is finished
            rank_zero_info(", ".join([*_results(scores, counts), f"run folder: {self.run_dir}"]))

    def predict(self, **kwargs: Any) -> None:
        """Predict, and leave the class probabilities as a table."""
        write_predictions(self.run_dir / "predictions.csv", self.trainer.predict(**kwargs) or [])

    def after_validate(self) -> None:
        """Leave the scores beside the checkpoint."""
        self._write_scores("validate")

    def after_test(self) -> None:
        """Leave the scores beside the checkpoint."""
        self._write_scores("test")

    def _write_scores(self, name: str) -> None:
        if self.trainer.is_global_zero:
            scores = {key: float(value) for key, value in self.trainer.callback_metrics.items()}
            checkpoint = self._get(self.config, "ckpt_path")
            self.run_dir.mkdir(parents=True, exist_ok=True)
            write_json(self.run_dir / f"{name}.json", {"checkpoint": checkpoint, "metrics": scores})

    def _write_summary(self, scores: dict[str, float], counts: dict[str, float]) -> None:
        device = self.trainer.strategy.root_device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
        if not isinstance(self.model, Recovery):  # a run that was killed after its last epoch measures none again
            scores = last_measured(self.run_dir / "metrics.csv") | scores
        write_json(
            self.run_dir / "summary.json",
            {
                "metrics": scores,
                **counts,
                "steps": self.trainer.global_step,
                "seconds": round(self.stopwatch.seconds, 1),
                "device": {
                    "name": name,
                    "processes": self.trainer.world_size,
                    "threads": torch.get_num_threads(),
                },
                "versions": {package: version(package) for package in _PACKAGES},
                **read_settings(self.run_dir / "config.yaml"),
            },
        )


def _results(scores: dict[str, float], counts: dict[str, float]) -> list[str]:
    """What a fit ends with, in words."""
    if "iterations" in counts:
        errors = [f"{name} {scores[name]:.3g}" for name in ("train/loss", "reconstruction_error") if name in scores]
        return [f"{counts['iterations']:.0f} iterations ({counts['iterations_per_second']:.0f} per second)", *errors]
    return [f"{counts['epochs']:.0f} epochs", *(f"{k} {v:.4f}" for k, v in scores.items() if k.endswith("accuracy"))]


def run(args: Sequence[str]) -> LocalityCLI:
    """Run one subcommand (``fit``, ``validate``, ``test`` or ``predict``) with its arguments.

    Args:
        args: As typed, the subcommand first.

    Returns:
        The command line object, with its ``trainer``, ``model``, ``datamodule`` and ``run_dir``.
    """
    # jsonargparse finds a class by its bare name once it is imported
    for name in lightning_locality.__all__:
        getattr(lightning_locality, name)
    with warnings.catch_warnings():
        # Lightning 2.6 itself uses names that jsonargparse 5 will remove; the bound below 5 covers it
        warnings.filterwarnings("ignore", module="pytorch_lightning.cli")
        # Lightning 2.6 with torch 2.15
        warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
        # the run's folder holds its configuration before the first checkpoint
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        # a checkpoint of one run may be tested, or continued, into another folder
        warnings.filterwarnings("ignore", message="The dirpath has changed")
        # testing needs no checkpoint callback
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
        # a module may do without validation
        warnings.filterwarnings("ignore", message=".*but have no `validation_step`")
        # metrics are logged per epoch
        warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
        # args and sys.argv may both be set: the command line hands over a part of sys.argv
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        # batches are index tensors; workers would cost more than they bring
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
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
