"""Recovery of a tensor from a part of what is known of it, by any factorisation."""

from __future__ import annotations

__all__ = ["Recovery"]

import math
from functools import partial
from typing import Any, ClassVar, final

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.cli import OptimizerCallable
from pytorch_lightning.core.mixins.hparams_mixin import _given_hyperparameters
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.utilities import rank_zero_info
from torch.optim import Optimizer

from lightning_locality.optim import GradientFlow, GroupRMSprop
from lightning_locality.tasks.classification import NonFiniteLossError, check_state_dict
from lightning_locality.tasks.recovery_loss import Graph, InnerLoop, Loss, LossName, Objective, Route, TrainingSet
from lightning_locality.tasks.recovery_metrics import Measurements
from lightning_locality.tensors.factorization import Factorization, RecoveryBatch

_OBJECTS = ["model", "optimizer"]
_SHOWN = ("train/loss", "test/loss", "reconstruction_error")


@final
class Recovery(LightningModule):
    r"""Fit a factorisation to entries of a tensor, or to inner products with it, and follow what grows.

    Every training step runs ``steps`` iterations of the optimiser on the whole problem, which is its batch, without
    a word to Lightning: an iteration of a 64 by 64 matrix takes less time than Lightning takes for a step. Every
    ``measure_every`` iterations, from iteration 0, a row goes to the loggers: ``iteration``, ``train/loss``,
    ``test/loss``, ``reconstruction_error`` (over all entries), ``norm``, what the factorisation grows one at a time
    (``component/1``, ``singular value/3``, ``node 0-1/2``, ...), ``effective rank/0-1`` and so on, ``unbalancedness``,
    ``entry/0-0`` and, for gradient flow, ``time`` and ``evaluations``.

    The run stops once the training loss has been below ``tolerance`` at more than ``patience`` measurements in a
    row, the rule of *Implicit Regularization in Hierarchical Tensor Factorization and Deep Convolutional Neural
    Networks* (Razin, Maman, Cohen, 2022; from the authors' code), whose settings are the defaults.

    Args:
        model: The factorisation.
        loss: Mean squared error, half the sum of squares, mean absolute error, or mean Huber loss.
        huber_delta: Where the Huber loss becomes linear.
        optimizer: Called with the weights: GroupRMSprop (where None), GradientFlow or any of torch.
        steps: InnerLoop per training step.
        measure_every: InnerLoop between measurements.
        max_iterations: InnerLoop after which the run stops in any case.
        tolerance: Training loss that counts as fitted; None to stop at ``max_iterations`` only.
        patience: Measurements below the tolerance that are not yet enough.
        batch_size: Observations per iteration, in a new random order in every pass; None for all.
        route: The loss through the whole tensor or the observations alone; "auto" takes the cheaper.
        seed: Of the orders.
        test_clamp: Largest error that a single test observation counts for; None for no limit.
        top: Values measured of every group of magnitudes.
        groups: Groups of magnitudes measured, the last ones (nearest to the root) where there are more.
        effective_ranks: Whether effective ranks are measured.
        cuts: Matricisations whose effective rank is measured beside those of the factorisation, by their modes.
        watch: Entries whose value is measured.
        graph: "auto" records iterations as a CUDA graph where that is possible; "never" does not.

    Raises:
        ValueError: A number out of its range, or a problem that does not fit the factorisation.
        NonFiniteLossError: The loss is infinite or not a number; rows and checkpoints written before are kept.
    """

    monitor: ClassVar[str | None] = None

    def __init__(
        self,
        model: Factorization,
        loss: LossName = "mse",
        huber_delta: float = 1.0,
        optimizer: OptimizerCallable | None = None,
        steps: int = 25,
        measure_every: int = 25,
        max_iterations: int = 500_000,
        tolerance: float | None = 5e-5,
        patience: int = 100,
        batch_size: int | None = None,
        route: Route = "auto",
        seed: int = 0,
        test_clamp: float | None = None,
        top: int = 10,
        groups: int = 32,
        effective_ranks: bool = True,
        cuts: list[list[int]] | None = None,
        watch: list[list[int]] | None = None,
        graph: Graph = "auto",
    ) -> None:
        super().__init__()
        # as in Classification: from the command line the settings arrive as plain values
        self.save_hyperparameters(ignore=[] if _given_hyperparameters.get() is not None else _OBJECTS)
        counts = {"steps": steps, "measure_every": measure_every, "max_iterations": max_iterations, "top": top}
        for name, count in {**counts, "groups": groups, "batch_size": 1 if batch_size is None else batch_size}.items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        for name, value in (("tolerance", tolerance), ("test_clamp", test_clamp), ("huber_delta", huber_delta)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if patience < 0:
            raise ValueError(f"patience must be 0 or more, got {patience}")
        self.automatic_optimization = False
        self.model = model
        self.loss = Loss(loss, huber_delta)
        # not a default of the argument: on the command line its settings would go over to another optimiser
        self.optimizer = optimizer or GroupRMSprop
        self.steps, self.measure_every, self.max_iterations = steps, measure_every, max_iterations
        self.tolerance, self.patience = tolerance, patience
        self.batch_size, self.route, self.seed, self.graph = batch_size, route, seed, graph
        self.measurements_of = partial(
            Measurements,
            loss=self.loss,
            test_clamp=test_clamp,
            chunk=batch_size,
            top=top,
            groups=groups,
            effective_ranks=effective_ranks,
            cuts=cuts or [],
            watch=watch or [],
        )
        self.iteration = self._first_iteration = 0
        self.below = 0
        self.row: dict[str, float] = {}
        self._batch: RecoveryBatch | None = None

    def configure_optimizers(self) -> Optimizer:
        """The optimizer."""
        return self.optimizer(self.model.parameters())

    def setup(self, stage: str) -> None:
        """Refuse what would train something else than was asked for."""
        if stage == "fit":
            # the run measures as it goes, and Lightning warns of a validation without batches
            self.trainer.limit_val_batches = 0
        if self.trainer.world_size > 1:
            raise ValueError(f"Recovery runs in one process, got {self.trainer.world_size}: set --trainer.devices 1")
        if str(self.trainer.precision) not in ("32-true", "64-true"):
            raise ValueError(
                f"precision {self.trainer.precision!r} would round the tensor: set the type of the weights by dtype of "
                "the model and leave --trainer.precision at its default"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep where the run is."""
        checkpoint["recovery"] = {"iteration": self.iteration, "below": self.below, "row": self.row}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on where the checkpoint was."""
        check_state_dict(self, checkpoint["state_dict"])
        if "recovery" not in checkpoint:
            raise ValueError(
                "the checkpoint does not fit this model: it is not of a recovery run; load it with the config.yaml of "
                "the run that wrote it"
            )
        progress = checkpoint["recovery"]
        self.iteration, self.below, self.row = progress["iteration"], progress["below"], dict(progress["row"])

    def on_fit_start(self) -> None:
        """Forget the problem of an earlier fit, and count iterations from here."""
        self._batch, self._first_iteration = None, self.iteration

    def summary(self, seconds: float) -> tuple[dict[str, float], dict[str, float]]:
        """Return the last measurement, and the counts of the run, for ``summary.json``.

        Args:
            seconds: Duration of this fit.
        """
        done = self.iteration - self._first_iteration
        return self.row, {"iterations": self.iteration, "iterations_per_second": round(done / seconds, 2)}

    def training_step(self, batch: RecoveryBatch, batch_idx: int) -> None:
        """InnerLoop, and the measurements that fall among them."""
        self._prepare(batch)
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        # Lightning counts one step; its own step() would cost more than the iterations
        optimizer._on_before_step()
        end = min(self.iteration + self.steps, self.max_iterations)
        if self.iteration == 0:
            self._measure()
        while self.iteration < end and not self._done():
            count = min(end, self._next_measurement()) - self.iteration
            if isinstance(optimizer.optimizer, GradientFlow):
                count = 1
            self.iterations.run(self.iteration, count)
            self.iteration += count
            if self.iteration % self.measure_every == 0:
                self._measure()
        self._raise_unless_finite()
        optimizer._on_after_step()
        if self._done():
            self.trainer.should_stop = True

    def _next_measurement(self) -> int:
        return (self.iteration // self.measure_every + 1) * self.measure_every

    def _done(self) -> bool:
        flow = self.iterations.optimizer
        finished = isinstance(flow, GradientFlow) and flow.finished
        return self.below > self.patience or self.iteration >= self.max_iterations or finished

    def _prepare(self, batch: RecoveryBatch) -> None:
        """Look at a problem once: the data module hands over the same object every time."""
        if batch is self._batch:
            return
        train = self._problem(batch)
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, Optimizer)
        if isinstance(optimizer, GradientFlow) and self.batch_size is not None:
            raise ValueError(f"batch_size is {self.batch_size}, but gradient flow is that of one loss: leave it out")
        objective = Objective(train, self.loss, self.route, self.batch_size, self.seed)
        unroll = math.gcd(self.steps, self.measure_every)
        self.iterations = InnerLoop(objective, optimizer, self.graph, unroll)

    def _problem(self, batch: RecoveryBatch) -> TrainingSet:
        train = TrainingSet(self.model, batch.train)
        self.measurements = self.measurements_of(self.model, batch, train)
        self._batch = batch
        return train

    def _measure(self) -> None:
        """Write a row, count towards the stop, and refuse to go on from a loss that is not finite."""
        self.row = {"iteration": self.iteration, **self._clock(), **self.measurements.row()}
        loss = self.row["train/loss"]
        if not math.isfinite(loss):
            self._raise_non_finite()
        for logger in self.loggers:
            logger.log_metrics(self.row, step=self.iteration)
        if self.iteration % self.measure_every == 0:
            self.below = self.below + 1 if self.tolerance is not None and loss < self.tolerance else 0

    def _clock(self) -> dict[str, float]:
        flow = self.iterations.optimizer
        return {"time": flow.time, "evaluations": flow.evaluations} if isinstance(flow, GradientFlow) else {}

    def _raise_unless_finite(self) -> None:
        """Weights are looked at, which costs less than the loss."""
        if not all(bool(torch.isfinite(weight).all()) for weight in self.model.parameters()):
            self._raise_non_finite()

    def _raise_non_finite(self) -> None:
        raise NonFiniteLossError(
            f"the training loss is not finite at iteration {self.iteration}: lower the learning rate, or the scale "
            "of the initialisation; checkpoints and metrics written before are kept"
        )

    def on_train_epoch_end(self) -> None:
        """Show the last measurement."""
        shown = {name: self.row[name] for name in _SHOWN if name in self.row}
        self.log_dict({"iteration": float(self.iteration), **shown}, prog_bar=True, logger=False)

    def on_train_end(self) -> None:
        """Measure where the run ends, and say why."""
        if self._batch is not None and self.row.get("iteration") != self.iteration:
            self._measure()
        if self.below > self.patience:
            rank_zero_info(
                f"stopped after iteration {self.iteration}: the training loss has been below {self.tolerance:g} at "
                f"{self.below} measurements"
            )

    def validation_step(self, batch: RecoveryBatch, batch_idx: int) -> None:
        """Measure."""
        self._evaluate(batch)

    def test_step(self, batch: RecoveryBatch, batch_idx: int) -> None:
        """Measure."""
        self._evaluate(batch)

    def _evaluate(self, batch: RecoveryBatch) -> None:
        self._problem(batch)
        self.log_dict({"iteration": float(self.iteration), **self.measurements.row()}, batch_size=1)
