"""Influence by distance: loops over Jacobians, closed forms, known fields; layers in the measures of interaction."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from lightning_locality import (
    PermutedImages,
    SameClass,
    cut_share,
    effective_receptive_field,
    halves,
    influence_by_distance,
    interaction_profile,
)
from lightning_locality.datamodules import DistantHalves
from lightning_locality.plotting.ranks import range_figure
from lightning_locality.ranks import Evaluation, InfluenceProfile


class Scores(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def stack(*strides: int) -> nn.Sequential:
    layers = [nn.Conv2d(2 if k == 0 else 1, 1, 3, stride, 1) for k, stride in enumerate(strides)]
    return nn.Sequential(*itertools.chain(*((layer, nn.Tanh()) for layer in layers)))


@pytest.mark.parametrize(("strides", "layer"), [((1, 1), None), ((1, 2), "3"), ((2, 1), "2")])
def test_against_loops_over_the_jacobian(strides: tuple[int, int], layer: str | None) -> None:
    height, width, model, images = 6, 8, stack(*strides), torch.randn(3, 2, 6, 8)
    found = influence_by_distance(model, images, layer=layer, units=100, width=2)
    part = model if layer is None else model[: int(layer) + 1]
    bins, pairs, means, away = ([0.0] * 6, [0] * 6, [], [])
    for image in images:
        jacobian = torch.autograd.functional.jacobian(lambda x: part(x[None])[0, 0], image)
        rows, columns = jacobian.shape[:2]
        for i, j in itertools.product(range(rows), range(columns)):
            influence, mean = jacobian[i, j].norm(dim=0), 0.0
            influence = influence / influence.sum()
            at = (i + 0.5) * height / rows - 0.5, (j + 0.5) * width / columns - 0.5
            for v, w in itertools.product(range(height), range(width)):
                distance = math.hypot(v - at[0], w - at[1])
                bins[int(distance / 2)] += float(influence[v, w])
                pairs[int(distance / 2)] += 1
                mean += float(influence[v, w]) * distance
                away.append(distance)
            means.append(mean)
    there = [k for k in range(6) if pairs[k]]
    share = torch.tensor([bins[k] / len(means) for k in there])
    number = torch.tensor([pairs[k] / sum(pairs) for k in there])
    torch.testing.assert_close(found.share, share)
    torch.testing.assert_close(found.strength, share / number)
    assert found.mean_distance == pytest.approx(sum(means) / len(means), rel=1e-12)
    assert found.uniform_mean_distance == pytest.approx(sum(away) / len(away), rel=1e-12)
    assert float(found.distance @ number) == pytest.approx(found.uniform_mean_distance, rel=1e-12)


def test_a_stack_of_blurs_far_from_the_border() -> None:
    # circular: units at the border see as much, of the other end
    model = nn.Sequential(*(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular", bias=False) for _ in range(2)))
    for layer in model:
        nn.init.ones_(layer.weight)
    triangle = torch.tensor([1.0, 2.0, 3.0, 2.0, 1.0])
    weight, steps = torch.outer(triangle, triangle) / 81, torch.arange(-2.0, 3)
    found = influence_by_distance(model, torch.rand(20, 1, 81, 81), units=30, width=1)
    inside = found.distance < 3
    expected = torch.stack([weight[torch.hypot(steps[:, None], steps).long() == k].sum() for k in range(3)])
    torch.testing.assert_close(found.share[inside], expected, rtol=0.05, atol=0)
    assert float(found.share[0]) == pytest.approx(1 / 9, rel=1e-12)


def test_the_direction_is_uniform_over_the_channels() -> None:
    # one channel copies the pixel, the other that three to its right: |w_2| / (|w_1| + |w_2|) is a half in the mean
    model = nn.Conv2d(1, 2, (1, 7), padding=(0, 3), padding_mode="circular", bias=False)
    nn.init.zeros_(model.weight)
    model.weight.data[0, 0, 0, 3] = model.weight.data[1, 0, 0, 6] = 1.0
    found = influence_by_distance(model, torch.rand(400, 1, 1, 200), units=8, width=1)
    assert found.mean_distance_low < found.mean_distance < found.mean_distance_high
    near = found.distance < 4
    assert float(found.share[near][0]) == pytest.approx(0.5, abs=0.02)
    assert float(found.share[near][3]) == pytest.approx(0.5, abs=0.03)
    assert float(found.share[near].sum()) > 0.98


def test_a_score_two_pixels_are_multiplied() -> None:
    model = Scores(lambda x: x[:, 0, 0, 1] * x[:, 0, 3, 5])
    images = torch.rand(6, 1, 4, 7) + 0.1
    a, b = images[:, 0, 0, 1], images[:, 0, 3, 5]
    found = influence_by_distance(model, images, width=1)
    # gradients b and a, five pixels apart
    apart = (2 * a * b / (a + b) ** 2).mean()
    assert found.mean_distance == pytest.approx(5 * float(apart), rel=1e-12)
    share = torch.zeros(len(found.share))
    share[0], share[5] = 1 - apart, apart
    torch.testing.assert_close(found.share, share, atol=1e-15, rtol=0)
    # the scale of an image does not count
    assert influence_by_distance(model, 7 * images).mean_distance == pytest.approx(found.mean_distance, rel=1e-12)


def test_a_sum_of_all_pixels_is_uniform_and_no_interaction() -> None:
    model, images = Scores(lambda x: x.square().sum((1, 2, 3))), torch.ones(4, 1, 5, 8)
    found = influence_by_distance(model, images)
    places = list(itertools.product(range(5), range(8)))
    apart = [math.dist(u, v) for u in places for v in places]
    torch.testing.assert_close(found.strength, torch.ones_like(found.strength))
    assert found.mean_distance == pytest.approx(found.uniform_mean_distance, rel=1e-12)
    assert found.mean_distance == pytest.approx(sum(apart) / len(apart), rel=1e-12)
    assert math.isnan(interaction_profile(model, torch.rand(4, 1, 4, 8), patch=2).mean_distance)


def test_influence_ends_where_the_theoretical_field_of_resnet18_does() -> None:
    torch.set_default_dtype(torch.float32)
    model, images = torchvision.models.resnet18(), torch.rand(3, 3, 64, 64)
    for layer, side, stride in (("conv1", 7, 2), ("layer1", 43, 4)):
        found = influence_by_distance(model, images, layer=layer, width=1)
        # a corner of the field, from the middle of the cell
        reach = math.sqrt(2) * (side // 2 + (stride - 1) / 2)
        assert found.share[found.distance < reach + 1].sum().item() == pytest.approx(1, abs=1e-12)
        assert not found.share[found.distance > reach + 1].any()
        assert found.layer == layer
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    deep = influence_by_distance(model, images, layer="layer3")
    assert deep.mean_distance > found.mean_distance
    # the units of a map and how many images are evaluated at a time change nothing
    again = influence_by_distance(model, images, layer="layer3", evaluation=Evaluation(chunk=1))
    assert again.mean_distance == pytest.approx(deep.mean_distance, rel=1e-4)


def test_units_and_networks_without_influence() -> None:
    # only the first half of the map sees anything
    model = Scores(lambda x: x * (torch.arange(6) < 3))
    found = influence_by_distance(model, torch.rand(5, 1, 6, 6), units=36)
    assert (found.mean_distance, float(found.share[0])) == (0.0, 1.0)
    nothing = influence_by_distance(Scores(lambda x: 0 * x), torch.rand(5, 1, 6, 6))
    assert math.isnan(nothing.mean_distance)
    assert nothing.strength.isnan().all()


def small_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3).double()


LAYERS = {
    "encoder.layers.encoder_layer_0": lambda out: out[:, 1:].mean(1),
    "conv_proj": lambda out: out.mean((2, 3)),
    "encoder": lambda out: out[:, 1:].mean(1),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_the_outputs_of_a_layer_are_means_over_its_places(layer: str) -> None:
    model, images = small_vit().eval(), torch.randn(16, 3, 32, 32)
    # token 0 is the class token
    nn.init.normal_(model.class_token)
    features = create_feature_extractor(model, {layer: "out"})
    function = lambda x: LAYERS[layer](features(x)["out"])
    options = {"patch": 8, "samples": 5, "bootstraps": 0}
    own = interaction_profile(model, images, layer=layer, **options)
    torch.testing.assert_close(own.matrix, interaction_profile(function, images, **options).matrix)
    cut = cut_share(model, images, halves(32, 32), size=8, layer=layer)
    assert cut.share == pytest.approx(cut_share(function, images, halves(32, 32), size=8).share, rel=1e-9)
    if layer == "conv_proj":
        # patch by patch and linear
        assert not own.strength.any()
        assert cut.share == pytest.approx(0, abs=1e-20)


def test_patches_interact_as_far_as_units_of_the_layer_see() -> None:
    model = nn.Sequential(*itertools.chain(*((nn.Conv2d(1, 1, 3, padding=1), nn.GELU()) for _ in range(6))))
    model.append(nn.Sequential(nn.Flatten(), nn.Linear(24 * 24, 2)))
    images = torch.randn(8, 1, 24, 24)
    reached = {}
    for layer in (None, "1", "5", "11"):
        profile = interaction_profile(model, images, patch=4, layer=layer)
        reached[layer] = float(profile.distance[profile.strength > 0].max())
        if layer:
            side = int(effective_receptive_field(model, images, layer=layer).theoretical.any(0).sum())
            # the nearest pixels of patches d apart are d - 3 pixels apart
            assert reached[layer] == 4 * ((side - 2) // 4 + 1)
    # the head adds
    assert reached == {None: 12.0, "1": 4.0, "5": 8.0, "11": 12.0}


def test_refusals() -> None:
    model, images = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 1)), torch.rand(9, 1, 8, 8)
    for measure in (
        lambda m, layer: influence_by_distance(m, images, layer=layer),
        lambda m, layer: interaction_profile(m, images, layer=layer),
        lambda m, layer: cut_share(m, images, halves(8, 8), size=4, layer=layer),
    ):
        with pytest.raises(ValueError, match=r"layer must be a name in model.named_modules\(\), such as 0, 1, 2.*'7'"):
            measure(model, "7")
        with pytest.raises(
            ValueError, match=r"model must be a Module, got <function|layer='0' needs a model with named layers"
        ):
            measure(lambda x: x.mean((2, 3)), "0")
        with pytest.raises(ValueError, match=r"layer '0' must give a map .*got \(\d, 1, 8, 2, 4\)"):
            measure(nn.Sequential(nn.Unflatten(3, (2, 4)), nn.Flatten()), "0")
    with pytest.raises(ValueError, match="model cannot be differentiated by its images"):
        influence_by_distance(Scores(lambda x: (x > 0.5).double().sum((1, 2, 3))), images)
    for name, value in (("samples", 10), ("units", 0), ("width", 0), ("bootstraps", -1)):
        with pytest.raises(ValueError, match=rf"{name} must be .* got {value}"):
            influence_by_distance(model, images, **{name: value})


def test_figure_of_influence_interaction_and_task() -> None:
    model, images = nn.Sequential(nn.Conv2d(1, 2, 5), nn.Tanh(), nn.Flatten(), nn.Linear(32, 1)), torch.rand(9, 1, 8, 8)
    influence: InfluenceProfile = influence_by_distance(model, images)
    profile = interaction_profile(model, images, patch=2)
    figure = influence.plot_beside(profile, task_distance=6.5)
    left, right = figure.axes
    for axes, own in ((left, influence), (right, profile)):
        lines = [line for line in axes.lines if line.get_gid() == "profile"]
        assert np.array_equal(np.asarray(lines[0].get_xdata()), own.distance.numpy())
        assert np.array_equal(np.nan_to_num(lines[0].get_ydata()), own.strength.numpy())
        shown = {text.get_text(): line.get_xdata() for text, line in zip(*legend(axes), strict=True)}
        assert shown == {f"network: {own.mean_distance:.3g}": [own.mean_distance] * 2, "task: 6.5": [6.5] * 2}
    assert influence.plot().get_title() == "output"
    two = range_figure({"a": influence, "b": influence}, {"a": profile, "b": profile})
    assert [len(axes.get_legend().get_texts()) for axes in two.axes] == [2, 2]
    two.savefig("/dev/null", format="png")


def legend(axes: object) -> tuple[list, list]:
    found = axes.get_legend()  # type: ignore[attr-defined]
    handles, _ = axes.get_legend_handles_labels()  # type: ignore[attr-defined]
    return found.get_texts(), handles


def test_task_distances_of_pairs(tmp_path: Path) -> None:
    assert SameClass("digits", image_size=8, canvas=(8, 80), distance=64).task_distance == 72.0
    # halves of 16 columns
    assert DistantHalves("cifar10", root=tmp_path, distance=160).task_distance == 176.0
    assert PermutedImages("digits").task_distance is None
