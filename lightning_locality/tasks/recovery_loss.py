"""Loss of a recovery problem and its gradient, and many small iterations of an optimiser on it at low cost."""

from __future__ import annotations

__all__: list[str] = []

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, final

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_locality.optim import GradientFlow
from lightning_locality.tensors.factorization import Entries, Factorization, Observations

LossName = Literal["mse", "half_sse", "l1", "huber"]
Route = Literal["auto", "tensor", "entries"]
_ALL = slice(None)
# entries of the largest tensor that is materialised
LARGEST_DENSE = 2**22
# a matrix product computes an entry of the whole tensor far more cheaply than a gather computes a single one
_DENSE_PER_OBSERVATION = 100
# break-even of elementwise passes over all entries with a scatter of the observed ones
_MASKED_PER_OBSERVATION = 32


@final
@dataclass(frozen=True)
class Loss:
    """Loss of the residuals r of all observations.

    ``mse``: mean of r^2; ``half_sse``: half of the sum of r^2; ``l1``: mean of abs(r); ``huber``: mean of r^2 / 2 for
    abs(r) below ``delta``, and of delta (abs(r) - delta / 2) above.
    """

    name: LossName = "mse"
    delta: float = 1.0

    def factor(self, samples: int) -> float:
        """Return the constant factor of :meth:`slope`."""
        return {"mse": 2.0 / samples, "half_sse": 1.0}.get(self.name, 1.0 / samples)

    def slope(self, residual: Tensor) -> Tensor:
        """Return the derivative of a term by its prediction, up to the factor."""
        if self.name == "l1":
            return residual.sign()
        return residual.clamp(-self.delta, self.delta) if self.name == "huber" else residual

    def terms(self, residual: Tensor) -> Tensor:
        """Return the terms whose sum (half_sse) or mean is the loss."""
        if self.name == "l1":
            return residual.abs()
        if self.name == "huber":
            size = residual.abs()
            return torch.where(size < self.delta, 0.5 * size * size, self.delta * (size - 0.5 * self.delta))
        return 0.5 * residual * residual if self.name == "half_sse" else residual * residual

    def total(self, residual: Tensor, clamp: float | None = None) -> Tensor:
        """Return the loss in float64, its terms bounded by ``clamp``."""
        terms = self.terms(residual.double())
        if clamp is not None:
            terms = terms.clamp(max=clamp)
        return terms.sum() if self.name == "half_sse" else terms.mean()


@final
class TrainingSet:
    """Observations prepared for a factorisation: checked, in its dtype, with positions in the flattened tensor."""

    def __init__(self, model: Factorization, observations: Observations) -> None:
        weight = next(model.parameters())
        self.model = model
        self.values = observations.values.to(weight)
        self.flat: Tensor | None = None
        if len(self.values) == 0:
            raise ValueError("there are no observations: a batch needs at least 1")
        if isinstance(observations, Entries):
            self.indices: Tensor | None = observations.indices.to(weight.device)
            _check_indices(self.indices, self.values, model.shape)
            if math.prod(model.shape) <= LARGEST_DENSE:
                self.flat = torch.zeros(len(self.values), dtype=torch.int64, device=weight.device)
                for size, index in zip(model.shape, self.indices.unbind(1), strict=True):
                    self.flat = self.flat * size + index.long()
        else:
            self.indices = None
            self.vectors = [vector.to(weight) for vector in observations.vectors]
            sizes = tuple(vector.shape[-1] for vector in self.vectors)
            if sizes != model.shape:
                raise ValueError(f"the sensing vectors have lengths {sizes}, but the model has shape {model.shape}")

    def __len__(self) -> int:
        return len(self.values)

    def predict(self, rows: Tensor | slice = _ALL) -> Tensor:
        """Predict some observations, or all, without the whole tensor."""
        if self.indices is not None:
            chosen = self.indices[rows] if isinstance(rows, slice) else self.indices.index_select(0, rows)
            return self.model.entries(chosen)
        return self.model.inner([vector[rows] for vector in self.vectors])

    @torch.no_grad()
    def residual(self, tensor: Tensor | None, chunk: int | None) -> Tensor:
        """Return prediction minus value of all observations, from the whole tensor if given."""
        if tensor is not None and self.flat is not None:
            return tensor.reshape(-1)[self.flat] - self.values
        size = chunk or len(self)
        parts = [self.predict(slice(start, start + size)) for start in range(0, len(self), size)]
        return torch.cat(parts) - self.values


def _check_indices(indices: Tensor, values: Tensor, shape: tuple[int, ...]) -> None:
    if indices.shape != (len(values), len(shape)):
        raise ValueError(
            f"the observed indices have shape {tuple(indices.shape)}, but {len(values)} values of a tensor of shape "
            f"{shape} need ({len(values)}, {len(shape)}): does the model have the shape of the data?"
        )
    low, high = indices.amin(0).tolist(), indices.amax(0).tolist()
    if min(low) < 0 or any(top >= size for top, size in zip(high, shape, strict=True)):
        raise ValueError(f"observed indices reach from {low} to {high}, outside of a tensor of shape {shape}")


@final
class Objective:
    """Training loss and its gradient with respect to the weights.

    The derivative by the predictions is explicit, so that automatic differentiation starts at the tensor. The cheapest
    of three routes is taken: all entries with a mask, the whole tensor with a scatter of the observed entries, or the
    observations alone (see the arguments of :class:`~lightning_locality.tasks.recovery.Recovery`).
    """

    def __init__(self, observed: TrainingSet, loss: Loss, route: Route, batch_size: int | None, seed: int) -> None:
        model = observed.model
        self.observed, self.loss, self.model = observed, loss, model
        self.batch_size, self.seed = batch_size, seed
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        entries = math.prod(model.shape)
        if route == "tensor" and (observed.flat is None or batch_size is not None):
            raise ValueError(
                f"route='tensor' takes observed entries of at most {LARGEST_DENSE} in all and no batch_size: use "
                "route='entries' or 'auto'"
            )
        cheap = batch_size is None and entries <= _DENSE_PER_OBSERVATION * len(observed)
        self._mask: Tensor | None = None
        self._slope: Tensor | None = None
        if observed.flat is not None and route != "entries" and (route == "tensor" or cheap):
            factor = loss.factor(len(observed))
            zeros = torch.zeros(entries, dtype=observed.values.dtype, device=observed.values.device)
            self._repeated = len(torch.unique(observed.flat)) < len(observed)
            if not self._repeated and entries <= _MASKED_PER_OBSERVATION * len(observed):
                self._mask = zeros.clone().index_fill_(0, observed.flat, factor).view(model.shape)
                self._target = zeros.clone().index_copy_(0, observed.flat, observed.values).view(model.shape)
            else:
                self._slope = zeros
        self._order: tuple[int, Tensor] = (-1, torch.zeros(0))

    def evaluate(self, iteration: int, with_value: bool = False) -> tuple[Sequence[Tensor], Tensor | None]:
        """Return the gradient by the weights, on the observations of an iteration, and the loss if requested."""
        if self._mask is not None:
            value = None
            tensor, pullback = self.model.with_pullback()
            residual = tensor - self._target
            slope = self.loss.slope(residual) * self._mask
            if with_value:
                scale = 1.0 if self.loss.name == "half_sse" else 1.0 / len(self.observed)
                value = self.loss.terms(residual).mul_(self._mask != 0).sum() * scale
            return pullback(slope), value
        if self._slope is not None:
            flat = self.observed.flat
            assert flat is not None
            tensor, pullback = self.model.with_pullback()
            residual = tensor.reshape(-1)[flat] - self.observed.values
            slope = self.loss.slope(residual) * self.loss.factor(len(residual))
            if self._repeated:
                self._slope.zero_().index_add_(0, flat, slope)
            else:
                self._slope.index_copy_(0, flat, slope)
            return pullback(self._slope.view(tensor.shape)), self.loss.total(residual) if with_value else None
        rows = self._rows(iteration)
        prediction = self.observed.predict(rows)
        residual = prediction.detach() - (self.observed.values if rows is _ALL else self.observed.values[rows])
        slope = self.loss.slope(residual) * self.loss.factor(len(residual))
        value = self.loss.total(residual) if with_value else None
        return torch.autograd.grad(prediction, self.weights, slope), value

    def _rows(self, iteration: int) -> Tensor | slice:
        """Return the observations of an iteration, a function of its number alone."""
        if self.batch_size is None or self.batch_size >= len(self.observed):
            return _ALL
        batches = -(-len(self.observed) // self.batch_size)
        number, place = divmod(iteration, batches)
        if self._order[0] != number:
            generator = torch.Generator().manual_seed((int(self.seed) * 1_000_003 + number) % 2**63)
            order = torch.randperm(len(self.observed), generator=generator)
            self._order = (number, order.to(self.observed.values.device))
        return self._order[1][place * int(self.batch_size) : (place + 1) * int(self.batch_size)]


Graph = Literal["auto", "never"]
_WITH_CLOSURE = (GradientFlow, LBFGS)


@final
class InnerLoop:
    """Iterations of gradient and step, and nothing else.

    On CUDA, ``unroll`` iterations are recorded once as a CUDA graph and replayed: one launch for all of them instead of
    some hundred for each. If the optimiser cannot be recorded, iterations run one by one.
    """

    def __init__(self, objective: Objective, optimizer: Optimizer, graph: Graph, unroll: int) -> None:
        self.objective, self.optimizer, self.unroll = objective, optimizer, unroll
        cuda = all(weight.device.type == "cuda" for weight in objective.weights)
        repeats = objective.batch_size is None and not isinstance(optimizer, _WITH_CLOSURE)
        self.graphed = graph == "auto" and cuda and repeats
        self._graph: Any = None

    def run(self, iteration: int, count: int) -> None:
        """Run ``count`` iterations from the given one."""
        end = iteration + count
        if self.graphed and count >= self.unroll:
            if self._graph is None:
                self._record(iteration)
                iteration += 1
            while self._graph is not None and iteration + self.unroll <= end:
                self._graph.replay()
                iteration += self.unroll
        self._one_by_one(iteration, end)

    def _one_by_one(self, start: int, end: int) -> None:
        with_closure = isinstance(self.optimizer, _WITH_CLOSURE)
        for iteration in range(start, end):
            if with_closure:
                self.optimizer.step(partial(self._backward, iteration, with_value=True))
            else:
                self._backward(iteration)
                self.optimizer.step()

    def _backward(self, iteration: int, with_value: bool = False) -> Any:
        gradients, value = self.objective.evaluate(iteration, with_value)
        for weight, gradient in zip(self.objective.weights, gradients, strict=True):
            weight.grad = gradient
        return value

    def _record(self, iteration: int) -> None:
        """Run one iteration, which sets up state (of the optimiser, of cuBLAS) that recording needs, and record."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._one_by_one(iteration, iteration + 1)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._one_by_one(iteration + 1, iteration + 1 + self.unroll)
            self._graph = graph
        except RuntimeError as error:
            self.graphed = False
            rank_zero_info(
                f"iterations run one by one: {type(self.optimizer).__name__} cannot be recorded as a CUDA graph "
                f"({str(error).splitlines()[0]}); torch's own optimisers can be with capturable=True"
            )
