"""Tucker and tensor train against their formulas, their conserved quantities and bad input."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_locality.tensors import Chain, TensorTrain, Tucker
from lightning_locality.tensors.balance import balance_cyclically, balanced_pair


def columns_of(chain: Any) -> Tensor:
    """Column by column and matrix by matrix, (..., D, R)."""
    assert isinstance(chain, Chain)
    result = torch.zeros_like(chain.vectors)
    for r in range(chain.vectors.shape[-1]):
        vector = chain.vectors[..., r]
        for j in reversed(range(chain.depth - 1)):
            assert chain.matrices is not None
            vector = torch.einsum("...ij,...j->...i", chain.matrices[j][..., r, :, :], vector)
        result[..., r] = vector
    return result.detach()


@pytest.mark.parametrize("depth", [1, 2, (3, 1, 2)])
@pytest.mark.parametrize("rank", [None, 2, (2, 3, 5)])
def test_tucker_is_the_core_times_matrices(depth: Any, rank: Any) -> None:
    model = Tucker((4, 3, 5), rank=rank, depth=depth, init_scale=0.8)
    expected = torch.einsum("abc,ia,jb,kc->ijk", model.core, *(columns_of(chain) for chain in model.chains))
    torch.testing.assert_close(model.to_tensor(), expected, rtol=1e-12, atol=1e-14)


def test_tucker_ranks_are_those_of_the_matricisations() -> None:
    model = Tucker((4, 5, 6), rank=(2, 3, 4), init_scale=0.8)
    tensor = model.to_tensor().detach()
    for mode, rank in enumerate((2, 3, 4)):
        values = torch.linalg.svdvals(tensor.movedim(mode, 0).flatten(1))
        assert int((values > 1e-12 * values[0]).sum()) == rank
    assert model.cuts() == ((0,), (1,), (2,))


def test_tucker_slice_norms() -> None:
    model = Tucker((3, 4, 5), rank=(2, 3, 4), init_scale=0.8)
    magnitudes = model.magnitudes()
    assert list(magnitudes) == ["mode 0", "mode 1", "mode 2"]
    for mode in range(3):
        matrix = columns_of(model.chains[mode])
        sizes = [model.core.select(mode, j).norm() * matrix[:, j].norm() for j in range(matrix.shape[1])]
        expected = torch.stack(sizes).sort(descending=True).values
        torch.testing.assert_close(magnitudes[f"mode {mode}"], expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("depth", [1, 3])
def test_slices_initialisation(depth: int) -> None:
    """Every factor has the norm of its slice of the core."""
    model = Tucker((4, 5, 3), depth=depth, init="slices", init_scale=1e-2)
    for mode, chain in enumerate(model.chains):
        assert isinstance(chain, Chain)
        slices = model.core.movedim(mode, 0).flatten(1).norm(dim=1)
        torch.testing.assert_close(chain.vectors.norm(dim=0), slices, rtol=1e-12, atol=0)
        if chain.matrices is not None:
            norms = chain.matrices.norm(dim=(-2, -1))
            torch.testing.assert_close(norms, slices.expand(depth - 1, -1), rtol=1e-12, atol=0)
    assert abs(model.core.std().item() / 1e-2 - 1) < 5 / (2 * model.core.numel()) ** 0.5


@pytest.mark.parametrize("depth", [1, 2, (3, 1, 2, 1)])
@pytest.mark.parametrize("rank", [None, 2, (2, 3, 4)])
def test_tensor_train_is_the_product_of_slices(depth: Any, rank: Any) -> None:
    model = TensorTrain((4, 3, 2, 5), rank=rank, depth=depth, init_scale=0.8)
    cores = [columns_of(chain) for chain in model.chains]
    expected = torch.einsum("aib,bjc,ckd,dle->ijkl", *cores)
    torch.testing.assert_close(model.to_tensor(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("shape", "rank"), [((25, 25, 25), (25, 25)), ((2, 3, 4, 5), (2, 6, 5)), ((3, 7), (3,)), ((4,), ())]
)
def test_tensor_train_default_rank(shape: tuple[int, ...], rank: tuple[int, ...]) -> None:
    assert TensorTrain(shape).rank == rank


def test_tensor_train_singular_values_at_the_bonds() -> None:
    model = TensorTrain((3, 2, 4, 3), rank=(2, 3, 2), init_scale=0.8)
    tensor, magnitudes = model.to_tensor().detach(), model.magnitudes()
    assert list(magnitudes) == ["bond 1", "bond 2", "bond 3"]
    assert model.cuts() == ((0,), (0, 1), (0, 1, 2))
    for bond, values in enumerate(magnitudes.values(), start=1):
        expected = torch.linalg.svdvals(tensor.flatten(0, bond - 1).flatten(1))
        torch.testing.assert_close(values, expected[: len(values)], rtol=1e-11, atol=0)
        assert (expected[len(values) :] < 1e-13).all()


def test_tensor_train_of_order_784() -> None:
    """All weights of a component 1: entries are products of the bond widths; and no float on the way."""
    model = TensorTrain((2,) * 784, rank=3)
    with torch.no_grad():
        for place, chain in enumerate(model.chains):
            # 3 per bond, 1e-400 over the first half and 1e400 over the second
            chain.vectors.fill_(10.0 ** (400 / 392 * (-1 if place < 392 else 1)) / (3 if place else 1))
    indices = torch.randint(2, (5, 784), dtype=torch.uint8)
    torch.testing.assert_close(model.entries(indices), torch.ones(5), rtol=1e-11, atol=0)
    hot = torch.nn.functional.one_hot(indices.long(), 2).double()
    torch.testing.assert_close(model.inner(hot), torch.ones(5), rtol=1e-11, atol=0)
    assert model.log_norm().item() == pytest.approx(392 * torch.tensor(2.0).log().item(), rel=1e-12)


# conserved quantities


def tucker_sides(model: Tucker, weights: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """For every mode the core and the matrix, the contracted index as rows."""
    core, *matrices = weights
    return [(core.movedim(mode, 0).flatten(1), matrix.T) for mode, matrix in enumerate(matrices)]


def train_sides(model: TensorTrain, cores: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """For every bond the cores left and right of it, the contracted index as rows."""
    return [(left.flatten(0, 1).T, right.flatten(1)) for left, right in pairwise(cores)]


@pytest.mark.parametrize(
    ("model", "sides"),
    [
        (Tucker((4, 3, 5), rank=(2, 3, 4), init_scale=0.8, dtype=torch.float64), tucker_sides),
        (TensorTrain((4, 3, 2, 5), rank=(2, 3, 4), init_scale=0.8, dtype=torch.float64), train_sides),
    ],
    ids=["tucker", "tensor_train"],
)
def test_gramian_gaps_are_conserved(model: Any, sides: Any) -> None:
    """The derivative of A A^T - B B^T along the flow is zero, and unbalancedness is the largest of their norms."""
    weights = list(model.parameters())
    velocities = list(torch.autograd.grad((model.to_tensor() * torch.randn(model.shape)).sum(), weights))
    gaps = []
    for (a, b), (da, db) in zip(sides(model, weights), sides(model, velocities), strict=True):
        gaps.append((a @ a.T - b @ b.T).norm().item())
        change, other = a @ da.T, b @ db.T
        assert change.norm() > 1e-3
        torch.testing.assert_close(change + change.T, other + other.T, rtol=1e-11, atol=1e-12)
    assert max(gaps) == pytest.approx(model.unbalancedness().item(), rel=1e-12)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("kind", [Tucker, TensorTrain])
def test_balance_of_full_size(kind: Any, depth: int) -> None:
    """Nothing constrained: the widest models, where most directions are empty after balancing."""
    model = kind((5, 4, 6), depth=depth, init_scale=0.5)
    before = model.to_tensor().detach()
    model.balance_()
    torch.testing.assert_close(model.to_tensor(), before, rtol=1e-11, atol=1e-13)
    assert model.unbalancedness() < 1e-12


def test_balanced_tensor_train_of_a_matrix_has_equal_gramians() -> None:
    model = TensorTrain((4, 5), init="balanced", init_scale=0.8)
    left, right = (core.detach() for core in model.factors)
    values = torch.linalg.svdvals(model.to_tensor().detach())
    torch.testing.assert_close(left[0].T @ left[0], values.diag(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(right[..., 0] @ right[..., 0].T, values.diag(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("sizes", [(5, 3, 4), (2, 4, 3), (2, 5, 2), (6, 2, 1)])
def test_balanced_pair(sizes: tuple[int, int, int]) -> None:
    rows, width, columns = sizes
    left, right = torch.randn(rows, width), torch.randn(width, columns)
    new_left, new_right = balanced_pair(left, right)
    assert new_left.shape == left.shape
    torch.testing.assert_close(new_left @ new_right, left @ right, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(new_left.T @ new_left, new_right @ new_right.T, rtol=1e-12, atol=1e-13)


def test_cyclic_balancing_ends() -> None:
    sizes = iter([1.0, 0.1, 1e-13, 1e-13, 1e-14])
    balance_cyclically(lambda: next(sizes))
    assert list(sizes) == [1e-14]
    calls: list[float] = []
    balance_cyclically(lambda: calls.append(1.0) or 1.0, max_sweeps=7)
    assert len(calls) == 7


# bad input


def test_bad_arguments() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"rank": 0}, "rank"),
        ({"rank": (1, 2, 3, 4)}, "rank"),
        ({"rank": (2.5, 2, 2)}, "rank"),
        ({"depth": 0}, "depth"),
        ({"depth": (1, 2)}, "depth"),
        ({"init_scale": 0.0}, "init_scale"),
    ]
    kinds: list[Any] = [Tucker, TensorTrain]
    for kind in kinds:
        for arguments, message in cases:
            with pytest.raises(ValueError, match=message):
                kind((3, 4, 5), **arguments)
