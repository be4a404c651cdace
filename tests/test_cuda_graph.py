"""Captured steps: logic on the CPU with the eager step in place of the replays, the graphs themselves on a GPU."""

from __future__ import annotations

import copy
import itertools
import random
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_locality.regularizer import batch_norm
from lightning_locality.regularizer.anti_locality import AntiLocality
from lightning_locality.regularizer.cuda_graph import GraphedStep
from lightning_locality.regularizer.patches import ContentPatches, FarField, GivenPatches, UniformPatches

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def network(device: str, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Tanh())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(dropout), nn.Linear(32, 1))
    return nn.Sequential(first, second, head).to(device)


def batches(device: str, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.rand(n, 3, 12, 12, generator=generator).to(device),
            torch.randint(2, (n,), generator=generator).to(device),
        )
        for n in sizes
    ]


def penalty_of(graph: bool, patches: Any = None, **options: Any) -> AntiLocality:
    penalty = AntiLocality(patches or UniformPatches(3), cuda_graph=graph, **options)
    for graphed in penalty.graphed.values():
        graphed.emulate = True
    return penalty


def captured(penalty: AntiLocality) -> bool:
    return any(graphed.captured for graphed in penalty.graphed.values())


def train(model: nn.Module, penalty: AntiLocality, data: list[tuple[Tensor, Tensor]], **options: Any) -> list[float]:
    """Losses of a plain loop, with the gradients of two batches accumulated."""
    optimizer = torch.optim.SGD(model.parameters(), lr=options.get("lr", 0.05), momentum=0.9)
    losses = []
    torch.manual_seed(5)
    for k, (x, y) in enumerate(data):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=options.get("bfloat16", False)):
            out, term = penalty.with_output(model, x, y)
        loss = F.binary_cross_entropy_with_logits(out[:, 0].double(), y.double()) + 3 * term
        (loss / 2).backward()
        losses.append(loss.item())
        if k % 2:
            optimizer.step()
            optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "patches", [UniformPatches(3), ContentPatches(3), FarField(3), GivenPatches([(0, 0, 4, 4), (6, 6, 4, 4)])]
)
@pytest.mark.parametrize("options", [{}, {"sides": "first"}, {"sides": "coin"}, {"samples": 4}], ids=str)
def test_training_from_graphs_is_the_eager_training(device: str, patches: Any, options: dict[str, Any]) -> None:
    eager = network(device, dropout=0.25)
    graphed = copy.deepcopy(eager)
    # the fifth batch, of another size, runs eagerly between replays
    data = batches(device, [6, 6, 6, 6, 4, 6, 6, 6])
    expected = train(eager, penalty_of(False, patches, **options), data)
    penalty = penalty_of(True, patches, **options)
    assert train(graphed, penalty, data) == pytest.approx(expected, rel=1e-9)
    assert captured(penalty)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(graphed.state_dict()[name], value, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("device", DEVICES)
def test_term_alone_and_plain_step(device: str) -> None:
    model, (x, y) = network(device), batches(device, [6])[0]
    graphed, penalty, eager = GraphedStep(emulate=True), penalty_of(True), penalty_of(False)
    for step in range(3):
        term, expected = penalty(model, x, y), eager(model, x, y)
        torch.testing.assert_close(term, expected)
        parameters = list(model.parameters())
        found, wanted = (torch.autograd.grad(t, parameters, allow_unused=True) for t in (term, expected))
        for a, b in zip(found, wanted, strict=True):
            # what the term does not depend on, the bias of the head, has no gradient either way
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)
        out = graphed(model, model, (x,))
        assert graphed.captured == captured(penalty) == (step > 0)
        out.square().sum().backward()


@pytest.mark.parametrize("device", DEVICES)
def test_statistics_count_each_pass_once(device: str) -> None:
    model, (x, y) = network(device), batches(device, [6])[0]
    penalty = penalty_of(True)
    for step in range(1, 5):
        penalty.with_output(model, x, y)
        # passes on x and on x'; what a capture runs besides leaves no trace
        assert model[0][1].num_batches_tracked.item() == 2 * step


@pytest.mark.parametrize("device", DEVICES)
def test_outputs_that_wait_for_their_backward_pass_are_not_overwritten(device: str) -> None:
    model, data = network(device), batches(device, [6, 6, 6, 6])
    penalty, eager = penalty_of(True), penalty_of(False)
    for x, y in data[:2]:
        penalty.with_output(model, x, y)
        eager.with_output(model, x, y)
    assert captured(penalty)
    terms = [[p.with_output(model, x, y)[1] for x, y in data[2:]] for p in (penalty, eager)]
    gradients = [torch.autograd.grad(sum(t), [*model.parameters()], allow_unused=True) for t in terms]  # type: ignore[arg-type]
    for a, b in zip(*gradients, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)
    term = penalty(model, *data[0])
    term = penalty(model, *data[0])
    term.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        term.backward()


class Reads(nn.Module):
    """Branches on data."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x).tanh().mean((1, 2, 3))
        return out if out.detach().sum().item() > -1e9 else -out


class Counts(Reads):
    """Changes a plain attribute at every call."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x).tanh().mean((1, 2, 3))


class Draws(Reads):
    """Depends on a random number of Python, which differs from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = itertools.count()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).tanh().mean((1, 2, 3)) * (10 + next(self.numbers))


class Lists(Reads):
    """Makes a new object at every call."""

    def forward(self, x: Tensor) -> Tensor:
        self.made = [object()]
        return self.conv(x).tanh().mean((1, 2, 3))


class Outside(Counts):
    """Uses a module that is not its own."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = [nn.Conv2d(3, 3, 1)]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.parts[0].to(x.device)(x)).tanh().mean((1, 2, 3))


class Tosses(Counts):
    """Leaves out a layer at random, as LayerDrop does."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).tanh().mean((1, 2, 3)) if random.random() < 2 else x.mean((1, 2, 3))


def pre_hooked() -> nn.Module:
    model = Reads()
    model.conv.register_forward_pre_hook(lambda *_: None)
    return model


def hooked() -> nn.Module:
    model = Reads()
    model.conv.register_forward_hook(lambda *_: None)
    return model


class Synchronizes(Counts):
    """What a capture refuses and torch's check for synchronisation does not see."""

    def forward(self, x: Tensor) -> Tensor:
        torch.cuda.synchronize()
        return self.conv(x).tanh().mean((1, 2, 3))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (Draws, "differs by .* from the eager step"),
        (Counts, ".calls is another at every call"),
        (Lists, r"\.made is another at every call"),
        (hooked, "conv has hooks"),
        (pre_hooked, "conv has hooks"),
        (Outside, "parameters that are not among those of the model"),
        (Tosses, "draws random numbers on the processor"),
        (lambda: lambda x: x.mean((1, 2, 3)), "the model is a function, not a module"),
        pytest.param(Reads, "called a synchronizing CUDA operation", marks=pytest.mark.gpu),
        pytest.param(Synchronizes, "captur", marks=pytest.mark.gpu),
    ],
)
def test_what_cannot_be_captured_goes_on_eagerly_after_one_warning(device: str, build: Any, reason: str) -> None:
    if build in (Reads, Synchronizes) and device == "cpu":
        pytest.skip("waiting for the device is what only a graph cannot do")
    model = build()
    if isinstance(model, nn.Module):
        model = model.to(device)
    x, y = batches(device, [6])[0]
    penalty = penalty_of(True, output=lambda out, y: out)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(70):
            penalty.with_output(model, x, y)[1].add(0)
    assert not captured(penalty)
    messages = [str(w.message) for w in caught]
    assert len(messages) == 1, messages
    assert re.search("steps are taken without a CUDA graph, equal but slower: .*" + reason, messages[0])
    # the device still works, and another model can be captured on it
    torch.rand(3, device=device).sum().item()
    other, penalty = network(device, dropout=0.5), penalty_of(True)
    for _ in range(3):
        penalty.with_output(other, x, y)[1].backward()
    assert captured(penalty)


class FailsOnce(Reads):
    """Fails at the third pass, which is the first that a capture makes."""

    def __init__(self) -> None:
        super().__init__()
        self._passes = itertools.count(1)

    def forward(self, x: Tensor) -> Tensor:
        if next(self._passes) == 3:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR")
        return self.conv(x).tanh().mean((1, 2, 3))


@pytest.mark.parametrize("device", DEVICES)
def test_a_capture_that_fails_once_is_tried_again(device: str) -> None:
    model, (x, y) = FailsOnce().to(device), batches(device, [6])[0]
    penalty = penalty_of(True)
    for step in range(1, 5):
        penalty.with_output(model, x, y)
        assert captured(penalty) == (step > 2)


@pytest.mark.parametrize("device", DEVICES)
def test_a_changed_model_is_captured_anew(device: str) -> None:
    model, data = network(device, dropout=0.5), batches(device, [6] * 9)
    penalty = penalty_of(True)
    expected, eager = copy.deepcopy(model), penalty_of(False)
    for k, (x, y) in enumerate(data):
        for each, term in ((model, penalty), (expected, eager)):
            torch.manual_seed(k)
            if k == 3:
                each[2][2].p = 0.0
            if k == 6:
                each[0].requires_grad_(False)
            loss = sum(t.mean() for t in term.with_output(each, x, y))
            assert isinstance(loss, Tensor)
            each.zero_grad()
            loss.backward()
        for a, b in zip(model.parameters(), expected.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            if a.grad is not None and b.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-12)
    assert penalty.graphed[None]._captures == 3


CHANGES: dict[str, Any] = {
    "another activation": lambda m: setattr(m, "act", nn.Sigmoid()),
    "a value in a list": lambda m: m.factors.__setitem__(0, 3.0),
    "a value in a dictionary": lambda m: m.options["scale"].__setitem__(0, 2.0),
    "a tensor": lambda m: setattr(m, "shift", torch.ones(1)),
    "a number of numpy": lambda m: setattr(m, "power", np.float64(3)),
    "a function": lambda m: setattr(m, "last", torch.sin),
    "the parameter itself": lambda m: setattr(m.conv, "weight", nn.Parameter(m.conv.weight.data)),
    "the memory format of a parameter": lambda m: setattr(m.conv.weight, "data", m.conv.weight.data.transpose(2, 3)),
    "a frozen parameter": lambda m: m.conv.bias.requires_grad_(False),
    "the mode of a part": lambda m: m.norm.eval(),
}


class Attributes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Tanh()
        self.factors, self.options, self.shift = [2.0], {"scale": [1.0]}, torch.zeros(1)
        self.power, self.last = np.float64(2), torch.cos

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x)) * self.factors[0] * self.options["scale"][0] + self.shift)
        return self.last(x.abs() ** float(self.power)).mean((1, 2, 3))


@pytest.mark.parametrize("change", CHANGES)
def test_no_replay_of_what_has_changed(change: str) -> None:
    torch.manual_seed(0)
    model, (x, y) = Attributes(), batches("cpu", [6])[0]
    penalty, eager, twin = penalty_of(True), penalty_of(False), copy.deepcopy(model)
    for step in range(5):
        if step == 3:
            CHANGES[change](model)
            CHANGES[change](twin)
        captures = penalty.graphed[None]._captures
        terms = [term.with_output(net, x, y) for term, net in ((penalty, model), (eager, twin))]
        for net, (out, term) in zip((model, twin), terms, strict=True):
            net.zero_grad()
            (out.sum() + term).backward()
        torch.testing.assert_close(terms[0], terms[1])
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-12)
        # captured at the second and, anew, at the fifth step
        assert penalty.graphed[None]._captures - captures == (step in (1, 4))


@pytest.mark.parametrize("device", DEVICES)
def test_hooks_of_parameters_are_called_once(device: str) -> None:
    model, (x, y) = network(device), batches(device, [6])[0]
    eager, penalty = penalty_of(False), penalty_of(True)
    handle = model[0][0].weight.register_hook(lambda g: 2 * g)
    gradients = []
    for term in (penalty, eager):
        for _ in range(3):
            model.zero_grad()
            term.with_output(model, x, y)[1].backward()
        gradients.append(model[0][0].weight.grad)
    handle.remove()
    assert captured(penalty)
    # the third draw of both
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-12)


def test_the_loop_of_the_page() -> None:
    (block,) = re.findall(
        r"```python\n(.*?)```", (Path(__file__).parent.parent / "docs" / "gpu.md").read_text(), re.DOTALL
    )
    x, y = batches("cpu", [6])[0]
    names: dict[str, Any] = {"model": network("cpu"), "x": x, "y": y}
    exec(compile(block, "docs/gpu.md", "exec"), names)
    (names["logits"].sum() + names["term"]).backward()
    assert names["penalty"].cuda_graph


def test_copies_capture_for_themselves() -> None:
    model, (x, y) = network("cpu"), batches("cpu", [6])[0]
    penalty = penalty_of(True)
    for _ in range(2):
        penalty(model, x, y)
    copied = copy.deepcopy(penalty)
    assert captured(penalty)
    assert not captured(copied)


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_resnet_at_training_precision(precision: str, channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=1).cuda()
    x, y = torch.rand(16, 3, 96, 96, device="cuda"), torch.randint(2, (16,), device="cuda")
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    # TF32 and bf16 decide some of the ReLUs otherwise after the smallest change: steps of length zero, no TF32, and the
    # same kernels of batch normalisation in both
    options = {"bfloat16": precision == "bfloat16", "lr": 0.0}
    results = []
    monkeypatch.setattr(batch_norm, "_WORTH_LAUNCHES", 0)
    with torch.backends.cudnn.flags(allow_tf32=False, deterministic=True):
        for graph in (True, False):
            own, penalty = copy.deepcopy(model), penalty_of(graph)
            losses = train(own, penalty, [(x, y)] * 5, **options)
            assert captured(penalty) == graph
            results.append((losses, torch.cat([p.grad.flatten() for p in own.parameters()])))
    (found, gradient), (wanted, expected) = results
    assert found == pytest.approx(wanted, rel=1e-4 if precision == "float32" else 3e-2)
    assert (gradient - expected).norm() < (1e-3 if precision == "float32" else 0.1) * expected.norm()
