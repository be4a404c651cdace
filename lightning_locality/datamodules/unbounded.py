"""Matrix completion in which lowering the rank makes the unobserved entry grow without bound."""

from __future__ import annotations

__all__ = ["UnboundedCompletion", "lower_bound"]

from typing import final

import torch

from lightning_locality.datamodules.tensor_recovery import AbstractRecoveryDataModule
from lightning_locality.tensors.deep_matrix import lower_bound
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
    have ones on the rest of the diagonal; all entries but one are observed. Matrices that are not square have no
    determinant and no bound.

    Source: Implicit Regularization in Deep Learning May Not Be Explainable by Norms (Noam Razin, Nadav Cohen, 2020),
    square matrices of any size; others are ours.

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
            if value == 0 and argument != "eps":
                raise ValueError(f"{argument} must not be 0: the missing entry would have no reason to grow")
        if not set(unobserved) <= {0, 1}:
            raise ValueError(f"unobserved must be a row and a column of the 2x2 block (each 0 or 1), got {unobserved}")
        self.save_hyperparameters(logger=False)
        self.shape = (rows, cols)
        self.z, self.z_prime, self.eps = float(z), float(z_prime), float(eps)
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
