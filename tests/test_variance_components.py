"""Unbiased estimates from two-way tables against sums over all pairs and against exact expectations."""

from __future__ import annotations

import math
from itertools import combinations_with_replacement, permutations, product

import pytest
import torch
from torch import Tensor

from lightning_locality.ranks.cuts import VarianceComponents, pair_moments, variance_components
from lightning_locality.ranks.spectra import participation_ratio


def slow_moments(matrix: Tensor) -> tuple[float, float]:
    """Means over all pairs of different rows and of different columns, without centring."""
    values = matrix.reshape(*matrix.shape[:2], -1)
    s2sq, s4 = [], []
    for i, k in permutations(range(len(values)), 2):
        for j, l in permutations(range(values.shape[1]), 2):
            s2sq.append(float(values[i, j] @ values[i, j] * (values[k, l] @ values[k, l])))
            s4.append(float(values[i, j] @ values[k, j] * (values[i, l] @ values[k, l])))
    return math.fsum(s2sq) / len(s2sq), math.fsum(s4) / len(s4)


def slow_components(matrix: Tensor) -> tuple[float, float, float]:
    """From products of values at different samples: E[f f'] with one, the other or both samples shared."""
    both, rows, columns, none = [], [], [], []
    for (i, j), (k, l) in product(product(*map(range, matrix.shape)), repeat=2):
        into = {(True, True): both, (True, False): rows, (False, True): columns, (False, False): none}
        into[i == k, j == l].append(float(matrix[i, j] * matrix[k, l]))
    b, r, c, n = (math.fsum(x) / len(x) for x in (both, rows, columns, none))
    return r - n, c - n, b - r - c + n


class Population:
    """A function of two finite blocks, drawn from with replacement: every expectation is a finite sum."""

    def __init__(self, rows: int, columns: int, *outputs: int) -> None:
        self.table = torch.randn(rows, columns, *outputs) + torch.randn(rows, 1, *outputs) + 3
        crossing = self.table - self.table.mean(0, keepdim=True)
        self.crossing = crossing - crossing.mean(1, keepdim=True)
        # singular values of the operator: rows and columns are weighted by their probability
        self.spectrum = torch.linalg.svdvals(self.crossing.reshape(rows, -1)) / (rows * columns) ** 0.5

    def draws(self, rows: int, columns: int) -> tuple[list[Tensor], Tensor]:
        """Return every draw once up to the order of rows and of columns, which does not matter, and its probability."""
        i, j = (
            [(list(draw), orders(draw) / size**number) for draw in combinations_with_replacement(range(size), number)]
            for size, number in zip(self.table.shape[:2], (rows, columns), strict=True)
        )
        return [self.table[a][:, b] for a, _ in i for b, _ in j], torch.tensor([p * q for _, p in i for _, q in j])


def orders(draw: tuple[int, ...]) -> int:
    return math.factorial(len(draw)) // math.prod(math.factorial(draw.count(one)) for one in set(draw))


def test_order_of_samples_does_not_matter() -> None:
    matrix = torch.randn(6, 5, 3)
    mixed = matrix[torch.randperm(6)][:, torch.randperm(5)]
    for estimate in (variance_components, pair_moments, lambda x: pair_moments(x, centred=False)):
        assert list(map(float, estimate(mixed))) == pytest.approx(list(map(float, estimate(matrix))), rel=1e-10)


@pytest.mark.parametrize("shape", [(4, 5), (2, 2), (3, 4, 3), (3, 2, 1), (4, 3, 6)])
def test_moments_without_centring(shape: tuple[int, ...], device: torch.device) -> None:
    matrix = torch.randn(shape, device=device) + 0.5
    assert tuple(map(float, pair_moments(matrix, centred=False))) == pytest.approx(
        slow_moments(matrix.cpu()), rel=1e-12
    )


def test_moments_without_centring_by_the_formula_for_one_output() -> None:
    f = torch.randn(20, 30)
    pairs = 20 * 19 * 30 * 29
    gram, squares = f @ f.T, f**2
    s4 = gram.square().sum() - gram.diagonal().square().sum()
    s4 = s4 - (squares.sum(0).square() - f.pow(4).sum(0)).sum()
    s2sq = squares.sum() ** 2 - squares.sum(0).square().sum() - squares.sum(1).square().sum() + f.pow(4).sum()
    assert tuple(map(float, pair_moments(f, centred=False))) == pytest.approx(
        (float(s2sq) / pairs, float(s4) / pairs), rel=1e-11
    )


@pytest.mark.parametrize("shape", [(2, 3), (3, 2, 2), (2, 2, 3)])
def test_estimates_are_unbiased(shape: tuple[int, ...]) -> None:
    # over all draws of four rows and four columns the mean is the expectation, exactly
    population = Population(*shape)
    draws, probability = population.draws(4, 4)
    moments = probability @ torch.tensor([pair_moments(matrix) for matrix in draws])
    truth = population.spectrum.square().sum() ** 2, population.spectrum.pow(4).sum()
    assert moments.tolist() == pytest.approx(list(map(float, truth)), rel=1e-9)
    components = probability @ torch.tensor([variance_components(matrix) for matrix in draws])
    table = population.table
    truths = (
        table.mean(1).var(0, correction=0).sum(),
        table.mean(0).var(0, correction=0).sum(),
        population.spectrum.square().sum(),
    )
    assert components.tolist() == pytest.approx(list(map(float, truths)), rel=1e-10)


def test_estimates_are_unbiased_for_blocks_of_different_size() -> None:
    population = Population(2, 2, 2)
    draws, probability = population.draws(5, 4)
    moments = probability @ torch.tensor([pair_moments(matrix) for matrix in draws])
    truth = population.spectrum.square().sum() ** 2, population.spectrum.pow(4).sum()
    assert moments.tolist() == pytest.approx(list(map(float, truth)), rel=1e-9)
    draws, probability = population.draws(2, 3)
    components = probability @ torch.tensor([variance_components(matrix) for matrix in draws])
    assert float(components[2]) == pytest.approx(float(population.spectrum.square().sum()), rel=1e-10)


def test_outputs_of_one_sample_are_no_pair() -> None:
    # rows g(x) times outputs that repeat: as independent columns they would be the same operator, at 1/C of the noise
    matrix = torch.randn(6, 5)
    once, repeated = pair_moments(matrix), pair_moments(matrix[..., None].expand(6, 5, 4))
    assert [float(m) * 16 for m in once] == pytest.approx(list(map(float, repeated)), rel=1e-11)
    unfolded = pair_moments(matrix[..., None].expand(6, 5, 4).reshape(6, 20))
    assert float(unfolded.s4) * 16 != pytest.approx(float(repeated.s4), rel=0.05)


def test_variance_components_by_products() -> None:
    matrix = torch.randn(5, 4) + 2
    assert tuple(map(float, variance_components(matrix))) == pytest.approx(slow_components(matrix), rel=1e-11)
    outputs = torch.randn(5, 4, 3)
    each = torch.tensor([slow_components(outputs[..., c]) for c in range(3)]).sum(0)
    assert tuple(map(float, variance_components(outputs))) == pytest.approx(tuple(each.tolist()), rel=1e-11)


def test_share_of_simple_functions(device: torch.device) -> None:
    rows, columns = torch.randn(40, 1, device=device), torch.randn(1, 30, device=device)
    assert abs(float(variance_components(1e3 + rows.exp() + columns.sin()).share)) < 1e-20
    signs = torch.tensor([1.0, -1.0], device=device)
    components = variance_components(signs.repeat(20)[:, None] * signs.repeat(10))
    # centred in the sample, so that nothing is due to one block alone, but for the correction of the mean
    assert float(components.crossing) == pytest.approx(40 * 20 / (39 * 19), rel=1e-12)
    assert float(components.share) == pytest.approx(1 / (1 - 1 / 20 - 1 / 40), rel=1e-12)
    assert float(variance_components(torch.full((3, 3), 7.0)).share) == 0


def test_background_does_not_count() -> None:
    f, background = torch.randn(9, 7, 2), torch.randn(9, 1, 2) + torch.randn(1, 7, 2) + 10
    assert tuple(map(float, pair_moments(f + background))) == pytest.approx(
        tuple(map(float, pair_moments(f))), rel=1e-10
    )
    assert float(variance_components(f + background).crossing) == pytest.approx(
        float(variance_components(f).crossing), rel=1e-11
    )
    assert float(pair_moments(torch.zeros(4, 4)).participation_ratio) == 0
    # a product of two functions has one singular value, however few the samples
    assert float(pair_moments(background[:, :1, 0] * background[:1, :, 0]).participation_ratio) == pytest.approx(1)


WEIGHTS = torch.tensor([1.0, 0.9, 0.8, 0.6, 0.4, 0.3, 0.2, 0.1])


def cosine_kernel(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """sum_k w_k 2 cos(k x) cos(k y): singular values w_k on the uniform measure, nothing but crossing variance."""
    x = 2 * math.pi * torch.rand(rows, 1, 1, generator=generator)
    y = 2 * math.pi * torch.rand(1, columns, 1, generator=generator)
    k = torch.arange(1, len(WEIGHTS) + 1)
    return (2 * WEIGHTS * torch.cos(k * x) * torch.cos(k * y)).sum(-1)


@pytest.mark.parametrize("size", [8, 32])
def test_cosine_kernel(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    centred, uncentred, components, naive = [], [], [], []
    for _ in range(300):
        matrix = cosine_kernel(size, size, generator)
        centred.append(torch.stack(list(pair_moments(matrix))))
        uncentred.append(torch.stack(list(pair_moments(matrix, centred=False))))
        components.append(torch.stack(list(variance_components(matrix))))
        centre = matrix - matrix.mean(0) - matrix.mean(1, keepdim=True) + matrix.mean()
        naive.append(participation_ratio(torch.linalg.svdvals(centre)))
    truth = torch.stack([WEIGHTS.square().sum() ** 2, WEIGHTS.pow(4).sum()])
    ratio = float(truth[0] / truth[1])
    for moments in (centred, uncentred):
        deviation, errors = within(moments, truth)
        assert (deviation < 4 * errors).all()
        # of a ratio of means, by the delta method
        means = torch.stack(moments).mean(0)
        linear = torch.stack([m[0] / means[1] - m[1] * means[0] / means[1] ** 2 for m in moments])
        assert abs(float(means[0] / means[1]) - ratio) < 4 * float(linear.std()) / 300**0.5
    deviation, errors = within(components, torch.tensor([0.0, 0.0, float(WEIGHTS.square().sum())]))
    assert (deviation < 4 * errors).all()
    assert abs(float(VarianceComponents(*torch.stack(components).mean(0)).share) - 1) < 0.03
    # the mean of ratios of finite matrices, which is what the estimate is for, is far below
    naive_error = float(torch.stack(naive).std()) / 300**0.5
    assert ratio - float(torch.stack(naive).mean()) > 10 * naive_error


def within(drawn: list[Tensor], truth: Tensor) -> tuple[Tensor, Tensor]:
    stacked = torch.stack(drawn)
    return (stacked.mean(0) - truth).abs(), stacked.std(0) / len(drawn) ** 0.5


def test_the_default_device_does_not_matter() -> None:
    matrix = torch.randn(6, 5)
    before = pair_moments(matrix)
    with torch.device("meta"):
        assert pair_moments(matrix) == before


def test_matrices_that_are_too_small() -> None:
    for bad in (torch.ones(3, 9), torch.ones(9, 3, 2), torch.ones(9), torch.ones(4, 4, 2, 2)):
        with pytest.raises(ValueError, match=r"matrix must be .* with at least 4 samples of each block"):
            pair_moments(bad)
    with pytest.raises(ValueError, match=r"at least 2 samples of each block, got \(1, 5\): draw more samples"):
        variance_components(torch.ones(1, 5))
    with pytest.raises(ValueError, match="at least 2"):
        pair_moments(torch.ones(5, 1), centred=False)


def test_too_few_samples_for_a_ratio() -> None:
    # pure noise in both blocks: about every second estimate of the denominator is negative
    ratios = torch.stack([pair_moments(torch.randn(4, 4)).participation_ratio for _ in range(100)])
    assert 20 < int(ratios.isnan().sum()) < 90
    assert not ratios.isinf().any()
