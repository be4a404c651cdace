"""Activations with second derivatives of one pass.

Legend: g gradient at the output, v gradient of the loss at the input gradient.
"""

from __future__ import annotations

__all__: list[str] = []

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from lightning_locality.regularizer.batch_norm import alias, are_fusable, are_plain, fused_kernels


class _ReLU(Function):
    """Torch's second derivative makes a tensor of zeros and adds it; here there is none.

    After a fused batch normalisation that has no other use, that one sets the gradients to zero (``masked``).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool, masked: bool) -> Tensor:
        out = torch.relu_(x) if inplace else torch.relu(x)
        if inplace:
            ctx.mark_dirty(x)
        if not masked:
            ctx.save_for_backward(out)
        ctx.masked = masked
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return None, None, None
        return g if ctx.masked else _ReLUBackward.apply(g, *ctx.saved_tensors), None, None


class _ReLUBackward(Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, out: Tensor) -> Tensor:
        ctx.save_for_backward(out)
        return cast("Tensor", torch.ops.aten.threshold_backward(g, out, 0))

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        return _ReLUBackward.apply(v, *ctx.saved_tensors), None


def relu(fresh: Tensor | None, input: Tensor, inplace: bool = False) -> Tensor | None:
    if not (are_plain(input) and input.requires_grad):
        return None
    # in place, a normalisation's output has no other use
    node: Any = input.grad_fn
    masked = inplace and input is fresh and hasattr(node, "masked")
    if masked:
        node.masked = True
    return cast("Tensor", _ReLU.apply(input, inplace, masked))


# also the numbers by which the kernel knows them
SMOOTH: dict[Any, int] = {F.gelu: 0, F.silu: 2}
_GELU_TANH = 1


def _function(x: Tensor, kind: int) -> Tensor:
    return F.silu(x) if kind == SMOOTH[F.silu] else F.gelu(x, approximate="tanh" if kind == _GELU_TANH else "none")


class _Smooth(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kind = kind
        return _function(x, kind)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return _SmoothBackward.apply(g, *ctx.saved_tensors, ctx.kind), None


class _SmoothBackward(Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, kind: int) -> Tensor:
        ctx.save_for_backward(g, x)
        ctx.kind = kind
        if kind == SMOOTH[F.silu]:
            return cast("Tensor", torch.ops.aten.silu_backward(g, x))
        approximate = "tanh" if kind == _GELU_TANH else "none"
        return cast("Tensor", torch.ops.aten.gelu_backward(g, x, approximate=approximate))

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        g, x = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return *fused_kernels().smooth_double_backward(v, g, x, ctx.kind), None
        # for a model that differentiates inside
        g, x = alias(g, higher=True), alias(x, higher=True)
        (u,) = torch.autograd.grad(_function(x, ctx.kind), x, g, create_graph=True)
        return *torch.autograd.grad(u, (g, x), v, create_graph=True), None


def smooth(func: Any, input: Tensor, inplace: bool = False, approximate: str = "none") -> Tensor | None:
    """GELU or SiLU, or None where torch does it: without kernels it takes no more passes (benchmarks/passes.py)."""
    known = approximate in ("none", "tanh") and are_plain(input) and input.requires_grad
    if not (known and are_fusable(input)):
        return None
    kind = _GELU_TANH if approximate == "tanh" else SMOOTH[func]
    out = cast("Tensor", _Smooth.apply(input.clone() if inplace else input, kind))
    return input.copy_(out) if inplace else out
