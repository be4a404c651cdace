"""Factors whose columns are chains of square matrices applied to a vector."""

from __future__ import annotations

__all__ = ["Chain", "zeros"]

import math
from contextlib import suppress
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

MAX_WEIGHTS = 2**31  # of a parameter


def zeros(*shape: int) -> nn.Parameter:
    """Weights of zero in float64; ValueError if there is no memory for them."""
    with suppress(RuntimeError):  # no memory
        if (count := math.prod(shape)) <= MAX_WEIGHTS:
            return nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    size = " x ".join(map(str, shape))
    raise ValueError(f"weights of {size} would take {count >> 27:,} GiB: lower shape, rank, widths, hidden or depth")


class Chain(nn.Module):
    r"""A matrix of weights, each column of which is over-parameterised by a chain of square matrices.

    .. math:: v_r = A_{r,1} A_{r,2} \cdots A_{r,k} u_r, \qquad k = \text{depth} - 1

    At depth 1 the columns are the parameters themselves. One chain per column is the parameterisation of the authors'
    code for deep Tucker (Hariz, Kadri, Ayache, Moakher, Artières, 2024); for CP it is our reading of *Implicit
    Regularization with Polynomial Growth in Deep Tensor Factorization* (the same, 2022), and for tensor trains and
    local components our choice (results/deep_depth/README.md).

    Gradient flow conserves :math:`A_j^\top A_j - A_{j+1} A_{j+1}^\top` (with :math:`A_{k+1} = u`) in every chain. If
    these are zero, every matrix of the chain has rank one and the norm of u.

    Args:
        shape: ``(..., D, R)``: R columns of length D, for any number of factors.
        depth: Factors per column, at least 1.
    """

    matrices: Tensor | None

    def __init__(self, shape: tuple[int, ...], depth: int = 1) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth must be at least 1 (the factor itself), got {depth}")
        self.depth = depth
        *batch, size, columns = shape
        self.vectors = zeros(*shape)
        if depth == 1:
            self.register_parameter("matrices", None)
        else:
            self.matrices = zeros(depth - 1, *batch, columns, size, size)

    def forward(self) -> Tensor:
        """The columns ``(..., D, R)``."""
        columns: Tensor = self.vectors
        if self.matrices is not None:
            for matrix in self.matrices.flip(0):
                columns = torch.einsum("...cij,...jc->...ic", matrix, columns)
        return columns

    @torch.no_grad()
    def balance_(self, log_norms: Tensor) -> None:
        r"""Balance the chains: keep the directions of the columns, and set logarithms of their norms ``(..., R)``.

        :math:`A_j \leftarrow s\, a_{j-1} a_j^\top`, :math:`u \leftarrow s\, a_k` with :math:`a_j` the directions of
        :math:`A_{j+1} \cdots A_k u` and s the depth-th root of the norm. Columns that are zero become zero chains.
        """
        scale = (log_norms.double() / self.depth).exp().unsqueeze(-2)
        partial = [self.vectors.double()]
        if self.matrices is not None:
            for matrix in self.matrices.flip(0):
                # unit length at every step: a product of many small matrices would underflow
                partial.append(torch.einsum("...cij,...jc->...ic", matrix.double(), _directions(partial[-1])))
        directions = [_directions(vector) for vector in partial]
        scale = torch.where(directions[-1].any(-2, keepdim=True), scale, 0.0)
        self.vectors.copy_(scale * directions[0])
        if self.matrices is not None:
            for place, (right, left) in enumerate(pairwise(directions)):
                self.matrices[-1 - place].copy_(torch.einsum("...ic,...jc->...cij", scale * left, right))

    def log_norms(self) -> Tensor:
        """Logarithms of the norms of the columns ``(..., R)``, in float64; -inf for zero."""
        return cast(Tensor, self().double().norm(dim=-2).log())

    def squared_norms(self) -> Tensor:
        """Squared norms ``(depth, ..., R)`` of the factors of every column (differences are conserved); float64."""
        norms = [self.vectors.double().square().sum(-2)]
        if self.matrices is not None:
            norms += self.matrices.double().square().sum((-2, -1)).unbind(0)
        return torch.stack(norms)

    def unbalancedness(self) -> Tensor:
        """Largest Frobenius norm of the quantities conserved inside a chain, in float64; 0 at depth 1."""
        last = self.vectors.double().transpose(-2, -1)
        if self.matrices is None:
            return last.new_zeros(())
        matrices = self.matrices.double()
        outer = (last.unsqueeze(-1) * last.unsqueeze(-2)).unsqueeze(0)
        right = torch.cat([matrices[1:] @ matrices[1:].transpose(-2, -1), outer])
        return cast(Tensor, (matrices.transpose(-2, -1) @ matrices - right).norm(dim=(-2, -1)).max())


def _directions(vectors: Tensor) -> Tensor:
    """Divide columns by their lengths; zero columns stay zero."""
    # by the largest entry first, so that squares do not underflow
    largest = vectors.abs().amax(-2, keepdim=True)
    scaled = vectors / torch.where(largest > 0, largest, 1.0)
    lengths: Tensor = scaled.norm(dim=-2, keepdim=True)
    return scaled / torch.where(lengths > 0, lengths, 1.0)
