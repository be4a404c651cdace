from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn

from lightning_locality.datamodules.tensor_recovery import (
    AbstractRecoveryDataModule,
    RepeatedBatch,
    TargetFormat,
    TensorRecovery,
    planted_tensor,
)
from lightning_locality.tensors.cp import CP
from lightning_locality.tensors.factorization import Entries, RankOneMeasurements, RecoveryBatch
from lightning_locality.tensors.mode_tree import ModeTree

FORMATS: tuple[TargetFormat, ...] = ("matrix", "cp", "tucker", "tt", "ht")


def rank_of(tensor: Tensor, modes: Sequence[int]) -> int:
    """Rank of the matricisation with the given modes as rows."""
    rest = [mode for mode in range(tensor.ndim) if mode not in modes]
    rows = math.prod(tensor.shape[mode] for mode in modes)
    return int(torch.linalg.matrix_rank(tensor.permute(*modes, *rest).reshape(rows, -1), rtol=1e-10))


def entries(batch: RecoveryBatch) -> tuple[Entries, Entries]:
    assert isinstance(batch.train, Entries)
    assert isinstance(batch.test, Entries)
    return batch.train, batch.test


@pytest.mark.parametrize(
    ("target", "shape", "ranks"),
    [
        ("matrix", (64, 64), {(0,): 5}),
        ("cp", (16, 16, 16), {(0,): 5, (1,): 5, (2,): 5}),
        ("tucker", (16, 16, 16), {(0,): 5, (1,): 5, (2,): 5}),
        ("tt", (16, 16, 16), {(0,): 5, (0, 1): 5, (1,): 16}),
        ("ht", (8, 8, 8, 8), {(0,): 5, (3,): 5, (0, 1): 5, (0, 2): 25}),
    ],
)
def test_the_published_sizes_are_the_defaults(
    target: TargetFormat, shape: tuple[int, ...], ranks: dict[tuple[int, ...], int]
) -> None:
    data = TensorRecovery(target=target)
    tensor = data.target_tensor
    assert tensor is not None
    assert tensor.shape == shape == data.shape
    assert tensor.dtype == torch.float64
    assert tensor.norm().item() == pytest.approx(64, rel=1e-13)
    assert {modes: rank_of(tensor, modes) for modes in ranks} == ranks
    train, test = entries(data.problem)
    assert len(train.values) == len(test.values) == 2048


@pytest.mark.parametrize(
    ("target", "shape", "rank", "ranks"),
    [
        ("matrix", (7, 4), 3, {(0,): 3}),
        ("cp", (3, 4, 5), 2, {(0,): 2, (1,): 2, (2,): 2}),
        ("tucker", (4, 5, 6), (2, 3, 4), {(0,): 2, (1,): 3, (2,): 4}),
        ("tt", (4, 5, 6, 3), (2, 4, 1), {(0,): 2, (0, 1): 4, (0, 1, 2): 1}),
        # 3 components at {0, 1} and {2, 3} bound the ranks at the leaves, 2 at the root that of the halves
        ("ht", (4, 5, 6, 3), (3, 2), {(0,): 3, (1,): 3, (2,): 3, (3,): 3, (0, 1): 2}),
    ],
)
def test_the_planted_ranks_are_those_asked_for(
    target: TargetFormat, shape: tuple[int, ...], rank: Any, ranks: dict[tuple[int, ...], int]
) -> None:
    for seed in range(3):
        tensor = planted_tensor(target, shape, rank, norm=2.5, seed=seed).to_tensor()
        assert tensor.norm().item() == pytest.approx(2.5, rel=1e-13)
        assert {modes: rank_of(tensor, modes) for modes in ranks} == ranks


@pytest.mark.parametrize("tree", [ModeTree([[0, 2], [1, 3]]), [[0, 2], [1, 3]], [[2, 0], [3, 1], [0, 1, 2, 3]]])
def test_a_tree_of_ones_own(tree: Any) -> None:
    data = TensorRecovery(target="ht", shape=(4, 4, 4, 4), rank=(3, 2), tree=tree)
    assert data.target_tensor is not None
    assert rank_of(data.target_tensor, (0, 2)) == 2
    assert rank_of(data.target_tensor, (0, 1)) == 9


def test_published_weights_are_standard_normal_up_to_one_factor() -> None:
    planted = planted_tensor("cp", (50, 50, 50), rank=50, norm=1.0, seed=1)
    weights = torch.cat([weight.flatten() for weight in planted.parameters()])
    assert not any(weight.requires_grad for weight in planted.parameters())
    # 7500 numbers: the fourth moment of a normal, 3, to within 4.5 standard deviations of its estimate
    kurtosis = (weights**4).mean() / (weights**2).mean() ** 2
    assert abs(kurtosis - 3) < 4.5 * math.sqrt(24 / 7500)
    assert abs(weights.mean() / weights.std()) < 4.5 / math.sqrt(7500)
    per_mode = [factor.std().item() for factor in planted.factors]  # type: ignore[union-attr]
    assert max(per_mode) / min(per_mode) < 1.1


@pytest.mark.parametrize("target", FORMATS)
def test_completion_divides_the_entries(target: TargetFormat) -> None:
    data = TensorRecovery(target, (4, 6) if target == "matrix" else (4, 2, 3, 2), rank=1, observations=10, seed=3)
    train, test = entries(data.problem)
    tensor = data.target_tensor
    assert tensor is not None
    assert train.indices.shape == (10, tensor.ndim)
    strides = torch.tensor([math.prod(tensor.shape[k + 1 :]) for k in range(tensor.ndim)])
    flat = [(part.indices * strides).sum(1) for part in (train, test)]
    assert sorted(torch.cat(flat).tolist()) == list(range(tensor.numel()))
    for part in (train, test):
        twin = [float(tensor[tuple(index)]) for index in part.indices.tolist()]
        assert torch.allclose(part.values, torch.tensor(twin), rtol=0, atol=1e-13)
    # in the order of memory
    assert all((part.diff() > 0).all() for part in flat)


def test_more_observations_hold_fewer_and_leave_the_target() -> None:
    few, many = (TensorRecovery("tt", observations=count, seed=2).problem for count in (100, 900))
    assert few.target is not None
    assert many.target is not None
    assert torch.equal(few.target, many.target)
    rows = [{tuple(row) for row in entries(problem)[0].indices.tolist()} for problem in (few, many)]
    assert len(rows[0]) == 100
    assert rows[0] < rows[1]


def test_observed_entries_are_uniform() -> None:
    counts = torch.zeros(24)
    for seed in range(200):
        train, _ = entries(TensorRecovery("cp", (4, 6), rank=1, observations=6, seed=seed).problem)
        counts[train.indices[:, 0] * 6 + train.indices[:, 1]] += 1
    # 50 expected of each, binomial
    assert (counts - 50).abs().max() < 4.5 * math.sqrt(200 * 0.25 * 0.75)


def test_all_entries_leave_none_for_the_test() -> None:
    assert TensorRecovery("cp", (2, 3), rank=1, observations=6).problem.test is None


@pytest.mark.parametrize("target", FORMATS)
def test_sensing_measures_with_rank_one_tensors(target: TargetFormat) -> None:
    shape = (30, 40) if target == "matrix" else (5, 6, 8, 5)
    data = TensorRecovery(target, shape, rank=2, task="sensing", observations=700)
    train, test, tensor = data.problem
    assert isinstance(train, RankOneMeasurements)
    assert isinstance(test, RankOneMeasurements)
    assert tensor is not None
    for k in range(5):
        outer = torch.ones(())
        for vectors in train.vectors:
            outer = outer[..., None] * vectors[k]
        assert train.values[k].item() == pytest.approx((outer * tensor).sum().item(), rel=1e-11)
    for vectors, size in zip(train.vectors, shape, strict=True):
        assert vectors.shape == (700, size)
        expected = math.prod(shape) ** (-0.5 / len(shape))
        assert vectors.std().item() == pytest.approx(expected, rel=4.5 / math.sqrt(2 * 700 * size))
    assert not torch.equal(train.values, test.values)
    assert len(test.values) == 700


def test_a_sensing_loss_has_the_scale_of_a_completion_loss() -> None:
    values = TensorRecovery("cp", (16, 16, 16), task="sensing", observations=20_000).problem.train.values
    # second moment |W|^2 / entries = 1; its fourth is heavy
    assert values.square().mean().item() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("task", ["completion", "sensing"])
@pytest.mark.parametrize("target", FORMATS)
def test_the_seed_is_all_there_is(target: TargetFormat, task: Any) -> None:
    options: dict[str, Any] = {"target": target, "rank": 2, "task": task, "noise": 0.1}
    first = TensorRecovery(**options, seed=4).problem
    torch.manual_seed(17)
    torch.set_default_dtype(torch.float32)
    again, other = TensorRecovery(**options, seed=4).problem, TensorRecovery(**options, seed=5).problem
    for left, right, strange in zip(_tensors(first), _tensors(again), _tensors(other), strict=True):
        assert torch.equal(left, right)
        assert left.dtype == right.dtype
        assert not torch.equal(left, strange)


def _tensors(item: Any) -> list[Tensor]:
    return [item] if isinstance(item, Tensor) else [tensor for part in item for tensor in _tensors(part)]


def test_a_model_of_the_same_seed_does_not_start_from_the_target() -> None:
    planted = TensorRecovery("cp", (6, 6, 6), rank=2, seed=3).planted
    model = CP((6, 6, 6), rank=2, init_scale=1.0, seed=3)
    pairs = zip(planted.parameters(), model.parameters(), strict=True)
    assert all(abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.9 for a, b in pairs)


def test_noise_is_on_the_training_values_alone() -> None:
    exact, noisy = (entries(TensorRecovery("cp", noise=noise).problem) for noise in (0.0, 0.2))
    assert torch.equal(exact[0].indices, noisy[0].indices)
    assert torch.equal(exact[1].values, noisy[1].values)
    added = noisy[0].values - exact[0].values
    assert added.std().item() == pytest.approx(0.2, rel=4.5 / math.sqrt(2 * 2048))


def test_a_tensor_too_large_to_be_written_out() -> None:
    data = TensorRecovery("cp", (2,) * 60, rank=3, observations=500, norm=2.0**30)
    train, test = entries(data.problem)
    assert data.target_tensor is None
    assert train.indices.dtype == torch.uint8
    rows = torch.cat([train.indices, test.indices])
    assert rows.shape == (1000, 60)
    assert len(torch.unique(rows, dim=0)) == 1000
    # a fair coin for each of 60,000 bits
    assert abs(rows.double().mean().item() - 0.5) < 4.5 * 0.5 / math.sqrt(60_000)
    twin = torch.zeros(500)
    for component in range(3):
        product = torch.ones(500)
        for mode, factor in enumerate(data.planted.factors):
            product = product * factor[train.indices[:, mode].long(), component]
        twin += product
    assert torch.allclose(train.values, twin, rtol=1e-10, atol=0)
    assert data.planted.norm().item() == pytest.approx(2.0**30, rel=1e-10)


def test_large_tensors_give_distinct_entries_where_draws_collide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_locality.datamodules.tensor_recovery._MAX_DENSE", 10)
    data = TensorRecovery("cp", (6, 8), rank=1, observations=6)
    train, test = entries(data.problem)
    rows = torch.cat([train.indices, test.indices]).long()
    assert len({tuple(row) for row in rows.tolist()}) == 12
    full = data.planted.to_tensor()
    assert torch.allclose(train.values, full[tuple(train.indices.long().T)], rtol=0, atol=1e-12)
    # the rest of the entries, where it is smaller than the training set
    train, test = entries(TensorRecovery("cp", (6, 8), rank=1, observations=40).problem)
    assert len(test.values) == 8


def test_what_makes_no_sense_is_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"observations": 5000}, "observations=5000 are more than the 4096 entries"),
        ({"target": "cp", "shape": (2,) * 60}, "observations must be given: half of the 1.15e.18 entries"),
        ({"observations": 0}, "observations must be at least 1, got 0"),
        ({"noise": -0.1}, "noise must be a standard deviation of at least 0, got -0.1"),
        ({"noise": math.nan}, "noise must be"),
        ({"norm": 0.0}, "norm must be positive"),
        ({"epoch_length": 0}, "epoch_length must be at least 1"),
        ({"task": "guess"}, "task must be 'completion' or 'sensing', got 'guess'"),
        ({"target": "htf"}, "target must be 'matrix', 'cp', 'tucker', 'tt' or 'ht', got 'htf'"),
        ({"shape": ()}, "shape must hold sizes"),
        ({"shape": (4, 0)}, "shape must hold sizes of at least 1"),
        ({"shape": (2,) * 1100}, "more than 1e300 entries"),
        ({"target": "matrix", "shape": (4, 4, 4)}, "'matrix' must hold 2 sizes"),
        ({"target": "matrix", "shape": (9, 4)}, "rank must be at most 4.*got 5"),
        ({"target": "cp", "shape": (2, 2)}, "rank must be at most 2.*got 5"),
        ({"target": "cp", "rank": (1, 2)}, "rank must be one whole number"),
        ({"target": "cp", "rank": 0}, "rank must be one whole number of at least 1"),
        ({"target": "tucker", "rank": (5, 2, 2)}, "rank of mode 0 must be at most 4.*got 5"),
        ({"target": "tucker", "shape": (16, 4, 16)}, "rank of mode 1 must be at most 4"),
        ({"target": "tucker", "rank": (5, 5)}, "or 3 of them"),
        ({"target": "tt", "rank": (1, 17)}, "rank of bond 2 must be at most 16.*got 17"),
        ({"target": "tt", "rank": (16, 256)}, "rank of bond 2 must be at most 16"),
        ({"target": "ht", "shape": (2, 2, 2, 2)}, "rank at node 0-1 must be at most 4: .*got 5"),
        ({"target": "ht", "rank": (5, 6)}, "rank at node 0-1-2-3 must be at most 5.*got 6"),
        ({"target": "ht", "rank": (65, 5)}, "rank at node 0-1 must be at most 40.*got 65"),
        ({"target": "ht", "rank": (5, 5, 5)}, "or 2 of them"),
        ({"target": "ht", "tree": ModeTree.perfect(8)}, "tree has 8 modes, shape has 4 sizes"),
        ({"target": "cp", "tree": ModeTree.perfect(3)}, "tree belongs to target 'ht'"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            TensorRecovery(**options)


class Recorder(LightningModule):
    """Keeps the batches it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[Any]] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.setdefault("train", []).append(batch)
        return self.weight.square()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.setdefault(f"validation {self.trainer.state.fn.value}", []).append(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.setdefault("test", []).append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def trainer(**options: Any) -> Trainer:
    common: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    return Trainer(enable_progress_bar=False, enable_model_summary=False, **common, **options)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true"])
def test_a_trainer_gets_one_and_the_same_object(precision: Any, tmp_path: Path) -> None:
    data, model = TensorRecovery("cp", (4, 4, 4), rank=2, epoch_length=5), Recorder()
    runner = trainer(max_epochs=3, precision=precision, num_sanity_val_steps=0)
    runner.fit(model, data)
    runner.validate(model, data, verbose=False)
    runner.test(model, data, verbose=False)
    assert {name: len(batches) for name, batches in model.seen.items()} == {
        "train": 15,
        "validation fit": 3,
        "validation validate": 1,
        "test": 1,
    }
    assert len({id(batch) for batch in itertools.chain(*model.seen.values())}) == 1
    batch = model.seen["train"][0]
    assert isinstance(batch, RecoveryBatch)
    assert isinstance(batch.train, Entries)
    # moved, not copied and not converted
    assert batch.target is data.target_tensor
    assert batch.train.values.dtype == torch.float64
    runner.save_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.gpu
def test_the_problem_is_moved_once() -> None:
    data = TensorRecovery("cp", task="sensing")
    device = torch.device("cuda", 0)
    first, second = (data.transfer_batch_to_device(data.problem, device, 0) for _ in range(2))
    assert first is second
    assert {tensor.device for tensor in _tensors(first)} == {device}


def test_a_checkpoint_holds_the_tree(tmp_path: Path) -> None:
    data = TensorRecovery("ht", (3, 3, 3, 3), rank=2, tree=ModeTree([[0, 2], [1, 3]]), epoch_length=1)
    runner = trainer(max_epochs=1)
    runner.fit(Recorder(), data)
    runner.save_checkpoint(tmp_path / "a.ckpt")
    again = TensorRecovery.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert again.target_tensor is not None
    assert data.target_tensor is not None
    assert torch.equal(again.target_tensor, data.target_tensor)


def test_several_processes_are_refused() -> None:
    class Two:
        world_size = 2

    data = TensorRecovery("cp")
    data.trainer = Two()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"2 processes.*devices=1"):
        data.setup("fit")


def test_a_batch_of_another_kind_is_moved_as_usual() -> None:
    data = TensorRecovery("cp")
    moved = data.transfer_batch_to_device({"x": torch.zeros(2)}, torch.device("meta"), 0)
    assert moved["x"].device == torch.device("meta")


def test_the_problem_is_drawn_when_it_is_needed() -> None:
    class Counting(AbstractRecoveryDataModule):
        drawn = 0

        def build(self) -> RecoveryBatch:
            self.drawn += 1
            return RecoveryBatch(Entries(torch.zeros(1, 1), torch.zeros(1)), None, None)

    data = Counting(epoch_length=7)
    assert data.drawn == 0
    data.setup("fit")
    data.setup("test")
    loader = data.train_dataloader()
    assert isinstance(loader, RepeatedBatch)
    assert len(loader) == 7
    assert [batch is data.problem for batch in loader] == [True] * 7
    assert data.drawn == 1


@pytest.mark.parametrize(
    "tree",
    [
        [[0, 2], [1, 3]],
        {"class_path": "lightning_locality.tensors.mode_tree.ModeTree", "init_args": {"nodes": [[0, 2], [1, 3]]}},
    ],
)
def test_a_configuration_says_the_tree(tree: Any) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(LightningDataModule, "data")
    options = {"target": "ht", "shape": [3, 3, 3, 3], "rank": [3, 2], "tree": tree}
    path = "lightning_locality.datamodules.tensor_recovery.TensorRecovery"
    config = parser.parse_object({"data": {"class_path": path, "init_args": options}})
    data = parser.instantiate(config).data
    twin = TensorRecovery("ht", (3, 3, 3, 3), (3, 2), ModeTree([[0, 2], [1, 3]]))
    assert torch.equal(data.target_tensor, twin.target_tensor)  # type: ignore[arg-type]
