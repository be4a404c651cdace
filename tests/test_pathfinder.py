from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningModule, Trainer

from lightning_locality import Pathfinder
from lightning_locality.cli import main
from lightning_locality.datamodules.base import SplitBatch
from lightning_locality.datamodules.pathfinder import make_pathfinder
from lightning_locality.datamodules.pathfinder.parameters import PathfinderCurves
from lightning_locality.datamodules.pathfinder.placement import draw
from lightning_locality.datamodules.pathfinder.store import CorruptStoreError

LENGTHS = (3, 5, 7, 9)
SMALL = PathfinderCurves(path_length=3, window=160, size=80, padding=15, seed_distance=20, distractors=4)


@pytest.fixture
def module(tmp_path: Path) -> Pathfinder:
    module = Pathfinder(train=40, validation=10, test=20, root=tmp_path, batch_size=8, curves=SMALL, workers=1)
    module.prepare_data()
    return module


def test_batches(module: Pathfinder, device: torch.device) -> None:
    module.setup("fit")
    index = torch.tensor([3, 1, 39], device=device)
    image, label = module.compose("train", index)
    assert (image.shape, image.dtype, label.dtype) == ((3, 1, 80, 80), torch.float32, torch.int64)
    images, labels, _ = draw(SMALL, 0, "train", range(40), False)
    plain = (images / 255 - (images / 255).mean()) / (images / 255).std()
    assert np.abs(image[:, 0].cpu().numpy() - plain[index.cpu()]).max() < 1e-4
    assert label.tolist() == labels[index.cpu()].tolist()
    assert [module.size(split) for split in ("train", "validation", "test")] == [40, 10, 20]
    assert (module.num_classes, module.image_shape) == (2, (1, 80, 80))
    with pytest.raises(RuntimeError, match="call setup"):
        module.compose("test", index)
    with pytest.raises(RuntimeError, match="targets=True"):
        module.targets("train", index)


def test_batches_with_targets(tmp_path: Path, device: torch.device) -> None:
    counts = {"train": 10, "validation": 2, "test": 2}
    module = Pathfinder(**counts, root=tmp_path, preset="lra32_easy", targets=True, batch_size=4, workers=1)
    module.prepare_data()
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    images, labels, targets = module.on_after_batch_transfer(SplitBatch(batch.split, batch.indices.to(device)), 0)
    expected = draw(module.curves, 0, "train", batch.indices.tolist())
    assert labels.tolist() == expected[1].tolist()
    assert np.array_equal(targets["segmentation"].cpu().numpy(), expected[2].segmentation)
    assert np.array_equal(targets["markers"].cpu().numpy(), expected[2].markers)
    # dashes are where the picture is bright
    dash = targets["segmentation"] > 0
    assert images[:, 0][dash].mean() > images[:, 0][~dash].mean() + 1
    # a stream's are rendered with the pictures
    endless = Pathfinder(
        train=None, validation=2, test=2, root=tmp_path, preset="lra32_easy", targets=True, batch_size=4, epoch_size=10
    )
    endless.prepare_data()
    endless.setup("fit")
    batch = next(iter(endless.train_dataloader()))
    assert torch.equal(
        endless.on_after_batch_transfer(batch, 0)[2]["segmentation"],
        endless.targets("train", torch.arange(4))["segmentation"],
    )
    assert endless.targets("train", torch.arange(4))["segmentation"].any()
    endless.teardown()


def test_stages_load_what_they_need(module: Pathfinder) -> None:
    shutil.rmtree(module.store("test").folder)
    module.setup("fit")
    module.setup("validate")
    with pytest.raises(FileNotFoundError, match="call prepare_data"):
        module.setup("test")


def test_tests_need_the_statistics_of_the_training_pictures_alone(module: Pathfinder) -> None:
    index = torch.arange(20)
    module.setup()
    expected = module.compose("test", index)[0]
    folder = module.store("train").folder
    for name in ("images.npy", "labels.npy"):
        (folder / name).unlink()
    again = Pathfinder(train=40, validation=10, test=20, root=module.root, curves=SMALL)
    again.setup("test")
    assert torch.equal(again.compose("test", index)[0], expected)
    header = json.loads((folder / "pathfinder.json").read_text())
    (folder / "pathfinder.json").write_text(json.dumps(header | {"seed": 1}))
    with pytest.raises(CorruptStoreError, match=r"was made with other parameters \(seed\)"):
        again.setup("test")


def test_pictures_move_to_a_device_once(module: Pathfinder) -> None:
    module.setup("fit")
    index = torch.tensor([3, 1], device="meta")
    module.compose("train", index)
    moved = dict(module._moved)
    module.compose("train", index)
    assert len(moved) == 2
    assert all(module._moved[key][1] is tensor for key, (_, tensor) in moved.items())


def test_the_message_names_the_command_that_makes_the_pictures(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = Pathfinder(train=3, validation=2, test=4, seed=5, root=tmp_path / "some folder", curves=SMALL)
    with pytest.raises(
        FileNotFoundError, match=r"does not exist; call prepare_data\(\) before setup\(\), or"
    ) as raised:
        module.setup()
    command = shlex.split(str(raised.value).partition("or run: ")[2])
    assert command[0] == "lightning-locality"
    folder = module.store("test").folder
    folder.parent.mkdir(parents=True)
    folder.with_name(f"{folder.name}.json").write_text("a sidecar of version 0.1")
    with caplog.at_level(logging.INFO):
        main(command[1:])
    assert caplog.text.count("has the format of version 0.1, which is no longer read") == 1
    module.setup()
    assert module.compose("test", torch.arange(4))[0].shape == (4, 1, 80, 80)
    shutil.rmtree(folder)
    with pytest.raises(
        FileNotFoundError, match=r"\(.*\.json has the format of version 0\.1, which.*or run: lightning-"
    ):
        Pathfinder(train=3, validation=2, test=4, seed=5, root=tmp_path / "some folder", curves=SMALL).setup()


def test_validation_is_test(tmp_path: Path) -> None:
    module = Pathfinder(train=5, validation=4, test=6, root=tmp_path, curves=SMALL, validation_is_test=True)
    module.prepare_data()
    module.setup()
    assert module.size("validation") == 6
    index = torch.arange(6)
    assert torch.equal(module.compose("validation", index)[0], module.compose("test", index)[0])
    assert len(list((tmp_path / "pathfinder").iterdir())) == 2


def test_trainer_runs(module: Pathfinder) -> None:
    class Seen(LightningModule):
        automatic_optimization = False

        def training_step(self, batch: Any, _: int) -> None:
            shapes.append(tuple(batch[0].shape))

        validation_step = test_step = training_step

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    shapes: list[tuple[int, ...]] = []
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Seen(), module)
    trainer.test(Seen(), module, verbose=False)
    assert [shape[0] for shape in shapes] == [8] * 5 + [8, 2] + [8, 8, 4]


def test_damaged_folder_is_reported_and_generated_again(module: Pathfinder, caplog: pytest.LogCaptureFixture) -> None:
    store = module.store("test")
    before = store.load()[0].copy()
    data = store.folder / "images.npy"
    data.write_bytes(data.read_bytes()[:-7])
    with caplog.at_level(logging.WARNING):
        module.prepare_data()
    assert "altered or truncated" in caplog.text
    assert np.array_equal(store.load()[0], before)
    caplog.clear()
    module.prepare_data()
    assert not caplog.text


def test_more_training_images_leave_the_rest(tmp_path: Path) -> None:
    few, more = (make_pathfinder(train=n, validation=4, test=6, root=tmp_path, curves=SMALL) for n in (5, 9))
    assert few["test"] == more["test"]
    assert few["train"] != more["train"]
    assert np.array_equal(np.load(few["train"] / "images.npy"), np.load(more["train"] / "images.npy")[:5])


def test_parameters_have_folders_of_their_own() -> None:
    plain = {Pathfinder(path_length=length, seed=seed).store("train").folder for length in LENGTHS for seed in (0, 1)}
    for field in dataclasses.fields(PathfinderCurves):
        value = getattr(PathfinderCurves(), field.name)
        others = {"window": 450, "size": 100, "distractors": 7, "distractor_length": 2, "balanced": True}
        others |= {"paddle_thickness": 1.5, "single_paddles": True}
        other = others.get(field.name, value * 0.9 if isinstance(value, float) else value and value + 1)
        plain.add(
            Pathfinder(curves=dataclasses.replace(PathfinderCurves(), **{field.name: other})).store("train").folder
        )
    assert len(plain) == 8 + len(dataclasses.fields(PathfinderCurves))
    assert Pathfinder(path_length=5, curves=SMALL).curves == dataclasses.replace(SMALL, path_length=5)
    assert Pathfinder(curves=SMALL).curves == SMALL


def test_wrong_module() -> None:
    for wrong, message in (
        ({"train": 0}, "train must be at least 1 picture"),
        ({"validation": 1.5}, "validation must be a whole number, got 1.5"),
        ({"seed": -1}, "seed must be between 0"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"channels": 2}, "channels must be 1 or 3, got 2"),
        ({"mean": "imagenet"}, "'imagenet' with channels=3 and without std; got mean='imagenet', std=None, channels=1"),
        ({"mean": [0.5]}, "give both mean and std or neither"),
        ({"path_length": 0}, "path_length must be at least 2"),
        ({"preset": "lra48"}, "preset must be one of icml2022, lra32, .* _hard, got 'lra48'"),
        ({"preset": "pathx_easy"}, "preset must be one of"),
        ({"preset": "lra32_easy", "path_length": 9}, "preset='lra32_easy' has a path length"),
        ({"preset": "lra32", "curves": SMALL}, "preset or curves, not both"),
    ):
        with pytest.raises(ValueError, match=message):
            Pathfinder(**wrong)
