from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn

from lightning_locality.datamodules.base import (
    AbstractImageDataModule,
    IndexLoader,
    Split,
    SplitBatch,
    seeded_generator,
)


class Numbers(AbstractImageDataModule):
    """Sample i is an image full of i, its label is i."""

    def __init__(self, samples: int = 11, batch_size: int = 4, seed: int = 0, drop_last: bool = False) -> None:
        super().__init__(batch_size, seed, drop_last)
        self.samples, self.stages = samples, []  # type: ignore[var-annotated]

    @property
    def num_classes(self) -> int:
        return self.samples

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 1, 2, 2

    def setup(self, stage: str | None = None) -> None:
        self.stages.append(stage)

    def size(self, split: Split) -> int:
        return self.samples

    def compose(self, split: Split, index: Tensor) -> tuple[Tensor, Tensor]:
        return index[:, None, None, None].expand(-1, 1, 2, 2).to(torch.get_default_dtype()), index


class Recorder(LightningModule):
    """Keeps the samples it was given; BatchNorm sends its buffers at every step of DDP, evaluation included."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(4, 1))
        self.folder = folder
        self.seen: dict[str, list[list[int]]] = {}
        self.dtypes: set[torch.dtype] = set()

    def _step(self, batch: Any, key: str) -> Tensor:
        image, label = batch
        assert torch.equal(image[:, 0, 0, 0].long(), label)
        self.seen.setdefault(key, []).append(label.tolist())
        self.dtypes.add(image.dtype)
        output: Tensor = self.net(image).square().mean()
        return output

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step(batch, f"train {self.current_epoch}")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._step(batch, f"validation {self.current_epoch} {self.trainer.state.fn.value}")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._step(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        self._step(batch, "predict")
        label: Tensor = batch[1]
        return label

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)

    def teardown(self, stage: str) -> None:
        if self.folder is not None:
            torch.save(self.seen, self.folder / f"{self.trainer.state.fn.value} {self.global_rank}.pt")


def quiet_trainer(root: Path, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        default_root_dir=root,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


def local_batches(size: int, batch_size: int, world: int, **options: Any) -> list[list[list[int]]]:
    loaders = [IndexLoader("train", size, batch_size, rank=rank, world=world, **options) for rank in range(world)]
    return [[batch.indices.tolist() for batch in loader] for loader in loaders]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_every_sample_once_in_equal_steps(world: int, batch_size: int, shuffle: bool) -> None:
    for size in range(world, 60):
        ranks = local_batches(size, batch_size, world, shuffle=shuffle)
        assert sorted(i for rank in ranks for batch in rank for i in batch) == list(range(size))
        assert len({len(rank) for rank in ranks}) == 1
        assert all(1 <= len(batch) <= batch_size for rank in ranks for batch in rank)
        assert all(len(batch) == batch_size for rank in ranks for batch in rank[:-2])
        assert len(ranks[0]) == -(-size // (world * batch_size))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_drop_last_gives_full_batches(world: int) -> None:
    for size in range(4 * world, 60):
        ranks = local_batches(size, 4, world, shuffle=True, drop_last=True)
        samples = [i for rank in ranks for batch in rank for i in batch]
        assert {len(batch) for rank in ranks for batch in rank} == {4}
        assert len(set(samples)) == len(samples) == size // world // 4 * 4 * world


def test_the_ranks_batches_are_one_processs_batch() -> None:
    (alone,) = local_batches(48, 12, 1, shuffle=True, seed=3)
    ranks = local_batches(48, 4, 3, shuffle=True, seed=3)
    for step, batch in enumerate(alone):
        assert sorted(i for rank in ranks for i in rank[step]) == sorted(batch)


def test_the_order_is_seeded_and_of_the_epoch() -> None:
    loaders = [IndexLoader("train", 100, 7, shuffle=True, seed=seed) for seed in (0, 0, 1)]
    orders = []
    for epoch in range(3):
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
        first, again, other = (torch.cat([batch.indices for batch in loader]) for loader in loaders)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        orders.append(tuple(first.tolist()))
    assert len(set(orders)) == 3
    # the number of fixed points of a random permutation is about Poisson(1): 8 and more has probability 1e-5
    assert all(sum(i == place for place, i in enumerate(order)) < 8 for order in orders)


def test_batches_do_not_share_the_storage_of_the_order() -> None:
    batch = next(iter(IndexLoader("train", 1000, 4, shuffle=True)))
    assert batch.indices.untyped_storage().nbytes() == 4 * 8


@pytest.mark.parametrize(
    ("size", "batch_size", "world", "drop_last", "words"),
    [
        (3, 4, 1, True, "drop_last=False"),
        (7, 4, 2, True, "drop_last=False"),
        (2, 4, 3, False, "at least 3 samples"),
        (5, 1, 2, False, "batch_size of at least 2"),
        (0, 4, 1, False, "0 samples"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(
    size: int, batch_size: int, world: int, drop_last: bool, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        IndexLoader("test", size, batch_size, world=world, drop_last=drop_last)


def test_batch_size_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Numbers(batch_size=0)


def test_streams_are_unrelated() -> None:
    keys = [(0, "a"), (0, "b"), (1, "a"), (0, "a", 0), (0, "a", 1), (0, "ab"), (-1, "a"), (2**70, "a")]
    draws = torch.stack([torch.rand(2000, generator=seeded_generator(key[0], *key[1:])) for key in keys])
    correlation = torch.corrcoef(draws) - torch.eye(len(keys))
    # 28 pairs, standard error 1/sqrt(2000)
    assert correlation.abs().max() < 4.5 / 2000**0.5


@pytest.mark.parametrize("samples", [8, 11])
def test_the_trainer_leaves_the_loaders_alone(tmp_path: Path, samples: int) -> None:
    data, model = Numbers(samples), Recorder()
    trainer = quiet_trainer(tmp_path, max_epochs=3)
    trainer.fit(model, data)
    trainer.validate(model, data, verbose=False)
    trainer.test(model, data, verbose=False)
    predicted = trainer.predict(model, data)
    in_order = [list(range(start, min(start + 4, samples))) for start in range(0, samples, 4)]
    epochs = [model.seen.pop(f"train {epoch}") for epoch in range(3)]
    for epoch, batches in enumerate(epochs):
        assert sorted(i for batch in batches for i in batch) == list(range(samples))
        expected = IndexLoader("train", samples, 4, shuffle=True, seed=0)
        expected.sampler.set_epoch(epoch)
        assert batches == [batch.indices.tolist() for batch in expected]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert len(model.seen) == 6
    assert all(batches == in_order for batches in model.seen.values())
    assert [batch.tolist() for batch in predicted or []] == in_order


def test_overfit_batches_sees_the_same_batches(tmp_path: Path) -> None:
    data, model = Numbers(), Recorder()
    quiet_trainer(tmp_path, max_epochs=2, overfit_batches=2).fit(model, data)
    assert model.seen["train 0"] == model.seen["train 1"] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("precision", "dtype"), [("64-true", torch.float64), ("32-true", torch.float32), ("bf16-true", torch.bfloat16)]
)
def test_images_have_the_precision_of_the_trainer(tmp_path: Path, precision: Any, dtype: torch.dtype) -> None:
    torch.set_default_dtype(torch.float32)
    data, model = Numbers(), Recorder()
    quiet_trainer(tmp_path, max_epochs=1, precision=precision).fit(model, data)
    assert model.dtypes == {dtype}


def test_other_batches_pass() -> None:
    batch = (torch.ones(1), torch.ones(1))
    assert Numbers().on_after_batch_transfer(batch, 0) is batch


def test_a_batch_without_a_trainer(device: torch.device) -> None:
    data = Numbers()
    image, label = data.batch("train", device=device)
    assert label.tolist() == [0, 1, 2, 3]
    assert image.device.type == label.device.type == device.type
    image, label = data.batch("train", torch.tensor([7, 2]))
    assert image[:, 0, 1, 1].tolist() == label.tolist() == [7, 2]
    data.batch("validation")
    assert data.stages == ["fit", "validate"]
    loop: Iterator[SplitBatch] = iter(data.train_dataloader())
    assert sorted(i for split, indices in loop for i in data.batch(split, indices)[1].tolist()) == list(range(11))


@pytest.mark.gpu
def test_tensors_are_moved_once() -> None:
    data, cuda = Numbers(), torch.device("cuda:0")
    first, second = torch.ones(3), torch.zeros(3)
    moved = data.on_device("name", first, cuda)
    assert data.on_device("name", first, cuda) is moved
    assert data.on_device("name", second, cuda).sum() == 0


@pytest.mark.slow
@pytest.mark.parametrize(("samples", "batch_size"), [(9, 4), (8, 4), (11, 4), (17, 3)])
def test_two_processes_see_every_sample_once(tmp_path: Path, samples: int, batch_size: int) -> None:
    # 9 in batches of 4: one process has 5 samples and the other 4, so a full batch gives one sample away
    torch.set_default_dtype(torch.float32)
    data = Numbers(samples, batch_size)
    options = {"strategy": "ddp_fork", "devices": 2, "max_epochs": 3}
    quiet_trainer(tmp_path, **options).fit(Recorder(tmp_path), data)
    quiet_trainer(tmp_path, **options).test(Recorder(tmp_path), data, verbose=False)
    ranks = [torch.load(tmp_path / f"fit {rank}.pt") for rank in range(2)]
    for key in ranks[0]:
        seen = [[i for batch in rank[key] for i in batch] for rank in ranks]
        assert sorted(seen[0] + seen[1]) == list(range(samples)), key
        assert len(ranks[0][key]) == len(ranks[1][key])
    assert len(ranks[0]) == 6
    assert ranks[0]["train 0"] != ranks[0]["train 1"] != ranks[0]["train 2"]
    tested = [torch.load(tmp_path / f"test {rank}.pt")["test"] for rank in range(2)]
    assert sorted(i for rank in tested for batch in rank for i in batch) == list(range(samples))
