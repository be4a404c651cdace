"""The endless training stream: new samples in every epoch, whatever processes, batches and interruptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from lightning_locality import Pathfinder, SameClass
from lightning_locality.datamodules.base import AbstractImageDataModule, IndexLoader
from lightning_locality.datamodules.pathfinder.parameters import PathfinderCurves
from lightning_locality.datamodules.pathfinder.placement import draw
from lightning_locality.datamodules.stream import Curriculum, StreamLoader

TINY = PathfinderCurves(2, 96, 32, padding=6, seed_distance=13, paddle_length=4, margin=2, distractors=1)
DIGITS: dict[str, Any] = {"source": "digits", "image_size": 8, "canvas": (8, 32), "distance": 16, "train": None}


def pathfinder(root: Path, **options: Any) -> Pathfinder:
    settings: dict[str, Any] = {"train": None, "epoch_size": 10, "batch_size": 4, "workers": 1, "curves": TINY}
    return Pathfinder(validation=20, test=4, root=root, **(settings | options))


class Recorder(LightningModule):
    """Keeps the images and labels of its training steps by epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def training_step(self, batch: Any, _: int) -> Tensor:
        self.seen.setdefault(self.current_epoch, []).append(batch)
        return self.layer(torch.ones(1, 1, dtype=self.layer.weight.dtype)).sum()

    def validation_step(self, batch: Any, _: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def epoch(self, number: int) -> tuple[Tensor, Tensor]:
        images, labels = zip(*self.seen[number], strict=True)
        return torch.cat(images), torch.cat(labels)


def fit(data: AbstractImageDataModule, epochs: int, checkpoint: Path | None = None, **options: Any) -> Recorder:
    model = Recorder()
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(model, data, ckpt_path=checkpoint if checkpoint and checkpoint.exists() else None)
    if checkpoint and not checkpoint.exists():
        trainer.save_checkpoint(checkpoint)
    return model


def test_pathfinder_of_an_epoch_is_that_of_its_numbers(tmp_path: Path) -> None:
    data = pathfinder(tmp_path)
    model = fit(data, 3)
    assert data._pool is None  # the processes have ended
    assert not list((tmp_path / "pathfinder").glob("*train*"))
    fixed = np.load(next((tmp_path / "pathfinder").glob("*validation*")) / "images.npy") / 255
    for epoch in range(3):
        images, labels, _ = draw(TINY, 0, "train", range(10 * epoch, 10 * epoch + 10), False)
        seen, classes = model.epoch(epoch)
        assert np.abs(seen[:, 0].numpy() - (images / 255 - fixed.mean()) / fixed.std()).max() < 1e-4
        assert classes.tolist() == labels.tolist()
        assert seen.dtype == torch.float32
    assert torch.equal(data.batch("train", torch.arange(10))[0], model.epoch(0)[0])
    with pytest.raises(IndexError, match="an epoch has pictures 0 to 9"):
        data.batch("train", torch.tensor([10]))


@pytest.mark.parametrize("make", [pathfinder, lambda root, **options: SameClass(**DIGITS, epoch_size=10, **options)])
def test_batch_size_processes_and_resumption_do_not_matter(tmp_path: Path, make: Any) -> None:
    expected = fit(make(tmp_path, batch_size=4), 4)
    other = make(tmp_path, batch_size=3, **({"workers": 2} if make is pathfinder else {}))
    fit(other, 2, tmp_path / "two.ckpt")
    resumed = fit(other, 4, tmp_path / "two.ckpt")
    assert sorted(resumed.seen) == [2, 3]
    for epoch in (2, 3):
        for mine, theirs in zip(resumed.epoch(epoch), expected.epoch(epoch), strict=True):
            assert torch.equal(mine, theirs)
    assert not torch.equal(expected.epoch(0)[0], expected.epoch(1)[0])
    overfitted = fit(make(tmp_path, batch_size=4), 2, overfit_batches=1)
    assert torch.equal(overfitted.epoch(0)[0], expected.epoch(0)[0][:4])
    assert torch.equal(overfitted.epoch(1)[0], expected.epoch(0)[0][:4])


def test_pairs_of_the_first_epoch_are_those_of_the_fixed_split() -> None:
    stream, fixed = SameClass(**DIGITS, epoch_size=50), SameClass(**(DIGITS | {"train": 50}))
    assert stream.size("train") == 50
    for mine, theirs in zip(
        stream.batch("train", torch.arange(50)), fixed.batch("train", torch.arange(50)), strict=True
    ):
        assert torch.equal(mine, theirs)
    loader = stream.train_dataloader()
    loader.sampler.set_epoch(2)
    labels = torch.cat([stream.batch(split, samples)[1] for split, samples in loader])
    assert torch.equal(labels, stream.sample("train", 2)[-1])
    assert int((stream.sample("train", 2)[0] != stream.sample("train", 0)[0]).sum()) > 10


def test_processes_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [index.tolist() for _, index in IndexLoader("train", 12, 6)]
    ranks = [[b.indices for b in IndexLoader("train", 12, 3, rank=rank, world=2)] for rank in range(2)]
    begin = lambda epoch, index: lambda: (100 * epoch + index,)
    loaders = [StreamLoader(batches, begin, ahead=3) for batches in ranks]
    for loader in loaders:
        loader.sampler.set_epoch(5)
    for batch, (first, second) in zip(whole, zip(*loaders, strict=True), strict=True):
        together = torch.cat([first.samples.values[0], second.samples.values[0]])
        assert sorted(together.tolist()) == [500 + index for index in batch]


def test_batches_are_begun_ahead_once_and_across_epochs() -> None:
    begun: list[tuple[int, int]] = []

    def begin(epoch: int, index: Tensor) -> Any:
        begun.append((epoch, int(index)))
        return lambda: (index,)

    loader = StreamLoader(list(torch.arange(3)), begin, ahead=2)
    list(loader)
    assert begun == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    loader.set_epoch(1)
    halfway = iter(loader)
    next(halfway)
    assert begun[5:] == [(1, 2)]
    # another epoch in between, then on
    loader.set_epoch(7)
    assert [int(batch.samples.values[0]) for batch in loader] == [0, 1, 2]
    assert [int(batch.samples.values[0]) for batch in halfway] == [1, 2]


def test_curriculum_of_pathfinder(tmp_path: Path) -> None:
    data = pathfinder(tmp_path, curriculum={"distractors": 7, "continuity": 1.0}, curriculum_epochs=3)
    assert [data.curves_at(epoch).distractors for epoch in range(5)] == [7, 5, 3, 1, 1]
    assert [data.curves_at(epoch).continuity for epoch in (0, 3, 4)] == [1.0, 1.8, 1.8]
    model = fit(data, 2)
    for epoch in range(2):
        labels = draw(data.curves_at(epoch), 0, "train", range(10 * epoch, 10 * epoch + 10), False)[1]
        assert model.epoch(epoch)[1].tolist() == labels.tolist()
    assert data.store("validation").curves == TINY


def test_curriculum_of_pairs() -> None:
    start = {"distance": 8, "distractors": 0}
    wide = {"canvas": (8, 48), "distance": 32, "mean": [0.5], "std": [1.0], "batch_size": 90}
    data = SameClass(**(DIGITS | wide), distractors=2, curriculum=start, curriculum_epochs=3, epoch_size=90)
    assert data.boxes is None
    for epoch, (distance, distractors) in enumerate([(8, 0), (16, 1), (24, 1), (32, 2), (32, 2)]):
        fixed = SameClass(**(DIGITS | wide | {"train": 90, "distance": distance}), distractors=distractors)
        occupied = torch.zeros(48, dtype=torch.bool)
        for _, left, _, width in (*(fixed.boxes or ()), *fixed.distractor_boxes):
            occupied[left : left + width] = True
        data.batch("train")  # sets up
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        ((split, samples),) = loader
        assert samples.values[0].shape == (3 + distractors, 90)
        shown = (data.batch(split, samples)[0] != 0).sum((0, 1, 2))  # black differs from the mean
        assert torch.equal(shown > 0, occupied)
    assert fixed.boxes is not None
    assert torch.equal(data.batch("test")[0], fixed.batch("test")[0])


def test_wrong_streams(tmp_path: Path) -> None:
    for wrong, message in (
        ({"train": 5, "curriculum": {"distractors": 0}}, "needs new pictures in every epoch: set train=None"),
        ({"curriculum": {"distractor": 0}}, "curriculum cannot change 'distractor', only path_length"),
        ({"curriculum": {"size": 16}}, "curriculum cannot change 'size'"),
        ({"curriculum": {"balanced": 1}}, "curriculum cannot change 'balanced'"),
        ({"curriculum": {"margin": -1}}, r"in epoch 0, with {'margin': -1}, margin must be at least 0"),
        ({"curriculum": {"contrast": float("nan")}}, r"curriculum must be .* got \{'contrast': nan\}"),
        ({"curriculum": {"margin": 1}, "curriculum_epochs": 0}, "curriculum_epochs must be at least 1"),
        ({"epoch_size": 0}, "epoch_size must be at least 1 picture"),
    ):
        with pytest.raises(ValueError, match=message):
            pathfinder(tmp_path, **wrong)
    for wrong, message in (
        ({"train": 5, "curriculum": {"distance": 0}}, "needs new pairs in every epoch: set train=None"),
        ({"curriculum": {"distance": 17}}, r"in epoch 0, with {'distance': 17}, distance=17 does not fit"),
        ({"curriculum": {"distractors": -1}}, "distractors must be at least 0"),
        ({"curriculum": {"canvas": 1}}, "curriculum cannot change 'canvas', only distance, distractors"),
        ({"epoch_size": 0}, "epoch_size must be at least 1 pair"),
    ):
        with pytest.raises(ValueError, match=message):
            SameClass(**(DIGITS | wrong))


def test_values_of_a_curriculum() -> None:
    curriculum = Curriculum({"a": 0, "b": 1.0}, 2, {"a": 3, "b": 0.5, "c": True})
    assert [curriculum.at(epoch) for epoch in range(3)] == [{"a": 0, "b": 1.0}, {"a": 2, "b": 0.75}, {"a": 3, "b": 0.5}]
    assert all(isinstance(curriculum.at(epoch)["a"], int) for epoch in range(3))
