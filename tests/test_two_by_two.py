from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_locality.datamodules.unbounded import UnboundedCompletion
from lightning_locality.tensors.deep_matrix import DeepMatrix, lower_bound
from lightning_locality.tensors.factorization import Entries


def observed(data: UnboundedCompletion) -> Entries:
    assert isinstance(data.problem.train, Entries)
    assert data.problem.train.values.dtype == torch.float64
    assert data.problem.test is None
    assert data.problem.target is None
    return data.problem.train


def half_sse(matrix: Tensor, seen: Entries) -> Tensor:
    return 0.5 * (matrix[seen.indices[:, 0], seen.indices[:, 1]] - seen.values).square().sum()


def as_dict(data: UnboundedCompletion) -> dict[tuple[int, int], float]:
    seen = observed(data)
    return {(i, j): float(v) for (i, j), v in zip(seen.indices.tolist(), seen.values, strict=True)}


def test_the_published_problem() -> None:
    assert as_dict(UnboundedCompletion()) == {(0, 1): 1, (1, 0): 1, (1, 1): 0}


@pytest.mark.parametrize("eps", [0, 0.01, 0.05, 0.1, 0.5])
def test_the_published_perturbed_problems(eps: float) -> None:
    data = UnboundedCompletion(z=-2, z_prime=0.5, eps=eps)
    assert as_dict(data) == {(0, 1): -2, (1, 0): 0.5, (1, 1): eps}
    assert data.determinant_sign == -1


@pytest.mark.parametrize(("rows", "cols"), [(5, 5), (5, 10), (3, 2)])
def test_larger_matrices_have_an_identity_block(rows: int, cols: int) -> None:
    found = as_dict(UnboundedCompletion(rows, cols, z=3, z_prime=4, eps=0.5))
    expected = {(i, j): float(i == j) for i in range(rows) for j in range(cols)}
    del expected[0, 0]
    assert found == expected | {(0, 1): 3, (1, 0): 4, (1, 1): 0.5}


@pytest.mark.parametrize("where", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_every_place_of_the_block_may_be_unseen(where: tuple[int, int]) -> None:
    row, col = where
    found = as_dict(UnboundedCompletion(3, 3, z=3, z_prime=-4, eps=0.5, unobserved=where))
    assert found[row, 1 - col] == 3
    assert found[1 - row, col] == -4
    assert found[1 - row, 1 - col] == 0.5
    assert where not in found
    assert len(found) == 8
    assert (found[2, 2], found[0, 2], found[2, 1]) == (1, 0, 0)


@pytest.mark.parametrize("where", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize(("z", "z_prime"), [(1.0, 1.0), (-2.0, 0.5)])
def test_exact_solutions_have_the_other_determinant(where: tuple[int, int], z: float, z_prime: float) -> None:
    for size in (2, 4):
        data = UnboundedCompletion(size, size, z=z, z_prime=z_prime, unobserved=where)
        seen = observed(data)
        matrix = torch.zeros(size, size)
        matrix[seen.indices[:, 0], seen.indices[:, 1]] = seen.values
        for missing in (-3.0, 0.0, 5.0):
            matrix[where] = missing
            assert torch.det(matrix).sign() == -data.determinant_sign


@pytest.mark.parametrize("where", [(0, 0), (1, 0)])
@pytest.mark.parametrize(("z", "z_prime", "eps"), [(1.0, 1.0, 0.0), (-2.0, 0.5, 0.1), (1.5, 0.7, -0.2)])
def test_the_bound_holds_wherever_the_determinant_has_its_sign(
    z: float, z_prime: float, eps: float, where: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    row, col = where
    for size in (2, 4):
        data = UnboundedCompletion(size, size, z=z, z_prime=z_prime, eps=eps, unobserved=where)
        seen = observed(data)
        spread = 10 ** (-3 * torch.rand(4000, 1, generator=generator))
        off = spread * torch.randn(4000, len(seen.values), generator=generator)
        # the hardest: all of the loss in the entry opposite
        opposite = seen.indices.tolist().index([1 - row, 1 - col])
        off[:100] = 0
        off[:100, opposite] = spread[:100, 0] * (1 if eps >= 0 else -1)
        matrices = torch.zeros(4000, size, size)
        matrices[:, seen.indices[:, 0], seen.indices[:, 1]] = seen.values + off
        # the missing entry at which the determinant, linear in it, changes its sign
        constant = torch.det(matrices)
        matrices[:, row, col] = 1.0
        missing = -constant / (torch.det(matrices) - constant)
        # where the determinant has its sign at 0 already, the smallest entry that has it is 0
        smallest = torch.where(constant.sign() == data.determinant_sign, 0.0, missing.abs())
        losses = 0.5 * off.square().sum(1)
        bound = torch.from_numpy(lower_bound(losses.numpy(), z, z_prime, eps, larger=size > 2))
        assert (smallest >= bound * (1 - 1e-12)).all()
        assert (bound > 0).sum() > 1000
        # and it is reached where the loss is small
        assert (smallest / bound)[:100].min() < 1.05


def test_the_bound_at_the_published_losses() -> None:
    # (1 - q)^2 / q with q = sqrt(2 loss)
    for loss, expected in ((1e-2, 5.21), (1e-3, 20.40), (1e-4, 68.72)):
        assert lower_bound(loss) == pytest.approx(expected, abs=6e-3)
    assert lower_bound(1e-10) * math.sqrt(2e-10) == pytest.approx(1, abs=3e-5)
    assert lower_bound(0.0) == math.inf
    assert lower_bound(0.0, -2, 0.5, 0.05) == pytest.approx(20)
    assert lower_bound(0.5) == 0
    assert lower_bound(0.126, -2, 0.5) == 0
    assert lower_bound(0.124, -2, 0.5) > 0
    assert lower_bound(5.0, z=10, z_prime=10, larger=True) == 0
    assert lower_bound(1e-6, larger=True) == pytest.approx(lower_bound(1e-6), rel=2e-3)
    with pytest.raises(ValueError, match="loss must be at least 0, got -1"):
        lower_bound(-1)
    with pytest.raises(ValueError, match="loss must be at least 0, got nan"):
        lower_bound(math.nan)


def test_the_unseen_entry_grows_under_small_steps() -> None:
    # the flow from 0.1 I at depth 3, by steps small enough for the sign of the determinant to last
    seen = observed(UnboundedCompletion())
    model = DeepMatrix((2, 2), depth=3, init="identity", init_scale=0.1, init_of="product")
    reached = {}
    for _ in range(20_000):
        loss = half_sse(model.to_tensor(), seen)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for weight, gradient in zip(model.parameters(), gradients, strict=True):
                weight -= 0.02 * gradient
        for level in (1e-1, 1e-2):
            if level not in reached and loss < level:
                reached[level] = model.to_tensor()[0, 0].item()
                assert reached[level] > lower_bound(level)
        if len(reached) == 2:
            break
    # papers.md, reference values of the flow
    assert 1.83 < reached[1e-1] < 1.94
    assert 6.9 < reached[1e-2] < 7.2


def test_what_makes_no_sense_is_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"rows": 1}, "rows must be at least 2, got 1"),
        ({"cols": 0}, "cols must be at least 2, got 0"),
        ({"z": 0}, "z must not be 0"),
        ({"z_prime": 0}, "z_prime must not be 0"),
        ({"eps": math.inf}, "eps must be a finite number, got inf"),
        ({"z": math.nan}, "z must be a finite number"),
        ({"rows": 3, "cols": 3, "unobserved": (2, 2)}, "unobserved must be .* 2x2 block"),
        ({"unobserved": (0,)}, "unobserved must be"),
        ({"epoch_length": 0}, "epoch_length"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            UnboundedCompletion(**options)


def test_only_square_matrices_have_a_determinant() -> None:
    with pytest.raises(ValueError, match="5 rows and 10 columns has no determinant"):
        _ = UnboundedCompletion(5, 10).determinant_sign
