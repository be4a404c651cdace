"""The anti-locality term for any unmodified LightningModule."""

from __future__ import annotations

__all__ = ["AntiLocalityCallback"]

from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn

from lightning_locality.regularizer.anti_locality import AntiLocality


@final
class AntiLocalityCallback(Callback):
    r"""Add ``weight * R`` to the loss of any LightningModule trained by automatic optimisation.

    After every backward pass the gradient of ``weight * penalty(module, x, y)``, which calls ``module(x)``, is added to
    that of the loss: divided by ``accumulate_grad_batches`` as Lightning divides the loss, averaged over the processes
    under DDP, and clipped with it. Training is the same as with the term inside the loss, at the cost of one more
    forward pass. The value is logged as ``train/regularizer``.

    Args:
        penalty: The term; its random state is kept in the checkpoint.
        weight: Weight of the term, 0 or more; nothing is computed at 0.
        every_n_batches: Add the term only at every n-th batch of an epoch, starting with the first; its weight there
            is ``weight``, not n times that.
        batch: Function that extracts images ``(B, C, H, W)`` and labels ``(B,)`` or None from a batch; None: a batch
            is a tuple or list that begins with both, or a mapping with "image" and "label" or "x" and "y".
        cuda_graph: On a CUDA device, replay the term from CUDA graphs (see :class:`GraphedStep`).

    Raises:
        ValueError: Negative weight, a batch of unknown form, a model with SyncBatchNorm.
        MisconfigurationException: Manual optimisation, float16, or a strategy other than a single device or DDP.
    """

    def __init__(
        self,
        penalty: AntiLocality,
        weight: float,
        every_n_batches: int = 1,
        batch: Callable[[Any], tuple[Tensor, Tensor | None]] | None = None,
        cuda_graph: bool = True,
    ) -> None:
        if not weight >= 0:
            raise ValueError(f"weight must be 0 or more, got {weight}")
        if every_n_batches < 1:
            raise ValueError(f"every_n_batches must be at least 1, got {every_n_batches}")
        self.penalty, self.weight, self.every_n_batches, self.batch = penalty, float(weight), every_n_batches, batch
        self._images: tuple[Tensor, Tensor | None] | None = None
        if cuda_graph:
            penalty.cuda_graph = True

    def state_dict(self) -> dict[str, Any]:
        """State of the penalty's random numbers."""
        return {"penalty": self.penalty.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the random numbers of the checkpoint."""
        self.penalty.load_state_dict(state_dict["penalty"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reject what cannot be differentiated twice, or not from outside the module."""
        if stage != "fit" or self.weight == 0:
            return
        if not has_whole_model(trainer.strategy):
            raise MisconfigurationException(
                f"AntiLocalityCallback cannot differentiate twice under {type(trainer.strategy).__name__}: use "
                "'ddp' or one device"
            )
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"AntiLocalityCallback adds to the gradient of automatic optimisation, and {type(pl_module).__name__} "
                "optimises by itself: add weight * penalty(self, x, y) to the loss in its training_step"
            )
        if str(trainer.precision).startswith("16"):
            raise MisconfigurationException(
                f"precision={trainer.precision!r}: float16 overflows in double backward; use 'bf16-mixed' or '32-true'"
            )
        # with Trainer(sync_batchnorm=True) DDP converts the normalisations later, and the penalty refuses them
        if any(isinstance(module, nn.SyncBatchNorm) for module in pl_module.modules()):
            raise ValueError(
                "SyncBatchNorm has no second derivative: use BatchNorm2d and Trainer(sync_batchnorm=False)"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the images and labels of the batch."""
        if self.weight > 0 and batch_idx % self.every_n_batches == 0:
            self._images = _images(batch) if self.batch is None else self.batch(batch)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the gradient of the term to that of the loss."""
        if self._images is None:
            return
        x, y = self._images
        with trainer.precision_plugin.forward_context():
            value = self.penalty(pl_module, x, y)
            term = value * (self.weight / trainer.accumulate_grad_batches)
        _add_gradient(trainer, [p for p in pl_module.parameters() if p.requires_grad], term)
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": trainer.world_size > 1}
        pl_module.log("train/regularizer", value.detach(), batch_size=len(x), **options)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Release the batch."""
        self._images = None


def has_whole_model(strategy: Strategy) -> bool:
    """Whether every device holds all weights; DeepSpeed, a subclass of DDP, shards them."""
    return isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) and not isinstance(strategy, DeepSpeedStrategy)


def _add_gradient(trainer: Trainer, parameters: list[nn.Parameter], term: Tensor) -> None:
    """Add the gradient of the term to that of the loss, first averaged over the processes in a single message."""
    gradients = torch.autograd.grad(term, parameters, allow_unused=True)
    used = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
    if trainer.world_size > 1 and used:
        flat = trainer.strategy.reduce(torch.cat([g.flatten() for _, g in used]), reduce_op="mean")
        assert isinstance(flat, Tensor)
        parts = torch.split(flat, [g.numel() for _, g in used])
        used = [(p, part.view_as(g)) for part, (p, g) in zip(parts, used, strict=True)]
    with torch.no_grad():
        for parameter, gradient in used:
            if parameter.grad is None:
                parameter.grad = gradient.clone()
            else:
                parameter.grad.add_(gradient)


def _images(batch: Any) -> tuple[Tensor, Tensor | None]:
    pair: Any = batch[:2] if isinstance(batch, (tuple, list)) and len(batch) >= 2 else None
    if isinstance(batch, Mapping):
        names = (("image", "label"), ("x", "y"))
        pair = next(((batch[x], batch[y]) for x, y in names if x in batch and y in batch), None)
    if pair is None or not all(isinstance(part, Tensor) for part in pair):
        form = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"batch ({form}) is neither (images, labels, ...) nor a mapping with 'image' and 'label' or 'x' and 'y': "
            "pass batch=, a function that returns images (B, C, H, W) and labels (B,) or None"
        )
    return pair[0], pair[1]
