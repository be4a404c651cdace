from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_locality.networks import SmallResNet
from lightning_locality.ranks.cuts import (
    CutShare,
    _jackknife,
    _sample_images,
    cut_share,
    two_way_table,
    variance_components,
)
from lightning_locality.ranks.evaluation import Evaluation
from lightning_locality.ranks.masks import checkerboard, halves, quad_tree

LEFT = halves(4, 6)


class Products(nn.Module):
    """Sum of R products of random networks of two layers, one of the left and one of the right half, and more."""

    def __init__(self, products: int, background: bool = False, outputs: int = 1) -> None:
        super().__init__()
        self.outputs, self.background, self.products = outputs, background, products
        self.left, self.right = (
            nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, (products + 1) * outputs)) for _ in range(2)
        )
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.normal_(linear.weight, std=1.5 * linear.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = (
            net(half.flatten(1)).unflatten(1, (self.outputs, -1))
            for net, half in ((self.left, x[..., :3]), (self.right, x[..., 3:]))
        )
        product = (left * right)[..., : self.products].sum(-1)
        return product + (left + right)[..., -1] + 3 if self.background else product


class Fourier(nn.Module):
    """Cosines of the angles of the two columns: its singular values, main effects and share are known."""

    def __init__(
        self, values: tuple[float, ...] = (1.0, 0.7, 0.5, 0.3), inside: float = 0.8, outside: float = 0.4
    ) -> None:
        super().__init__()
        self.register_buffer("values", torch.tensor(values))
        self.inside, self.outside = inside, outside
        squares = torch.tensor(values).square()
        self.crossing = float(squares.sum())
        self.share = self.crossing / (self.crossing + inside**2 + outside**2)
        self.participation_ratio = float(squares.sum().square() / squares.square().sum())

    def forward(self, x: Tensor) -> Tensor:
        k = torch.arange(1, len(self.values) + 1, device=x.device)
        left, right = (2**0.5 * torch.cos(x[:, 0, 0, side, None] * k) for side in (0, 1))
        return (left * right) @ self.values + self.inside * left[:, 0] + self.outside * right[:, 1] - 5


def angles(number: int, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    return (2 * math.pi * torch.rand(number, 1, 1, 2, generator=torch.Generator().manual_seed(seed))).to(device)


SIDES = torch.tensor([[True, False]])


@pytest.mark.parametrize("products", [1, 3, 10])
def test_rank_of_a_sum_of_products(products: int, device: torch.device) -> None:
    images = torch.randn(128, 1, 4, 6, device=device)
    plain, background = (Products(products, b).to(device) for b in (False, True))
    background.load_state_dict(plain.state_dict())
    values = torch.linalg.svdvals(two_way_table(plain, images[:64], images[64:], LEFT)[..., 0])
    assert int((values > 1e-13 * values[0]).sum()) == products
    values = torch.linalg.svdvals(two_way_table(background, images[:64], images[64:], LEFT)[..., 0])
    assert int((values > 1e-13 * values[0]).sum()) == products + 2
    shares = [cut_share(model, images, LEFT) for model in (plain, background)]
    assert [share.rank for share in shares] == [products, products]
    # the background changes the share, not what crosses
    assert shares[0].crossing == pytest.approx(shares[1].crossing, rel=1e-12)
    assert float(shares[1]) < float(shares[0])
    assert shares[0].participation_ratio == pytest.approx(shares[1].participation_ratio, rel=1e-9)


@pytest.mark.parametrize("products", [1, 3, 10])
def test_rank_in_single_precision_by_the_noise_floor(products: int, device: torch.device) -> None:
    images = torch.randn(128, 1, 4, 6, device=device)
    model = Products(products, background=True).to(device)
    exact = cut_share(model, images, LEFT)
    rough = cut_share(model.float(), images, LEFT)
    assert rough.rank == products == exact.rank
    # the floor lies above the error and not far above it
    error = (
        torch.linalg.svdvals(
            (
                two_way_table(model, images[:64], images[64:], LEFT)
                - two_way_table(model, images[:64], images[64:], LEFT, evaluation=Evaluation(dtype=torch.float64))
            )[..., 0]
        )[0]
        / 64
    )
    assert error < rough.noise < 100 * error
    assert exact.noise < 1e-6 * rough.noise


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nothing_crosses_in_a_sum(dtype: torch.dtype, device: torch.device) -> None:
    found = cut_share(Products(0, background=True).to(device, dtype), torch.randn(80, 1, 4, 6, device=device), LEFT)
    assert abs(found.share) < (1e-20 if dtype == torch.float64 else 1e-10)
    assert found.standard_error < (1e-20 if dtype == torch.float64 else 1e-10)
    assert math.isnan(found.participation_ratio)
    assert found.rank == 0
    assert found.inside > 0.1
    assert found.to_dict()["participation_ratio"] is None


def pooled(pooling: type[nn.Module], features: Callable[[], list[nn.Module]]) -> nn.Module:
    """1x1 convolutions and a pooling over windows of 8 pixels."""
    return nn.Sequential(*features(), pooling(8), nn.Flatten(), nn.Linear(32, 5))


@pytest.mark.parametrize("pooling", [nn.AvgPool2d, nn.MaxPool2d])
def test_cuts_between_the_windows_of_a_pooling(pooling: type[nn.Module]) -> None:
    model = pooled(pooling, lambda: [nn.Conv2d(1, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Tanh()])
    images = torch.randn(40, 1, 16, 16)
    for mask in (*quad_tree(16, 16, 1).values(), halves(16, 16), checkerboard(16, 16, 8)):
        found = cut_share(model, images, mask, size=8)
        assert abs(found.share) < 1e-20
        assert math.isnan(found.participation_ratio)
    through = cut_share(model, images, checkerboard(16, 16, 4), size=8)
    # the mean of a window adds, its maximum does not
    assert abs(through.share) < 1e-20 if pooling is nn.AvgPool2d else through.share > 0.05


def test_estimates_are_unbiased(device: torch.device) -> None:
    model = Fourier().to(device)
    runs = [cut_share(model, angles(64, device, seed), SIDES, size=32, seed=seed) for seed in range(40)]
    for name, truth in (("crossing", model.crossing), ("inside", 0.64), ("outside", 0.16)):
        values = torch.tensor([getattr(run, name) for run in runs])
        assert abs(values.mean() - truth) < 4 * values.std() / 40**0.5, name
    pooled = cut_share(model, angles(64 * 40, device), SIDES, size=32, repetitions=40)
    spread = torch.tensor([run.participation_ratio for run in runs]).std() / 40**0.5
    assert abs(pooled.participation_ratio - model.participation_ratio) < 4 * spread
    assert abs(pooled.share - model.share) < 4 * pooled.standard_error
    # the spectrum is that of the operator, plus the bias of sampling
    assert pooled.spectrum[:4].tolist() == pytest.approx([1.0, 0.7, 0.5, 0.3], abs=0.08)
    assert pooled.rank == 4


@pytest.mark.parametrize(("size", "repetitions"), [(12, 1), (32, 1), (8, 2)])
def test_standard_error_covers_the_truth(size: int, repetitions: int) -> None:
    model = Fourier((1.0, 0.4), 1.2, 0.9)
    needed = 2 * size * repetitions
    runs = [cut_share(model, angles(needed, seed=s), SIDES, size=size, repetitions=repetitions) for s in range(200)]
    shares = torch.tensor([run.share for run in runs])
    errors = torch.tensor([run.standard_error for run in runs])
    # about right in the mean, and rather too large than too small
    assert 0.9 < errors.mean() / shares.std() < 1.6
    covered = ((shares - model.share).abs() < 2 * errors).double().mean()
    assert covered > 0.88


def test_jackknife_leaves_out_one_by_one() -> None:
    matrix = torch.randn(7, 5, 3) + torch.randn(7, 1, 3) + 2 * torch.randn(1, 5, 3) + 4
    variance = 0.0
    for axis in (0, 1):
        n = matrix.shape[axis]
        keep = [torch.arange(n) != k for k in range(n)]
        shares = [float(variance_components(matrix[k] if axis == 0 else matrix[:, k]).share) for k in keep]
        mean = sum(shares) / n
        variance += (n - 1) / n * sum((share - mean) ** 2 for share in shares)
    assert float(_jackknife(matrix)) == pytest.approx(variance, rel=1e-10)


def test_repetitions_draw_disjoint_images_where_there_are_enough() -> None:
    model = Fourier()
    enough = cut_share(model, angles(96), SIDES, size=8, repetitions=6)
    reused = cut_share(model, angles(32), SIDES, size=8, repetitions=6)
    assert enough.repetitions == reused.repetitions == 6
    # two sets of own images, however often they are shuffled
    for available, disjoint in ((96, 6), (32, 2)):
        chosen, own = _sample_images(available, 16, 6, 0)
        assert chosen.shape == (96,)
        assert own == disjoint
        assert all(len(set(part.tolist())) == 16 for part in chosen.split(16))
    assert reused.standard_error > enough.standard_error
    assert cut_share(model, angles(96), SIDES, size=8, seed=1) == cut_share(model, angles(96), SIDES, size=8, seed=1)
    assert (
        cut_share(model, angles(96), SIDES, size=8, seed=1).share != cut_share(model, angles(96), SIDES, size=8).share
    )


def test_several_outputs_are_summed(device: torch.device) -> None:
    images = torch.randn(40, 1, 4, 6, device=device)
    model = Products(2, background=True, outputs=3).to(device)

    class One(nn.Module):
        def __init__(self, k: int) -> None:
            super().__init__()
            self.k, self.model = k, model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)[:, self.k]

    together = cut_share(model, images, LEFT, size=20)
    parts = [cut_share(One(k), images, LEFT, size=20) for k in range(3)]
    for name in ("crossing", "inside", "outside"):
        assert getattr(together, name) == pytest.approx(sum(getattr(part, name) for part in parts), rel=1e-10)
    assert together.rank == 6
    assert two_way_table(One(1), images[:3], images[3:7], LEFT).shape == (3, 4, 1)
    assert torch.equal(
        two_way_table(model, images[:3], images[3:7], LEFT)[..., [1]],
        two_way_table(One(1), images[:3], images[3:7], LEFT),
    )


@pytest.mark.parametrize("chunk", [1, 5, 33, None])
def test_two_way_table_entry_by_entry(chunk: int | None, device: torch.device) -> None:
    model = SmallResNet(in_channels=2, outputs=3, widths=(4, 6), strides=(1, 2)).to(device)
    images = torch.randn(11, 2, 6, 6, device=device)
    mask = torch.rand(6, 6, device=device) < 0.3
    found = two_way_table(model, images[:5], images[5:], mask.cpu(), evaluation=Evaluation(chunk))
    model.eval()
    for i in range(5):
        for j in range(6):
            expected = model(torch.where(mask, images[i], images[5 + j])[None])[0]
            assert torch.allclose(found[i, j], expected, rtol=1e-12, atol=1e-12)


class Vision(nn.Module):
    """A transformer over patches, with a class token and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Conv2d(1, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.position = nn.Parameter(torch.randn(1, 5, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.3, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.cut(x).flatten(2).mT
        tokens = torch.cat([self.token.expand(len(x), 1, 16), patches], 1) + self.position
        return self.head(self.body(tokens)[:, 0])


@pytest.mark.parametrize("build", [Vision, lambda: SmallResNet(outputs=3, widths=(4, 6), strides=(1, 2))])
@pytest.mark.parametrize("training", [True, False])
def test_networks_are_left_as_they_were(build: Callable[[], nn.Module], training: bool) -> None:
    model, images = build(), torch.randn(24, 1, 8, 8)
    model.train()(images).sum().backward()
    model.train(training)
    before = [t.clone() for t in (*model.state_dict().values(), *(p.grad for p in model.parameters()))]
    state = torch.get_rng_state()
    # an odd size of squares, finer than the transformer's patches
    found = cut_share(model, images, checkerboard(8, 8, 3), evaluation=Evaluation(dtype=torch.float32))
    assert torch.equal(state, torch.get_rng_state())
    assert 0.001 < found.share < 1
    assert found.participation_ratio > 1
    after = [*model.state_dict().values(), *(p.grad for p in model.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(module.training == training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    with torch.inference_mode():
        again = cut_share(model, images, checkerboard(8, 8, 3), evaluation=Evaluation(7, dtype=torch.float32))
    assert again.share == pytest.approx(found.share, rel=1e-4)
    model.train()(images).sum().backward()


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) * 0).sum(1) + 1 / 3


class Rounded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 1 / 3 + 1e-18 * x.flatten(1).sum(1).tanh() + 1e-16 * (x[:, 0, 0, 0] > 0)


@pytest.mark.parametrize("model", [Constant(), Rounded()])
def test_outputs_that_do_not_vary(model: nn.Module) -> None:
    found = cut_share(model, torch.randn(40, 1, 4, 6), LEFT)
    assert (found.share, found.standard_error, found.rank) == (0.0, 0.0, 0)
    assert math.isnan(found.participation_ratio)


def test_result_is_a_number_and_plain_data() -> None:
    found = cut_share(Fourier(), angles(40), SIDES)
    assert isinstance(found, CutShare)
    assert float(found) == found.share
    assert found.size == 20
    back = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert back == found.to_dict()
    assert back["rank"] == 4
    assert len(back["spectrum"]) == 20


class Statistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).flatten(1)


class Sampled(nn.Module):
    """Draws, also in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) + 1e-6 * torch.rand_like(x.flatten(1))


class Asserting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == 8, "Wrong image width!"
        return x.flatten(1)


IMAGES = torch.randn(20, 1, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
FLAT = nn.Flatten()


@pytest.mark.parametrize(
    ("model", "images", "settings", "message"),
    [
        (FLAT, IMAGES, {"size": 11}, "got size=11 and 20 images: give more images or a smaller size"),
        (FLAT, IMAGES, {"size": 3}, "size must be 4 or more"),
        (FLAT, IMAGES[:5], {}, "got size=2 and 5 images"),
        (FLAT, IMAGES, {"repetitions": 0}, "repetitions must be 1 to 100,000, got 0"),
        (FLAT, IMAGES.flatten(1), {}, r"images must be \(B, C, H, W\)"),
        (FLAT, IMAGES[..., :5], {}, "mask must have the images' height and width"),
        (FLAT, IMAGES.int(), {}, "images must be floating, got torch.int32"),
        (nn.Identity(), IMAGES, {}, "model must give real numbers"),
        (nn.Conv2d(3, 1, 1).double(), IMAGES, {}, r"images of shape \(1, 1, 4, 6\) in torch.float64"),
        (nn.Flatten(0), IMAGES, {}, "model must give one row of outputs per image, got 24 for 1 image and 48 for 2"),
        (Asserting(), IMAGES, {}, "model does not take images of shape .* Wrong image width!"),
        (Statistics(), IMAGES, {}, "batch normalisation without running statistics"),
        (Sampled(), IMAGES, {}, "different outputs every time, as dropout does"),
        (lambda x: nn.functional.dropout(x.flatten(1)), IMAGES, {}, r"every time.*in evaluation mode with \.eval\(\)"),
        (nn.Sequential(nn.Flatten(), nn.Threshold(0, math.nan)), IMAGES, {}, "results that are not finite"),
    ],
)  # fmt: skip
def test_wrong_input(model: nn.Module, images: Tensor, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cut_share(model, images, LEFT, **settings)


def test_tables_of_images_of_different_sizes() -> None:
    with pytest.raises(ValueError, match=r"images of one size|\(B, C, H, W\) of one size"):
        two_way_table(FLAT, IMAGES, IMAGES[..., :5], LEFT)


def test_a_method_is_measured_as_its_module(device: torch.device) -> None:
    images = torch.randn(24, 1, 8, 8)
    model = nn.Sequential(SmallResNet(outputs=3, widths=(4, 6), strides=(1, 2)), nn.Dropout()).to(device).float()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for dtype in (None, torch.float64):
        method, whole = (
            cut_share(one, images, halves(8, 8), evaluation=Evaluation(dtype=dtype)) for one in (model.forward, model)
        )
        assert method == whole
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Stepping(nn.Module):
    """Adds what its pixels say, which a unit in the last place does not change; 400 outputs, all the same."""

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.linspace(0.1, 0.9, 24).to(x)
        return ((x > 0).to(x).flatten(1) @ weight)[:, None].expand(-1, 400)


def test_rounding_of_the_outputs_is_noise_where_that_of_the_images_changes_nothing() -> None:
    found = cut_share(Stepping(), IMAGES.float(), LEFT)
    assert found.rank == 0
    assert math.isnan(found.participation_ratio)
    assert abs(found.share) < 1e-10


class Greedy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes")


def test_memory_that_runs_out_is_no_wrong_input() -> None:
    with pytest.raises(MemoryError, match="one row takes more memory on cpu than there is"):
        cut_share(Greedy(), IMAGES, LEFT)


def test_networks_in_any_function_are_left_as_they_were() -> None:
    class Counting(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm2d(1), nn.Linear(16, 1)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            out: Tensor = self.head(self.norm(x).tanh().flatten(1))
            return out

    def disturb(norm: nn.BatchNorm2d, *_: Any) -> None:
        assert norm.running_mean is not None
        norm.running_mean += 1

    model, images = Counting(), torch.randn(16, 1, 4, 4)
    model(images)
    model.eval()
    model.norm.register_forward_hook(disturb)
    before = [buffer.clone() for buffer in model.buffers()]
    for given in (model, model.forward, lambda x: model(x), lambda x: model(x)[:, 0]):
        with pytest.raises(ValueError, match="different outputs every time"):
            cut_share(given, images, halves(4, 4))
        assert all(torch.equal(mine, other) for mine, other in zip(model.buffers(), before, strict=True))
