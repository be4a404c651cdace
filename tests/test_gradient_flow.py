"""Gradient flow against closed forms."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_locality.optim import GradientFlow, IntegrationError


def closure_of(flow: GradientFlow, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        flow.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


def run(flow: GradientFlow, loss: Callable[[], Tensor]) -> None:
    while not flow.finished:
        flow.step(closure_of(flow, loss))


@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize("method", ["RK23", "RK45", "DOP853", "Radau"])
def test_growth_of_a_product(depth: int, method: str) -> None:
    """sigma = w^depth under the loss -sigma: d sigma/dt = depth * sigma^(2 - 2 / depth)."""
    start, end = 0.05, 1.0
    weights = [torch.nn.Parameter(torch.tensor([start ** (1 / depth)])) for _ in range(depth)]
    rtol = 1e-6 if method == "RK23" else 1e-9
    flow = GradientFlow(weights, method=method, rtol=rtol, atol=1e-3 * rtol, end_time=end)
    run(flow, lambda: -torch.prod(torch.cat(weights)))
    power = 2 - 2 / depth
    if depth == 2:
        expected = start * math.exp(2 * end)
    else:
        expected = (start ** (1 - power) - (power - 1) * depth * end) ** (1 / (1 - power))
    assert flow.time == end
    assert math.prod(w.item() for w in weights) == pytest.approx(expected, rel=100 * rtol)


def test_tolerance_holds_the_error() -> None:
    errors = []
    for rtol in (1e-4, 1e-7, 1e-10):
        weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        flow = GradientFlow([weight], rtol=rtol, atol=1e-3 * rtol, end_time=3.0)
        run(flow, lambda weight=weight: (torch.tensor([0.5, 2.0]) * weight**2).sum())
        exact = torch.tensor([math.exp(-3.0), -2 * math.exp(-12.0)])
        errors.append(float((weight.detach() - exact).abs().max()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-10


def test_returns_the_loss_before_the_step_and_counts() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    flow = GradientFlow([weight])
    calls = 0

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        return weight.square().sum()

    for _ in range(5):
        before = weight.square().sum().item()
        assert flow.step(closure_of(flow, loss)).item() == before
    assert flow.evaluations == calls
    assert weight.item() == pytest.approx(math.exp(-2 * flow.time), rel=1e-7)


def test_crosses_a_plateau_in_few_evaluations() -> None:
    """From sigma 1e-6 to the minimum of (sigma - 1)^2 / 2, depth 2: time about log(1e6) / 2."""
    weights = [torch.nn.Parameter(torch.tensor([1e-3])) for _ in range(2)]
    flow = GradientFlow(weights, end_time=15.0)
    run(flow, lambda: (torch.prod(torch.cat(weights)) - 1).square() / 2)
    # d sigma/dt = 2 sigma (1 - sigma): the logistic curve
    assert weights[0].item() ** 2 == pytest.approx(1 / (1 + (1e6 - 1) * math.exp(-30.0)), rel=1e-7)
    assert flow.evaluations < 1000


@pytest.mark.parametrize("method", ["RK45", "DOP853", "Radau"])
@pytest.mark.parametrize(("dtype", "end"), [(torch.float32, math.inf), (torch.float64, 4.0)])
def test_continues_exactly_from_a_checkpoint(method: str, dtype: torch.dtype, end: float) -> None:
    def fresh() -> tuple[list[torch.nn.Parameter], GradientFlow]:
        weights = [torch.nn.Parameter(torch.tensor([[0.1, 0.3], [0.2, 0.1]], dtype=dtype)) for _ in range(3)]
        return weights, GradientFlow(weights, method=method, rtol=1e-5, end_time=end)

    def loss(weights: list[torch.nn.Parameter]) -> Tensor:
        return (weights[0] @ weights[1] @ weights[2] - torch.eye(2, dtype=dtype)).square().sum()

    (straight, a), (resumed, b) = fresh(), fresh()
    for step in range(12):
        if step == 5:
            state, kept = copy.deepcopy(b.state_dict()), [w.detach().clone() for w in resumed]
            resumed, b = fresh()
            b.load_state_dict(state)
            with torch.no_grad():
                for weight, value in zip(resumed, kept, strict=True):
                    weight.copy_(value)
        for weights, flow in ((straight, a), (resumed, b)):
            flow.step(closure_of(flow, lambda weights=weights: loss(weights)))
        assert (a.time, a.evaluations) == (b.time, b.evaluations)
    assert a.time > 0
    assert all(torch.equal(v, w) for v, w in zip(straight, resumed, strict=True))


def test_weights_changed_from_outside() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    flow = GradientFlow([weight], end_time=2.0)
    closure = closure_of(flow, lambda: weight.square().sum() / 2)
    for _ in range(3):
        flow.step(closure)
    time = flow.time
    with torch.no_grad():
        weight.fill_(5.0)
    run(flow, lambda: weight.square().sum() / 2)
    assert weight.item() == pytest.approx(5 * math.exp(-(2.0 - time)), rel=1e-7)


def test_blow_up_is_an_error_that_names_the_time() -> None:
    """d w/dt = w^2 has no solution from t = 1 on."""
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    flow = GradientFlow([weight], rtol=1e-6)
    closure = closure_of(flow, lambda: -(weight**3).sum() / 3)

    def go_on() -> None:
        for _ in range(10_000):
            flow.step(closure)

    with pytest.raises(IntegrationError, match=r"time 1\b.*rtol=1e-06.*Radau") as error:
        go_on()
    assert isinstance(error.value, ValueError)
    assert flow.time == pytest.approx(1.0, abs=1e-6)
    assert math.isfinite(weight.item())


def test_gradient_that_is_not_finite() -> None:
    weight = torch.nn.Parameter(torch.tensor([0.0]))
    flow = GradientFlow([weight])
    with pytest.raises(IntegrationError, match="not finite at time 0"):
        flow.step(closure_of(flow, lambda: weight.abs().sqrt().sum() * math.inf))


def test_float32_weights_are_integrated_in_float64() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float32))
    flow = GradientFlow([weight], rtol=1e-6, atol=1e-9, end_time=2.0)
    run(flow, lambda: weight.square().sum() / 2)
    assert weight.dtype == torch.float32
    assert weight.item() == pytest.approx(math.exp(-2), rel=1e-5)


def test_bad_settings() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"method": "Euler"}, "RK45"),
        ({"rtol": 0.0}, "rtol must be positive"),
        ({"rtol": 1e-16}, "rtol must be at least"),
        ({"atol": -1.0}, "atol"),
        ({"max_step": 0.0}, "max_step"),
        ({"end_time": 0.0}, "end_time"),
    ]
    for setting, words in cases:
        with pytest.raises(ValueError, match=words):
            GradientFlow([torch.nn.Parameter(torch.ones(2))], **setting)


def test_refuses_what_cannot_work() -> None:
    with pytest.raises(ValueError, match="float32"):
        GradientFlow([torch.nn.Parameter(torch.ones(2, dtype=torch.float32))])
    with pytest.raises(ValueError, match="DOP853"):
        GradientFlow([torch.nn.Parameter(torch.ones(3000))], method="Radau")
    with pytest.raises(ValueError, match="one group"):
        GradientFlow([{"params": [torch.nn.Parameter(torch.ones(2))]} for _ in range(2)])


def test_longest_step() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    flow = GradientFlow([weight], max_step=0.125, end_time=2.0)
    times = [0.0]
    while not flow.finished:
        flow.step(closure_of(flow, lambda: weight.square().sum()))
        times.append(flow.time)
    assert np.diff(times).max() <= 0.125 + 1e-15
