from __future__ import annotations

import copy
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchgen
import torchvision
import yaml
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from lightning_locality import AntiLocality, UniformPatches
from lightning_locality.regularizer.double_backward import _ONCE, FastDoubleBackward

# the private operators that FastDoubleBackward calls with positional arguments
SCHEMAS = {
    "_batch_norm_impl_index": "(Tensor input, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, "
    "bool training, float momentum, float eps, bool cudnn_enabled) -> (Tensor, Tensor, Tensor, Tensor, int)",
    "_batch_norm_impl_index_backward": "(int impl_index, Tensor input, Tensor grad_output, Tensor? weight, "
    "Tensor? running_mean, Tensor? running_var, Tensor? save_mean, Tensor? save_var_transform, bool train, float eps, "
    "bool[3] output_mask, Tensor reservedSpace) -> (Tensor, Tensor, Tensor)",
    "native_batch_norm_backward": "(Tensor grad_out, Tensor input, Tensor? weight, Tensor? running_mean, "
    "Tensor? running_var, Tensor? save_mean, Tensor? save_invstd, bool train, float eps, bool[3] output_mask) "
    "-> (Tensor, Tensor, Tensor)",
    "convolution_backward": "(Tensor grad_output, Tensor input, Tensor weight, SymInt[]? bias_sizes, SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[] output_padding, SymInt groups, "
    "bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
}
LAYERS = {
    "plain": (nn.Conv2d(3, 4, 3), (2, 3, 7, 8)),
    "stride": (nn.Conv2d(3, 4, (3, 2), stride=2, padding=1, bias=False), (2, 3, 8, 9)),
    "dilation": (nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(2, 3), dilation=2, groups=2), (2, 4, 9, 9)),
    "depthwise": (nn.Conv2d(4, 8, 3, padding=1, groups=4), (3, 4, 5, 6)),
    "same": (nn.Conv2d(2, 3, 3, padding="same"), (2, 2, 6, 6)),
    "reflect": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 2, 6, 6)),
    "one axis": (nn.Conv1d(2, 3, 3, stride=2), (3, 2, 11)),
    "three axes": (nn.Conv3d(2, 3, 2, padding=1), (2, 2, 4, 3, 4)),
    "transposed": (nn.ConvTranspose2d(2, 3, 3, stride=2), (2, 2, 4, 5)),
    "batch norm": (nn.BatchNorm2d(3), (4, 3, 5, 6)),
    "batch norm of vectors": (nn.BatchNorm1d(5), (7, 5)),
    "batch norm, cumulative average": (nn.BatchNorm2d(3, momentum=None, eps=0.1), (4, 3, 2, 3)),
    "batch norm without parameters": (nn.BatchNorm2d(3, affine=False), (4, 3, 2, 3)),
    "batch norm without statistics": (nn.BatchNorm2d(3, track_running_stats=False), (4, 3, 2, 3)),
    "batch norm at evaluation": (nn.BatchNorm2d(3).eval(), (4, 3, 2, 3)),
    "relu": (nn.ReLU(), (2, 3, 4, 5)),
    "relu in place": (nn.ReLU(inplace=True), (2, 3, 4, 5)),
    "gelu": (nn.GELU(), (2, 3, 4, 5)),
    "gelu by tanh": (nn.GELU(approximate="tanh"), (2, 3, 4, 5)),
    "silu": (nn.SiLU(), (2, 3, 4, 5)),
    "silu in place": (nn.SiLU(inplace=True), (2, 3, 4, 5)),
    "max pooling": (nn.MaxPool2d(3, 2, 1), (2, 3, 7, 8)),
    "max pooling, dilated": (nn.MaxPool2d((2, 3), dilation=(1, 2), ceil_mode=True), (2, 3, 7, 8)),
    "max pooling by integers of numpy": (nn.MaxPool2d(np.int64(2), stride=np.int32(1)), (2, 3, 7, 8)),
    "max pooling of one image": (nn.MaxPool2d(2), (3, 6, 6)),
    "layer norm": (nn.LayerNorm(6), (3, 5, 6)),
    "layer norm without bias": (nn.LayerNorm(6, bias=False), (3, 5, 6)),
    "layer norm without parameters": (nn.LayerNorm((4, 5), elementwise_affine=False), (2, 3, 4, 5)),
    "layer norm of images": (nn.LayerNorm((3, 4, 5)), (2, 3, 4, 5)),
    "instance norm": (nn.InstanceNorm2d(3, affine=True), (4, 3, 2, 3)),
}


def second_order(layer: nn.Module, x: Tensor, fast: bool, upstream: bool = True) -> list[Tensor]:
    """Gradients by all that goes in, of a function of the output and of the input gradient of another one."""
    x = x.clone().requires_grad_()
    before = x * 1.5 if upstream else x
    with FastDoubleBackward(fast=fast):
        out = layer(before)
    torch.manual_seed(5)
    # not randn_like, whose numbers depend on the memory format
    noise = torch.randn(out.shape, device=out.device), torch.randn(x.shape, device=x.device)
    score = (out * noise[0] + out.sin()).sum()
    (gradient,) = torch.autograd.grad(score, x, create_graph=True)
    loss = (gradient * noise[1]).sum() + gradient.cos().sum() + out.sin().sum()
    loss.backward()
    gradients = [x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]
    return [out.detach(), gradient.detach(), *(g for g in gradients if g is not None)]


def close(fast: list[Tensor], plain: list[Tensor], tolerance: float = 1e-12) -> bool:
    return len(fast) == len(plain) and all(
        (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())) for a, b in zip(fast, plain, strict=True)
    )


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_layers_agree_with_torch(name: str, channels_last: bool, device: torch.device) -> None:
    layer, shape = LAYERS[name]
    layer = copy.deepcopy(layer).double().to(device)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    twin = copy.deepcopy(layer)
    x = torch.randn(shape, device=device) * 2 + 1
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    assert close(second_order(layer, x, fast=True), second_order(twin, x, fast=False))
    for mine, other in zip(layer.buffers(), twin.buffers(), strict=True):
        assert torch.equal(mine, other)


def test_frozen_parameters(device: torch.device) -> None:
    for name, frozen in (("plain", "weight"), ("plain", "bias"), ("batch norm", "weight"), ("batch norm", "bias")):
        layer, shape = LAYERS[name]
        layer = copy.deepcopy(layer).double().to(device)
        getattr(layer, frozen).requires_grad_(False)
        x = torch.randn(shape, device=device)
        assert close(second_order(layer, x, fast=True), second_order(copy.deepcopy(layer), x, fast=False))


@pytest.mark.parametrize("name", SCHEMAS)
def test_torchs_private_operators_are_those_known(name: str) -> None:
    remedy = f"torch {torch.__version__} has changed aten::{name}: adapt regularizer/double_backward.py and this test"
    operator = getattr(torch.ops.aten, name, None)
    assert operator is not None, remedy
    assert str(operator.default._schema) == f"aten::{name}{SCHEMAS[name]}", remedy


def test_layers_are_taken_over_and_not_left_to_torch() -> None:
    with FastDoubleBackward():
        convolution = F.conv2d(torch.zeros(2, 1, 3, 3), torch.zeros(1, 1, 2, 2, requires_grad=True), padding=(1, 0))
        normal = nn.BatchNorm2d(2)(torch.randn(2, 2, 3, 3))
    assert "_Convolution" in type(convolution.grad_fn).__name__
    assert "_BatchNorm" in type(normal.grad_fn).__name__


def test_convolution_is_right_to_third_order() -> None:
    x, weight = torch.randn(2, 2, 4, 4, requires_grad=True), torch.randn(3, 2, 2, 2, requires_grad=True)
    bias = torch.randn(3, requires_grad=True)

    def chained(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with FastDoubleBackward():
            out = F.conv2d(x, weight, bias, 2)
        by_x, by_weight, by_bias = torch.autograd.grad(out.pow(3).sum(), (x, weight, bias), create_graph=True)
        return by_x.pow(2).sum() + by_weight.sin().sum() + by_bias.cos().sum()

    assert torch.autograd.gradcheck(chained, (x, weight, bias))
    assert torch.autograd.gradgradcheck(chained, (x, weight, bias))


def test_batch_norm_against_finite_differences() -> None:
    x, weight = torch.randn(3, 2, 2, 2, requires_grad=True), torch.randn(2, requires_grad=True)

    def penalty(x: Tensor, weight: Tensor) -> Tensor:
        with FastDoubleBackward():
            out = F.batch_norm(x, None, None, weight, torch.zeros(2), training=True, eps=0.3)
        (gradient,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
        return gradient.pow(3).sum()

    assert torch.autograd.gradcheck(penalty, (x, weight))


def test_batch_norm_is_right_to_third_order_and_in_its_parameters() -> None:
    x, weight = torch.randn(3, 2, 2, 2, requires_grad=True), torch.randn(2, requires_grad=True)
    bias = torch.randn(2, requires_grad=True)

    def chained(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with FastDoubleBackward():
            out = F.batch_norm(x.sin(), None, None, weight, bias, training=True, eps=0.3)
        by_x, by_weight, by_bias = torch.autograd.grad(out.pow(3).sum(), (x, weight, bias), create_graph=True)
        return by_x.pow(2).sum() + by_weight.sin().sum() + by_bias.cos().sum()

    assert torch.autograd.gradcheck(chained, (x, weight, bias))
    assert torch.autograd.gradgradcheck(chained, (x, weight, bias))


def test_gradient_of_the_given_input_is_left_out_of_the_last_pass_only() -> None:
    leaf = torch.randn(2, 1, 5, 5, requires_grad=True)
    convolution = nn.Conv2d(1, 2, 3)
    gradients = []
    for fast in (True, False):
        x = leaf.clone()
        with FastDoubleBackward(x, leaf=True, fast=fast):
            out = convolution(x)
        (gradient,) = torch.autograd.grad(out.pow(2).sum(), x, create_graph=True)
        assert gradient.abs().sum() > 0
        leaf.grad = None
        convolution.zero_grad()
        (gradient.pow(2).sum() + out.sum()).backward()
        gradients.append(convolution.weight.grad)
        assert (leaf.grad is None) == fast
    assert close(gradients[:1], gradients[1:])  # type: ignore[arg-type]


def network(normalization: Any) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False),
        normalization(6),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, stride=2),
        normalization(8),
        nn.Tanh(),
        nn.Flatten(),
        nn.LazyLinear(1),
    )


def test_bfloat16_autocast_is_as_near_to_float64_as_torch(device: torch.device) -> None:
    x = torch.randn(8, 2, 12, 12, device=device)
    exact = network(nn.BatchNorm2d).to(device)
    exact(x)
    reference = second_order(copy.deepcopy(exact), x, fast=True, upstream=False)
    errors = []
    for fast in (True, False):
        model = copy.deepcopy(exact).float()
        with torch.autocast(device.type, torch.bfloat16):
            found = second_order(model, x.float(), fast=fast, upstream=False)
        assert all(g.dtype is torch.float32 for g in found[1:])
        pairs = zip(found[1:], reference[1:], strict=True)
        errors.append(max(float((a - b).norm() / b.norm()) for a, b in pairs))
    assert errors[0] < 1.5 * errors[1] + 0.01


def test_inference_and_no_grad_go_to_torch() -> None:
    model = network(nn.BatchNorm2d)
    x = torch.randn(4, 2, 12, 12)
    model(x)
    with torch.no_grad(), FastDoubleBackward():
        out = model(x)
    with torch.no_grad():
        assert torch.equal(out, model(x))


class Differentiating(nn.Module):
    """A network that takes gradients of its energy while it runs."""

    def __init__(self, how: Callable[[Any, Tensor], Tensor], norm: bool = False) -> None:
        super().__init__()
        self.how = how
        self.conv, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(6) if norm else nn.Identity(), nn.Linear(6, 1)
        self.shift = nn.Parameter(torch.randn(3, 1, 1))

    def energy(self, x: Tensor) -> Tensor:
        features = self.second(self.norm(self.conv(x)).tanh()).tanh()
        out: Tensor = self.head(features.square().mean((2, 3)))[:, 0] + x.square().mean((1, 2, 3))
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


def added(energy: Tensor, force: Tensor) -> Tensor:
    return energy + 100 * force.square().flatten(1).sum(1).tanh()


def by_grad(m: Differentiating, x: Tensor) -> Tensor:
    x = x if x.requires_grad else x.detach().requires_grad_()
    return added(e := m.energy(x), torch.autograd.grad(e.sum(), x, create_graph=True)[0])


def by_grad_twice(m: Differentiating, x: Tensor) -> Tensor:
    (force,) = torch.autograd.grad((e := m.energy(x)).sum(), x, create_graph=True)
    return added(e, torch.autograd.grad(force.square().sum(), x, create_graph=True)[0])


def by_backward(m: Differentiating, x: Tensor) -> Tensor:
    x.retain_grad()
    m.energy(x).sum().backward(inputs=[x, m.conv.weight], create_graph=True)
    assert x.grad is not None
    return added(m.energy(x), x.grad)


def by_all_backward(m: Differentiating, x: Tensor) -> Tensor:
    x.retain_grad()
    m.energy(x).sum().backward(create_graph=True)
    assert x.grad is not None
    return added(m.energy(x), x.grad)


def a_constant(m: Differentiating, x: Tensor) -> Tensor:
    (force,) = torch.autograd.grad(m.energy(x).sum(), x)
    return m.energy(x * (1 + force))


def by_weights(m: Differentiating, x: Tensor) -> Tensor:
    (step,) = torch.autograd.grad(m.energy(x).square().mean(), m.conv.weight, create_graph=True)
    features = F.conv2d(x, m.conv.weight - step).tanh().mean((2, 3))
    return m.energy(x) + m.head(features)[:, 0]


def by_functorch(m: Differentiating, x: Tensor) -> Tensor:
    return added(m.energy(x), torch.func.grad(lambda z: m.energy(z).sum())(x))


def by_vmap(m: Differentiating, x: Tensor) -> Tensor:
    return added(m.energy(x), torch.func.vmap(torch.func.grad(lambda z: m.energy(z[None]).sum()))(x))


def by_jvp(m: Differentiating, x: Tensor) -> Tensor:
    energy, change = torch.func.jvp(m.energy, (x,), (torch.ones_like(x),))
    return added(energy, change[:, None])


def by_dual_numbers(m: Differentiating, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        change = forward_ad.unpack_dual(m.energy(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    assert change is not None
    return added(m.energy(x), change[:, None])


def by_hessian(m: Differentiating, x: Tensor) -> Tensor:
    energy = lambda z: m.energy(z).sum()
    return added(m.energy(x), torch.autograd.functional.hvp(energy, x, torch.ones_like(x), create_graph=True)[1])


def by_checkpoint(m: Differentiating, x: Tensor) -> Tensor:
    features: Any = checkpoint(lambda z: m.second(m.conv(z).tanh()).tanh(), x, use_reentrant=False)
    return m.head(features.square().mean((2, 3)))[:, 0]


class Late(torch.autograd.Function):
    """Its backward pass takes gradients of a graph from the forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, inner: Tensor, inputs: list[Tensor]) -> Tensor:
        ctx.inner, ctx.inputs = inner, inputs
        return inner.detach().clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        gradients = torch.autograd.grad(ctx.inner, ctx.inputs, g, create_graph=True, retain_graph=True)
        return (*gradients, None, None)


def late(m: Differentiating, x: Tensor) -> Tensor:
    features = Late.apply(x, m.conv.weight, m.conv(x).tanh(), [x, m.conv.weight])
    return m.head(features.square().mean((2, 3)))[:, 0]


def a_hook(m: Differentiating, x: Tensor) -> Tensor:
    energy = m.energy(x)
    x.register_hook(lambda g: 2 * g + g.square())
    return energy


def hooks_of_layers(m: Differentiating, x: Tensor) -> Tensor:
    first = m.conv.register_full_backward_hook(lambda _, given, __: (given[0] + given[0].square(),))
    second = m.second.register_full_backward_pre_hook(lambda _, given: (given[0].sin(),))
    with first, second:
        return m.energy(x)


def in_place(m: Differentiating, x: Tensor) -> Tensor:
    x -= 0.5
    return m.energy(x)


def in_place_by_parameters(m: Differentiating, x: Tensor) -> Tensor:
    return m.energy(x.mul_(1 + m.shift).relu_())


def in_part(m: Differentiating, x: Tensor) -> Tensor:
    before = m.energy(x.clone())
    x[:, :, :2] = m.shift
    return before + m.energy(x)


def reused(m: Differentiating, x: Tensor) -> Tensor:
    features = m.conv(x) + m.second(m.second(m.conv(x * m.shift)).tanh())
    return m.head((features + m.conv(x)).tanh().mean((2, 3)))[:, 0]


def detached(m: Differentiating, x: Tensor) -> Tensor:
    with torch.no_grad():
        constant = m.energy(x)
    return m.energy(x) * m.energy(x.detach()) * constant


def offloaded(m: Differentiating, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return m.energy(x)


INSIDE = [
    *(by_grad, by_grad_twice, by_backward, by_all_backward, a_constant, by_weights, by_functorch, by_vmap, by_jvp),
    *(by_dual_numbers, by_hessian, by_checkpoint, late, a_hook, hooks_of_layers, in_place, in_place_by_parameters),
    *(in_part, reused, detached, offloaded),
]


def a_step(model: nn.Module, x: Tensor, fast: bool, y: Tensor | None = None) -> list[Tensor]:
    """Output, term and all gradients of a training step, that of what made the images included."""
    torch.manual_seed(6)
    model, made = copy.deepcopy(model), torch.zeros(x.shape[1:], requires_grad=True)
    before = x.clone()
    out, term = AntiLocality(UniformPatches(2), seed=0, fast=fast).with_output(model, x + made, y)
    (out.sin().mean() + term).backward()
    assert torch.equal(x, before)
    gradients = [p.grad.detach() for p in model.parameters() if p.grad is not None]
    assert made.grad is not None
    return [out.detach(), term.detach(), made.grad.detach(), *gradients, *model.buffers()]


def relative_difference(ours: list[Tensor], torchs: list[Tensor]) -> float:
    scale = max(float(t.abs().max()) for t in torchs[3:])
    return max(float((a - b).abs().max()) for a, b in zip(ours, torchs, strict=True)) / scale


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.filterwarnings("ignore:.*_global_torch_jit_compilation|.*torch.jit.script")
@pytest.mark.parametrize("how", INSIDE)
def test_what_a_model_does_with_its_input_and_with_autograd(how: Callable[[Any, Tensor], Tensor]) -> None:
    model, x = Differentiating(how), torch.rand(4, 3, 8, 8)
    assert relative_difference(a_step(model, x, True), a_step(model, x, False)) < 1e-12


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("how", [by_grad, by_grad_twice, by_all_backward, by_weights, by_hessian])
def test_higher_derivatives_of_batch_norm_against_finite_differences(how: Callable[[Any, Tensor], Tensor]) -> None:
    model, x = Differentiating(how, norm=True), torch.rand(4, 3, 8, 8)
    penalty = lambda: AntiLocality(UniformPatches(2), seed=0)(model, x)
    unused = (model.shift, model.head.bias)
    parameters = [p for p in model.parameters() if not any(p is q for q in unused)]
    gradients = torch.autograd.grad(penalty(), parameters)
    directions, values, step = [torch.randn_like(p) for p in parameters], [], 1e-5
    for sign in (1, -2, 1):
        with torch.no_grad():
            torch._foreach_add_(parameters, directions, alpha=sign * step)
        values.append(penalty().item())
    numeric = (values[0] - values[1]) / (2 * step)
    analytic = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    assert analytic == pytest.approx(numeric, rel=1e-5)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("how", [by_grad, by_all_backward, by_weights, a_constant])
@pytest.mark.parametrize("norm", [True, False])
def test_values_of_models_that_differentiate_are_those_measured(how: Any, norm: bool) -> None:
    model, x = Differentiating(how, norm), torch.rand(4, 3, 8, 8)
    measured = AntiLocality(UniformPatches(2)).measure(model, x, generator=torch.Generator().manual_seed(1))
    trained = AntiLocality(UniformPatches(2)).with_output(model, x, generator=torch.Generator().manual_seed(1))[1]
    assert trained.item() == pytest.approx(measured.item(), abs=1e-12)


def test_gradients_that_are_taken_from_the_output() -> None:
    x, found = torch.rand(4, 3, 8, 8), []
    model = Differentiating(lambda m, x: (m.energy(x), x))  # type: ignore[arg-type, return-value]
    lazily = lambda out, y: added(out[0], torch.autograd.grad(out[0].sum(), out[1], create_graph=True)[0])
    for fast in (True, False):
        model.zero_grad()
        AntiLocality(UniformPatches(2), output=lazily, fast=fast)(model, x).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert close(*found)


@pytest.mark.parametrize("fast", [True, False])
def test_checkpointing_that_cannot_work_says_so(fast: bool) -> None:
    x, penalty = torch.rand(4, 3, 8, 8), AntiLocality(UniformPatches(2), fast=fast)
    run: Any = lambda m, x: checkpoint(m.energy, x, use_reentrant=False)
    with pytest.raises(ValueError, match=r"norm \(BatchNorm2d\): gradient checkpointing .* switch checkpointing off"):
        penalty(Differentiating(run, norm=True), x)
    attention: Any = lambda z: F.scaled_dot_product_attention(z, z, z).mean((1, 2, 3))
    attend: Any = lambda m, x: checkpoint(attention, m.conv(x), use_reentrant=False)
    with pytest.raises(ValueError, match=r"^model \(Differentiating\): gradient checkpointing"):
        penalty(Differentiating(attend), x)
    reentrant: Any = lambda m, x: checkpoint(m.energy, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="set use_reentrant=False"):
        penalty(Differentiating(reentrant), x)
    gc.collect()  # the hooks of torch 2.11's checkpoint stay as long as the frames of the exception


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layer", [nn.Hardsigmoid, nn.Hardswish, nn.ReLU6, nn.SiLU])
def test_activations_have_second_derivatives(layer: Any, inplace: bool) -> None:
    x = torch.randn(400, requires_grad=True)
    # none within a step of a kink
    points = (4 * x.detach()).clamp(-20, 20)
    points = points[((points.abs() - 3).abs() > 1e-3) & (points.abs() > 1e-3) & ((points - 6).abs() > 1e-3)]
    points.requires_grad_()

    def slope(z: Tensor) -> Tensor:
        with FastDoubleBackward():
            out = layer(inplace=inplace)(z * 1.0)
        return torch.autograd.grad(out.square().sum(), z, create_graph=True)[0]

    reference = layer()(points.detach().requires_grad_())
    with FastDoubleBackward():
        assert torch.allclose(layer(inplace)(points * 1.0), reference, rtol=0, atol=1e-15)
    (second,) = torch.autograd.grad(slope(points).sum(), points)
    numeric = (slope(points + 1e-6) - slope(points - 1e-6)) / 2e-6
    assert (second - numeric).abs().max() < 1e-6


class Cropping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torchvision.ops.roi_align(x, [torch.tensor([[0.0, 0.0, 5.0, 5.0]])] * len(x), 3)
        return out


@pytest.mark.parametrize("fast", [True, False])
def test_layers_without_second_derivative_are_named(fast: bool) -> None:
    x, penalty = torch.rand(4, 3, 8, 8), AntiLocality(UniformPatches(2), fast=fast)
    last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1))
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), Cropping()), *last)
    with pytest.raises(
        ValueError, match=r"^0\.1 \(Cropping\): torch has no second derivative of roi_align.*replace it"
    ):
        penalty(model, x)
    assert 0 <= penalty.measure(model, x) <= 1
    segments: Any = lambda x: torch.segment_reduce(x.flatten(1), "mean", axis=1, lengths=torch.full((4, 2), 96)).sum(1)
    with pytest.raises(ValueError, match=r"^segment_reduce: torch has no second derivative of segment_reduce"):
        penalty(segments, x)
    # one that does not depend on the images needs none
    bag, table = nn.EmbeddingBag(5, 3), torch.tensor([[0, 1], [2, 3]])
    penalty(lambda x: (x.tanh() * bag(table).sum(0)[:, None, None]).sum((1, 2, 3)), x).backward()
    assert bag.weight.grad is not None


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_recurrent_layers_have_second_derivatives(layer: Any, where: str) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.head = layer(24, 5, batch_first=True), nn.Linear(5, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.rows(x.transpose(1, 2).flatten(2))[0].mean(1))
            return out

    model, x = Recurrent().to(where), torch.rand(4, 3, 8, 8)
    reference = copy.deepcopy(model).cpu()
    AntiLocality(UniformPatches(2))(model, x.to(where)).backward()
    AntiLocality(UniformPatches(2), fast=False)(reference, x).backward()
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    assert close(*zip(*((p.grad.cpu(), q.grad) for p, q in pairs if p.grad is not None), strict=True))  # type: ignore[arg-type, misc]


def test_torchs_own_table_of_derivatives_holds_no_other_layer() -> None:
    table = yaml.safe_load((Path(torchgen.__file__).parent / "packaged/autograd/derivatives.yaml").read_text())
    known = {entry["name"].split("(")[0].split(".")[0] for entry in table}
    implicit = torch._C.DispatchKey.CompositeImplicitAutograd

    def once(call: str) -> bool:
        packet = getattr(torch.ops.aten, call, None)
        if packet is None or call in known:
            return False
        return not getattr(packet, packet.overloads()[0]).has_kernel_for_dispatch_key(implicit)

    lacking = {
        entry["name"].split("(")[0].split(".")[0]
        for entry in table
        for name, formula in entry.items()
        if isinstance(formula, str) and name not in ("name", "dispatch") and "GradMode" not in formula
        for call in re.findall(r"(\w+_backward)(?:_symint)?\(", formula)
        if once(call)
    }
    plain = lambda name: name.lower().replace("_", "").removesuffix("forward")
    named = {plain(re.sub(r"Backward\d$", "", name)) for name in _ONCE}
    # supplied, or never called by a network as such
    rest = {plain(name) for name in lacking} - named - {"hardsigmoid", "matmul", "glubackward"}
    assert not {name for name in rest if "attention" not in name}
    assert {f"{name}Backward0" for name in ("CtcLoss", "EmbeddingBag", "CudnnRnn")} <= _ONCE & set(
        dir(torch._C._functions)
    )


ARCHITECTURES = [
    *("squeezenet1_1", "resnet18", "densenet121", "googlenet", "shufflenet_v2_x0_5", "mobilenet_v2", "mnasnet0_5"),
    *("mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0", "regnet_x_400mf", "regnet_y_400mf"),
]
TIMM = [
    *("mobilenetv3_small_100", "lcnet_050", "ghostnet_100", "hardcorenas_a", "tinynet_e", "mixnet_s", "resnet10t"),
    *("seresnet18", "skresnet18", "dla46_c", "dpn48b", "regnety_002", "repvgg_a0", "rexnet_100", "ese_vovnet19b_dw"),
    *("convnext_atto", "edgenext_xx_small", "mobilevit_xxs", "mobilevitv2_050", "mixer_s32_224", "gmlp_ti16_224"),
    *("resmlp_12_224", "vit_tiny_patch16_224", "cait_xxs24_224", "xcit_nano_12_p16_224", "pit_ti_224", "hgnetv2_b0"),
    *("convit_tiny", "levit_128s", "visformer_tiny", "inception_next_atto", "mobilenetv4_conv_small", "starnet_s1"),
    *("efficientvit_b0", "efficientvit_m0", "repghostnet_050", "fasternet_t0", "swiftformer_xs"),
]


def built(name: str) -> tuple[nn.Module, int]:
    """An architecture with three outputs, and the side of small images for it."""
    if name not in TIMM:
        options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
        return torchvision.models.get_model(name, weights=None, num_classes=3, **options), 32
    sized = "_224" in name or name in ("convit_tiny", "levit_128s", "visformer_tiny", "efficientvit_m0")
    return timm.create_model(name, num_classes=3, **({"img_size": 64} if sized else {})), 64


@pytest.mark.parametrize("name", ARCHITECTURES + TIMM)
def test_architectures_agree_with_torch(name: str) -> None:
    model, side = built(name)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    x, y = torch.randn(3, 3, side, side), torch.arange(3)
    ours = a_step(model.double(), x, True, y)
    assert len(ours) > 20
    assert relative_difference(ours, a_step(model, x, False, y)) < 1e-10
