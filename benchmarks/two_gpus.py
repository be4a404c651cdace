"""Do two processes take the steps of one, and how much faster are they?

    python benchmarks/two_gpus.py                        # two GPUs, NCCL
    python benchmarks/two_gpus.py --device cpu --batch 8 --shape 3 32 32 --steps 3     # gloo, to try it

Equality: the gradients of two processes under DistributedDataParallel, eager and captured, against the mean of those
that one process computes of both halves, in float64, with a network without batch statistics. Speed: images a second of
ResNet-18 with the term, bf16, on one and on two devices. Ends with status 1 if anything differs by more than 1e-9.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchvision
from regularized_step import criterion
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_locality.regularizer.anti_locality import AntiLocality
from lightning_locality.regularizer.patches import UniformPatches


def penalty(graph: bool, device: torch.device) -> AntiLocality:
    """The term; on a CPU its graphs are emulated."""
    term = AntiLocality(UniformPatches(4), seed=3, cuda_graph=graph)
    for graphed in term.graphed.values():
        graphed.emulate = device.type == "cpu"
    return term


def small(device: torch.device) -> nn.Module:
    """A network whose samples do not meet."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2)
    layers = [first, nn.GroupNorm(2, 8), nn.ReLU(inplace=True), second, nn.Tanh(), nn.AdaptiveAvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 1)).to(device, torch.float64)


def half(rank: int, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The images and labels of a process."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.rand(6, 3, 16, 16, generator=generator, dtype=torch.float64)
    return x.to(device), torch.randint(2, (6,), generator=generator).double().to(device)


def objective(net: nn.Module, term: AntiLocality, x: Tensor, y: Tensor) -> Tensor:
    """Loss and term."""
    out, value = term.with_output(net, x, y)
    return criterion(out, y) + 2 * value


class Whole(nn.Module):
    """The objective as a module, which DistributedDataParallel wraps."""

    def __init__(self, net: nn.Module, term: AntiLocality) -> None:
        super().__init__()
        self.net, self.term = net, term

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Loss and term."""
        return objective(self.net, self.term, x, y)


def difference(rank: int, device: torch.device, graph: bool) -> float:
    """Largest difference of the reduced gradients from the mean of the halves', over four steps."""
    ids = [device.index] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(Whole(small(device), penalty(graph, device)), device_ids=ids)
    alone, terms = small(device), [penalty(False, device) for _ in range(2)]
    worst = 0.0
    for step in range(4):
        wrapped.zero_grad()
        wrapped(*half(rank, step, device)).backward()
        parts = [
            torch.autograd.grad(objective(alone, terms[r], *half(r, step, device)), [*alone.parameters()])
            for r in range(2)
        ]
        means = [(a + b) / 2 for a, b in zip(*parts, strict=True)]
        found = [p.grad for p in wrapped.module.net.parameters()]
        worst = max([worst, *(float((a - b).abs().max()) for a, b in zip(found, means, strict=True))])
    assert wrapped.module.term.graphed[None].captured == graph
    return worst


def rate(device: torch.device, processes: int, options: argparse.Namespace, graph: bool) -> float:
    """Images a second of all processes together."""
    net = torchvision.models.resnet18(num_classes=1)
    net.conv1 = nn.Conv2d(options.shape[0], 64, 7, stride=2, padding=3, bias=False)
    whole: Any = Whole(net.to(device, memory_format=torch.channels_last), penalty(graph, device))
    if processes == 2:
        whole = DistributedDataParallel(whole, device_ids=[device.index] if device.type == "cuda" else None)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.01, momentum=0.9)
    x = torch.rand(options.batch, *options.shape).to(device, memory_format=torch.channels_last)
    y = torch.randint(2, (options.batch,)).float().to(device)

    def run(steps: int) -> float:
        clock = time.perf_counter()
        for _ in range(steps):
            with torch.autocast(device.type, torch.bfloat16):
                loss = whole(x, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - clock

    run(4)
    if processes == 2:
        dist.barrier()
    return processes * options.batch * options.steps / run(options.steps)


def process(rank: int, options: argparse.Namespace, port: int) -> None:
    """Check and time in one of the two processes."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    cuda = options.device == "cuda"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=2)
    differences = {graph: difference(rank, device, graph) for graph in (False, True)}
    if rank == 0:
        print(f"largest difference from one process: eager {differences[False]:.1e}, captured {differences[True]:.1e}")
    for graph in (False, True):
        dist.barrier()
        one = rate(device, 1, options, graph) if rank == 0 else 0.0
        dist.barrier()
        two = rate(device, 2, options, graph)
        if rank == 0:
            name = "captured" if graph else "eager"
            print(f"{name}: {one:.1f} images a second on one, {two:.1f} on two, {two / one:.2f} times")
    dist.destroy_process_group()
    if max(differences.values()) > 1e-9:
        sys.exit(1)


def main() -> None:
    """Start both processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", type=int, nargs=3, default=(3, 224, 224), metavar=("C", "H", "W"))
    parser.add_argument("--batch", type=int, default=64, help="images of one process")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    options = parser.parse_args()
    if options.device == "cuda" and torch.cuda.device_count() < 2:
        parser.error(f"--device cuda needs two GPUs, found {torch.cuda.device_count()}; --device cpu tries it without")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(process, (options, port), nprocs=2)


if __name__ == "__main__":
    main()
