"""Factorisations trained the way the published experiments train them, as the other side of recovery_speed.py.

Written from the formulas. What decides the speed was taken over from how the authors' programs work (Razin, Maman and
Cohen, *Implicit Regularization in Tensor Factorization*, ICML 2021, and *Implicit Regularization in Hierarchical Tensor
Factorization and Deep Convolutional Neural Networks*, ICML 2022): what an observation looks like in memory, what is
multiplied with what, one update per batch of a loader, the loss read as a number after every update. Left out, to the
twins' advantage: callbacks, evaluation, logging and checkpoints.
"""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

Batch = tuple[Tensor, Tensor]


class GroupRMSprop:
    """One running mean of the squared norm of the whole gradient, parameter by parameter.

    s = a s + (1 - a) |g|^2;  step = lr / (sqrt(s / (1 - a^t)) + eps) * g
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float = 1e-2, alpha: float = 0.99, eps: float = 1e-6) -> None:
        self.parameters = list(parameters)
        self.lr, self.alpha, self.eps = lr, alpha, eps
        self.mean = torch.zeros((), dtype=self.parameters[0].dtype, device=self.parameters[0].device)
        self.steps = 0

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters."""
        self.steps += 1
        self.mean *= self.alpha
        for parameter in self.parameters:
            assert parameter.grad is not None
            self.mean += (1 - self.alpha) * parameter.grad.pow(2).sum()
        rate = self.lr / ((self.mean / (1 - self.alpha**self.steps)).sqrt() + self.eps)
        for parameter in self.parameters:
            assert parameter.grad is not None
            parameter -= rate * parameter.grad


class Slices:
    """Batches of tensors held in memory, each a slice; with an order, of copies permuted before every pass."""

    def __init__(self, inputs: Tensor, targets: Tensor, size: int, order: Callable[[int], Tensor] | None) -> None:
        self.inputs, self.targets, self.size, self.order = inputs, targets, size, order
        self.passes = 0

    def __iter__(self) -> Iterator[Batch]:
        inputs, targets = self.inputs, self.targets
        if self.order is not None:
            order = self.order(self.passes)
            inputs, targets = inputs[order], targets[order]
        self.passes += 1
        for start in range(0, len(targets), self.size):
            yield inputs[start : start + self.size], targets[start : start + self.size]


class Samples(Dataset[Batch]):
    """One observation at a time, for torch's loader to put together."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Batch:
        return self.inputs[index], self.targets[index]


class Twin(nn.Module, ABC):
    """A factorisation, its observations and its optimiser."""

    loader: Iterable[Batch]
    inputs: Tensor
    targets: Tensor
    optimizer: GroupRMSprop | torch.optim.Optimizer

    @abstractmethod
    def forward(self, inputs: Tensor) -> Tensor:
        """Predictions of a batch."""

    def update(self, inputs: Tensor, targets: Tensor) -> float:
        """One update, and the loss before it."""
        device = next(self.parameters()).device
        inputs, targets = inputs.to(device), targets.to(device)
        self.optimizer.zero_grad()
        loss = F.mse_loss(self(inputs), targets)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def losses(self, updates: int, every: int) -> list[float]:
        """Mean squared error over all observations after 0, every, 2 every, ... updates."""
        found: list[float] = []
        stream = (batch for _ in itertools.count() for batch in self.loader)
        for done in range(updates + 1):
            inputs, targets = next(stream)
            partial = len(targets) < len(self.targets)
            measured = done % every == 0
            if measured and (partial or done == updates):
                found.append(self.whole_loss(len(targets)))
            if done < updates:
                loss = self.update(inputs, targets)
                if measured and not partial:
                    found.append(loss)
        return found

    @torch.no_grad()
    def whole_loss(self, size: int) -> float:
        """Mean squared error over all observations, so many at a time."""
        device = next(self.parameters()).device
        parts = zip(self.inputs.split(size), self.targets.split(size), strict=True)
        return sum(float((self(x.to(device)) - y.to(device)).pow(2).sum()) for x, y in parts) / len(self.targets)

    def rate(self, seconds: float, clock: Callable[[], float] = time.perf_counter) -> tuple[float, int]:
        """Updates per second over whole passes that take at least so many seconds, and how many they were."""
        start, done = clock(), 0
        while True:
            for inputs, targets in self.loader:
                self.update(inputs, targets)
                done += 1
            if (taken := clock() - start) >= seconds:
                return done / taken, done


def one_hot(indices: Tensor, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Observed positions ``(M, N)`` as one-hot vectors ``(M, N, D)``."""
    found = torch.zeros(*indices.shape, max(sizes), dtype=dtype, device=indices.device)
    return found.scatter_(-1, indices.long()[..., None], 1.0)


def masks(indices: Tensor, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Observed positions ``(M, N)`` as one dense tensor each ``(M, *sizes)``: one there, zero elsewhere."""
    found = torch.zeros(len(indices), *sizes, dtype=dtype, device=indices.device)
    found[(torch.arange(len(indices), device=indices.device), *indices.long().T)] = 1.0
    return found


class MaskedMatrix(Twin):
    """Product of matrices; every observation is a dense mask, all put together anew by torch's loader in every pass."""

    def __init__(self, layers: Sequence[Tensor], indices: Tensor, values: Tensor) -> None:
        super().__init__()
        self.layers = nn.ParameterList(layer.clone() for layer in layers)
        sizes = (layers[0].shape[0], layers[-1].shape[1])
        # the observations stay in the memory of the processor, as there
        self.inputs, self.targets = masks(indices.cpu(), sizes, layers[0].dtype), values.cpu()
        self.loader = DataLoader(Samples(self.inputs, self.targets), batch_size=len(values), shuffle=False)
        self.optimizer = GroupRMSprop(self.parameters())

    def forward(self, inputs: Tensor) -> Tensor:
        """Predictions of a batch."""
        product: Tensor = self.layers[0]
        for layer in list(self.layers)[1:]:
            product = product @ layer
        return (inputs * product).sum((1, 2))


class MaskedCP(Twin):
    """The whole tensor of a CP factorisation by one einsum; every observation is a dense mask."""

    def __init__(self, factors: Sequence[Tensor], indices: Tensor, values: Tensor) -> None:
        super().__init__()
        self.factors = nn.ParameterList(factor.clone() for factor in factors)
        self.inputs = masks(indices, [len(factor) for factor in factors], factors[0].dtype)
        self.targets = values
        self.loader = Slices(self.inputs, values, len(values), None)
        self.optimizer = GroupRMSprop(self.parameters())

    def forward(self, inputs: Tensor) -> Tensor:
        """Predictions of a batch."""
        modes = "abcdefgh"[: len(self.factors)]
        tensor = torch.einsum(",".join(f"{mode}z" for mode in modes) + f"->{modes}", *self.factors)
        return (inputs * tensor).flatten(1).sum(1)


class OneHotCP(Twin):
    """CP: one-hot vectors times factors mode by mode for every observation, product over modes, sum of components."""

    def __init__(self, factors: Sequence[Tensor], indices: Tensor, values: Tensor) -> None:
        super().__init__()
        self.factors = nn.ParameterList(factor.clone() for factor in factors)
        self.inputs = one_hot(indices, [len(factor) for factor in factors], factors[0].dtype)
        self.targets = values
        self.loader = Slices(self.inputs, values, len(values), None)
        self.optimizer = GroupRMSprop(self.parameters())

    def forward(self, inputs: Tensor) -> Tensor:
        """Predictions of a batch."""
        stacked = torch.stack(list(self.factors))
        return torch.einsum("bnd,ndr->bnr", inputs, stacked).prod(1).sum(1)


class OneHotHierarchical(Twin):
    """HTF as a network: level by level, for every observation, a matrix per node and a product over neighbours.

    Args:
        levels: Weight matrices of the nodes of each level, leaves first; all of a level of one shape.
        output: Of the root ``(R, 1)``.
    """

    def __init__(self, levels: Sequence[Sequence[Tensor]], output: Tensor, indices: Tensor, values: Tensor) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.ParameterList(weight.clone() for weight in level) for level in levels)
        self.output = nn.Parameter(output.clone())
        self.inputs = one_hot(indices, [len(weight) for weight in levels[0]], output.dtype)
        self.targets = values
        self.loader = Slices(self.inputs, values, len(values), None)
        self.optimizer = GroupRMSprop(self.parameters())

    def forward(self, inputs: Tensor) -> Tensor:
        """Predictions of a batch."""
        stacked = [torch.stack([*level]) for level in self._levels()]
        for weights, window in zip(stacked, self._windows(), strict=True):
            inputs = torch.einsum("bnd,ndr->bnr", inputs, weights)
            # product over the last dimension, of the channels' windows
            inputs = inputs.permute(0, 2, 1).unflatten(2, (-1, window)).prod(-1).permute(0, 2, 1)
        return (inputs[:, 0] @ self.output)[:, 0]

    def _levels(self) -> list[nn.ParameterList]:
        return [level for level in self.levels if isinstance(level, nn.ParameterList)]

    def _windows(self) -> list[int]:
        nodes = [*map(len, self._levels()), 1]
        return [below // above for below, above in itertools.pairwise(nodes)]


class OneHotBinaryCP(Twin):
    """CP of high order with two entries per mode, in shuffled minibatches with Adam.

    Args:
        factors: ``(N, 2, R)``.
        batch_size: Observations per update.
        lr: Of Adam.
        order: Permutation of the observations in a pass.
    """

    def __init__(
        self,
        factors: Tensor,
        indices: Tensor,
        values: Tensor,
        batch_size: int,
        lr: float,
        order: Callable[[int], Tensor],
    ) -> None:
        super().__init__()
        self.factors = nn.Parameter(factors.clone())
        self.inputs, self.targets = one_hot(indices, (2,), factors.dtype), values
        self.loader = Slices(self.inputs, values, batch_size, order)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=lr)

    def forward(self, inputs: Tensor) -> Tensor:
        """Predictions of a batch."""
        return torch.einsum("bnd,ndr->bnr", inputs, self.factors).prod(1).sum(1)
