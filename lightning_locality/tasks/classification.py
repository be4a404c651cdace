"""Image classification by any network, with the anti-locality term."""

from __future__ import annotations

__all__ = ["Classification", "NonFiniteLossError"]

import re
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.core.mixins.hparams_mixin import _given_hyperparameters
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import Accuracy, MeanMetric

from lightning_locality.arguments import Checked
from lightning_locality.networks import adapt
from lightning_locality.regularizer.anti_locality import AntiLocality
from lightning_locality.regularizer.cuda_graph import GraphedStep
from lightning_locality.regularizer.penalties import COLUMN, DonorCheck, bind_boxes, weighted_penalties


class NonFiniteLossError(ValueError):
    """Training has been stopped because the loss is infinite or not a number."""


def check_state_dict(model: nn.Module, stored: Mapping[str, Any]) -> None:
    """Raise ValueError if a state dict does not fit a model, with the first difference instead of a page of keys."""
    own, others = (
        {name: value.shape for name, value in state.items() if isinstance(value, Tensor)}
        for state in (model.state_dict(), stored)
    )
    differ = [name for name in sorted(own.keys() | others.keys()) if own.get(name) != others.get(name)]
    if differ:
        name = differ[0]
        there, here = ("none" if name not in shapes else str(tuple(shapes[name])) for shapes in (others, own))
        raise ValueError(
            f"the checkpoint does not fit this model: {len(differ)} of {len(own)} tensors differ, first "
            f"{name} (checkpoint {there}, model {here}); load it with the config.yaml of the run that wrote it"
        )


def from_command_line() -> bool:
    """Whether the module under construction gets plain values, from which a checkpoint rebuilds its objects.

    In Python it gets the objects themselves, which the caller has to pass again with a checkpoint.
    """
    return _given_hyperparameters.get() is not None


Stage = Literal["train", "val", "test"]
_STEPS_BETWEEN_CHECKS = 50
_EXTRA_STATE = re.compile(r"(penalty|augmentation)\.(.+\.)?_extra_state")  # counts of samples, not weights
_OBJECTS = ["network", "penalty", "optimizer", "scheduler", "augmentation"]


class Classification(Checked, LightningModule):
    r"""Classify images, with a term against locality: loss + weight * R, or with several, each with its weight.

    The loss is binary cross-entropy of one logit for two classes and cross-entropy otherwise, R the value of the
    penalty. The defaults are those of *Implicit Regularization in Hierarchical Tensor Factorization and Deep
    Convolutional Neural Networks* (Razin, Maman, Cohen, 2022): SGD, learning rate 0.01, momentum 0.9, no schedule.

    Every epoch logs ``train/loss``, ``train/accuracy``, ``train/regularizer`` (``train/regularizer/NAME`` of each of
    several penalties) and the same under ``val/`` and ``test/``; ``loss`` is the classification loss alone. A training
    batch of one sample has no donor: the term is left out there, with one warning.

    Args:
        network: Takes images ``(B, C, H, W)`` and ends in a linear layer; first layer and head are adapted to the data.
        penalty: The term against locality, or several by name; None for none.
        weight: Weight of the term in the loss, 0 or more: one for all, or one for every name. At 0 the term is measured
            but not minimised.
        warmup_epochs: Epochs over which the weight rises linearly from 0 (an addition of ours; 0 as published).
        optimizer: Called with the parameters.
        scheduler: Called with the optimizer; steps once per epoch. ReduceLROnPlateau follows its ``monitor``, torch's
            own ``val/loss``. None for none.
        num_classes: Number of classes; None to take it from the data module.
        in_channels: Channels of the images; None to take them from the data module.
        measured_batches: Batches per epoch and stage on which R is measured when it is not minimised (validation,
            test, and training at weight 0); 0 for none.
        channels_last: Keep images and weights in the channels-last memory format, which is faster on recent GPUs and on
            CPUs (small convolutional networks: two thirds of the time).
        augmentation: Called with the images ``(B, C, H, W)`` of every training batch, such as
            :class:`~lightning_locality.transforms.RandomShift`, or a transform of torchvision (which changes all
            images of a batch alike); None, as published, for none.
        every_n_batches: Add the terms at every n-th batch of an epoch, starting with the first, and leave them out of
            the others, which are as fast as without. The weight there is ``weight``: pass n times as much for the same
            gradient on average (an addition of ours; 1 as published).
        cuda_graph: On a CUDA device, replay training steps from CUDA graphs, a quarter of the time (see
            :class:`GraphedStep` for what that asks of the network).

    Raises:
        ValueError: A negative number, a weight without penalty, weights of other names than the penalties, fewer than
            two classes, or a first training batch of one sample.
    """

    monitor: ClassVar[str] = "val/accuracy"

    def __init__(
        self,
        network: nn.Module,
        penalty: AntiLocality | Mapping[str, AntiLocality] | None = None,
        weight: float | Mapping[str, float] = 0.0,
        warmup_epochs: int = 0,
        optimizer: OptimizerCallable = lambda parameters: SGD(parameters, lr=0.01, momentum=0.9),
        scheduler: LRSchedulerCallable | None = None,
        num_classes: int | None = None,
        in_channels: int | None = None,
        measured_batches: int = 4,
        channels_last: bool = False,
        augmentation: nn.Module | None = None,
        every_n_batches: int = 1,
        cuda_graph: bool = True,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=[] if from_command_line() else _OBJECTS)
        if penalty is None and weight:
            raise ValueError(
                f"weight is {weight} but there is no penalty: pass penalty=AntiLocality(...), on the command "
                "line --config configs/overlays/anti_locality.yaml, or set weight to 0"
            )
        weighted_penalties(penalty, weight)
        if every_n_batches < 1:
            raise ValueError(f"every_n_batches must be at least 1, got {every_n_batches}")
        for name, count in (("warmup_epochs", warmup_epochs), ("measured_batches", measured_batches)):
            if count < 0:
                raise ValueError(f"{name} must be 0 or more, got {count}")
        self.network, self.augmentation = network, augmentation
        self.penalty = nn.ModuleDict(penalty) if isinstance(penalty, Mapping) else penalty
        self.weight, self.warmup_epochs, self.measured_batches = weight, warmup_epochs, measured_batches
        self.optimizer, self.scheduler = optimizer, scheduler
        self.every_n_batches, self.cuda_graph, self.graphed = every_n_batches, cuda_graph, GraphedStep()
        for one, _ in self._penalties.values():
            one.cuda_graph = cuda_graph
        self.num_classes, self.in_channels = num_classes, in_channels
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.metrics = nn.ModuleDict()
        self._finite: Tensor | None = None
        self._has_donors = DonorCheck()
        if num_classes is not None and in_channels is not None:
            self._fit_to_data(num_classes, in_channels)

    @property
    def _penalties(self) -> dict[str, tuple[AntiLocality, float]]:
        return weighted_penalties(self.penalty, self.weight)

    def _fit_to_data(self, num_classes: int, in_channels: int) -> None:
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        if in_channels < 1:
            raise ValueError(f"in_channels must be at least 1, got {in_channels}")
        self.num_classes, self.in_channels = num_classes, in_channels
        self.hparams.update(num_classes=num_classes, in_channels=in_channels)
        adapt(self.network, in_channels, 1 if num_classes == 2 else num_classes)
        self.network.to(memory_format=self.memory_format)
        for stage in ("train", "val", "test"):
            accuracy = Accuracy(task="multiclass", num_classes=num_classes, average="micro")
            # "disable": checking for NaN would synchronise with the device at every step; torchmetrics 1.9 then drops
            # weights, so means over batches are given one value per sample
            means = {name: MeanMetric(nan_strategy="disable") for name in ("loss", *self._penalties)}
            self.metrics[f"{stage}_metrics"] = nn.ModuleDict({"accuracy": accuracy, **means})

    def configure_model(self) -> None:
        """Adapt the first layer, the head and the metrics to the data, before a checkpoint is loaded."""
        if self.metrics:
            return
        data = getattr(self.trainer, "datamodule", None)
        num_classes = self.num_classes or getattr(data, "num_classes", None)
        shape = getattr(data, "image_shape", None)
        in_channels = self.in_channels or (shape[0] if shape else None)
        if num_classes is None or in_channels is None:
            raise ValueError(
                f"num_classes={num_classes} and in_channels={in_channels} are not known: the data module has no "
                "num_classes and image_shape, so pass both to Classification"
            )
        self._fit_to_data(num_classes, in_channels)

    def setup(self, stage: str) -> None:
        """Take the boxes of the data module for penalties that have none of their own."""
        data = getattr(self.trainer, "datamodule", None)
        shape = getattr(data, "image_shape", None)
        if shape and self.in_channels not in (None, shape[0]):
            raise ValueError(
                f"in_channels={self.in_channels}, but the images of the data module have {shape[0]}: leave it out"
            )
        bind_boxes((penalty for penalty, _ in self._penalties.values()), data)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is of this model; penalties and augmentation may be added, renamed or removed."""
        mine, stored = (
            {name: state for name, state in states.items() if _EXTRA_STATE.fullmatch(name)}
            for states in (self.state_dict(), checkpoint["state_dict"])
        )
        for name in stored.keys() - mine.keys():
            del checkpoint["state_dict"][name]
        checkpoint["state_dict"].update({name: mine[name] for name in mine.keys() - stored.keys()})
        check_state_dict(self, checkpoint["state_dict"])
        if self._trainer is not None and self.trainer.precision == "64-true":
            self.double()  # Lightning does so only after it has loaded the weights, which would be rounded

    def configure_optimizers(self) -> Any:
        """Return the optimizer, and the scheduler if there is one."""
        optimizer = self.optimizer(self.network.parameters())
        if self.scheduler is None:
            return optimizer
        scheduler = self.scheduler(optimizer)
        # Lightning's own class names its monitor, torch's none
        monitor = getattr(scheduler, "monitor", "val/loss") if isinstance(scheduler, ReduceLROnPlateau) else None
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": monitor}}

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(B, 1)`` for two classes, ``(B, K)`` for K, of images ``(B, C, H, W)``."""
        logits: Tensor = self.network(x.contiguous(memory_format=self.memory_format))
        return logits

    def _loss(self, logits: Tensor, y: Tensor) -> Tensor:
        if self.num_classes == 2:
            return F.binary_cross_entropy_with_logits(logits.squeeze(1), y.to(logits.dtype))
        return F.cross_entropy(logits, y)

    def _current_weight(self, column: str = COLUMN) -> float:
        weight = self._penalties[column][1] if self.penalty is not None else 0.0
        if not self.warmup_epochs:
            return weight
        steps = self.warmup_epochs * max(1, int(self.trainer.num_training_batches))
        return weight * min(1.0, (self.trainer.global_step + 1) / steps)

    def _record(self, stage: Stage, logits: Tensor, y: Tensor, loss: Tensor) -> None:
        logits = logits.detach()
        labels = (logits.squeeze(1) > 0).long() if self.num_classes == 2 else logits.argmax(dim=1)
        self._update(stage, "loss", stage != "test", loss.detach().expand(len(y)))
        self._update(stage, "accuracy", stage != "test", labels, y)

    def _record_penalty(self, stage: Stage, column: str, value: Tensor, samples: int) -> None:
        self._update(stage, column, stage == "train", value.detach().expand(samples))

    def _update(self, stage: Stage, name: str, shown: bool, *values: Tensor) -> None:
        metric: Any = self.metrics[f"{stage}_metrics"][name]  # type: ignore[index]
        if values[0].dtype == torch.float64 != metric.dtype:
            metric.set_dtype(torch.float64)  # torchmetrics rounds to float32 until the first reset of a process
        metric.update(*values)
        self.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True, prog_bar=shown)

    def _measure(self, stage: Stage, x: Tensor, y: Tensor, batch_idx: int, known: Collection[str] = ()) -> None:
        """Measure R without minimising it, with random numbers of its own, so that measuring changes nothing."""
        if batch_idx >= self.measured_batches or len(x) < 2:
            return
        training = self.network.training
        self.network.eval()
        try:
            for column, (penalty, _) in self._penalties.items():
                if column not in known:
                    generator = torch.Generator().manual_seed((int(penalty.seed) * 1_000_003 + batch_idx) % 2**63)
                    value = penalty.measure(self.network, x, y, generator=generator)
                    self._record_penalty(stage, column, value, len(x))
        finally:
            self.network.train(training)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the classification loss plus the weighted terms of a batch."""
        x, y = batch[:2]  # a data module may add targets
        if self.augmentation is not None:
            x = self.augmentation(x)
        x = x.contiguous(memory_format=self.memory_format)
        minimised = {column: penalty for column, (penalty, weight) in self._penalties.items() if weight > 0}
        left_out = batch_idx % self.every_n_batches or (minimised and not self._has_donors(x, batch_idx))
        logits, values = None, dict[str, Tensor]()
        for column, penalty in () if left_out else minimised.items():
            if logits is None:  # the first one saves the loss its forward pass
                logits, values[column] = penalty.with_output(self.network, x, y)
            else:
                values[column] = penalty(self.network, x, y)
        if logits is None:
            logits = self.graphed(self.network, self.network, (x,)) if self.cuda_graph else self(x)
        objective = loss = self._loss(logits, y)
        for column, value in values.items():
            objective = objective + self._current_weight(column) * value
            self._record_penalty("train", column, value, len(x))
        self._measure("train", x, y, batch_idx, known=minimised)
        self._record("train", logits, y, loss)
        return objective

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note whether the loss is finite, and read the note only when that costs little device synchronisation."""
        finite = torch.isfinite(outputs["loss"].detach())
        self._finite = finite if self._finite is None else self._finite & finite
        if finite.device.type == "cpu" or (batch_idx + 1) % _STEPS_BETWEEN_CHECKS == 0:
            self._raise_unless_finite()

    def _raise_unless_finite(self) -> None:
        if self._finite is None or bool(self._finite):
            return
        weights = ", ".join(f"{self._current_weight(column):g}" for column in self._penalties) or "0"
        raise NonFiniteLossError(
            f"the training loss is not finite at step {self.trainer.global_step} (epoch {self.current_epoch}): "
            f"lower the learning rate, the weight of the term (now {weights}) or set "
            "gradient_clip_val; earlier checkpoints and metrics are kept"
        )

    # before weights that a non-finite loss has reached are saved
    on_validation_start = on_train_epoch_end = _raise_unless_finite

    def _evaluate(self, stage: Stage, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch[:2]
        logits = self(x)
        self._record(stage, logits, y, self._loss(logits, y))
        self._measure(stage, x, y, batch_idx)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measure a validation batch."""
        self._evaluate("val", batch, batch_idx)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measure a test batch."""
        self._evaluate("test", batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return class probabilities ``(B, num_classes)`` of a batch."""
        logits: Tensor = self(batch[0] if isinstance(batch, (tuple, list)) else batch)
        if self.num_classes != 2:
            return logits.softmax(dim=1)
        positive = logits.sigmoid()
        return torch.cat([1 - positive, positive], dim=1)
