"""Matrix completion in which lowering the rank makes the unobserved entry grow without bound."""

from __future__ import annotations

__all__ = ["UnboundedCompletion", "lower_bound"]

import math
from typing import final

import torch

from lightning_locality.datamodules.tensor_recovery import AbstractRecoveryDataModule
from lightning_locality.tensors.factorization import Entries, RecoveryBatch


@final
class UnboundedCompletion(AbstractRecoveryDataModule):
    r"""A 2x2 matrix with one entry missing, in which gradient flow lowers the rank while every norm diverges.

    .. math::
        W = \begin{pmatrix} ? & z \\ z' & \epsilon \end{pmatrix}, \qquad
        W = \begin{pmatrix} ? & z & \\ z' & \epsilon & \\ & & I \end{pmatrix}

    The determinant of a product of square matrices never changes its sign under gradient flow. If it starts with
    :attr:`determinant_sign`, the sign that no exact solution with :math:`\epsilon = 0` has, the missing entry must
    grow as the loss falls, see :func:`lower_bound`, while the effective rank approaches its infimum. Larger problems
    have ones on the rest of the diagonal, and all entries but one are observed.

    Source: Implicit Regularization in Deep Learning May Not Be Explainable by Norms (Noam Razin, Nadav Cohen, 2020),
    larger matrices with an identity block included. Extending the block by zeros in matrices that are not square,
    which have no determinant and no bound, is ours.

    Args:
        rows: Rows of the matrix.
        cols: Columns of the matrix.
        z: Observed entry in the row of the missing one. Published perturbed problems: z, z' = -2, 0.5.
        z_prime: Observed entry in the column of the missing one.
        eps: Observed entry opposite the missing one. Published perturbed problems: 0, 0.01, 0.05, 0.1, 0.5.
        unobserved: Row and column of the missing entry, each 0 or 1.
        epoch_length: Training steps per epoch of Lightning.

    Raises:
        ValueError: A number is out of range or not finite.

    Example:
        >>> data = UnboundedCompletion()
        >>> data.determinant_sign, data.problem.train.indices.tolist(), data.problem.train.values.tolist()
        (1, [[0, 1], [1, 0], [1, 1]], [1.0, 1.0, 0.0])
    """

    def __init__(
        self,
        rows: int = 2,
        cols: int = 2,
        z: float = 1.0,
        z_prime: float = 1.0,
        eps: float = 0.0,
        unobserved: tuple[int, int] = (0, 0),
        epoch_length: int = 40,
    ) -> None:
        super().__init__(epoch_length)
        for argument, size in (("rows", rows), ("cols", cols)):
            if size < 2:
                raise ValueError(f"{argument} must be at least 2, got {size}")
        for argument, value in (("z", z), ("z_prime", z_prime), ("eps", eps)):
            if not math.isfinite(value):
                raise ValueError(f"{argument} must be finite, got {value}")
            if value == 0 and argument != "eps":
                raise ValueError(f"{argument} must not be 0: the missing entry would have no reason to grow")
        if len(unobserved) != 2 or not set(unobserved) <= {0, 1}:
            raise ValueError(
                f"unobserved must be a row and a column of the upper left 2x2 block (each 0 or 1), got {unobserved}"
            )
        self.save_hyperparameters(logger=False)
        self.shape = (rows, cols)
        self.z, self.z_prime, self.eps = z, z_prime, eps
        self.unobserved = (unobserved[0], unobserved[1])

    @property
    def determinant_sign(self) -> int:
        """Sign of the determinant with which the missing entry grows without bound; only for square matrices."""
        if self.shape[0] != self.shape[1]:
            raise ValueError(f"a matrix of {self.shape[0]} rows and {self.shape[1]} columns has no determinant")
        row, col = self.unobserved
        return 1 if (self.z * self.z_prime > 0) == (row == col) else -1

    def build(self) -> RecoveryBatch:
        """Build the observed entries; there is no unique matrix to recover, and nothing to predict."""
        row, col = self.unobserved
        matrix = torch.eye(*self.shape, dtype=torch.float64)
        matrix[row, 1 - col] = self.z
        matrix[1 - row, col] = self.z_prime
        matrix[1 - row, 1 - col] = self.eps
        seen = torch.ones(self.shape, dtype=torch.bool)
        seen[row, col] = False
        return RecoveryBatch(Entries(seen.nonzero(), matrix[seen]), None, None)


def lower_bound(loss: float, z: float = 1.0, z_prime: float = 1.0, eps: float = 0.0, *, larger: bool = False) -> float:
    r"""Lower bound of the missing entry of :class:`UnboundedCompletion` at a given loss.

    .. math::
        |w| \ge \frac{(|z| - q)(|z'| - q)}{|\epsilon| + q}, \qquad q = \sqrt{2 \ell}

    It holds for every square matrix whose determinant has the sign ``determinant_sign`` and whose loss is below
    :math:`\min(z^2, z'^2) / 2`: no observed entry is off by more than q, and by the determinant of the 2x2 block the
    product of the missing entry and the one opposite exceeds the product of the others.

    Larger matrices: :math:`\det W = \det D \cdot \det(A - B D^{-1} C)`, where D is the identity up to q, so the same
    holds for the 2x2 matrix in brackets, whose entries differ from those of A by at most
    :math:`s = q^2 / (2 (1 - q))`. So q becomes q + s, and s is subtracted in the end.

    Source: the order of growth is that of Implicit Regularization in Deep Learning May Not Be Explainable by Norms
    (Noam Razin, Nadav Cohen, 2020); this elementary bound and the one for larger matrices are ours.

    Args:
        loss: Half the sum of the squared residuals, :math:`\ell \ge 0`.
        z: As for :class:`UnboundedCompletion`.
        z_prime: Likewise.
        eps: Likewise.
        larger: Whether the matrix is larger than 2x2.

    Returns:
        The bound; 0 if the loss is too large for one, infinity at loss 0 with eps 0.

    Raises:
        ValueError: A negative loss.

    Example:
        >>> [round(lower_bound(loss), 1) for loss in (1.0, 1e-2, 1e-3, 1e-4)]
        [0.0, 5.2, 20.4, 68.7]
    """
    if not loss >= 0:
        raise ValueError(f"loss must be at least 0, got {loss}")
    off, through = math.sqrt(2 * loss), 0.0
    if larger:
        if off >= 1:
            return 0.0
        through = off * off / (2 * (1 - off))
        off += through
    if off >= min(abs(z), abs(z_prime)):
        return 0.0
    opposite = abs(eps) + off
    return max((abs(z) - off) * (abs(z_prime) - off) / opposite - through, 0.0) if opposite else math.inf
