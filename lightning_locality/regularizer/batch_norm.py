"""Batch normalisation in training that is twice differentiable at the usual cost.

Legend: n numbers per channel, g gradient at a layer's output, v gradient of the loss at the layer's input gradient.
"""

from __future__ import annotations

__all__: list[str] = []

import os
import warnings
from collections.abc import Sequence
from contextvars import ContextVar
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad


def fused_kernels() -> Any:
    from lightning_locality.regularizer import fused

    return fused


@cache
def _kernels_run(device: torch.device) -> bool:
    """Whether Triton can build kernels, which takes a C compiler, and run them; or its interpreter, for tests."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    try:
        x, one = torch.zeros(2, 1, 2, 2, device=device), torch.ones(1, device=device)
        fused_kernels().batch_norm(x.float(), one.float(), one.float(), None, 0.1, 1e-5)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(f"the term runs without Triton's kernels, equal but slower: {reason}", stacklevel=2)
        return False
    return True


# Triton takes the processor several times longer to launch a kernel than torch, and batch normalisation takes more
# kernels here; small tensors repay that only in a step that is captured. An eager ResNet-18 took 71 ms without these
# kernels and 104 to 130 with them (H100, 64 images of 150x150 pixels).
launches_cost_nothing = ContextVar("launches_cost_nothing", default=False)
_WORTH_LAUNCHES = 2**22


def are_fusable(x: Tensor, *others: Tensor | None) -> bool:
    """Whether Triton's kernels take these tensors, all of one device, of which only ``x`` may be of a short type."""
    # the kernels count in 32 bits, which takes a fraction of the instructions
    short = x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.numel() < 2**30
    return short and all(t is None or t.dtype is torch.float32 for t in others) and _kernels_run(x.device)


class _BatchNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]) -> Tensor:
        mean, var, momentum, eps = options
        out, mean, rstd, reserve, kind = torch.ops.aten._batch_norm_impl_index(
            x, weight, bias, mean, var, True, momentum, eps, torch.backends.cudnn.enabled
        )
        ctx.save_for_backward(x, weight, mean, rstd, reserve)
        ctx.kind, ctx.eps = kind, eps
        return cast("Tensor", out)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _BatchNormBackward.apply(g, *ctx.saved_tensors, ctx.kind, ctx.eps)
        return *those_needed(ctx, gradients), None


def _batch_norm_backward(g: Tensor, saved: Sequence[Tensor], kind: int, eps: float) -> Any:
    """Input gradient, and the sums of ``g x_hat`` and ``g`` per channel."""
    x, weight, mean, rstd, reserve = saved
    return torch.ops.aten._batch_norm_impl_index_backward(
        kind, x, g, weight, None, None, mean, rstd, True, eps, [True, True, True], reserve
    )


class _BatchNormBackward(Function):
    r"""``γ σ (g - mean(g) - x_hat mean(g x_hat))`` and its derivatives with respect to ``g``, ``x`` and ``γ``."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, *saved_kind_eps: Any) -> tuple[Tensor, Tensor, Tensor]:
        *saved, kind, eps = saved_kind_eps
        grad_x, sum_gx, sum_g = _batch_norm_backward(g, saved, kind, eps)
        ctx.save_for_backward(g, *saved, sum_gx, sum_g)
        ctx.kind, ctx.eps = kind, eps
        ctx.set_materialize_grads(False)
        return grad_x, sum_gx, sum_g

    @staticmethod
    def backward(
        ctx: Any, v: Tensor | None, v_weight: Tensor | None, v_bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if v is None and v_weight is None and v_bias is None:
            return (None,) * 8
        if torch.is_grad_enabled() or v_weight is not None or v_bias is not None:
            g, x, weight = ctx.saved_tensors[:3]
            axes = (0, *range(2, x.dim()))
            return *normalization_by_parts(g, x, weight, ctx.eps, (v, v_weight, v_bias), axes), *(None,) * 5
        assert v is not None
        g, *saved, sum_gx, sum_g = ctx.saved_tensors
        x, weight, mean, rstd, _ = saved
        # linear and symmetric in g: its derivative with respect to g applied to v is the same map of v
        grad_g, sum_vx, sum_v = _batch_norm_backward(v, saved, ctx.kind, ctx.eps)
        accumulate = torch.promote_types(x.dtype, torch.float32)
        weight_, mean, rstd, sum_gx, sum_g, sum_vx, sum_v = (
            t.to(accumulate) for t in (weight, mean, rstd, sum_gx, sum_g, sum_vx, sum_v)
        )
        n = x.numel() // x.shape[1]
        zero, one = torch.zeros_like(mean), torch.ones_like(mean)
        # sum(v g) per channel: the weight gradient of a normalisation with mean 0 and deviation 1, one fused pass
        sum_vg = torch.ops.aten.native_batch_norm_backward(
            g, v, one, None, None, zero, one, True, 0.0, [False, True, True]
        )[1].to(accumulate)
        inner = sum_vg - sum_v * sum_g / n - sum_vx * sum_gx / n
        # grad_x = -γ σ² [inner x_hat + sum_gx (v - mean v - x_hat mean(v x_hat)) + sum_vx (the same of g)] / n,
        # collected as a x + b v + c g + d with one number per channel each
        scale = weight_ * rstd.square() / n
        a = scale * rstd * (2 * sum_vx * sum_gx / n - inner)
        b, c = -scale * sum_gx, -scale * sum_vx
        d = -a * mean - (b * sum_v + c * sum_g) / n
        a, b, c, d = (number.reshape(-1, *[1] * (x.dim() - 2)) for number in (a, b, c, d))
        grad_x = torch.addcmul(d, x, a).addcmul_(v, b).addcmul_(g, c).to(x.dtype)
        return grad_g, grad_x, (inner * rstd).to(weight.dtype), None, None, None, None, None


class _FusedBatchNorm(Function):
    """Kernels of our own for what :class:`_BatchNorm` does; ``ctx.masked`` once a ReLU is known to follow.

    The second output is x for the second derivatives, so that the gradient they send there arrives here and is added
    within the kernel.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, options: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        mean, var, momentum, eps = options
        running = None if mean is None or var is None else (mean, var)
        out, numbers = fused_kernels().batch_norm(x, weight, bias, running, momentum, eps)
        same = x.view_as(x)
        ctx.save_for_backward(same, weight, numbers)
        ctx.masked, ctx.eps = False, eps
        ctx.set_materialize_grads(False)
        return out, same

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, by_x: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return by_x, None, None, None
        gradients = _FusedBatchNormBackward.apply(g, *ctx.saved_tensors, by_x, ctx.masked, ctx.eps)
        return *those_needed(ctx, gradients), None


class _FusedBatchNormBackward(Function):
    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor, numbers: Tensor, by_x: Tensor | None, masked: bool, eps: float
    ) -> tuple[Tensor, ...]:
        grad_x, sum_gx, sum_g = fused_kernels().batch_norm_backward(g, x, weight, numbers, masked, by_x)
        ctx.save_for_backward(g, x, weight, numbers, sum_gx, sum_g)
        ctx.added, ctx.masked, ctx.eps = by_x is not None, masked, eps
        ctx.set_materialize_grads(False)
        return grad_x, sum_gx.to(weight.dtype), sum_g.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, v_weight: Tensor | None, v_bias: Tensor | None) -> tuple[Any, ...]:
        if v is None and v_weight is None and v_bias is None:
            return (None,) * 7
        if torch.is_grad_enabled() or v_weight is not None or v_bias is not None:
            g, x, weight, numbers = ctx.saved_tensors[:4]
            scale, shift = (number.reshape(-1, *[1] * (x.dim() - 2)) for number in numbers[2:])
            mask = x * scale + shift > 0 if ctx.masked else None
            vectors, axes = (v, v_weight, v_bias), (0, *range(2, x.dim()))
            gradients = normalization_by_parts(g, x, weight, ctx.eps, vectors, axes, mask)
        else:
            gradients = fused_kernels().batch_norm_double_backward(v, *ctx.saved_tensors, ctx.masked)
        return *gradients, None, v if ctx.added else None, None, None


def alias(tensor: Tensor, higher: bool) -> Tensor:
    """The tensor under another name, for partial derivatives: others may depend on it; ``higher``: with its graph."""
    return tensor.view_as(tensor) if higher and tensor.requires_grad else tensor.detach().requires_grad_()


def normalization_by_parts(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    vectors: Sequence[Tensor | None],
    axes: Sequence[int],
    mask: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Differentiate the gradients of a normalisation over some axes to any order, those of its parameters included.

    Slower than the closed formulas, and needed only by models that differentiate inside. ``vectors`` are the gradients
    at those of x, weight and bias; what is returned is at g, x and weight.
    """
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        g, x = alias(g, higher), alias(x, higher)
        own = [] if weight is None else [alias(weight, higher), torch.zeros_like(weight, requires_grad=True)]
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(exact, list(axes), correction=0, keepdim=True)
        out = (exact - mean) * (variance + eps).rsqrt()
        if own:
            # of batch normalisation, whose axes leave out the channels, one number for each mean
            scale, shift = (t.view_as(mean) if 0 in axes else t for t in own)
            out = out * scale + shift
        masked = g if mask is None else g * mask
        gradients = torch.autograd.grad(out.to(g.dtype), (x, *own), masked, create_graph=True)
        used = [(gradient, v) for gradient, v in zip(gradients, vectors, strict=False) if v is not None]
        outputs, by = [gradient for gradient, _ in used], [v for _, v in used]
        found = torch.autograd.grad(outputs, (g, x, *own[:1]), by, create_graph=higher, allow_unused=True)
    return found if own else (*found, None)


def those_needed(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of the first inputs of a Function, None for an input that needs none."""
    pairs = zip(gradients, ctx.needs_input_grad[: len(gradients)], strict=True)
    return tuple(gradient if need else None for gradient, need in pairs)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    # one value per channel is an error that torch explains well
    several = input.dim() >= 2 and input.numel() > input.shape[1]
    if not (training and several and weight is not None and are_plain(input, weight, bias)):
        return None
    options = running_mean, running_var, momentum, eps
    worth = bias is not None and (launches_cost_nothing.get() or input.numel() >= _WORTH_LAUNCHES)
    if worth and are_fusable(input, weight, bias, running_mean, running_var):
        return cast("Tensor", _FusedBatchNorm.apply(input, weight, bias, options)[0])
    return cast("Tensor", _BatchNorm.apply(input, weight, bias, options))


def are_plain(*tensors: Tensor | None) -> bool:
    plain = all(t is None or (type(t) in (Tensor, nn.Parameter) and t.is_floating_point()) for t in tensors)
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return plain and torch.is_grad_enabled() and not transformed
