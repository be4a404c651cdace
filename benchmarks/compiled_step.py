"""Can torch.compile take a whole step with the term? A small network, the two ways there are, against the eager step.

    python benchmarks/compiled_step.py

dynamo     torch.compile of a step that calls torch.autograd.grad, with torch._dynamo.config.trace_autograd_ops
make_fx    the step traced to a graph of operations, and that graph compiled

Prints, for each, the seconds of the first call, the milliseconds of later ones, and the relative difference of the
gradients in the norm.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

Step = Callable[..., tuple[Tensor, ...]]


def network() -> nn.Sequential:
    """Two convolutions with batch normalisation."""
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False)]
    return nn.Sequential(*layers, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 1))


def main() -> None:
    """Compare and print."""
    torch.manual_seed(0)
    net, first, second = network(), torch.rand(8, 3, 16, 16), torch.rand(8, 3, 16, 16)
    y = torch.randint(2, (8,)).float()
    names, count = [name for name, _ in net.named_parameters()], len(list(net.parameters()))
    buffers = dict(net.named_buffers())

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        """Gradients of loss and term, the published way, in parameters, buffers and both batches."""
        state = dict(zip([*names, *buffers], tensors, strict=False))
        units, loss = [], None
        for images in tensors[-2:]:
            out = functional_call(net, state, (images,))
            loss = F.binary_cross_entropy_with_logits(out[:, 0], y) if loss is None else loss
            (gradient,) = torch.autograd.grad(out.sum(), images, create_graph=True)
            units.append(F.normalize(gradient[:, :, :4, :4].flatten(1), dim=1))
        return torch.autograd.grad(loss + (units[0] * units[1]).sum(1).abs().mean(), tensors[:count])

    def inputs() -> list[Tensor]:
        """Fresh leaves: a step changes the buffers."""
        parameters = [p.detach().clone().requires_grad_() for p in net.parameters()]
        batches = [t.clone().requires_grad_() for t in (first, second)]
        return [*parameters, *(b.clone() for b in buffers.values()), *batches]

    def traced() -> Step:
        """The graph, compiled; it holds the derivatives, so that its inputs need none."""
        compiled = torch.compile(make_fx(step)(*inputs()))
        return lambda *tensors: compiled(*(t.detach() for t in tensors))

    expected = step(*inputs())
    torch._dynamo.config.trace_autograd_ops = True
    ways: dict[str, Callable[[], Step]] = {"eager": lambda: step, "dynamo": lambda: torch.compile(step, fullgraph=True)}
    for name, build in (ways | {"make_fx": traced}).items():
        clock = time.perf_counter()
        compiled = build()
        found = compiled(*inputs())
        start, times = time.perf_counter() - clock, []
        for _ in range(20):
            given, clock = inputs(), time.perf_counter()
            compiled(*given)
            times.append(time.perf_counter() - clock)
        error = torch.stack([(a - b).norm() for a, b in zip(found, expected, strict=True)]).norm()
        norm = torch.stack([b.norm() for b in expected]).norm()
        print(
            f"{name:8} {start:6.1f} s {1e3 * statistics.median(times):7.2f} ms   difference {float(error / norm):.1e}"
        )


if __name__ == "__main__":
    main()
