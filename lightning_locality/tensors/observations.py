"""What is known of a tensor: some of its entries, or its inner products with rank-one tensors."""

from __future__ import annotations

__all__ = ["Entries", "Observations", "RankOne", "RecoveryBatch"]

from typing import NamedTuple

from torch import Tensor


class Entries(NamedTuple):
    """Entries of a tensor of order N (completion).

    Args:
        indices: ``(M, N)``, any integer type.
        values: ``(M,)``.
    """

    indices: Tensor
    values: Tensor


class RankOne(NamedTuple):
    r"""Inner products with rank-one tensors :math:`\bigotimes_n x^n` (sensing).

    Args:
        vectors: One ``(M, D_n)`` per mode.
        values: ``(M,)``.
    """

    vectors: tuple[Tensor, ...]
    values: Tensor


Observations = Entries | RankOne


class RecoveryBatch(NamedTuple):
    """A recovery problem as a whole: the batch of every training step.

    Args:
        train: What the factorisation is fitted to.
        test: What it has to predict; None for none.
        target: The whole tensor, where it is known and small enough to be written out; None otherwise.
    """

    train: Observations
    test: Observations | None
    target: Tensor | None
