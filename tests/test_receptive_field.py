"""Receptive fields: closed forms of linear stacks, known sizes, an independent computation, networks left alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torchvision
from scipy.signal import convolve2d
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from lightning_locality import SmallResNet, effective_receptive_field
from lightning_locality.ranks import ReceptiveField


def blurs(number: int, side: int = 3) -> nn.Sequential:
    layers = [nn.Conv2d(1, 1, side, padding=side // 2, bias=False) for _ in range(number)]
    for layer in layers:
        nn.init.ones_(layer.weight)
    return nn.Sequential(*layers)


def extent(mask: Tensor) -> tuple[int, int]:
    return int(mask.any(1).sum()), int(mask.any(0).sum())


@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_stack_of_blurs_has_the_field_of_their_convolution(number: int) -> None:
    expected = torch.ones(1, 1).numpy()
    for _ in range(number):
        expected = convolve2d(expected, torch.ones(3, 3).numpy())
    field = effective_receptive_field(blurs(number), torch.rand(3, 1, 21, 25), layer=str(number - 1))
    side = 2 * number + 1
    square = field.map[10 - number : 11 + number, 12 - number : 13 + number]
    torch.testing.assert_close(square, torch.from_numpy(expected))
    assert float(field.map.sum()) == pytest.approx(float(square.sum()))
    assert torch.equal(field.theoretical, field.map > 0)
    assert extent(field.theoretical) == (side, side)
    # of 2n uniform steps of variance 2/3 along each axis
    fit = field.gaussian()
    if number == 4:
        assert fit.sigma_x == pytest.approx(math.sqrt(number * 2 / 3), rel=0.05)
        assert fit.r2 > 0.99


def test_shares_of_a_map_that_is_known() -> None:
    values = torch.zeros(9, 9)
    values[4, 4], values[4, 7] = 9.0, 1.0
    field = ReceptiveField(values, values > 0, 1, None)
    assert field.radius(0.9) == 0
    assert field.radius(0.95) == 3
    assert field.area_ratio(0.5, logarithm=False) == pytest.approx(9 / 81)
    assert field.area_ratio(0.95, logarithm=False) == pytest.approx(49 / 81)
    # log10(10) = 1 of 1.301
    assert field.area_ratio(0.77) == pytest.approx(49 / 81)
    assert field.area_ratio(0.76) == pytest.approx(9 / 81)
    with pytest.raises(ValueError, match=r"share must be between 0 and 1.* got 50"):
        field.area_ratio(50)


@pytest.mark.parametrize(("layer", "side"), [("conv1", 7), ("maxpool", 11), ("layer1", 43), ("layer2", 99)])
def test_theoretical_fields_of_resnet18(layer: str, side: int) -> None:
    torch.set_default_dtype(torch.float32)
    field = effective_receptive_field(torchvision.models.resnet18(), torch.rand(1, 3, 128, 128), layer=layer)
    assert extent(field.theoretical) == (side, side)
    assert int(field.theoretical.sum()) == side * side
    assert not field.map[~field.theoretical].any()


def test_the_map_of_resnet18_computed_otherwise() -> None:
    model, images = torchvision.models.resnet18().double(), torch.rand(3, 3, 64, 64)
    field = effective_receptive_field(model, images, layer="layer3")
    features = create_feature_extractor(model.eval(), ["layer3"])
    expected = torch.zeros(64, 64)
    for image in images:
        positive = lambda one: features(one[None])["layer3"][0, :, 2, 2].clamp(min=0)
        rows = torch.autograd.functional.vjp(positive, image, torch.ones(256))[1]
        expected += rows.clamp(min=0).sum(0)
    torch.testing.assert_close(field.map, expected / 3)


def test_a_transformer_sees_everything_and_its_central_token_is_taken() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=(48, 80), num_classes=2, depth=2).double()
    images = torch.rand(2, 3, 48, 80)
    patches = effective_receptive_field(model, images, layer="patch_embed.proj")
    assert extent(patches.theoretical) == (16, 16)
    assert patches.theoretical[16:32, 32:48].all()
    block = effective_receptive_field(model, images, layer="blocks.0")
    assert block.theoretical.all()
    inside = float(block.map[16:32, 32:48].sum() / block.map.sum())
    assert inside > 0.5


class Skipping(nn.Module):
    """A short and a long path, with pooling, whose last window is cut off, on one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.short, self.long = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 5, padding=2)
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool((self.short(x) + self.long(x)).relu())


def test_skips_and_pooling() -> None:
    field = effective_receptive_field(Skipping(), torch.rand(2, 1, 20, 20), layer="pool")
    # the window of rows 10 to 12, each with two on either side
    assert extent(field.theoretical) == (7, 7)
    assert field.theoretical[8:15, 8:15].all()


def test_the_output_and_what_is_left_of_the_network() -> None:
    model = SmallResNet(outputs=3, dropout=0.5).train()
    before = copy.deepcopy(model.state_dict())
    field = effective_receptive_field(model, torch.rand(20, 1, 16, 16))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert field.layer is None
    assert field.images == 20
    assert field.theoretical.all()
    axes = field.plot()
    assert axes.get_title() == "output"
    axes.get_figure().savefig("/dev/null", format="png")  # type: ignore[union-attr]


def test_refusals() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 36, 1))
    with pytest.raises(ValueError, match=r"layer must be a name in model.named_modules.*'7'"):
        effective_receptive_field(model, torch.rand(2, 1, 8, 8), layer="7")
    with pytest.raises(ValueError, match=r"images must be floating-point \(N, C, H, W\), got torch.int64"):
        effective_receptive_field(model, torch.zeros(2, 1, 8, 8, dtype=torch.int64))
    volumes = nn.Sequential(nn.Unflatten(3, (2, 4)), nn.Flatten())
    with pytest.raises(ValueError, match=r"layer '0' must give a map .*, got \(2, 1, 8, 2, 4\)"):
        effective_receptive_field(volumes, torch.rand(2, 1, 8, 8), layer="0")
    with pytest.raises(ValueError, match="model cannot be differentiated by its images"):
        effective_receptive_field(Rounded(), torch.rand(2, 1, 8, 8))


class Rounded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x > 0.5).sum((1, 2, 3)).double()
