"""The interface of all factorisations, and the problems that they are trained on."""

from __future__ import annotations

__all__ = ["Entries", "Factorization", "Observations", "RankOneMeasurements", "RecoveryBatch"]

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_locality.arguments import Checked, checked
from lightning_locality.tensors.chain import Chain


class Entries(NamedTuple):
    """Entries of a tensor (completion): ``values`` ``(M,)`` at ``indices`` ``(M, N)`` of any integer type."""

    indices: Tensor
    values: Tensor


class RankOneMeasurements(NamedTuple):
    r"""Inner products ``(M,)`` with :math:`\bigotimes_n x^n` (sensing), of ``vectors`` ``(M, D_n)``, one per mode."""

    vectors: tuple[Tensor, ...]
    values: Tensor


Observations = Entries | RankOneMeasurements


class RecoveryBatch(NamedTuple):
    """A whole recovery problem: observations to fit, others to predict, and the tensor if known and stored."""

    train: Observations
    test: Observations | None
    target: Tensor | None


InitLaw = Literal["normal", "balanced"]
InitOf = Literal["weights", "product"]
Pullback = Callable[[Tensor], Sequence[Tensor]]

# from this order on, products over the modes are rescaled after every mode
LARGE_ORDER = 16


class Factorization(Checked, nn.Module, ABC):
    r"""A tensor of order N given by the weights of a factorisation, for training by gradient descent.

    The tensor W ("end tensor") is a homogeneous polynomial of the weights. A subclass creates its weights in float64,
    sets :attr:`degree`, and calls :meth:`_initialize`. With 16 modes or more, intermediate results of entries and inner
    products neither overflow nor underflow.

    Args:
        shape: Sizes of the modes D_1..D_N.
        init: Law of the weights: ``"normal"``, or ``"balanced"``: the same, moved to a balanced point of its tensor.
        init_scale: Standard deviation of the weights, or root mean square of the entries of the tensor.
        init_of: Which of the two ``init_scale`` is: ``"weights"`` or ``"product"``.
        init_mean: Mean of the weights.
        seed: Seed of the weights, which are the same for all types and devices.
        dtype: Type of the weights; None for torch's default.
        device: Their device; None for torch's default.

    Raises:
        ValueError: Sizes, ranks, depths or scale out of range.
    """

    # number of weights multiplied in each term: scaling all weights by c scales the tensor by c^degree
    degree: int

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        if len(shape) == 0:
            raise ValueError("shape must hold the size of at least one mode, got none")
        self.shape = per_mode("shape", shape, len(shape))

    @property
    def order(self) -> int:
        """Number of modes N."""
        return len(self.shape)

    @abstractmethod
    def to_tensor(self) -> Tensor:
        """The tensor, of shape :attr:`shape`."""

    def with_pullback(self) -> tuple[Tensor, Pullback]:
        """Return the detached tensor, and a function from a gradient by the tensor to the gradients by the weights.

        Call the function at most once, before the weights change.
        """
        tensor = self.to_tensor()
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        return tensor.detach(), lambda gradient: torch.autograd.grad(tensor, weights, gradient)

    @abstractmethod
    def entries(self, indices: Tensor) -> Tensor:
        """Entries ``(B,)`` at indices ``(B, N)`` of any integer type."""

    @abstractmethod
    def inner(self, vectors: Sequence[Tensor] | Tensor) -> Tensor:
        r"""Inner products ``(B,)`` of W with :math:`\bigotimes_n x^n`, each x ``(B, D_n)``, or all ``(B, N, D)``."""

    @abstractmethod
    def log_norm(self) -> Tensor:
        """Natural logarithm of the Frobenius norm, without forming the tensor and without underflow; -inf for zero."""

    @abstractmethod
    def balance_(self) -> None:
        """Move to the balanced point of the same tensor: conserved quantities zero, weights of least norm."""

    @abstractmethod
    def unbalancedness(self) -> Tensor:
        """Largest absolute value of the quantities that gradient flow conserves; 0 at a balanced point."""

    @abstractmethod
    def magnitudes(self) -> dict[str, Tensor]:
        """Quantities that grow one at a time (singular values, component norms): name -> ``(R,)``, descending."""

    @abstractmethod
    def cuts(self) -> tuple[tuple[int, ...], ...]:
        """Groups of modes whose matricisations have ranks bounded by the format; one of a group and its complement."""

    def norm(self) -> Tensor:
        """Frobenius norm of the tensor, without forming the tensor."""
        return self.log_norm().exp()

    def scalars(self) -> dict[str, Tensor]:
        """Numbers to log in addition to the magnitudes: name -> scalar."""
        return {"unbalancedness": self.unbalancedness()}

    @torch.no_grad()
    @checked
    def rescale_(self, factor: float) -> None:
        """Multiply the tensor by a finite factor other than zero, spread evenly over all weights."""
        if factor == 0:
            raise ValueError(f"factor must be finite and not zero, got {factor}")
        self._scale_weights(math.log(abs(factor)))
        if factor < 0:
            self._first_weight().neg_()

    @torch.no_grad()
    @checked
    def normalize_(self, norm: float = 1.0) -> None:
        """Multiply all weights by one number so that the tensor, which must not be zero, has this Frobenius norm."""
        if norm <= 0:
            raise ValueError(f"norm must be positive and finite, got {norm}")
        now = float(self.log_norm())
        if not math.isfinite(now):
            raise ValueError(f"the tensor has norm {math.exp(now)} and cannot be scaled to {norm}")
        self._scale_weights(math.log(norm) - now)

    def _scale_weights(self, log_factor: float) -> None:
        for weight in self.parameters():
            weight.mul_(math.exp(log_factor / self.degree))

    def _first_weight(self) -> Tensor:
        """A weight that every term of the tensor contains once."""
        return next(self.parameters())

    def _chains(self) -> list[Chain]:
        """The chains of the model, in the order of its parameters."""
        return [module for module in self.modules() if isinstance(module, Chain)]

    @torch.no_grad()
    def _initialize(
        self, init: str, init_scale: float, init_of: InitOf, init_mean: float, seed: int, dtype: Any, device: Any
    ) -> None:
        """Set the weights on the CPU in float64, the same for any type and device that they are then converted to."""
        if not 0 < init_scale < math.inf:
            raise ValueError(f"init_scale must be positive and finite, got {init_scale}: at zero no gradient flows")
        self._set_weights(init, init_scale, init_of, init_mean, seed)
        try:
            self.to(dtype=dtype or torch.get_default_dtype(), device=device or torch.get_default_device())
        except (AssertionError, RuntimeError, TypeError) as error:
            raise ValueError(f"weights cannot have {dtype=} and {device=}: {error}") from error

    def _set_weights(self, init: str, init_scale: float, init_of: InitOf, init_mean: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(int(seed))
        self._sample(generator, init_mean, init_scale if init_of == "weights" else 1.0)
        if init == "balanced":
            self.balance_()
        if init_of == "product":
            # log of the root mean square of the entries, whose number may exceed the range of a float
            log_rms = float(self.log_norm()) - 0.5 * sum(map(math.log, self.shape))
            self._scale_weights(math.log(init_scale) - log_rms)

    def _sample(self, generator: torch.Generator, mean: float, deviation: float) -> None:
        for weight in self.parameters():
            sample = torch.randn(weight.shape, generator=generator, dtype=torch.float64, device="cpu")
            weight.copy_(mean + deviation * sample)

    def _check_indices(self, indices: Tensor) -> None:
        if indices.ndim != 2 or indices.shape[1] != self.order:
            raise ValueError(f"indices must be (B, {self.order}), one column per mode, got {tuple(indices.shape)}")

    def _split_vectors(self, vectors: Sequence[Tensor] | Tensor) -> tuple[Tensor, ...]:
        split = vectors.unbind(1) if isinstance(vectors, Tensor) else tuple(vectors)
        sizes = tuple(vector.shape[-1] for vector in split)
        if sizes != self.shape:
            raise ValueError(f"vectors must be one (B, D_n) per mode with D_n of {self.shape}, got sizes {sizes}")
        return split

    def _multiply_over_modes(
        self, terms: Iterator[Tensor], multiply: Callable[[Tensor, Tensor], Tensor], axes: tuple[int, ...]
    ) -> Tensor:
        """Multiply one term per mode; from :data:`LARGE_ORDER` on, rescale along the axes after every mode."""
        if self.order < LARGE_ORDER:
            return reduce(multiply, terms)
        product, scale = divided(next(terms), axes)
        log_scale = scale.log()
        for term in terms:
            product, scale = divided(multiply(product, term), axes)
            log_scale = log_scale + scale.log()
        return product * log_scale.exp()


def per_mode(name: str, value: int | Sequence[int], count: int) -> tuple[int, ...]:
    """Expand one number to ``count`` places, or check that there is one for each; ``name`` is for the error."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * count
    if len(values) != count or not all(isinstance(v, int) and v >= 1 for v in values):
        raise ValueError(f"{name} must be one whole number of at least 1, or {count} of them, got {value}")
    return values


def divided(values: Tensor, axes: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """Divide values by their largest absolute value along the axes, all if None; return it too, 1 where all are zero.

    The divisor is a constant to autograd, so multiplying by it again gives the derivatives of the values.
    """
    largest = values.detach().abs()
    if axes is None:
        largest = largest.max()
    elif axes:
        largest = largest.amax(axes, keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    return values / largest, largest
