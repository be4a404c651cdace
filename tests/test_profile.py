"""Interaction profiles against loops over the formulas and against networks whose interactions are known."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_locality.ranks import profile as profile_module
from lightning_locality.ranks.evaluation import Evaluation
from lightning_locality.ranks.patch_pairs import InteractionProfile, PairwiseInteractions, PatchGrid
from lightning_locality.ranks.profile import interaction_profile

Model = Callable[[Tensor], Tensor]
METHODS = ("linear", "exact")
COUPLING = {1: 1.0, 2: 0.3, 3: 0.1}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(network: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        fan = parameter[0].numel() if parameter.dim() > 1 else 4
        parameter.data = torch.randn(parameter.shape, generator=generator) * (2 / fan) ** 0.5
    return network


def boxes(height: int, width: int, patch: int) -> list[tuple[slice, slice]]:
    """The patches, row by row."""
    rows, columns = range(0, height, patch), range(0, width, patch)
    return [(slice(r, r + patch), slice(c, c + patch)) for r in rows for c in columns]


def distance(a: int, b: int, columns: int) -> int:
    return max(abs(a // columns - b // columns), abs(a % columns - b % columns))


def put(x: Tensor, donor: Tensor, where: list[tuple[slice, slice]]) -> Tensor:
    x = x.clone()
    for rows, columns in where:
        x[:, rows, columns] = donor[:, rows, columns]
    return x


def coupled(patch: int, side: int) -> Model:
    """f = sum J(d_AB) z_A z_B, z standard normal: the sum of a patch's pixels by its side."""
    patches = range(side * side)
    j = torch.tensor([[COUPLING.get(distance(a, b, side), 0.0) for a in patches] for b in patches])

    def function(x: Tensor) -> Tensor:
        z = F.avg_pool2d(x, patch).flatten(1) * patch
        return (z @ j.to(x) * z).sum(1) / 2

    return function


def by_distance(profile: InteractionProfile) -> dict[int, float]:
    """Mean over the pairs of Y, from the matrix."""
    found: dict[int, list[float]] = {}
    for a, b in itertools.combinations(range(len(profile.matrix)), 2):
        value = float(profile.matrix[a, b])
        if not math.isnan(value):
            found.setdefault(distance(a, b, profile.grid[1]), []).append(value)
    return {d: sum(values) / len(values) for d, values in sorted(found.items())}


# the patches


def test_default_patches_are_near_a_seventh_of_the_shorter_side() -> None:
    sides = {(8, 80): 4, (224, 224): 32, (32, 224): 16, (28, 28): 4, (32, 32): 4, (12, 12): 2, (8, 8): 1, (6, 4): 1}
    assert {shape: PatchGrid(*shape).patch for shape in sides} == sides
    with pytest.raises(ValueError, match=r"images of 31 x 31 pixels .* crop or"):
        PatchGrid(31, 31)
    with pytest.raises(ValueError, match=r"got 3; possible: 1, 2, 4, 8"):
        PatchGrid(8, 80, patch=3)
    with pytest.raises(ValueError, match=r"got 4; possible: 1, 2"):
        PatchGrid(4, 4, patch=4)


def test_patches_are_cut_as_loops_cut_them() -> None:
    grid, x = PatchGrid(6, 8, 2), normal(3, 2, 6, 8)
    where = boxes(6, 8, 2)
    assert len(grid) == len(where) == 12
    expected = torch.stack([torch.stack([image[:, r, c].sum() for r, c in where]) for image in x])
    assert torch.allclose(grid.sums(x), expected, rtol=0, atol=1e-13)
    labels = grid.labels()
    assert all((labels[r, c] == k).all() for k, (r, c) in enumerate(where))
    pairs = [(a, b) for a in range(12) for b in range(a + 1, 12)]
    assert grid.pairs().T.tolist() == [list(pair) for pair in pairs]
    assert grid.distances(grid.pairs()).tolist() == [distance(a, b, 4) for a, b in pairs]


# slow twins: of two images each is the other's donor


def slow_exact(model: Model, x: Tensor, patch: int) -> Tensor:
    where = boxes(*x.shape[-2:], patch)
    matrix = torch.zeros(len(where), len(where))
    f = lambda image: model(image[None]).reshape(-1)
    for image, donor in ((x[0], x[1]), (x[1], x[0])):
        for a, b in itertools.product(range(len(where)), repeat=2):
            with_a, with_b = put(image, donor, [where[a]]), put(image, donor, [where[b]])
            both = put(image, donor, [where[a], where[b]])
            if a == b:
                value = (f(image) - f(with_a)).square().mean() / 2
            else:
                value = (f(image) - f(with_a) - f(with_b) + f(both)).square().mean() / 4
            matrix[a, b] += value.detach() / 2
    return matrix


def slow_linear(model: Model, x: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """L of ordered pairs made symmetric, and 1 - |cos|, likewise."""
    where = boxes(*x.shape[-2:], patch)
    found, change = torch.zeros(2, len(where), len(where))

    def gradient(image: Tensor) -> Tensor:
        leaf = image.clone().requires_grad_()
        return torch.autograd.grad(model(leaf[None]).sum(), leaf)[0]

    for image, donor in ((x[0], x[1]), (x[1], x[0])):
        g = gradient(image)
        for a, b in itertools.permutations(range(len(where)), 2):
            rows, columns = where[a]
            after = gradient(put(image, donor, [where[b]]))
            u, v, step = (t[:, rows, columns].flatten() for t in (g, after, donor - image))
            found[a, b] += ((u - v) @ step) ** 2 / 4 / 2
            change[a, b] += (1 - F.cosine_similarity(u, v, dim=0).abs()) / 2
    return (found + found.T) / 2, (change + change.T) / 2


def off_diagonal(matrix: Tensor) -> Tensor:
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)]


def assert_consistent(profile: InteractionProfile) -> None:
    """All other numbers, by loops, from the matrix."""
    tau, columns = profile.matrix.diagonal(), profile.grid[1]
    strength: dict[int, list[float]] = {}
    for a, b in itertools.combinations(range(len(tau)), 2):
        value = float(profile.matrix[a, b] / (tau[a] * tau[b]).sqrt())
        strength.setdefault(distance(a, b, columns), []).append(value)
    assert profile.distance.tolist() == [d * profile.patch for d in sorted(strength)]
    assert profile.pairs.tolist() == [len(strength[d]) for d in sorted(strength)]
    means = torch.tensor([sum(strength[d]) / len(strength[d]) for d in sorted(strength)])
    assert torch.allclose(profile.strength, means, rtol=1e-12)
    mass = torch.tensor([by_distance(profile)[d] * len(strength[d]) for d in sorted(strength)])
    assert torch.allclose(profile.share, mass / mass.sum(), rtol=1e-12)
    assert torch.allclose(profile.cumulative, (mass / mass.sum()).cumsum(0), rtol=1e-12)
    assert torch.allclose(profile.uniform, profile.pairs.cumsum(0) / profile.pairs.sum(), rtol=1e-12)
    assert profile.mean_distance == pytest.approx(float(mass @ profile.distance / mass.sum()), rel=1e-12)
    number = profile.pairs.double()
    assert profile.uniform_mean_distance == pytest.approx(float(number @ profile.distance / number.sum()), rel=1e-12)
    for radius, share in ((profile.r50, 0.5), (profile.r90, 0.9)):
        d = profile.distance.tolist().index(radius)
        assert profile.cumulative[d] >= share
        assert d == 0 or profile.cumulative[d - 1] < share


@pytest.mark.parametrize("outputs", [1, 3])
def test_exact_method_equals_loops(outputs: int, device: torch.device) -> None:
    network = seeded(nn.Sequential(nn.Flatten(), nn.Linear(48, 20), nn.Tanh(), nn.Linear(20, outputs)))
    images = normal(2, 2, 4, 6)
    expected = slow_exact(network, images, 2)
    profile = interaction_profile(network.to(device), images.to(device), patch=2, method="exact", bootstraps=0)
    assert torch.allclose(profile.matrix, expected, rtol=0, atol=1e-12 * float(expected.max()))
    assert profile.grid == (2, 3)
    assert profile.gradient_change.isnan().all()
    assert profile.low.isnan().all()
    assert math.isnan(profile.mean_distance_low)
    assert_consistent(profile)


def test_linear_method_equals_loops(device: torch.device) -> None:
    network = seeded(nn.Sequential(nn.Flatten(), nn.Linear(48, 20), nn.Tanh(), nn.Linear(20, 1)))
    images = normal(2, 2, 4, 6)
    expected, change = slow_linear(network, images, 2)
    effect = slow_exact(network, images, 2).diagonal()
    profile = interaction_profile(network.to(device), images.to(device), patch=2, bootstraps=0)
    assert torch.allclose(off_diagonal(profile.matrix), off_diagonal(expected), rtol=1e-11, atol=1e-14)
    assert torch.allclose(profile.matrix.diagonal(), effect, rtol=1e-12)
    pairs = [(a, b) for a in range(6) for b in range(a + 1, 6)]
    means = [torch.stack([change[a, b] for a, b in pairs if distance(a, b, 3) == d]).mean() for d in (1, 2)]
    assert torch.allclose(profile.gradient_change, torch.stack(means), rtol=1e-11)
    assert_consistent(profile)


def test_methods_agree_sample_by_sample_where_the_network_is_affine_in_every_patch(device: torch.device) -> None:
    weights = normal(8, 9, 4).to(device)  # sum over r of products over patches: order 9, all interactions

    def function(x: Tensor) -> Tensor:
        pixels = F.unfold(x, 2, stride=2).transpose(1, 2)
        return (1 + 0.5 * torch.einsum("bap,rap->bra", pixels, weights.to(x))).prod(2).sum(1)

    images = normal(10, 1, 6, 6).to(device)
    linear, exact = (interaction_profile(function, images, patch=2, method=method) for method in METHODS)
    for name in ("matrix", "strength", "low", "high", "share"):
        ours, theirs = getattr(linear, name), getattr(exact, name)
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12 * float(theirs.max())), name
    assert (linear.mean_distance_low, linear.mean_distance_high) == pytest.approx(
        (exact.mean_distance_low, exact.mean_distance_high), rel=1e-10
    )


# networks whose interactions are known


@pytest.mark.parametrize(("method", "samples"), [("linear", 400), ("exact", 100)])
def test_couplings_are_found(method: str, samples: int, device: torch.device) -> None:
    images = normal(2 * samples, 1, 8, 8).to(device)
    profile = interaction_profile(coupled(2, 4), images, patch=2, samples=samples, method=method)  # type: ignore[arg-type]
    tau = torch.tensor([sum(COUPLING.get(distance(a, b, 4), 0) ** 2 for b in range(16)) for a in range(16)])
    error = (0.5 / samples) ** 0.5  # of the mean over pairs of (z - z')^2 (w - w')^2 / 4
    truth: dict[int, list[float]] = {}
    for a, b in itertools.combinations(range(16), 2):
        truth.setdefault(distance(a, b, 4), []).append(float(1 / (tau[a] * tau[b]).sqrt()))
    for d, value in by_distance(profile).items():
        assert value == pytest.approx(COUPLING[d] ** 2, rel=5 * error)
        strength = COUPLING[d] ** 2 * sum(truth[d]) / len(truth[d])
        assert float(profile.strength[d - 1]) == pytest.approx(strength, rel=5 * error)
        assert profile.low[d - 1] < profile.strength[d - 1] < profile.high[d - 1]
    mass = torch.tensor([len(truth[d]) * COUPLING[d] ** 2 for d in (1, 2, 3)])
    mean = 2 * float(mass @ torch.tensor([1.0, 2, 3]) / mass.sum())
    assert profile.mean_distance == pytest.approx(mean, rel=0.02)
    assert profile.mean_distance_low < profile.mean_distance < profile.mean_distance_high
    assert (profile.r50, profile.uniform_mean_distance) == (2, 3.8)


def test_change_of_gradients_is_blind_to_products() -> None:
    profile = interaction_profile(coupled(2, 4), normal(20, 1, 8, 8), patch=2, bootstraps=0)
    assert (profile.strength > 1e-3).all()
    assert (profile.gradient_change.abs() < 1e-12).all()


@pytest.mark.parametrize("method", METHODS)
def test_nothing_beyond_the_receptive_field(method: str, device: torch.device) -> None:
    convolutions = [module for _ in range(4) for module in (nn.Conv2d(1, 1, 3, padding=1), nn.GELU())]
    network = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for layer in network:
        if isinstance(layer, nn.Conv2d):
            layer.weight.data, layer.bias.data = normal(1, 1, 3, 3, seed=3).abs() / 2, torch.zeros(1)
    images = normal(6, 1, 20, 20).to(device)
    profile = interaction_profile(network.to(device), images, patch=4, method=method)  # type: ignore[arg-type]
    assert profile.distance.tolist() == [4, 8, 12, 16]
    means = by_distance(profile)
    assert max(means[3], means[4]) < 1e-20 * means[1]
    assert 1e-6 * means[1] < means[2] < means[1]
    assert profile.cumulative[1].item() == pytest.approx(1, abs=1e-12)
    assert profile.high[2:].max() < 1e-20


@pytest.mark.parametrize("method", METHODS)
def test_nothing_beyond_pooled_blocks(method: str) -> None:
    network = seeded(nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.AvgPool2d(8), nn.Conv2d(4, 4, 1), nn.Tanh()))
    network = nn.Sequential(network, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    profile = interaction_profile(network, normal(6, 2, 16, 16), patch=4, method=method)  # type: ignore[arg-type]
    means = by_distance(profile)
    assert means[1] > 0
    assert max(means[2], means[3]) < 1e-20 * means[1]
    # pairs at distance 1 in different blocks
    assert profile.matrix[1, 2] < 1e-20 * means[1]
    assert profile.matrix[0, 1] > 0
    assert (profile.mean_distance, profile.r90) == (4, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_additive_function_has_no_interaction(method: str, dtype: torch.dtype) -> None:
    network = seeded(nn.Sequential(nn.Conv2d(1, 5, 2, 2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())).to(dtype)
    profile = interaction_profile(network, 3 + normal(8, 1, 6, 6).to(dtype), patch=2, method=method)  # type: ignore[arg-type]
    for name in ("strength", "low", "high"):
        assert getattr(profile, name).tolist() == [0, 0]
    assert off_diagonal(profile.matrix).eq(0).all()
    assert profile.matrix.diagonal().gt(0).all()
    assert profile.share.isnan().all()
    assert profile.cumulative.isnan().all()
    for name in ("mean_distance", "mean_distance_low", "mean_distance_high", "r50", "r90"):
        assert math.isnan(getattr(profile, name))
    if method == "linear":
        assert (profile.gradient_change < 1e-6).all()


@pytest.mark.parametrize("method", METHODS)
def test_patches_without_effect_do_not_interact(method: str) -> None:
    function = lambda x: x[:, 0, 0, 0] * x[:, 0, 0, 1]
    profile = interaction_profile(function, normal(8, 1, 1, 3), patch=1, method=method, bootstraps=20)  # type: ignore[arg-type]
    tau = profile.matrix.diagonal()
    assert tau[2] == 0
    assert profile.strength[0].item() == pytest.approx(float(profile.matrix[0, 1] / (tau[0] * tau[1]).sqrt()) / 2)
    assert profile.strength[1] == profile.high[1] == 0
    if method == "linear":
        assert profile.gradient_change.tolist() == [0, 0]


def test_gradient_that_comes_to_nothing_has_changed() -> None:
    # at x_1 it is relu(x_0), which patch 0 of the other image switches; at x_0 it keeps its sign, or is 0 and stays so
    images = torch.tensor([[1.0, 1.0], [-1.0, 2.0]]).view(2, 1, 1, 2)
    profile = interaction_profile(lambda x: x[:, 0, 0, 0].relu() * x[:, 0, 0, 1], images, patch=1)
    assert profile.gradient_change.tolist() == [0.5]


def test_directions_of_several_outputs_estimate_their_mean(device: torch.device) -> None:
    scale = torch.tensor([1.0, 2.0, 0.5, 0.0])
    function = lambda x: (
        torch.stack([x[:, 0, 0, k] * x[:, 0, 0, k + 1] for k in range(4)], 1) * scale.to(x) + x[:, 0, 0, :1]
    )
    images = normal(3000, 1, 1, 5).to(device)
    linear, exact = (
        interaction_profile(function, images, patch=1, samples=1500, method=m, bootstraps=0) for m in METHODS
    )
    # (w . v)^2 of v in one of 4 directions has relative variance 1, (z - z')^2 (w - w')^2 / 4 itself 8: together 17
    for k in range(4):
        truth = scale[k] ** 2 / 4
        error = 4 * float(truth) * (17 / 1500) ** 0.5
        assert float(exact.matrix[k, k + 1]) == pytest.approx(float(truth), abs=error)
        assert float(linear.matrix[k, k + 1]) == pytest.approx(float(truth), abs=error)
        assert float(linear.matrix[k, k + 1]) == pytest.approx(
            float(exact.matrix[k, k + 1]), abs=4 * float(truth) * (9 / 1500) ** 0.5
        )
    assert torch.allclose(linear.matrix.diagonal(), exact.matrix.diagonal(), rtol=1e-12)


def trained(pairs: list[tuple[int, int]]) -> nn.Module:
    """Fitted to the sum of products of pairs of 16 pixels."""
    network = seeded(nn.Sequential(nn.Flatten(), nn.Linear(16, 96), nn.GELU(), nn.Linear(96, 1))).float()
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    generator = torch.Generator().manual_seed(1)
    for _ in range(1500):
        x = torch.randn(256, 1, 4, 4, generator=generator, dtype=torch.float32)
        y = sum(x.flatten(1)[:, a] * x.flatten(1)[:, b] for a, b in pairs)
        optimizer.zero_grad()
        F.mse_loss(network(x)[:, 0], y).backward()
        optimizer.step()
        schedule.step()
    return network


@pytest.mark.slow
def test_networks_trained_on_near_and_on_far_pairs() -> None:
    every = list(itertools.combinations(range(16), 2))
    found = {}
    for d in (1, 3):
        network = trained([pair for pair in every if distance(*pair, 4) == d][::3])
        linear, exact = (
            interaction_profile(network, normal(200, 1, 4, 4), patch=1, samples=60, method=method) for method in METHODS
        )
        found[d] = linear.mean_distance, exact.mean_distance
        off = torch.stack([off_diagonal(linear.matrix), off_diagonal(exact.matrix)])
        assert torch.corrcoef(off)[0, 1] > 0.9
        assert linear.uniform_mean_distance == pytest.approx(1.9)
    for near, far in zip(found[1], found[3], strict=True):
        assert near < 1.1
        assert far > 2.8


# bands


def test_bands_equal_resampling_by_loops() -> None:
    grid, samples, bootstraps = PatchGrid(2, 3, 1), 7, 40
    pairs = grid.pairs()
    interaction, effect = normal(samples, 15).square(), 1 + normal(samples, 6, seed=1).square()
    measured = PairwiseInteractions(grid, pairs, interaction, effect, None, torch.zeros(15), 0.0)
    found = measured.profile("exact", bootstraps, 5)
    drawn = torch.randint(samples, (bootstraps, samples), generator=torch.Generator().manual_seed(5))
    strengths, centres = [], []
    for rows in drawn:
        y, tau = interaction[rows].mean(0), effect[rows].mean(0)
        where = [distance(int(a), int(b), 3) for a, b in pairs.T]
        normalised = [float(y[k] / (tau[a] * tau[b]).sqrt()) for k, (a, b) in enumerate(pairs.T)]
        strengths.append([sum(i for i, w in zip(normalised, where, strict=True) if w == d) for d in (1, 2)])
        centres.append(float(y @ torch.tensor(where).double() / y.sum()))
    number = torch.tensor([11.0, 4.0])
    ends = torch.tensor([0.025, 0.975])
    low, high = (torch.tensor(strengths) / number).quantile(ends, 0)
    assert torch.allclose(found.low, low, rtol=1e-12)
    assert torch.allclose(found.high, high, rtol=1e-12)
    expected = torch.tensor(centres).quantile(ends).tolist()
    assert (found.mean_distance_low, found.mean_distance_high) == pytest.approx(expected, rel=1e-12)
    assert_consistent(found)


def test_bands_cover_the_truth() -> None:
    mass = {1: 20, 2: 16 * 0.09}  # pairs of a 3 x 3 grid times Y
    mean = (mass[1] + 2 * mass[2]) / (mass[1] + mass[2])
    inside = 0
    for seed in range(60):
        profile = interaction_profile(
            coupled(1, 3), normal(80, 1, 3, 3, seed=seed), patch=1, samples=40, bootstraps=200, seed=seed
        )
        inside += profile.mean_distance_low < mean < profile.mean_distance_high
    # 95 % of 60 is 57; bands from 40 samples are somewhat narrow
    assert inside >= 48


# how it is measured


def nonlinear() -> nn.Module:
    layers = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(108, 2)
    return seeded(nn.Sequential(*layers))


@pytest.mark.parametrize("method", METHODS)
def test_model_is_left_as_found(method: str) -> None:
    network = nonlinear().train()
    network[2].eval()
    network[0].bias.requires_grad_(False)
    network[0].weight.grad = torch.ones_like(network[0].weight)
    images = normal(6, 1, 6, 6)
    before, grad, state = copy.deepcopy(network.state_dict()), network[0].weight.grad, torch.get_rng_state()
    profile = interaction_profile(network, images, patch=2, method=method)  # type: ignore[arg-type]
    assert [m.training for m in network] == [True, True, False, True, True, True]
    assert not network[0].bias.requires_grad
    assert network[0].weight.requires_grad
    assert network[0].weight.grad is grad
    assert grad.eq(1).all()
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    evaluated = interaction_profile(network.eval(), images, patch=2, method=method)  # type: ignore[arg-type]
    assert torch.equal(profile.matrix, evaluated.matrix)


@pytest.mark.parametrize("method", METHODS)
def test_result_does_not_depend_on_chunks_and_groups(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, images = nonlinear(), normal(9, 1, 6, 6)
    measure = lambda chunk: interaction_profile(
        network,
        images,
        patch=2,
        samples=7,
        method=method,  # type: ignore[arg-type]
        evaluation=Evaluation(chunk=chunk),
    )
    reference = measure(None).to_dict()
    results = [measure(5)]
    monkeypatch.setattr(profile_module, "_KEPT", 1000)
    results.append(measure(64))
    for result in results:
        for name, value in result.to_dict().items():
            if name not in ("method", "gradient_change") or method == "linear":
                assert value == reference[name] or torch.allclose(
                    torch.tensor(value), torch.tensor(reference[name]), rtol=1e-11, atol=1e-13
                ), name


def test_seeds() -> None:
    network, images = nonlinear(), normal(30, 1, 6, 6)
    measure = lambda seed: interaction_profile(network, images, patch=2, samples=5, seed=seed).to_dict()
    first = measure(0)
    torch.manual_seed(123)
    assert measure(0) == first
    assert measure(1)["matrix"] != first["matrix"]
    by_default = interaction_profile(network, normal(70, 1, 6, 6))
    assert (by_default.samples, by_default.patch, by_default.method) == (64, 1, "linear")


@pytest.mark.parametrize(("number", "samples"), [(20, 8), (16, 8), (12, 8), (8, 8), (2, 2)])
def test_donors_are_other_images_and_no_samples_where_there_are_enough(number: int, samples: int) -> None:
    calls: list[list[list[float]]] = []

    def function(x: Tensor) -> Tensor:
        calls.append(x[:, 0, 0].tolist())
        return x.sum((1, 2, 3))

    # image b shows b in both patches; of a sample and its donor there are (s, s), (d, s), (s, d), (d, d)
    images = torch.arange(float(number)).view(-1, 1, 1, 1).expand(-1, 1, 1, 2)
    interaction_profile(function, images, patch=1, method="exact", samples=samples, evaluation=Evaluation(chunk=4))
    found = [rows for rows in calls if len(rows) == 4]
    assert all(rows == [[s, s], [d, s], [s, d], [d, d]] for rows in found for d, s in [rows[1]])
    donor = {rows[1][1]: rows[1][0] for rows in found}
    assert len(found) == len(donor) == len(set(donor.values())) == samples
    assert all(s != d for s, d in donor.items())
    if number >= 2 * samples:
        assert not set(donor) & set(donor.values())


def test_progress_counts_all_images() -> None:
    calls: list[tuple[int, int]] = []
    evaluation = Evaluation(chunk=10, progress=lambda done, count: calls.append((done, count)))
    interaction_profile(coupled(1, 3), normal(8, 1, 3, 3), patch=1, evaluation=evaluation)
    assert calls[-1] == (80, 80)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    calls.clear()
    interaction_profile(coupled(1, 3), normal(8, 1, 3, 3), patch=1, method="exact", evaluation=evaluation)
    assert calls[-1] == (8 * 46, 8 * 46)


def test_float64_on_request() -> None:
    network, images = nonlinear().float(), normal(6, 1, 6, 6).float()
    measure = lambda model, x, dtype: interaction_profile(model, x, patch=2, evaluation=Evaluation(dtype=dtype))
    found = measure(network, images, torch.float64)
    assert next(network.parameters()).dtype is torch.float32
    reference = measure(copy.deepcopy(network).double(), images.double(), None)
    assert torch.equal(found.matrix, reference.matrix)
    single = measure(network, images, None)
    assert not torch.equal(single.matrix, reference.matrix)
    assert torch.allclose(single.strength, reference.strength, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits_are_no_weights_without_interaction(dtype: torch.dtype) -> None:
    network, images = nonlinear().to(dtype), normal(6, 1, 6, 6).to(dtype)
    found = interaction_profile(network, images, patch=2)
    reference = interaction_profile(copy.deepcopy(network).double(), images.double(), patch=2)
    assert torch.allclose(found.strength, reference.strength, rtol=1e-3)
    assert found.mean_distance == pytest.approx(reference.mean_distance, rel=1e-3)
    assert network[0].weight.dtype is dtype


@pytest.mark.parametrize("method", METHODS)
def test_inside_inference_mode(method: str) -> None:
    network, images = nonlinear(), normal(6, 1, 6, 6)
    reference = interaction_profile(network, images, patch=2, method=method)  # type: ignore[arg-type]
    with torch.inference_mode():
        found = interaction_profile(network, images.clone(), patch=2, method=method)  # type: ignore[arg-type]
    assert found.to_dict() == reference.to_dict()


def test_network_made_in_inference_mode() -> None:
    with torch.inference_mode():
        network = nonlinear()
    images = normal(6, 1, 6, 6)
    found = interaction_profile(network, images, patch=2)
    assert found.to_dict() == interaction_profile(nonlinear(), images, patch=2).to_dict()
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert all(module.training for module in network)


def test_autocast_outside_changes_nothing() -> None:
    network, images = nonlinear().float(), normal(6, 1, 6, 6).float()
    reference = interaction_profile(network, images, patch=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert interaction_profile(network, images, patch=2).to_dict() == reference.to_dict()
        assert torch.is_autocast_enabled("cpu")


def test_some_pairs_stand_for_the_others() -> None:
    images = normal(100, 1, 8, 8)
    measure = lambda number: interaction_profile(
        coupled(2, 4), images, patch=2, samples=50, method="exact", pairs_per_distance=number
    )
    everything, some, all_of_them = measure(None), measure(12), measure(1000)
    # the order of the sums differs
    assert torch.allclose(all_of_them.matrix, everything.matrix, rtol=1e-12)
    assert all_of_them.mean_distance == pytest.approx(everything.mean_distance, rel=1e-12)
    upper = some.matrix[tuple(torch.triu_indices(16, 16, 1))]
    assert int((~upper.isnan()).sum()) == 36
    assert torch.equal(some.matrix.isnan(), some.matrix.T.isnan())
    assert some.pairs.tolist() == everything.pairs.tolist() == [42, 48, 30]
    means = torch.tensor(list(by_distance(some).values()))
    mass = means * some.pairs
    assert torch.allclose(some.share, mass / mass.sum(), rtol=1e-12)
    assert some.mean_distance == pytest.approx(everything.mean_distance, rel=0.05)


# what comes out, and what is refused


@pytest.mark.parametrize("function", [coupled(1, 4), lambda x: x.sum((1, 2, 3))])
def test_dictionary_is_json_and_comes_back(function: Model) -> None:
    for method in METHODS:
        profile = interaction_profile(function, normal(8, 1, 4, 4), patch=1, method=method)  # type: ignore[arg-type]
        text = json.dumps(profile.to_dict(), allow_nan=False)
        back = InteractionProfile.from_dict(json.loads(text))
        for name in profile.__dataclass_fields__:
            ours, theirs = getattr(profile, name), getattr(back, name)
            assert type(ours) is type(theirs), name
            if isinstance(ours, Tensor):
                assert ours.dtype is theirs.dtype
                assert torch.equal(ours.nan_to_num(-1), theirs.nan_to_num(-1)), name
            else:
                assert ours == theirs or (math.isnan(ours) and math.isnan(theirs)), name
    values = profile.to_dict()
    values["strange"] = values.pop("patch")
    with pytest.raises(ValueError, match=r"missing \['patch'\], unknown \['strange'\]"):
        InteractionProfile.from_dict(values)


def test_plot_draws_on_given_or_new_axes() -> None:
    from matplotlib.figure import Figure

    profile = interaction_profile(coupled(1, 4), normal(8, 1, 4, 4), patch=1)
    axes = profile.plot()
    assert any(torch.allclose(torch.tensor(line.get_ydata()), profile.strength) for line in axes.lines)
    given = Figure().subplots()
    assert profile.plot(given) is given
    assert given.lines


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return x.flatten(1).prod(1)


class OnWords(nn.Module):
    """The gradient stops at the image."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            weight = self.table.weight.detach().requires_grad_()
        return F.embedding(x.flatten(1).round().clamp(0, 3).long(), weight).prod(1)


@pytest.mark.parametrize("network", [Detached(), OnWords()])
def test_network_without_gradient_is_sent_to_the_exact_method(network: nn.Module) -> None:
    images = 1 + normal(6, 1, 2, 2).abs()
    with pytest.raises(ValueError, match=r"model cannot be differentiated by its images: give method='exact'"):
        interaction_profile(network, images, patch=1)
    assert interaction_profile(network, images, patch=1, method="exact").strength[0] > 0


def test_what_is_refused() -> None:
    images, function = normal(6, 1, 4, 4), coupled(1, 4)
    with pytest.raises(
        ValueError, match=r"samples must be 2 to the number of images, got 7 of 6: give more images or fewer"
    ):
        interaction_profile(function, images, samples=7)
    with pytest.raises(ValueError, match=r"got 1 of 6: each needs another as its donor"):
        interaction_profile(function, images, samples=1)
    with pytest.raises(ValueError, match=r"got 1 of 1: give more images"):
        interaction_profile(function, images[:1])
    with pytest.raises(ValueError, match=r"patch must divide images of 4 x 4"):
        interaction_profile(function, images, patch=3)
    with pytest.raises(ValueError, match=r"method must be 'linear' or 'exact', got 'hessian'"):
        interaction_profile(function, images, method="hessian")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"pairs_per_distance .* got 3 with method='linear'"):
        interaction_profile(function, images, pairs_per_distance=3)
    with pytest.raises(ValueError, match=r"pairs_per_distance must be 1 or more"):
        interaction_profile(function, images, method="exact", pairs_per_distance=0)
    with pytest.raises(ValueError, match="bootstraps must be 0 or more, got -1"):
        interaction_profile(function, images, bootstraps=-1)
    with pytest.raises(
        ValueError, match=r"images must be floating-point \(N, C, H, W\), got torch.int64 \(6, 1, 4, 4\)"
    ):
        interaction_profile(function, images.long())
    with pytest.raises(ValueError, match=r"images must be .* \(6, 4\)"):
        interaction_profile(function, images[:, 0, 0])
    with pytest.raises(ValueError, match="outputs in another batch"):
        interaction_profile(lambda x: (x - x.mean(0)).square().sum((1, 2, 3)), images, patch=1)
    with pytest.raises(ValueError, match="not finite"):
        interaction_profile(lambda x: (x - 10).sum((1, 2, 3)).log(), images, patch=1)
    with pytest.raises(ValueError, match=r"model must give real numbers .* wrap it"):
        interaction_profile(lambda x: x, images, patch=1)
