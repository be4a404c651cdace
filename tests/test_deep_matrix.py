"""Deep matrix factorisation against its formula, initialisations and growth law."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_locality.tensors import DeepMatrix


@pytest.mark.parametrize(("depth", "hidden"), [(1, None), (2, None), (3, 6), (4, (2, 5, 3))])
def test_product(depth: int, hidden: int | tuple[int, ...] | None) -> None:
    model = DeepMatrix((4, 3), depth=depth, hidden=hidden, init_scale=0.8)
    widths = [3, *((hidden or 3,) * (depth - 1) if not isinstance(hidden, tuple) else hidden), 4]
    assert [tuple(w.shape) for w in model.layers] == [(b, a) for a, b in pairwise(widths)]
    expected = torch.eye(3)
    for layer in model.layers:
        expected = layer @ expected
    torch.testing.assert_close(model.to_tensor(), expected, rtol=1e-12, atol=1e-14)


def test_singular_values_and_determinant() -> None:
    model = DeepMatrix((5, 5), depth=3, init_scale=0.8)
    values = model.magnitudes()["singular value"]
    torch.testing.assert_close(values, torch.linalg.svd(model.to_tensor())[1], rtol=1e-11, atol=0)
    torch.testing.assert_close(model.scalars()["determinant"], model.to_tensor().det(), rtol=1e-11, atol=0)
    assert "determinant" not in DeepMatrix((4, 5)).scalars()
    assert "determinant" not in DeepMatrix((17, 17)).scalars()


def test_tensor_of_one_layer_is_a_copy() -> None:
    model = DeepMatrix((2, 3), depth=1)
    tensor = model.to_tensor().detach()
    before = tensor.clone()
    model.rescale_(2.0)
    assert torch.equal(tensor, before)


# initialisations


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_identity(depth: int) -> None:
    of_weights = DeepMatrix((3, 3), depth=depth, init="identity", init_scale=0.3)
    torch.testing.assert_close(of_weights.to_tensor(), 0.3**depth * torch.eye(3), rtol=1e-14, atol=0)
    of_product = DeepMatrix((3, 3), depth=depth, hidden=5, init="identity", init_scale=0.3, init_of="product")
    torch.testing.assert_close(of_product.to_tensor(), 0.3 * torch.eye(3), rtol=1e-14, atol=0)
    assert of_weights.unbalancedness() == 0
    assert of_weights.scalars()["determinant"] > 0


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_balanced_product_is_normal(depth: int) -> None:
    """The entries of the product have the given deviation, as drawn: not scaled to it one by one."""
    draws = torch.stack(
        [
            DeepMatrix((4, 4), depth=depth, init="balanced", init_of="product", init_scale=1e-3, seed=s).to_tensor()
            for s in range(125)
        ]
    ).detach()
    assert abs(draws.std() / 1e-3 - 1) < 5 / (2 * 2000) ** 0.5
    assert abs(draws.mean()) < 5e-3 / 2000**0.5
    # a normal matrix: fourth moment 3, and norms that differ from draw to draw
    assert abs((draws / 1e-3).pow(4).mean() - 3) < 5 * (96 / 2000) ** 0.5
    model = DeepMatrix((4, 3), depth=depth, hidden=5, init="balanced", init_of="product", init_scale=1e-3)
    assert model.unbalancedness() < 1e-14


def test_standard_deviation_of_the_product_of_normal_layers() -> None:
    """n^((L-1)/2) s^L for n x n layers."""
    products = torch.stack([DeepMatrix((8, 8), depth=3, init_scale=8e-3, seed=s).to_tensor() for s in range(200)])
    assert products.detach().square().mean().sqrt().item() == pytest.approx(8 * (8e-3) ** 3, rel=0.05)


@pytest.mark.parametrize("kind", ["normal", "balanced"])
@pytest.mark.parametrize("of", ["weights", "product"])
def test_sign_of_the_determinant(kind: Any, of: Any) -> None:
    arguments: dict[str, Any] = {"shape": (2, 2), "depth": 3, "init": kind, "init_of": of, "init_scale": 1e-3}
    free = [DeepMatrix(**arguments, seed=s).scalars()["determinant"] > 0 for s in range(24)]
    assert 4 < sum(free) < 20
    for seed, positive in enumerate(free):
        drawn = DeepMatrix(**arguments, seed=seed).to_tensor()
        for sign, wanted in (("positive", True), ("negative", False)):
            model = DeepMatrix(**arguments, seed=seed, determinant=sign)
            assert (model.scalars()["determinant"] > 0) == wanted
            # a draw that has the sign already is kept
            assert torch.equal(model.to_tensor(), drawn) == (positive == wanted)


def test_narrow_layers_hold_the_leading_part_of_a_balanced_product() -> None:
    wide = DeepMatrix((4, 5), depth=3, init="balanced", init_of="product", init_scale=1.0)
    narrow = DeepMatrix((4, 5), depth=3, hidden=2, init="balanced", init_of="product", init_scale=1.0)
    left, values, right = torch.linalg.svd(wide.to_tensor().detach(), full_matrices=False)
    torch.testing.assert_close(narrow.to_tensor(), left[:, :2] * values[:2] @ right[:2], rtol=1e-12, atol=1e-13)
    assert narrow.unbalancedness() < 1e-14


# dynamics


@pytest.mark.parametrize(("depth", "hidden"), [(1, None), (2, None), (3, 5), (4, None)])
def test_growth_law_of_singular_values(depth: int, hidden: int | None) -> None:
    r"""d sigma_r / dt = L sigma_r^(2 - 2/L) <-grad, u_r v_r^T> at a balanced point."""
    model = DeepMatrix((4, 3), depth=depth, hidden=hidden, init_scale=1.0, init_of="product", init="balanced")
    gradient = torch.randn(4, 3)
    loss = (model.to_tensor() * gradient).sum()
    velocities = [-g for g in torch.autograd.grad(loss, list(model.parameters()))]
    left, values, right = torch.linalg.svd(model.to_tensor(), full_matrices=False)
    for r in range(3):
        slopes = torch.autograd.grad(values[r], list(model.parameters()), retain_graph=True)
        got = sum((s * v).sum() for s, v in zip(slopes, velocities, strict=True))
        expected = -depth * values[r] ** (2 - 2 / depth) * (left[:, r] @ gradient @ right[r])
        torch.testing.assert_close(got, expected.detach(), rtol=1e-11, atol=1e-12)


def test_gramian_gaps_are_conserved() -> None:
    """At any point: the derivative of W_{j+1}^T W_{j+1} - W_j W_j^T is zero."""
    model = DeepMatrix((4, 3), depth=3, hidden=5, init_scale=0.8)
    grads = torch.autograd.grad((model.to_tensor() * torch.randn(4, 3)).sum(), list(model.parameters()))
    layers = list(model.layers)
    for j in range(2):
        above = layers[j + 1].T @ grads[j + 1]
        below = grads[j] @ layers[j].T
        torch.testing.assert_close(above + above.T, below + below.T, rtol=1e-12, atol=1e-13)


def test_unbalancedness_by_hand() -> None:
    model = DeepMatrix((1, 1), depth=3)
    with torch.no_grad():
        for layer, value in zip(model.layers, (1.0, 3.0, 2.0), strict=True):
            layer.fill_(value)
    assert model.unbalancedness() == 8
    model.balance_()
    torch.testing.assert_close(
        torch.cat([layer.abs().flatten() for layer in model.layers]), torch.full((3,), 6 ** (1 / 3))
    )


def test_determinant_keeps_its_sign_along_the_flow() -> None:
    """The 2x2 problem with one diagonal entry free, depth 3: descent with small steps stays at positive determinant."""
    model = DeepMatrix((2, 2), depth=3, init="identity", init_scale=0.1, init_of="product")

    def loss() -> Tensor:
        w = model.to_tensor()
        return 0.5 * ((w[0, 1] - 1) ** 2 + (w[1, 0] - 1) ** 2 + w[1, 1] ** 2)

    for _ in range(1000):
        gradients = torch.autograd.grad(loss(), list(model.parameters()))
        with torch.no_grad():
            for weight, gradient in zip(model.parameters(), gradients, strict=True):
                weight -= 2e-2 * gradient
    value = loss().item()
    assert value < 0.05
    assert model.scalars()["determinant"] > 0
    root = (2 * value) ** 0.5
    assert model.to_tensor()[0, 0].abs().item() > (1 - root) ** 2 / root


# bad input


def test_bad_arguments() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"shape": (3, 2, 4)}, "rows and columns"),
        ({"shape": (3,)}, "rows and columns"),
        ({"shape": (3, 0)}, "shape"),
        ({"shape": (3, 3), "depth": 0}, "depth"),
        ({"shape": (3, 3), "depth": 1.5}, "depth"),
        ({"shape": (3, 3), "depth": 2, "hidden": 0}, "hidden"),
        ({"shape": (3, 3), "depth": 3, "hidden": (3,)}, "hidden"),
        ({"shape": (3, 4), "init": "identity"}, "square"),
        ({"shape": (3, 4), "determinant": "positive"}, "square"),
        ({"shape": (3, 3), "hidden": 2, "determinant": "positive"}, "square"),
        ({"shape": (2, 2), "init": "identity", "determinant": "negative"}, "exclude"),
        ({"shape": (3, 3), "init": "identity", "init_scale": 0.0}, "init_scale"),
        ({"shape": (3, 3), "init": "balanced", "init_of": "product", "init_scale": -1.0}, "init_scale"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            DeepMatrix(**arguments)


def test_unknown_sign_of_the_determinant() -> None:
    with pytest.raises(ValueError, match="determinant must be 'positive', 'negative' or None, got 'zz'"):
        DeepMatrix((2, 2), determinant="zz")  # type: ignore[arg-type]
