"""Time and memory of one training step with the anti-locality term, ResNet-18.

    python benchmarks/regularized_step.py --device cpu --shape 3 224 224 --batch 16 --out step.json

Sides, run in turn within every repeat, so that what else the machine does meets all of them alike:

plain      classification loss alone
plain_graph  replayed from CUDA graphs
twin       the published way of doing the term, written here from its formula: the gradients at I are divided by their
           norms, x' is a clone with a slice replaced, torch's own second derivatives
torch      AntiLocality.with_output with torch's own second derivatives (fast=False)
ours       AntiLocality.with_output
graph      ours replayed from CUDA graphs
first      graph with the gradient at x' as a constant
default    AntiLocality(), which is the interaction of two regions that it draws at every step
default_graph  replayed from CUDA graphs

The sides from graphs need CUDA. Before anything is timed, loss and all gradients of twin and ours are compared in
float64 at a small size. On CUDA a time is that of five steps in a row, between which nothing waits for the device, as
in training; memory is what the allocator reserves at most, from an empty cache, beyond what it held before the side.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from hardware import device_name, own_high_water
from torch import Tensor, nn

from lightning_locality.regularizer.anti_locality import AntiLocality
from lightning_locality.regularizer.cuda_graph import GraphedStep
from lightning_locality.regularizer.patches import Box, GivenPatches

Step = Callable[[nn.Module, Tensor, Tensor], Tensor]


def boxes(height: int, width: int) -> tuple[Box, Box]:
    """Two 32x32 boxes at the ends of the middle row, smaller where the image is."""
    side = max(1, min(32, height // 2, width // 3))
    top = (height - side) // 2
    return (top, 0, side, side), (top, width - side, side, side)


def network(channels: int) -> nn.Module:
    """ResNet-18 with one logit."""
    model = torchvision.models.resnet18(num_classes=1)
    if channels != 3:
        model.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    return model


def criterion(out: Tensor, y: Tensor) -> Tensor:
    """Binary cross-entropy."""
    return F.binary_cross_entropy_with_logits(out[:, 0].to(torch.promote_types(out.dtype, torch.float32)), y)


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Classification loss alone."""
    return criterion(model(x), y)


def twin(i: Box, j: Box) -> Step:
    """The term as published, for one pair of boxes and donors shifted by one."""

    def step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        rows, columns = slice(j[0], j[0] + j[2]), slice(j[1], j[1] + j[3])
        first, second = x.clone(), x.clone()
        second[:, :, rows, columns] = torch.roll(x[:, :, rows, columns], -1, 0)
        units: list[Tensor] = []
        for images in (first, second):
            images.requires_grad_()
            out = model(images)
            if not units:
                loss = criterion(out, y)
            gradient = torch.autograd.grad(out.sum(), images, create_graph=True)[0]
            patch = gradient[:, :, i[0] : i[0] + i[2], i[1] : i[1] + i[3]].flatten(1)
            units.append(patch / patch.norm(dim=1, keepdim=True))
        return loss + (units[0] * units[1]).sum(1).abs().mean()

    return step


class PlainGraph:
    """Classification loss alone, replayed."""

    def __init__(self) -> None:
        self.graphed = GraphedStep()

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Classification loss."""
        return criterion(self.graphed(model, model, (x,)), y)


class Term(nn.Module):
    """Classification loss plus AntiLocality, on always the same pair, or as it draws if none is given."""

    def __init__(self, *pair: Box, **options: Any) -> None:
        super().__init__()
        self.penalty = AntiLocality(GivenPatches(list(pair)) if pair else None, **options)
        heads = (seed for seed in range(99) if torch.randperm(2, generator=self.draw(seed))[0] == 0)
        self.seed = next(heads) if pair else None

    @staticmethod
    def draw(seed: int) -> torch.Generator:
        """Generator of a draw."""
        return torch.Generator().manual_seed(seed)

    def forward(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Classification loss plus the term."""
        generator = None if self.seed is None else self.draw(self.seed)
        out, value = self.penalty.with_output(model, x, y, generator)
        return criterion(out, y) + value


def check() -> float:
    """Largest relative difference of loss and gradients between twin and ours in float64; an error above 1e-10."""
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, 48, 64, dtype=torch.float64), torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    i, j = boxes(48, 64)
    model = network(3).double()
    worst, reference = 0.0, list[Tensor]()
    for step in (twin(i, j), Term(i, j), Term(i, j, fast=False)):
        copied = copy.deepcopy(model)
        loss = step(copied, x, y)
        loss.backward()
        found = [loss.detach(), *(p.grad for p in copied.parameters() if p.grad is not None)]
        found += [b.double() for b in copied.buffers()]
        reference = reference or found
        pairs = zip(found, reference, strict=True)
        worst = max([worst, *(float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in pairs)])
    if worst > 1e-10:
        raise AssertionError(f"twin and ours differ by {worst:.1e}")
    return worst


def main() -> None:
    """Measure, print a table, write a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", type=int, nargs=3, default=(3, 224, 224), metavar=("C", "H", "W"))
    parser.add_argument("--batch", type=int, help="samples per step (default: 64 on CUDA, 16 otherwise)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 is autocast")
    parser.add_argument("--channels-last", action="store_true", help="memory format of model and images")
    parser.add_argument("--repeats", type=int, help="timed steps per side (default: 20 on CUDA, 5 otherwise)")
    parser.add_argument("--sides", nargs="+", help="default: all that the device can do")
    parser.add_argument("--no-check", action="store_true", help="skip the comparison in float64")
    parser.add_argument("--out", type=Path, help="JSON file; an existing one is replaced")
    parser.add_argument("--append", action="store_true", help="add to the list in --out instead")
    options = parser.parse_args()
    cuda = options.device.startswith("cuda")
    batch, repeats = options.batch or (64 if cuda else 16), options.repeats or (20 if cuda else 5)
    steps = 5 if cuda else 1
    difference = None if options.no_check else check()

    # fixed shapes: let cuDNN look for its best algorithms, as Trainer(benchmark=True) does
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    x, y = torch.randn(batch, *options.shape), torch.randint(2, (batch,)).float()
    model = network(options.shape[0])
    if options.channels_last:
        x, model = x.to(memory_format=torch.channels_last), model.to(memory_format=torch.channels_last)
    x, y, model = x.to(options.device), y.to(options.device), model.to(options.device)
    i, j = boxes(*options.shape[1:])
    known: dict[str, Step] = {"plain": plain, "twin": twin(i, j)}
    known |= {"torch": Term(i, j, fast=False), "ours": Term(i, j)}
    known["default"] = Term()
    if cuda:
        known |= {"plain_graph": PlainGraph(), "graph": Term(i, j, cuda_graph=True)}
        known["first"] = Term(i, j, cuda_graph=True, sides="first")
        known["default_graph"] = Term(cuda_graph=True)
    sides = {name: (known[name], copy.deepcopy(model)) for name in options.sides or known}
    optimizers = {name: torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for name, (_, m) in sides.items()}

    def run(name: str) -> tuple[float, float]:
        step, own = sides[name]
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        clock, processor = time.perf_counter(), time.process_time()
        for _ in range(steps):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
                loss = step(own, x, y)
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
        if cuda:
            torch.cuda.synchronize()
            # the processor waits: the clock counts
            seconds = (time.perf_counter() - clock) / steps
            return seconds, torch.cuda.max_memory_reserved() / 2**20
        return time.process_time() - processor, own_high_water()

    seconds: dict[str, list[float]] = {name: [] for name in sides}
    memory: dict[str, float] = dict.fromkeys(sides, 0.0)
    for name in sides:
        held = reserved() if cuda else 0.0
        for _ in range(3 if cuda else 1):
            run(name)
        if cuda:
            reserved()
            memory[name] = run(name)[1] - held
    for _ in range(repeats):
        for name in sides:
            taken, peak = run(name)
            seconds[name].append(taken)
            if not cuda:
                memory[name] = max(memory[name], peak)
    if not cuda and len(sides) > 1:
        memory = {name: own_peak(name, options, batch) for name in sides}

    rows: dict[str, Any] = {}
    for name, values in seconds.items():
        median = statistics.median(values)
        quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [median] * 3
        rows[name] = {"seconds": median, "quartiles": [quartiles[0], quartiles[2]], "peak_mib": memory[name]}
        # paired: each repeat gives one ratio
        for other in ("plain", "twin"):
            if other in seconds and other != name:
                ratios = [a / b for a, b in zip(values, seconds[other], strict=True)]
                rows[name][f"ratio_to_{other}"] = statistics.median(ratios)
    result = {
        "command": " ".join(["python", "benchmarks/regularized_step.py", *sys.argv[1:]]),
        "device": device_name(x.device),
        "time": "wall clock" if cuda else "processor time of all threads",
        "threads": torch.get_num_threads(),
        "shape": [batch, *options.shape],
        "dtype": options.dtype,
        "channels_last": options.channels_last,
        "repeats": repeats,
        "steps_in_a_row": steps,
        "float64_difference": difference,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "sides": rows,
    }
    print(f"{result['device']}, {batch} x {options.shape}, {options.dtype}, torch {torch.__version__}")
    print(f"{'side':13} {'seconds':>9} {'quartiles':>19} {'x plain':>8} {'x twin':>8} {'peak MiB':>9}")
    for name, row in rows.items():
        low, high = row["quartiles"]
        ratios = "".join(f" {row.get(f'ratio_to_{other}', 1.0):8.2f}" for other in ("plain", "twin"))
        print(f"{name:13} {row['seconds']:9.4f} {low:9.4f} {high:9.4f}{ratios} {row['peak_mib']:9.0f}")
    if options.out:
        old = json.loads(options.out.read_text()) if options.append and options.out.exists() else []
        content = [*old, result] if options.append else result
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(content, indent=2) + "\n")


def reserved() -> float:
    """Memory in MiB that the allocator keeps after it has given unused blocks back."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved() / 2**20


def own_peak(name: str, options: argparse.Namespace, batch: int) -> float:
    """Peak resident memory of a process that runs this side alone, in MiB (0 where it is not known)."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "side.json"
        command = [sys.executable, __file__, "--device", options.device, "--dtype", options.dtype, "--repeats", "1"]
        command += ["--sides", name, "--batch", str(batch), "--out", str(out), "--shape", *map(str, options.shape)]
        # the comparison would need more memory than a small step
        command += ["--no-check", *(["--channels-last"] if options.channels_last else [])]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        peak: float = json.loads(out.read_text())["sides"][name]["peak_mib"]
        return peak


if __name__ == "__main__":
    main()
