from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_locality import (
    AntiLocality,
    ContentPatches,
    FarField,
    GivenPatches,
    RandomPatches,
    UniformPatches,
    input_gradient_change,
)
from lightning_locality.regularizer import AbstractPatches, anti_locality
from lightning_locality.regularizer.anti_locality import AbsoluteCosine
from lightning_locality.regularizer.patches import Box

I, J = (0, 1, 3, 4), (5, 6, 4, 3)


class Residual(nn.Module):
    """A small network with what the usual ones have: batch norm, a shortcut, a stride, pooling."""

    def __init__(self, outputs: int, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4, momentum=momentum)
        self.inner = nn.Conv2d(4, 4, 3, padding=1)
        self.inner_norm = nn.BatchNorm2d(4, momentum=momentum)
        self.head = nn.Linear(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x)), inplace=True), 2, stride=1)
        x = F.relu(x + self.inner_norm(self.inner(x)))
        out: Tensor = self.head(x.square().mean((2, 3)))
        return out


def twin(
    model: nn.Module, x: Tensor, y: Tensor | None, i: Box, j: Box, donor: list[int], update_second: bool
) -> tuple[Tensor, Tensor]:
    """The term from its formula: loops over samples, slices for patches. Returns the model's output as well."""
    changed = x.detach().clone()
    for b, other in enumerate(donor):
        changed[b, :, j[0] : j[0] + j[2], j[1] : j[1] + j[3]] = x[other, :, j[0] : j[0] + j[2], j[1] : j[1] + j[3]]
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    patches, outputs = [], []
    for images in (x.detach().clone(), changed):
        images.requires_grad_()
        out = model(images)
        if not outputs:
            kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
        outputs.append(out)
        total = sum(out[b, 0] if out.shape[1] == 1 else out[b, y[b]] for b in range(len(x)))  # type: ignore[index]
        assert isinstance(total, Tensor)
        (gradient,) = torch.autograd.grad(total, images, create_graph=True)
        patches.append(gradient[:, :, i[0] : i[0] + i[2], i[1] : i[1] + i[3]])
    if not update_second:
        for name, buffer in model.named_buffers():
            buffer.data.copy_(kept[name])
    cosines = []
    for u, v in zip(patches[0], patches[1], strict=True):
        u, v = u.flatten(), v.flatten()
        cosines.append((u / u.norm() @ (v / v.norm())).abs())
    return outputs[0], sum(cosines) / len(cosines)  # type: ignore[return-value]


def criterion(out: Tensor, y: Tensor) -> Tensor:
    if out.shape[1] > 1:
        return F.cross_entropy(out, y)
    return F.binary_cross_entropy_with_logits(out[:, 0], y.to(out.dtype))


def images(batch: int = 6, classes: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 2, 10, 11), torch.randint(classes, (batch,))


def assert_same(mine: nn.Module, other: nn.Module, tolerance: float = 1e-12) -> None:
    """Equal gradients of all parameters and equal buffers."""
    for (name, p), q in zip(mine.named_parameters(), other.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert (p.grad - q.grad).abs().max() <= tolerance * max(1.0, float(q.grad.abs().max())), name
    for (name, p), q in zip(mine.named_buffers(), other.named_buffers(), strict=True):
        assert name == q[0]
        assert (p - q[1]).abs().max() <= tolerance, name


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("form", ["function", "module", "with_output"])
def test_training_step_equals_the_twin(
    classes: int, update: bool, momentum: float | None, fast: bool, form: str, device: torch.device
) -> None:
    x, y = (t.to(device) for t in images(classes=max(2, classes)))
    model = Residual(classes, momentum).to(device)
    plain = copy.deepcopy(model)
    donor = torch.arange(len(x)).roll(-1).tolist()
    penalty = AntiLocality(OneBox(), update_statistics=update, fast=fast)
    for _ in range(2):
        if form == "function":
            out = model(x)
            value = input_gradient_change(
                model, x, y, box_i=I, box_j=J, donor=torch.tensor(donor), update_statistics=update, fast=fast
            )
        elif form == "module":
            out, value = model(x), penalty(model, x, y)
        else:
            out, value = penalty.with_output(model, x, y)
        (criterion(out, y) + 3.0 * value).backward()
        expected_out, expected = twin(plain, x, y, I, J, donor, update)
        (criterion(expected_out, y) + 3.0 * expected).backward()
        assert value.item() == pytest.approx(expected.item(), abs=1e-12)
        assert (out - expected_out).abs().max() < 1e-12
        assert_same(model, plain)
    assert 0 < value < 1
    assert model.norm.num_batches_tracked == (4 if update else 2)


class OneBox(AbstractPatches):
    """Always the same two boxes."""

    def draw(self, x: Tensor, donated: Tensor, generator: torch.Generator) -> Any:
        pairs = (GivenPatches([I, J]).draw(x, donated, torch.Generator().manual_seed(seed)) for seed in range(50))
        return next(pair for pair in pairs if pair.i[0, 0, I[0], I[1]])


def lift(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function of the pixels of I and J, as a model."""

    def model(x: Tensor) -> Tensor:
        i = x[:, :, I[0] : I[0] + I[2], I[1] : I[1] + I[3]].flatten(1)
        j = x[:, :, J[0] : J[0] + J[2], J[1] : J[1] + J[3]].flatten(1)
        return function(i, j)

    return model


@pytest.mark.parametrize(
    "function",
    [
        lambda i, j: i.pow(3).sum(1) + j.sin().sum(1),
        lambda i, j: i.pow(3).sum(1) * (j.square().sum(1) - 5.0),
        lambda i, j: (i.cumsum(1).tanh().sum(1) * j.prod(1) + 2.0 * j.sum(1)).unsqueeze(1),
    ],
    ids=["sum", "product", "product and more"],
)
def test_separable_functions_have_r_one(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, _ = images()
    value = input_gradient_change(
        lift(function), x, box_i=I, box_j=J, donor=torch.tensor([3, 0, 4, 5, 1, 2]), update_statistics=True
    )
    assert value.item() == pytest.approx(1.0, abs=1e-12)


def test_bilinear_function_has_the_analytic_cosine() -> None:
    x, _ = images()
    matrix, donor = torch.randn(24, 24, requires_grad=True), torch.tensor([3, 0, 4, 5, 1, 2])
    value = input_gradient_change(lift(lambda i, j: ((i @ matrix) * j).sum(1)), x, box_i=I, box_j=J, donor=donor)
    j = x[:, :, 5:9, 6:9].flatten(1)
    expected = F.cosine_similarity(j @ matrix.T, j[donor] @ matrix.T).abs().mean()
    assert value.item() == pytest.approx(expected.item(), abs=1e-12)
    (mine,), (analytic,) = torch.autograd.grad(value, matrix), torch.autograd.grad(expected, matrix)
    assert (mine - analytic).abs().max() < 1e-12


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("fast", [True, False])
def test_parameter_gradients_against_finite_differences(classes: int, fast: bool) -> None:
    x, y = images(classes=max(2, classes))
    model = Residual(classes)
    options: dict[str, Any] = {"box_i": I, "box_j": J, "donor": torch.arange(6).roll(1), "fast": fast}
    input_gradient_change(model, x, y, **options).backward()
    for parameter in model.parameters():
        direction = torch.randn_like(parameter)
        values, step = [], 1e-6
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step * direction)
            values.append(input_gradient_change(model, x, y, **options).item())
            with torch.no_grad():
                parameter.sub_(sign * step * direction)
        numeric = (values[0] - values[1]) / (2 * step)
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (gradient * direction).sum().item() == pytest.approx(numeric, rel=1e-5, abs=1e-8)


def test_masks_are_boxes_and_may_differ_by_sample(device: torch.device) -> None:
    x, y = (t.to(device) for t in images())
    model, donor = Residual(1).to(device).eval(), torch.arange(6).roll(2)
    mask_i, mask_j = torch.zeros(2, 10, 11, dtype=torch.bool, device=device)
    mask_i[0:3, 1:5], mask_j[5:9, 6:9] = True, True
    boxes = input_gradient_change(model, x, y, box_i=I, box_j=J, donor=donor)
    for i, j in ((mask_i, J), (I, mask_j[None, None]), (mask_i.expand(6, 1, -1, -1), mask_j)):
        torch.testing.assert_close(input_gradient_change(model, x, y, box_i=i, box_j=j, donor=donor), boxes)
    other = input_gradient_change(model, x, y, box_i=J, box_j=I, donor=donor)
    # samples do not meet in evaluation: those with swapped boxes count as in a batch of their own
    swapped = torch.stack([mask_i, mask_j] * 3).unsqueeze(1)
    mixed = input_gradient_change(model, x, y, box_i=swapped, box_j=swapped.roll(1, 0), donor=donor)
    anew = input_gradient_change(model, x, y, box_i=swapped.roll(1, 0), box_j=swapped, donor=donor)
    assert (mixed + anew).item() == pytest.approx((boxes + other).item(), abs=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_value_does_not_depend_on_the_order_of_the_batch(training: bool) -> None:
    x, y = images(classes=3)
    model, donor = Residual(3).train(training), torch.tensor([3, 0, 4, 5, 1, 2])
    order = torch.randperm(6)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(6))
    value = input_gradient_change(model, x, y, box_i=I, box_j=J, donor=donor)
    conjugated = place[donor[order]]
    permuted = input_gradient_change(model, x[order], y[order], box_i=I, box_j=J, donor=conjugated)
    assert permuted.item() == pytest.approx(value.item(), abs=1e-12)


class Attention(nn.Module):
    """One head over the pixels, by torch's attention or by its formula."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.inward, self.outward = nn.Linear(1, 6), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.inward(x.flatten(2).transpose(1, 2)).chunk(3, dim=2)
        if self.fused:
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            mixed = (query @ key.transpose(1, 2) / 2**0.5).softmax(2) @ value
        return self.outward(mixed).tanh().mean(1)


def test_attention_is_differentiated_twice(device: torch.device) -> None:
    x, donor = torch.randn(3, 1, 4, 4, device=device), torch.tensor([1, 2, 0])
    found = []
    for fused in (True, False):
        torch.manual_seed(1)
        model = Attention(fused).to(device)
        value = input_gradient_change(model, x, box_i=(0, 0, 2, 2), box_j=(2, 2, 2, 2), donor=donor)
        value.backward()
        found.append([value.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 2
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_permutation_donors_are_one_circle() -> None:
    seen = set()
    for seed in range(40):
        recorder = Recorder()
        AntiLocality(recorder, donor="permutation", seed=seed)(lambda x: x.square().sum((1, 2, 3)), numbered(5))
        donor = recorder.donors
        visited, b = [], 0
        for _ in range(5):
            visited.append(b)
            b = donor[b]
        assert sorted(visited) == list(range(5))
        seen.add(tuple(donor))
    # of 4! = 24 circles
    assert len(seen) > 15
    recorder = Recorder()
    AntiLocality(recorder)(lambda x: x.square().sum((1, 2, 3)), numbered(5))
    assert recorder.donors == [1, 2, 3, 4, 0]


class Recorder(AbstractPatches):
    """Writes down who gives to whom, from images that show their number."""

    def draw(self, x: Tensor, donated: Tensor, generator: torch.Generator) -> Any:
        self.donors = donated[:, 0, 0, 0].long().tolist()
        return UniformPatches().draw(x, donated, generator)


def numbered(batch: int) -> Tensor:
    return torch.arange(batch).reshape(-1, 1, 1, 1).expand(-1, 1, 6, 6).double()


def test_published_calls_run_as_written(device: torch.device) -> None:
    model = Residual(1).to(device)
    x, y = torch.randn(4, 2, 12, 12, device=device), torch.randint(2, (4,), device=device)
    penalty = AntiLocality(patches=UniformPatches(size=2), seed=0)
    loss = criterion(model(x), y) + 3.0 * penalty(model, x, y)
    loss.backward()
    donor = torch.arange(len(x)).roll(1)
    value = input_gradient_change(model, x, y, box_i=(0, 0, 2, 2), box_j=(8, 8, 2, 2), donor=donor)
    assert 0 <= value <= 1


def test_given_output_function_is_differentiated() -> None:
    x, y = images(classes=3)
    model, donor = Residual(3).eval(), torch.arange(6).roll(1)
    plain = input_gradient_change(model, x, y, box_i=I, box_j=J, donor=donor)
    wrapped = input_gradient_change(
        lambda x: {"scores": model(x)},
        x,
        y,
        box_i=I,
        box_j=J,
        donor=donor,
        output=lambda out, y: out["scores"].gather(1, y.unsqueeze(1)),
    )
    assert wrapped.item() == plain.item()
    margin = AntiLocality(OneBox(), output=lambda out, y: out[:, 1] - out[:, 0])(model, x)
    first = AntiLocality(OneBox())(lambda x: model(x)[:, 1] - model(x)[:, 0], x)
    assert margin.item() == pytest.approx(first.item(), abs=1e-12)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_the_callers_images_are_left_alone(requires_grad: bool) -> None:
    x, y = images()
    x.requires_grad_(requires_grad)
    before, model = x.detach().clone(), Residual(1)
    AntiLocality(UniformPatches())(model, x, y).backward()
    assert torch.equal(x, before)
    assert x.requires_grad == requires_grad
    assert x.grad is None


def test_with_output_keeps_the_way_to_what_made_the_images() -> None:
    x, y = images()
    model, shift = Residual(1), torch.zeros(2, 1, 1, requires_grad=True)
    out, _ = AntiLocality(UniformPatches()).with_output(model, x + shift, y)
    (through,) = torch.autograd.grad(out.sum(), shift)
    (direct,) = torch.autograd.grad(model(x + shift).sum(), shift)
    assert (through - direct).abs().max() < 1e-12


@pytest.mark.parametrize("patches", [UniformPatches(), RandomPatches((1, 4)), ContentPatches(), FarField(3)])
def test_draws_depend_on_seed_and_count_and_go_on_after_loading(patches: AbstractPatches) -> None:
    x, y = images()
    model = Residual(1).eval()
    penalty, again = AntiLocality(patches, "permutation", seed=4), AntiLocality(patches, "permutation", seed=4)
    values = [penalty(model, x, y).item() for _ in range(3)]
    values += [penalty.with_output(model, x, y)[1].item() for _ in range(3)]
    assert len(set(values)) > 3
    torch.manual_seed(99)
    assert [again(model, x, y).item() for _ in range(4)] == pytest.approx(values[:4], abs=1e-12)
    again.measure(model, x, y)
    again.with_output(model, x, y, torch.Generator().manual_seed(8))
    resumed = AntiLocality(patches, "permutation", seed=4)
    resumed.load_state_dict(again.state_dict())
    assert [resumed(model, x, y).item() for _ in range(2)] == pytest.approx(values[4:], abs=1e-12)
    assert AntiLocality(patches, "permutation", seed=5)(model, x, y).item() != values[0]


@pytest.mark.parametrize("inference", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("training", [True, False])
def test_measuring_gives_the_value_and_changes_nothing(
    inference: Callable[[], Any], training: bool, device: torch.device
) -> None:
    model = Residual(3).to(device).train(training)
    (model(torch.randn(4, 2, 10, 11, device=device)).sum()).backward()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    penalty = AntiLocality(UniformPatches(3))
    with inference():
        x, y = (t.to(device) for t in images(classes=3))
        value = penalty.measure(model, x, y, torch.Generator().manual_seed(3))
        assert penalty.measure(model, x, y) != penalty.measure(model, x, y)
    assert not value.requires_grad
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(after, grads, strict=True))
    assert all(m.training == training for m in model.modules())
    x, y = x.clone(), y.clone()
    _, expected = penalty.with_output(model, x, y, torch.Generator().manual_seed(3))
    assert value.item() == pytest.approx(expected.item(), abs=1e-12)


class Remembering(nn.Module):
    """A network with all that is changed by running it, of which a part is hidden from its list of modules."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 1)
        self.instance = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.average, self.drop = nn.BatchNorm2d(4, momentum=None), nn.Dropout(0.3)
        self.hidden = [nn.BatchNorm2d(4)]
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        features = self.average(self.hidden[0](self.instance(self.norm(self.conv(x))).tanh()).sin())
        out: Tensor = self.head(self.drop(features.square().mean((2, 3))))
        return out

    def statistics(self) -> list[Tensor]:
        layers = (self.norm, self.instance, self.average, self.hidden[0])
        return [buffer.clone() for layer in layers for buffer in layer.buffers()]


class Holder:
    """A callable object that is no module."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> Any:
        return self.model(x)


# one model, as it may be given
GIVEN: dict[str, Callable[[nn.Module], Any]] = {
    "module": lambda m: m,
    "method": lambda m: m.forward,
    "lambda": lambda m: lambda x: m(x),
    "partial of a method": lambda m: partial(m.forward),
    "partial of a function": lambda m: partial(lambda model, x: model(x), m),
    "object": Holder,
    "inside": lambda m: nn.Sequential(m),
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_statistics_buffers_and_random_numbers(given: str, training: bool) -> None:
    model, (x, y) = Remembering().train(training), images()
    model(x)
    before = [buffer.clone() for buffer in model.buffers()] + model.statistics()
    state = torch.get_rng_state()
    AntiLocality(UniformPatches()).measure(GIVEN[given](model), x, y)
    for mine, other in zip([*model.buffers(), *model.statistics()], before, strict=True):
        assert torch.equal(mine, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("seen", [True, False])
def test_statistics_are_updated_as_promised_for_any_callable(given: str, fast: bool, seen: bool) -> None:
    model, (x, y) = Remembering(), images()
    if seen:
        model(x)
    before, twin = model.statistics(), copy.deepcopy(model)
    AntiLocality(UniformPatches(), update_statistics=False, fast=fast)(GIVEN[given](model), x, y).backward()
    for mine, other in zip(model.statistics(), before, strict=True):
        assert torch.equal(mine, other)
    # and with_output updates them once, as the model would
    AntiLocality(UniformPatches(), update_statistics=False, fast=fast).with_output(GIVEN[given](model), x, y)
    twin.drop.eval()
    twin(x)
    for mine, other in zip(model.statistics(), twin.statistics(), strict=True):
        assert (mine - other).abs().max() < 1e-12


def test_statistics_of_layers_written_by_hand() -> None:
    mean, variance = ([torch.ones(2) for _ in range(3)] for _ in range(2))
    gain, x = torch.ones(2, requires_grad=True), images()[0]

    def by_hand(x: Tensor) -> Tensor:
        x = torch.batch_norm(x, gain, None, mean[0], variance[0], True, 0.1, 1e-5, False).sin()
        x = F.instance_norm(x, mean[1], variance[1])
        x = torch.instance_norm(x, gain, None, mean[2], variance[2], True, 0.1, 1e-5, False)
        return x.tanh().mean((1, 2, 3))

    AntiLocality(UniformPatches(), update_statistics=False)(by_hand, x).backward()
    assert all((layer == 1).all() for layer in (*mean, *variance))
    AntiLocality(UniformPatches())(by_hand, x)
    assert all((layer != 1).all() for layer in mean)


def test_the_value_without_updates_is_the_same() -> None:
    model, (x, y) = Remembering(), images()
    model.drop.eval()
    values = [AntiLocality(OneBox(), update_statistics=update)(model, x, y).item() for update in (True, False)]
    values.append(AntiLocality(OneBox()).measure(model, x, y).item())
    assert values == pytest.approx([values[0]] * 3, abs=1e-12)


def test_statistics_are_unfrozen_after_an_error() -> None:
    x, _ = images()
    model = Residual(3)
    with pytest.raises(ValueError, match="labels"):
        AntiLocality(UniformPatches(), update_statistics=False)(model, x)
    AntiLocality(UniformPatches()).with_output(model, x, images(classes=3)[1])
    assert model.norm.num_batches_tracked == 2


def test_vanishing_gradients_give_zero_and_no_nan() -> None:
    x, y = images()
    model = Residual(1)
    nn.init.zeros_(model.head.weight)
    value = AntiLocality(OneBox())(model, x, y)
    value.backward()
    assert value.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    # gradients that vanish for some samples only: the others are as if alone
    gate = (torch.arange(6) % 2).reshape(-1, 1, 1, 1)
    scale = torch.ones(2, 10, 11, requires_grad=True)
    function = lift(lambda i, j: (i * j.roll(3, 1)).square().sum(1))
    half = input_gradient_change(
        lambda x: function(x * scale * gate), x, box_i=I, box_j=J, donor=torch.arange(6).roll(2)
    )
    alone = input_gradient_change(
        lambda x: function(x * scale), x[1::2], box_i=I, box_j=J, donor=torch.arange(3).roll(1)
    )
    assert half.item() == pytest.approx(alone.item() / 2, abs=1e-12)
    (mine,), (other,) = torch.autograd.grad(half, scale), torch.autograd.grad(alone, scale)
    assert (mine - other / 2).abs().max() < 1e-12


def cosine(u: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(1, 1, *u.shape[2:], dtype=torch.bool)
    out: Tensor = AbsoluteCosine.apply(u, v, mask)
    return out


def test_cosine_against_torch_and_finite_differences() -> None:
    u, v = torch.randn(2, 5, 2, 3, 4).unbind()
    u.requires_grad_()
    v.requires_grad_()
    mask = torch.rand(5, 1, 3, 4) < 0.6
    mask[:, 0, 0, 0] = True
    value = AbsoluteCosine.apply(u, v, mask)
    expected = F.cosine_similarity((u * mask).flatten(1), (v * mask).flatten(1)).abs()
    assert (value - expected).abs().max() < 1e-12
    assert torch.autograd.gradcheck(lambda u, v: AbsoluteCosine.apply(u, v, mask), (u, v))


@pytest.mark.parametrize("exponent", [-44, -38, -30, -20, 0, 20, 37])
def test_cosine_is_free_of_scale_in_float32(exponent: int) -> None:
    u = torch.tensor([3.0, 4.0, 0.0]).float().reshape(1, 1, 1, 3)
    v = torch.tensor([4.0, 3.0, 12.0]).float().reshape(1, 1, 1, 3)
    small = (u.double() * 10.0**exponent).float().requires_grad_()
    value = cosine(small, v)
    assert value.dtype is torch.float32
    # 1e-44 is seven times the smallest number: the entries themselves are rounded
    assert value.item() == pytest.approx(24 / 65, rel=0.1 if exponent == -44 else 1e-6)
    (gradient,) = torch.autograd.grad(value, small)
    assert gradient.isfinite().all()
    if exponent >= -30:
        (reference,) = torch.autograd.grad(cosine(leaf := u.clone().requires_grad_(), v), leaf)
        assert (gradient.double() * 10.0**exponent - reference).abs().max() < 1e-6
    else:
        assert not gradient.any()


def test_tiny_gradients_of_a_network_train_in_float32() -> None:
    x, y = images()
    model = Residual(1).float()
    with torch.no_grad():
        model.head.weight.mul_(1e-20)
    twin_model = copy.deepcopy(model).double()
    with torch.no_grad():
        twin_model.head.weight.mul_(1e20)
    for m, inputs in ((model, x.float()), (twin_model, x)):
        input_gradient_change(m, inputs, y, box_i=I, box_j=J, donor=torch.arange(6).roll(1)).backward()
    mine, other = model.stem.weight.grad, twin_model.stem.weight.grad
    assert mine is not None
    assert other is not None
    assert (mine - other).norm() < 1e-4 * other.norm()


def test_bfloat16_autocast_reduces_in_float32(device: torch.device) -> None:
    x, y = (t.to(device) for t in images())
    model = Residual(1).to(device).float()
    with torch.autocast(device.type, torch.bfloat16):
        out, value = AntiLocality(OneBox()).with_output(model, x.float(), y)
    assert out.dtype is torch.bfloat16
    assert value.dtype is torch.float32
    value.backward()
    exact = copy.deepcopy(model).double()
    exact.zero_grad()
    _, expected = AntiLocality(OneBox()).with_output(exact, x, y)
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), abs=0.03)
    mine, other = model.stem.weight.grad, exact.stem.weight.grad
    assert mine is not None
    assert other is not None
    assert F.cosine_similarity(mine.double().flatten(), other.flatten(), dim=0) > 0.9


def test_memory_format_of_the_images_is_kept() -> None:
    seen = []

    def model(x: Tensor) -> Tensor:
        seen.append(x.is_contiguous(memory_format=torch.channels_last))
        return x.square().sum((1, 2, 3))

    AntiLocality(UniformPatches())(model, images()[0].contiguous(memory_format=torch.channels_last))
    assert seen == [True, True]


def call(**changes: Any) -> Tensor:
    x, y = images()
    arguments: dict[str, Any] = {"model": Residual(1), "x": x, "y": y, "box_i": I, "box_j": J}
    arguments["donor"] = torch.arange(6).roll(1)
    arguments |= changes
    return input_gradient_change(arguments.pop("model"), arguments.pop("x"), arguments.pop("y"), **arguments)


class FullyShardedDataParallel(nn.Sequential):
    """By name what torch's is."""


def test_wrong_input_of_the_function() -> None:
    for changes, message in (
        ({"box_i": (0, 0, 3, 12)}, "box_i: .* not a box inside an image of 10 x 11"),
        ({"box_j": (-1, 0, 2, 2)}, "box_j: .* not a box inside"),
        ({"box_i": (0, 0, 0, 2)}, "not a box inside"),
        ({"box_i": (0, 0, 2)}, r"box_i must be \(top, left, height, width\)"),
        ({"box_j": (2, 4, 2, 2)}, "box_i and box_j overlap"),
        ({"box_i": torch.zeros(10, 11, dtype=torch.bool)}, "box_i is empty"),
        ({"box_i": torch.zeros(10, 12, dtype=torch.bool)}, "box_i must be a boolean mask"),
        ({"box_j": torch.zeros(10, 11)}, "box_j must be a boolean mask"),
        ({"box_j": torch.ones(10, 11, dtype=torch.bool)}, "overlap"),
        ({"donor": torch.arange(5)}, r"donor must be int64 \(6,\)"),
        ({"donor": torch.arange(6) + 1}, r"donor must lie in 0\.\.5"),
        ({"x": torch.zeros(6, 10, 11)}, r"x must be floating-point images \(B, C, H, W\)"),
        ({"x": torch.zeros(6, 2, 10, 11, dtype=torch.uint8)}, "floating-point"),
        ({"model": Residual(3).double(), "y": None}, "y must be the labels of the 3 classes.*got none"),
        ({"model": Residual(3).double(), "y": torch.zeros(6)}, "y must be the labels"),
        ({"model": Residual(3).double(), "y": torch.arange(6)}, r"y must lie in 0\.\.2"),
        ({"model": nn.Identity()}, r"must be \(B,\), \(B, 1\) or \(B, K\) with B = 6, got \(6, 2, 10, 11\)"),
        ({"model": lambda x: {"scores": x}}, "got dict; pass output="),
        ({"model": nn.Sequential(nn.SyncBatchNorm(2), Residual(1))}, "SyncBatchNorm has no second derivative"),
        ({"model": FullyShardedDataParallel(Residual(1))}, "FSDP cannot be differentiated twice: use DDP"),
        ({"model": Residual(1).half()}, "float16 overflows.*bf16"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**changes)


def test_wrong_input_of_the_module() -> None:
    x, y = images()
    penalty = AntiLocality(UniformPatches())
    with pytest.raises(ValueError, match=r"x has 1 sample.*larger batches or drop_last=True"):
        penalty(Residual(1), x[:1], y[:1])
    with pytest.raises(ValueError, match="donor must be 'shift' or 'permutation', got 'next'"):
        AntiLocality(UniformPatches(), donor="next")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed must be 0 or more, got -1"):
        AntiLocality(UniformPatches(), seed=-1)
    for seed in (None, 0.5, "0"):
        with pytest.raises(ValueError, match=r"seed must be (0 or more|a whole number), got "):
            AntiLocality(UniformPatches(), seed=seed)  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="float16"):
        penalty(Residual(1), x, y)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"use measure\(model, x, y\)"):
        penalty(Residual(1), x, y)


@pytest.mark.parametrize("use", ["call", "measure", "function"])
def test_what_cannot_be_used_is_said_in_one_line(use: str) -> None:
    x, y = images()

    def run(model: Any = None, output: Any = None, **changed: Any) -> Tensor:
        model = Residual(3) if model is None else model
        given: dict[str, Any] = {"x": x, "y": y} | changed
        if use == "function":
            boxes: Any = {"box_i": I, "box_j": J, "donor": torch.arange(6).roll(1)}
            return input_gradient_change(model, given["x"], given["y"], output=output, **boxes)
        penalty = AntiLocality(OneBox(), output=output)
        return (penalty if use == "call" else penalty.measure)(model, given["x"], given["y"])

    for changes, message in (
        ({"x": x.numpy()}, r"x must be a torch tensor, got ndarray: pass torch.as_tensor\(x\)"),
        ({"x": x.tolist()}, "x must be a torch tensor, got list"),
        ({"y": y.numpy()}, "y must be a torch tensor, got ndarray"),
        ({"model": x}, r"model must be a (function, got tensor|network or a function of x, got Tensor)"),
        ({"output": lambda out, y: out}, r"output= must give one number per sample, \(6,\) or \(6, 1\), got \(6, 3\)"),
        ({"output": lambda out, y: out.sum()}, r"output= must give one number per sample.* got \(\): sum or average"),
        ({"output": lambda out, y: None}, "output= must give one number per sample.* got NoneType"),
        ({"model": lambda x: x.detach().mean((1, 2, 3))}, "the model's output does not depend on x"),
        ({"model": lambda x: Residual(1)(x.detach())}, "the model's output does not depend on x"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**changes)
    assert 0 <= run(output=lambda out, y: out[:, :1]) <= 1


def test_compiled_models_are_refused_however_they_are_given() -> None:
    x, y = images()
    compiled, network = torch.compile(lambda x: x.square().sum((1, 2, 3))), torch.compile(Residual(1))
    for model in (compiled, partial(compiled), network, network.forward):
        with pytest.raises(ValueError, match=r"compiled.* cannot be differentiated twice"):
            AntiLocality(UniformPatches())(model, x, y)
    with pytest.raises(ValueError, match="SyncBatchNorm has no second derivative"):
        AntiLocality(UniformPatches())(nn.Sequential(nn.SyncBatchNorm(2), Residual(1)).forward, x, y)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_step_does_not_wait_for_the_device() -> None:
    x, y = (t.cuda() for t in images())
    model, penalty = Residual(1).cuda(), AntiLocality(FarField(3))
    penalty.with_output(model, x, y)[1].backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        penalty.with_output(model, x, y)[1].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class AverageHead(nn.Module):
    """One logit, linear in the average of a batch normalisation's outputs: its sum over the batch is constant."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), between)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_noise_in_place_of_gradients_is_said_once(dtype: torch.dtype) -> None:
    x, y = images()
    x, penalty = x.to(dtype), AntiLocality(UniformPatches(2))
    model = AverageHead(nn.Identity()).to(dtype)
    with pytest.warns(UserWarning, match=r"R is rounding noise: .*two outputs, or a nonlinearity"):
        penalty(model, x, y)
    penalty(model, x, y)
    with pytest.warns(UserWarning, match="R is rounding noise"):
        input_gradient_change(model, x, y, box_i=I, box_j=J, donor=torch.arange(len(x)).roll(1))
    # warnings are errors
    AntiLocality(UniformPatches(2))(AverageHead(nn.ReLU()).to(dtype), x, y)
    AntiLocality(UniformPatches(2))(model.eval(), x, y)


def test_one_side_as_a_constant() -> None:
    """Both sides' gradients add up, and the coin gives either."""
    (x, y), model = images(), Residual(1)
    gradients = {}
    for sides in ("both", "first", "coin"):
        penalty, found = AntiLocality(GivenPatches([I, J]), seed=2, sides=sides), []
        for draw in range(6):
            penalty.set_extra_state(torch.tensor([draw, 0]))
            out, value = penalty.with_output(model, x, y)
            # the output is still differentiable, whatever side is a constant
            parts = [
                torch.autograd.grad(t, [*model.parameters()], retain_graph=True, allow_unused=True)
                for t in (value, out.sum())
            ]
            assert any(g is not None and g.abs().sum() > 0 for g in parts[1])
            found.append((value.item(), torch.cat([g.flatten() for g in parts[0] if g is not None])))
        gradients[sides] = found
    first = 0
    for (a, both), (b, one), (c, coin) in zip(*gradients.values(), strict=True):
        assert a == b == c
        second = both - one
        is_first = bool(torch.allclose(coin, one, rtol=1e-9, atol=1e-12))
        assert is_first or torch.allclose(coin, second, rtol=1e-7, atol=1e-10)
        assert not torch.allclose(one, second, rtol=1e-2)
        first += is_first
    assert 0 < first < 6
    with pytest.raises(ValueError, match="sides must be 'both', 'first' or 'coin', got 'second'"):
        AntiLocality(UniformPatches(), sides="second")  # type: ignore[arg-type]


def test_the_term_on_a_part_of_the_batch() -> None:
    (x, y), model = images(), Residual(1)
    part, whole = (AntiLocality(FarField(3), seed=4, samples=n) for n in (4, None))
    twin = copy.deepcopy(model)
    out, value = part.with_output(model, x, y)
    expected_out, expected = twin(x), whole(twin, x[:4], y[:4])
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(value, expected)
    for out_, value_ in ((out, value), (expected_out, expected)):
        (out_.sum() + value_).backward()
    assert_same(model, twin)
    torch.testing.assert_close(part(model, x, y), whole(twin, x[:4], y[:4]))
    for samples in (1, 2.5, "4"):
        with pytest.raises(ValueError, match=r"samples must be (at least 2, for a donor|a whole number or None)"):
            AntiLocality(UniformPatches(), samples=samples)  # type: ignore[arg-type]


def test_a_part_of_the_batch_of_a_model_that_works_in_place_on_its_input() -> None:
    """And of images that something trainable has made."""
    (x, y), model = images(), Residual(1)

    def inplace(z: Tensor) -> Tensor:
        z -= 0.5
        return model(z)

    part, kept, factor = AntiLocality(FarField(3), seed=4, samples=4), x.clone(), torch.ones(1, requires_grad=True)
    expected = AntiLocality(FarField(3), seed=4)(inplace, x[:4], y[:4])
    torch.testing.assert_close(part.with_output(inplace, x, y)[1], expected)
    assert torch.equal(x, kept)
    terms = [AntiLocality(FarField(3), seed=4, samples=n).with_output(model, x * factor, y)[1] for n in (4, 6)]
    for term in terms:
        (gradient,) = torch.autograd.grad(term, factor)
        assert gradient.abs() > 0


def test_a_coin_is_thrown_at_every_call_also_with_a_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    found, own = [], anti_locality._with_output
    monkeypatch.setattr(anti_locality, "_with_output", lambda *a, **k: found.append(k["constant"]) or own(*a, **k))
    (x, y), penalty, generator = images(), AntiLocality(UniformPatches(2), sides="coin"), torch.Generator()
    for _ in range(12):
        penalty.with_output(Residual(1), x, y, generator=generator)
    assert set(found) == {"x", "x'"}


@pytest.mark.parametrize("patches", [2, "FarField", UniformPatches])
def test_what_is_no_rule_for_patches_is_refused_at_once(patches: Any) -> None:
    with pytest.raises(ValueError, match=r"patches must be an AbstractPatches such as GivenPatches or None, got "):
        AntiLocality(patches)
