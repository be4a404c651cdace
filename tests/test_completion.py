"""The baselines of completion against closed forms, optimality and recovery."""

from __future__ import annotations

import pytest
import tensorly
import torch
from torch import Tensor

from lightning_locality.datamodules.tensor_recovery import TensorRecovery
from lightning_locality.tasks import cp_als_completion, nuclear_norm_completion
from lightning_locality.tensors.factorization import Entries


def nuclear_norms(tensor: Tensor) -> Tensor:
    unfoldings = [tensor.movedim(mode, 0).flatten(1) for mode in range(tensor.ndim)]
    return torch.stack([torch.linalg.matrix_norm(unfolding, "nuc") for unfolding in unfoldings]).sum()


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.8), (-2.0, 0.25), (3.0, 2.0), (-1.5, 1.2)])
@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_nuclear_norm_of_two_by_two(a: float, b: float, scale: float) -> None:
    """The square of the nuclear norm of ((1, a), (b, x)) is 1 + a^2 + b^2 + x^2 + 2 |x - a b|."""
    indices = torch.tensor([[0, 0], [0, 1], [1, 0]])
    found = nuclear_norm_completion(Entries(indices, scale * torch.tensor([1, a, b])), (2, 2), tolerance=1e-9)
    assert float(found[1, 1]) == pytest.approx(scale * max(-1.0, min(1.0, a * b)), rel=1e-5)


def test_no_other_tensor_has_a_smaller_sum_of_nuclear_norms() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (3, 4, 5)
    indices = torch.stack(torch.unravel_index(torch.randperm(60, generator=generator)[:35], shape), 1)
    values = torch.randn(35, generator=generator)
    found = nuclear_norm_completion(Entries(indices, values), shape, tolerance=1e-9, max_iterations=20_000)
    torch.testing.assert_close(found[tuple(indices.T)], values, rtol=1e-12, atol=0)
    least = nuclear_norms(found)
    free = torch.ones(shape)
    free[tuple(indices.T)] = 0
    # convex: a minimum along all directions is the minimum
    for step in (1e-3, 1e-1, 1.0):
        for _ in range(50):
            direction = free * torch.randn(shape, generator=generator)
            assert nuclear_norms(found + step * direction / direction.norm()) > least - 1e-8
    assert least < nuclear_norms(found + 0.1 * free)


def test_tensors_of_low_rank_are_recovered() -> None:
    data = TensorRecovery(target="cp", shape=(8, 8, 8), rank=2, observations=384, seed=1)
    train, target = data.problem.train, data.target_tensor
    assert target is not None
    completed = [
        nuclear_norm_completion(train, data.shape, tolerance=1e-8),
        cp_als_completion(train, data.shape, rank=2),
    ]
    for tensor in completed:
        assert (tensor - target).norm() < 1e-5 * target.norm()
    assert tensorly.get_backend() == "numpy"
    assert torch.equal(cp_als_completion(train, data.shape, rank=2), completed[1])
    # too few components fit neither
    with_one = cp_als_completion(train, data.shape, rank=1)
    best = torch.linalg.svdvals(target.flatten(1))
    assert (with_one - target).norm() >= best[1:].norm()


def test_wrong_observations() -> None:
    sensing = TensorRecovery(target="cp", shape=(4, 4, 4), rank=1, task="sensing").problem.train
    entries = Entries(torch.tensor([[0, 1], [1, 2]]), torch.ones(2))
    for complete in (nuclear_norm_completion, lambda *args: cp_als_completion(*args, rank=1)):
        with pytest.raises(ValueError, match=r"observed must be entries \(task='completion'\), got RankOneMeas"):
            complete(sensing, (4, 4, 4))
        with pytest.raises(ValueError, match=r"observed must have indices \(M, 2\) in the shape \(2, 2\)"):
            complete(entries, (2, 2))
        with pytest.raises(ValueError, match=r"observed must have indices \(M, 3\)"):
            complete(entries, (3, 3, 3))
        with pytest.raises(ValueError, match="observed must hold finite values"):
            complete(entries._replace(values=entries.values / 0), (2, 3))
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        cp_als_completion(entries, (2, 3), 0)
