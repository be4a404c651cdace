"""What docs/transfer.md says of loops, layers and torch's other features."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import roi_align

from lightning_locality import AntiLocality, FarField, SmallResNet, UniformPatches, input_gradient_change

LEFT, RIGHT = (0, 0, 4, 4), (0, 8, 4, 4)


def new_penalty(**options: Any) -> AntiLocality:
    return AntiLocality(UniformPatches(3), seed=1, **options)


def gradient(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def of_term(module: nn.Module, x: Tensor, penalty: AntiLocality | None = None) -> tuple[float, Tensor]:
    module.zero_grad()
    value = (penalty or new_penalty())(module, x)
    value.backward()
    return float(value.detach()), gradient(module)


class Net(nn.Module):
    """Every output depends on products of all pixels; the first layer may be checkpointed."""

    def __init__(self, norm: bool = True, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.Tanh())
        self.head = nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.Linear(6, 1))
        self.checkpointed = checkpointed
        self(torch.zeros(2, 1, 9, 9))

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.first, x, use_reentrant=False) if self.checkpointed else self.first(x)
        assert isinstance(hidden, Tensor)
        out: Tensor = self.head(hidden.flatten(1))
        return out


def images(number: int = 8) -> Tensor:
    return torch.randn(number, 1, 9, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_accumulated_terms_are_that_of_donors_within_the_micro_batches() -> None:
    module, x = Net().eval(), images()
    boxes = {"box_i": (0, 0, 3, 3), "box_j": (5, 5, 3, 3)}
    for half in (x[:4], x[4:]):
        (input_gradient_change(module, half, donor=torch.arange(4).roll(-1), **boxes) / 2).backward()
    accumulated = gradient(module)
    module.zero_grad()
    donor = torch.cat([torch.arange(4).roll(-1), 4 + torch.arange(4).roll(-1)])
    input_gradient_change(module, x, donor=donor, **boxes).backward()
    assert accumulated.abs().max() > 1e-3
    assert (gradient(module) - accumulated).abs().max() < 1e-12


# torch hides this one itself, but not where warnings are errors
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("how", ["wrapped", "in place", "inside"])
def test_compiled_modules_are_refused(how: str) -> None:
    module: Any = Net()
    if how == "in place":
        module.compile(backend="eager")
    else:
        module = torch.compile(module, backend="eager")
    module = nn.Sequential(module) if how == "inside" else module
    with pytest.raises(ValueError, match=r"is compiled and cannot be differentiated twice: give the penalty the mod"):
        new_penalty()(module, images())
    # one derivative can be taken
    assert 0 < new_penalty().measure(module, images()) < 1
    plain: Any = Net()
    before = [buffer.clone() for buffer in plain.buffers()]
    assert 0 < new_penalty().measure(torch.compile(lambda x: plain(x), backend="eager"), images()) < 1
    assert all(torch.equal(mine, other) for mine, other in zip(plain.buffers(), before, strict=True))


def test_compiled_for_the_loss_plain_for_the_term() -> None:
    found, x = [], images()
    for compiled in (False, True):
        module = Net()
        called = torch.compile(module, backend="aot_eager") if compiled else module
        (called(x).square().sum() + 3 * new_penalty()(module, x)).backward()
        found.append(gradient(module))
    assert (found[0] - found[1]).abs().max() < 1e-12


class Additive(nn.Module):
    """Cannot compare two patches that are farther apart than its convolution's kernel."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), layer, nn.Tanh())
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.net(x).mean((2, 3)))
        return out


def test_masks_of_dropout_lower_the_term_by_themselves() -> None:
    x, donor = torch.randn(64, 1, 4, 12), torch.arange(64).roll(1)
    module = Additive(nn.Dropout(0.5))
    value = lambda: float(input_gradient_change(module, x, box_i=LEFT, box_j=RIGHT, donor=donor).detach())
    assert value() < 0.6
    module.net[1].eval()
    assert abs(value() - 1) < 1e-12


def test_patches_on_blank_background_change_nothing() -> None:
    x = torch.zeros(4, 1, 8, 80)
    x[..., :8], x[..., 72:] = torch.randn(2, 4, 1, 8, 8)
    module = SmallResNet()
    values = [float(AntiLocality(UniformPatches(2), seed=seed).measure(module, x)) for seed in range(20)]
    assert sum(value > 1 - 1e-12 for value in values) > 10
    far = [float(AntiLocality(FarField(8), seed=seed).measure(module, x)) for seed in range(20)]
    assert max(far) < 1 - 1e-9


def test_a_head_of_zeros_has_no_term() -> None:
    module = Net()
    nn.init.zeros_(module.head[2].weight)
    value, gradients = of_term(module, images())
    assert value == 0
    assert not gradients.any()


def test_outputs_of_the_page() -> None:
    """Several labels are the sum of their logits; what is to be ignored has no gradient and counts as 0."""
    page = (Path(__file__).parent.parent / "docs" / "transfer.md").read_text()
    rows = re.findall(r"^\| .* \| .* \| `(lambda out, y: .*)` \|$", page, re.MULTILINE)
    several, ignored, numbers, mapping = (eval(row) for row in rows)
    module, x = nn.Sequential(Net(), nn.Tanh(), nn.Linear(1, 3)).eval(), images(4)

    def term(y: Tensor | None, output: Any = None, model: Any = module) -> float:
        return float(AntiLocality(UniformPatches(3), seed=1, output=output).measure(model, x, y))

    y = torch.tensor([0, 2, 1, 2])
    assert 0 < term(y) < 1 - 1e-3
    assert term(F.one_hot(y, 3).double(), several) == pytest.approx(term(y), rel=1e-12)
    assert term(torch.ones(4, 3), several) == pytest.approx(term(None, numbers), rel=1e-12)
    assert term(y, mapping, lambda x: {"logits": module(x)}) == pytest.approx(term(y), rel=1e-12)
    assert term(y, ignored) == pytest.approx(term(y), rel=1e-12)
    assert term(torch.full((4,), -100), ignored) == 0
    outer = torch.tensor([True, False, False, True])
    parts = [term(y.masked_fill(which, -100), ignored) for which in (outer, ~outer)]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(term(y), rel=1e-12)


def test_eval_mode_trains_and_counts_no_batch() -> None:
    module, x = Net().eval(), images()
    before = int(module.first[1].num_batches_tracked)
    assert of_term(module, x)[1].abs().max() > 1e-3
    assert int(module.first[1].num_batches_tracked) == before
    module.train()
    new_penalty(update_statistics=False)(module, x)
    assert int(module.first[1].num_batches_tracked) == before
    new_penalty()(module, x)
    assert int(module.first[1].num_batches_tracked) == before + 1


def test_channels_last_gives_the_same() -> None:
    torch.manual_seed(0)
    module, x = SmallResNet(in_channels=3), torch.randn(8, 3, 16, 16)
    value, gradients = of_term(module, x)
    module.to(memory_format=torch.channels_last)
    other, others = of_term(module, x.contiguous(memory_format=torch.channels_last))
    assert abs(value - other) < 1e-12
    assert (gradients - others).abs().max() < 1e-9 * gradients.abs().max()


def test_gradient_checkpointing() -> None:
    value, gradients = of_term(Net(norm=False), images())
    other, others = of_term(Net(norm=False, checkpointed=True), images())
    assert abs(value - other) < 1e-12
    assert gradients.abs().max() > 1e-3
    assert (gradients - others).abs().max() < 1e-12
    with pytest.raises(
        ValueError, match=r"^first.1 \(BatchNorm2d\): gradient checkpointing .*switch checkpointing off"
    ):
        of_term(Net(norm=True, checkpointed=True), images())


def test_layers_without_second_derivative_are_named() -> None:
    assert of_term(nn.Sequential(Net(), nn.Hardsigmoid()), images())[1].abs().max() > 1e-4
    crop = lambda x: roi_align(x, [torch.tensor([[0.0, 0.0, 5.0, 5.0]])] * len(x), x.shape[-2:])
    with pytest.raises(ValueError, match=r"^roi_align: torch has no second derivative of roi_align.*replace it"):
        new_penalty()(lambda x: crop(x.sin()).mean((1, 2, 3)), images())


_PROCESS = """
import sys
import torch
import torch.distributed as dist
torch.set_default_dtype(torch.float64)
sys.path.insert(0, {tests!r})
from test_transfer import F, Net, gradient, images, new_penalty
from torch.nn.parallel import DistributedDataParallel as DDP

dist.init_process_group("gloo")
x = images()[dist.get_rank() :: 2]
y = (x.sum((1, 2, 3)) > 0).double()
criterion = lambda out: F.binary_cross_entropy_with_logits(out[:, 0], y)
module = Net()
(criterion(module(x)) + 2 * new_penalty()(module, x)).backward()
mean = gradient(module)
dist.all_reduce(mean)
mean /= 2
for static in (False, True):
    module = Net()
    ddp = DDP(module, static_graph=static)
    (criterion(ddp(x)) + 2 * new_penalty()(module, x)).backward()
    assert (gradient(module) - mean).abs().max() < 1e-12
module = Net()
DDP(module)
out, term = new_penalty().with_output(module, x)
(criterion(out) + 2 * term).backward()
assert (gradient(module) - mean).abs().max() > 1e-4
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_loop_under_ddp(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(_PROCESS.format(tests=str(Path(__file__).parent)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={**os.environ, **address, "RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
