"""The contract of all factorisations, each against its own tensor written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_locality.tensors import (
    CP,
    DeepMatrix,
    Factorization,
    HierarchicalTensorFactorization,
    ModeTree,
    TensorTrain,
    Tucker,
)

Maker = Callable[..., Factorization]

MAKERS: dict[str, Maker] = {
    "matrix": lambda **k: DeepMatrix((3, 4), depth=1, **k),
    "deep_matrix": lambda **k: DeepMatrix((4, 3), depth=3, hidden=(5, 3), **k),
    "narrow_matrix": lambda **k: DeepMatrix((4, 5), depth=4, hidden=2, **k),
    "cp": lambda **k: CP((3, 2, 4), rank=5, **k),
    "cp_one_mode": lambda **k: CP((3,), rank=2, **k),
    "cp_equal_modes": lambda **k: CP((3, 3, 3, 3), rank=4, **k),
    "cp_deep": lambda **k: CP((3, 2, 3), rank=3, depth=3, **k),
    "cp_uneven_depths": lambda **k: CP((3, 3, 2), rank=3, depth=(1, 3, 2), **k),
    "cp_large_order": lambda **k: CP((1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1, 3, 1, 2), rank=3, **k),
    "cp_binary": lambda **k: CP((2,) * 16, rank=3, **k),
    "tucker": lambda **k: Tucker((3, 2, 4), rank=(2, 3, 3), **k),
    "tucker_matrix": lambda **k: Tucker((3, 4), **k),
    "tucker_deep": lambda **k: Tucker((3, 2, 3), depth=(2, 1, 3), **k),
    "tucker_slices": lambda **k: Tucker((3, 2, 3), rank=2, depth=2, **{**k, "init": "slices"}),
    "tensor_train": lambda **k: TensorTrain((3, 2, 4, 2), **k),
    "tensor_train_one_mode": lambda **k: TensorTrain((3,), **k),
    "tensor_train_deep": lambda **k: TensorTrain((3, 2, 4), rank=(2, 3), depth=(3, 1, 2), **k),
    "tensor_train_large_order": lambda **k: TensorTrain((1, 2) * 8, rank=2, **k),
    "htf": lambda **k: HierarchicalTensorFactorization(ModeTree.perfect(4), (3, 2, 4, 2), widths=[3, 4], **k),
    "htf_nested": lambda **k: HierarchicalTensorFactorization(ModeTree.nested([[0, 1], [2, [3, 4]]]), 2, 3, **k),
    "htf_deep": lambda **k: HierarchicalTensorFactorization(ModeTree.perfect(4), 3, 2, depth=2, **k),
}
EVERY = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def without(*names: str) -> pytest.MarkDecorator:
    left = {name: make for name, make in MAKERS.items() if name not in names}
    return pytest.mark.parametrize("make", left.values(), ids=left.keys())


# HTF defines no balanced point for chains, and the balance of a long train takes seconds
BALANCED = without("htf_deep", "tensor_train_large_order")


def indices_of(shape: tuple[int, ...]) -> Tensor:
    return torch.tensor(list(product(*map(range, shape))))


@EVERY
def test_entries_and_inner_products_are_those_of_the_tensor(make: Maker, device: torch.device) -> None:
    model = make(init_scale=0.7, device=device)
    tensor = model.to_tensor()
    assert tensor.shape == model.shape
    assert tensor.std() > 0
    everywhere = indices_of(model.shape)
    if len(everywhere) > 2000:
        everywhere = everywhere[torch.randperm(len(everywhere))[:2000]]
    everywhere = everywhere.to(device)
    expected = tensor[tuple(everywhere.T)]
    for kind in (torch.int64, torch.int32, torch.uint8):
        torch.testing.assert_close(model.entries(everywhere.to(kind)), expected, rtol=1e-11, atol=1e-13)
    vectors = [torch.randn(7, size, device=device) for size in model.shape]
    expected = tensor.unsqueeze(0)
    for vector in vectors:
        expected = torch.einsum("bi,bi...->b...", vector, expected.expand(7, *expected.shape[1:]))
    torch.testing.assert_close(model.inner(vectors), expected, rtol=1e-11, atol=1e-13)
    if len(set(model.shape)) == 1:
        torch.testing.assert_close(model.inner(torch.stack(vectors, 1)), expected, rtol=1e-11, atol=1e-13)


@EVERY
def test_gradients_of_all_routes_agree(make: Maker) -> None:
    """Through the tensor against differences, and by entries and inner products against that."""
    model = make(init_scale=0.7)
    parameters = list(model.parameters())
    tensor = model.to_tensor()

    def moved(step: float) -> Tensor:
        with torch.no_grad():
            values = [p + step * d for p, d in zip(parameters, direction, strict=True)]
            state = dict(zip((f"model.{name}" for name, _ in model.named_parameters()), values, strict=True))
            return torch.func.functional_call(_Tensor(model), state, ())

    direction, step = [torch.randn_like(p) for p in parameters], 1e-6
    given = torch.randn_like(tensor)
    gradients = torch.autograd.grad((tensor * given).sum(), parameters, retain_graph=True)
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
    expected = (given * (moved(step) - moved(-step))).sum() / (2 * step)
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-8)

    places = indices_of(model.shape)[torch.randperm(tensor.numel())[:5]]
    weights = torch.randn(len(places))
    wanted = torch.autograd.grad((tensor[tuple(places.T)] * weights).sum(), parameters)
    hot = [torch.nn.functional.one_hot(places[:, n], size).double() for n, size in enumerate(model.shape)]
    for values in (model.entries(places), model.inner(hot)):
        got = torch.autograd.grad((values * weights).sum(), parameters)
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


class _Tensor(torch.nn.Module):
    def __init__(self, model: Factorization) -> None:
        super().__init__()
        self.model = model

    def forward(self) -> Tensor:
        return self.model.to_tensor()


@EVERY
def test_pullback(make: Maker) -> None:
    """The explicit derivative of the training loop against automatic differentiation, also with a frozen weight."""
    model = make(init_scale=0.7)
    for trained in (list(model.parameters()), [p for k, p in enumerate(model.parameters()) if k != 1]):
        for weight in model.parameters():
            weight.requires_grad_(any(weight is one for one in trained))
        expected = model.to_tensor()
        given = torch.randn_like(expected)
        tensor, pullback = model.with_pullback()
        assert not tensor.requires_grad
        torch.testing.assert_close(tensor, expected.detach(), rtol=1e-12, atol=1e-15)
        for found, twin in zip(pullback(given), torch.autograd.grad(expected, trained, given), strict=True):
            torch.testing.assert_close(found, twin, rtol=1e-11, atol=1e-13)


@EVERY
def test_norm(make: Maker) -> None:
    model = make(init_scale=0.7)
    expected = model.to_tensor().norm()
    torch.testing.assert_close(model.norm(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(model.log_norm(), expected.log(), rtol=1e-12, atol=1e-13)


@EVERY
def test_norm_of_weights_whose_tensor_is_no_float(make: Maker) -> None:
    model = make(init_scale=0.7)
    before = model.log_norm()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1e-40)
    assert model.log_norm().item() == pytest.approx(before.item() + model.degree * math.log(1e-40), rel=1e-12)


@EVERY
def test_norm_of_zero(make: Maker) -> None:
    model = make()
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert model.log_norm() == -math.inf
    assert model.norm() == 0
    with pytest.raises(ValueError, match="norm 0"):
        model.normalize_(1.0)


@BALANCED
def test_balance_of_zero_is_zero(make: Maker) -> None:
    model = make()
    with torch.no_grad():
        next(model.parameters()).zero_()
    model.balance_()
    assert model.to_tensor().abs().max() == 0
    assert model.unbalancedness() < 1e-15


@EVERY
def test_homogeneous_of_its_degree(make: Maker) -> None:
    model = make(init_scale=0.7)
    before = model.to_tensor().detach()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    torch.testing.assert_close(model.to_tensor(), 1.1**model.degree * before, rtol=1e-12, atol=1e-14)


@EVERY
def test_rescale(make: Maker) -> None:
    for factor in (3.0, -0.25):
        model = make(init_scale=0.7)
        before = model.to_tensor().detach()
        sizes = [weight.detach().abs() for weight in model.parameters()]
        model.rescale_(factor)
        torch.testing.assert_close(model.to_tensor(), factor * before, rtol=1e-12, atol=1e-14)
        for weight, size in zip(model.parameters(), sizes, strict=True):
            torch.testing.assert_close(weight.abs(), abs(factor) ** (1 / model.degree) * size, rtol=1e-12, atol=0)


@EVERY
def test_normalize(make: Maker) -> None:
    model = make(init_scale=0.7)
    direction = model.to_tensor().detach()
    model.normalize_(64.0)
    torch.testing.assert_close(model.to_tensor(), 64 * direction / direction.norm(), rtol=1e-11, atol=1e-13)


def test_factors_and_norms_that_make_no_sense() -> None:
    model = MAKERS["cp"]()
    for value in (0.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"factor must be (finite and not zero|a finite number)"):
            model.rescale_(value)
        with pytest.raises(ValueError, match=r"norm must be (positive|a finite number)"):
            model.normalize_(value)
    with pytest.raises(ValueError, match="norm must be positive"):
        model.normalize_(-1.0)


@BALANCED
@pytest.mark.parametrize("init", ["normal", "balanced"])
def test_scale_of_the_product(make: Maker, init: str) -> None:
    model = make(init=init, init_scale=1e-3, init_of="product")
    tensor = model.to_tensor()
    if isinstance(model, DeepMatrix) and init == "balanced":
        # drawn with this deviation, not scaled to it
        assert 0.5e-3 < tensor.square().mean().sqrt() < 1.5e-3
    else:
        assert tensor.square().mean().sqrt().item() == pytest.approx(1e-3, rel=1e-12)


@without("tucker_slices")
def test_scale_of_the_weights(make: Maker) -> None:
    weights = torch.cat([p.detach().flatten() for s in range(10) for p in make(init_scale=0.2, seed=s).parameters()])
    # 5 standard errors
    assert abs(weights.mean()) < 5 * 0.2 / len(weights) ** 0.5
    assert abs(weights.std() / 0.2 - 1) < 5 / (2 * len(weights)) ** 0.5
    shifted = torch.cat([p.detach().flatten() for s in range(10) for p in make(init_mean=1, seed=s).parameters()])
    assert abs(shifted.mean() - 1) < 5 * 0.01 / len(weights) ** 0.5


@BALANCED
def test_balance_keeps_the_tensor(make: Maker) -> None:
    model = make(init_scale=0.7)
    before, squares = model.to_tensor().detach(), sum(p.square().sum() for p in model.parameters())
    magnitudes = model.magnitudes()
    if model.degree > 1:
        assert model.unbalancedness() > 1e-2
    model.balance_()
    torch.testing.assert_close(model.to_tensor(), before, rtol=1e-11, atol=1e-13)
    assert model.unbalancedness() < 1e-12
    if model.degree > 1:
        # a balanced point is the one of least norm
        assert sum(p.square().sum() for p in model.parameters()) < squares
    if isinstance(model, CP | TensorTrain | DeepMatrix | HierarchicalTensorFactorization):
        for name, values in model.magnitudes().items():
            if not isinstance(model, HierarchicalTensorFactorization):
                torch.testing.assert_close(values, magnitudes[name], rtol=1e-11, atol=1e-13)


@BALANCED
def test_single_precision_is_measured_in_double(make: Maker) -> None:
    single, double = make(init_scale=0.7, dtype=torch.float32), make(init_scale=0.7)
    double.load_state_dict(single.state_dict())
    torch.testing.assert_close(single.log_norm(), double.log_norm(), rtol=1e-5, atol=1e-5)
    for name, values in double.magnitudes().items():
        torch.testing.assert_close(single.magnitudes()[name], values, rtol=1e-4, atol=1e-5)
    single.balance_()
    double.balance_()
    assert all(weight.dtype == torch.float32 for weight in single.parameters())
    torch.testing.assert_close(single.to_tensor().double(), double.to_tensor(), rtol=1e-4, atol=1e-5)
    largest = max(weight.square().max().item() for weight in double.parameters())
    assert single.unbalancedness() < 1e-5 * max(largest, 1.0)


@without("htf_deep", "tensor_train_large_order", "tucker_slices")
def test_balanced_initialisation(make: Maker) -> None:
    normal, balanced = make(init_scale=0.1), make(init_scale=0.1, init="balanced")
    torch.testing.assert_close(balanced.to_tensor(), normal.to_tensor(), rtol=1e-10, atol=1e-16)
    largest = max(float(p.detach().square().max()) for p in balanced.parameters())
    assert balanced.unbalancedness() < 1e-12 * max(largest, 1e-2)


@BALANCED
def test_gradient_flow_keeps_the_balance(make: Maker) -> None:
    """At first order: a step of gradient descent moves what is conserved by the step squared only."""
    moved = []
    for step in (1e-3, 1e-4):
        model = make(init="balanced")
        if model.degree == 1:
            return
        model.normalize_(3.0)
        target = torch.randn(model.shape, generator=torch.Generator().manual_seed(1))
        before = model.unbalancedness()
        gradients = torch.autograd.grad((model.to_tensor() * target).sum(), list(model.parameters()))
        with torch.no_grad():
            for weight, gradient in zip(model.parameters(), gradients, strict=True):
                weight -= step * gradient
        # "slices" starts unbalanced
        moved.append((model.unbalancedness() - before).abs().item())
    assert moved[0] / moved[1] == pytest.approx(100, rel=0.1)


@EVERY
def test_seeds_types_and_devices(make: Maker, device: torch.device) -> None:
    model = make(seed=3)
    assert all(weight.dtype == torch.float64 for weight in model.parameters())
    again, other, single = make(seed=3), make(seed=4), make(seed=3, dtype=torch.float32, device=device)
    for weight, same, different, less in zip(
        *(list(m.parameters()) for m in (model, again, other, single)), strict=True
    ):
        assert torch.equal(weight, same)
        assert not torch.equal(weight, different)
        assert less.dtype == torch.float32
        assert less.device.type == device.type
        assert torch.equal(less.cpu(), weight.float())
    tensor = single.to_tensor()
    assert tensor.dtype == torch.float32
    assert single.entries(torch.zeros(1, single.order, dtype=torch.uint8, device=device)).dtype == torch.float32


@EVERY
def test_state_round_trip(make: Maker, tmp_path: Path) -> None:
    model, other = make(seed=1), make(seed=2)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(model.to_tensor(), other.to_tensor())
    entry = model.entries(torch.zeros(1, model.order, dtype=torch.int64))
    torch.testing.assert_close(entry, other.to_tensor().flatten()[:1], rtol=1e-12, atol=0)


@EVERY
def test_magnitudes_cuts_and_scalars(make: Maker) -> None:
    model = make(init_scale=0.7)
    magnitudes = model.magnitudes()
    assert magnitudes or model.order == 1
    for values in magnitudes.values():
        assert values.ndim == 1
        assert torch.equal(values, values.sort(descending=True).values)
        assert (values >= 0).all()
    cuts = model.cuts()
    everything = set(range(model.order))
    for cut in cuts:
        assert 0 < len(cut) < model.order
        assert tuple(sorted(everything - set(cut))) not in cuts
    assert len(set(cuts)) == len(cuts)
    assert all(value.ndim == 0 for value in model.scalars().values())
    assert model.scalars()["unbalancedness"] == model.unbalancedness()


@EVERY
def test_bad_calls(make: Maker) -> None:
    model = make()
    with pytest.raises(ValueError, match="indices"):
        model.entries(torch.zeros(4, model.order + 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="indices"):
        model.entries(torch.zeros(model.order, dtype=torch.int64))
    with pytest.raises(ValueError, match="vectors"):
        model.inner([torch.zeros(4, size + 1) for size in model.shape])
    with pytest.raises(ValueError, match="vectors"):
        model.inner([torch.zeros(4, size) for size in (*model.shape, 2)])
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="init_scale"):
            make(init_scale=scale)
