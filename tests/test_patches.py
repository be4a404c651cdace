from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_locality import (
    AdjacentPatches,
    ContentPatches,
    FarField,
    GivenPatches,
    RandomPatches,
    UniformPatches,
)
from lightning_locality.regularizer import AbstractPatches
from lightning_locality.regularizer.patches import Box

RULES = [
    GivenPatches([(0, 0, 4, 4), (0, 8, 4, 4), (8, 4, 3, 5)]),
    UniformPatches(),
    UniformPatches(size=3, distance=4, per_sample=True),
    AdjacentPatches(),
    AdjacentPatches(size=4, per_sample=True),
    RandomPatches(sizes=(1, 6)),
    RandomPatches(sizes=(1, 5), distances=(1, 3), per_sample=True),
    ContentPatches(),
    ContentPatches(size=3, distance=5),
    FarField(size=5),
    FarField(size=3, distance=6),
    FarField(size=3, distance=(2, 9)),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def boxes_of(masks: Tensor) -> list[Box]:
    """The boxes (top, left, height, width) that masks (N, 1, H, W) mark; fails for any other shape."""
    mask = masks[:, 0].cpu().numpy()
    rows, columns = mask.any(2), mask.any(1)
    assert np.array_equal(mask, rows[:, :, None] & columns[:, None, :])
    assert all((np.diff(axis.astype(int), axis=1, prepend=0) == 1).sum(1).max() == 1 for axis in (rows, columns))
    numbers = [rows.argmax(1), columns.argmax(1), rows.sum(1), columns.sum(1)]
    return list(zip(*(number.tolist() for number in numbers), strict=True))


def gap(a: Box, b: Box) -> int:
    """Pixels between two boxes along the axis on which they are farther apart; negative where they overlap."""
    vertical = max(a[0] - b[0] - b[2], b[0] - a[0] - a[2])
    horizontal = max(a[1] - b[1] - b[3], b[1] - a[1] - a[3])
    return max(vertical, horizontal)


def chi_square(counts: dict[object, int], possible: int) -> float:
    """Deviation of counts from uniform, in standard deviations of the chi-square statistic."""
    total = sum(counts.values())
    expected = total / possible
    statistic = sum((n - expected) ** 2 / expected for n in counts.values()) + (possible - len(counts)) * expected
    return (statistic - (possible - 1)) / (2 * (possible - 1)) ** 0.5


def draws(rule: AbstractPatches, x: Tensor, number: int) -> list[tuple[Box, Box]]:
    random = generator()
    pairs = [rule.draw(x, x.roll(-1, 0), random) for _ in range(number)]
    i, j = (boxes_of(torch.cat(masks)) for masks in zip(*pairs, strict=True))
    return list(zip(i, j, strict=True))


@pytest.mark.parametrize("shape", [(3, 13, 12), (1, 11, 21)])
def test_masks_are_disjoint_and_not_empty(shape: tuple[int, int, int], device: torch.device) -> None:
    x = torch.randn(5, *shape, device=device)
    for rule in RULES:
        random = generator()
        pairs = [rule.draw(x, x.roll(-1, 0), random) for _ in range(60)]
        i, j = (torch.stack(masks) for masks in zip(*pairs, strict=True))
        for masks in (i, j):
            assert masks.dtype is torch.bool
            assert masks.device == x.device
            assert masks.shape[1:] in ((1, 1, *shape[1:]), (5, 1, *shape[1:]))
            assert masks.flatten(2).any(2).all()
        assert not (i & j).any()


def test_same_generator_same_pairs_in_any_precision(device: torch.device) -> None:
    x = torch.randint(-8, 9, (6, 2, 13, 17), device=device).double() / 8
    for rule in RULES:
        reference = rule.draw(x.cpu(), x.cpu().roll(-1, 0), generator(3))
        for dtype in (torch.float64, torch.float32):
            pair = rule.draw(x.to(dtype), x.to(dtype).roll(-1, 0), generator(3))
            assert torch.equal(pair.i.cpu(), reference.i)
            assert torch.equal(pair.j.cpu(), reference.j)


def test_given_patches_toss_a_fair_coin() -> None:
    a, b = (0, 0, 2, 3), (3, 5, 2, 2)
    pairs = draws(GivenPatches([a, b]), torch.zeros(2, 1, 6, 7), 2000)
    assert set(pairs) == {(a, b), (b, a)}
    assert abs(pairs.count((a, b)) - 1000) < 3 * (2000 / 4) ** 0.5


def test_given_patches_bind_boxes_of_the_data_but_keep_their_own() -> None:
    a, b, c = (0, 0, 2, 2), (0, 4, 2, 2), (4, 0, 2, 2)
    rule, x = GivenPatches(), torch.zeros(2, 1, 6, 6)
    with pytest.raises(ValueError, match=r"no boxes: .*bind\(boxes\)"):
        rule.draw(x, x, generator())
    rule.bind([a, b])
    assert set(draws(rule, x, 1)[0]) == {a, b}
    rule.bind([a, c])
    assert set(draws(rule, x, 1)[0]) == {a, c}
    own = GivenPatches([a, b])
    own.bind([a, c])
    assert set(draws(own, x, 1)[0]) == {a, b}


@pytest.mark.parametrize(("size", "distance"), [(2, 0), (1, 1), (2, 2)])
@pytest.mark.parametrize("per_sample", [False, True])
def test_uniform_patches_are_uniform_over_the_pairs_that_fit(size: int, distance: int, per_sample: bool) -> None:
    height, width = 5, 7
    x = torch.zeros(4000 if per_sample else 1, 1, height, width)
    pairs = draws(UniformPatches(size, distance, per_sample), x, 1 if per_sample else 1000)
    places = [(r, c, size, size) for r in range(height - size + 1) for c in range(width - size + 1)]
    partners = {i: [j for j in places if gap(i, j) >= distance] for i in places}
    possible = {i: len(others) for i, others in partners.items() if others}
    assert all(j in partners[i] for i, j in pairs)
    first = [i for i, _ in pairs]
    assert abs(chi_square({i: first.count(i) for i in set(first)}, len(possible))) < 3
    # given I, J is uniform over its partners: weight each place of I by what is expected of it
    deviations = []
    for i, number in possible.items():
        second = [j for k, j in pairs if k == i]
        deviations.append(chi_square({j: second.count(j) for j in set(second)}, number) if number > 1 else 0.0)
    assert abs(sum(deviations)) / len(deviations) ** 0.5 < 3.5


@pytest.mark.parametrize("size", [1, 2])
def test_adjacent_patches_touch_and_are_uniform(size: int) -> None:
    pairs = draws(AdjacentPatches(size, per_sample=True), torch.zeros(4000, 1, 6, 7), 1)
    assert {gap(i, j) for i, j in pairs} == {0}
    middle = (2, 3, size, size)
    places = [(r, c, size, size) for r in range(7 - size) for c in range(8 - size)]
    touching = [j for j in places if gap(middle, j) == 0]
    second = [j for i, j in pairs if i == middle]
    assert set(second) <= set(touching)
    assert abs(chi_square({j: second.count(j) for j in set(second)}, len(touching))) < 3


def test_random_patches_draw_every_size_and_keep_the_distance() -> None:
    pairs = draws(RandomPatches((1, 4), (2, 3), per_sample=True), torch.zeros(2000, 1, 8, 12), 1)
    sizes = [i[2] for i, _ in pairs]
    assert all(i[2:] == j[2:] and i[2] == i[3] for i, j in pairs)
    assert abs(chi_square({s: sizes.count(s) for s in set(sizes)}, 4)) < 3
    assert min(gap(i, j) for i, j in pairs) == 2


def test_per_sample_pairs_differ() -> None:
    x = torch.zeros(16, 1, 30, 30)
    for kind in (UniformPatches, AdjacentPatches, RandomPatches):
        pair = kind(per_sample=True).draw(x, x, generator())
        assert len(pair.i) == 16
        assert len(set(boxes_of(pair.j))) > 8
        assert len(kind().draw(x, x, generator()).i) == 1


def test_content_patches_follow_the_squared_difference(device: torch.device) -> None:
    x = torch.zeros(4000, 2, 4, 9, device=device)
    donated = torch.zeros_like(x)
    donated[:, 0, 0, 0], donated[:, 1, 3, 4], donated[:, 0, 1, 8] = 1.0, -2.0, 3.0
    pair = ContentPatches(size=1).draw(x, donated, generator())
    second = [box[:2] for box in boxes_of(pair.j)]
    shares = [second.count(place) / 4000 for place in ((0, 0), (3, 4), (1, 8))]
    expected = [1 / 14, 4 / 14, 9 / 14]
    assert sum(shares) == 1
    assert shares == pytest.approx(expected, abs=4 * (0.25 / 4000) ** 0.5)
    first = [box[:2] for box in boxes_of(pair.i)]
    of_third = [i for i, j in zip(first, second, strict=True) if j == (1, 8)]
    assert of_third.count((0, 0)) / len(of_third) == pytest.approx(1 / 5, abs=0.04)
    assert set(of_third) == {(0, 0), (3, 4)}


@pytest.mark.parametrize("rule", [ContentPatches(3), ContentPatches(2, 4), FarField(3), FarField(3, 5)])
def test_content_is_taken_where_there_is_some(rule: AbstractPatches) -> None:
    x = torch.randn(500, 1, 9, 15)
    donated = x.clone()
    donated[torch.arange(500), 0, torch.randint(9, (500,)), torch.randint(0, 2, (500,)) * 14] += 1e-3
    random = generator()
    for _ in range(5):
        pair = rule.draw(x, donated, random)
        assert ((x != donated) & pair.j).flatten(1).any(1).all()


def test_content_patches_keep_the_distance() -> None:
    x = torch.randn(400, 1, 8, 11)
    pairs = draws(ContentPatches(2, 5), x, 3)
    assert min(gap(i, j) for i, j in pairs) == 5


@pytest.mark.parametrize("rule", [ContentPatches(1, 1), FarField(1, 1)])
def test_samples_that_differ_nowhere_get_uniform_patches(rule: AbstractPatches) -> None:
    x, random = torch.randn(3000, 1, 3, 5), generator()
    pairs = [rule.draw(x, x, random) for _ in range(10)]
    counts = sum(pair.j.sum((0, 1)) for pair in pairs)
    assert isinstance(counts, Tensor)
    assert abs(chi_square(dict(enumerate(counts.flatten().tolist())), 15)) < 3
    assert all(pair.i.flatten(1).any(1).all() for pair in pairs)


@pytest.mark.parametrize("distance", [0, 1, 4])
def test_far_field_is_every_pixel_at_the_distance(distance: int) -> None:
    x = torch.randn(50, 1, 10, 12)
    pair = FarField(3, distance).draw(x, x.roll(-1, 0), generator())
    for i, box in zip(pair.i[:, 0], boxes_of(pair.j), strict=True):
        assert box[2:] == (3, 3)
        expected = [[gap((row, column, 1, 1), box) >= distance for column in range(12)] for row in range(10)]
        assert i.tolist() == expected


def test_far_field_draws_one_distance_per_batch_from_its_range() -> None:
    x, random = torch.randn(10, 1, 6, 20), generator()
    pairs = [FarField(4, (0, None)).draw(x, x.roll(-1, 0), random) for _ in range(600)]
    top, left, _, _ = torch.tensor(boxes_of(torch.cat([pair.j for pair in pairs]))).T.reshape(4, 600, 10, 1, 1)
    rows, columns = torch.arange(6).unsqueeze(1), torch.arange(20)
    vertical = torch.maximum(top - rows - 1, rows - top - 4)
    horizontal = torch.maximum(left - columns - 1, columns - left - 4)
    used = torch.stack([pair.i for pair in pairs]).squeeze(2)
    seen = torch.where(used, torch.maximum(vertical, horizontal), 99).amin((1, 2, 3)).tolist()
    assert set(seen) == set(range(13))
    assert abs(chi_square({d: seen.count(d) for d in set(seen)}, 13)) < 3


def test_patches_that_do_not_fit_say_what_fits() -> None:
    x = torch.zeros(2, 1, 6, 8)
    for rule, message in (
        (UniformPatches(5), "size 5 does not fit.*at most 4 x 4"),
        (UniformPatches(2, 5), "distance 5 does not fit.*at most 4"),
        (AdjacentPatches(7), "size 7 does not fit.*at most 4 x 4"),
        (RandomPatches(), "size 14 does not fit.*at most 4 x 4"),
        (RandomPatches((1, 3), (0, 4)), "distance 4 does not fit.*at most 2"),
        (ContentPatches(9), "size 9 does not fit.*at most 4 x 4"),
        (FarField(), "size 14 does not fit.*at most 6"),
        (FarField(3, 5), "distance 5 does not fit.*at most 4"),
        (GivenPatches([(0, 0, 2, 2), (0, 7, 2, 2)]), r"\(0, 7, 2, 2\) is not a box inside an image of 6 x 8"),
    ):
        with pytest.raises(ValueError, match=message):
            rule.draw(x, x, generator())


def test_wrong_arguments() -> None:
    for build, message in (
        (lambda: UniformPatches(0), "size must be at least 1 pixel, got 0"),
        (lambda: ContentPatches(-2), "size must be at least 1 pixel, got -2"),
        (lambda: UniformPatches(2, -1), "distance must be ascending and at least 0 pixels, got -1"),
        (lambda: RandomPatches((0, 3)), "sizes must be ascending and at least 1 pixels"),
        (lambda: RandomPatches((4, 3)), "sizes must be ascending"),
        (lambda: FarField(3, (5, 2)), "distance must be ascending"),
        (lambda: GivenPatches([(0, 0, 2, 2)]), "boxes must be at least two"),
        (lambda: UniformPatches(2.5), "size must be a whole number, got 2.5"),
        (lambda: UniformPatches((2, 4)), r"size must be a whole number, got \(2, 4\)"),
        (lambda: ContentPatches(2, (0, 4)), r"distance must be a whole number, got \(0, 4\)"),
        (lambda: AdjacentPatches(None), "size must be a whole number, got None"),
        (lambda: FarField(3, 1.5), "distance must be a whole number or a list of 2 .*, got 1.5"),
        (lambda: FarField(3, (1, 2, 3)), "distance must be a whole number or a list of 2 whole numbers or None, got"),
        (lambda: RandomPatches((2, 2.5)), "sizes must be a list of 2 whole numbers, got \\(2, 2.5\\)"),
        (
            lambda: GivenPatches([(0, 0, 2, 2), (4, 4, 2, 0.5)]),
            "boxes must be a list of lists of 4 whole numbers or None, got .*0.5",
        ),
        (lambda: GivenPatches([(0, 0, 4, 4), (3, 3, 2, 2)]), "overlap"),
        (lambda: GivenPatches([(0, 0, 4, 4), (-1, 8, 2, 2)]), "not a box inside"),
        (lambda: GivenPatches([(0, 0, 4, 4), (8, 8, 2)]), "boxes must be a list of lists of 4 whole numbers or None"),  # type: ignore[list-item]
    ):
        with pytest.raises(ValueError, match=message):
            build()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_draws_do_not_wait_for_the_device() -> None:
    x = torch.randn(4, 1, 13, 17, device="cuda")
    for rule in RULES:
        rule.draw(x, x.roll(-1, 0), generator())
        torch.cuda.set_sync_debug_mode("error")
        try:
            rule.draw(x, x.roll(-1, 0), generator())
        finally:
            torch.cuda.set_sync_debug_mode("default")
