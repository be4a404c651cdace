"""Tensor-train factorisation: one core per mode, each contracted with the next."""

from __future__ import annotations

__all__ = ["TensorTrain"]

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import cast, final

import torch
from torch import Tensor, nn

from lightning_locality.tensors.balance import balance_cyclically, balanced_pair, balancing_factors
from lightning_locality.tensors.chain import Chain
from lightning_locality.tensors.factorization import LARGE_ORDER, Factorization, InitLaw, InitOf, divided, per_mode


@final
class TensorTrain(Factorization):
    r"""Entries that are products of matrices, one for every mode.

    .. math:: \mathcal W_{i_1 \dots i_N} = G_1[:, i_1, :]\, G_2[:, i_2, :] \cdots G_N[:, i_N, :],
        \qquad G_n \in \mathbb R^{r_{n-1} \times D_n \times r_n}, \quad r_0 = r_N = 1

    With a depth of 2 or more every fibre :math:`G_n[a, :, b]` is a chain of square matrices and a vector
    (:class:`Chain`). This is our choice: *Implicit Regularization in Deep Tensor Factorization* (Milanesi, Kadri,
    Ayache, Artières, 2021) trains a deep tensor train whose parameterisation we have not seen.

    Gradient flow conserves, between two cores of depth 1,

    .. math:: \sum_i G_n[:, i, :]^\top G_n[:, i, :] - \sum_i G_{n+1}[:, i, :] G_{n+1}[:, i, :]^\top

    and otherwise its diagonal, with the norm of one factor of the chain as that of the fibre.

    With 16 modes or more, entries and inner products are computed without overflow or underflow on the way.

    Args:
        shape: Sizes of the modes D_n.
        rank: Widths of the N - 1 bonds r_n, one number or one each; None for the smaller of the products of the sizes
            on the two sides of a bond, enough for any tensor.
        depth: Factors of every fibre: one number, or one per mode.
        init: ``"normal"``, or ``"balanced"``: the same moved to a balanced point of its tensor.
        init_scale: Standard deviation of the weights, or root mean square of the entries of the tensor.
        init_of: Which of the two.
        init_mean: Mean of the weights.
        seed: Of the draw; the same weights for all types and devices.
        dtype: Type of the weights; None for torch's default.
        device: Where they lie; None for torch's default.

    Raises:
        ValueError: Sizes, ranks, depths or scale that make no sense.

    Example:
        >>> model = TensorTrain((3, 4, 5))
        >>> model.rank, model.to_tensor().shape
        ((3, 5), torch.Size([3, 4, 5]))
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
        widths = (1, *self.rank, 1)
        self.chains = nn.ModuleList(
            Chain((widths[n], size, widths[n + 1]), self.depth[n]) for n, size in enumerate(self.shape)
        )
        self._initialize(init, init_scale, init_of, init_mean, seed, dtype, device)

    @property
    def degree(self) -> int:
        """Sum of the depths."""
        return sum(self.depth)

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
            # a copy of a single core: whoever keeps the tensor must not see it trained
            return left.reshape(self.shape).clone()
        right = cores[-1].flatten(1)
        for core in reversed(cores[middle:-1]):
            right = (core.flatten(0, 1) @ right).reshape(core.shape[0], -1)
        return (left @ right).reshape(self.shape)

    def entries(self, indices: Tensor) -> Tensor:
        """Entries ``(B,)`` at ``(B, N)``, by products of slices."""
        self._check_indices(indices)
        columns = indices.long().unbind(1)
        return self._multiply(core.transpose(0, 1)[i] for i, core in zip(columns, self.factors, strict=True))

    def inner(self, vectors: Sequence[Tensor] | Tensor) -> Tensor:
        """Inner products ``(B,)``, by products of combined slices."""
        split = self._split_vectors(vectors)
        return self._multiply(torch.einsum("bd,ldr->blr", x, core) for x, core in zip(split, self.factors, strict=True))

    def log_norm(self) -> Tensor:
        """From triangular factors carried from left to right; in float64."""
        triangle, log_scale = self._left_triangles()[-1]
        return cast(Tensor, triangle.norm().log() + log_scale)

    @torch.no_grad()
    def balance_(self) -> None:
        """One bond after the other until nothing moves: exactly at a bond, and together in the limit."""
        cores = [core.double() for core in self.factors]

        def sweep() -> float:
            worst = 0.0
            for place, (one, two) in enumerate(pairwise(self.depth)):
                left, right = cores[place].flatten(0, 1), cores[place + 1].flatten(1)
                norms, others = cores[place].norm(dim=1), cores[place + 1].norm(dim=1).T
                sums = norms.pow(2 / one).sum(0), others.pow(2 / two).sum(0)
                if one == two == 1:
                    gap = left.T @ left - right @ right.T
                    left, right = balanced_pair(left, right)
                else:
                    gap = sums[0] - sums[1]
                    factor = balancing_factors(norms, one, others, two)
                    left, right = left * factor, torch.where(factor > 0, 1 / factor, 0.0)[:, None] * right
                worst = max(worst, float(gap.abs().max() / (sums[0].max() + sums[1].max() + 1e-300)))
                cores[place], cores[place + 1] = left.view_as(cores[place]), right.view_as(cores[place + 1])
            return worst

        balance_cyclically(sweep)
        for chain, core in zip(self._chains(), cores, strict=True):
            if chain.depth == 1:
                chain.vectors.copy_(core)
            else:
                chain.balance_(core.norm(dim=1).log().to(chain.vectors))

    def unbalancedness(self) -> Tensor:
        """Largest Frobenius norm of what is conserved at a bond or in a chain; in float64."""
        chains = self._chains()
        gaps = [chain.vectors.new_zeros((), dtype=torch.float64) for chain in chains[:1]]
        for chain, above in pairwise(chains):
            if chain.depth == above.depth == 1:
                left, right = chain().double().flatten(0, 1), above().double().flatten(1)
                gaps.append((left.T @ left - right @ right.T).norm())
            else:
                # of one factor of the chains; the differences to the others follow below
                sums = chain.squared_norms()[0].sum(0), above.squared_norms()[0].sum(1)
                gaps.append((sums[0] - sums[1]).norm())
        for chain in chains:
            norms = chain.squared_norms()
            gaps += [(norms.amax(0) - norms.amin(0)).max(), chain.unbalancedness()]
        return torch.stack(gaps).max()

    def magnitudes(self) -> dict[str, Tensor]:
        """Singular values at every bond (modes up to it against the others), in float64."""
        lefts = self._left_triangles()
        right, scale = lefts[0][0].new_ones((1, 1)), lefts[0][0].new_zeros(())
        values: dict[str, Tensor] = {}
        for bond in range(self.order - 1, 0, -1):
            core = cast(Tensor, self._chains()[bond]()).double()
            right, extra = _triangle((core @ right.T).flatten(1).T)
            scale = scale + extra
            left, log_scale = lefts[bond - 1]
            values[f"bond {bond}"] = torch.linalg.svdvals(left @ right.T) * (log_scale + scale).exp()
        return dict(reversed(values.items()))

    def cuts(self) -> tuple[tuple[int, ...], ...]:
        """Modes up to every bond."""
        return tuple(tuple(range(bond)) for bond in range(1, self.order))

    def _chains(self) -> list[Chain]:
        return [cast(Chain, chain) for chain in self.chains]

    def _left_triangles(self) -> list[tuple[Tensor, Tensor]]:
        """For every core the triangular factor of all up to it, and the logarithm of what it was divided by."""
        triangles = []
        triangle, scale = torch.ones((1, 1), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for core in self.factors:
            triangle, extra = _triangle(
                (triangle.to(core.device) @ core.double().flatten(1)).reshape(-1, core.shape[2])
            )
            scale = scale.to(core.device) + extra
            triangles.append((triangle, scale))
        return triangles

    def _multiply(self, slices: Iterable[Tensor]) -> Tensor:
        """Products ``(B,)`` of matrices ``(B, r_{n-1}, r_n)``."""
        row: Tensor | None = None
        log_scale: Tensor | None = None
        for matrix in slices:
            row = matrix if row is None else torch.bmm(row, matrix)
            if self.order >= LARGE_ORDER:
                row, more = divided(row, (1, 2))
                log_scale = more.log() if log_scale is None else log_scale + more.log()
        assert row is not None
        return (row if log_scale is None else row * log_scale.exp()).flatten()


def _triangle(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The triangular factor, of largest entry 1, and the logarithm of what it was divided by."""
    triangle = torch.linalg.qr(matrix, mode="r")[1]
    scaled, scale = divided(triangle)
    return scaled, scale.log()
