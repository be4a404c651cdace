"""Optimisers that follow gradient flow: normalised gradient descent, and integration with error control."""

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

from lightning_locality.arguments import Checked

_State = dict[str, Any]
_Vector = NDArray[np.float64]
_SOLVERS: dict[str, Any] = {"RK23": RK23, "RK45": RK45, "DOP853": DOP853, "Radau": Radau}
_MAX_IMPLICIT_WEIGHTS = 2000
_MIN_RTOL = 100 * float(np.finfo(np.float64).eps)
_MIN_RTOL_SINGLE = 1e-6


class _OneGroupOptimizer(Checked, Optimizer):
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Accept a single group."""
        if self.param_groups:
            raise ValueError("params must be one group, got several: all weights share one step size")
        super().add_param_group(param_group)


class GroupRMSprop(_OneGroupOptimizer):
    r"""RMSprop with a single running mean for all weights, so that a step keeps the direction of the gradient.

    .. math:: s_t = \alpha s_{t-1} + (1 - \alpha) \lVert g_t \rVert^2, \qquad
        \theta_t = \theta_{t-1} - \frac{\mathrm{lr}}{\sqrt{s_t / (1 - \alpha^t)} + \varepsilon}\, g_t

    where g is the gradient of all weights together and :math:`s_0 = 0`: gradient descent on another time scale.
    From the authors' code of *Implicit Regularization in Hierarchical Tensor Factorization and Deep Convolutional
    Neural Networks* (Razin, Maman, Cohen, 2022), with its defaults. On CUDA steps wait for nothing and can be captured.

    Args:
        params: The weights, in one group.
        lr: Length of a step while the norm of the gradient does not change.
        alpha: Share of the running mean that is kept, at least 0 and below 1.
        eps: Number added to the root.
        weight_decay: Multiple of the weights that is first added to the gradient.

    Raises:
        ValueError: Several groups, or a number out of range.

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
            raise ValueError(f"alpha must be at least 0 and below 1, got {alpha}")
        for name, value in (("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name} must be 0 or more, got {value}")
        super().__init__(params, {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; ``closure`` computes the gradient first, and its loss is returned."""
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
        take = _step_on_cpu if weights[0].device.type == "cpu" else _step_on_device
        # the state of all weights is kept with the first
        take(weights, gradients, self.state[group["params"][0]], group)
        return loss


def _step_on_cpu(weights: list[Tensor], gradients: list[Tensor], state: _State, group: _State) -> None:
    """Compute the step length in Python floats, which cost less than tensors of one element."""
    alpha = group["alpha"]
    square = sum(float(torch.linalg.vector_norm(gradient)) ** 2 for gradient in gradients)
    step = int(state.get("step", 0)) + 1
    mean = alpha * float(state.get("mean_square", 0.0)) + (1 - alpha) * square
    state["step"], state["mean_square"] = step, mean
    # without eps a gradient of exactly zero would divide 0 by 0
    length = group["lr"] / (math.sqrt(mean / (1 - alpha**step)) + group["eps"] or math.inf)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.add_(gradient, alpha=-length)


def _step_on_device(weights: list[Tensor], gradients: list[Tensor], state: _State, group: _State) -> None:
    """Compute the step length in tensors of one element, which the host never reads."""
    alpha, first = group["alpha"], weights[0]
    # on loading, torch converts the state to the type of the weight, all but "step"
    for name, dtype in (("step", torch.float64), ("mean_square", first.dtype)):
        value = state.get(name, 0.0)
        if not isinstance(value, Tensor) or value.device != first.device:
            state[name] = torch.as_tensor(value, dtype=dtype).to(first.device)
    square = torch.stack(torch._foreach_norm(gradients)).square().sum()
    step, mean = state["step"].add_(1), state["mean_square"].mul_(alpha).add_(square, alpha=1 - alpha)
    root = (mean / (1 - alpha**step)).sqrt_().add_(group["eps"])
    length = torch.where(root > 0, group["lr"] / root, 0.0).to(first.dtype)
    torch._foreach_sub_(weights, torch._foreach_mul(gradients, length))


class IntegrationError(ValueError):
    """The flow cannot be integrated further within its tolerance."""


class GradientFlow(_OneGroupOptimizer):
    r"""Gradient flow by an ODE solver of SciPy, which keeps its error below a tolerance and chooses its own steps.

    .. math:: \frac{d\theta}{dt} = -\nabla L(\theta)

    A step is one accepted step of the solver, of the length that the tolerance allows: long on plateaus, where gradient
    descent needs thousands. Weights are integrated in float64, whatever their type. Checkpoints continue exactly.

    Args:
        params: The weights, in one group.
        method: Runge-Kutta pair of order 3(2), 5(4) or 8(5, 3), or the implicit ``"Radau"`` of order 5 for stiff flows,
            where the others need the short steps of gradient descent, and few weights (one gradient each per step).
        rtol: Error allowed per step, relative to each weight.
        atol: Absolute error allowed per step, well below the smallest weights that matter.
        max_step: Longest step.
        end_time: Time at which the flow stops; from then on :attr:`finished` is true and steps do nothing.

    Raises:
        ValueError: Several groups, a number out of range, rtol too small for float32, or too many weights for Radau.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        >>> flow = GradientFlow([weight], end_time=2.0)
        >>> def closure():
        ...     weight.grad = weight.detach().clone()  # of the loss weight^2 / 2
        >>> while not flow.finished:
        ...     flow.step(closure)
        >>> abs(weight.item() - math.exp(-2)) < 1e-8
        True
    """

    def __init__(
        self,
        params: ParamsT,
        method: Literal["RK23", "RK45", "DOP853", "Radau"] = "DOP853",
        rtol: float = 1e-8,
        atol: float = 1e-10,
        max_step: float = math.inf,
        end_time: float = math.inf,
    ) -> None:
        numbers = {"rtol": rtol, "atol": atol, "max_step": max_step, "end_time": end_time}
        for name, value in numbers.items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if rtol < _MIN_RTOL:
            raise ValueError(f"rtol must be at least {_MIN_RTOL:.1e}, the precision of float64, got {rtol}")
        progress = {"time": 0.0, "step_size": None, "evaluations": 0, "position": None}
        super().__init__(params, {"method": method, **numbers, **progress})
        weights: list[Tensor] = self.param_groups[0]["params"]
        if rtol < _MIN_RTOL_SINGLE and any(weight.dtype != torch.float64 for weight in weights):
            remedy = f"give the model dtype=torch.float64, or set rtol to {_MIN_RTOL_SINGLE:g} or more"
            raise ValueError(f"rtol={rtol:g} is below the rounding of {weights[0].dtype} gradients: {remedy}")
        count = sum(weight.numel() for weight in weights)
        if method == "Radau" and count > _MAX_IMPLICIT_WEIGHTS:
            most = f"at most {_MAX_IMPLICIT_WEIGHTS} weights, as it solves for a matrix of their size"
            raise ValueError(f"method='Radau' takes {most}, got {count}: use 'DOP853'")
        self._solver: OdeSolver | None = None
        self._resumed = False
        self._closure: Callable[[], Any] = lambda: None
        # of the last gradient, which is that at the end of the last step
        self._loss: Any = None
        self._slope: _Vector = np.zeros(0)

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
        """Whether ``end_time`` has been reached."""
        return self.time >= float(self.param_groups[0]["end_time"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        super().load_state_dict(state_dict)
        self._solver = None
        self._resumed = self.param_groups[0]["step_size"] is not None and self.param_groups[0]["method"] != "Radau"

    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        """Take one accepted step of the solver; ``closure`` computes loss and gradients; return the loss before it.

        Raises:
            IntegrationError: No step is short enough for the tolerance, or the gradient is not finite.
        """
        if self.finished:
            return None
        self._closure = closure
        group = self.param_groups[0]
        # a trial step that overflows is rejected by the solver, which then tries a shorter one
        with np.errstate(all="ignore"):
            solver = self._ready()
            before, start = self._loss, solver.t
            if not np.isfinite(self._slope).all():
                raise IntegrationError(f"the gradient is not finite at time {start:g}: start from smaller weights")
            try:
                message = solver.step()
            except ValueError as error:  # raised by SciPy if a Jacobian is not finite
                message = str(error)
        if solver.status == "failed" or solver.t == start:
            self._write(solver.y)
            tolerance = f"rtol={group['rtol']:g} and atol={group['atol']:g} ({message})"
            remedy = "loosen them, use method='Radau' for a stiff flow, or end earlier (end_time)"
            raise IntegrationError(f"the flow cannot continue at time {start:g}: no step meets {tolerance}; {remedy}")
        exact = all(weight.dtype == torch.float64 for weight in group["params"])
        position = None if exact else torch.from_numpy(solver.y.copy())
        group.update(time=float(solver.t), step_size=float(solver.h_abs), position=position)
        if group["method"] == "Radau":
            # its last gradient is not that at the end, and its internal state is not in a checkpoint
            self._solver = None
            self._write(solver.y)
        return before

    def _ready(self) -> OdeSolver:
        """The solver, created anew at the start, after a checkpoint, or if the weights were changed."""
        group = self.param_groups[0]
        now = _flat([weight.detach() for weight in group["params"]])
        solver = self._solver
        if solver is not None and np.array_equal(now, self._rounded(solver.y)):
            return solver
        position = group["position"]
        if position is not None and np.array_equal(now, self._rounded(position.numpy())):
            now = position.numpy().copy()
        time, end, first = group["time"], float(group["end_time"]), group["step_size"]
        settings = {name: group[name] for name in ("max_step", "rtol", "atol")}
        if first is not None:
            settings["first_step"] = min(first, end - time)
        evaluations = group["evaluations"]
        self._solver = solver = _SOLVERS[group["method"]](self._velocity, time, now, end, **settings)
        if first is not None:
            solver.h_abs = first
        if self._resumed:
            # the gradient that the solver has just recomputed was counted before the checkpoint
            group["evaluations"], self._resumed = evaluations, False
        # the last gradient may have been that of a trial step for the length of the first
        if first is None or group["method"] == "Radau":
            self._velocity(time, now)
        return solver

    def _velocity(self, time: float, position: _Vector) -> _Vector:
        self._write(position)
        with torch.enable_grad():
            self._loss = self._closure()
        group = self.param_groups[0]
        group["evaluations"] += 1
        self._slope = _flat([torch.zeros_like(w) if w.grad is None else w.grad.detach() for w in group["params"]])
        return -self._slope

    def _parts(self, position: _Vector) -> list[tuple[Tensor, Tensor]]:
        """Every weight with its part of a position."""
        weights: list[Tensor] = self.param_groups[0]["params"]
        parts = torch.split(torch.from_numpy(position), [weight.numel() for weight in weights])
        return list(zip(weights, parts, strict=True))

    @torch.no_grad()
    def _write(self, position: _Vector) -> None:
        for weight, part in self._parts(position):
            weight.copy_(part.view_as(weight))

    def _rounded(self, position: _Vector) -> _Vector:
        """A position in the precision of the weights."""
        return _flat([part.to(weight.dtype) for weight, part in self._parts(position)])


def _flat(parts: list[Tensor]) -> _Vector:
    flat: _Vector = torch.cat([part.reshape(-1).to("cpu", torch.float64) for part in parts]).numpy()
    return flat
