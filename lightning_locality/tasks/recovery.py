"""Recovery of a tensor from some of its entries, or inner products with it, by any factorisation."""

from __future__ import annotations

__all__ = ["Recovery"]

import math
from functools import partial
from typing import Any, ClassVar, final

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.cli import OptimizerCallable
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.utilities import rank_zero_info
from torch.optim import Optimizer

from lightning_locality.arguments import Checked
from lightning_locality.optim import GradientFlow, GroupRMSprop
from lightning_locality.tasks.classification import NonFiniteLossError, check_state_dict, from_command_line
from lightning_locality.tasks.recovery_loss import Graph, InnerLoop, Loss, LossName, Objective, Route, TrainingSet
from lightning_locality.tasks.recovery_metrics import Measurements
from lightning_locality.tensors.factorization import Factorization, RecoveryBatch

_OBJECTS = ["model", "optimizer"]
_SHOWN = ("train/loss", "test/loss", "reconstruction_error")


@final
class Recovery(Checked, LightningModule):
    r"""Fit a factorisation to entries of a tensor, or to inner products with it, and record what grows.

    Every training step runs ``steps`` full-batch iterations of the optimiser, bypassing Lightning's per-step hooks: an
    iteration of a 64 by 64 matrix takes less time than those. Every ``measure_every`` iterations, from iteration 0, a
    row goes to the loggers: ``iteration``, ``train/loss``, ``test/loss``, ``reconstruction_error`` (over all entries),
    ``norm``, the magnitudes that the factorisation grows one at a time (``component/1``, ``singular value/3``,
    ``node 0-1/2``, ...), effective ranks (``effective rank/0-1``), ``unbalancedness``, watched entries (``entry/0-0``)
    and, for gradient flow, ``time`` and ``evaluations``.

    The run stops once the training loss has been below ``tolerance`` at more than ``patience`` measurements in a
    row, the rule of *Implicit Regularization in Hierarchical Tensor Factorization and Deep Convolutional Neural
    Networks* (Razin, Maman, Cohen, 2022; from the authors' code), whose settings are the defaults.

    Args:
        model: The factorisation.
        loss: Mean squared error, half the sum of squares, mean absolute error, or mean Huber loss.
        huber_delta: Residual at which the Huber loss becomes linear.
        optimizer: Called with the weights: GroupRMSprop (if None), GradientFlow or any of torch.
        steps: Iterations per training step.
        measure_every: Iterations between measurements.
        max_iterations: Iterations after which the run stops at the latest.
        tolerance: Training loss that counts as fitted; None to stop at ``max_iterations`` only.
        patience: Consecutive measurements below the tolerance that do not stop the run yet.
        batch_size: Observations per iteration, in a new random order in every pass; None for all.
        route: Compute the loss from the whole tensor or from the observations alone; "auto" takes the cheaper.
        seed: Seed of the orders.
        test_clamp: Upper bound on the error of a single test observation; None for no bound.
        top: Largest values measured of every group of magnitudes.
        groups: Groups of magnitudes measured; if there are more, the last ones (nearest to the root).
        effective_ranks: Whether to measure effective ranks.
        cuts: Further matricisations whose effective rank to measure, by their modes.
        watch: Entries whose value to measure.
        graph: "auto" records iterations as a CUDA graph if possible; "never" does not.

    Raises:
        ValueError: A number out of range, or a problem that does not fit the factorisation.
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
        self.save_hyperparameters(ignore=[] if from_command_line() else _OBJECTS)
        counts = {"steps": steps, "measure_every": measure_every, "max_iterations": max_iterations, "top": top}
        for name, count in {**counts, "groups": groups, "batch_size": batch_size}.items():
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        for name, value in (("tolerance", tolerance), ("test_clamp", test_clamp), ("huber_delta", huber_delta)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if patience < 0:
            raise ValueError(f"patience must be 0 or more, got {patience}")
        self.automatic_optimization = False
        self.model = model
        self.loss = Loss(loss, huber_delta)
        # not the default of the argument: on the command line another optimiser would inherit its settings
        self.optimizer = optimizer or GroupRMSprop
        self.steps, self.measure_every, self.max_iterations = steps, measure_every, max_iterations
        self.tolerance, self.patience = tolerance, patience
        self.batch_size, self.route, self.seed, self.graph = batch_size, route, seed, graph
        self.measurements_of = partial(
            Measurements, loss=self.loss, test_clamp=test_clamp, chunk=batch_size, top=top, groups=groups,
            effective_ranks=effective_ranks, cuts=cuts or [], watch=watch or [],
        )  # fmt: skip
        self.iteration = self._first_iteration = self.below = 0
        self.row: dict[str, float] = {}
        self._batch: RecoveryBatch | None = None

    def configure_optimizers(self) -> Optimizer:
        """Return the optimizer."""
        return self.optimizer(self.model.parameters())

    def setup(self, stage: str) -> None:
        """Reject Trainer options that would change the experiment."""
        if stage == "fit":
            # the run measures during training, and Lightning warns of a validation without batches
            self.trainer.limit_val_batches = 0
        if self.trainer.world_size > 1:
            raise ValueError(f"Recovery runs in one process, got {self.trainer.world_size}: set --trainer.devices 1")
        if str(self.trainer.precision) not in ("32-true", "64-true"):
            raise ValueError(
                f"precision {self.trainer.precision!r} would round the tensor: set the type of the weights by dtype of "
                "the model and leave --trainer.precision at its default"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the progress of the run."""
        checkpoint["recovery"] = {"iteration": self.iteration, "below": self.below, "row": self.row}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue from the progress of the checkpoint."""
        check_state_dict(self, checkpoint["state_dict"])
        if "recovery" not in checkpoint:
            raise ValueError(
                "the checkpoint does not fit this model: it is not of a recovery run; load it with the config.yaml of "
                "the run that wrote it"
            )
        self.iteration, self.below, self.row = (checkpoint["recovery"][key] for key in ("iteration", "below", "row"))

    def on_fit_start(self) -> None:
        """Forget the problem of an earlier fit, and count iterations from here."""
        self._batch, self._first_iteration = None, self.iteration

    def on_train_start(self) -> None:
        """Stop at once if the run was killed after its last iteration."""
        if self.iteration:
            loader: Any = self.trainer.train_dataloader
            self._prepare(self.trainer.strategy.batch_to_device(next(iter(loader))))
            self.trainer.should_stop = self._done()

    def run_summary(self, seconds: float) -> tuple[dict[str, float], dict[str, float]]:
        """Return the last measurement, and the counts of this fit of that many seconds, for ``summary.json``."""
        done = self.iteration - self._first_iteration
        return self.row, {"iterations": self.iteration, "iterations_per_second": round(done / seconds, 2)}

    def training_step(self, batch: RecoveryBatch, batch_idx: int) -> None:
        """Run iterations, and the measurements due among them."""
        self._prepare(batch)
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        # count one step for Lightning, whose own step() would cost more than the iterations
        optimizer._on_before_step()
        end = min(self.iteration + self.steps, self.max_iterations)
        if self.iteration == 0:
            self._measure()
        flow = isinstance(optimizer.optimizer, GradientFlow)
        while self.iteration < end and not self._done():
            to_measurement = self.measure_every - self.iteration % self.measure_every
            count = 1 if flow else min(end - self.iteration, to_measurement)
            self.inner_loop.run(self.iteration, count)
            self.iteration += count
            if self.iteration % self.measure_every == 0:
                self._measure()
        # checking the weights costs less than the loss
        if not all(bool(torch.isfinite(weight).all()) for weight in self.model.parameters()):
            self._raise_non_finite()
        optimizer._on_after_step()
        if self._done():
            self.trainer.should_stop = True

    def _done(self) -> bool:
        flow = self.inner_loop.optimizer
        finished = isinstance(flow, GradientFlow) and flow.finished
        return self.below > self.patience or self.iteration >= self.max_iterations or finished

    def _prepare(self, batch: RecoveryBatch) -> None:
        """Prepare a problem once: the data module yields the same object every time."""
        if batch is self._batch:
            return
        train = self._problem(batch)
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, Optimizer)
        if isinstance(optimizer, GradientFlow) and self.batch_size is not None:
            raise ValueError(f"batch_size is {self.batch_size}, but gradient flow is that of one loss: leave it out")
        objective = Objective(train, self.loss, self.route, self.batch_size, self.seed)
        self.inner_loop = InnerLoop(objective, optimizer, self.graph, unroll=math.gcd(self.steps, self.measure_every))

    def _problem(self, batch: RecoveryBatch) -> TrainingSet:
        train = TrainingSet(self.model, batch.train)
        self.measurements = self.measurements_of(self.model, batch, train)
        self._batch = batch
        return train

    def _measure(self) -> None:
        """Log a row, count it for the stop rule, and raise if the loss is not finite."""
        flow = self.inner_loop.optimizer
        clock = {"time": flow.time, "evaluations": flow.evaluations} if isinstance(flow, GradientFlow) else {}
        self.row = {"iteration": self.iteration, **clock, **self.measurements.row()}
        loss = self.row["train/loss"]
        if not math.isfinite(loss):
            self._raise_non_finite()
        for logger in self.loggers:
            logger.log_metrics(self.row, step=self.iteration)
        if self.iteration % self.measure_every == 0:
            self.below = self.below + 1 if self.tolerance is not None and loss < self.tolerance else 0

    def _raise_non_finite(self) -> None:
        raise NonFiniteLossError(
            f"the training loss is not finite at iteration {self.iteration}: lower the learning rate, or the scale "
            "of the initialisation; checkpoints and metrics written before are kept"
        )

    def on_train_epoch_end(self) -> None:
        """Show the last measurement in the progress bar."""
        shown = {name: self.row[name] for name in _SHOWN if name in self.row}
        self.log_dict({"iteration": float(self.iteration), **shown}, prog_bar=True, logger=False)

    def on_train_end(self) -> None:
        """Measure at the last iteration, and report why the run ends."""
        if self._batch is not None and self.row.get("iteration") != self.iteration:
            self._measure()
        if self.below > self.patience:
            rank_zero_info(
                f"stopped after iteration {self.iteration}: the training loss has been below {self.tolerance:g} at "
                f"{self.below} measurements"
            )

    def test_step(self, batch: RecoveryBatch, batch_idx: int) -> None:
        """Measure."""
        self._problem(batch)
        self.log_dict({"iteration": float(self.iteration), **self.measurements.row()}, batch_size=1)

    validation_step = test_step
