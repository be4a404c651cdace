"""Gradient descent with one adaptive step size for all weights."""

from __future__ import annotations

__all__ = ["GroupRMSprop"]

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT


class GroupRMSprop(Optimizer):
    r"""RMSprop with a single running mean for all weights, so that a step keeps the direction of the gradient.

    .. math::
        s_t = \alpha s_{t-1} + (1 - \alpha) \lVert g_t \rVert^2, \qquad
        \theta_t = \theta_{t-1} - \frac{\mathrm{lr}}{\sqrt{s_t / (1 - \alpha^t)} + \varepsilon}\, g_t

    where g is the gradient of all weights together and :math:`s_0 = 0`: gradient descent on another scale of time.
    From the authors' code of *Implicit Regularization in Hierarchical Tensor Factorization and Deep Convolutional
    Neural Networks* (Razin, Maman, Cohen, 2022), whose defaults these are.

    On CUDA nothing waits for the device, and steps can be captured in a CUDA graph.

    Args:
        params: The weights, one group.
        lr: Length of a step where the norm of the gradient is what it has been.
        alpha: Share of the running mean that is kept, from 0 to below 1.
        eps: Added to the root.
        weight_decay: Multiple of the weights that is added to the gradient first.

    Raises:
        ValueError: Several groups, or a number out of its range.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
        >>> optimizer = GroupRMSprop([weight], lr=0.5, eps=0.0)
        >>> weight.square().sum().div(2).backward()
        >>> optimizer.step()  # the first step has length lr
        >>> [round(value, 12) for value in weight.tolist()]
        [2.7, 3.6]
    """

    def __init__(
        self, params: ParamsT, lr: float = 1e-2, alpha: float = 0.99, eps: float = 1e-6, weight_decay: float = 0.0
    ) -> None:
        if not lr > 0:
            raise ValueError(f"lr must be positive, got {lr}")
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha must be from 0 to below 1, got {alpha}")
        if not eps >= 0:
            raise ValueError(f"eps must be 0 or more, got {eps}")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must be 0 or more, got {weight_decay}")
        super().__init__(params, {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take the only group."""
        if self.param_groups:
            raise ValueError("params must be one group, got several: the step size is one for all weights")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure`` computes the gradient first, and its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        weights = [weight for weight in group["params"] if weight.grad is not None]
        if not weights:
            return loss
        gradients = [cast(Tensor, weight.grad) for weight in weights]
        if group["weight_decay"]:
            gradients = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
        # the state of all weights is kept with the first
        state = self.state[group["params"][0]]
        if weights[0].device.type == "cpu":
            _step_on_cpu(weights, gradients, state, group)
        else:
            _step_on_device(weights, gradients, state, group)
        return loss


def _step_on_cpu(weights: list[Tensor], gradients: list[Tensor], state: dict[str, Any], group: dict[str, Any]) -> None:
    """In numbers of Python, which cost less than tensors of one element."""
    alpha = group["alpha"]
    square = sum(float(torch.linalg.vector_norm(gradient)) ** 2 for gradient in gradients)
    step = int(state.get("step", 0)) + 1
    mean = alpha * float(state.get("mean_square", 0.0)) + (1 - alpha) * square
    state["step"], state["mean_square"] = step, mean
    length = group["lr"] / _root(mean / (1 - alpha**step), group["eps"])
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.add_(gradient, alpha=-length)


def _root(mean: float, eps: float) -> float:
    # without eps a gradient of exactly zero would divide 0 by 0
    return math.sqrt(mean) + eps or math.inf


def _step_on_device(
    weights: list[Tensor], gradients: list[Tensor], state: dict[str, Any], group: dict[str, Any]
) -> None:
    """In tensors of one element, which the host never reads."""
    alpha, first = group["alpha"], weights[0]
    # torch converts the state to the type of the weight when it loads it, all but "step"
    for name, dtype in (("step", torch.float64), ("mean_square", first.dtype)):
        value = state.get(name, 0.0)
        if not isinstance(value, Tensor) or value.device != first.device:
            state[name] = torch.as_tensor(value, dtype=dtype).to(first.device)
    square = torch.stack(torch._foreach_norm(gradients)).square().sum()
    step, mean = state["step"].add_(1), state["mean_square"].mul_(alpha).add_(square, alpha=1 - alpha)
    root = (mean / (1 - alpha**step)).sqrt_().add_(group["eps"])
    length = torch.where(root > 0, group["lr"] / root, 0.0).to(first.dtype)
    torch._foreach_sub_(weights, torch._foreach_mul(gradients, length))
