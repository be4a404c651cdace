"""Completion and sensing of a planted low-rank tensor."""

from __future__ import annotations

__all__ = ["TensorRecovery"]

import math
from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor

from lightning_locality.datamodules.base import seeded_generator
from lightning_locality.datamodules.planted import TargetFormat, planted_tensor
from lightning_locality.datamodules.problem import AbstractRecoveryDataModule
from lightning_locality.tensors.mode_tree import ModeTree
from lightning_locality.tensors.observations import Entries, Observations, RankOne, RecoveryBatch

# 4096 entries each; the first, second and last as published
_SHAPES: dict[TargetFormat, tuple[int, ...]] = {
    "matrix": (64, 64),
    "cp": (16, 16, 16),
    "tucker": (16, 16, 16),
    "tt": (16, 16, 16),
    "ht": (8, 8, 8, 8),
}
# entries of the largest tensor that is written out: 128 MiB in float64
_WRITTEN_OUT = 2**24


@final
class TensorRecovery(AbstractRecoveryDataModule):
    r"""Recover a tensor of low rank from some of its entries, or from inner products with rank-one tensors.

    Completion: ``observations`` entries, drawn uniformly without replacement, are the training set, all others
    the test set. Sensing: inner products :math:`\langle \bigotimes_n x^n, W^* \rangle` with vectors of independent
    entries N(0, 1) / (number of entries)^(1 / 2N), and as many new ones for the test; with them the loss has the
    scale that it has in completion. The target is drawn as :func:`planted_tensor` says. Nothing depends on
    anything but the arguments, up to the rounding of another machine.

    The defaults are published: 4096 entries (64x64, 16x16x16 or 8x8x8x8), half of them observed, rank 5, Frobenius
    norm 64.

    A tensor of more than 2^24 entries is never written out: it has no :attr:`target_tensor`, and its test set
    in completion is as large as the training set.

    Source: Implicit Regularization in Hierarchical Tensor Factorization and Deep Convolutional Neural Networks (Noam
    Razin, Asaf Maman, Nadav Cohen, 2022) and, with norm 1, Implicit Regularization in Tensor Factorization (the same,
    2021). Their matrix sensing has dense Gaussian matrices; ours has rank-one ones for all orders. Targets of
    low Tucker and tensor-train rank and the noise are ours.

    Args:
        target: Format that the target has a low rank in.
        shape: Sizes of the modes; the default is the published one of the format (16x16x16 for ``tucker``, ``tt``).
        rank: ``matrix``, ``cp``: a number. ``tucker``: one for all modes or one each. ``tt``: likewise for the
            bonds. ``ht``: one for all levels of interior nodes or one each, from the bottom up.
        tree: Mode tree of ``ht``, or its interior nodes; None for the perfect binary one that merges neighbours.
        norm: Frobenius norm of the target; None for the square root of the number of entries.
        task: ``completion`` or ``sensing``.
        observations: Training observations; None for half the number of entries, up to 2^24 of them.
        noise: Standard deviation of what is added to each training value; test values are exact.
        seed: Of the target, of the observations and of the noise.
        epoch_length: Training steps that Lightning calls an epoch.

    Raises:
        ValueError: More observations than entries, ranks or sizes that make no sense, a tree of another order, or a
            number out of its range.

    Example:
        >>> problem = TensorRecovery(target="matrix", seed=0).problem
        >>> problem.train.indices.shape, problem.test.indices.shape
        (torch.Size([2048, 2]), torch.Size([2048, 2]))
        >>> round(problem.target.norm().item(), 10), torch.linalg.matrix_rank(problem.target).item()
        (64.0, 5)
    """

    def __init__(
        self,
        target: TargetFormat = "ht",
        shape: Sequence[int] | None = None,
        rank: int | Sequence[int] = 5,
        tree: ModeTree | Sequence[Sequence[int]] | None = None,
        norm: float | None = None,
        task: Literal["completion", "sensing"] = "completion",
        observations: int | None = None,
        noise: float = 0.0,
        seed: int = 0,
        epoch_length: int = 40,
    ) -> None:
        super().__init__(epoch_length)
        # checkpoints are read with weights_only, which takes lists but no tree
        tree = None if tree is None else [list(node) for node in tree]
        # not logged: Lightning stops when a model has a hyper-parameter of the same name
        self.save_hyperparameters(logger=False)
        if task not in ("completion", "sensing"):
            raise ValueError(f"task must be 'completion' or 'sensing', got {task!r}")
        if not 0 <= noise < math.inf:
            raise ValueError(f"noise must be a standard deviation of at least 0, got {noise}")
        self.shape = _SHAPES.get(target, ()) if shape is None else tuple(shape)
        self.entries = math.prod(self.shape)
        self.task, self.noise, self.seed = task, noise, seed
        if self.entries > 1e300:
            raise ValueError(
                f"shape has {len(self.shape)} modes and more than 1e300 entries, whose norm no float can hold: "
                "take fewer modes"
            )
        norm = math.sqrt(max(self.entries, 1)) if norm is None else norm
        # hashed, or the target would be made of the numbers that a model of the same seed starts from
        hashed = seeded_generator(seed, "target").initial_seed()
        self.planted = planted_tensor(target, self.shape, rank, None if tree is None else ModeTree(tree), norm, hashed)
        if observations is None and self.entries > _WRITTEN_OUT:
            raise ValueError(
                f"observations must be given: half of the {float(self.entries):.3g} entries of this shape are too many"
            )
        self.observations = max(self.entries // 2, 1) if observations is None else observations
        if self.observations < 1:
            raise ValueError(f"observations must be at least 1, got {observations}")
        if task == "completion" and self.observations > self.entries:
            raise ValueError(
                f"observations={observations} are more than the {self.entries} entries of shape {self.shape}: "
                "lower it, or take task='sensing'"
            )

    @property
    def target_tensor(self) -> Tensor | None:
        """The tensor to be recovered, float64; None where it is too large to be written out."""
        return self.problem.target

    def draw(self) -> RecoveryBatch:
        """The target in float64, and observations of it: noisy ones to learn from, exact ones to be tested with."""
        target = self.planted.to_tensor().contiguous() if self.entries <= _WRITTEN_OUT else None
        train: Observations
        test: Observations | None
        if self.task == "completion":
            train, test = self._complete()
        else:
            train, test = self._sense("train"), self._sense("test")
        if self.noise:
            generator = seeded_generator(self.seed, "noise")
            noise = torch.randn(self.observations, dtype=torch.float64, generator=generator)
            train = train._replace(values=train.values + self.noise * noise)
        return RecoveryBatch(train, test, target)

    def _complete(self) -> tuple[Entries, Entries | None]:
        generator = seeded_generator(self.seed, "entries")
        left = self.entries - self.observations
        held = left if self.entries <= _WRITTEN_OUT else min(left, self.observations)
        if self.entries <= max(_WRITTEN_OUT, 4 * (self.observations + held)):
            flat = torch.randperm(self.entries, generator=generator)[: self.observations + held]
            # in the order of memory; a full batch has none of its own
            parts = [part.sort().values for part in (flat[: self.observations], flat[self.observations :])]
            indices = [torch.stack(torch.unravel_index(part, self.shape), dim=1) for part in parts]
        else:
            drawn = _distinct_indices(self.shape, self.observations + held, generator)
            order = torch.randperm(len(drawn), generator=generator)
            parts = [part.sort().values for part in (order[: self.observations], order[self.observations :])]
            indices = [drawn[part] for part in parts]
        train, test = (Entries(part, self.planted.entries(part)) for part in indices)
        return train, test if held else None

    def _sense(self, split: str) -> RankOne:
        generator = seeded_generator(self.seed, "vectors", split)
        scale = self.entries ** (-0.5 / len(self.shape))
        vectors = tuple(
            scale * torch.randn(self.observations, size, dtype=torch.float64, generator=generator)
            for size in self.shape
        )
        return RankOne(vectors, self.planted.inner(vectors))


def _distinct_indices(shape: Sequence[int], count: int, generator: torch.Generator) -> Tensor:
    """Indices ``(count, N)`` of different entries of a tensor with many more, in the order of memory."""
    # bytes where they suffice: an order of thousands makes long rows
    dtype = torch.uint8 if max(shape) <= 256 else torch.int64
    drawn = torch.empty(0, len(shape), dtype=dtype)
    while len(drawn) < count:
        missing = count - len(drawn)
        more = [torch.randint(size, (missing,), dtype=dtype, generator=generator) for size in shape]
        drawn = torch.unique(torch.cat([drawn, torch.stack(more, dim=1)]), dim=0)
    return drawn
