"""CP against its formula, growth laws, and the products over binary modes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_locality.tensors import CP, Chain
from lightning_locality.tensors.cp import binary_products


def dense_twin(model: CP) -> Tensor:
    """Sum of outer products, one component and one mode at a time, from the stored parameters."""
    columns: dict[int, Tensor] = {}
    for chain in model.groups:
        assert isinstance(chain, Chain)
        sizes = [n for n in range(model.order) if (model.shape[n], model.depth[n]) == _kind(chain)]
        for place, mode in enumerate(sizes):
            vectors = []
            for r in range(model.rank):
                vector = chain.vectors[place, :, r]
                for j in reversed(range(chain.depth - 1)):
                    assert chain.matrices is not None
                    vector = chain.matrices[j, place, r] @ vector
                vectors.append(vector)
            columns[mode] = torch.stack(vectors, 1)
    total = torch.zeros(model.shape)
    for r in range(model.rank):
        term = torch.ones(())
        for mode in range(model.order):
            term = term[..., None] * columns[mode][:, r]
        total = total + term
    return total


def _kind(chain: Chain) -> tuple[int, int]:
    return chain.vectors.shape[1], chain.depth


@pytest.mark.parametrize(
    ("shape", "depth"), [((3, 2, 4), 1), ((3, 2, 3, 2, 5), 1), ((3, 3), 2), ((3, 2, 3), (2, 1, 3)), ((4,), 2)]
)
def test_tensor_is_the_sum_of_outer_products(shape: tuple[int, ...], depth: int | tuple[int, ...]) -> None:
    model = CP(shape, rank=4, depth=depth, init_scale=0.8)
    torch.testing.assert_close(model.to_tensor(), dense_twin(model), rtol=1e-12, atol=1e-14)
    assert [tuple(f.shape) for f in model.factors] == [(size, 4) for size in shape]


@pytest.mark.parametrize(("shape", "rank"), [((16, 16, 16), 256), ((8, 8, 8, 8), 512), ((3, 4), 3), ((5,), 1)])
def test_default_rank(shape: tuple[int, ...], rank: int) -> None:
    assert CP(shape).rank == rank


def test_modes_of_one_kind_share_a_parameter() -> None:
    assert [tuple(p.shape) for p in CP(2, order=784, rank=3).parameters()] == [(784, 2, 3)]
    assert [tuple(p.shape) for p in CP((4, 3, 4), rank=2).parameters()] == [(2, 4, 2), (1, 3, 2)]


def test_component_norms() -> None:
    model = CP((3, 2, 4), rank=5, init_scale=0.8)
    expected = torch.stack([f.norm(dim=0) for f in model.factors]).prod(0)
    torch.testing.assert_close(model.component_norms(), expected, rtol=1e-13, atol=0)
    assert torch.equal(model.magnitudes()["component"], model.component_norms().sort(descending=True).values)


def test_cuts() -> None:
    assert CP((2, 3)).cuts() == ((0,),)
    assert CP((2, 3, 4)).cuts() == ((0,), (1,), (2,))
    assert CP((2, 2, 2, 2)).cuts() == ((0,), (1,), (2,), (3,), (0, 1), (0, 2), (0, 3))
    assert len(CP((2,) * 5).cuts()) == 15
    assert len(CP((2,) * 30, rank=1).cuts()) == 30


def test_norm_of_order_784() -> None:
    """Against the double sum over components of products of inner products, as logarithms."""
    model = CP((2,) * 784, rank=5, init_mean=1.0, init_scale=0.3)
    factors = torch.stack(model.factors).detach()
    logs, signs = torch.zeros(5, 5), torch.ones(5, 5)
    for factor in factors:
        gram = factor.T @ factor
        logs, signs = logs + gram.abs().log(), signs * gram.sign()
    largest = logs.max()
    expected = 0.5 * ((signs * (logs - largest).exp()).sum().log() + largest)
    assert expected > 250
    torch.testing.assert_close(model.log_norm(), expected, rtol=1e-12, atol=0)
    model.normalize_(2.0)
    assert model.norm().item() == pytest.approx(2.0, rel=1e-10)


def test_inner_products_of_order_784_do_not_leave_the_floats() -> None:
    """The first half of the modes multiplies to 1e-400, the second to 1e400."""
    model = CP((2, 3) * 392, rank=2, init_mean=1.0, init_scale=1e-3)
    with torch.no_grad():
        twos, threes = (chain.vectors for chain in model.groups if isinstance(chain, Chain))
        for weights in (twos, threes):
            weights[:196] *= 10.0 ** (-400 / 392)
            weights[196:] *= 10.0 ** (400 / 392)
    factors = [f.detach() for f in model.factors]
    indices = torch.stack([torch.randint(size, (6,)) for size in model.shape], 1)
    # the same products, a mode of the first half and one of the second in turn
    order = [mode for pair in zip(range(392), range(392, 784), strict=True) for mode in pair]
    expected = torch.ones(6, 2)
    for mode in order:
        expected = expected * factors[mode][indices[:, mode]]
    assert (expected.abs() > 0.5).all()
    torch.testing.assert_close(model.entries(indices), expected.sum(1), rtol=1e-11, atol=0)
    hot = [torch.nn.functional.one_hot(indices[:, n], size).double() for n, size in enumerate(model.shape)]
    torch.testing.assert_close(model.inner(hot), expected.sum(1), rtol=1e-11, atol=0)


# dynamics


def flow(model: CP, gradient: Tensor) -> list[Tensor]:
    """Velocities of the parameters under gradient flow on <gradient, W>."""
    loss = (model.to_tensor() * gradient).sum()
    return [-g for g in torch.autograd.grad(loss, list(model.parameters()))]


def rate(model: CP, values: Tensor, velocities: list[Tensor]) -> Tensor:
    """Time derivatives of values (R,) along the flow."""
    rates = []
    for value in values:
        gradients = torch.autograd.grad(value, list(model.parameters()), retain_graph=True, materialize_grads=True)
        rates.append(sum((g * v).sum() for g, v in zip(gradients, velocities, strict=True)))
    return torch.stack([torch.as_tensor(r) for r in rates])


def pull(model: CP, gradient: Tensor) -> Tensor:
    """<-gradient, unit rank-one tensor of the component> (R,)."""
    pulls = []
    for r in range(model.rank):
        term = torch.ones(())
        for factor in model.factors:
            term = term[..., None] * factor[:, r] / factor[:, r].norm()
        pulls.append(-(gradient * term).sum())
    return torch.stack(pulls).detach()


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(3, 3), (3, 4, 2), (2, 3, 2, 3)])
def test_growth_laws_at_balanced_points(shape: tuple[int, ...], depth: int) -> None:
    r"""Norms of components grow by K sigma^(2 - 2/K), K = N depth; of the vectors alone by N tau^(depth + 1 - 2/N)."""
    model = CP(shape, rank=3, depth=depth, init="balanced", init_scale=1.1, seed=depth)
    gradient = torch.randn(shape)
    velocities, gamma = flow(model, gradient), pull(model, gradient)
    sigma = model.component_norms()
    degree = len(shape) * depth
    expected = degree * gamma * sigma ** (2 - 2 / degree)
    torch.testing.assert_close(rate(model, sigma, velocities), expected.detach(), rtol=1e-10, atol=1e-12)
    raw = torch.cat([c.vectors.norm(dim=1) for c in model.groups if isinstance(c, Chain)]).prod(0)
    order = len(shape)
    expected = order * gamma * raw ** (depth - 1 + 2 - 2 / order)
    torch.testing.assert_close(rate(model, raw, velocities), expected.detach(), rtol=1e-10, atol=1e-12)


def test_growth_law_anywhere() -> None:
    model = CP((3, 4, 2), rank=3, init_scale=0.9)
    gradient = torch.randn(model.shape)
    sigma = model.component_norms()
    inverse_squares = sum(f.square().sum(0).reciprocal() for f in model.factors)
    expected = sigma**2 * inverse_squares * pull(model, gradient)
    got = rate(model, sigma, flow(model, gradient))
    torch.testing.assert_close(got, expected.detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("depth", [1, 3])
def test_all_weights_of_a_component_pull_alike(depth: int) -> None:
    """<w, dL/dw> is <gradient, component> for each of them, which keeps the differences of squared norms."""
    model = CP((3, 4, 3), rank=3, depth=depth, init_scale=0.9)
    gradient = torch.randn(model.shape)
    grads = torch.autograd.grad((model.to_tensor() * gradient).sum(), list(model.parameters()))
    expected = []
    for r in range(3):
        term = torch.ones(())
        for factor in model.factors:
            term = term[..., None] * factor[:, r]
        expected.append((gradient * term).sum())
    for (name, weight), grad in zip(model.named_parameters(), grads, strict=True):
        # vectors (modes, D, R), matrices (depth - 1, modes, R, D, D)
        got = (weight * grad).sum(1) if "vectors" in name else (weight * grad).sum((-2, -1)).flatten(0, 1)
        torch.testing.assert_close(got, torch.stack(expected).expand_as(got), rtol=1e-12, atol=1e-13)


def test_gradient_descent_follows_the_law_at_first_order() -> None:
    """Time 0.5 from a balanced point: the balance and the growth over one step are off by the order of the step."""
    target = torch.randn(3, 4, 2)
    unbalanced, errors = [], []
    for step in (4e-3, 4e-4):
        model = CP((3, 4, 2), rank=3, init="balanced", init_scale=0.7)
        for _ in range(round(0.5 / step)):
            residual = (model.to_tensor() - target).detach()
            velocities = flow(model, residual)
            with torch.no_grad():
                for weight, velocity in zip(model.parameters(), velocities, strict=True):
                    weight += step * velocity
        residual = (model.to_tensor() - target).detach()
        before, law = model.component_norms().detach(), pull(model, residual)
        velocities = flow(model, residual)
        with torch.no_grad():
            for weight, velocity in zip(model.parameters(), velocities, strict=True):
                weight += step * velocity
        growth = (model.component_norms().detach() - before) / step
        unbalanced.append(model.unbalancedness().item())
        errors.append((growth - 3 * before ** (2 - 2 / 3) * law).abs().max().item())
    assert unbalanced[0] / unbalanced[1] == pytest.approx(10, rel=0.2)
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.2)


def test_unbalancedness_by_hand() -> None:
    model = CP((1, 1, 1), rank=2)
    with torch.no_grad():
        model.groups[0].vectors.copy_(torch.tensor([[[1.0, 2.0]], [[3.0, 2.0]], [[2.0, 1.0]]]))  # type: ignore[operator,union-attr]
    assert model.unbalancedness() == 8
    model.balance_()
    torch.testing.assert_close(torch.stack(model.factors).abs()[:, 0], torch.tensor([6.0, 4.0]).pow(1 / 3).expand(3, 2))


# binary modes


def naive(bits: Tensor, weights: Tensor) -> Tensor:
    chosen = torch.where(bits[:, :, None] == 1, weights[:, 1], weights[:, 0])
    product = torch.ones_like(chosen[:, 0])
    for factor in chosen.unbind(1):
        product = product * factor
    return product


def check(bits: Tensor, weights: Tensor) -> None:
    """Products and gradients against the naive product; relative errors where nothing cancels."""
    gradient = torch.randn(len(bits), weights.shape[2])
    fast, slow = weights.clone().requires_grad_(), weights.clone().requires_grad_()
    got, expected = binary_products(bits, fast), naive(bits, slow)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    got.backward(gradient)
    expected.backward(gradient)
    # sums over the samples may cancel: relative to the sums of absolute values
    sizes = weights.abs().clone().requires_grad_()
    naive(bits, sizes).backward(gradient.abs())
    assert fast.grad is not None
    assert slow.grad is not None
    assert sizes.grad is not None
    assert ((fast.grad - slow.grad).abs() <= 1e-12 * sizes.grad).all()


@pytest.mark.parametrize("sign", ["positive", "negative", "mixed"])
def test_binary_products(sign: str) -> None:
    weights = torch.rand(40, 2, 3) + 0.3
    if sign != "positive":
        weights *= -1 if sign == "negative" else torch.randn(40, 2, 3).sign()
    check(torch.randint(2, (30, 40)), weights)


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float64])
def test_binary_types(kind: torch.dtype) -> None:
    bits, weights = torch.randint(2, (30, 20)), torch.randn(20, 2, 3)
    torch.testing.assert_close(binary_products(bits.to(kind), weights), naive(bits, weights), rtol=1e-12, atol=0)


def test_binary_zeros() -> None:
    """None, one, and more zeros in a product."""
    weights = torch.randn(12, 2, 4)
    weights[3, 0, 0] = weights[5, 1, 1] = weights[7, 0, 1] = 0.0
    weights[2, :, 2] = 0.0
    weights[[4, 6, 8], 1, 3] = 0.0
    bits = torch.randint(2, (200, 12))
    met = naive(bits, (weights == 0).double() + 1).log2().round()
    assert set(met.flatten().tolist()) >= {0.0, 1.0, 2.0, 3.0}
    check(bits, weights)
    # in the type of the weights, whatever the default
    short = weights.float().requires_grad_()
    found = binary_products(bits, short)
    found.sum().backward()
    assert found.dtype == short.grad.dtype == torch.float32


def test_binary_negative_zero() -> None:
    weights = torch.ones(3, 2, 1)
    weights[0, 1] = -0.0
    check(torch.tensor([[0, 1, 1], [1, 0, 0]]), weights)


def test_columns_that_never_change() -> None:
    """The weight that no sample meets has gradient exactly zero, and all but one sample is as precise as any."""
    bits = torch.randint(2, (500, 20))
    bits[:, 0], bits[:, 1] = 1, 0
    bits[:, 2] = 1
    bits[0, 2] = 0
    weights = torch.randn(20, 2, 3).requires_grad_()
    binary_products(bits, weights).sum().backward()
    assert weights.grad is not None
    assert not weights.grad[0, 0].any()
    assert not weights.grad[1, 1].any()
    check(bits, weights.detach())


def test_compensating_tiny_and_huge_weights() -> None:
    """Half the weights 1e-3, half 1e3, in an order in which the naive product would underflow."""
    exponents = torch.cat([torch.full((200,), -3.0), torch.full((200,), 3.0)])
    mantissas = torch.rand(400, 2, 2) * 0.02 + 0.99
    bits = torch.randint(2, (9, 400))
    weights = mantissas * torch.randn(400, 2, 2).sign()
    scaled = weights * (10.0**exponents)[:, None, None]
    assert not naive(bits, scaled).any()
    expected = naive(bits, weights)
    got = binary_products(bits, scaled.requires_grad_())
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=0)
    got.sum().backward()
    twin = weights.clone().requires_grad_()
    naive(bits, twin).sum().backward()
    assert scaled.grad is not None
    assert twin.grad is not None
    scale = naive(bits, weights.abs()).sum(0)
    assert ((scaled.grad * (10.0**exponents)[:, None, None] - twin.grad).abs() <= 1e-11 * scale).all()


def test_results_that_are_no_floats() -> None:
    weights = torch.full((784, 2, 1), 0.1)
    weights[:, 1] = -10.0
    bits = torch.zeros(3, 784, dtype=torch.uint8)
    bits[1], bits[2, ::2] = 1, 1
    assert binary_products(bits, weights)[:2].flatten().tolist() == [0.0, math.inf]
    torch.testing.assert_close(binary_products(bits, weights)[2], torch.tensor([1.0]), rtol=1e-11, atol=0)


def test_derivatives_where_the_product_underflows() -> None:
    """P = 1e-330 is no float, P / w = 1e-30 is one."""
    weights = torch.full((11, 2, 1), 1e-3)
    weights[0], weights[1] = 1e-300, 1.0
    weights.requires_grad_()
    product = binary_products(torch.zeros(1, 11), weights)
    assert product.item() < 1e-320
    product.backward()
    assert weights.grad is not None
    assert weights.grad[0, 0].item() == pytest.approx(1e-27, rel=1e-12)


def test_binary_gradients_by_differences() -> None:
    bits = torch.randint(2, (6, 5))
    weights = torch.randn(5, 2, 2)
    weights[0, 1, 0] = weights[2, 0, 1] = 0.0
    # differences step off the zeros, where the product is smooth all the same
    assert torch.autograd.gradcheck(lambda w: binary_products(bits, w), weights.requires_grad_())


def test_single_precision_of_order_784() -> None:
    weights = 1 + 0.05 * torch.randn(784, 2, 15)
    bits = torch.randint(2, (200, 784), dtype=torch.uint8)
    exact = naive(bits, weights.float().double())
    got = binary_products(bits, weights.float()).double()
    assert ((got - exact) / exact).abs().max() < 5e-5


def test_binary_entries_equal_those_by_gathering() -> None:
    """Through CP, against a model with one mode of another size, which takes the general route."""
    binary, general = CP((2,) * 17, rank=3, init_scale=0.9), CP((2,) * 16 + (3,), rank=3)
    with torch.no_grad():
        weights = binary.groups[0].vectors
        general.groups[0].vectors.copy_(weights[:16])  # type: ignore[operator,union-attr]
        general.groups[1].vectors[0, :2] = weights[16]  # type: ignore[index,operator,union-attr]
    bits = torch.randint(2, (50, 17))
    torch.testing.assert_close(binary.entries(bits), general.entries(bits), rtol=1e-11, atol=0)


# bad input


def test_bad_arguments() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"shape": ()}, "shape"),
        ({"shape": (3, 0)}, "shape"),
        ({"shape": (3, 2.5)}, "shape"),
        ({"shape": (3, 2), "rank": 0}, "rank"),
        ({"shape": (3, 2), "rank": 1.5}, "rank"),
        ({"shape": (3, 2), "depth": 0}, "depth"),
        ({"shape": (3, 2), "depth": (1, 2, 3)}, "depth"),
        ({"shape": 2}, "how many"),
        ({"shape": 2, "order": 0}, "how many"),
        ({"shape": (2, 2), "order": 3}, "differ"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            CP(**arguments)


def test_chain_depth_below_one() -> None:
    with pytest.raises(ValueError, match="depth"):
        Chain((3, 2), depth=0)
