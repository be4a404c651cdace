"""The problems of recovery_speed.py: models, observations and twins of the published sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from published_twins import MaskedCP, MaskedMatrix, OneHotBinaryCP, OneHotCP, OneHotHierarchical, Twin
from torch import Tensor

from lightning_locality.datamodules.tensor_recovery import AbstractRecoveryDataModule, TensorRecovery
from lightning_locality.optim import GroupRMSprop
from lightning_locality.tasks.recovery import Recovery
from lightning_locality.tasks.recovery_loss import Objective, TrainingSet
from lightning_locality.tensors import CP, DeepMatrix, Entries, Factorization, RecoveryBatch
from lightning_locality.tensors.hierarchical import HierarchicalTensorFactorization
from lightning_locality.tensors.mode_tree import ModeTree

ADAM_RATE = 5e-4


class RandomBits(AbstractRecoveryDataModule):
    """Random binary samples of the shape of binarised images; one in ten has the value 2, the others 0."""

    def __init__(self, samples: int, order: int) -> None:
        super().__init__()
        self.samples, self.order = samples, order

    def build(self) -> RecoveryBatch:
        """The samples."""
        generator = torch.Generator().manual_seed(0)
        bits = torch.randint(2, (self.samples, self.order), generator=generator, dtype=torch.uint8)
        values = 2.0 * (torch.rand(self.samples, generator=generator, dtype=torch.float64) < 0.0986)
        return RecoveryBatch(Entries(bits, values), None, None)


@dataclass(frozen=True)
class Case:
    """A problem of the papers.

    Args:
        title: What it is.
        target: Times the twin's iterations per second that are asked for.
        published: Iterations per second of the authors' own code, on one thread of another machine.
        model: Factorisation, from ``dtype`` and ``device``.
        data: Observations, from the number of samples where that is free.
        twin: Of a factorisation, its indices and values and the recovery task.
        grown: Root mean square of the entries of a start from which the loss falls at once; None where the published
            start is one.
        steps: Iterations in one training step of the Trainer.
        every: Iterations between measurements.
        batch_size: None for all observations.
        check_samples: With fewer samples, and a batch smaller by as much, for the comparison in float64.
    """

    title: str
    target: float
    published: float
    model: Callable[..., Factorization]
    data: Callable[..., AbstractRecoveryDataModule]
    twin: Callable[[Factorization, Tensor, Tensor, Recovery], Twin]
    grown: float | None = None
    steps: int = 100
    every: int = 25
    batch_size: int | None = None
    check_samples: int | None = None

    def optimizer(self) -> Callable[..., torch.optim.Optimizer]:
        """Published optimiser."""
        return GroupRMSprop if self.batch_size is None else partial(torch.optim.Adam, lr=ADAM_RATE)

    def checked(self) -> Case:
        """The case with the samples of the comparison."""
        if self.check_samples is None or self.batch_size is None:
            return self
        batches = self.data().problem.train.values.shape[0] // self.batch_size
        data = partial(self.data, samples=self.check_samples)
        return replace(self, batch_size=self.check_samples // batches, data=data)


def matrix_twin(model: Factorization, indices: Tensor, values: Tensor, task: Recovery) -> Twin:
    assert isinstance(model, DeepMatrix)
    return MaskedMatrix([layer.detach() for layer in model.layers][::-1], indices, values)


def cp_twin(
    kind: type[OneHotCP | MaskedCP], model: Factorization, indices: Tensor, values: Tensor, task: Recovery
) -> Twin:
    assert isinstance(model, CP)
    return kind([factor.detach() for factor in model.factors], indices, values)


def hierarchical_twin(model: Factorization, indices: Tensor, values: Tensor, task: Recovery) -> Twin:
    assert isinstance(model, HierarchicalTensorFactorization)
    tree = model.tree
    below = [[(mode,) for mode in range(tree.order)], *tree.levels[:-1]]
    levels = [[model.weight(node).detach() for node in level] for level in below]
    return OneHotHierarchical(levels, model.weight(tree.root).detach(), indices, values)


def binary_twin(model: Factorization, indices: Tensor, values: Tensor, task: Recovery) -> Twin:
    assert isinstance(model, CP)
    assert task.batch_size is not None
    factors = torch.stack([factor.detach() for factor in model.factors])
    # the minibatches of the task, pass by pass
    objective = Objective(
        TrainingSet(model, Entries(indices, values)), task.loss, task.route, task.batch_size, task.seed
    )
    batches = -(-len(values) // task.batch_size)

    def order(number: int) -> Tensor:
        rows = (objective._rows(number * batches + place) for place in range(batches))
        return torch.cat([row for row in rows if row is not None])

    return OneHotBinaryCP(factors, indices, values, task.batch_size, ADAM_RATE, order)


def cases(toy: bool = False) -> dict[str, Case]:
    """The published sizes, or tiny ones."""

    def matrix(size: int, observations: int) -> dict[str, Any]:
        return {
            "model": partial(DeepMatrix, (size, size), depth=3, init_scale=1e-3),
            "data": partial(TensorRecovery, "matrix", (size, size), min(5, size), observations=observations),
            "twin": matrix_twin,
            "grown": 0.3,
        }

    def cp(kind: type[OneHotCP | MaskedCP], shape: tuple[int, ...], observations: int, norm: float) -> dict[str, Any]:
        return {
            "model": partial(CP, shape, init_scale=1e-2 if norm == 1 else 1e-3),
            "data": partial(TensorRecovery, "cp", shape, 5, observations=observations, norm=norm),
            "twin": partial(cp_twin, kind),
            "grown": 0.3 * norm / math.sqrt(math.prod(shape)),
        }

    def hierarchical(size: int, widths: int, observations: int) -> dict[str, Any]:
        return {
            "model": partial(HierarchicalTensorFactorization, ModeTree.perfect(4), size, widths),
            "data": partial(TensorRecovery, "ht", (size,) * 4, min(5, size), observations=observations),
            "twin": hierarchical_twin,
            "grown": 0.3,
            "steps": 25,
        }

    def binary(order: int, rank: int, samples: int, batch: int, check: int) -> dict[str, Any]:
        return {
            "model": partial(CP, (2,) * order, rank, init_mean=1.0, init_scale=1e-3),
            "data": partial(_random_bits, order, samples),
            "twin": binary_twin,
            "steps": samples // batch,
            "every": samples // batch,
            "batch_size": batch,
            "check_samples": check,
        }

    return {
        "matrix": Case(
            "matrix 64x64, depth 3, 2048 observations", 200, 13.3, **(matrix(6, 18) if toy else matrix(64, 2048))
        ),
        "cp_order_3": Case(
            "CP order 3, dim 16, width 256, 2048 observations",
            15,
            127,
            **(cp(OneHotCP, (4, 4, 4), 32, 8.0) if toy else cp(OneHotCP, (16, 16, 16), 2048, 64.0)),
        ),
        "htf": Case(
            "HTF order 4, dim 8, widths 512, 2048 observations",
            40,
            3.94,
            **(hierarchical(3, 6, 40) if toy else hierarchical(8, 512, 2048)),
        ),
        "cp_order_4": Case(
            "CP order 4, dim 10, width 1000, 2000 observations",
            40,
            9.2,
            **(cp(MaskedCP, (3, 3, 3, 3), 40, 1.0) if toy else cp(MaskedCP, (10, 10, 10, 10), 2000, 1.0)),
        ),
        "binary": Case(
            "binary CP order 784, rank 15, batches of 5000 of 60000",
            30,
            12 / 8.83,
            **(binary(40, 3, 60, 20, 60) if toy else binary(784, 15, 60_000, 5000, 6000)),
        ),
    }


def _random_bits(order: int, default: int, samples: int | None = None) -> RandomBits:
    return RandomBits(samples or default, order)


def sizes(toy: bool = False) -> dict[str, Case]:
    """Problems of growing size, to see where a GPU begins to pay."""
    known = cases()
    grown: dict[str, Case] = {}

    def add(name: str, base: str, **fields: Any) -> None:
        grown[name] = replace(known[base], title=name, **fields)

    for size in (6,) if toy else (16, 64, 256, 512):
        data = partial(TensorRecovery, "matrix", (size, size), 5)
        add(f"matrix {size}x{size}", "matrix", model=partial(DeepMatrix, (size, size), depth=3), data=data)
    for size in (4,) if toy else (8, 16, 32, 48):
        shape = (size,) * 3
        add(
            f"CP order 3, dim {size}, width {size * size}",
            "cp_order_3",
            model=partial(CP, shape),
            data=partial(TensorRecovery, "cp", shape, 5),
        )
    for width in (4,) if toy else (32, 128, 512, 2048):
        add(
            f"HTF order 4, dim 8, widths {width}",
            "htf",
            model=partial(HierarchicalTensorFactorization, ModeTree.perfect(4), 8, width),
        )
    return grown
