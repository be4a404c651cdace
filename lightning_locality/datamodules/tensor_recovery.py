"""Completion and sensing of a planted low-rank tensor."""

from __future__ import annotations

__all__ = ["AbstractRecoveryDataModule", "RepeatedBatch", "TargetFormat", "TensorRecovery", "planted_tensor"]

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Literal, final, get_args

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor

from lightning_locality.datamodules.base import seeded_generator
from lightning_locality.tensors.cp import CP
from lightning_locality.tensors.deep_matrix import DeepMatrix
from lightning_locality.tensors.factorization import (
    Entries,
    Factorization,
    Observations,
    RankOne,
    RecoveryBatch,
    per_mode,
)
from lightning_locality.tensors.hierarchical import HierarchicalTensorFactorization
from lightning_locality.tensors.mode_tree import ModeTree, node_name
from lightning_locality.tensors.tensor_train import TensorTrain
from lightning_locality.tensors.tucker import Tucker


@final
class RepeatedBatch:
    """A loader of one batch, the same object at every step.

    Args:
        batch: The batch.
        steps: How often an epoch hands it over.

    Example:
        >>> loader = RepeatedBatch(RecoveryBatch(None, None, None), steps=3)
        >>> len(loader), len({id(batch) for batch in loader})
        (3, 1)
    """

    def __init__(self, batch: RecoveryBatch, steps: int) -> None:
        self.batch, self.steps = batch, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[RecoveryBatch]:
        for _ in range(self.steps):
            yield self.batch


class AbstractRecoveryDataModule(LightningDataModule, ABC):
    """A recovery problem whose every training step gets all of it, already on the device.

    A step of training is cheaper than moving the data, so :attr:`problem` is drawn once, moved once, and handed
    over as one and the same object in all epochs; how many iterations a step makes of it, and of how many
    observations each, is for the model to say. There is nothing to share out: it is for one process. Validation and
    test get the same object, once: it holds what they need.

    Args:
        epoch_length: Training steps that Lightning calls an epoch: checkpoints are written at its end.

    Raises:
        ValueError: ``epoch_length`` is below 1, or the Trainer has several processes.
    """

    def __init__(self, epoch_length: int = 40) -> None:
        super().__init__()
        if epoch_length < 1:
            raise ValueError(f"epoch_length must be at least 1 training step, got {epoch_length}")
        self.epoch_length = epoch_length
        self._problem: RecoveryBatch | None = None
        self._moved: tuple[torch.device, RecoveryBatch] | None = None

    @abstractmethod
    def draw(self) -> RecoveryBatch:
        """The problem, on the CPU: the same whenever it is drawn."""

    @property
    def problem(self) -> RecoveryBatch:
        """The problem, on the CPU, drawn at the first use."""
        if self._problem is None:
            self._problem = self.draw()
        return self._problem

    def setup(self, stage: str | None = None) -> None:
        """Draw the problem.

        Args:
            stage: Of the Trainer; all stages have the same problem.
        """
        if self.trainer is not None and self.trainer.world_size > 1:
            raise ValueError(
                f"the Trainer has {self.trainer.world_size} processes, each of which would do the same work: a "
                "recovery problem is one batch, so pass devices=1 (trainer.devices: 1)"
            )
        _ = self.problem

    def train_dataloader(self) -> RepeatedBatch:
        """The problem, ``epoch_length`` times."""
        return RepeatedBatch(self.problem, self.epoch_length)

    def val_dataloader(self) -> RepeatedBatch:
        """The problem, once."""
        return RepeatedBatch(self.problem, 1)

    def test_dataloader(self) -> RepeatedBatch:
        """The problem, once."""
        return RepeatedBatch(self.problem, 1)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The problem on the device, moved there at the first call."""
        if not isinstance(batch, RecoveryBatch):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        if self._moved is None or self._moved[0] != device:
            # not the batch that was passed: with some precisions Lightning has converted it into a new one
            moved = super().transfer_batch_to_device(self.problem, device, dataloader_idx)
            self._moved = (device, moved)
        return self._moved[1]


TargetFormat = Literal["matrix", "cp", "tucker", "tt", "ht"]


def planted_tensor(
    target: TargetFormat,
    shape: Sequence[int],
    rank: int | Sequence[int],
    tree: ModeTree | None = None,
    norm: float = 1.0,
    seed: int = 0,
) -> Factorization:
    r"""A tensor of given rank and Frobenius norm: all weights N(0, 1), then scaled by one number.

    The ranks are those numbers exactly, with probability one: of the matrix; CP rank at most; of the Tucker
    matricisations; of the tensor train's bonds; or local components of a hierarchical tensor, which bound the
    ranks at the children of their nodes.

    Source: the laws for ``matrix`` (:math:`U V^\top`), ``cp`` and ``ht`` are those of Implicit Regularization in
    Hierarchical Tensor Factorization and Deep Convolutional Neural Networks (Noam Razin, Asaf Maman, Nadav Cohen,
    2022); ``tucker`` and ``tt`` follow the same rule, which is ours.

    Args:
        target: The format.
        shape: Sizes of the modes.
        rank: ``matrix``, ``cp``: a number. ``tucker``: one for all modes or one each. ``tt``: likewise for the
            bonds. ``ht``: one for all levels of interior nodes or one each, from the bottom up.
        tree: Of ``ht``; None for the perfect binary one that merges neighbours.
        norm: Frobenius norm.
        seed: Of the weights.

    Returns:
        The factorisation, in float64 on the CPU, not to be trained.

    Raises:
        ValueError: A rank that no tensor of this shape has or needs, a tree of another order, a norm that is not
            positive.

    Example:
        >>> tensor = planted_tensor("tucker", (3, 4, 5), rank=(1, 2, 2), norm=7.0).to_tensor()
        >>> round(tensor.norm().item(), 12), torch.linalg.matrix_rank(tensor.flatten(1)).item()
        (7.0, 1)
    """
    if target not in get_args(TargetFormat):
        raise ValueError(f"target must be one of {', '.join(get_args(TargetFormat))}, got {target!r}")
    if len(shape) == 0 or min(shape) < 1:
        raise ValueError(f"shape must hold sizes of at least 1, got {tuple(shape)}")
    order, number = len(shape), per_mode("rank", rank, 1) if target in ("matrix", "cp") else ()
    if tree is not None and target != "ht":
        raise ValueError(f"tree belongs to target 'ht', got one with target {target!r}: leave it out")
    law: dict[str, Any] = {"init_scale": 1.0, "seed": seed, "dtype": torch.float64, "device": "cpu"}
    planted: Factorization
    match target:
        case "matrix":
            if order != 2:
                raise ValueError(f"shape of target 'matrix' must hold 2 sizes, got {tuple(shape)}")
            _check("rank", number[0], min(shape))
            planted = DeepMatrix(shape, depth=2, hidden=number[0], **law)
        case "cp":
            _check("rank", number[0], math.prod(shape) // max(shape))
            planted = CP(shape, number[0], **law)
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
                raise ValueError(
                    f"tree has {tree.order} modes, shape has {order} sizes ({tuple(shape)}): give a tree of that order"
                )
            widths = _widths(tree, shape, rank)
            planted = HierarchicalTensorFactorization(tree, shape, widths, **law)
    planted.normalize_(norm)
    return planted.requires_grad_(False)


def _check(name: str, value: int, largest: int) -> None:
    if value > largest:
        raise ValueError(
            f"{name} must be at most {largest}: with this shape (and the other ranks) more adds nothing, got {value}"
        )


def _widths(tree: ModeTree, shape: Sequence[int], rank: int | Sequence[int]) -> dict[tuple[int, ...], int]:
    """Local components of every interior node, which are a CP decomposition over its children and its parent."""
    ranks = per_mode("rank", rank, len(tree.levels))
    widths = {node: width for level, width in zip(tree.levels, ranks, strict=True) for node in level}
    for node, width in widths.items():
        sizes = [1 if node == tree.root else widths[tree.parent(node)]]
        for child in tree.children(node):
            entries = math.prod(shape[mode] for mode in child)
            # the vectors of a child span no more dimensions than it has components
            sizes.append(min(entries, widths.get(child, entries)))
        _check(f"rank at node {node_name(node)}", width, math.prod(sizes) // max(sizes))
    return widths


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
