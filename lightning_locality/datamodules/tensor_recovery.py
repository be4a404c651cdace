"""Tensor recovery: completion and sensing of a tensor of low rank."""

from __future__ import annotations

__all__ = ["AbstractRecoveryDataModule", "TargetFormat", "TensorRecovery", "planted_tensor"]

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import repeat
from typing import Any, Literal, final

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor

from lightning_locality.arguments import Checked, checked
from lightning_locality.datamodules.base import seeded_generator
from lightning_locality.tensors.cp import CP
from lightning_locality.tensors.deep_matrix import DeepMatrix
from lightning_locality.tensors.factorization import (
    Entries,
    Factorization,
    Observations,
    RankOneMeasurements,
    RecoveryBatch,
    per_mode,
)
from lightning_locality.tensors.hierarchical import HierarchicalTensorFactorization
from lightning_locality.tensors.mode_tree import ModeTree, node_name
from lightning_locality.tensors.tensor_train import TensorTrain
from lightning_locality.tensors.tucker import Tucker

TargetFormat = Literal["matrix", "cp", "tucker", "tt", "ht"]

# 4096 entries each; those of matrices, cp and ht are the published ones
_SHAPES: dict[str, tuple[int, ...]] = {"matrix": (64, 64), "ht": (8, 8, 8, 8)}
# entries of the largest tensor that is formed: 128 MiB in float64
_MAX_DENSE = 2**24


class RepeatedBatch:
    """A loader that yields one batch, always the same object, ``steps`` times."""

    def __init__(self, batch: RecoveryBatch, steps: int) -> None:
        self.batch, self.steps = batch, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[RecoveryBatch]:
        return repeat(self.batch, self.steps)


class AbstractRecoveryDataModule(Checked, LightningDataModule, ABC):
    """A recovery problem, which is a single batch that stays on the device.

    A training step is cheaper than moving the data, so :attr:`problem` is built once, moved once, and yielded as the
    same object in every step; the model decides how many iterations a step takes and how many observations each uses.
    Validation and test yield it once. It cannot be split over processes.

    Args:
        epoch_length: Training steps per epoch of Lightning, at whose end checkpoints are written.

    Raises:
        ValueError: ``epoch_length`` is below 1, or the Trainer has several processes.
    """

    def __init__(self, epoch_length: int = 40) -> None:
        super().__init__()
        if epoch_length < 1:
            raise ValueError(f"epoch_length must be at least 1 training step, got {epoch_length}")
        self.epoch_length = epoch_length
        self._moved: tuple[torch.device, RecoveryBatch] | None = None

    @abstractmethod
    def build(self) -> RecoveryBatch:
        """Build the problem on the CPU, the same one every time."""

    @cached_property
    def problem(self) -> RecoveryBatch:
        """The problem, on the CPU, built on first use."""
        return self.build()

    def setup(self, stage: str | None = None) -> None:
        """Build the problem, which is the same for all stages."""
        if self.trainer is not None and self.trainer.world_size > 1:
            got = f"the Trainer has {self.trainer.world_size} processes"
            raise ValueError(f"{got}: a recovery problem is one batch, so pass devices=1 (trainer.devices: 1)")
        _ = self.problem

    def train_dataloader(self) -> RepeatedBatch:
        """The problem, ``epoch_length`` times."""
        return RepeatedBatch(self.problem, self.epoch_length)

    def val_dataloader(self) -> RepeatedBatch:
        """The problem, once."""
        return RepeatedBatch(self.problem, 1)

    test_dataloader = val_dataloader

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The problem on the device, moved there by the first call."""
        if not isinstance(batch, RecoveryBatch):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        if self._moved is None or self._moved[0] != device:
            # not the given batch: at some precisions Lightning has converted it to a new one
            moved = super().transfer_batch_to_device(self.problem, device, dataloader_idx)
            self._moved = (device, moved)
        return self._moved[1]


@checked
def planted_tensor(
    target: TargetFormat,
    shape: Sequence[int],
    rank: int | Sequence[int],
    tree: ModeTree | None = None,
    norm: float = 1.0,
    seed: int = 0,
) -> Factorization:
    r"""Sample a tensor of given rank and Frobenius norm: all weights N(0, 1), then scaled by one number.

    The factorisation is in float64 on the CPU, without gradients. With probability one, ``rank`` is exactly the rank of
    the matrix, of the Tucker matricisations or of the bonds of the tensor train; it bounds the CP rank; and it is the
    number of local components of a hierarchical tensor, which bounds the ranks at the children of their nodes.

    Source: the laws for ``matrix`` (:math:`U V^\top`), ``cp`` and ``ht`` are those of the paper of 2022 named at
    :class:`TensorRecovery`, which has the same arguments. Using the same rule for ``tucker`` and ``tt`` is ours.

    Raises:
        ValueError: A rank that no tensor of this shape has or needs, a tree of another order, or no positive norm.
    """
    if len(shape) == 0 or min(shape) < 1:
        raise ValueError(f"shape must hold sizes of at least 1, got {tuple(shape)}")
    order = len(shape)
    if tree is not None and target != "ht":
        raise ValueError(f"tree belongs to target 'ht', got one with target {target!r}: omit it")
    law: dict[str, Any] = {"init_scale": 1.0, "seed": seed, "dtype": torch.float64, "device": "cpu"}
    planted: Factorization
    match target:
        case "matrix" | "cp":
            if target == "matrix" and order != 2:
                raise ValueError(f"shape of target 'matrix' must hold 2 sizes, got {tuple(shape)}")
            (number,) = per_mode("rank", rank, 1)
            _check("rank", number, math.prod(shape) // max(shape))
            planted = CP(shape, number, **law) if target == "cp" else DeepMatrix(shape, 2, number, **law)
        case "tucker":
            ranks = per_mode("rank", rank, order)
            for mode, here in enumerate(ranks):
                _check(f"rank of mode {mode}", here, min(shape[mode], math.prod(ranks) // here))
            planted = Tucker(shape, ranks, **law)
        case "tt":
            bonds = (1, *per_mode("rank", rank, order - 1), 1)
            for bond in range(1, order):
                left, right = bonds[bond - 1] * shape[bond - 1], bonds[bond + 1] * shape[bond]
                _check(f"rank of bond {bond}", bonds[bond], min(left, right))
            planted = TensorTrain(shape, bonds[1:-1], **law)
        case "ht":
            tree = ModeTree.perfect(order) if tree is None else tree
            if tree.order != order:
                raise ValueError(f"tree has {tree.order} modes, shape has {order} sizes: give a tree of that order")
            widths = _widths(tree, shape, rank)
            planted = HierarchicalTensorFactorization(tree, shape, widths, **law)
    planted.normalize_(norm)
    return planted.requires_grad_(False)


def _check(name: str, value: int, largest: int) -> None:
    if value > largest:
        why = "more adds nothing with this shape and the other ranks"
        raise ValueError(f"{name} must be at most {largest}: {why}, got {value}")


def _widths(tree: ModeTree, shape: Sequence[int], rank: int | Sequence[int]) -> dict[tuple[int, ...], int]:
    """Number of local components, which are a CP decomposition over children and parent, of every interior node."""
    ranks = per_mode("rank", rank, len(tree.levels))
    widths = {node: width for level, width in zip(tree.levels, ranks, strict=True) for node in level}
    for node, width in widths.items():
        sizes = [1 if node == tree.root else widths[tree.parent(node)]]
        for child in tree.children(node):
            entries = math.prod(shape[mode] for mode in child)
            # the vectors of a child span at most as many dimensions as it has components
            sizes.append(min(entries, widths.get(child, entries)))
        _check(f"rank at node {node_name(node)}", width, math.prod(sizes) // max(sizes))
    return widths


@final
class TensorRecovery(AbstractRecoveryDataModule):
    r"""Recover a tensor of low rank from some of its entries, or from inner products with rank-one tensors.

    Completion: ``observations`` entries, sampled uniformly without replacement, are the training set, all others
    the test set. Sensing: inner products :math:`\langle \bigotimes_n x^n, W^* \rangle` with vectors of independent
    entries N(0, 1) / (number of entries)^(1 / 2N), which give the loss the scale that it has in completion, and as many
    new ones for the test. The target is that of :func:`planted_tensor`; all is determined by the arguments, up to
    rounding. A tensor of more than 2^24 entries is never formed: it has no :attr:`target_tensor`, and its test set in
    completion is no larger than the training set.

    The defaults are published: 4096 entries (64x64, 16x16x16 or 8x8x8x8), half of them observed, rank 5, norm 64.
    Source: Implicit Regularization in Hierarchical Tensor Factorization and Deep Convolutional Neural Networks (Noam
    Razin, Asaf Maman, Nadav Cohen, 2022) and, with norm 1, Implicit Regularization in Tensor Factorization (the same,
    2021). Their matrix sensing uses dense Gaussian matrices, ours rank-one tensors of any order. Targets of low Tucker
    and tensor-train rank and the noise are ours.

    Args:
        target: Format in which the target has low rank.
        shape: Sizes of the modes; the default is the published one of the format (16x16x16 for ``tucker``, ``tt``).
        rank: A number, or one for each mode of ``tucker``, bond of ``tt`` or level of ``ht`` from the bottom up.
        tree: Mode tree of ``ht``, or its interior nodes; None for the perfect binary one that merges neighbours.
        norm: Frobenius norm of the target; None for the square root of the number of entries.
        task: ``completion`` or ``sensing``.
        observations: Training observations; None for half the number of entries, up to 2^24 of them.
        noise: Standard deviation of the noise on each training value; test values are exact.
        seed: Seed of the target, the observations and the noise.
        epoch_length: Training steps per epoch of Lightning.

    Raises:
        ValueError: More observations than entries, a tree of another order, or ranks, sizes or numbers out of range.

    Example:
        >>> target = TensorRecovery(target="matrix", seed=0).target_tensor
        >>> target.shape, round(target.norm().item(), 10), torch.linalg.matrix_rank(target).item()
        (torch.Size([64, 64]), 64.0, 5)
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
        # checkpoints are loaded with weights_only, which accepts lists but no tree
        tree = None if tree is None else [list(node) for node in tree]
        # not logged: Lightning rejects a hyper-parameter that the model has under the same name
        self.save_hyperparameters(logger=False)
        if noise < 0:
            raise ValueError(f"noise must be a standard deviation of at least 0, got {noise}")
        self.shape = _SHAPES.get(target, (16, 16, 16)) if shape is None else tuple(shape)
        self.entries = math.prod(self.shape)
        self.task, self.noise, self.seed = task, noise, seed
        if self.entries > 1e300:
            have = f"{len(self.shape)} modes and more than 1e300 entries"
            raise ValueError(f"shape has {have}, whose norm no float can hold: take fewer modes")
        norm = math.sqrt(max(self.entries, 1)) if norm is None else norm
        # hashed, or the target would consist of the numbers that a model of the same seed starts from
        hashed = seeded_generator(seed, "target").initial_seed()
        self.planted = planted_tensor(target, self.shape, rank, None if tree is None else ModeTree(tree), norm, hashed)
        if observations is None and self.entries > _MAX_DENSE:
            half = f"half of the {float(self.entries):.3g} entries of this shape"
            raise ValueError(f"observations must be given: {half} are too many")
        self.observations = max(self.entries // 2, 1) if observations is None else observations
        if self.observations < 1:
            raise ValueError(f"observations must be at least 1, got {observations}")
        if task == "completion" and self.observations > self.entries:
            most = f"the {self.entries} entries of shape {self.shape}"
            raise ValueError(f"observations={observations} are more than {most}: lower it, or take task='sensing'")

    @property
    def target_tensor(self) -> Tensor | None:
        """The tensor to be recovered, float64; None if it has more than 2^24 entries."""
        return self.problem.target

    def build(self) -> RecoveryBatch:
        """Build the target in float64, noisy observations for training, and exact ones for the test."""
        target = self.planted.to_tensor().contiguous() if self.entries <= _MAX_DENSE else None
        train: Observations
        test: Observations | None
        train, test = self._complete() if self.task == "completion" else (self._sense("train"), self._sense("test"))
        if self.noise:
            generator = seeded_generator(self.seed, "noise")
            noise = torch.randn(self.observations, dtype=torch.float64, generator=generator)
            train = train._replace(values=train.values + self.noise * noise)
        return RecoveryBatch(train, test, target)

    def _complete(self) -> tuple[Entries, Entries | None]:
        generator = seeded_generator(self.seed, "entries")
        left = self.entries - self.observations
        held = left if self.entries <= _MAX_DENSE else min(left, self.observations)
        count, distinct = self.observations + held, None
        if self.entries > max(_MAX_DENSE, 4 * count):
            distinct = _distinct_indices(self.shape, count, generator)
        order = torch.randperm(self.entries if distinct is None else count, generator=generator)[:count]
        # in memory order, since a full batch has no order of its own
        parts = [part.sort().values for part in (order[: self.observations], order[self.observations :])]
        if distinct is None:
            indices = [torch.stack(torch.unravel_index(part, self.shape), dim=1) for part in parts]
        else:
            indices = [distinct[part] for part in parts]
        train, test = (Entries(part, self.planted.entries(part)) for part in indices)
        return train, test if held else None

    def _sense(self, split: str) -> RankOneMeasurements:
        generator = seeded_generator(self.seed, "vectors", split)
        scale = self.entries ** (-0.5 / len(self.shape))
        sizes = [(self.observations, size) for size in self.shape]
        vectors = tuple(scale * torch.randn(size, dtype=torch.float64, generator=generator) for size in sizes)
        return RankOneMeasurements(vectors, self.planted.inner(vectors))


def _distinct_indices(shape: Sequence[int], count: int, generator: torch.Generator) -> Tensor:
    """Sample indices ``(count, N)`` of different entries of a much larger tensor, in memory order."""
    # bytes if they suffice: an order of thousands makes long rows
    dtype = torch.uint8 if max(shape) <= 256 else torch.int64
    found = torch.empty(0, len(shape), dtype=dtype)
    while len(found) < count:
        missing = count - len(found)
        more = [torch.randint(size, (missing,), dtype=dtype, generator=generator) for size in shape]
        found = torch.unique(torch.cat([found, torch.stack(more, dim=1)]), dim=0)
    return found
