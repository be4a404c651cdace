"""PermutedImages: the permutation, its dial, and classification with the labels kept."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path
from typing import Any, final

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn

from lightning_locality.datamodules.base import Split, seeded_generator
from lightning_locality.datamodules.permuted_images import PermutedImages, window_permutation

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
# 8x8 pixels
SCRAMBLES = [k / 7 for k in range(8)]


@pytest.fixture(autouse=True)
def scikit_learn() -> None:
    pytest.importorskip("sklearn")


def digits(scramble: float = 1.0, **options: Any) -> PermutedImages:
    data = PermutedImages("digits", **({"scramble": scramble, "image_size": 8} | options))
    data.setup()
    return data


# The permutation.


@pytest.mark.parametrize(("size", "window"), [(1, 1), (5, 1), (5, 2), (6, 3), (7, 4), (8, 5), (8, 8)])
def test_pixels_stay_in_their_window_and_none_is_lost(size: int, window: int) -> None:
    for seed in range(5):
        moved = window_permutation(size, window, seeded_generator(seed)).tolist()
        assert sorted(moved) == list(range(size * size))
        for new, old in enumerate(moved):
            assert new // size // window == old // size // window
            assert new % size // window == old % size // window
        assert (moved == list(range(size * size))) == (window == 1)


def test_uniform_over_all_permutations() -> None:
    """All 24 orders of 2x2 pixels equally often; likewise each order of two windows, independently of the other."""
    count = 4800
    generator = seeded_generator(0)
    orders = [tuple(window_permutation(2, 2, generator).tolist()) for _ in range(count)]
    shares = [orders.count(order) for order in set(orders)]
    assert len(shares) == 24
    # chi-squared with 23 degrees of freedom: below 50 with probability 0.999
    assert sum((share - count / 24) ** 2 / (count / 24) for share in shares) < 50
    # a 4x4 image cut by 3: the right column's upper three pixels are a window, the lower row's left three another
    pairs = torch.zeros(3, 3)
    for _ in range(1800):
        moved = window_permutation(4, 3, generator).reshape(4, 4)
        pairs[int(moved[0, 3]) // 4, int(moved[3, 0]) % 4] += 1
    # each of the 9 cells expects 200, standard error 13.3; 8 degrees of freedom
    assert float(((pairs - 200) ** 2 / 200).sum()) < 26.1


def test_every_pixel_goes_everywhere_at_one() -> None:
    size, count = 3, 4500
    generator = seeded_generator(1)
    seen = torch.zeros(9, 9)
    for _ in range(count):
        seen[torch.arange(9), window_permutation(size, size, generator)] += 1
    # 81 cells of 500, 64 degrees of freedom: below 105 with probability 0.999
    assert float(((seen - count / 9) ** 2 / (count / 9)).sum()) < 105


def displacement_twin(size: int, window: int) -> float:
    """Mean of |new row - old row| over all pairs of rows in a window, pixel by pixel."""
    total = 0.0
    for row in range(size):
        mates = [other for other in range(size) if other // window == row // window]
        total += sum(abs(row - other) for other in mates) / len(mates)
    return total / size


def test_the_dial_grows_from_nothing_to_uniform() -> None:
    for size in (2, 3, 8, 28, 32):
        seen = []
        for window in range(1, size + 1):
            data = PermutedImages("digits", scramble=(window - 1) / (size - 1), image_size=size)
            assert data.window == window
            assert data.expected_displacement == pytest.approx(displacement_twin(size, window), abs=1e-12)
            seen.append(data.expected_displacement)
        assert seen[0] == 0
        assert all(one < other for one, other in pairwise(seen))
        # two independent uniform positions
        assert seen[-1] == pytest.approx((size**2 - 1) / (3 * size), abs=1e-12)


def test_windows_in_between_are_rounded() -> None:
    windows = [PermutedImages("digits", scramble=dial, image_size=8).window for dial in (0.07, 0.08, 0.5, 0.92, 0.93)]
    assert windows == [1, 2, 5, 7, 8]


def test_the_measured_displacement_is_the_expected_one() -> None:
    size, seeds = 16, 40
    row = torch.arange(size * size) // size
    column = torch.arange(size * size) % size
    means = []
    for scramble in (0.0, 0.2, 0.5, 0.8, 1.0):
        each = []
        for seed in range(seeds):
            data = PermutedImages("digits", scramble=scramble, image_size=size, seed=seed)
            for axis in (row, column):
                each.append(float((axis[data.permutation] - axis).abs().double().mean()))
        values = torch.tensor(each)
        error = float(values.std()) / len(each) ** 0.5
        assert abs(float(values.mean()) - data.expected_displacement) <= 4 * error
        means.append(float(values.mean()))
    assert means == sorted(set(means))


# The images.


@pytest.mark.parametrize("scramble", [0.0, 0.5, 1.0])
def test_a_composed_batch_is_the_twins(scramble: float, device: torch.device) -> None:
    data = digits(scramble, channels=3, mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 4.0])
    order = data.permutation.tolist()
    for split in SPLITS:
        index = torch.tensor([4, 0, 11])
        image, label = data.compose(split, index.to(device))
        assert image.device.type == label.device.type == device.type
        assert image.shape == (3, 3, 8, 8)
        official = data.images("test" if split == "test" else "train")
        for k, i in enumerate(index.tolist()):
            number = int(data.table(split)[0, i])
            assert int(label[k]) == int(official.labels[number])
            pixels = official.images[number].tolist()
            for channel, y, x in product(range(3), range(8), range(8)):
                old = order[8 * y + x]
                value = pixels[channel][old // 8][old % 8] / 255
                expected = (value - (0.1, 0.2, 0.3)[channel]) / (1.0, 2.0, 4.0)[channel]
                assert float(image[k, channel, y, x]) == pytest.approx(expected, abs=1e-12)


def test_nothing_is_moved_at_zero_and_nothing_is_lost_at_one() -> None:
    still, moved = digits(0.0), digits(1.0)
    index = torch.arange(140)
    train = still.images("train").images.double() / 255
    for split in SPLITS:
        (plain, label), (mixed, same) = (data.compose(split, index) for data in (still, moved))
        official = still.images(still.part(split))
        numbers = still.table(split)[0, index]
        expected = (official.images[numbers].double() / 255 - train.mean()) / train.std(correction=0)
        assert (plain - expected).abs().max() < 1e-12
        assert torch.equal(label, same)
        assert not torch.equal(plain, mixed)
        assert torch.equal(mixed.flatten(2)[..., moved.permutation.argsort()].reshape(plain.shape), plain)


def test_a_linear_classifier_does_not_notice() -> None:
    """Least squares treats all pixels alike: its test accuracy is the same at every scramble."""
    scores = []
    for scramble in (0.0, 0.4, 1.0):
        data, score, solution = digits(scramble), 0.0, torch.empty(0)
        for split in ("train", "test"):
            image, label = data.compose(split, torch.arange(data.size(split)))
            pixels = torch.cat([image.flatten(1), torch.ones(len(image), 1)], 1)
            if split == "train":
                square = pixels.T @ pixels + torch.eye(65)
                solution = torch.linalg.solve(square, pixels.T @ nn.functional.one_hot(label, 10).double())
            score = float(((pixels @ solution).argmax(1) == label).double().mean())
        scores.append(score)
    assert scores[0] > 0.9
    assert scores[1] == scores[2] == scores[0]


def test_one_permutation_for_all_splits_by_seed_size_and_window_alone() -> None:
    data = digits(0.5)
    again = digits(0.52, train=30, batch_size=3, classes=[1, 2], channels=3)
    assert data.window == again.window
    assert torch.equal(data.permutation, again.permutation)
    assert not torch.equal(digits(0.5, seed=1).permutation, data.permutation)
    assert not torch.equal(digits(1.0).permutation, data.permutation)


def test_splits_are_apart_and_shorter_ones_begin_longer_ones() -> None:
    data, short = digits(), digits(train=100, validation=20, test=30)
    labels = data.images("train").labels
    for split in SPLITS:
        numbers = data.table(split)[0]
        assert len(numbers.unique()) == len(numbers)
        assert torch.equal(short.table(split), data.table(split)[:, : short.size(split)])
        # not sorted by class, so that a part has all classes
        assert len(short.table(split)[1].unique()) > 5
    assert [short.size(split) for split in SPLITS] == [100, 20, 30]
    train, validation = (set(data.table(split)[0].tolist()) for split in ("train", "validation"))
    assert train | validation == set(range(len(labels)))
    assert not train & validation
    assert data.size("test") == len(data.images("test").labels)


def test_a_subset_of_the_classes_is_numbered_anew() -> None:
    data = digits(classes=[7, 2, 5])
    assert (data.num_classes, data.class_names) == (3, ("2", "5", "7"))
    for split in SPLITS:
        index, label = data.table(split)
        official = data.images(data.part(split)).labels[index]
        assert label.unique().tolist() == [0, 1, 2]
        assert torch.equal(torch.tensor([2, 5, 7])[label], official)
    assert digits().num_classes == 10
    assert digits().class_names == tuple("0123456789")


def test_float32_is_the_rounded_float64() -> None:
    data = digits()
    wide = data.compose("train", torch.arange(64))[0]
    torch.set_default_dtype(torch.float32)
    narrow = data.compose("train", torch.arange(64))[0]
    assert narrow.dtype == torch.float32
    assert (wide - narrow).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scramble": -0.1}, "scramble must be from 0 .* to 1 .*, got -0.1"),
        ({"scramble": 1.5}, "scramble must be from 0 .* to 1 .*, got 1.5"),
        ({"scramble": float("nan")}, "scramble must be a finite number, got nan"),
        ({"train": 0}, "train must be at least 1 image, or None for all, got 0"),
        ({"test": 100_000}, "test=100000 images requested, but digits has only 359"),
        ({"image_size": 0}, "image_size must be at least 1 pixel, got 0"),
        ({"classes": [4]}, r"at least 2 different classes, got \[4\]"),
        ({"classes": [4, 12]}, r"classes \[12\] are not in digits"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        digits(**options)


def test_classes_without_a_training_image_are_refused(tmp_path: Path) -> None:
    arrays = {part: np.zeros((20, 1, 4, 4), np.uint8) for part in ("train_images", "test_images")}
    labels = np.arange(20)
    np.savez(tmp_path / "a.npz", **arrays, train_labels=labels % 2 * 2, test_labels=labels % 3)
    options: dict[str, Any] = {
        "source": f"file:{tmp_path / 'a.npz'}",
        "image_size": 4,
        "mean": [0.5] * 3,
        "std": [1] * 3,
    }
    with pytest.raises(ValueError, match=r"test images of file:.* have classes \[1\].*choose classes=\[0, 2\]"):
        PermutedImages(**options).setup()
    chosen = PermutedImages(**options, classes=[0, 2])
    chosen.setup()
    assert chosen.size("test") == 13


def test_tables_are_asked_for_after_setup() -> None:
    with pytest.raises(RuntimeError, match="test images have not been sampled yet: call setup"):
        PermutedImages("digits", image_size=8).size("test")


@final
class Linear(LightningModule):
    """One linear layer; records the labels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        self.seen: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen += batch[1].tolist()
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert batch[0].shape[1:] == (1, 8, 8)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_trainer_and_its_checkpoint(tmp_path: Path) -> None:
    data, model = digits(0.7, train=90, seed=3, root=tmp_path), Linear()
    options: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=1, default_root_dir=tmp_path, logger=False, enable_checkpointing=False, **options)
    trainer.fit(model, data)
    assert sorted(model.seen) == sorted(data.table("train")[1].tolist())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = PermutedImages.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    again.setup("fit")
    assert again.root == str(tmp_path)
    assert torch.equal(again.permutation, data.permutation)
    assert torch.equal(again.table("train"), data.table("train"))
