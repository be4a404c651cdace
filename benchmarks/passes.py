"""Reads and writes of full tensors in the second derivatives of layers: torch's, and ours without kernels.

    python benchmarks/passes.py

Counted are the tensors of the size of the input that the operations behind the gradient at the input gradient take and
give, in units of float32; views are free. Kernels of our own count by their formula: v, g and x (and, for batch
normalisation, twice, once for the sums) are read, both results written.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_locality.regularizer.double_backward import FastDoubleBackward

LAYERS = {
    "batch normalisation": nn.BatchNorm2d(8),
    "layer normalisation": nn.LayerNorm((8, 16, 16)),
    "group normalisation, 2 groups": nn.GroupNorm(2, 8),
    "ReLU": nn.ReLU(),
    "GELU": nn.GELU(),
    "GELU by tanh": nn.GELU(approximate="tanh"),
    "SiLU": nn.SiLU(),
}


class Passes(TorchDispatchMode):
    """Counts full tensors."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        """Count and pass on."""
        out = func(*args, **(kwargs or {}))
        made = "empty" in func.__name__
        if not (func.is_view or made):
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.count += sum(t.numel() == self.size for t in tensors)
        return out


def main() -> None:
    """Count and print."""
    torch.manual_seed(0)
    print(f"{'layer':20} torch  ours")
    for name, layer in LAYERS.items():
        counts = []
        for fast in (False, True):
            x, g, v = (torch.randn(4, 8, 16, 16, requires_grad=True) for _ in range(3))
            with FastDoubleBackward() if fast else nullcontext():
                out = layer(x)
            (u,) = torch.autograd.grad(out, x, g, create_graph=True)
            weights = [p for key, p in layer.named_parameters() if key == "weight"]
            with Passes(x.numel()) as passes:
                torch.autograd.grad(u, [x, g, *weights], v, allow_unused=True)
            counts.append(passes.count)
        print(f"{name:20} {counts[0]:5} {counts[1]:5}")


if __name__ == "__main__":
    main()
