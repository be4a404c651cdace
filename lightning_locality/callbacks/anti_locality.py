"""The anti-locality term for any unmodified LightningModule."""

from __future__ import annotations

__all__ = ["AntiLocalityCallback"]

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, final

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_locality.arguments import Checked
from lightning_locality.regularizer.anti_locality import AntiLocality
from lightning_locality.regularizer.penalties import COLUMN, DonorCheck, bind_boxes, weighted_penalties

Network = str | Callable[[LightningModule], Callable[[Tensor], Any]] | None
IMAGE_NAMES = ("image", "images", "pixel_values", "input", "inputs", "x")
_LABELS = ("label", "labels", "target", "targets", "y")


@final
class AntiLocalityCallback(Checked, Callback):
    r"""Add ``weight * R``, or several such terms, to the loss of any LightningModule with automatic optimisation.

    After every backward pass the gradient of ``weight * penalty(module, x, y)``, which calls ``module(x)`` or the
    network given by ``model``, is added to that of the loss: divided by ``accumulate_grad_batches`` as Lightning
    divides the loss, averaged over the processes under DDP, and clipped with it. Training is the same as with the term
    inside the loss, at the cost of one more forward pass. The value is logged as ``train/regularizer``, of several
    penalties as ``train/regularizer/NAME``. A batch of one sample has no donor: the term is left out there, with one
    warning.

    A Trainer may have several of these callbacks, whose penalties have different names.

    Args:
        penalty: The term, or several by name; their random state is kept in the checkpoint.
        weight: Weight of the term, 0 or more: one for all, or one for every name. Nothing is computed at 0.
        every_n_batches: Add the term only at every n-th batch of an epoch, starting with the first; its weight there
            is ``weight``, not n times that.
        batch: Function that extracts images ``(B, C, H, W)`` and labels or None from a batch; None: a batch is a tuple
            or list that begins with both, or a mapping that names them image, images, pixel_values, input, inputs or x,
            and label, labels, target, targets or y. Labels of other shapes than ``(B,)`` go with the penalty's output.
        model: The network of images, if it is not the module itself: name of its attribute, or a function of the module
            that returns it.
        cuda_graph: On a CUDA device, replay the terms from CUDA graphs (see :class:`GraphedStep`).

    Raises:
        ValueError: Negative weight, weights of other names than the penalties, one name twice in a Trainer, a batch of
            unknown form, a first batch of one sample, a model with SyncBatchNorm.
        MisconfigurationException: Manual optimisation, a module without forward, float16, or a strategy other than a
            single device or DDP.
    """

    def __init__(
        self,
        penalty: AntiLocality | Mapping[str, AntiLocality],
        weight: float | Mapping[str, float],
        every_n_batches: int = 1,
        batch: Callable[[Any], tuple[Tensor, Tensor | None]] | None = None,
        model: str | Callable[[LightningModule], Callable[[Tensor], Any]] | None = None,
        cuda_graph: bool = True,
    ) -> None:
        if every_n_batches < 1:
            raise ValueError(f"every_n_batches must be at least 1, got {every_n_batches}")
        self.penalty, self.weight, self.every_n_batches = penalty, weight, every_n_batches
        self.batch, self.model = batch, model
        self._penalties  # noqa: B018 (raises ValueError)
        self._images: tuple[Tensor, Tensor | None] | None = None
        self._has_donors, self._left_out = DonorCheck(), False
        for one, _ in self._penalties.values():
            one.cuda_graph = cuda_graph

    @property
    def _penalties(self) -> dict[str, tuple[AntiLocality, float]]:
        return weighted_penalties(self.penalty, self.weight)

    @property
    def _minimised(self) -> dict[str, tuple[AntiLocality, float]]:
        return {column: (penalty, weight) for column, (penalty, weight) in self._penalties.items() if weight}

    @property
    def state_key(self) -> str:
        """One for each set of names: a Trainer may have several."""
        columns = [*self._penalties]
        return super().state_key if columns == [COLUMN] else self._generate_state_key(columns=columns)

    # not state_dict, with which Trainer() refuses two callbacks of one name before setup can say what to do
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the states of the penalties' random numbers."""
        states = {column: penalty.state_dict() for column, (penalty, _) in self._penalties.items()}
        checkpoint["callbacks"][self.state_key] = states

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Continue with the random numbers of every penalty that the checkpoint knows, whatever callback had it."""
        own = (states for key, states in checkpoint["callbacks"].items() if key.startswith(type(self).__name__))
        for column, state in ((column, state) for states in own for column, state in states.items()):
            column = COLUMN if column == "penalty" else column  # as the only penalty was called before names
            if column in self._penalties:
                self._penalties[column][0].load_state_dict(state)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reject what cannot be differentiated twice, or not from outside the module."""
        if stage != "fit":
            return
        callbacks = [c for c in trainer.callbacks if isinstance(c, AntiLocalityCallback)]  # type: ignore[attr-defined]
        names = [column for callback in callbacks for column in callback._penalties]
        if double := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(
                f"several AntiLocalityCallbacks log train/{double}: name their penalties differently, as in "
                "AntiLocalityCallback({'near': penalty}, weight)"
            )
        if not self._minimised:
            return
        bind_boxes((penalty for penalty, _ in self._minimised.values()), getattr(trainer, "datamodule", None))
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
        require_forward(pl_module, self.model, "AntiLocalityCallback")
        if str(trainer.precision).startswith("16"):
            raise MisconfigurationException(
                f"precision={trainer.precision!r}: float16 overflows in double backward; use 'bf16-mixed' or '32-true'"
            )
        # with Trainer(sync_batchnorm=True) DDP converts the normalisations later, and the penalty refuses them
        twice = any(penalty.term == "cosine" for penalty, _ in self._minimised.values())
        if twice and any(isinstance(module, nn.SyncBatchNorm) for module in pl_module.modules()):
            raise ValueError(
                "SyncBatchNorm has no second derivative: use BatchNorm2d and Trainer(sync_batchnorm=False)"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the images and labels of the batch."""
        if self._minimised and batch_idx % self.every_n_batches == 0:
            x, y = images_and_labels(batch) if self.batch is None else self.batch(batch)
            if x is None or (self.batch is None and not (x.ndim == 4 and x.is_floating_point())):
                form = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
                raise ValueError(
                    f"batch ({form}) neither begins with floating-point images (B, C, H, W) nor names them "
                    f"{', '.join(IMAGE_NAMES)}: pass batch=, a function that returns images as the network takes them "
                    "and labels, or None"
                )
            self._images, self._left_out = (x, y), not self._has_donors(x, batch_idx)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the gradients of the terms to that of the loss."""
        if self._images is None:
            return
        x, y = self._images
        parameters = [p for p in pl_module.parameters() if p.requires_grad]
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": trainer.world_size > 1}
        for column, (penalty, weight) in self._minimised.items():
            if self._left_out:
                _add_gradient(trainer, parameters, None)
                continue
            with trainer.precision_plugin.forward_context():
                try:
                    value = penalty(find_network(pl_module, self.model), x, y)
                except Exception as error:
                    name = type(pl_module).__name__
                    error.add_note(f"The penalty calls {name}(x) with images x unless model= names another network.")
                    if y is None:
                        names = ", ".join(_LABELS)
                        error.add_note(f"The batch has no labels ({names}, or second in a tuple): see batch=.")
                    raise
                term = value * (weight / trainer.accumulate_grad_batches)
            _add_gradient(trainer, parameters, term)
            pl_module.log(f"train/{column}", value.detach(), batch_size=len(x), **options)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Release the batch."""
        self._images = None


def has_whole_model(strategy: Strategy) -> bool:
    """Whether every device holds all weights; DeepSpeed, a subclass of DDP, shards them."""
    return isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) and not isinstance(strategy, DeepSpeedStrategy)


def _add_gradient(trainer: Trainer, parameters: list[nn.Parameter], term: Tensor | None) -> None:
    """Add the gradient of the term, if there is one, averaged over the processes in a single message."""
    gradients: Sequence[Tensor | None] = [None] * len(parameters)
    if term is not None:
        gradients = torch.autograd.grad(term, parameters, allow_unused=True)
    if trainer.world_size > 1:
        # a process whose batch has no term joins the others with zeros
        own = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
        flat = trainer.strategy.reduce(torch.cat([g.flatten() for g in own]), reduce_op="mean")
        assert isinstance(flat, Tensor)
        mean = [part.view_as(g) for part, g in zip(torch.split(flat, [g.numel() for g in own]), own, strict=True)]
        gradients = [m if g is not None or m.any() else None for m, g in zip(mean, gradients, strict=True)]
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient.clone()
            else:
                parameter.grad.add_(gradient)


def images_and_labels(batch: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return the images and the labels of a batch, each None if it is not found.

    A batch is the images, or a tuple or list that begins with images and labels, or a mapping with usual names of both.
    """
    images, labels = [batch], list[Any]()
    if isinstance(batch, Mapping):
        images, labels = ([batch[name] for name in names if name in batch] for names in (IMAGE_NAMES, _LABELS))
    elif isinstance(batch, (tuple, list)):
        images, labels = [*batch[:1]], [*batch[1:2]]
    # of several names the first with images, not with their files or sizes
    tensors = sorted((value for value in images if isinstance(value, Tensor)), key=lambda value: value.ndim != 4)
    return next(iter(tensors), None), next((value for value in labels if isinstance(value, Tensor)), None)


class _Network(nn.Module):
    """A function of images, with the module whose parts it calls."""

    def __init__(self, module: nn.Module, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, x: Tensor) -> Any:
        """Call the function."""
        return self.function(x)


def find_network(module: LightningModule, model: Network) -> nn.Module:
    """Return the network that ``model`` names or returns; None: the module itself."""
    if model is None:
        return module
    try:
        found: Any = attrgetter(model)(module) if isinstance(model, str) else model(module)
    except AttributeError as error:
        raise ValueError(f"model={model!r}: {error}; {type(module).__name__} has {_children(module)}") from error
    if not callable(found):
        raise ValueError(f"model={model!r} must be, or return, a network or function of images, got {found!r:.100}")
    return found if isinstance(found, nn.Module) else _Network(module, found)


def require_forward(module: LightningModule, model: Network, name: str) -> None:
    """Raise MisconfigurationException if no network is named and the module is none."""
    if model is None and not is_overridden("forward", module, LightningModule):
        raise MisconfigurationException(
            f"{name} calls module(x), and {type(module).__name__} has no forward: name its network by model=, one of "
            f"{_children(module)}, or pass a function of the module that returns it"
        )


def _children(module: nn.Module) -> str:
    return ", ".join(name for name, _ in module.named_children()) or "no networks"
