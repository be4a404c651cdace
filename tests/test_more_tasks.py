"""SameParity, IsGreater, DistantHalves and distractors: what is drawn, what one image tells, where the pixels are."""

from __future__ import annotations

import functools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import pairwise, product
from pathlib import Path
from typing import Any, final

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn

from lightning_locality.cli import main
from lightning_locality.datamodules.base import Split, seeded_generator
from lightning_locality.datamodules.image_pairs import AbstractImagePairs
from lightning_locality.datamodules.image_sets import load_images
from lightning_locality.datamodules.pair_tasks import (
    AbstractLabelConditionalPairs,
    DistantHalves,
    IsGreater,
    SameClass,
    SameParity,
)

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Make = Callable[..., AbstractLabelConditionalPairs]
TASKS: dict[str, tuple[Make, dict[str, Any]]] = {
    "parity": (SameParity, {}),
    "circle": (IsGreater, {"order": "circle"}),
    "line": (IsGreater, {"order": "line"}),
    "halves": (DistantHalves, {"negatives": "any"}),
    "halves of a class": (DistantHalves, {"negatives": "same_class"}),
}
# one image says nothing about the label
BLIND = [name for name in TASKS if name != "line"]
PLACE: dict[str, Any] = {"image_size": 8, "canvas": (9, 60), "distance": 30}


def make(name: str, **options: Any) -> AbstractLabelConditionalPairs:
    cls, own = TASKS[name]
    return cls("digits", **(PLACE | own | options))


@pytest.fixture(autouse=True)
def scikit_learn() -> None:
    pytest.importorskip("sklearn")


# The drawing laws, written out from the docstrings in exact fractions.


def class_twin(name: str, numbers: list[int]) -> Iterator[tuple[int, int, int, Fraction]]:
    """Label, left class, right class (places in ``numbers``) and probability."""
    half, count = Fraction(1, 2), len(numbers)
    places = range(count)
    for label in (0, 1):
        match name:
            case "parity":
                for parity in (0, 1):
                    other = parity if label else 1 - parity
                    lefts = [k for k in places if numbers[k] % 2 == parity]
                    rights = [k for k in places if numbers[k] % 2 == other]
                    for left, right in product(lefts, rights):
                        yield label, left, right, half * half / len(lefts) / len(rights)
            case "circle" | "line" | "naive":
                limit = {"circle": (count - 1) // 2, "line": 1, "naive": count}[name]
                pairs = []
                for back, front in product(places, places):
                    steps = (front - back) % count if name == "circle" else front - back
                    if 1 <= steps <= limit:
                        pairs.append((front, back) if label else (back, front))
                for left, right in pairs:
                    yield label, left, right, half / len(pairs)
            case "halves":
                for left, right in product(places, places):
                    if label:
                        yield label, left, right, half / count if left == right else Fraction(0)
                    else:
                        yield label, left, right, half / count / count
            case "halves of a class":
                for left in places:
                    yield label, left, left, half / count


def image_twin(name: str, numbers: list[int], counts: list[int]) -> dict[tuple[int, int, int], Fraction]:
    """Probability of label, left image, right image; images are numbered class by class."""
    first = [sum(counts[:k]) for k in range(len(counts))]
    chance: dict[tuple[int, int, int], Fraction] = defaultdict(Fraction)
    for label, left, right, share in class_twin(name, numbers):
        ones = [first[left] + i for i in range(counts[left])]
        others = [first[right] + i for i in range(counts[right])]
        pairs = [(i, j) for i, j in product(ones, others) if i != j]
        if name.startswith("halves") and label:
            pairs = [(i, i) for i in ones]
        for i, j in pairs:
            chance[label, i, j] += share / len(pairs)
    return chance


def best_guess(chance: dict[tuple[int, int, int], Fraction], side: int) -> Fraction:
    """Largest share of right answers from the left (0) or the right (1) image alone."""
    seen: dict[int, list[Fraction]] = defaultdict(lambda: [Fraction(0), Fraction(0)])
    for (label, *images), share in chance.items():
        seen[images[side]][label] += share
    return sum((max(shares) for shares in seen.values()), Fraction(0))


NUMBERS = [list(range(10)), [0, 1, 2], [1, 3, 4], [0, 2, 5, 9], [0, 1, 2, 3, 4, 6, 8]]


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
def test_one_image_says_nothing_exactly(numbers: list[int]) -> None:
    counts = [2 + k % 3 for k in range(len(numbers))]
    for name in BLIND:
        chance = image_twin(name, numbers, counts)
        assert sum(chance.values()) == 1
        for side in (0, 1):
            assert best_guess(chance, side) == Fraction(1, 2)
    # what the docstring says of the line, and that the measure sees a leak: all pairs left > right, equally likely
    line, naive = (image_twin(name, numbers, counts) for name in ("line", "naive"))
    for side in (0, 1):
        assert best_guess(line, side) == Fraction(1, 2) + Fraction(1, 2 * (len(numbers) - 1))
        assert best_guess(naive, side) >= max(best_guess(line, side), Fraction(3, 4))


def test_no_law_on_a_line_tells_less() -> None:
    """The bound of the docstring as a linear programme: the least total variation of the worse side."""
    from scipy.optimize import linprog

    for count in (3, 4, 6):
        ahead = [(i, j) for i, j in product(range(count), range(count)) if i > j]
        cells = [*((1, i, j) for i, j in ahead), *((0, j, i) for i, j in ahead)]
        # unknowns: P(left, right | label), |difference| of each class on either side, and the larger of the two sums
        size = len(cells) + 2 * count + 1
        upper, equal = [], []
        for side, place in product((0, 1), range(count)):
            difference = [(1 if c[0] else -1) * (c[1 + side] == place) for c in cells]
            for sign in (1, -1):
                row = [sign * d for d in difference] + [0] * (2 * count + 1)
                row[len(cells) + side * count + place] = -1
                upper.append(row)
        for side in (0, 1):
            row = [0.0] * size
            row[len(cells) + side * count : len(cells) + (side + 1) * count] = [0.5] * count
            row[-1] = -1
            upper.append(row)
        for label in (0, 1):
            equal.append([float(c[0] == label) for c in cells] + [0.0] * (2 * count + 1))
        found = linprog([0] * (size - 1) + [1], A_ub=upper, b_ub=[0] * len(upper), A_eq=equal, b_eq=[1, 1])
        assert found.fun == pytest.approx(1 / (count - 1), abs=1e-9)


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
@pytest.mark.parametrize("name", TASKS)
def test_the_law_is_the_twins(name: str, numbers: list[int]) -> None:
    expected = torch.zeros(2, len(numbers), len(numbers))
    for label, left, right, share in class_twin(name, numbers):
        expected[label, left, right] += 2 * float(share)
    law = make(name).law(torch.tensor(numbers))
    assert law.dtype == torch.float64
    assert (law - expected).abs().max() < 1e-15


@pytest.mark.parametrize("name", TASKS)
def test_pairs_have_the_twins_distribution(name: str) -> None:
    numbers, counts, size = [0, 3, 4, 7], [2, 3, 2, 4], 200_000
    order = torch.randperm(11, generator=seeded_generator(0))
    sorted_labels = torch.tensor(numbers).repeat_interleave(torch.tensor(counts))
    labels = sorted_labels[order]
    place = labels.argsort(stable=True).argsort()
    left, right, label = make(name).sample_pairs(labels, torch.arange(11), size, seeded_generator(0, name))
    seen = (121 * label + 11 * place[left] + place[right]).bincount(minlength=242).double() / size
    chance = image_twin(name, numbers, counts)
    for key in product((0, 1), range(11), range(11)):
        expected = float(chance.get(key, 0))
        error = (expected * (1 - expected) / size) ** 0.5
        assert abs(float(seen[121 * key[0] + 11 * key[1] + key[2]]) - expected) <= 5 * error


@final
class Given(AbstractLabelConditionalPairs):
    """A task whose law is set afterwards."""

    class_names = ("0", "1")
    given: Tensor

    def law(self, classes: Tensor) -> Tensor:
        return self.given


def test_a_pair_may_repeat_its_image_where_that_is_asked_for() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    for distinct in (True, False):
        data = Given(distinct=distinct)
        data.given = torch.full((2, 2, 2), 0.25)
        drawn = data.sample_pairs(labels, torch.arange(4), 40_000, seeded_generator(0))
        repeats = int((drawn.left == drawn.right).sum())
        # half of the pairs are of one class, half of those repeat the image: standard error 87
        assert repeats == 0 if distinct else abs(repeats - 10_000) < 4 * 87


@pytest.mark.parametrize(
    ("law", "words"),
    [
        (torch.full((2, 3, 3), 1 / 9), "law must be a table of probabilities of 2x2 classes"),
        (torch.full((2, 2, 2), 0.2), "which sum to 1"),
        (torch.tensor([[[-0.5, 0.5], [0.5, 0.5]]] * 2), "law must be a table of probabilities"),
        (torch.full((2, 2, 2), float("nan")), "law must be a table of probabilities"),
        (torch.full((2, 2, 2), 0.25), r"classes \[1\] have a single image.*distinct=False"),
    ],
)
def test_laws_that_cannot_be_drawn_are_refused(law: Tensor, words: str) -> None:
    data = Given()
    data.given = law
    with pytest.raises(ValueError, match=words):
        data.sample_pairs(torch.tensor([0, 0, 1]), torch.arange(3), 5, seeded_generator(0))


# The tasks on scikit-learn's digits.


def label_twin(name: str, data: AbstractLabelConditionalPairs, split: Split, index: int) -> int:
    pairs, numbers = data.pairs(split), data.images(data.part(split)).labels.tolist()
    i, j = int(pairs.left[index]), int(pairs.right[index])
    left, right = numbers[i], numbers[j]
    if name == "parity":
        return int((left + right) % 2 == 0)
    if name == "line":
        assert left != right
        return int(left > right)
    if name == "circle":
        assert (left - right) % 10 not in (0, 5)
        return int((left - right) % 10 in (1, 2, 3, 4))
    assert left == right or name == "halves"
    return int(i == j)


@pytest.mark.parametrize("name", TASKS)
def test_labels_are_right_and_balanced(name: str) -> None:
    data = make(name, train=2000, validation=1000, test=1000)
    exact = make(name, train=2001, validation=1000, test=1, balanced=True)
    data.setup()
    exact.setup("fit")
    for split in SPLITS:
        label = data.pairs(split).label
        assert label.tolist() == [label_twin(name, data, split, k) for k in range(data.size(split))]
        size = data.size(split)
        assert abs(int(label.sum()) - size / 2) < 4 * (size / 4) ** 0.5
    assert int(exact.pairs("validation").label.sum()) == 500
    assert int(exact.pairs("train").label[:2000].sum()) == 1000
    # which one of two is positive is a coin as well
    assert 400 < int(exact.pairs("train").label[:2000:2].sum()) < 600


@final
class Naive(AbstractLabelConditionalPairs):
    """All pairs left > right and all pairs left < right: one digit tells a lot."""

    class_names = ("smaller", "greater")

    def law(self, classes: Tensor) -> Tensor:
        greater = (classes[:, None] > classes).double()
        return torch.stack([greater.T, greater]) / greater.sum()


def accuracy_of_one_box(data: AbstractImagePairs, box: tuple[int, int, int, int]) -> float:
    """Test accuracy of a linear classifier, by least squares, that sees one box of the canvas."""
    top, left, height, width = box
    scores, solution = 0.0, torch.empty(0)
    for split in ("train", "test"):
        image, label = data.compose(split, torch.arange(data.size(split)))
        pixels = image[:, :, top : top + height, left : left + width].flatten(1)
        pixels = torch.cat([pixels, torch.ones(len(pixels), 1)], 1)
        target = 2 * label.double() - 1
        if split == "train":
            square = pixels.T @ pixels + torch.eye(pixels.shape[1])
            solution = torch.linalg.solve(square, pixels.T @ target)
        scores = float(((pixels @ solution > 0) == (target > 0)).double().mean())
    return scores


@pytest.mark.parametrize("name", BLIND)
def test_a_model_that_sees_one_half_is_at_chance(name: str) -> None:
    data = make(name, train=3000, test=4000, distractors=1)
    data.setup()
    for box in (*data.boxes, *data.distractor_boxes):
        # given the images seen, labels are fair coins: standard error 1/2 / sqrt(4000)
        assert abs(accuracy_of_one_box(data, box) - 0.5) < 4 * 0.5 / 4000**0.5


def test_a_leak_would_be_seen() -> None:
    data = Naive("digits", **PLACE, train=3000, test=4000)
    data.setup()
    for box in data.boxes:
        # the best that one digit allows is 7/9
        assert 0.65 < accuracy_of_one_box(data, box) < 0.8
    line = make("line", train=3000, test=4000)
    line.setup()
    for box in line.boxes:
        assert accuracy_of_one_box(line, box) < 0.5 + 1 / 18 + 4 * 0.5 / 4000**0.5


# Where the pixels are.


@functools.cache
def statistics() -> tuple[float, float]:
    """Mean and standard deviation of the digits' training images, a pixel at a time."""
    train = (load_images("digits", "train").images.double() / 255).flatten().tolist()
    mean = sum(train) / len(train)
    return mean, (sum((value - mean) ** 2 for value in train) / len(train)) ** 0.5


def canvas_twin(data: AbstractImagePairs, split: Split, index: int) -> Tensor:
    """One canvas from the formulas, a pixel at a time."""
    mean, std = statistics()
    size, distance, (height, width) = data.image_size, data.distance, data.canvas
    halves = isinstance(data, DistantHalves)
    wide = size // 2 if halves else size
    begin, count = width // 2 - wide - distance // 2, data.distractors
    free = distance - count * wide
    between = [begin + wide + (j + 1) * free // (count + 1) + j * wide for j in range(count)]
    columns = [begin, begin + wide + distance, *between]
    # which half of its image each place shows
    offsets = [0, wide, *(wide * (j % 2) for j in range(count))] if halves else [0] * (2 + count)
    canvas = torch.zeros(1, height, width)
    numbers = data.table(split)[:-1, index].tolist()
    for number, column, offset in zip(numbers, columns, offsets, strict=True):
        picture = data.images(data.part(split)).images[number, 0].tolist()
        for y, x in product(range(size), range(wide)):
            canvas[0, (height - size) // 2 + y, column + x] = (picture[y][offset + x] / 255 - mean) / std
    return canvas


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("parity", {}),
        ("circle", {"distractors": 3, "distance": 31}),
        ("halves", {"distance": 0}),
        ("halves", {"distance": 52, "canvas": (8, 60)}),
        ("halves of a class", {"distractors": 3, "distance": 27, "canvas": (11, 37)}),
    ],
)
def test_a_composed_batch_is_the_twins(name: str, options: dict[str, Any], device: torch.device) -> None:
    data = make(name, **options)
    data.setup()
    for split in SPLITS:
        index = torch.tensor([2, 0, 19])
        image, label = data.compose(split, index.to(device))
        assert image.device.type == label.device.type == device.type
        assert image.shape == (3, *data.image_shape)
        for k, i in enumerate(index.tolist()):
            assert (image[k].cpu() - canvas_twin(data, split, i)).abs().max() < 1e-12
        assert torch.equal(label.cpu(), data.pairs(split).label[index])


@pytest.mark.parametrize("name", TASKS)
def test_the_dial_moves_the_two_and_nothing_else(name: str) -> None:
    wide = 4 if name.startswith("halves") else 8
    seen = []
    for distance in range(60 - 2 * wide + 1):
        data = make(name, distance=distance, train=20, validation=1, test=1)
        (top, left, height, width), (_, right, _, _) = data.boxes
        assert (top, height, width) == (0, 8, wide)
        assert right - (left + width) == distance
        assert left >= 0
        assert right + width <= 60
        if distance % 11 == 0:
            data.setup("fit")
            image, label = data.compose("train", torch.arange(20))
            crops = [image[:, :, t : t + h, x : x + w] for t, x, h, w in data.boxes]
            outside = image.square().sum() - sum(crop.square().sum() for crop in crops)
            assert abs(float(outside)) < 1e-9
            seen.append((*crops, label))
    for crops in seen[1:]:
        for one, other in zip(crops, seen[0], strict=True):
            assert torch.equal(one, other)
    with pytest.raises(ValueError, match=rf"can be at most {60 - 2 * wide} apart"):
        make(name, distance=60 - 2 * wide + 1)


def test_halves_that_touch_are_the_image() -> None:
    data = make("halves", distance=0, canvas=(8, 8), background="black", test=200)
    data.setup("test")
    image, label = data.compose("test", torch.arange(200))
    official = data.images("test").images
    low, high = (float(v) for v in (image.min(), image.max()))
    # normalised with one mean and deviation: intensities are linear in between
    pixels = (255 * (image - low) / (high - low)).round().to(torch.uint8)
    whole = (pixels == official[data.pairs("test").left]).flatten(1).all(1)
    assert torch.equal(whole.long(), label)


# Distractors.


def test_distractors_are_between_and_keep_the_boxes_of_the_two() -> None:
    for distance, count in product(range(24, 45), range(4)):
        data = SameClass("digits", distance=distance, canvas=(9, 60), image_size=8, distractors=count)
        assert data.boxes == make("parity", distance=distance, distractors=count).boxes
        assert data.boxes == SameClass("digits", distance=distance, canvas=(9, 60), image_size=8).boxes
        places = [data.boxes[0], *data.distractor_boxes, data.boxes[1]]
        gaps = [right[1] - left[1] - 8 for left, right in pairwise(places)]
        assert sum(gaps) == distance - 8 * count
        assert max(gaps) - min(gaps) <= 1
        assert {place[0] for place in places} == {0}


def test_distractors_change_no_pair_and_say_nothing() -> None:
    size = 20_000
    plain = SameClass("digits", **PLACE, train=size, validation=1, test=1)
    data = [SameClass("digits", **PLACE, train=size, validation=1, test=1, distractors=k) for k in (2, 3)]
    for one in (plain, *data):
        one.setup("fit")
    for one in data:
        assert all(torch.equal(a, b) for a, b in zip(one.pairs("train"), plain.pairs("train"), strict=True))
    assert torch.equal(data[0].table("train")[:4], data[1].table("train")[:4])
    left, right, first, second, label = data[0].table("train")
    numbers = data[0].images("train").labels
    # two classes, and class and label, are independent and uniform: every cell within 5 standard errors
    for a, b, cells in (
        (numbers[first], numbers[second], 100),
        (numbers[first], numbers[left], 100),
        (numbers[second], numbers[right], 100),
        (numbers[first], label, 20),
        (numbers[second], label, 20),
    ):
        seen = Counter(zip(a.tolist(), b.tolist(), strict=True))
        assert len(seen) == cells
        error = (size / cells * (1 - 1 / cells)) ** 0.5
        assert max(abs(value - size / cells) for value in seen.values()) < 5 * error
    # only what the split may draw
    assert torch.isin(torch.cat([first, second]), data[0].candidates("train")).all()


# Seeds, splits, settings.


@pytest.mark.parametrize("name", TASKS)
def test_a_pair_depends_on_seed_split_and_number_alone(name: str) -> None:
    sizes = {"train": 300, "validation": 200, "test": 250}
    data, other = make(name, **sizes, distractors=1), make(name, **sizes, distractors=1, seed=1)
    longer = make(name, train=777, validation=333, test=555, distractors=1, batch_size=7, distance=44)
    for one in (data, other, longer):
        one.setup()
    for split in SPLITS:
        table = data.table(split)
        assert torch.equal(longer.table(split)[:, : table.shape[1]], table)
        assert not torch.equal(other.table(split), table)
    used = {split: set(data.table(split)[:-1].flatten().tolist()) for split in SPLITS}
    assert not used["train"] & used["validation"]
    # the streams of the splits are unrelated
    agree = int((data.table("train")[-1, :200] == data.table("validation")[-1]).sum())
    assert abs(agree - 100) < 4.5 * 50**0.5


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("parity", {"classes": [1, 3, 7]}, r"classes \[1, 3, 7\] are all odd: give classes of both parities"),
        ("parity", {"classes": [0, 8]}, r"classes \[0, 8\] are all even"),
        ("circle", {"classes": [0, 8]}, r"IsGreater needs at least 3 classes, got \[0, 8\]"),
        ("circle", {"order": "ring"}, "order must be 'circle' or 'line', got 'ring'"),
        ("halves", {"negatives": "hard"}, "negatives must be 'any' or 'same_class', got 'hard'"),
        ("halves", {"image_size": 7}, "image_size must be even, to be halved, got 7"),
        ("halves", {"image_size": 70}, "do not fit a canvas of 9x60: it must be at least 70x70"),
        ("parity", {"distractors": -1}, "distractors must be at least 0 images, got -1"),
        ("parity", {"distractors": 4}, "distractors=4 do not fit.*room for 3 images of width 8.*at least 32"),
        ("halves", {"distractors": 8}, "distractors=8 do not fit.*room for 7 images of width 4"),
        ("circle", {"distance": 45}, "can be at most 44 apart"),
        ("halves", {"classes": [3]}, r"at least 2 different classes, got \[3\]"),
    ],
)
def test_bad_arguments_are_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(name, **options).setup()


def test_tables_are_asked_for_after_setup() -> None:
    with pytest.raises(RuntimeError, match="train pairs have not been sampled yet: call setup"):
        make("parity").pairs("train")


@final
class Constant(LightningModule):
    """Learns one number; records the labels."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))
        self.seen: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen += batch[1].tolist()
        return (self.bias - batch[1].double()).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert batch[0].shape[1:] == (1, 9, 60)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("name", TASKS)
def test_a_trainer_and_its_checkpoint(name: str, tmp_path: Path) -> None:
    data, model = make(name, train=50, root=tmp_path, distractors=1, classes=[0, 1, 2, 3]), Constant()
    options: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=1, default_root_dir=tmp_path, logger=False, enable_checkpointing=False, **options)
    trainer.fit(model, data)
    assert sorted(model.seen) == sorted(data.pairs("train").label.tolist())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = type(data).load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    again.setup("fit")
    assert (again.boxes, again.distractor_boxes) == (data.boxes, data.distractor_boxes)
    assert again.root == str(tmp_path)
    assert torch.equal(again.table("train"), data.table("train"))


NETWORK = ("--model=Classification", "--model.network=SmallResNet")
SMALL = (
    "--data.source=digits",
    "--data.image_size=8",
    "--data.canvas=[8,48]",
    "--data.distance=24",
    "--data.train=16",
    "--data.validation=8",
    "--data.test=8",
    "--data.batch_size=8",
    "--data.distractors=2",
)


def test_the_command_line_fits_the_task(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    options = (*NETWORK, "--data=IsGreater", "--data.order=line", *SMALL, "--trainer.accelerator=cpu")
    main(["fit", *options, "--trainer.max_epochs=1", "--test_after_fit=last", f"--run_dir={tmp_path / 'run'}"])
    scores = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]
    # of 8 pairs
    assert 8 * scores["test/accuracy"] in range(9)
    assert (tmp_path / "run" / "figures" / "examples.png").exists()


def test_the_command_line_says_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = (*SMALL, "--trainer.fast_dev_run=1", f"--run_dir={tmp_path / 'run'}")
    with pytest.raises(SystemExit) as stop:
        main(["fit", *NETWORK, "--data=IsGreater", *options, "--data.classes=[0,1]"])
    assert stop.value.code == 2
    assert "IsGreater needs at least 3 classes, got [0, 1]" in capsys.readouterr().err
