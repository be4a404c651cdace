"""Tucker factorisation: a core and one matrix per mode."""

from __future__ import annotations

__all__ = ["Tucker"]

from collections.abc import Sequence
from typing import Literal, cast, final

import torch
from torch import Tensor, nn

from lightning_locality.tensors.balance import balance_cyclically, balance_neighbours
from lightning_locality.tensors.chain import Chain, zeros
from lightning_locality.tensors.factorization import Factorization, InitOf, divided, per_mode


@final
class Tucker(Factorization):
    r"""A core tensor, multiplied by a matrix in every mode.

    .. math:: \mathcal W = \mathcal G \times_1 V_1 \times_2 V_2 \cdots \times_N V_N

    At depth 2 or more every column of :math:`V_n` is a :class:`Chain`. With :math:`G_{(n)}` the core with mode n as
    rows, gradient flow conserves :math:`V_n^\top V_n - G_{(n)} G_{(n)}^\top` at depth 1 and its diagonal at larger
    depths, where the norm of one factor of the chain stands for that of the column. Further arguments, and errors, are
    those of :class:`Factorization`.

    Args:
        shape: Sizes of the modes D_n.
        rank: Sizes of the core, one number or one per mode; None for ``shape``, which constrains nothing.
        depth: Factors of every column of V_n: one number, or one per mode.
        init: ``"normal"``; ``"balanced"``: the same, moved to a balanced point of its tensor; ``"slices"``: a normal
            core, and normal factors of column j of V_n, scaled to the norm of slice j of the core in mode n (the
            authors' code for deep Tucker), where ``init_scale`` is that of the core.

    Example:
        >>> Tucker((3, 4, 5), rank=2).core.shape
        torch.Size([2, 2, 2])
    """

    def __init__(
        self,
        shape: Sequence[int],
        rank: int | Sequence[int] | None = None,
        depth: int | Sequence[int] = 1,
        init: Literal["normal", "balanced", "slices"] = "normal",
        init_scale: float = 1e-2,
        init_of: InitOf = "weights",
        init_mean: float = 0.0,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(shape)
        self.rank = per_mode("rank", self.shape if rank is None else rank, self.order)
        self.depth = per_mode("depth", depth, self.order)
        self.degree = 1 + sum(self.depth)
        self._slices = init == "slices"
        self.core = zeros(*self.rank)
        self.chains = nn.ModuleList(map(Chain, zip(self.shape, self.rank, strict=True), self.depth))
        self._initialize(init, init_scale, init_of, init_mean, seed, dtype, device)

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The matrices ``(D_n, R_n)``."""
        return tuple(chain() for chain in self.chains)

    def to_tensor(self) -> Tensor:
        """The core times the matrices, mode by mode."""
        return _multiply(self.core, self.factors)

    def entries(self, indices: Tensor) -> Tensor:
        """Entries ``(B,)`` at ``(B, N)``: the core times rows of the matrices."""
        self._check_indices(indices)
        rows = zip(indices.long().T, self.factors, strict=True)
        return self._contract([nn.functional.embedding(index, factor) for index, factor in rows])

    def inner(self, vectors: Sequence[Tensor] | Tensor) -> Tensor:
        """Inner products ``(B,)``: the core times the vectors in the matrices' columns."""
        return self._contract([x @ v for x, v in zip(self._split_vectors(vectors), self.factors, strict=True)])

    def log_norm(self) -> Tensor:
        """Of the core times the triangular factors of the matrices; in float64."""
        log_scale = self.core.new_zeros((), dtype=torch.float64)
        scaled = []
        for weight in (self.core, *self.factors):
            values, scale = divided(weight.double())
            scaled.append(values)
            log_scale = log_scale + scale.log()
        triangles = [v if v.shape[0] <= v.shape[1] else torch.linalg.qr(v)[1] for v in scaled[1:]]
        return cast(Tensor, _multiply(scaled[0], triangles).norm().log() + log_scale)

    @torch.no_grad()
    def balance_(self) -> None:
        """Balance one mode after the other until nothing moves; each mode exactly, all of them in the limit."""
        core = self.core.double()
        factors = [factor.double() for factor in self.factors]

        def sweep() -> float:
            nonlocal core
            largest = 0.0
            for mode, depth in enumerate(self.depth):
                unfolded = core.movedim(mode, 0).flatten(1)
                columns, slices = factors[mode].norm(dim=0), unfolded.norm(dim=1)
                squares = columns.pow(1 / depth).square(), slices.square()
                pair, norms = (factors[mode], unfolded), (columns[None], slices[None])
                factors[mode], unfolded, imbalance = balance_neighbours(*pair, norms, (depth, 1), squares)
                core = unfolded.reshape(-1, *(r for m, r in enumerate(self.rank) if m != mode)).movedim(0, mode)
                largest = max(largest, imbalance)
            return largest

        balance_cyclically(sweep)
        self.core.copy_(core)
        for chain, matrix in zip(self._chains(), factors, strict=True):
            if chain.depth == 1:
                chain.vectors.copy_(matrix)
            else:
                chain.balance_(matrix.norm(dim=0).log().to(self.core))

    def unbalancedness(self) -> Tensor:
        """Largest Frobenius norm of the quantities conserved in a mode or a chain; in float64."""
        gaps = []
        for mode, chain in enumerate(self._chains()):
            unfolded = self.core.double().movedim(mode, 0).flatten(1)
            if chain.depth == 1:
                matrix = chain().double()
                gaps.append((matrix.T @ matrix - unfolded @ unfolded.T).norm())
            else:
                norms = torch.cat([chain.squared_norms(), unfolded.square().sum(1)[None]])
                gaps += [(norms.amax(0) - norms.amin(0)).max(), chain.unbalancedness()]
        return torch.stack(gaps).max()

    def magnitudes(self) -> dict[str, Tensor]:
        """For every mode, norms of the slices of the core times those of the columns that multiply them."""
        magnitudes = {}
        for mode, factor in enumerate(self.factors):
            slices = self.core.double().movedim(mode, 0).flatten(1).norm(dim=1)
            magnitudes[f"mode {mode}"] = (slices * factor.double().norm(dim=0)).sort(descending=True).values
        return magnitudes

    def cuts(self) -> tuple[tuple[int, ...], ...]:
        """Single modes."""
        return tuple((mode,) for mode in range(self.order if self.order > 2 else self.order - 1))

    def _contract(self, vectors: Sequence[Tensor]) -> Tensor:
        """The core times one vector ``(B, R_n)`` per mode."""
        partial = vectors[0] @ self.core.flatten(1) if self.order > 1 else vectors[0] * self.core
        for vector in vectors[1:]:
            partial = torch.bmm(vector.unsqueeze(1), partial.reshape(*vector.shape, -1)).squeeze(1)
        return partial.sum(1)

    def _sample(self, generator: torch.Generator, mean: float, deviation: float) -> None:
        super()._sample(generator, mean, deviation)
        if not self._slices:
            return
        for mode, chain in enumerate(self._chains()):
            slices = self.core.movedim(mode, 0).flatten(1).norm(dim=1)
            chain.vectors.mul_(slices / chain.vectors.norm(dim=0))
            if chain.matrices is not None:
                chain.matrices.mul_((slices / chain.matrices.norm(dim=(-2, -1)))[..., None, None])


def _multiply(core: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Multiply the core by a matrix in every mode; each product moves its mode from the front to the back."""
    for matrix in matrices:
        core = (matrix @ core.reshape(matrix.shape[1], -1)).T
    return core.reshape([matrix.shape[0] for matrix in matrices])
