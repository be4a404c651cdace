from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_locality.regularizer.double_backward import FastDoubleBackward

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
    "instance norm": (nn.InstanceNorm2d(3, affine=True), (4, 3, 2, 3)),
}


def second_order(layer: nn.Module, x: Tensor, fast: bool, upstream: bool = True) -> list[Tensor]:
    """Gradients by all that goes in, of a function of the output and of the input gradient of another one."""
    x = x.clone().requires_grad_()
    before = x * 1.5 if upstream else x
    with FastDoubleBackward(fast=fast):
        out = layer(before)
    torch.manual_seed(5)
    score = (out * torch.randn_like(out) + out.sin()).sum()
    (gradient,) = torch.autograd.grad(score, x, create_graph=True)
    loss = (gradient * torch.randn_like(gradient)).sum() + gradient.cos().sum() + out.sin().sum()
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
