"""rearrange_features: planted blocks are found, the surrogate is that of the formula, images get less entangled."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_locality import ModeTree, PermutedImages, data_alignment
from lightning_locality.datamodules import feature_correlations, rearrange_features
from lightning_locality.ranks.data import pixel_tree


def nested(generator: torch.Generator, group: int) -> Tensor:
    """Samples ``(400, group^3)``: groups of groups of features, each with a signal that its features share."""
    normal = lambda count: torch.randn(400, count, generator=generator)
    outer, inner, own = normal(group), normal(group**2), normal(group**3)
    return outer.repeat_interleave(group**2, 1) + inner.repeat_interleave(group, 1) + 0.5 * own


def nodes(tree: ModeTree, order: list[int]) -> set[frozenset[int]]:
    return {frozenset(order[mode] for mode in node) for node in tree.interior}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("group", "grid"), [(2, None), (2, (2, 4)), (4, (8, 8))])
def test_planted_blocks_are_found_at_every_level(group: int, grid: tuple[int, int] | None, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    samples, hidden = nested(generator, group), torch.randperm(group**3, generator=generator)
    order = rearrange_features(samples[:, hidden], grid, seed=seed)
    assert order.sort().values.tolist() == list(range(group**3))
    found = hidden[order]
    if group == 2:
        # whatever the grid: a 2x4 image is cut into rows first, and pairs are the halves of a row
        assert nodes(ModeTree.perfect(8), found.tolist()) == nodes(ModeTree.perfect(8), list(range(8)))
    else:
        # four features each in 16 blocks of 2x2, four of them in a quadrant
        planted = nodes(ModeTree.perfect(64, arity=4), list(range(64)))
        assert nodes(pixel_tree(8, 8, levels=2), found.tolist()) == planted


def test_first_cut_is_the_smallest_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (7, 8):
        for _ in range(5):
            samples = torch.randn(12, 3, generator=generator) @ torch.randn(3, count, generator=generator)
            weights = np.abs(np.corrcoef(samples.numpy().T))
            cuts = {
                half: sum(weights[i, j] for i in half for j in range(count) if j not in half)
                for half in itertools.combinations(range(count), count // 2)
            }
            half = tuple(sorted(rearrange_features(samples)[: count // 2].tolist()))
            assert cuts[half] == pytest.approx(min(cuts.values()), rel=1e-9)


def test_odd_grids_are_halved_as_pixel_tree_does() -> None:
    tree = pixel_tree(3, 5, levels=1)
    block = torch.zeros(15, dtype=torch.int64)
    for number, node in enumerate(tree.interior[:-1]):
        block[list(node)] = number
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randperm(15, generator=generator)
    signals = torch.randn(300, 4, generator=generator)
    samples = (signals[:, block] + 0.3 * torch.randn(300, 15, generator=generator))[:, hidden]
    # blocks of 2, 3, 4 and 6: 5 against 10 in one way only
    assert nodes(tree, hidden[rearrange_features(samples, (3, 5))].tolist()) == nodes(tree, list(range(15)))


def test_correlations_of_channels_constants_and_units() -> None:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(50, 3, 2, 3, generator=generator)
    images[:, :, 0, 1] = 0.1
    images[:, :, 1, 2] -= 2 * images[:, :, 0, 0]
    found = feature_correlations(7 * images + 1000)
    for i, j in itertools.product(range(6), repeat=2):
        pairs = [images[:, c].flatten(1)[:, [i, j]].numpy() for c in range(3)]
        expected = 0.0 if i == j or 1 in (i, j) else np.mean([abs(np.corrcoef(pair.T)[0, 1]) for pair in pairs])
        assert float(found[i, j]) == pytest.approx(expected, abs=1e-9)
    # pixels of several channels are moved together
    assert rearrange_features(images).shape == (6,)


def neighbour_correlation(images: Tensor) -> float:
    one, other = images[..., :-1], images[..., 1:]
    centred = [x - x.mean(0) for x in (one, other)]
    spread = [(x**2).sum(0).sqrt() for x in centred]
    scale = spread[0] * spread[1]
    return float(((centred[0] * centred[1]).sum(0).abs() / scale)[scale > 0].mean())


def digits(**options: Any) -> PermutedImages:
    pytest.importorskip("sklearn")
    data = PermutedImages("digits", image_size=8, **options)
    data.setup("fit")
    return data


def test_permuted_digits_are_little_entangled_again() -> None:
    images = []
    for options in ({"scramble": 0.0}, {}, {"rearranged": True}):
        data = digits(mean=[0.0], std=[1.0], **options)
        images.append(data.compose("validation", torch.arange(data.size("validation")))[0])
    original, permuted, rearranged = map(neighbour_correlation, images)
    assert rearranged > (original + permuted) / 2
    alignment = [torch.tensor(list(data_alignment(each).values())).mean() for each in images]
    assert alignment[2] < (alignment[0] + alignment[1]) / 2


def test_order_is_of_the_training_images_in_use_and_of_the_seed() -> None:
    data, other = digits(rearranged=True, train=200, seed=3), digits(rearranged=True, train=201, seed=3)
    plain = digits(train=200, seed=3)
    pixels = plain.images("train").images[plain.table("train")[0]].float().flatten(2)
    permuted = pixels[..., plain.permutation].reshape(200, 1, 8, 8)
    order = rearrange_features(permuted, seed=3)
    for split in ("train", "validation"):
        before, after = (each.compose(split, torch.arange(50))[0] for each in (plain, data))
        assert torch.equal(before.flatten(2)[..., order].reshape(before.shape), after)
    assert not torch.equal(data.order, other.order)
    assert torch.equal(data.permutation, plain.permutation)
    # a test alone takes the training images, too
    alone = PermutedImages("digits", image_size=8, rearranged=True, train=200, seed=3)
    alone.setup("test")
    assert torch.equal(alone.order, data.order)
    assert not torch.equal(rearrange_features(permuted, seed=4), order)


@pytest.mark.parametrize(
    ("samples", "grid", "words"),
    [
        (torch.zeros(4), None, r"samples must be features \(M, N\) or images .*, got \(4,\)"),
        (torch.zeros(1, 4), None, r"at least two samples, got \(1, 4\)"),
        (torch.zeros(3, 4, dtype=torch.uint8), None, "samples must be floating, got torch.uint8: convert"),
        (torch.full((3, 4), torch.nan), None, "samples must be finite, and 12 of 12 values are not"),
        (torch.zeros(3, 4), (2, 3), "grid must hold the 4 features of samples, got 2 x 3"),
        (torch.zeros(3, 4), (-2, -2), "grid must hold the 4 features of samples, got -2 x -2"),
    ],
)
def test_bad_arguments_are_refused(samples: Tensor, grid: tuple[int, int] | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rearrange_features(samples, grid)
