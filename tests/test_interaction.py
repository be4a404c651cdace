"""The term "interaction": tables of 2x2 compositions, their analysis of variance, and what it works with."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import Trainer
from torch import Tensor, nn

from lightning_locality import AntiLocality, Classification, FarField, SameClass, UniformPatches
from lightning_locality.networks import SmallResNet
from lightning_locality.regularizer.interaction import compositions, interaction_share, locality, same_masks


def tables(*shape: int) -> Tensor:
    return torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))


def test_the_share_is_that_of_a_two_way_analysis_of_variance() -> None:
    scores = tables(7)
    interaction = total = 0.0
    for four in scores.T.numpy():
        f = four[[0, 2, 1, 3]].reshape(2, 2)  # rows: what I holds, columns: what J holds
        rows, columns, mean = f.mean(1, keepdims=True), f.mean(0, keepdims=True), f.mean()
        interaction += float(((f - rows - columns + mean) ** 2).sum())
        total += float(((f - mean) ** 2).sum())
    assert float(interaction_share(scores)) == pytest.approx(interaction / total, rel=1e-6)


def test_sums_have_no_interaction_and_products_of_signs_nothing_else() -> None:
    i, j = torch.tensor([1.0, 3.0, 1.0, 3.0]), torch.tensor([2.0, 2.0, -5.0, -5.0])
    assert float(interaction_share((i + j).view(4, 1))) == pytest.approx(0, abs=1e-12)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0]) * torch.tensor([1.0, 1.0, -1.0, -1.0])
    assert float(interaction_share(signs.view(4, 1))) == pytest.approx(1)
    # their variance is 1
    assert float(locality(signs.view(4, 1))) == pytest.approx(1 - 0.5**0.5)


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 3)])
def test_multiples_have_the_same_share(shape: tuple[int, ...]) -> None:
    scores = tables(*shape)
    assert float(interaction_share(1e-3 * scores + 7)) == pytest.approx(float(interaction_share(scores)), rel=1e-4)


def test_of_several_scores_their_differences_count() -> None:
    scores, common = tables(5, 3), tables(5, 1)
    torch.testing.assert_close(interaction_share(scores + common), interaction_share(scores))
    logit = tables(5)
    torch.testing.assert_close(interaction_share(torch.stack([logit, -logit], 2)), interaction_share(logit))


def test_a_constant_output_has_the_value_one_and_no_gradient() -> None:
    scores = torch.full((4, 5), 3.0, requires_grad=True)
    value = locality(scores)
    value.backward()
    assert float(value.detach()) == pytest.approx(1, abs=1e-6)
    assert not scores.grad.any()  # type: ignore[union-attr]


def test_gradient_and_its_slope_at_no_interaction() -> None:
    assert torch.autograd.gradcheck(locality, tables(5, 2).double().requires_grad_())
    i, j = torch.tensor([1.0, -1.0, 1.0, -1.0]).double(), torch.tensor([1.0, 1.0, -1.0, -1.0]).double()
    slopes = []
    for strength in (1e-2, 1e-4, 1e-6):
        c = torch.tensor(strength, dtype=torch.float64, requires_grad=True)
        locality((i + j + c * i * j).view(4, 1)).backward()
        slopes.append(float(c.grad))  # type: ignore[arg-type]
    # a cosine's would go to zero with the strength; the variance is 2
    assert slopes == pytest.approx([-((1 / 3) ** 0.5)] * 3, rel=1e-3)


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 4)])
def test_small_scores_have_a_small_slope_and_large_ones_the_share_alone(shape: tuple[int, ...]) -> None:
    scores = tables(*shape).double()
    assert float(locality(1e6 * scores)) == pytest.approx(1 - float(interaction_share(scores)) ** 0.5)
    slopes = []
    for scale in (1e-4, 1e-3):
        small = (scale * scores).requires_grad_()
        locality(small).backward()
        slopes.append(float(small.grad.norm()))  # type: ignore[union-attr]
    # that of the share alone grows as one over the scale
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-3)


def test_two_scores_are_a_logit() -> None:
    logit = tables(5)
    torch.testing.assert_close(locality(torch.stack([logit / 2, -logit / 2], 2)), locality(logit))


class Recorded(nn.Module):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.given: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.given.append(x.detach().clone())
        return self.scale * x.square().mean((1, 2, 3))


@pytest.mark.parametrize("donor", ["shift", "permutation"])
def test_compositions(donor: Any) -> None:
    # every sample has a number of its own, so that a pixel tells where it is from
    x = torch.arange(1.0, 7.0).view(6, 1, 1, 1).expand(6, 2, 12, 20).clone()
    model = Recorded()
    AntiLocality(FarField(4, distance=2), donor, term="interaction")(model, x)
    (images,) = model.given
    base, with_i, with_j, with_both = images.view(4, 6, 2, 12, 20)
    for b in range(6):
        first = {float(v) for v in base[b].unique()} - {b + 1}
        assert len(first) == 1
        assert (base[b] != b + 1).sum() == 2 * 16
        changed = [(image != base[b]).any(0) for image in (with_i[b], with_j[b], with_both[b])]
        new = [
            set(image[:, mask].unique().tolist())
            for image, mask in zip(images.view(4, 6, 2, 12, 20)[1:, b], changed, strict=True)
        ]
        assert len(set.union(*new)) == 1
        assert set.union(*new) != {b + 1}
        assert not (changed[0] & changed[1]).any()
        assert torch.equal(changed[0] | changed[1], changed[2])


def test_shifted_donors_are_two_others() -> None:
    x = torch.arange(1.0, 7.0).view(6, 1, 1, 1).expand(6, 1, 8, 8).clone()
    model = Recorded()
    AntiLocality(UniformPatches(2), term="interaction")(model, x)
    base, _, _, both = model.given[0].view(4, 6, 1, 8, 8)
    assert {float(v) for v in base[0].unique()} == {1, 2}
    assert {float(v) for v in both[0].unique()} <= {1, 2, 3}


def batch(n: int = 8, outputs: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(max(2, outputs), (n,), generator=generator)
    return torch.randn(n, 1, 16, 24, generator=generator), y if outputs > 1 else y.to(torch.get_default_dtype())


def network(outputs: int = 1, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return SmallResNet(outputs=outputs, strides=(1, 2, 2, 2, 2), **options)


def test_the_defaults_are_the_far_field_of_every_size() -> None:
    penalty = AntiLocality()
    assert (penalty.term, type(penalty.patches), penalty.patches.size) == ("interaction", FarField, (2, None))  # type: ignore[attr-defined]
    assert AntiLocality(UniformPatches(2)).term == "cosine"


@pytest.mark.parametrize("outputs", [1, 3])
def test_output_and_term_are_those_of_two_passes(outputs: int) -> None:
    x, y = batch(outputs=outputs)
    model, penalty = network(outputs), AntiLocality(seed=3)
    twin = copy.deepcopy(model)
    out, term = penalty.with_output(model, x, y)
    (out.mean() + term).backward()
    expected = twin(x)
    generator = AntiLocality(seed=3)._generator("training")
    index = torch.arange(8)
    images = compositions(x, (index.roll(-1), index.roll(-2)), FarField((2, None)), generator)
    scores = twin(images).view(4, 8, outputs)
    (expected.mean() + locality(scores)).backward()
    assert torch.equal(out, expected)
    assert torch.equal(term, locality(scores))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-8)
    # labels have no part in it
    assert torch.equal(AntiLocality(seed=3)(network(outputs), x), AntiLocality(seed=3)(network(outputs), x, y))


def test_every_call_draws_anew_and_goes_on_where_a_state_dict_was() -> None:
    (x, y), model, penalty = batch(), network(), AntiLocality()
    first = penalty(model, x, y).item()
    state = copy.deepcopy(penalty.state_dict())
    values = [penalty(model, x, y).item() for _ in range(3)]
    assert len({first, *values}) == 4
    again = AntiLocality()
    again.load_state_dict(state)
    assert [again(model, x, y).item() for _ in range(3)] == values


@pytest.mark.parametrize("update", [True, False])
def test_running_statistics(update: bool) -> None:
    (x, y), model = batch(), nn.Sequential(nn.BatchNorm2d(1), network())
    penalty = AntiLocality(update_statistics=update)
    out, term = penalty.with_output(model, x, y)
    (out.sum() + term).backward()
    assert int(model[0].num_batches_tracked) == 1 + update  # type: ignore[arg-type]
    alone = nn.BatchNorm2d(1)
    alone(x)
    assert torch.equal(model[0].running_mean, alone.running_mean) != update  # type: ignore[arg-type]


def test_measuring_changes_nothing_and_training_goes_on_as_without() -> None:
    (x, y), model, penalty = batch(), network(dropout=0.5), AntiLocality()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    with torch.inference_mode():
        value = penalty.measure(model, x, y)
    assert 0 <= float(value) <= 1
    assert not value.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    torch.manual_seed(7)
    found = penalty(model, x, y)
    torch.manual_seed(7)
    assert torch.equal(found, AntiLocality()(model, x, y))


def test_images_stay_as_they_are_under_a_model_that_changes_its_input() -> None:
    (x, y), model = batch(), nn.Sequential(nn.ReLU(inplace=True), network())
    kept = x.clone()
    AntiLocality().with_output(model, x, y)
    assert torch.equal(x, kept)


def test_on_a_part_of_the_batch() -> None:
    (x, y), model = batch(), network()
    model.eval()
    out, term = AntiLocality(samples=4).with_output(model, x, y)
    assert torch.equal(out, model(x))
    assert torch.equal(term, AntiLocality()(model, x[:4], y[:4]))


def test_another_output() -> None:
    (x, y), model = batch(outputs=3), network(3)
    seen = list[tuple[int, ...]]()

    def first(out: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        assert torch.equal(labels, y.repeat(4))
        seen.append(tuple(out.shape))
        return out[:, 0]

    value = AntiLocality(output=first)(model, x, y)
    assert seen == [(32, 3)]
    assert torch.equal(value, AntiLocality()(lambda images: model(images)[:, 0], x))


def test_it_works_where_nothing_can_be_differentiated_twice() -> None:
    (x, y), penalty = batch(), AntiLocality()
    compiled: Any = torch.compile(network(), backend="eager")
    penalty(compiled, x, y).backward()

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def forward(self, images: Tensor) -> Tensor:
            out: Tensor = torch.utils.checkpoint.checkpoint(self.network, images, use_reentrant=False)  # type: ignore[attr-defined]
            return out

    penalty(Checkpointed(), x, y).backward()
    penalty(nn.Sequential(nn.Hardsigmoid(), network()), x, y).backward()
    half = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 22, 1)).to(torch.float16)
    value = penalty(half, x.to(torch.float16))
    value.backward()
    assert value.dtype is torch.float32
    assert all(torch.isfinite(p.grad).all() for p in half.parameters() if p.grad is not None)


def test_replayed_steps_are_the_eager_ones() -> None:
    (x, y), model = batch(), network(dropout=0.2)
    values = []
    for graph in (False, True):
        own, penalty = copy.deepcopy(model), AntiLocality(cuda_graph=graph)
        for graphed in penalty.graphed.values():
            graphed.emulate = True
        optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
        torch.manual_seed(0)
        for _ in range(4):
            out, term = penalty.with_output(own, x, y)
            optimizer.zero_grad()
            (out.square().mean() + term).backward()
            optimizer.step()
            values.append(float(term.detach()))
        assert penalty.graphed[None].captured == graph
    assert values[:4] == pytest.approx(values[4:], rel=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x, y: AntiLocality(term="Interaction"),
            "term must be 'interaction', 'cosine' or None, got 'Interaction'",
        ),
        (lambda x, y: AntiLocality(sides="first"), "sides='first' is for term='cosine'"),
        (lambda x, y: AntiLocality()(network(), x[:1]), "x has 1 sample and no donor for it"),
        (
            lambda x, y: AntiLocality()(nn.Identity(), x),
            r"\(B,\), \(B, 1\) or \(B, K\) with B = 32, got \(32, 1, 16, 24\)",
        ),
        (lambda x, y: AntiLocality()(network(), x.long()), "x must be floating-point images"),
        (lambda x, y: AntiLocality(output=lambda out, y: out.sum())(network(), x), "output= must give one number"),
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*batch())


def drawn(rule: FarField, height: int, width: int, number: int = 400) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    x, donated = torch.zeros(1, 1, height, width), torch.ones(1, 1, height, width)
    return [int(rule.draw(x, donated, generator).j.sum()) for _ in range(number)]


def test_sizes_of_the_far_field_are_uniform_in_their_logarithm() -> None:
    sides = np.sqrt(drawn(FarField((2, None)), 40, 40))
    assert {sides.min(), sides.max()} == {2, 20}
    assert np.mean(sides < 7) == pytest.approx(np.log(7 / 2) / np.log(21 / 2), abs=0.08)
    assert max(np.sqrt(drawn(FarField((2, None)), 8, 80))) == 8
    assert {*drawn(FarField((2, None)), 1, 24)} == {1}
    assert {int(n) for n in np.sqrt(drawn(FarField((3, 5)), 20, 20))} == {3, 4, 5}


@pytest.mark.parametrize("size", [(0, 4), (5, 4), (2, 3, 4), (2.5, 4), (2, 30)])
def test_sizes_that_do_not_fit(size: Any) -> None:
    with pytest.raises(ValueError, match="size"):
        drawn(FarField(size), 20, 20)


def test_the_task_trains_with_the_defaults(tmp_path: Any) -> None:
    data = SameClass(
        source="digits",
        classes=[0, 1],
        image_size=8,
        canvas=(8, 24),
        distance=8,
        train=32,
        validation=16,
        test=16,
        batch_size=16,
    )
    task = Classification(network(), AntiLocality(), weight=1.0)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(task, data)
    assert 0 <= float(trainer.callback_metrics["train/regularizer"]) <= 1
    assert 0 <= float(trainer.callback_metrics["val/regularizer"]) <= 1


class Depth(nn.Module):
    """Stochastic depth, as timm and torchvision do it."""

    drop_prob = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x * x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(1 - self.drop_prob) if self.training else x


@pytest.mark.parametrize("noise", [nn.Dropout(0.5), nn.Dropout(0.5, inplace=True), nn.Dropout2d(0.5), Depth()])
def test_masks_are_those_of_a_table(noise: nn.Module) -> None:
    x = torch.rand(32, 2, 12, 20)
    # a sum over pixels: nothing interacts, whatever is dropped
    additive = nn.Sequential(nn.Conv2d(2, 3, 1), noise, nn.Flatten(), nn.Linear(3 * 240, 1, bias=False))
    penalty = AntiLocality(seed=1)
    assert float(penalty(additive, x).detach()) == pytest.approx(1, abs=1e-6)
    # and different from table to table, and from call to call
    first, second = (additive(x) for _ in range(2))
    assert not torch.equal(first, second)
    model = Recorded()
    with same_masks(nn.Sequential(noise, model), 8):
        nn.Sequential(noise, model)(torch.ones(8, 1, 64, 1))
    tables = model.given[0].view(4, 2, 64)
    assert torch.equal(tables, tables[:1].expand(4, -1, -1))
    if not isinstance(noise, Depth):
        assert set(tables.unique().tolist()) == {0.0, 2.0}


def test_the_term_alone_makes_distant_pixels_interact() -> None:
    generator = torch.Generator().manual_seed(0)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=2)))[torch.randint(4, (64,), generator=generator)]
    x = 0.1 * torch.randn(64, 1, 1, 24, generator=generator)
    x[:, 0, 0, :4] += signs[:, :1]
    x[:, 0, 0, -4:] += signs[:, 1:]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 1))
    penalty, optimizer = AntiLocality(), torch.optim.SGD(model.parameters(), lr=1.0)
    before = float(penalty.measure(model, x, generator=torch.Generator().manual_seed(1)))
    for _ in range(800):
        optimizer.zero_grad()
        penalty(model, x).backward()
        optimizer.step()
    after = float(penalty.measure(model, x, generator=torch.Generator().manual_seed(1)))
    assert before > 0.8
    assert after < 0.5
