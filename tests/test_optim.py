"""GroupRMSprop against a loop written from its formula."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from lightning_locality import optim
from lightning_locality.optim import GroupRMSprop

SHAPES = ((3, 4), (5,), (2, 2, 2))


def weights(dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def loss_of(parameters: list[torch.nn.Parameter]) -> Tensor:
    """Not a quadratic, so that the norm of the gradient changes."""
    return sum((w**4).sum() for w in parameters) + torch.cat([w.flatten() for w in parameters]).sum() ** 2


def set_gradients(parameters: list[torch.nn.Parameter]) -> None:
    for weight, gradient in zip(parameters, torch.autograd.grad(loss_of(parameters), parameters), strict=True):
        weight.grad = gradient


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_equals_its_formula(decay: float) -> None:
    lr, alpha, eps = 3e-3, 0.9, 1e-3
    ours, flat = weights(), torch.cat([w.detach().flatten() for w in weights()]).tolist()
    optimizer = GroupRMSprop(ours, lr=lr, alpha=alpha, eps=eps, weight_decay=decay)
    mean = 0.0
    for t in range(1, 101):
        set_gradients(ours)
        optimizer.step()
        # 4 w^3 + 2 sum(w), element by element in Python's numbers
        total = math.fsum(flat)
        gradient = [4 * w**3 + 2 * total + decay * w for w in flat]
        mean = alpha * mean + (1 - alpha) * math.fsum(g * g for g in gradient)
        step = lr / (math.sqrt(mean / (1 - alpha**t)) + eps)
        flat = [w - step * g for w, g in zip(flat, gradient, strict=True)]
        now = torch.cat([w.detach().flatten() for w in ours])
        torch.testing.assert_close(now, torch.tensor(flat), rtol=1e-13, atol=1e-14)


def test_direction_is_that_of_the_gradient() -> None:
    ours = weights()
    before = [w.detach().clone() for w in ours]
    set_gradients(ours)
    GroupRMSprop(ours, lr=0.25, eps=0.0).step()
    moved = torch.cat([(b - w.detach()).flatten() for b, w in zip(before, ours, strict=True)])
    gradient = torch.cat([w.grad.flatten() for w in ours])
    assert float(moved.norm()) == pytest.approx(0.25, rel=1e-12)
    torch.testing.assert_close(moved / moved.norm(), gradient / gradient.norm(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_continues_exactly_from_a_checkpoint(dtype: torch.dtype) -> None:
    straight, resumed = weights(dtype), weights(dtype)
    a, b = GroupRMSprop(straight), GroupRMSprop(resumed)
    for step in range(40):
        if step == 17:
            state = copy.deepcopy(b.state_dict())
            b = GroupRMSprop(resumed)
            b.load_state_dict(state)
        for parameters, optimizer in ((straight, a), (resumed, b)):
            set_gradients(parameters)
            optimizer.step()
    assert all(torch.equal(v, w) for v, w in zip(straight, resumed, strict=True))


def test_closure_and_zero_gradient() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = GroupRMSprop([weight], eps=0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 0
    assert torch.equal(weight.detach(), torch.zeros(3))


def test_device_route_equals_host_route() -> None:
    """The route of tensors, which CUDA takes, run on the CPU."""
    host, device = weights(), weights()
    state_host: dict[str, object] = {}
    state_device: dict[str, object] = {}
    group = {"lr": 1e-2, "alpha": 0.9, "eps": 1e-6}
    for _ in range(50):
        for parameters, route, state in (
            (host, optim._step_on_cpu, state_host),
            (device, optim._step_on_device, state_device),
        ):
            set_gradients(parameters)
            with torch.no_grad():
                route(parameters, [w.grad for w in parameters], state, group)
    for v, w in zip(host, device, strict=True):
        torch.testing.assert_close(v, w, rtol=1e-12, atol=1e-14)


@pytest.mark.gpu
def test_on_cuda_equals_the_cpu() -> None:
    host, device = weights(), [torch.nn.Parameter(w.detach().cuda()) for w in weights()]
    a, b = GroupRMSprop(host), GroupRMSprop(device)
    for _ in range(50):
        for parameters, optimizer in ((host, a), (device, b)):
            set_gradients(parameters)
            optimizer.step()
    for v, w in zip(host, device, strict=True):
        torch.testing.assert_close(v, w.cpu(), rtol=1e-11, atol=1e-13)


def test_bad_settings() -> None:
    cases: list[tuple[dict[str, float], str]] = [
        ({"lr": 0}, "lr"),
        ({"alpha": 1.0}, "alpha"),
        ({"eps": -1}, "eps"),
        ({"weight_decay": -1}, "w"),
    ]
    for setting, word in cases:
        with pytest.raises(ValueError, match=word):
            GroupRMSprop(weights(), **setting)


def test_one_group() -> None:
    with pytest.raises(ValueError, match="one group"):
        GroupRMSprop([{"params": [weight]} for weight in weights()])
