from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision.models as tvm
from torch import nn
from torchvision.models.convnext import CNBlockConfig

from lightning_locality.networks import SmallResNet, adapt


def test_receptive_field_equals_the_pixels_that_reach_one_position() -> None:
    network = SmallResNet(widths=(2, 2, 2, 2), strides=(2, 1, 2, 2)).eval()
    for module in network.modules():  # positive weights: no pixel's influence is cut by a ReLU
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 0.1)
    x = torch.ones(1, 1, 1, 241, requires_grad=True)
    features = network.blocks(network.stem(x))
    features[0, 0, 0, features.shape[-1] // 2].backward()
    assert x.grad is not None
    assert int((x.grad != 0).sum()) == network.receptive_field == 47


def test_gradient_reaches_every_parameter(device: torch.device) -> None:
    network = SmallResNet(in_channels=3, outputs=4).to(device)
    network(torch.randn(4, 3, 16, 16, device=device)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def small_convnext() -> nn.Module:
    return tvm.ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)])


@pytest.mark.parametrize(
    "build",
    [tvm.resnet18, tvm.squeezenet1_1, tvm.mobilenet_v3_small, small_convnext, SmallResNet],
    ids=lambda f: f.__name__,
)
def test_adapt_fits_channels_and_outputs(build: Callable[[], nn.Module]) -> None:
    with torch.device("meta"):
        network = adapt(build(), in_channels=2, outputs=5).eval()
        assert network(torch.zeros(1, 2, 64, 64)).shape == (1, 5)


def test_adapt_leaves_what_fits() -> None:
    with torch.device("meta"):
        network = tvm.resnet18(num_classes=7)
    conv, head = network.conv1, network.fc
    adapt(network, in_channels=3, outputs=7)
    assert network.conv1 is conv
    assert network.fc is head


def test_published_size_of_the_adapted_resnet() -> None:
    with torch.device("meta"):
        one, other = adapt(tvm.resnet18(), 3, 1), adapt(tvm.resnet18(), 1, 1)
    assert sum(p.numel() for p in one.parameters()) == 11_177_025
    assert sum(p.numel() for p in other.parameters()) == 11_170_753


def test_errors() -> None:
    with pytest.raises(ValueError, match="no Conv2d"):
        adapt(nn.Linear(3, 2), 1, 1)
    with pytest.raises(ValueError, match="neither in a linear layer"):
        adapt(nn.Sequential(nn.Conv2d(3, 4, 3)), 3, 1)
    with pytest.raises(ValueError, match="one each for the stem and for every block"):
        SmallResNet(widths=(4, 4), strides=(1,))
    with pytest.raises(ValueError, match="at least 1"):
        SmallResNet(in_channels=0)


def test_a_bare_layer_cannot_be_adapted() -> None:
    with pytest.raises(ValueError, match="Conv2d is itself the layer to replace"):
        adapt(torch.nn.Conv2d(2, 2, 1), 1, 1)
