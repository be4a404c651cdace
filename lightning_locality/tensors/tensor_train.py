"""Tensor-train factorisation: one core per mode, each contracted with the next."""

from __future__ import annotations

__all__ = ["TensorTrain"]

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import cast, final

import torch
from torch import Tensor, nn

from lightning_locality.tensors.balance import balance_cyclically, balance_neighbours
from lightning_locality.tensors.chain import Chain
from lightning_locality.tensors.factorization import Factorization, InitLaw, InitOf, divided, per_mode


@final
class TensorTrain(Factorization):
    r"""A tensor whose entries are products of matrices, one per mode.

    .. math:: \mathcal W_{i_1 \dots i_N} = G_1[:, i_1, :]\, G_2[:, i_2, :] \cdots G_N[:, i_N, :],
        \qquad G_n \in \mathbb R^{r_{n-1} \times D_n \times r_n}, \quad r_0 = r_N = 1

    At depth 2 or more every fibre :math:`G_n[a, :, b]` is a :class:`Chain`. Between two cores of depth 1, gradient
    flow conserves

    .. math:: \sum_i G_n[:, i, :]^\top G_n[:, i, :] - \sum_i G_{n+1}[:, i, :] G_{n+1}[:, i, :]^\top

    and otherwise its diagonal, where the norm of one factor of the chain stands for that of the fibre. With 16 modes
    or more, intermediate results of entries and inner products neither overflow nor underflow. Further arguments, and
    errors, are those of :class:`Factorization`.

    Args:
        shape: Sizes of the modes D_n.
        rank: Widths r_n of the N - 1 bonds, one number or one each; None for the smaller of the products of the sizes
            on either side of a bond, enough for any tensor.
        depth: Factors of every fibre: one number, or one per mode.

    Example:
        >>> TensorTrain((3, 4, 5)).rank
        (3, 5)
    """

    def __init__(
        self,
        shape: Sequence[int],
        rank: int | Sequence[int] | None = None,
        depth: int | Sequence[int] = 1,
        init: InitLaw = "normal",
        init_scale: float = 1e-2,
        init_of: InitOf = "weights",
        init_mean: float = 0.0,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(shape)
        if rank is None:
            rank = [min(math.prod(self.shape[:k]), math.prod(self.shape[k:])) for k in range(1, self.order)]
        self.rank = per_mode("rank", rank, self.order - 1)
        self.depth = per_mode("depth", depth, self.order)
        self.degree = sum(self.depth)
        widths = (1, *self.rank, 1)
        shapes = zip(widths[:-1], self.shape, widths[1:], strict=True)
        self.chains = nn.ModuleList(map(Chain, shapes, self.depth))
        self._initialize(init, init_scale, init_of, init_mean, seed)
        self._convert(dtype, device)

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The cores ``(r_{n-1}, D_n, r_n)``."""
        return tuple(chain() for chain in self.chains)

    def to_tensor(self) -> Tensor:
        """The tensor, by one matrix product of the cores left and right of the middle."""
        cores = self.factors
        middle = (self.order + 1) // 2
        left = cores[0].flatten(0, 1)
        for core in cores[1:middle]:
            left = (left @ core.flatten(1)).reshape(-1, core.shape[2])
        if self.order == 1:
            # copied: training must not change a tensor that the caller keeps
            return left.reshape(self.shape).clone()
        right = cores[-1].flatten(1)
        for core in reversed(cores[middle:-1]):
            right = (core.flatten(0, 1) @ right).reshape(core.shape[0], -1)
        return (left @ right).reshape(self.shape)

    def entries(self, indices: Tensor) -> Tensor:
        """Entries ``(B,)`` at ``(B, N)``, by products of slices."""
        self._check_indices(indices)
        terms = (core.transpose(0, 1)[i] for i, core in zip(indices.long().T, self.factors, strict=True))
        return self._multiply_over_modes(terms, torch.bmm, (1, 2)).flatten()

    def inner(self, vectors: Sequence[Tensor] | Tensor) -> Tensor:
        """Inner products ``(B,)``, by products of combined slices."""
        split = self._split_vectors(vectors)
        terms = (torch.einsum("bd,ldr->blr", x, core) for x, core in zip(split, self.factors, strict=True))
        return self._multiply_over_modes(terms, torch.bmm, (1, 2)).flatten()

    def log_norm(self) -> Tensor:
        """From triangular factors carried from left to right; in float64."""
        triangle, log_scale = self._left_triangles()[-1]
        return cast(Tensor, triangle.norm().log() + log_scale)

    @torch.no_grad()
    def balance_(self) -> None:
        """Balance one bond after the other until nothing moves; each bond exactly, all of them in the limit."""
        cores = [core.double() for core in self.factors]

        def sweep() -> float:
            largest = 0.0
            for place, degrees in enumerate(pairwise(self.depth)):
                core, above = cores[place], cores[place + 1]
                norms = core.norm(dim=1), above.norm(dim=1).T
                squares = norms[0].pow(2 / degrees[0]).sum(0), norms[1].pow(2 / degrees[1]).sum(0)
                matrices = core.flatten(0, 1), above.flatten(1)
                left, right, imbalance = balance_neighbours(*matrices, norms, degrees, squares)
                cores[place], cores[place + 1] = left.view_as(core), right.view_as(above)
                largest = max(largest, imbalance)
            return largest

        balance_cyclically(sweep)
        for chain, core in zip(self._chains(), cores, strict=True):
            if chain.depth == 1:
                chain.vectors.copy_(core)
            else:
                chain.balance_(core.norm(dim=1).log().to(chain.vectors))

    def unbalancedness(self) -> Tensor:
        """Largest Frobenius norm of the quantities conserved at a bond or in a chain; in float64."""
        chains = self._chains()
        gaps = [chain.vectors.new_zeros((), dtype=torch.float64) for chain in chains[:1]]
        for chain, above in pairwise(chains):
            if chain.depth == above.depth == 1:
                left, right = chain().double().flatten(0, 1), above().double().flatten(1)
                gaps.append((left.T @ left - right @ right.T).norm())
            else:
                # of one factor of the chains; the differences from the others follow below
                sums = chain.squared_norms()[0].sum(0), above.squared_norms()[0].sum(1)
                gaps.append((sums[0] - sums[1]).norm())
        for chain in chains:
            norms = chain.squared_norms()
            gaps += [(norms.amax(0) - norms.amin(0)).max(), chain.unbalancedness()]
        return torch.stack(gaps).max()

    def magnitudes(self) -> dict[str, Tensor]:
        """Singular values at every bond (modes before it against modes after it), in float64."""
        factors, lefts = self.factors, self._left_triangles()
        right, scale = lefts[0][0].new_ones((1, 1)), lefts[0][0].new_zeros(())
        values: dict[str, Tensor] = {}
        for bond in range(self.order - 1, 0, -1):
            core = factors[bond].double()
            right, extra = _triangle((core @ right.T).flatten(1).T)
            scale = scale + extra
            left, log_scale = lefts[bond - 1]
            values[f"bond {bond}"] = torch.linalg.svdvals(left @ right.T) * (log_scale + scale).exp()
        return dict(reversed(values.items()))

    def cuts(self) -> tuple[tuple[int, ...], ...]:
        """The modes before every bond."""
        return tuple(tuple(range(bond)) for bond in range(1, self.order))

    def _left_triangles(self) -> list[tuple[Tensor, Tensor]]:
        """For every core, the triangular factor of all cores up to it and the logarithm of its scale."""
        cores, triangles = [core.double() for core in self.factors], []
        triangle, scale = cores[0].new_ones((1, 1)), cores[0].new_zeros(())
        for core in cores:
            triangle, extra = _triangle((triangle @ core.flatten(1)).reshape(-1, core.shape[2]))
            scale = scale + extra
            triangles.append((triangle, scale))
        return triangles


def _triangle(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The triangular factor, scaled to a largest entry of 1, and the logarithm of the scale."""
    scaled, scale = divided(torch.linalg.qr(matrix, mode="r")[1])
    return scaled, scale.log()
