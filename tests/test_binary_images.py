from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_locality.datamodules.binary_images import BinaryImages
from lightning_locality.datamodules.image_sets import ImagesNotFoundError, UnknownSourceError, load_images
from lightning_locality.tensors.cp import CP
from lightning_locality.tensors.factorization import Entries

pytest.importorskip("sklearn.datasets")


def parts(data: BinaryImages) -> tuple[Entries, Entries]:
    train, test = data.problem.train, data.problem.test
    assert isinstance(train, Entries)
    assert isinstance(test, Entries)
    assert data.problem.target is None
    return train, test


def digits(**options: Any) -> BinaryImages:
    return BinaryImages(source="digits", **options)


def test_digits_are_the_pixels_from_half_the_maximum_on() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    official = {tuple((image >= 8).flatten().astype(int)) for image in bunch.images}
    train, test = parts(digits())
    rows = torch.cat([train.indices, test.indices])
    assert rows.shape == (1797, 64)
    assert rows.dtype == torch.uint8
    assert {tuple(row) for row in rows.tolist()} == official
    assert sum(train.values == 2) + sum(test.values == 2) == int((bunch.target == 6).sum())
    assert train.values.dtype == torch.float64
    assert set(train.values.tolist()) == {0.0, 2.0}


def test_pixels_are_row_by_row_and_rounded() -> None:
    train, test = parts(digits(positive=3))
    for part, entries in (("train", train), ("test", test)):
        found = load_images("digits", part)  # type: ignore[arg-type]
        twin = np.round(found.images[:, 0].numpy() / 255.0).reshape(len(found.images), 64)
        assert np.array_equal(entries.indices.numpy(), twin)
        assert torch.equal(entries.values, torch.where(found.labels == 3, 2.0, 0.0))


def test_values_of_ones_own() -> None:
    train, _ = parts(digits(values=(-1.0, 1.0)))
    published, _ = parts(digits())
    assert torch.equal(train.values, published.values - 1)


def test_random_images_keep_the_labels() -> None:
    original, drawn = parts(digits()), parts(digits(variant="random_images"))
    for before, after in zip(original, drawn, strict=True):
        assert torch.equal(before.values, after.values)
        assert after.indices.shape == before.indices.shape
        assert after.indices.dtype == torch.uint8
        bits = after.indices.double()
        assert set(after.indices.flatten().tolist()) == {0, 1}
        assert abs(bits.mean().item() - 0.5) < 4.5 * 0.5 / bits.numel() ** 0.5
        # every pixel is a coin of its own
        assert (bits.mean(0) - 0.5).abs().max() < 5 * 0.5 / len(bits) ** 0.5
    assert not torch.equal(drawn[0].indices[:359], drawn[1].indices)


def test_random_labels_keep_the_images_and_the_counts() -> None:
    original, drawn = parts(digits()), parts(digits(variant="random_labels"))
    for before, after in zip(original, drawn, strict=True):
        assert torch.equal(before.indices, after.indices)
        assert (before.values == 2).sum() == (after.values == 2).sum()
        kept = ((before.values == 2) & (after.values == 2)).sum().item()
        positive = (before.values == 2).sum().item()
        # as many by chance as a random choice would keep
        assert kept < 3 * positive**2 / len(before.values) + 5


def test_a_smaller_set_is_a_part_of_the_whole() -> None:
    whole, small = parts(digits()), parts(digits(train=200, test=50))
    assert (len(small[0].values), len(small[1].values)) == (200, 50)
    for all_of, some in zip(whole, small, strict=True):
        known = {(*row, value) for row, value in zip(all_of.indices.tolist(), all_of.values.tolist(), strict=True)}
        assert all(
            (*row, value) in known for row, value in zip(some.indices.tolist(), some.values.tolist(), strict=True)
        )
    # not the first ones
    assert not torch.equal(whole[0].indices[:200], small[0].indices)


@pytest.mark.parametrize("variant", ["original", "random_images", "random_labels"])
def test_the_seed_is_all_there_is(variant: Any) -> None:
    options: dict[str, Any] = {"variant": variant, "train": 300}
    first = parts(digits(seed=1, **options))
    torch.manual_seed(5)
    again, other = parts(digits(seed=1, **options)), parts(digits(seed=2, **options))
    for left, right in zip(itertools.chain(*first), itertools.chain(*again), strict=True):
        assert torch.equal(left, right)
    assert not all(torch.equal(left, right) for left, right in zip(first[0], other[0], strict=True))


def test_trivial_error_is_that_of_the_mean() -> None:
    data = digits()
    train, _ = parts(data)
    labels = train.values / 2
    assert data.trivial_error == pytest.approx((labels - labels.mean()).square().mean().item(), rel=1e-12)
    assert digits(values=(5.0, -1.0)).trivial_error == pytest.approx(data.trivial_error, rel=1e-12)


def test_colour_images_become_grey(tmp_path: Path) -> None:
    for name, level in (("dark", 60), ("light", 200)):
        (tmp_path / name).mkdir()
        for k in range(5):
            pixels = np.full((4, 6, 3), level, dtype=np.uint8)
            pixels[0, 0] = 255 - level
            Image.fromarray(pixels).save(tmp_path / name / f"{k}.png")
    data = BinaryImages(f"folder:{tmp_path}", positive=1)
    train, _ = parts(data)
    assert train.indices.shape == (8, 24)
    expected = torch.zeros(8, 24, dtype=torch.uint8)
    expected[:, 0] = 1
    light = train.values == 2
    assert light.sum() == 4
    assert torch.equal(train.indices, torch.where(light[:, None], 1 - expected, expected))


def test_the_bits_are_indices_of_a_factorisation() -> None:
    train, _ = parts(digits(train=20))
    model = CP((2,) * 64, rank=3, init_mean=1.0, init_scale=1e-3)
    twin = torch.ones(20, 3)
    for mode, factor in enumerate(model.factors):
        twin = twin * factor[train.indices[:, mode].long()]
    assert torch.allclose(model.entries(train.indices), twin.sum(1), rtol=1e-12)


def test_what_makes_no_sense_is_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"variant": "random"}, "variant must be 'original', 'random_images' or 'random_labels', got 'random'"),
        ({"train": 0}, "train must be at least 1 image"),
        ({"test": -3}, "test must be at least 1 image.*got -3"),
        ({"values": (1.0, 1.0)}, "values must be two different numbers"),
        ({"epoch_length": 0}, "epoch_length"),
        ({"source": "minst"}, "did you mean 'mnist'"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            BinaryImages(**options)


def test_what_the_set_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"positive=10 is no label of digits, which has \[0, 1,"):
        digits(positive=10).setup("fit")
    with pytest.raises(ValueError, match="train=1439 is more than the 1438 images of digits"):
        digits(train=1439).setup("fit")
    assert issubclass(UnknownSourceError, ValueError)


def test_a_missing_set_is_reported(tmp_path: Path) -> None:
    data = BinaryImages(root=tmp_path, download=False)
    data.prepare_data()
    with pytest.raises(ImagesNotFoundError, match="no mnist in root="):
        data.setup("fit")


def test_the_root_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIGHTNING_LOCALITY_DATA", str(tmp_path))
    assert BinaryImages().root == str(tmp_path)
    monkeypatch.delenv("LIGHTNING_LOCALITY_DATA")
    assert BinaryImages().root == "data"


@pytest.mark.images
@pytest.mark.parametrize(
    ("source", "positives", "test_positives"), [("mnist", 5918, 958), ("fashion_mnist", 6000, 1000)]
)
def test_the_published_sets(source: str, positives: int, test_positives: int, image_root: Path) -> None:
    data = BinaryImages(source=source, root=image_root, download=False)
    train, test = parts(data)
    assert train.indices.shape == (60_000, 784)
    assert test.indices.shape == (10_000, 784)
    assert int((train.values == 2).sum()) == positives
    assert int((test.values == 2).sum()) == test_positives
    share = positives / 60_000
    assert data.trivial_error == pytest.approx(share * (1 - share), rel=1e-12)
    # drawn at 0.09 in the published figure
    assert round(data.trivial_error, 2) == 0.09
    name = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[source]
    raw = (Path(os.environ["LIGHTNING_LOCALITY_DATA"]) / name / "raw" / "t10k-images-idx3-ubyte").read_bytes()
    pixels = np.frombuffer(raw, dtype=np.uint8, offset=16).reshape(10_000, 784)
    assert np.array_equal(test.indices.numpy(), np.round(pixels / 255.0))
