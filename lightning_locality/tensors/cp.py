"""CP factorisation: a sum of rank-one tensors."""

from __future__ import annotations

__all__ = ["CP"]

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_locality.tensors.chain import Chain
from lightning_locality.tensors.factorization import LARGE_ORDER, Factorization, InitLaw, InitOf, Pullback, per_mode
from lightning_locality.tensors.mode_tree import MAX_ORDER


def binary_products(bits: Tensor, weights: Tensor) -> Tensor:
    r"""Multiply one of two weights per mode, for every sample and component.

    .. math:: P_{br} = \prod_n w_{n,\, x_{bn},\, r} = (-1)^{s_{br}}\, [z_{br} = 0]\;
        e^{\sum_n \log|w_{n0r}| + \sum_n x_{bn} \log|w_{n1r} / w_{n0r}|}

    with s the number of negative weights and z that of zeros met, matrix products with x as well. Products and
    derivatives overflow or underflow only if their values do; relative errors are some units in the last place times
    :math:`\max(1, |\log P|)`. Bits are ``(B, N)`` of any type; the result ``(B, R)`` is once differentiable in the
    weights ``(N, 2, R)``.
    """
    return cast(Tensor, _BinaryProducts.apply(bits, weights))


class _BinaryProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bits: Tensor, weights: Tensor) -> Tensor:
        zero = weights == 0
        # on a GPU the test would cost more than the work: the host would wait for the device
        on_host = not weights.is_cuda
        has_zero, has_negative = torch.stack([zero.any(), (weights < 0).any()]).tolist() if on_host else (True, True)
        logs = weights.masked_fill(zero, 1.0).abs().log() if has_zero else weights.abs().log()
        counted = [logs[:, 1] - logs[:, 0]]
        if has_negative:
            negative = (weights < 0).to(weights.dtype)
            counted.append(negative[:, 1] - negative[:, 0])
        if has_zero:
            counted.append(zero[:, 1].to(weights.dtype) - zero[:, 0].to(weights.dtype))
        # a single pass over the bits for all of them
        counts = torch.cat(counted, 1)
        sums = torch.cat([block.to(counts) @ counts for block in _blocks(bits)]).chunk(len(counted), 1)
        # the part common to all samples may be large and cancel: sum in double precision
        log_products = (logs[:, 0].sum(0, dtype=torch.float64) + sums[0]).to(weights.dtype)
        sign = torch.ones_like(log_products)
        if has_negative:
            sign = 1.0 - 2.0 * (negative[:, 0].sum(0) + sums[1]).remainder(2.0)
        zeros = zero[:, 0].sum(0) + sums[-1] if has_zero else None
        ctx.save_for_backward(bits, weights, logs, log_products, sign, zeros)
        products = sign * log_products.exp()
        return products if zeros is None else torch.where(zeros == 0, products, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        bits, weights, logs, log_products, sign, zeros = ctx.saved_tensors
        # relative to the largest product: P / w may be representable where P is not
        largest = log_products.amax(0)
        share = gradient * sign * (log_products - largest).exp()
        factor = (1.0 - 2.0 * (weights < 0).to(weights.dtype)) * (largest - logs).exp()
        if zeros is None:
            return None, _sums_by_bit(bits, share) * factor
        # the derivative at a zero weight sums over the samples that meet no other zero
        met = torch.cat([torch.where(zeros == count, share, 0.0) for count in (0, 1)], 1)
        without, with_one = _sums_by_bit(bits, met).chunk(2, 2)
        return None, torch.where(weights == 0, with_one, without) * factor


def _blocks(values: Tensor) -> tuple[Tensor, ...]:
    """Split samples into blocks whose intermediate results fit the processor's cache; on a GPU keep all together."""
    return (values,) if values.is_cuda else torch.split(values, 256)


def _sums_by_bit(bits: Tensor, values: Tensor) -> Tensor:
    """Sum values ``(B, R)`` over the samples with bit 0 and with bit 1 of every mode: ``(N, 2, R)``."""
    sums = values.new_zeros(2, values.shape[1], bits.shape[1])
    for block, part in zip(_blocks(bits), _blocks(values), strict=True):
        ones = block.to(values)
        # not the total minus the sum over the ones, which would leave rounding errors
        sums[0].addmm_(part.T, 1.0 - ones)
        sums[1].addmm_(part.T, ones)
    return sums.permute(2, 0, 1)


@final
class CP(Factorization):
    r"""A sum of R rank-one tensors, called "tensor factorisation" in the papers.

    .. math:: \mathcal W = \sum_{r=1}^R \bigotimes_{n=1}^N v_r^n

    Components that start near zero grow one after the other, at a balanced point by
    :math:`\dot\sigma_r = N \sigma_r^{2 - 2/N} \langle -\nabla L(\mathcal W), \bigotimes_n v_r^n / \|v_r^n\| \rangle`
    (*Implicit Regularization in Tensor Factorization*, Razin, Maman, Cohen, 2021). Gradient flow conserves the
    differences of the squared norms of the vectors of a component.

    In deep CP every vector is a :class:`Chain`. Weights of modes of equal size and depth share one parameter
    ``(modes, D, R)``. Further arguments, and errors, are those of :class:`Factorization`.

    Args:
        shape: Sizes of the modes, or one size for all.
        rank: Number of components R; None for the product of all sizes but the largest, enough for any tensor.
        depth: Factors of every vector: one number, or one per mode.
        order: Number of modes if ``shape`` is one size.

    Example:
        >>> CP((2, 3, 4)).rank, CP(2, rank=5, order=8).to_tensor().ndim
        (6, 8)
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        rank: int | None = None,
        depth: int | Sequence[int] = 1,
        init: InitLaw = "normal",
        init_scale: float = 1e-2,
        init_of: InitOf = "weights",
        init_mean: float = 0.0,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        order: int | None = None,
    ) -> None:
        if isinstance(shape, int):
            if order is None or not 1 <= order <= MAX_ORDER:
                many = f"order=, 1 to {MAX_ORDER:,}"
                raise ValueError(f"shape={shape} is one size for all modes: say how many with {many}, got {order=}")
            shape = [shape] * order
        elif order is not None and order != len(shape):
            raise ValueError(f"order={order} and shape={tuple(shape)} differ: omit order if shape is a list")
        super().__init__(shape)
        rank = math.prod(self.shape) // max(self.shape) if rank is None else rank
        (self.rank,) = per_mode("rank", rank, 1)
        self.depth = per_mode("depth", depth, self.order)
        self.degree = sum(self.depth)
        kinds = list(zip(self.shape, self.depth, strict=True))
        self._modes = {kind: [mode for mode, k in enumerate(kinds) if k == kind] for kind in dict.fromkeys(kinds)}
        self.groups = nn.ModuleList(
            Chain((len(modes), size, self.rank), depth) for (size, depth), modes in self._modes.items()
        )
        places = range(1, max(self.order, 2))
        self._split = min(places, key=lambda k: math.prod(self.shape[:k]) + math.prod(self.shape[k:]))
        self._initialize(init, init_scale, init_of, init_mean, seed, dtype, device)

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The vectors as columns, ``(D_n, R)`` per mode."""
        factors: dict[int, Tensor] = {}
        for modes, group in zip(self._modes.values(), self.groups, strict=True):
            factors.update(zip(modes, group().unbind(0), strict=True))
        return tuple(factors[mode] for mode in range(self.order))

    def to_tensor(self) -> Tensor:
        """The tensor, by one matrix product of the rank-one tensors of two halves of the modes."""
        factors = self.factors
        if self.order == 1:
            return factors[0].sum(1)
        left, right = _partial_products(factors[: self._split]), _partial_products(factors[self._split :])
        return (left[0] @ right[0].T).reshape(self.shape)

    def with_pullback(self) -> tuple[Tensor, Pullback]:
        """By the explicit derivative if there are no chains: two matrix products, then products of halves."""
        if self.order == 1 or self.degree > self.order or not all(w.requires_grad for w in self.parameters()):
            return super().with_pullback()
        factors = [factor.detach() for factor in self.factors]
        left, right = _partial_products(factors[: self._split]), _partial_products(factors[self._split :])

        def pullback(gradient: Tensor) -> list[Tensor]:
            matrix = gradient.reshape(len(left[0]), len(right[0]))
            slopes = [*_slopes(left, matrix @ right[0]), *_slopes(right, matrix.T @ left[0])]
            return [torch.stack([slopes[mode] for mode in modes]) for modes in self._modes.values()]

        return (left[0] @ right[0].T).reshape(self.shape), pullback

    def entries(self, indices: Tensor) -> Tensor:
        """Entries ``(B,)`` at ``(B, N)``, by products over the modes."""
        self._check_indices(indices)
        if self.order >= LARGE_ORDER and len(self.groups) == 1 and self.shape[0] == 2:
            return binary_products(indices, self.groups[0]()).sum(1)
        columns = indices.long().unbind(1)
        terms = (nn.functional.embedding(index, factor) for index, factor in zip(columns, self.factors, strict=True))
        return self._multiply_over_modes(terms, torch.mul, ()).sum(1)

    def inner(self, vectors: Sequence[Tensor] | Tensor) -> Tensor:
        """Inner products ``(B,)``, by products over the modes of the components' inner products."""
        terms = (x @ factor for x, factor in zip(self._split_vectors(vectors), self.factors, strict=True))
        return self._multiply_over_modes(terms, torch.mul, ()).sum(1)

    def component_norms(self) -> Tensor:
        """Norms ``(R,)`` of the rank-one tensors, in the order of the weights; in float64."""
        return self._log_component_norms().exp()

    def log_norm(self) -> Tensor:
        """From the cosines of every two components, in float64; if they cancel, half the digits of the largest."""
        log_norms = self._log_component_norms()
        largest = log_norms.max()
        if largest == -math.inf:
            return largest
        cosines = log_norms.new_ones(())
        for group in self.groups:
            columns = group().double()
            lengths = columns.norm(dim=1, keepdim=True)
            columns = columns / torch.where(lengths > 0, lengths, 1.0)
            cosines = cosines * (columns.transpose(1, 2) @ columns).prod(0)
        weights = (log_norms - largest).exp()
        return 0.5 * (weights @ cosines @ weights).clamp_min(0).log() + largest

    @torch.no_grad()
    def balance_(self) -> None:
        """Give all weights of a component the same norm; the components do not change."""
        share = self._log_component_norms() / self.degree
        for chain in self._chains():
            chain.balance_(share * chain.depth)

    def unbalancedness(self) -> Tensor:
        """Largest difference of squared norms in a component, or of Gramians in a chain; in float64."""
        norms = torch.cat([chain.squared_norms().flatten(0, 1) for chain in self._chains()])
        gaps = [chain.unbalancedness() for chain in self._chains()]
        return torch.stack([(norms.amax(0) - norms.amin(0)).max(), *gaps]).max()

    def magnitudes(self) -> dict[str, Tensor]:
        """Norms of the components."""
        return {"component": self.component_norms().sort(descending=True).values}

    def cuts(self) -> tuple[tuple[int, ...], ...]:
        """All groups of modes up to order 5 (one of a group and its complement); single modes beyond."""
        if self.order > 5:
            return tuple((mode,) for mode in range(self.order))
        groups = [g for size in range(1, self.order // 2 + 1) for g in combinations(range(self.order), size)]
        # of two halves, the one with the first mode
        return tuple(g for g in groups if 2 * len(g) < self.order or g[0] == 0)

    def _log_component_norms(self) -> Tensor:
        return torch.cat([chain.log_norms() for chain in self._chains()]).sum(0)

    def _first_weight(self) -> Tensor:
        return self._chains()[0].vectors[0]


def _partial_products(factors: Sequence[Tensor]) -> list[Tensor]:
    """Rank-one tensors ``(D_1 ... D_k, R)`` of k = K, ..., 1 of the K factors, row-major, and then the factors."""
    products = [factors[0]]
    for factor in factors[1:]:
        products.insert(0, (products[0].unsqueeze(1) * factor.unsqueeze(0)).flatten(0, 1))
    return [*products, *factors]


def _slopes(products: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
    """Gradients by the factors, from that by their rank-one tensors; products as of :func:`_partial_products`."""
    count, slopes = len(products) // 2, list[Tensor]()
    for place in range(count - 1, 0, -1):
        # all but the last factor, and the last
        before, factor = products[count - place], products[count + place]
        blocks = gradient.reshape(len(before), len(factor), -1)
        slopes.insert(0, (blocks * before.unsqueeze(1)).sum(0))
        gradient = (blocks * factor).sum(1)
    return [gradient, *slopes]
