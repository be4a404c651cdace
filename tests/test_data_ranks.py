"""Entanglement and alignment of data sets, against the dense data tensor and sums written from the formula."""

from __future__ import annotations

import math
from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_locality.datamodules.image_sets import load_images
from lightning_locality.ranks.data import data_alignment, data_entanglement, data_spectra, pixel_tree, sample_gramians
from lightning_locality.ranks.dense import dense_spectra
from lightning_locality.ranks.spectra import entanglement_entropy, participation_ratio
from lightning_locality.tensors.mode_tree import ModeTree

TREES = [
    ModeTree.perfect(8),
    ModeTree.nested([[0, 3, 1], [4, 2], [5, [6, 7]]]),
    ModeTree.perfect(5, 3),
    ModeTree([[0, 2], [1, 3]]),
    ModeTree([[0, 1, 2, 3]]),
]


def dense(samples: Tensor, labels: Tensor, theta: float) -> Tensor:
    """The data tensor, sample by sample and mode by mode."""
    total = torch.zeros(())
    for sample, label in zip(samples.cpu(), labels.tolist(), strict=True):
        term = torch.ones(())
        for value in sample:
            angle = math.pi * theta * float(value)
            term = term.unsqueeze(-1) * torch.tensor([math.cos(angle), math.sin(angle)])
        total = total + label * term
    return total / len(samples)


def signs(count: int) -> Tensor:
    return 2 * torch.randint(2, (count,)) - 1


@pytest.mark.parametrize("tree", TREES, ids=repr)
@pytest.mark.parametrize("theta", [0.085, 1.0])
def test_equal_to_those_of_the_dense_tensor(tree: ModeTree, theta: float, device: torch.device) -> None:
    samples, labels = torch.randn(40, tree.order, device=device), signs(40).to(device)
    tensor = dense(samples, labels, theta)
    expected = dense_spectra(tensor, tree)
    spectra = data_spectra(samples, labels, tree, theta=theta, levels=tree.order)
    entropies = data_entanglement(samples, labels, tree, theta=theta, levels=tree.order)
    second = data_entanglement(samples, labels, tree, theta=theta, levels=tree.order, order=2)
    assert set(spectra) == set(expected) == set(entropies) == set(second)
    for node, values in expected.items():
        found = spectra[node].cpu()
        count = min(len(found), len(values))
        assert float(found[count:].sum()) < 1e-7 * float(values[0])
        assert float(values[count:].sum()) < 1e-7 * float(values[0])
        # squares, as far as a Gramian keeps them: what is small in the tensor is small in the entropy
        assert torch.allclose(found[:count] ** 2, values[:count] ** 2, rtol=1e-9, atol=1e-13 * float(values[0]) ** 2)
        assert float((found[:count] - values[:count]).abs().max()) <= spectra.tolerance[node] * float(values[0])
        assert entropies[node] == pytest.approx(float(entanglement_entropy(values)), rel=1e-9, abs=1e-12)
        assert second[node] == pytest.approx(math.log(float(participation_ratio(values))), rel=1e-9, abs=1e-12)
        assert second[node] <= entropies[node] + 1e-12


def test_well_conditioned_values_to_the_last_digits(device: torch.device) -> None:
    """Bits as orthogonal vectors: every value of the spectrum is as exact as the dense one."""
    samples, labels = torch.randint(2, (60, 4), device=device).double(), signs(60).to(device)
    expected = dense_spectra(dense(samples, labels, 0.5), ModeTree.perfect(4))
    spectra = data_spectra(samples, labels, theta=0.5)
    for node, values in expected.items():
        assert float((spectra[node].cpu()[: len(values)] - values).abs().max()) < 5e-15 * float(values[0])
        assert spectra.rank(node) == int((values > 1e-7 * values[0]).sum())


def test_gramians_of_a_tree_are_products_of_cosines(device: torch.device) -> None:
    tree, samples = TREES[1], torch.randn(5, 8, device=device)
    differences = math.pi * 0.3 * (samples.unsqueeze(1) - samples)
    seen = []
    for node, inner, outer in sample_gramians(samples.T.unsqueeze(1), tree, 3, 0.3):
        seen.append(node)
        for modes, gramian in ((node, inner), (tree.complement(node), outer)):
            expected = math.prod((differences[..., mode].cos() for mode in modes), start=torch.ones(()).to(device))
            assert torch.allclose(gramian, expected, rtol=1e-12, atol=1e-15)
    assert set(seen) == set(tree.nodes[:-1])


def test_many_modes_are_taken_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, labels = torch.rand(9, 30), signs(9)
    whole = data_entanglement(samples, labels)
    monkeypatch.setattr("lightning_locality.ranks.data._MAX_ENTRIES", 7 * 81)
    assert data_entanglement(samples, labels) == pytest.approx(whole, rel=1e-12)


def test_order_4096_does_not_underflow() -> None:
    """Nearly orthogonal samples: every product is far below the least number, and the entropy is ln M."""
    samples, labels = torch.rand(6, 4096), signs(6)
    for order in (1, 2):
        entropies = data_entanglement(samples, labels, theta=1.0, order=order, levels=2)  # type: ignore[arg-type]
        assert len(entropies) == 6
        for value in entropies.values():
            assert value == pytest.approx(math.log(6), rel=1e-12)


def test_channels_of_a_pixel_are_one_mode() -> None:
    images, labels = torch.rand(12, 3, 2, 2), signs(12)
    entropies = data_entanglement(images, labels, theta=0.7)
    features = images.permute(0, 2, 3, 1).flatten(1)
    groups = [[3 * pixel + channel for channel in range(3)] for pixel in range(4)]
    twin = data_entanglement(features, labels, ModeTree(groups), theta=0.7, levels=1)
    assert list(entropies) == [(0,), (1,), (2,), (3,)]
    assert [entropies[(k,)] for k in range(4)] == pytest.approx([twin[tuple(group)] for group in groups], rel=1e-10)


@pytest.mark.parametrize(
    ("labels", "positive"),
    [
        (torch.tensor([1, -1, -1, 1, 1]), None),
        (torch.tensor([1, 0, 0, 1, 1]), None),
        (torch.tensor([1, 0, 0, 1, 1]).bool(), None),
        (torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0], dtype=torch.float32), None),
        (torch.tensor([7, 3, 2, 7, 7]), 7),
    ],
)
def test_kinds_of_labels(labels: Tensor, positive: int | None) -> None:
    samples = torch.randn(5, 4)
    expected = data_entanglement(samples, torch.tensor([1, -1, -1, 1, 1]), theta=0.4)
    assert data_entanglement(samples, labels, theta=0.4, positive=positive) == expected


def test_samples_that_cancel_have_no_entanglement() -> None:
    samples, labels = torch.randn(8, 4).repeat(2, 1), torch.arange(16) < 8
    assert set(data_entanglement(samples, labels).values()) == {0.0}
    assert set(data_entanglement(samples, labels, order=2).values()) == {0.0}
    assert set(data_spectra(samples, labels).ranks().values()) == {0}


def test_angle() -> None:
    """Small angles: a product; large ones: orthogonal samples."""
    samples, labels = torch.randn(64, 64), torch.arange(64) < 40
    small, large = (data_entanglement(samples, labels, theta=theta, levels=1)[tuple(range(32))] for theta in (1e-3, 1))
    assert small < 1e-3
    assert large == pytest.approx(math.log(64), rel=1e-3)


def unbiased(k: Tensor, l: Tensor) -> float:
    """HSIC as the mean over all quadruples of distinct samples."""
    x, y = k.tolist(), l.tolist()
    terms = [x[i][j] * (y[i][j] + y[q][r] - 2 * y[i][q]) for i, j, q, r in permutations(range(len(k)), 4)]
    return sum(terms) / len(terms)


def test_alignment_is_the_ratio_of_unbiased_estimates(device: torch.device) -> None:
    x = torch.randn(9, 6, device=device)
    x[:, 3:] += x[:, :3]
    tree = ModeTree.perfect(6)
    found = data_alignment(x, tree, theta=0.3)
    differences = (math.pi * 0.3 * (x.unsqueeze(1) - x)).cos().cpu()
    for node in ((0, 1, 2, 3), (0, 1), (4,)):
        k, l = differences[..., list(node)].prod(-1), differences[..., list(tree.complement(node))].prod(-1)
        expected = unbiased(k, l) / math.sqrt(unbiased(k, k) * unbiased(l, l))
        assert found[node] == pytest.approx(expected, rel=1e-10)


def test_alignment_of_white_noise_is_zero(device: torch.device) -> None:
    """Within 4 standard errors over draws, where the entropy takes noise for entanglement."""
    draws, entropies = [], []
    for seed in range(12):
        noise = torch.rand(100, 1, 8, 8, generator=torch.Generator().manual_seed(seed)).to(device)
        draws.append(sum(data_alignment(noise, theta=0.3, levels=1).values()) / 4)
        entropies.append(min(data_entanglement(noise, torch.arange(100) % 2, theta=0.3, levels=1).values()))
    values = torch.tensor(draws)
    assert abs(float(values.mean())) < 4 * float(values.std()) / math.sqrt(len(values))
    assert float(values.std()) < 0.02
    assert min(entropies) > 0.5 * math.log(100)


def test_alignment_of_copies_is_one_and_of_a_constant_zero(device: torch.device) -> None:
    half = torch.randn(20, 4, device=device)
    assert data_alignment(torch.cat([half, half], 1), levels=1)[(0, 1, 2, 3)] == pytest.approx(1, rel=1e-12)
    constant = torch.cat([half, torch.full_like(half, 0.37)], 1)
    assert set(data_alignment(constant, levels=1).values()) == {0.0}


def fields(count: int) -> Tensor:
    """Smooth images, (count, 1, 16, 16), with deviation 1: a few waves."""
    generator = torch.Generator().manual_seed(3)
    grid = torch.linspace(0, 1, 16)
    waves = torch.stack([torch.cos(math.pi * k * grid) for k in range(3)])
    images = torch.einsum("mab,ah,bw->mhw", torch.randn(count, 3, 3, generator=generator), waves, waves)
    return (images / images.std()).unsqueeze(1)


def permuted(images: Tensor) -> Tensor:
    pixels = images.flatten(2)
    order = torch.randperm(pixels.shape[2], generator=torch.Generator().manual_seed(0)).to(images.device)
    return pixels[..., order].reshape(images.shape)


def level(values: dict[tuple[int, ...], float], size: int) -> float:
    """Mean over the nodes of a size."""
    found = [value for node, value in values.items() if len(node) == size]
    assert found
    return sum(found) / len(found)


def test_smooth_images_against_permuted_pixels(device: torch.device) -> None:
    images = fields(128).to(device)
    labels = images.flatten(1)[:, 0] > 0
    for theta in (0.05, 0.1):
        smooth, shuffled = (data_entanglement(x, labels, theta=theta) for x in (images, permuted(images)))
        aligned, mixed = (data_alignment(x, theta=theta) for x in (images, permuted(images)))
        for size in (64, 16):
            assert level(smooth, size) < level(shuffled, size)
            assert 0.02 < level(aligned, size) < level(mixed, size) < 1


@pytest.mark.images
@pytest.mark.parametrize("source", ["cifar10", "mnist"])
def test_published_direction(source: str, image_root: Path) -> None:
    """Images whose pixels are permuted are more entangled than natural ones, and noise most of all."""
    # the smaller part and grey pixels, for speed
    found = load_images(source, "test", image_root)
    labels = torch.as_tensor(found.labels)
    kept = labels <= 1
    images = torch.as_tensor(found.images)[kept][:120].double().mean(1, keepdim=True) / 255
    labels = labels[kept][:120]
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    natural, other, white = (data_entanglement(x, labels) for x in (images, permuted(images), noise))
    blocks = images.shape[2] * images.shape[3] // 4, images.shape[2] * images.shape[3] // 16
    for size in blocks:
        assert 1.05 * level(natural, size) < level(other, size) < level(white, size)
    aligned, mixed, none = (data_alignment(x) for x in (images, permuted(images), noise))
    assert 0.2 < level(aligned, blocks[0]) < level(mixed, blocks[0])
    assert abs(level(none, blocks[0])) < 0.02


def test_pixel_tree() -> None:
    assert pixel_tree(4, 4) == ModeTree.perfect(16, pattern="quadrant")
    tree = pixel_tree(3, 5, levels=1)
    assert tree.interior[:-1] == ((0, 1), (2, 3, 4), (5, 6, 10, 11), (7, 8, 9, 12, 13, 14))
    # a row of pixels is halved, and one of a single pixel is left
    assert pixel_tree(1, 4, levels=5) == ModeTree.perfect(4)


def test_levels() -> None:
    samples, labels = torch.rand(5, 64), signs(5)
    assert len(data_entanglement(samples, labels)) == 2 + 4 + 8 + 16
    assert len(data_entanglement(samples, labels, levels=1)) == 2
    assert len(data_entanglement(samples, labels, levels=99)) == 126
    assert [len(node) for node in data_entanglement(samples, labels, levels=2)] == [32, 32, 16, 16, 16, 16]
    # never none
    assert len(data_entanglement(samples, labels, ModeTree([range(64)]))) == 64
    assert len(data_alignment(torch.rand(5, 3, 28, 28))) == 4 + 16


SAMPLES, LABELS = torch.rand(6, 4), torch.tensor([0, 1, 1, 0, 0, 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": torch.rand(6, 4, 4)}, r"samples must be features .*\(6, 4, 4\)"),
        ({"samples": torch.rand(1, 4), "labels": LABELS[:1]}, "at least two samples"),
        ({"samples": torch.zeros(6, 1, 4, 4, dtype=torch.uint8)}, "samples must be floating.*images / 255"),
        ({"samples": torch.full((6, 4), math.nan)}, "24 of 24 values are not"),
        ({"labels": LABELS[:5]}, r"labels must be \(6,\), one for every sample, got \(5,\)"),
        ({"labels": torch.arange(6)}, "name the class to tell from the rest with positive="),
        ({"labels": torch.tensor([0, 1, -1, 0, 0, 1])}, "labels must be 0 and 1, or -1 and 1"),
        ({"positive": 4}, r"positive must be one of the labels, got 4: they are \[0, 1\]"),
        ({"tree": ModeTree.perfect(8)}, "tree has order 8 and samples .* have 4 modes"),
        ({"theta": 0.0}, "theta must be a positive angle"),
        ({"theta": math.inf}, "theta must be a finite number"),
        ({"levels": 0}, "levels must be at least 1, got 0"),
        ({"order": 3}, "order must be 1 or 2"),
    ],
)
def test_wrong_arguments(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"samples": SAMPLES, "labels": LABELS} | changes
    with pytest.raises(ValueError, match=message):
        data_entanglement(**arguments)  # type: ignore[arg-type]


def test_wrong_arguments_of_the_others() -> None:
    with pytest.raises(ValueError, match="at least 4 for an unbiased estimate, got 3"):
        data_alignment(torch.rand(3, 4))
    with pytest.raises(ValueError, match=r"samples must be features .* got \(\)"):
        data_alignment(torch.tensor(1.0))
    with pytest.raises(ValueError, match="height and width must hold at least two pixels, got 1 x 1"):
        pixel_tree(1, 1)
    with pytest.raises(ValueError, match="levels must be at least 1, got 0"):
        pixel_tree(4, 4, levels=0)


def test_samples_stay_as_they_are() -> None:
    samples = torch.rand(6, 1, 4, 4, dtype=torch.float32, requires_grad=True)
    before = samples.detach().clone()
    spectra = data_spectra(samples, LABELS)
    assert torch.equal(samples, before)
    assert all(values.dtype is torch.float64 and not values.requires_grad for values in spectra.values())
