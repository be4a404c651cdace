"""CP rank of a dense tensor: a certain lower bound, and fits from there upward."""

from __future__ import annotations

__all__ = ["CPRank", "CPRankNotFoundError", "cp_epsilon_ranks", "cp_rank"]

from collections.abc import Iterable
from functools import reduce
from itertools import combinations
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from lightning_locality.arguments import checked
from lightning_locality.ranks.conversion import as_tensor
from lightning_locality.ranks.dense import dense_spectra
from lightning_locality.ranks.levenberg_marquardt import fit_cp
from lightning_locality.ranks.spectra import NodeSpectra, epsilon_rank
from lightning_locality.tensors.mode_tree import Node


class CPRank(NamedTuple):
    """A CP rank within a relative distance, and what is known about it.

    Args:
        rank, lower_bound: Number of components of the fit, and the least number with which one could be as close.
        certified: Whether the two are equal. Otherwise ``rank`` is the smallest number for which a fit was found.
        error: Distance of the fit from the tensor, relative to its norm.
        condition: Sum of the norms of the components over the norm of the tensor. A large one means components that
            cancel: the tensor is close to tensors of fewer components without being one (its border rank is lower).
        factors: For every mode ``(D_n, rank)``.
    """

    rank: int
    lower_bound: int
    certified: bool
    error: float
    condition: float
    factors: tuple[Tensor, ...]


class CPRankNotFoundError(ValueError):
    """No fit came close enough: ``error`` is the smallest relative distance, 1 if ``lower_bound`` excludes a fit."""

    def __init__(self, message: str, lower_bound: int, error: float) -> None:
        # all three, so that the error can be pickled
        super().__init__(message, lower_bound, error)
        self.lower_bound, self.error = lower_bound, error

    def __str__(self) -> str:
        return str(self.args[0])


@checked
def cp_rank(
    tensor: Any,
    rtol: float = 1e-6,
    *,
    max_rank: int | None = None,
    starts: int = 8,
    max_steps: int = 500,
    seed: int = 0,
) -> CPRank:
    r"""Smallest number of rank-one tensors whose sum is within a relative distance of a tensor; 0 for zeros.

    .. math:: \min \Bigl\{ R : \Bigl\lVert \mathcal{T} - \sum_{r=1}^R a_r^1 \otimes \dots \otimes a_r^N \Bigr\rVert
        \le \text{rtol} \cdot \lVert \mathcal{T} \rVert \Bigr\}

    A sum of R rank-one tensors has matricisations of rank R at most, so the largest rank of a matrix within that
    distance of a matricisation (all of them up to order 8, above that those at consecutive modes) is a certain lower
    bound. From there R is raised until one of several Levenberg-Marquardt fits succeeds, which also find components
    that are nearly parallel, on which alternating least squares stall. Success at the bound certifies the rank. The
    distance is part of the answer: see docs/measuring.md for a tensor of rank 3 with sums of two components near it.

    Args:
        tensor: Real, of any order from 1, as a tensor, array or tensorly's factorised tensor, which is formed; computed
            in float64 on its device.
        rtol: Relative distance; below about 1e-14 the rounding of the tensor counts as components.
        max_rank: Largest number of components tried; None for as many as any tensor of that shape needs. The cost of a
            fit grows as the cube of R: give it for tensors that may have no small rank.
        starts: Fits side by side for every R.
        max_steps: Maximum steps of a fit.
        seed: Of the starts, which are the same on any device.

    Raises:
        ValueError: If the tensor is empty, complex or not finite, or a number is out of range.
        CPRankNotFoundError: If ``max_rank`` components are not enough, or were not found.

    Example:
        >>> diagonal = torch.zeros(3, 3, 3)
        >>> diagonal[range(3), range(3), range(3)] = torch.tensor([1.0, 2.0, 3.0])
        >>> cp_rank(diagonal)[:3]  # rank, lower_bound, certified
        (3, 3, True)
        >>> cp_rank(diagonal, rtol=0.3).rank  # the distance is 1 / sqrt(14) = 0.27 without the smallest
        2
    """
    return _Search(tensor, [rtol], max_rank, starts, max_steps, seed).rank(rtol)


@checked
def cp_epsilon_ranks(
    tensor: Any,
    tolerances: Iterable[float] = (1e-1, 1e-2, 1e-3, 1e-6),
    *,
    max_rank: int | None = None,
    starts: int = 8,
    max_steps: int = 500,
    seed: int = 0,
) -> dict[float, CPRank | None]:
    """CP ranks within several relative distances, from the largest down; None if ``max_rank`` is not enough.

    The arguments and errors are those of :func:`cp_rank`, with ``tolerances`` instead of ``rtol``; every search starts
    from the rank within the next larger distance.

    Example:
        >>> matrix = torch.diag(torch.tensor([1.0, 0.05, 0.005]))
        >>> {rtol: found.rank for rtol, found in cp_epsilon_ranks(matrix).items()}
        {0.1: 1, 0.01: 2, 0.001: 3, 1e-06: 3}
    """
    descending = sorted(set(tolerances), reverse=True)
    search = _Search(tensor, descending, max_rank, starts, max_steps, seed)
    found: dict[float, CPRank | None] = dict.fromkeys(descending)
    least = 1
    for rtol in descending:
        try:
            found[rtol] = closest = search.rank(rtol, least)
        except CPRankNotFoundError:
            break
        least = max(least, closest.rank)
    return found


@final
class _Search:
    """A tensor in float64, divided by its largest entry, and its spectra at the cuts that bound the rank."""

    def __init__(
        self, tensor: Any, tolerances: list[float], max_rank: int | None, starts: int, max_steps: int, seed: int
    ) -> None:
        for rtol in tolerances:
            if not 0 < rtol < 1:
                raise ValueError(f"rtol must be between 0 and 1, relative to the tensor's norm, got {rtol}")
        tensor = as_tensor(tensor, "tensor")
        if not tensor.ndim or not tensor.numel() or tensor.is_complex():
            raise ValueError(
                f"tensor must be real and have modes and entries, got {tensor.dtype} {tuple(tensor.shape)}"
            )
        if bad := int((~tensor.isfinite()).sum()):
            raise ValueError(f"tensor has {bad} of {tensor.numel()} entries that are not finite: replace them")
        target = tensor.detach().double()
        self.scale = target.abs().max()
        self.target = target / torch.where(self.scale > 0, self.scale, 1.0)
        self.spectra = dense_spectra(self.target, _cuts(target.ndim))
        enough = tensor.numel() // max(tensor.shape)
        self.limit = enough if max_rank is None else min(max_rank, enough)
        self.starts, self.max_steps, self.seed = starts, max_steps, seed

    def rank(self, rtol: float, least: int = 1) -> CPRank:
        """Smallest number of components, from ``least`` on, that come within a distance."""
        target = self.target
        if not self.scale:
            return CPRank(0, 0, True, 0.0, 0.0, tuple(target.new_zeros(size, 0) for size in target.shape))
        norm = target.norm()
        bound = max([1, *(int(epsilon_rank(values, rtol)) for values in self.spectra.values())])
        bases, core = _compress(target, self.spectra, rtol)
        modes = [n for n, size in enumerate(core.shape) if size > 1]
        generator = torch.Generator().manual_seed(int(self.seed))
        best = 1.0
        for rank in range(max(bound, least), self.limit + 1):
            # a little closer than required, since compression discards something as well
            fitted = self._fit(core.reshape([core.shape[n] for n in modes]), rank, 0.999 * rtol, generator)
            parts = dict(zip(modes, fitted, strict=True))
            factors = [basis @ parts.get(n, core.new_ones(1, rank)) for n, basis in enumerate(bases)]
            if not modes:
                factors[0] = factors[0] * core.reshape(())
            # from the whole tensor, including what compression discarded
            rows = reduce(lambda a, b: (a[:, None] * b).flatten(0, 1), factors)
            error = float((target - rows.sum(1).reshape(target.shape)).norm() / norm)
            best = min(best, error)
            if error <= rtol:
                norms = torch.stack([factor.norm(dim=0) for factor in factors]).prod(0)
                scaled = tuple(self.scale ** (1 / len(factors)) * factor for factor in factors)
                return CPRank(rank, bound, rank == bound, error, float(norms.sum() / norm), scaled)
        tried = f"the bound is {bound}" if bound > self.limit else f"the closest fit is at {best:.3g}"
        raise CPRankNotFoundError(
            f"no sum of at most max_rank = {self.limit} components was found within rtol = {rtol:g} of the tensor: "
            f"{tried}; raise max_rank, rtol or starts",
            bound,
            best,
        )

    def _fit(self, core: Tensor, rank: int, rtol: float, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Factors of a core whose modes all have more than one row."""
        match core.ndim:
            case 0:
                return ()
            case 1:
                # compression left one row in all other modes: one component, the others zero
                return (torch.nn.functional.pad(core[:, None], (0, rank - 1)),)
            case 2:
                left, values, right = torch.linalg.svd(core, full_matrices=False)
                return left[:, :rank] * values[:rank], right[:rank].mT
        return fit_cp(core, rank, rtol, self.starts, self.max_steps, generator)[0]


def _cuts(order: int) -> list[Node]:
    """Single modes, and the cuts that bound the rank; none for a vector."""
    cuts: list[Node] = [(n,) for n in range(order)] if order > 1 else []
    for size in range(2, order // 2 + 1):
        if order <= 8:  # all cuts, 127 at most
            groups = list(combinations(range(order), size))
        else:
            groups = [tuple(sorted((first + n) % order for n in range(size))) for first in range(order)]
        # of two complementary halves one is enough
        cuts += [group for group in groups if 2 * size < order or 0 in group]
    return cuts


def _compress(target: Tensor, spectra: NodeSpectra, rtol: float) -> tuple[list[Tensor], Tensor]:
    """Higher-order SVD: bases of the modes (D_n, r_n), and the core (r_1, ..., r_N), which has the tensor's CP rank."""
    bases, core = list[Tensor](), target
    # far below the relative distance
    discarded = max(1e-2 * rtol, 1e-15) / target.ndim**0.5
    for n in range(target.ndim):
        rows = target.movedim(n, 0).reshape(target.shape[n], -1)
        kept = int(epsilon_rank(spectra[(n,)], discarded)) if target.ndim > 1 else 1
        basis = torch.linalg.svd(rows, full_matrices=False).U[:, :kept]
        bases.append(basis)
        core = torch.tensordot(core, basis, dims=([0], [0]))
    return bases, core
