"""Alternatives to the term for the sweep in this folder, and schedules of the term's weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.func import functional_call

from lightning_locality import Classification


class SharpnessAware(torch.optim.SGD):
    r"""SGD with the gradient at :math:`\theta + \rho g / |g|`, g the gradient at :math:`\theta`.

    Source: "Sharpness-aware minimization for efficiently improving generalization" (Foret, Kleiner, Mobahi, Neyshabur,
    2021), algorithm 1. A step is two of SGD; metrics of training are means of both.
    """

    def __init__(self, params: Any, lr: float = 0.01, momentum: float = 0.9, rho: float = 0.05) -> None:
        super().__init__(params, lr=lr, momentum=momentum)
        self.rho = rho

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:
        """Take one step; the closure computes loss and gradients."""
        with torch.enable_grad():
            loss = closure()
        weights = [weight for group in self.param_groups for weight in group["params"] if weight.grad is not None]
        gradients = [weight.grad for weight in weights]
        norm = torch.linalg.vector_norm(torch.stack([gradient.norm() for gradient in gradients]))
        moves = [self.rho * gradient / (norm + 1e-12) for gradient in gradients]
        torch._foreach_add_(weights, moves)
        with torch.enable_grad():
            closure()
        torch._foreach_sub_(weights, moves)
        super().step()
        return loss


class LowOrdersPenalised(Classification):
    r"""Classification with the loss of Deng et al. against interactions of low order, so that high ones remain.

    .. math:: \text{loss} - \lambda H(\sigma(v(S_2) - \tfrac{r_2}{r_1} v(S_1))),

    H the entropy, v the logit of an image of which only the cells in S are seen and the others are 0 (grey), and
    :math:`S_1 \subset S_2` random sets of shares r1 and r2 of the cells. With r1 = 0 the factor is 1.
    Source: "Discovering and explaining the representation bottleneck of DNNs" (Deng, Ren, Zhang, Zhang, 2022), its
    authors' code (r1 = 0, r2 = 0.5 and weight 1 for high orders); they have networks without batch normalisation: ours
    leave its running statistics alone.
    """

    def __init__(
        self, *args: Any, orders: float = 1.0, larger: float = 0.5, smaller: float = 0.0, cell: int = 2, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.orders, self.larger, self.smaller, self.cell = orders, larger, smaller, cell

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch, the other one included."""
        loss, x = super().training_step(batch, batch_idx), batch[0]
        rows, columns = x.shape[2] // self.cell, x.shape[3] // self.cell
        rank = torch.rand(len(x), rows * columns, device=x.device).argsort(1).argsort(1).view(len(x), 1, rows, columns)
        sets = [(rank < int(share * rows * columns)).to(x.dtype) for share in (self.larger, self.smaller)]
        large, small = (self._score(x * F.interpolate(seen, scale_factor=self.cell)) for seen in sets)
        change = large - (self.larger / self.smaller if self.smaller else 1.0) * small
        entropy = F.softplus(change) - change * change.sigmoid()
        return loss - self.orders * entropy.mean()

    def _score(self, x: Tensor) -> Tensor:
        statistics = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
        score: Tensor = functional_call(self.network, statistics, (x,))
        return score


class FallingWeight(Callback):
    """The weight of the term falls linearly to 0 over ``epochs`` epochs."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self.first: float | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the weight of the epoch."""
        self.first = pl_module.weight if self.first is None else self.first
        pl_module.weight = self.first * max(0.0, 1 - trainer.current_epoch / self.epochs)


class HeldRegularizer(Callback):
    """The weight is a multiplier that holds R of the training batches at ``target``.

    After every epoch it is multiplied by exp(``rate`` (R - target)): gradient ascent in its logarithm.
    """

    def __init__(self, target: float = 0.5, rate: float = 1.0) -> None:
        self.target, self.rate = target, rate

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the weight of the epoch."""
        if "train/regularizer" in trainer.callback_metrics:
            excess = trainer.callback_metrics["train/regularizer"] - self.target
            pl_module.weight *= float(torch.exp(self.rate * excess))
