"""Attention distance: closed forms, timm's and torchvision's transformers computed otherwise, refusals."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

from lightning_locality import SmallResNet, attention_distance


def mean_distance(rows: int, columns: int, height: float, width: float) -> float:
    places = torch.cartesian_prod(torch.arange(rows) * height, torch.arange(columns) * width).double()
    return float(torch.cdist(places, places).mean())


def test_timm_with_its_own_weights() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=(48, 80), num_classes=2, depth=2).double()
    images, weights = torch.rand(3, 3, 48, 80), list[Tensor]()
    found = attention_distance(model, images)
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, given, out: weights.append(out))
    model.eval()(images)
    places = torch.cartesian_prod(torch.arange(3.0), torch.arange(5.0)) * 16
    expected = [(w[:, :, 1:, 1:] * torch.cdist(places, places)).sum(3).mean((0, 2)) for w in weights]
    torch.testing.assert_close(found, torch.stack(expected))
    # at its first weights attention is nearly uniform, and one of 16 tokens is no patch
    assert float(found.mean()) == pytest.approx(mean_distance(3, 5, 16, 16) * 15 / 16, rel=0.05)


def test_torchvision_in_parts_and_left_as_it_was() -> None:
    model = torchvision.models.VisionTransformer(32, 8, 2, 4, 16, 32, num_classes=3).double().train()
    images = torch.rand(20, 3, 32, 32)
    found, weights = attention_distance(model, images), list[Tensor]()
    assert found.shape == (2, 4)
    assert model.training
    model.eval()
    for layer in model.encoder.layers:
        normed = layer.ln_1.register_forward_hook(lambda module, given, out: weights.append(out))
    assert normed
    model(images)
    places = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)) * 8
    for row, layer, x in zip(found, model.encoder.layers, weights, strict=True):
        one = layer.self_attention(x, x, x, average_attn_weights=False)[1]
        torch.testing.assert_close(row, (one[:, :, 1:, 1:] * torch.cdist(places, places)).sum(3).mean((0, 2)))
    torch.testing.assert_close(torch.stack([attention_distance(model, one[None]) for one in images]).mean(0), found)


class Asking(nn.Module):
    """Uses the weights that torch's module returns, asked for in another way each time."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.seen: list[list[int]] = []

    def forward(self, x: Tensor) -> Tensor:
        tokens = nn.functional.avg_pool2d(x, 2).flatten(2).mT
        asked = [
            self.attention(tokens, tokens, tokens),
            self.attention(tokens, tokens, tokens, average_attn_weights=False),
            self.attention(tokens, tokens, tokens, None, False),
        ]
        self.seen = [[] if weights is None else list(weights.shape) for _, weights in asked]
        return asked[0][1].mean((1, 2)) + asked[2][0].mean((1, 2))


def test_weights_that_the_network_itself_asks_for() -> None:
    model, images = Asking(), torch.rand(3, 4, 8, 8)
    output = model.eval()(images)
    before = model.seen
    rows = attention_distance(model, images)
    assert model.seen == before == [[3, 16, 16], [3, 2, 16, 16], []]
    torch.testing.assert_close(model(images), output)
    assert rows.shape == (3, 2)
    torch.testing.assert_close(rows[0], rows[2])


class Neighbours(nn.Module):
    """Every patch attends to itself, as far as the strength goes."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = strength

    def forward(self, x: Tensor) -> Tensor:
        one = torch.eye(16).expand(len(x), 1, -1, -1)
        return nn.functional.scaled_dot_product_attention(self.strength * one, one, one).mean((1, 2, 3))


def test_from_everywhere_to_nowhere() -> None:
    images = torch.rand(2, 1, 8, 8)
    assert float(attention_distance(Neighbours(0), images)) == pytest.approx(mean_distance(4, 4, 2, 2))
    assert float(attention_distance(Neighbours(1e3), images)) == pytest.approx(0, abs=1e-9)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"model must attend by .*, got SmallResNet"):
        attention_distance(SmallResNet(), torch.rand(2, 1, 16, 16))
    timm = pytest.importorskip("timm")
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, num_classes=2).double()
    for module in swin.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    with pytest.raises(ValueError, match="attention must be among all tokens of an image"):
        attention_distance(swin, torch.rand(2, 3, 56, 56))
