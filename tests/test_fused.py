"""Triton kernels against torch in float64: on a GPU, or on the CPU in Triton's interpreter (a process of its own)."""

from __future__ import annotations

import copy
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_locality.regularizer.anti_locality import AntiLocality
from lightning_locality.regularizer.batch_norm import launches_cost_nothing
from lightning_locality.regularizer.double_backward import FastDoubleBackward
from lightning_locality.regularizer.patches import UniformPatches

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
kernels = pytest.mark.gpu if not INTERPRETED else pytest.mark.usefixtures("single_precision")
SHAPES = [(4, 5, 7, 9), (3, 64, 6, 6), (16, 33, 1, 1), (6, 130, 5, 4), (9, 7)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.skipif(INTERPRETED, reason="is that process")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", __file__]
    if importlib.metadata.version("triton").startswith("3.9."):
        # its interpreter, not its compiler, turns a scalar condition within a mask into an integer and then refuses it
        command += ["-k", "not max_pooling and not layer_normalization and not residual_network"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parent.parent)
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout


@pytest.fixture(autouse=True)
def single_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    token = launches_cost_nothing.set(True)
    yield
    launches_cost_nothing.reset(token)


@pytest.mark.parametrize("free", [False, True])
def test_small_batch_normalizations_are_left_to_torch_unless_launches_cost_nothing(
    free: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[int]()
    monkeypatch.setattr("lightning_locality.regularizer.batch_norm.are_fusable", lambda x, *_: seen.append(x.numel()))
    launches_cost_nothing.set(free)
    with FastDoubleBackward():
        for size in (2, 2048):
            nn.BatchNorm2d(1)(torch.randn(1, 1, 2048, size, requires_grad=True))
    assert seen == ([4096] if free else []) + [2**22]


def close(found: Tensor, expected: Tensor, dtype: torch.dtype, name: str = "", flips: bool = False) -> None:
    error = float((found.double() - expected).norm() / expected.norm().clamp(min=1e-12))
    # among millions of numbers a few are so near zero that rounding decides the ReLU
    assert error < (1e-4 if dtype is torch.float32 else 1e-2) + (5e-3 if flips else 0.0), (name, error)


@kernels
@pytest.mark.parametrize("shape", SHAPES if INTERPRETED else [SHAPES[0], (9, 7), (64, 64, 38, 38)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("relu", [False, True])
def test_batch_normalization_and_its_derivatives(shape: Any, layout: Any, dtype: torch.dtype, relu: bool) -> None:
    if len(shape) == 2 and layout is torch.channels_last:
        pytest.skip("of images only")
    x, v, g = (
        torch.randn(shape, device=DEVICE).add(c).to(dtype).contiguous(memory_format=layout) for c in (30, 0.2, 0.3)
    )
    norm = nn.BatchNorm1d(shape[1]) if len(shape) == 2 else nn.BatchNorm2d(shape[1])
    norm.weight.data.uniform_(0.5, 1.5)
    norm.bias.data.uniform_(-0.5, 0.5)
    results = []
    for fast in (True, False):
        own = copy.deepcopy(norm).to(DEVICE)
        if not fast:
            own = own.double()
        xs, vs, gs = ((t if fast else t.double()).detach().requires_grad_() for t in (x, v, g))
        with FastDoubleBackward() if fast else torch.enable_grad():
            out = torch.relu_(own(xs)) if relu else own(xs)
        node = out.grad_fn.next_functions[0][0] if relu else out.grad_fn
        assert not fast or node.masked == relu
        (u,) = torch.autograd.grad(out, xs, gs, create_graph=True)
        both = torch.autograd.grad(u, (gs, xs, own.weight), vs, retain_graph=True)
        first = torch.autograd.grad(out, (own.weight, own.bias), gs)
        results.append((out, u, *both, *first, own.running_mean, own.running_var))
        assert not fast or u.stride() == both[0].stride() == both[1].stride() == x.stride()
    names = ("out", "u", "by g", "by x", "by weight", "weight", "bias", "mean", "var")
    for name, a, b in zip(names, *results, strict=True):
        close(a.detach(), b.detach(), dtype, name, flips=relu and x.numel() > 1_000_000)


@kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("geometry", [(3, 2, 1), (2, 2, 0), (3, 1, 1), ((3, 2), (2, 1), (1, 0)), (2, 3, 0)])
@pytest.mark.parametrize(("ceil", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_max_pooling(layout: Any, geometry: Any, ceil: bool, dtype: torch.dtype) -> None:
    channels = 70 if layout is torch.channels_last and geometry == (3, 2, 1) else 4
    x = torch.relu(torch.randn(3, channels, 9, 7, device=DEVICE)).to(dtype)
    x[0], x[1, :, :5] = -torch.inf, -2
    x[2, 0, 3, 3] = torch.nan
    x = x.contiguous(memory_format=layout)
    results = []
    for fast in (True, False):
        # torch's kernel for channels last loses gradients of windows of nothing but -inf
        xs = (x if fast else x.double().contiguous()).detach().requires_grad_()
        with FastDoubleBackward() if fast else torch.enable_grad():
            out = F.max_pool2d(xs, *geometry, ceil_mode=ceil)
        torch.manual_seed(3)
        # the same numbers whatever the layout
        g = torch.randn(out.shape).to(out).requires_grad_()
        (u,) = torch.autograd.grad(out, xs, g, create_graph=True)
        v = torch.randn(u.shape).to(u).requires_grad_()
        (by_g,) = torch.autograd.grad(u, g, v, create_graph=True)
        results.append((u, by_g, *torch.autograd.grad(by_g, v, g)))
        torch.testing.assert_close(out.double(), F.max_pool2d(x.double(), *geometry, ceil_mode=ceil), equal_nan=True)
    for a, b in zip(*results, strict=True):
        close(a.detach(), b.detach(), dtype)
        assert a.shape == b.shape
    assert results[0][0].stride() == x.stride()


@kernels
def test_statistics_of_a_channel_with_an_outlier() -> None:
    x = 1e-3 * torch.randn(64, 2, 16, 16, device=DEVICE)
    x[0, :, 0, 0] = 5.0
    with FastDoubleBackward():
        out = nn.BatchNorm2d(2).to(DEVICE)(x.clone().requires_grad_())
    close(out.detach(), nn.BatchNorm2d(2).double().to(DEVICE)(x.double()).detach(), torch.float32)


@kernels
@pytest.mark.parametrize("layer", [nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.SiLU(inplace=True)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations(layer: nn.Module, layout: Any, dtype: torch.dtype) -> None:
    x = (3 * torch.randn(3, 5, 7, 6)).contiguous(memory_format=layout)
    compare(layer, x, dtype)
    # the first gradient at the output depends on x, or is a constant
    for power in (2, 1):
        third_derivatives(layer, x, power)


def third_derivatives(layer: nn.Module, x: Tensor, power: int) -> None:
    thirds = []
    for fast in (True, False):
        xs = (x.to(DEVICE) if fast else x.to(DEVICE).double()).detach().requires_grad_()
        with FastDoubleBackward() if fast else torch.enable_grad():
            h = (layer(xs.clone()) ** power).sum()
        for _ in range(3):
            (h,) = torch.autograd.grad(h.sum(), xs, create_graph=True)
        thirds.append(h.detach())
    close(thirds[0], thirds[1], torch.float32)


@kernels
@pytest.mark.parametrize("shape", [(2, 7, 33), (3, 1, 768), (600, 5)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_normalization(shape: Any, weighted: bool, dtype: torch.dtype) -> None:
    layer = nn.LayerNorm(shape[-1], elementwise_affine=weighted)
    for parameter in layer.parameters():
        parameter.data.uniform_(0.5, 1.5)
    compare(layer, 2 * torch.randn(shape) + 1, dtype)


def compare(layer: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """Output, input gradient, and the gradients of that by all that it depends on."""
    results = []
    g, v = torch.randn(2, *x.shape).to(DEVICE, dtype)
    for fast in (True, False):
        own = copy.deepcopy(layer).to(DEVICE, dtype if fast else torch.float64)
        if not fast:
            for parameter, short in zip(own.parameters(), layer.parameters(), strict=True):
                parameter.data = short.data.to(DEVICE, dtype).double()
        xs, gs, vs = ((t.to(DEVICE, dtype) if fast else t.to(DEVICE, dtype).double()).detach() for t in (x, g, v))
        xs.requires_grad_(), gs.requires_grad_()
        with FastDoubleBackward() if fast else torch.enable_grad():
            out = own(xs.clone())
        (u,) = torch.autograd.grad(out, xs, gs, create_graph=True)
        weights = [p for p in own.parameters() if p.dim() and p is getattr(own, "weight", None)]
        results.append((out, u, *torch.autograd.grad(u, [gs, xs, *weights], vs)))
    for a, b in zip(*results, strict=True):
        error = float((a.detach().double() - b.detach()).norm() / b.detach().norm())
        assert error < (1e-4 if dtype is torch.float32 else 2e-2), error


class Residual(nn.Module):
    """The parts of a residual network, small: the interpreter is slow."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.pool, self.relu = nn.MaxPool2d(3, 2, 1), nn.ReLU(inplace=True)
        convolutions = [nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(2)]
        norms = [nn.BatchNorm2d(6) for _ in range(2)]
        self.block = nn.Sequential(convolutions[0], norms[0], self.relu, convolutions[1], norms[1])
        self.head = nn.Linear(6, 1)
        for module in (self.stem[1], *norms):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.3, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        out = self.block(x)
        out += x
        return self.head(self.relu(out).mean((2, 3)))


@kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_term_of_a_residual_network(layout: Any) -> None:
    model, x = Residual(), torch.rand(4, 3, 14, 14)
    results = []
    for fast in (True, False):
        dtype = torch.float32 if fast else torch.float64
        own = copy.deepcopy(model).to(DEVICE, dtype, memory_format=layout)
        with torch.backends.cudnn.flags(allow_tf32=False):
            out, term = AntiLocality(UniformPatches(4), fast=fast).with_output(
                own, x.to(DEVICE, dtype, memory_format=layout)
            )
            (out.sum() + term).backward()
        gradients = torch.cat([p.grad.flatten() for p in own.parameters()])
        results.append((out, term, gradients, *own.buffers()))
    for a, b in zip(*results, strict=True):
        error = float((a.detach().double() - b.detach()).norm() / b.detach().double().norm().clamp(min=1e-12))
        assert error < 1e-3, error


def test_what_else_happens_between_normalization_and_relu_keeps_them_apart() -> None:
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no kernels")
    x = torch.randn(4, 3, 5, 5, device=DEVICE, requires_grad=True)
    norm = nn.BatchNorm2d(3).to(DEVICE)
    with FastDoubleBackward():
        out = norm(x)
        twice = out * 2
        total = torch.relu_(out).sum() + twice.sum()
        # not in place: the normalisation's output may be used again
        kept = norm(x)
        F.relu(kept)
    assert not twice.grad_fn.next_functions[0][0].masked
    assert not kept.grad_fn.masked
    expected = norm(x)
    (a,) = torch.autograd.grad(total, x)
    (b,) = torch.autograd.grad(torch.relu(expected).sum() + 2 * expected.sum(), x)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
