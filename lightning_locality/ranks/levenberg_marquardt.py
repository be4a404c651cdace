"""Least-squares fits of a sum of rank-one tensors, from several starts in parallel."""

from __future__ import annotations

__all__: list[str] = []

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate, pairwise

import torch
from torch import Tensor


def fit_cp(
    tensor: Tensor,
    rank: int,
    rtol: float = 1e-6,
    starts: int = 8,
    max_steps: int = 500,
    generator: torch.Generator | None = None,
) -> tuple[tuple[Tensor, ...], float, int]:
    r"""Fit a sum of rank-one tensors by Levenberg-Marquardt, until one of the starts is close enough.

    .. math:: \min_{A_1, \dots, A_N} \Bigl\lVert \mathcal{T} - \sum_{r=1}^R A_{1,:r} \otimes \dots \otimes A_{N,:r}
        \Bigr\rVert, \qquad \text{step} = (J^\top J + \lambda)^{-1} J^\top (\text{residual})

    The damping follows the ratio of gain and prediction: "Methods for non-linear least squares problems" (Madsen,
    Nielsen, Tingleff, 2004). With :math:`P = R \sum_n D_n`, a step takes :math:`P^3 / 3` operations and
    :math:`16 P^2` bytes per start. In float64 on the tensor's device; the starts are sampled by a generator on the CPU
    (None: seed 0). Steps end early once no start improves. Returns the closest fit, close enough or not: its factors
    ``(D_n, R)``, its distance relative to the tensor's norm, and the steps taken.
    """
    if min(starts, max_steps) < 1:
        raise ValueError(f"starts and max_steps must be at least 1, got {starts} and {max_steps}")
    if starts > 100_000:
        raise ValueError(f"starts must be at most 100,000, which are searched at the same time, got {starts}")
    target = tensor.detach().double()
    norm = target.norm()
    target = target / norm
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    factors = []
    for size in tensor.shape:
        # normal vectors, scaled so that the norm of the sum is about that of the target, 1
        normal = torch.randn(starts, size, rank, generator=generator, dtype=torch.float64, device="cpu")
        factors.append(normal.to(target.device) / (size**0.5 * rank ** (0.5 / target.ndim)))
    residual = target - _sum(factors)
    error = residual.flatten(1).norm(dim=1)
    damping, growth = torch.full_like(error, 1e-2), torch.full_like(error, 2.0)
    checkpoint, step = error, 0
    while step < max_steps and error.min() > rtol:
        if step and step % 25 == 0:
            # too little progress of all starts since the last check
            if not (error < 0.97 * checkpoint).any():
                break
            checkpoint = error
        step += 1
        hessian, descent = _normal_equations(factors, residual)
        diagonal = hessian.diagonal(dim1=1, dim2=2)
        # a component's scale can be split among the modes arbitrarily: without damping the matrix is singular
        damping = damping.maximum(1e-15 * diagonal.amax(1))
        diagonal += damping[:, None]
        triangle, failed = torch.linalg.cholesky_ex(hessian)
        move = torch.cholesky_solve(descent[..., None], triangle)[..., 0]
        parts = torch.split(move, [factor[0].numel() for factor in factors], 1)
        moved = [factor + part.reshape(factor.shape) for factor, part in zip(factors, parts, strict=True)]
        new_residual = target - _sum(moved)
        new_error = new_residual.flatten(1).norm(dim=1)
        better = (failed == 0) & (new_error < error)
        predicted = (move * (damping[:, None] * move + descent)).sum(1)
        gain = (error - new_error) * (error + new_error) / predicted
        shrink = (1 - (2 * gain - 1) ** 3).clamp(min=1 / 3)
        damping = torch.where(better, damping * shrink, damping * growth)
        growth = torch.where(better, 2.0, 2 * growth)
        factors = [torch.where(better[:, None, None], new, old) for new, old in zip(moved, factors, strict=True)]
        residual = torch.where(better.reshape(-1, *[1] * target.ndim), new_residual, residual)
        error = torch.where(better, new_error, error)
    best = int(error.argmin())
    share = norm ** (1 / target.ndim)
    return tuple(share * factor[best] for factor in factors), float(error[best]), step


def _sum(factors: Sequence[Tensor]) -> Tensor:
    """The sums of rank-one tensors (S, D_1, ..., D_N)."""
    # Khatri-Rao product of all modes but the last, then one matrix product
    rows = reduce(lambda a, b: (a[:, :, None] * b[:, None]).flatten(1, 2), factors[:-1])
    return (rows @ factors[-1].mT).reshape(len(rows), *(factor.shape[1] for factor in factors))


def _normal_equations(factors: Sequence[Tensor], residual: Tensor) -> tuple[Tensor, Tensor]:
    """J^T J (S, P, P) and J^T residual (S, P), J the derivative of the sum; parameters by mode, row and component.

    Assembled from the Gram matrices of the factors: the Jacobian is never formed.
    """
    order, starts, rank = len(factors), len(residual), factors[0].shape[2]
    parts = [slice(*ends) for ends in pairwise(accumulate((factor[0].numel() for factor in factors), initial=0))]
    grams = [factor.mT @ factor for factor in factors]
    hessian = residual.new_empty(starts, parts[-1].stop, parts[-1].stop)
    descent = residual.new_empty(starts, parts[-1].stop)
    for n, factor in enumerate(factors):
        # of the residual, not of the target: near the solution the difference of two large terms would be noise
        descent[:, parts[n]] = _contracted(residual, factors, n).flatten(1)
        for p in range(n, order):
            others = torch.ones_like(grams[0])
            for m in set(range(order)) - {n, p}:
                others = others * grams[m]
            if n == p:
                unit = torch.eye(factor.shape[1], dtype=others.dtype, device=others.device)
                block = torch.einsum("brs,ij->birjs", others, unit)
            else:
                block = torch.einsum("brs,bis,bjr->birjs", others, factor, factors[p])
            block = block.reshape(starts, factor.shape[1] * rank, -1)
            hessian[:, parts[n], parts[p]] = block
            hessian[:, parts[p], parts[n]] = block.mT
    return hessian, descent


def _contracted(tensors: Tensor, factors: Sequence[Tensor], kept: int) -> Tensor:
    """Contract every tensor (S, D_1, ..., D_N) with the columns of all factors but one: (S, D_kept, R)."""
    starts, order, rank = len(tensors), len(factors), factors[0].shape[2]
    last = next(n for n in reversed(range(order)) if n != kept)
    # the first by a matrix product, as it takes most of the time, the others column by column
    partial = tensors.movedim(last + 1, -1) @ factors[last].reshape(starts, *[1] * (order - 2), -1, rank)
    modes = [n for n in range(order) if n != last]
    for n in reversed(modes):
        if n != kept:
            axis = modes.index(n) + 1
            modes.remove(n)
            shape = [starts, *[1] * (partial.ndim - 2), rank]
            shape[axis] = factors[n].shape[1]
            partial = (partial * factors[n].reshape(shape)).sum(axis)
    return partial
