"""Gradient flow, integrated with an error control."""

from __future__ import annotations

__all__ = ["GradientFlow", "GroupRMSprop", "IntegrationError"]

import math
from collections.abc import Callable
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import DOP853, RK23, RK45, OdeSolver, Radau
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


Method = Literal["RK23", "RK45", "DOP853", "Radau"]
_SOLVERS: dict[str, Any] = {"RK23": RK23, "RK45": RK45, "DOP853": DOP853, "Radau": Radau}
_LARGEST_IMPLICIT = 2000
_SMALLEST_RTOL_SINGLE = 1e-6
_Vector = NDArray[np.float64]


class IntegrationError(ValueError):
    """The integration of the flow cannot go on within its tolerance."""


class GradientFlow(Optimizer):
    r"""Gradient flow by an ODE solver of SciPy that holds its error below a tolerance and chooses its own steps.

    .. math:: \frac{d\theta}{dt} = -\nabla L(\theta)

    A step is one accepted step of the solver, from ``time`` to whatever time the tolerance allows: long on
    plateaus, where gradient descent needs thousands of small ones. Weights are integrated in float64, whatever
    their own type and device. A checkpoint in the middle of a flow continues it exactly.

    Args:
        params: The weights, one group.
        method: Runge-Kutta pair of order 3(2), 5(4) or 8(5, 3), or the implicit ``"Radau"`` of order 5 for few weights
            (its Jacobian takes one gradient per weight in every step) and stiff flows, such as those along a narrow
            valley to infinity, where the others take steps no longer than gradient descent.
        rtol: Error allowed per step, relative to each weight.
        atol: Error allowed per step, absolute: well below the smallest weights that matter.
        max_step: Longest step.
        end_time: Time at which the flow stops; :attr:`finished` is true from then, and steps do nothing.

    Raises:
        ValueError: Several groups, a number out of its range, a tolerance that float32 weights cannot meet, or
            more weights than Radau is meant for.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        >>> flow = GradientFlow([weight], end_time=2.0)
        >>> def closure():
        ...     flow.zero_grad()
        ...     loss = weight.square().sum() / 2
        ...     loss.backward()
        ...     return loss
        >>> while not flow.finished:
        ...     loss = flow.step(closure)
        >>> abs(weight.item() - math.exp(-2)) < 1e-8
        True
    """

    def __init__(
        self,
        params: ParamsT,
        method: Method = "DOP853",
        rtol: float = 1e-8,
        atol: float = 1e-10,
        max_step: float = math.inf,
        end_time: float = math.inf,
    ) -> None:
        if method not in _SOLVERS:
            raise ValueError(f"method must be one of {', '.join(_SOLVERS)}, got {method!r}")
        for name, value in (("rtol", rtol), ("atol", atol), ("max_step", max_step), ("end_time", end_time)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        least = 100 * float(np.finfo(np.float64).eps)
        if rtol < least:
            raise ValueError(f"rtol must be at least {least:.1e}, what float64 can tell, got {rtol}")
        defaults = {"method": method, "rtol": rtol, "atol": atol, "max_step": max_step, "end_time": end_time}
        progress = {"time": 0.0, "step_size": None, "evaluations": 0, "position": None}
        super().__init__(params, {**defaults, **progress})
        weights: list[Tensor] = self.param_groups[0]["params"]
        if rtol < _SMALLEST_RTOL_SINGLE and any(weight.dtype != torch.float64 for weight in weights):
            raise ValueError(
                f"rtol={rtol:g} is below the rounding of {weights[0].dtype} gradients: give the model "
                f"dtype=torch.float64, or set rtol to {_SMALLEST_RTOL_SINGLE:g} or more"
            )
        if method == "Radau" and sum(weight.numel() for weight in weights) > _LARGEST_IMPLICIT:
            raise ValueError(
                f"method='Radau' solves for a matrix of the size of the weights, and there are "
                f"{sum(weight.numel() for weight in weights)} of them (at most {_LARGEST_IMPLICIT}): use 'DOP853'"
            )
        self._solver: OdeSolver | None = None
        self._resumed = False
        self._closure: Callable[[], Any] = lambda: None
        # of the last gradient, which is that of the end of the last step
        self._loss: Any = None
        self._slope: _Vector = np.zeros(0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take the only group."""
        if self.param_groups:
            raise ValueError("params must be one group, got several: the flow has one time for all weights")
        super().add_param_group(param_group)

    @property
    def time(self) -> float:
        """Time t reached."""
        return float(self.param_groups[0]["time"])

    @property
    def evaluations(self) -> int:
        """Number of gradients computed so far."""
        return int(self.param_groups[0]["evaluations"])

    @property
    def finished(self) -> bool:
        """Whether ``end_time`` is reached."""
        return self.time >= float(self.param_groups[0]["end_time"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint was."""
        super().load_state_dict(state_dict)
        self._solver = None
        self._resumed = self.param_groups[0]["step_size"] is not None and self.param_groups[0]["method"] != "Radau"

    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        """One accepted step.

        Args:
            closure: Sets the gradients of the weights anew and returns the loss.

        Returns:
            The loss before the step.

        Raises:
            IntegrationError: No step is short enough for the tolerance, or the gradient is not finite.
        """
        if self.finished:
            return None
        self._closure = closure
        group = self.param_groups[0]
        # what an overflow in a step tried out leaves is rejected by the solver, which then tries a shorter one
        with np.errstate(all="ignore"):
            solver = self._ready()
            before, start = self._loss, solver.t
            if not np.isfinite(self._slope).all():
                raise IntegrationError(f"the gradient is not finite at time {start:g}: start from smaller weights")
            try:
                message = solver.step()
            except ValueError as error:  # of SciPy, from a Jacobian that is not finite
                message = str(error)
        if solver.status == "failed" or solver.t == start:
            self._write(solver.y)
            raise IntegrationError(
                f"the flow cannot go on at time {start:g}: no step meets rtol={group['rtol']:g} and "
                f"atol={group['atol']:g} ({message}); loosen them, use method='Radau' for a stiff flow, or end "
                f"earlier (end_time)"
            )
        exact = all(weight.dtype == torch.float64 for weight in group["params"])
        group.update(
            time=float(solver.t),
            step_size=float(solver.h_abs),
            position=None if exact else torch.from_numpy(solver.y.copy()),
        )
        if group["method"] == "Radau":
            # the last gradient is not that of the end, and what Radau remembers is not in a checkpoint
            self._solver = None
            self._write(solver.y)
        return before

    def _ready(self) -> OdeSolver:
        """The solver, set up anew at the beginning, after a checkpoint, or where the weights have been changed."""
        group = self.param_groups[0]
        now = self._read()
        solver = self._solver
        if solver is not None and np.array_equal(now, self._as_weights(solver.y)):
            return solver
        position = group["position"]
        if position is not None and np.array_equal(now, self._as_weights(position.numpy())):
            now = position.numpy().copy()
        first = group["step_size"]
        end, evaluations = float(group["end_time"]), group["evaluations"]
        solver = _SOLVERS[group["method"]](
            self._velocity,
            group["time"],
            now,
            end,
            max_step=group["max_step"],
            rtol=group["rtol"],
            atol=group["atol"],
            first_step=None if first is None else min(first, end - group["time"]),
        )
        if first is not None:
            solver.h_abs = first
        if self._resumed:
            # the gradient that the checkpoint does not hold has been counted already
            group["evaluations"], self._resumed = evaluations, False
        self._solver = solver
        # the last gradient may have been that of a step tried out to find the length of the first
        if first is None or group["method"] == "Radau":
            self._velocity(group["time"], now)
        return solver

    def _velocity(self, time: float, position: _Vector) -> _Vector:
        self._write(position)
        with torch.enable_grad():
            loss = self._closure()
        group = self.param_groups[0]
        group["evaluations"] += 1
        parts = [
            torch.zeros_like(weight) if weight.grad is None else weight.grad.detach() for weight in group["params"]
        ]
        self._loss, self._slope = loss, _flat(parts)
        return -self._slope

    def _read(self) -> _Vector:
        return _flat([weight.detach() for weight in self.param_groups[0]["params"]])

    @torch.no_grad()
    def _write(self, position: _Vector) -> None:
        values, start = torch.from_numpy(position), 0
        for weight in self.param_groups[0]["params"]:
            weight.copy_(values[start : start + weight.numel()].view_as(weight))
            start += weight.numel()

    def _as_weights(self, position: _Vector) -> _Vector:
        """A position rounded as the weights are."""
        values, parts, start = torch.from_numpy(position), [], 0
        for weight in self.param_groups[0]["params"]:
            parts.append(values[start : start + weight.numel()].to(weight.dtype))
            start += weight.numel()
        return _flat(parts)


def _flat(parts: list[Tensor]) -> _Vector:
    flat: _Vector = torch.cat([part.reshape(-1).to("cpu", torch.float64) for part in parts]).numpy()
    return flat
