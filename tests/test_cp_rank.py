from __future__ import annotations

import math
from functools import reduce

import numpy as np
import pytest
import torch
from tensorly.cp_tensor import cp_to_tensor
from tensorly.decomposition import parafac
from torch import Tensor

from lightning_locality.ranks.cp_rank import CPRankNotFoundError, cp_epsilon_ranks, cp_rank
from lightning_locality.ranks.levenberg_marquardt import _normal_equations, _sum, fit_cp


def outer_sum(factors: list[Tensor]) -> Tensor:
    """Sum over r of the outer products of the columns r, one component at a time."""
    components = [
        reduce(lambda a, b: a[..., None] * b, [factor[:, r] for factor in factors]) for r in range(factors[0].shape[1])
    ]
    return torch.stack(components).sum(0)


def collinear(rank: int, collinearity: float, seed: int = 0, size: int = 8, order: int = 4) -> Tensor:
    """Norm 1; vectors of a mode are normal ones, to which one for all is added: about that is their inner product."""
    generator = torch.Generator().manual_seed(seed)
    factors = []
    for _ in range(order):
        drawn = torch.randn(size, rank + 1, generator=generator)
        drawn = drawn / drawn.norm(dim=0)
        drawn = math.sqrt(collinearity) * drawn[:, :1] + math.sqrt(1 - collinearity) * drawn[:, 1:]
        factors.append(drawn / drawn.norm(dim=0))
    tensor = outer_sum(factors)
    return tensor / tensor.norm()


def published_search(tensor: Tensor) -> int:
    """Bisection of 1 to 512 by one alternating least squares fit each, and a mean squared error of 1e-6."""
    target = tensor.numpy()
    low, high = 1, 512
    while low < high:
        middle = (low + high) // 2
        # more components than this fit any tensor of the table, and their sweeps take minutes
        fitted = middle > 16
        if not fitted:
            found = parafac(target, middle, n_iter_max=100, init="random", random_state=0, tol=1e-8)
            fitted = bool(np.mean((cp_to_tensor(found) - target) ** 2) < 1e-6)
        low, high = (low, middle) if fitted else (middle + 1, high)
    return low


TABLE = [(3, 0.0, 0, 3), (10, 0.0, 0, 10), (3, 0.9, 0, 3), (6, 0.9, 1, 2), (6, 0.97, 0, 1)]


@pytest.mark.parametrize(("rank", "collinearity", "seed", "published"), TABLE)
def test_where_the_published_search_is_wrong(
    rank: int, collinearity: float, seed: int, published: int, device: torch.device
) -> None:
    tensor = collinear(rank, collinearity, seed)
    found = cp_rank(tensor.to(device))
    assert (found.rank, found.lower_bound, found.certified) == (rank, rank, True)
    assert found.error < 1e-6
    factors = [factor.cpu() for factor in found.factors]
    assert [factor.shape for factor in factors] == [(8, rank)] * 4
    assert float((outer_sum(factors) - tensor).norm()) == pytest.approx(found.error, rel=1e-6, abs=1e-14)
    components = [float(outer_sum([factor[:, [r]] for factor in factors]).norm()) for r in range(rank)]
    assert found.condition == pytest.approx(sum(components), rel=1e-10)
    assert published_search(tensor) == published


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("rank", "collinearity"), [row[:2] for row in TABLE])
def test_found_for_any_seed(rank: int, collinearity: float, seed: int) -> None:
    found = cp_rank(collinear(rank, collinearity, seed + 2), seed=seed)
    assert (found.rank, found.certified) == (rank, True)


@pytest.mark.parametrize(("shape", "bound", "generic"), [((3, 3, 3), 3, 5), ((4, 4, 4), 4, 7), ((2,) * 6, 8, 10)])
def test_ranks_above_the_bound(shape: tuple[int, ...], bound: int, generic: int) -> None:
    # known generic ranks: number of entries over number of parameters, rounded up, but for 3 x 3 x 3
    tensor = torch.randn(shape)
    found = cp_rank(tensor)
    assert torch.allclose(outer_sum(list(found.factors)), tensor, atol=1e-5)
    assert (found.rank, found.lower_bound, found.certified) == (generic, bound, False)


def test_matrix_multiplication() -> None:
    # of 2 x 2 matrices takes seven multiplications (Strassen, Gaussian elimination is not optimal, 1969)
    tensor = torch.zeros(4, 4, 4)
    for i in range(2):
        for j in range(2):
            for k in range(2):
                tensor[2 * i + j, 2 * j + k, 2 * k + i] = 1
    found = cp_rank(tensor)
    assert (found.rank, found.lower_bound, found.certified) == (7, 4, False)
    assert torch.allclose(outer_sum(list(found.factors)), tensor, atol=1e-5)


def test_border_rank() -> None:
    # a a b + a b a + b a a: rank 3, and a limit of tensors of rank 2 whose components grow
    tensor = torch.zeros(2, 2, 2)
    tensor[0, 0, 1] = tensor[0, 1, 0] = tensor[1, 0, 0] = 1
    near = {rtol: cp_rank(tensor, rtol) for rtol in (1e-2, 1e-3, 1e-4)}
    assert [found.rank for found in near.values()] == [2, 2, 2]
    assert all(found.certified for found in near.values())
    conditions = [found.condition for found in near.values()]
    # ten times as close takes components sqrt(10) times as large
    assert conditions[1] > 2.5 * conditions[0]
    assert conditions[2] > 2.5 * conditions[1]
    exact = cp_rank(tensor, 1e-6)
    assert (exact.rank, exact.lower_bound, exact.certified) == (3, 2, False)
    assert exact.condition < 10


def test_real_rank_is_meant() -> None:
    # real part of (a + ib)^3: 2 components with complex vectors, 3 with real ones, none of two come close
    tensor = torch.zeros(2, 2, 2)
    tensor[0, 0, 0] = 1
    tensor[0, 1, 1] = tensor[1, 0, 1] = tensor[1, 1, 0] = -1
    found = cp_rank(tensor)
    assert (found.rank, found.lower_bound) == (3, 2)


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (1, 4), (6, 6)])
def test_matrices(shape: tuple[int, int], device: torch.device) -> None:
    matrix = torch.randn(shape, device=device)
    found = cp_rank(matrix)
    assert (found.rank, found.certified) == (min(shape), True)
    assert torch.allclose(found.factors[0] @ found.factors[1].mT, matrix, atol=1e-12)
    low = torch.randn(6, 2, device=device) @ torch.randn(2, 9, device=device)
    assert cp_rank(low).rank == 2


def test_vectors_and_modes_of_one_row() -> None:
    vector = torch.tensor([3.0, -4.0])
    found = cp_rank(vector)
    assert found[:3] == (1, 1, True)
    assert torch.allclose(found.factors[0][:, 0], vector)
    tensor = collinear(3, 0.5, size=4, order=3)[:, None, :, :, None]
    found = cp_rank(tensor)
    assert found[:3] == (3, 3, True)
    assert [len(factor) for factor in found.factors] == [4, 1, 4, 4, 1]
    assert torch.allclose(outer_sum(list(found.factors)), tensor, atol=2e-6)
    assert cp_rank(torch.full((1, 1, 1), -2.0))[:3] == (1, 1, True)
    assert float(outer_sum(list(cp_rank(torch.full((1, 1, 1), -2.0)).factors))) == pytest.approx(-2)


def test_modes_of_different_size_and_high_order() -> None:
    factors = [torch.randn(size, 4) for size in (2, 5, 3, 6)]
    assert cp_rank(outer_sum(factors))[:3] == (4, 4, True)
    # beyond order 8 not all cuts are looked at
    assert cp_rank(outer_sum([torch.randn(2, 3) for _ in range(10)]))[:3] == (3, 3, True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64])
def test_zeros(dtype: torch.dtype) -> None:
    found = cp_rank(torch.zeros(2, 3, 4, dtype=dtype))
    assert found[:5] == (0, 0, True, 0.0, 0.0)
    assert [factor.shape for factor in found.factors] == [(2, 0), (3, 0), (4, 0)]


def test_any_scale_and_type() -> None:
    tensor = collinear(3, 0.9)
    plain = cp_rank(tensor)
    for scale in (1e-200, 1e200):
        found = cp_rank(scale * tensor)
        assert found[:3] == plain[:3]
        assert torch.allclose(outer_sum(list(found.factors)) / scale, tensor, atol=1e-6)
    assert cp_rank(tensor.float())[:3] == plain[:3]
    counts = torch.zeros(2, 2, 2, dtype=torch.int64)
    counts[0, 0, 0], counts[1, 1, 1] = 5, 1
    assert cp_rank(counts)[:3] == (2, 2, True)


def test_same_seed_same_result_and_nothing_global_drawn() -> None:
    tensor = collinear(6, 0.9).requires_grad_()
    state = torch.get_rng_state()
    first, second, other = cp_rank(tensor), cp_rank(tensor), cp_rank(tensor, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.factors, second.factors, strict=True))
    assert not torch.equal(first.factors[0], other.factors[0])
    assert not any(factor.requires_grad for factor in first.factors)


def test_noise_is_told_from_components() -> None:
    clean = collinear(3, 0.0)
    noise = torch.randn(8, 8, 8, 8)
    tensor = clean + 1e-4 * noise / noise.norm()
    found = cp_epsilon_ranks(tensor, max_rank=5)
    assert list(found) == [1e-1, 1e-2, 1e-3, 1e-6]
    assert [found[rtol] and found[rtol].rank for rtol in found] == [3, 3, 3, None]
    for rtol, within in found.items():
        if within is not None:
            assert within.error <= rtol


def test_epsilon_ranks_are_those_of_the_largest_components() -> None:
    # orthogonal components: what is left out is the distance
    sizes = torch.tensor([1.0, 0.3, 0.03, 3e-4, 3e-5])
    frames = [torch.linalg.qr(torch.randn(6, 5)).Q for _ in range(3)]
    found = cp_epsilon_ranks(outer_sum([frames[0] * sizes, *frames[1:]]), tolerances=[1e-3, 0.5, 0.1, 1e-4, 1e-6])
    assert {rtol: within and (within.rank, within.certified) for rtol, within in found.items()} == {
        0.5: (1, True),
        0.1: (2, True),
        1e-3: (3, True),
        1e-4: (4, True),
        1e-6: (5, True),
    }


def test_distances_given_twice() -> None:
    matrix = torch.diag(torch.tensor([1.0, 0.05, 0.005]))
    found = cp_epsilon_ranks(matrix, [0.1, 0.1, 1e-6], max_rank=1)
    assert {rtol: within and within.rank for rtol, within in found.items()} == {0.1: 1, 1e-6: None}


def test_one_mode_is_left_by_compression() -> None:
    # what is left out of the modes 1 and 2 is below the threshold, what is left out of mode 0 just above
    tensor = torch.zeros(2, 2, 2)
    tensor[0, 0, 0], tensor[1, 1, 0], tensor[1, 0, 1] = 1, 5e-5, 5e-5
    found = cp_rank(tensor, rtol=1e-2)
    assert found[:3] == (1, 1, True)
    assert float((outer_sum(list(found.factors)) - tensor).norm()) == pytest.approx(2**0.5 * 5e-5, rel=1e-3)


def test_starts_are_drawn_on_the_cpu_whatever_the_default_device() -> None:
    tensor = collinear(3, 0.5, order=3)
    with torch.device("meta"):
        factors, _, _ = fit_cp(tensor, 3)
    assert torch.equal(factors[0], fit_cp(tensor, 3)[0][0])


def test_max_rank() -> None:
    tensor = torch.randn(4, 4, 4)
    with pytest.raises(CPRankNotFoundError, match=r"max_rank = 3 .* rtol = 1e-06 .* the bound is 4; raise") as caught:
        cp_rank(tensor, max_rank=3)
    assert (caught.value.lower_bound, caught.value.error) == (4, 1.0)
    with pytest.raises(CPRankNotFoundError, match=r"max_rank = 5 .* the closest fit is at 0\.\d+") as caught:
        cp_rank(tensor, max_rank=5)
    assert 0.01 < caught.value.error < 0.6
    # that close it is found
    assert cp_rank(tensor, rtol=1.01 * caught.value.error, max_rank=5).rank <= 5
    assert cp_rank(tensor, max_rank=7).rank == 7


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.tensor([[1.0, math.nan], [math.inf, 2.0]]), "2 of 4 entries that are not finite"),
        (torch.tensor(1.0), "must be real and have modes and entries"),
        (
            torch.zeros(3, 0, 2, dtype=torch.float64),
            r"must be real and have modes and entries, got torch.float64 \(3, 0, 2\)",
        ),
        (torch.zeros(2, 2, dtype=torch.complex128), "must be real and have modes and entries, got torch.complex128"),
    ],
)
def test_tensors_without_a_rank(tensor: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cp_rank(tensor)
    with pytest.raises(ValueError, match=message):
        cp_epsilon_ranks(tensor)


@pytest.mark.parametrize("rtol", [0.0, 1.0, -1e-3, math.nan])
def test_distances_without_meaning(rtol: float) -> None:
    with pytest.raises(
        ValueError, match=r"rtol must be (between 0 and 1, relative to the tensor's norm|a finite number)"
    ):
        cp_rank(torch.ones(2, 2, 2), rtol)
    with pytest.raises(ValueError, match=r"rtol must be between 0 and 1|tolerances must be a list of finite numbers"):
        cp_epsilon_ranks(torch.ones(2, 2, 2), [0.1, rtol])


def test_no_start() -> None:
    for options in ({"starts": 0}, {"max_steps": 0}):
        with pytest.raises(ValueError, match="starts and max_steps must be at least 1"):
            cp_rank(torch.randn(3, 3, 3), **options)


@pytest.mark.parametrize("shape", [(3, 4, 2, 5), (4, 2, 3), (2, 3, 2, 2, 2)])
def test_normal_equations_against_autograd(shape: tuple[int, ...], device: torch.device) -> None:
    rank, starts = 3, 2
    factors = [torch.randn(starts, size, rank, device=device) for size in shape]
    residual = torch.randn(starts, *shape, device=device)
    hessian, descent = _normal_equations(factors, residual)
    for start in range(starts):
        chosen = tuple(factor[start] for factor in factors)
        assert torch.allclose(_sum(factors)[start], outer_sum(list(chosen)), rtol=1e-12, atol=1e-12)
        columns = torch.autograd.functional.jacobian(lambda *a: outer_sum(list(a)).flatten(), chosen)
        jacobian = torch.cat([column.reshape(math.prod(shape), -1) for column in columns], dim=1)
        squares, product = jacobian.T @ jacobian, jacobian.T @ residual[start].flatten()
        assert float((hessian[start] - squares).abs().max() / squares.abs().max()) < 1e-12
        assert float((descent[start] - product).abs().max() / product.abs().max()) < 1e-12


def test_fit_comes_as_close_as_the_digits_allow() -> None:
    _, error, steps = fit_cp(collinear(6, 0.9), 6, rtol=1e-12)
    assert error <= 1e-12
    assert steps < 200
    _, error, steps = fit_cp(collinear(6, 0.9), 6, rtol=1e-12, max_steps=3)
    assert steps == 3
    assert 1e-12 < error < 1
    # the best rank-one approximation of a matrix is known
    matrix = torch.randn(6, 5)
    values = torch.linalg.svdvals(matrix)
    best = float(values[1:].square().sum().sqrt() / values.norm())
    assert fit_cp(matrix, 1)[1] == pytest.approx(best, rel=1e-9)


@pytest.mark.slow
def test_thirty_components() -> None:
    assert cp_rank(collinear(30, 0.0))[:3] == (30, 30, True)
