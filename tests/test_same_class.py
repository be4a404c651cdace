from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn

from lightning_locality.datamodules.base import Split, seeded_generator
from lightning_locality.datamodules.image_pairs import Pairs
from lightning_locality.datamodules.image_sets import ImagesNotFoundError, UnknownSourceError, load_images
from lightning_locality.datamodules.pair_tasks import SameClass

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@pytest.fixture(scope="module", autouse=True)
def images_loaded_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_locality.datamodules.source_images.load_images", functools.cache(load_images))
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of random 6x6 pictures, 40 of each for training and 20 for test, all different."""
    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 40), ("test", 20)):
        for name in "abcd":
            (root / part / name).mkdir(parents=True)
            for k in range(count):
                pixels = torch.randint(0, 256, (6, 6, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(root / part / name / f"{k:03}.png")
    return root


def small(pictures: Path, **options: Any) -> SameClass:
    given: dict[str, Any] = {"distance": 9, "train": 300, "validation": 200, "test": 250, "canvas": (11, 30)}
    data = SameClass(f"folder:{pictures}", image_size=6, **(given | options))
    data.setup()
    return data


@functools.cache
def statistics(source: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, from all training images, a pixel at a time."""
    levels: list[list[float]] = [[], [], []]
    for picture in load_images(source, "train").images.tolist():
        for channel in range(3):
            levels[channel] += [value / 255 for row in picture[channel] for value in row]
    mean = [sum(values) / len(values) for values in levels]
    std = [
        (sum((value - m) ** 2 for value in values) / len(values)) ** 0.5 for values, m in zip(levels, mean, strict=True)
    ]
    return mean, std


def twin(data: SameClass, split: Split, index: int) -> tuple[Tensor, int]:
    """One sample from the formulas, a pixel at a time."""
    mean, std = statistics(data.source)
    official = data.images("test" if split == "test" else "train")
    pairs = data.pairs(split)
    height, width = data.canvas
    size, distance = data.image_size, data.distance
    image = torch.zeros(3, height, width)
    if data.background != "mean":
        level = 0.0 if data.background == "black" else float(data.background)
        image += ((level - torch.tensor(mean)) / torch.tensor(std))[:, None, None]
    top, left = (height - size) // 2, width // 2 - size - distance // 2
    columns = (left, left + size + distance)
    numbers = (int(pairs.left[index]), int(pairs.right[index]))
    for number, column in zip(numbers, columns, strict=True):
        for channel in range(3):
            for y in range(size):
                for x in range(size):
                    value = int(official.images[number, channel, y, x]) / 255
                    image[channel, top + y, column + x] = (value - mean[channel]) / std[channel]
    return image, int(official.labels[numbers[0]] == official.labels[numbers[1]])


@pytest.mark.parametrize("background", ["mean", "black", 0.75])
@pytest.mark.parametrize(("canvas", "distance"), [((11, 30), 9), ((6, 30), 18), ((9, 31), 4), ((7, 21), 0)])
def test_a_composed_batch_is_the_twins(
    pictures: Path, device: torch.device, canvas: tuple[int, int], distance: int, background: Any
) -> None:
    data = small(pictures, canvas=canvas, distance=distance, background=background)
    for split in SPLITS:
        index = torch.tensor([3, 0, 17])
        image, label = data.compose(split, index.to(device))
        assert image.dtype == torch.float64
        assert label.dtype == torch.int64
        assert image.shape == (3, 3, *canvas)
        assert image.device.type == label.device.type == device.type
        for k, i in enumerate(index.tolist()):
            expected, same = twin(data, split, i)
            assert (image[k].cpu() - expected).abs().max() < 1e-12
            assert int(label[k]) == same


def test_the_pixels_are_recovered_from_the_boxes(pictures: Path, device: torch.device) -> None:
    data = small(pictures)
    image, label = data.compose("test", torch.arange(250, device=device))
    pixels = data.images("train").images.double().transpose(0, 1).flatten(1) / 255
    mean, std = pixels.mean(1)[:, None, None], pixels.std(1, correction=0)[:, None, None]
    pairs, official = data.pairs("test"), data.images("test")
    outside = torch.ones(data.canvas, dtype=torch.bool)
    for (top, left, height, width), numbers in zip(data.boxes, pairs[:2], strict=True):
        crop = image[:, :, top : top + height, left : left + width].cpu()
        assert torch.equal((255 * (crop * std + mean)).round().to(torch.uint8), official.images[numbers])
        outside[top : top + height, left : left + width] = False
    assert torch.equal(image[:, :, outside.to(device)], torch.zeros(250, 3, 11 * 30 - 72, device=device))
    assert torch.equal(label.cpu(), (official.labels[pairs.left] == official.labels[pairs.right]).long())


def test_float32_is_the_rounded_float64(pictures: Path) -> None:
    data = small(pictures)
    wide = data.compose("train", torch.arange(64))[0]
    torch.set_default_dtype(torch.float32)
    narrow = data.compose("train", torch.arange(64))[0]
    assert narrow.dtype == torch.float32
    assert (wide - narrow).abs().max() < 1e-6


def test_batches_are_not_views_of_one_another(pictures: Path) -> None:
    data = small(pictures, background="black")
    first, second = (data.compose("train", torch.arange(4))[0] for _ in range(2))
    first.zero_()
    assert second.abs().min() > 0


@pytest.mark.parametrize("distance", [0, 40, 80, 120, 160])
def test_the_published_layout(distance: int) -> None:
    data = SameClass(distance=distance)
    left = {0: 80, 40: 60, 80: 40, 120: 20, 160: 0}[distance]
    assert data.boxes == ((96, left, 32, 32), (96, left + 32 + distance, 32, 32))
    assert data.boxes[1][1] - (data.boxes[0][1] + 32) == distance
    assert [data.size(split) for split in SPLITS] == [5_000, 2_000, 10_000]
    assert data.image_shape == (3, 224, 224)
    assert data.num_classes == 2


def test_every_placement_that_fits_is_inside() -> None:
    for width in range(4, 15):
        for size in range(1, width // 2 + 1):
            for distance in range(width - 2 * size + 1):
                data = SameClass("mnist", distance=distance, canvas=(9, width), image_size=size)
                (top, left, _, _), (_, right, _, _) = data.boxes
                assert left >= 0
                assert right == left + size + distance
                assert right + size <= width
                # as central as whole pixels allow
                assert abs(left - (width - right - size)) <= 2
                assert top == (9 - size) // 2


def check_pairs(labels: Tensor, pairs: Pairs) -> None:
    assert torch.equal((labels[pairs.left] == labels[pairs.right]).long(), pairs.label)


def test_labels_are_right_and_balanced_like_a_fair_coin(pictures: Path) -> None:
    data = small(pictures, train=20_000, validation=20_000, test=20_000)
    for split in SPLITS:
        pairs = data.pairs(split)
        check_pairs(data.images(data.part(split)).labels, pairs)
        # standard error 71
        assert abs(int(pairs.label.sum()) - 10_000) < 4.5 * 71


@pytest.mark.parametrize("size", [1, 2, 199, 200])
def test_balanced_halves_are_exact(pictures: Path, size: int) -> None:
    data = small(pictures, train=size, balanced=True)
    pairs = data.pairs("train")
    check_pairs(data.images("train").labels, pairs)
    assert abs(2 * int(pairs.label.sum()) - size) == size % 2
    # which one of the two is positive is a coin as well
    assert size < 100 or 20 < int(pairs.label[::2].sum()) < 80


def test_pairs_have_the_documented_distribution() -> None:
    # 3 classes of 2, 3 and 5 images; every ordered pair's probability from the rule
    labels = torch.tensor([0] * 2 + [1] * 3 + [2] * 5)[torch.randperm(10, generator=seeded_generator(0))]
    size, counts = 400_000, labels.bincount().tolist()
    for distinct in (True, False):
        data = SameClass(distinct=distinct)
        pairs = data.sample_pairs(labels, torch.arange(10), size, seeded_generator(0, distinct))
        seen = (10 * pairs.left + pairs.right).bincount(minlength=100).double() / size
        for i in range(10):
            for j in range(10):
                a, b = int(labels[i]), int(labels[j])
                if a != b:
                    expected = 1 / 2 / 3 / 2 / counts[a] / counts[b]
                elif distinct:
                    expected = 0.0 if i == j else 1 / 2 / 3 / counts[a] / (counts[a] - 1)
                else:
                    expected = 1 / 2 / 3 / counts[a] ** 2
                error = (expected * (1 - expected) / size) ** 0.5
                assert abs(float(seen[10 * i + j]) - expected) <= 5 * error


def test_only_the_candidates_are_drawn() -> None:
    labels = torch.arange(100) % 5
    candidates = torch.arange(7, 60, 2)
    pairs = SameClass().sample_pairs(labels, candidates, 5000, seeded_generator(0))
    assert torch.equal(torch.cat(pairs[:2]).unique(), candidates)


def test_distinct_is_the_fix_and_its_absence_the_published_rule(pictures: Path) -> None:
    # 36 images of a class remain for training: a pair repeats its image with probability 1/36
    fixed, published = small(pictures, train=5_000), small(pictures, train=5_000, distinct=False)
    assert int((fixed.pairs("train").left == fixed.pairs("train").right).sum()) == 0
    repeated = published.pairs("train").left == published.pairs("train").right
    assert abs(int(repeated.sum()) - 2_500 / 36) < 4.5 * (2_500 / 36) ** 0.5
    assert published.pairs("train").label[repeated].all()


def test_the_splits_share_no_image(pictures: Path) -> None:
    data = small(pictures, train=5_000, validation=5_000, test=5_000)
    used = {split: torch.cat(data.pairs(split)[:2]).unique() for split in SPLITS}
    assert [len(used[split]) for split in SPLITS] == [4 * 36, 4 * 4, 4 * 20]
    official = {split: data.images(data.part(split)).images for split in SPLITS}
    contents = {split: {tuple(official[split][i].flatten().tolist()) for i in used[split]} for split in SPLITS}
    assert sum(len(content) for content in contents.values()) == 4 * 60
    assert len(set.union(*contents.values())) == 4 * 60
    other = small(pictures, train=5_000, validation=5_000, test=5_000, seed=1)
    assert not torch.equal(torch.cat(other.pairs("validation")[:2]).unique(), used["validation"])


def test_published_validation_is_the_test_set(pictures: Path) -> None:
    data = small(pictures, train=5_000, validation_is_test=True)
    assert data.size("validation") == data.size("test") == 250
    assert torch.equal(torch.stack(data.pairs("validation")), torch.stack(data.pairs("test")))
    index = torch.arange(20)
    assert torch.equal(data.compose("validation", index)[0], data.compose("test", index)[0])
    # nothing is held out then
    assert len(torch.cat(data.pairs("train")[:2]).unique()) == 160


def test_a_pair_depends_on_seed_split_and_number_alone(pictures: Path) -> None:
    data, again = small(pictures), small(pictures, distance=0, canvas=(6, 12), batch_size=7, background="black")
    longer = small(pictures, train=777, validation=333, test=555)
    other = small(pictures, seed=1)
    for split in SPLITS:
        table = torch.stack(data.pairs(split))
        assert torch.equal(torch.stack(again.pairs(split)), table)
        assert torch.equal(torch.stack(longer.pairs(split))[:, : table.shape[1]], table)
        assert not torch.equal(torch.stack(other.pairs(split)), table)
    shorter = small(pictures, train=10)
    assert torch.equal(torch.stack(shorter.pairs("test")), torch.stack(data.pairs("test")))
    # the streams of the splits are unrelated: labels agree as often as coins do
    agree = int((data.pairs("train").label[:200] == data.pairs("validation").label).sum())
    assert abs(agree - 100) < 4.5 * 50**0.5


def test_a_batch_is_its_samples(pictures: Path) -> None:
    data = small(pictures)
    image, label = data.compose("train", torch.tensor([5, 250, 5]))
    for k, i in enumerate((5, 250, 5)):
        alone, same = data.compose("train", torch.tensor([i]))
        assert torch.equal(alone[0], image[k])
        assert same[0] == label[k]


def test_a_subset_of_the_classes(pictures: Path) -> None:
    data = small(pictures, classes=[3, 1])
    for split in SPLITS:
        pairs, official = data.pairs(split), data.images(data.part(split))
        assert official.labels[torch.cat(pairs[:2])].unique().tolist() == [1, 3]
        check_pairs(official.labels, pairs)
    with pytest.raises(ValueError, match=r"classes \[7\] are not in folder.*which has \[0, 1, 2, 3\]"):
        small(pictures, classes=[0, 7])


def test_only_what_the_stage_needs_is_set_up(pictures: Path) -> None:
    data = SameClass(f"folder:{pictures}", image_size=6, mean=[0.5] * 3, std=[0.2] * 3)
    data.setup("test")
    with pytest.raises(RuntimeError, match="train pairs have not been sampled yet: call setup"):
        data.compose("train", torch.arange(2))
    assert set(data._parts) == {"test"}
    before = data.pairs("test").left
    data.setup("fit")
    assert set(data._parts) == {"test", "train"}
    assert torch.equal(data.pairs("test").left, before)


def test_given_statistics_are_used(pictures: Path) -> None:
    data = small(pictures, mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 4.0], background="black")
    image = data.compose("train", torch.arange(1))[0]
    assert torch.allclose(image[0, :, 0, 0], torch.tensor([-0.1, -0.1, -0.075]), atol=1e-15, rtol=0)


def test_grey_pictures(pictures: Path) -> None:
    data = small(pictures, channels=1)
    image = data.compose("train", torch.arange(300))[0]
    assert data.image_shape == (1, 11, 30)
    assert image.shape == (300, 1, 11, 30)
    top, left, height, width = data.boxes[0]
    crop = image[:, :, top : top + height, left : left + width]
    assert abs(float(crop.mean())) < 0.1
    assert abs(float(crop.std()) - 1) < 0.05


def test_digits_need_nothing() -> None:
    pytest.importorskip("sklearn")
    data = SameClass("digits", image_size=14, canvas=(14, 88), distance=60, train=500, classes=[0, 1])
    image, label = data.batch("train")
    assert image.shape == (64, 1, 14, 88)
    assert label.float().mean() == pytest.approx(0.5, abs=0.3)
    for split, indices in data.val_dataloader():
        assert data.batch(split, indices)[0].shape == (len(indices), 1, 14, 88)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"distance": 161}, "distance=161 does not fit.*width 224 can be at most 160 apart"),
        ({"distance": -1}, "distance must be at least 0 pixels, got -1"),
        ({"canvas": (20, 224)}, "do not fit a canvas of 20x224.*at least 32x64, or image_size at most 20"),
        ({"canvas": (224, 60), "distance": 0}, "do not fit a canvas of 224x60.*image_size at most 30"),
        ({"image_size": 0}, "image_size must be at least 1 pixel, got 0"),
        ({"train": 0}, "train must be at least 1 pair, got 0"),
        ({"validation": 0}, "validation must be at least 1 pair, got 0"),
        ({"test": -3}, "test must be at least 1 pair, got -3"),
        ({"classes": [4]}, r"at least 2 different classes, got \[4\]"),
        ({"classes": [4, 4]}, r"at least 2 different classes, got \[4, 4\]"),
        ({"holdout": 1.0}, "holdout must be a share between 0 and 1, got 1.0"),
        ({"background": "grey"}, "background must be 'mean', 'black' or a finite number, got 'grey'"),
        ({"channels": 2}, "channels must be 1, 3 or None, got 2"),
        ({"mean": "imagenet", "channels": 1}, "'imagenet' with channels=3 and without std"),
        ({"mean": [0.5] * 3}, "give both mean and std or neither"),
        ({"mean": [0.5], "std": [0.5]}, "mean must have 3 values"),
        ({"mean": [0.5] * 3, "std": [0.5, 0.0, 1.0]}, "std must be positive"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused_at_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SameClass(**options)


def test_a_resize_unknown_is_refused(pictures: Path) -> None:
    with pytest.raises(ValueError, match="resize must be 'bilinear', 'area' or 'pad', got 'nearest'"):
        small(pictures, resize="nearest")


def test_an_unknown_source_is_refused_at_once() -> None:
    with pytest.raises(UnknownSourceError, match="did you mean 'cifar10'"):
        SameClass("cifar_10")


def test_a_root_without_the_set(tmp_path: Path) -> None:
    data = SameClass("cifar10", root=tmp_path, download=False)
    data.prepare_data()
    with pytest.raises(ImagesNotFoundError, match="Pass download=True or point root at"):
        data.setup("fit")


def test_classes_too_small_for_pairs_are_refused() -> None:
    labels = torch.tensor([0, 0, 1, 2])
    with pytest.raises(ValueError, match=r"classes \[1, 2\] have a single image.*distinct=False"):
        SameClass().sample_pairs(labels, torch.arange(4), 5, seeded_generator(0))
    check_pairs(labels, SameClass(distinct=False).sample_pairs(labels, torch.arange(4), 50, seeded_generator(0)))
    with pytest.raises(ValueError, match=r"at least 2 classes, got \[0\]"):
        SameClass().sample_pairs(labels, torch.arange(2), 5, seeded_generator(0))


class Net(LightningModule):
    """Learns a little, and has hyper-parameters of the same names as the data's."""

    def __init__(self, seed: int = 5, batch_size: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 11 * 30, 1))
        self.labels: dict[str, list[int]] = {}

    def _step(self, batch: tuple[Tensor, Tensor], key: str) -> Tensor:
        self.labels.setdefault(key, []).extend(batch[1].tolist())
        return nn.functional.binary_cross_entropy_with_logits(self.net(batch[0])[:, 0], batch[1].to(batch[0].dtype))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step(batch, f"train {self.current_epoch}")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._step(batch, f"validation {self.current_epoch}")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._step(batch, "test")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def test_a_trainer_and_its_checkpoint(pictures: Path, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    data, model = SameClass(f"folder:{pictures}", Path("data"), 9, 300, 200, 250, (11, 30), image_size=6), Net()
    options: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=2, default_root_dir=tmp_path, logger=False, enable_checkpointing=False, **options)
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    assert model.labels["test"] == data.pairs("test").label.tolist()
    assert model.labels["validation 1"] == data.pairs("validation").label.tolist()
    first, second = model.labels["train 0"], model.labels["train 1"]
    assert sum(first) == sum(second) == int(data.pairs("train").label.sum())
    assert first != second
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = SameClass.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert again.boxes == data.boxes
    assert again.hparams == data.hparams


@pytest.mark.images
def test_cifar10_as_published(image_root: Path) -> None:
    torch.set_default_dtype(torch.float32)
    data = SameClass(source="cifar10", root=image_root, distance=160, distinct=False, validation_is_test=True)
    data.setup()
    image, label = data.compose("train", torch.arange(64))
    official = data.images("train")
    mean = torch.tensor([0.491, 0.482, 0.446])[:, None, None]
    std = torch.tensor([0.247, 0.243, 0.261])[:, None, None]
    for k in range(64):
        expected = torch.zeros(3, 224, 224)
        left, right, same = (int(column[k]) for column in data.pairs("train"))
        expected[:, 96:128, :32] = (official.images[left] / 255 - mean) / std
        expected[:, 96:128, 192:] = (official.images[right] / 255 - mean) / std
        assert (image[k] - expected).abs().max() < 2e-6
        assert int(label[k]) == same == int(official.labels[left] == official.labels[right])
    assert abs(int(data.pairs("train").label.sum()) - 2_500) < 4.5 * 35.4
    assert data.size("validation") == 10_000


@pytest.mark.images
def test_the_line_of_the_readme(image_root: Path) -> None:
    data = SameClass(source="cifar10", root=str(image_root), distance=160)
    image, label = data.batch("validation", torch.arange(5))
    assert image.shape == (5, 3, 224, 224)
    assert label.shape == (5,)
    held = torch.cat(data.pairs("validation")[:2]).unique()
    # 500 images of each class are held out, and the training pairs have none of them
    assert len(held) <= 5_000
    data.setup("fit")
    assert not torch.isin(torch.cat(data.pairs("train")[:2]), held).any()


@pytest.mark.images
@pytest.mark.parametrize("resize", ["pad", "bilinear"])
def test_mnist_at_the_published_size(image_root: Path, resize: Any) -> None:
    data = SameClass("mnist", image_root, resize=resize, channels=3, test=100)
    image, _ = data.batch("test", torch.arange(100))
    assert image.shape == (100, 3, 224, 224)
    crop = image[:, :, 96:128, :32]
    assert abs(float(crop.mean())) < 0.1
    assert abs(float(crop.std()) - 1) < 0.1
