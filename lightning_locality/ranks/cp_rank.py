"""CP rank of a tensor that is written out: a bound that is sure, and fits from there upward."""

from __future__ import annotations

__all__ = ["CPRank", "CPRankNotFoundError", "cp_epsilon_ranks", "cp_rank"]

from collections.abc import Iterable
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_locality.ranks.dense import dense_spectra
from lightning_locality.ranks.levenberg_marquardt import CPFit, fit_cp
from lightning_locality.ranks.spectra import NodeSpectra, epsilon_rank
from lightning_locality.tensors.mode_tree import Node

# up to this order the bound is over all cuts: 127 of them
ALL_CUTS = 8


class CPRank(NamedTuple):
    r"""A CP rank within a relative distance, and what is known about it.

    Args:
        rank: Number of components of the fit: the CP rank is not larger.
        lower_bound: No fewer components come within the distance.
        certified: Whether the two are equal. Otherwise ``rank`` is the smallest number for which a fit was found.
        error: Distance of the fit from the tensor, relative to its norm.
        condition: Sum of the norms of the components over the norm of the tensor. A large one means components that
            cancel: the tensor is near those of fewer components without being one (its border rank is lower).
        factors: For every mode ``(D_n, rank)``.
    """

    rank: int
    lower_bound: int
    certified: bool
    error: float
    condition: float
    factors: tuple[Tensor, ...]


class CPRankNotFoundError(ValueError):
    """No fit with so many components as were allowed came close enough.

    Args:
        message: What was tried.
        lower_bound: The rank is not smaller.
        error: Smallest relative distance reached; 1 where the bound excludes a fit.
    """

    def __init__(self, message: str, lower_bound: int, error: float) -> None:
        # all of them, for processes that hand an error on
        super().__init__(message, lower_bound, error)
        self.lower_bound, self.error = lower_bound, error

    def __str__(self) -> str:
        return str(self.args[0])


def cp_rank(
    tensor: Tensor,
    rtol: float = 1e-6,
    *,
    max_rank: int | None = None,
    starts: int = 8,
    max_steps: int = 500,
    seed: int = 0,
) -> CPRank:
    r"""Least number of rank-one tensors whose sum is within a relative distance of a tensor.

    .. math:: \min \Bigl\{ R : \Bigl\lVert \mathcal{T} - \sum_{r=1}^R a_r^1 \otimes \dots \otimes a_r^N \Bigr\rVert
        \le \text{rtol} \cdot \lVert \mathcal{T} \rVert \Bigr\}

    A matricisation of a sum of R rank-one tensors has a rank of at most R, so the largest rank of a matrix within that
    distance of a matricisation (all of them up to order 8, above that those at consecutive modes) is a sure lower
    bound. From there upward R is raised until one of several fits by Levenberg and Marquardt's method succeeds, which
    also finds components that are nearly parallel, where alternating least squares stand still. Success at the bound
    certifies the rank.

    The distance is part of the answer. The tensor ``a a b + a b a + b a a`` has rank 3, yet sums of two components
    come as close as one likes: the rank is 2 within 1e-3, with a large ``condition``, and 3 within 1e-6, where a fit
    of two would need components too large to be found; it is not certified.

    The search is exhaustive: every R from the bound on is fitted, at a cost that grows as its cube. Give ``max_rank``
    for tensors that may have no small rank (the bound reaches 64 for an 8 x 8 x 8 x 8 tensor, a random one has 142).

    Args:
        tensor: Of any order from 1, real, any floating type; computed in float64 on its device.
        rtol: Relative distance; below about 1e-14 the rounding of the tensor counts as components.
        max_rank: Most components tried; None for as many as any tensor of that shape needs.
        starts: Fits side by side for every R.
        max_steps: Most steps of a fit.
        seed: Of the starts: the same on any device.

    Returns:
        The rank, its bound and the fit; rank 0 for a tensor of zeros.

    Raises:
        ValueError: A tensor without modes or entries, not real or not finite, an ``rtol`` not between 0 and 1, or
            ``starts`` or ``max_steps`` below 1.
        CPRankNotFoundError: ``max_rank`` components are not enough, or were not found.

    Example:
        >>> diagonal = torch.zeros(3, 3, 3)
        >>> diagonal[range(3), range(3), range(3)] = torch.tensor([1.0, 2.0, 3.0])
        >>> found = cp_rank(diagonal)
        >>> found.rank, found.certified
        (3, True)
        >>> cp_rank(diagonal, rtol=0.3).rank  # the distance is 1 / sqrt(14) = 0.27 without the smallest
        2
    """
    _checked_rtol(rtol)
    target, scale = _scaled(tensor)
    return _search(target, scale, _spectra(target), rtol, 1, max_rank, _Fits(starts, max_steps, seed))


def cp_epsilon_ranks(
    tensor: Tensor,
    tolerances: Iterable[float] = (1e-1, 1e-2, 1e-3, 1e-6),
    *,
    max_rank: int | None = None,
    starts: int = 8,
    max_steps: int = 500,
    seed: int = 0,
) -> dict[float, CPRank | None]:
    """CP ranks within several relative distances; as :func:`cp_rank`, from the largest distance on.

    Args:
        tensor: As for :func:`cp_rank`.
        tolerances: Relative distances.
        max_rank: As for :func:`cp_rank`.
        starts: As for :func:`cp_rank`.
        max_steps: As for :func:`cp_rank`.
        seed: As for :func:`cp_rank`.

    Returns:
        Distance -> rank, from the largest distance down; None where ``max_rank`` components were not enough.

    Raises:
        ValueError: As for :func:`cp_rank`.

    Example:
        >>> matrix = torch.diag(torch.tensor([1.0, 0.05, 0.005]))
        >>> {rtol: found.rank for rtol, found in cp_epsilon_ranks(matrix).items()}
        {0.1: 1, 0.01: 2, 0.001: 3, 1e-06: 3}
    """
    descending = sorted(set(map(_checked_rtol, tolerances)), reverse=True)
    target, scale = _scaled(tensor)
    spectra, fits = _spectra(target), _Fits(starts, max_steps, seed)
    found: dict[float, CPRank | None] = {}
    least = 1
    for rtol in descending:
        try:
            found[rtol] = closest = _search(target, scale, spectra, rtol, least, max_rank, fits)
        except CPRankNotFoundError:
            return found | dict.fromkeys(descending[len(found) :])
        least = max(least, closest.rank)
    return found


class _Fits(NamedTuple):
    """How fits are made."""

    starts: int
    max_steps: int
    seed: int


def _checked_rtol(rtol: float) -> float:
    if not 0 < rtol < 1:
        raise ValueError(f"rtol must be between 0 and 1, relative to the tensor's norm, got {rtol}")
    return rtol


def _scaled(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, the largest entry 1, and what it was divided by."""
    if not tensor.ndim or not tensor.numel() or tensor.is_complex():
        raise ValueError(f"tensor must be real and have modes and entries, got {tensor.dtype} {tuple(tensor.shape)}")
    if bad := int((~tensor.isfinite()).sum()):
        raise ValueError(f"tensor has {bad} of {tensor.numel()} entries that are not finite: replace them")
    target = tensor.detach().double()
    largest = target.abs().max()
    return target / torch.where(largest > 0, largest, 1.0), largest


def _spectra(target: Tensor) -> NodeSpectra:
    """Of single modes, and of the cuts that bound the rank; none of a vector."""
    order = target.ndim
    cuts: list[Node] = [(n,) for n in range(order)] if order > 1 else []
    for size in range(2, order // 2 + 1):
        if order <= ALL_CUTS:
            groups: Iterable[Node] = combinations(range(order), size)
        else:
            groups = (tuple(sorted((first + n) % order for n in range(size))) for first in range(order))
        # of two halves one is enough
        cuts += [group for group in groups if 2 * size < order or 0 in group]
    return dense_spectra(target, cuts)


def _search(
    target: Tensor, scale: Tensor, spectra: NodeSpectra, rtol: float, least: int, max_rank: int | None, fits: _Fits
) -> CPRank:
    if not scale:
        return CPRank(0, 0, True, 0.0, 0.0, tuple(target.new_zeros(size, 0) for size in target.shape))
    norm = target.norm()
    bound = max([1, *(int(epsilon_rank(values, rtol)) for values in spectra.values())])
    enough = target.numel() // max(target.shape)
    limit = enough if max_rank is None else min(max_rank, enough)
    bases, core = _compressed(target, spectra, rtol)
    modes = [n for n, size in enumerate(core.shape) if size > 1]
    generator = torch.Generator().manual_seed(fits.seed)
    best = 1.0
    for rank in range(max(bound, least), limit + 1):
        # a little closer than asked: compression leaves something out as well
        fit = _fit(core.reshape([core.shape[n] for n in modes]), rank, 0.999 * rtol, fits, generator)
        parts = dict(zip(modes, fit.factors, strict=True))
        ones = core.new_ones(1, rank)
        factors = [basis @ parts.get(n, ones) for n, basis in enumerate(bases)]
        if not modes:
            factors[0] = factors[0] * core.reshape(())
        # the whole tensor, with what compression left out
        error = float((target - _written_out(factors)).norm() / norm)
        best = min(best, error)
        if error <= rtol:
            norms = torch.stack([factor.norm(dim=0) for factor in factors]).prod(0)
            share = scale ** (1 / len(factors))
            scaled = tuple(share * factor for factor in factors)
            return CPRank(rank, bound, rank == bound, error, float(norms.sum() / norm), scaled)
    tried = f"the bound is {bound}" if bound > limit else f"the closest fit is at {best:.3g}"
    raise CPRankNotFoundError(
        f"no sum of at most max_rank = {limit} components was found within rtol = {rtol:g} of the tensor: {tried}; "
        "raise max_rank, rtol or starts",
        bound,
        best,
    )


def _compressed(target: Tensor, spectra: NodeSpectra, rtol: float) -> tuple[list[Tensor], Tensor]:
    """Orthonormal bases of the modes (D_n, r_n) and the core (r_1, ..., r_N): a higher-order SVD.

    The core has the CP rank of the tensor; what is left out is far below the distance asked for.
    """
    bases: list[Tensor] = []
    core = target
    left_out = max(1e-2 * rtol, 1e-15) / target.ndim**0.5
    for n in range(target.ndim):
        rows = target.movedim(n, 0).reshape(target.shape[n], -1)
        kept = int(epsilon_rank(spectra[(n,)], left_out)) if target.ndim > 1 else 1
        basis = torch.linalg.svd(rows, full_matrices=False).U[:, :kept]
        bases.append(basis)
        core = torch.tensordot(core, basis, dims=([0], [0]))
    return bases, core


def _fit(core: Tensor, rank: int, rtol: float, fits: _Fits, generator: torch.Generator) -> CPFit:
    """Of a core whose modes all have more than one row."""
    match core.ndim:
        case 0:
            return CPFit((), 0.0, 0)
        case 1:
            # compressed a little more in the other modes: one component, the others zero
            return CPFit((torch.nn.functional.pad(core[:, None], (0, rank - 1)),), 0.0, 0)
        case 2:
            left, values, right = torch.linalg.svd(core, full_matrices=False)
            return CPFit((left[:, :rank] * values[:rank], right[:rank].mT), 0.0, 0)
        case _:
            return fit_cp(core, rank, rtol, fits.starts, fits.max_steps, generator)


def _written_out(factors: list[Tensor]) -> Tensor:
    """The sum of the components' outer products."""
    rows = factors[0]
    for factor in factors[1:]:
        rows = (rows[:, None] * factor).reshape(-1, factor.shape[1])
    return rows.sum(1).reshape([len(factor) for factor in factors])
