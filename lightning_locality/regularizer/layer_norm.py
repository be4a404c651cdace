"""Layer normalisation that is twice differentiable in few passes.

Legend: g gradient at the output, h the same times the weight, v gradient of the loss at the input gradient.
"""

from __future__ import annotations

__all__: list[str] = []

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_locality.regularizer.batch_norm import (
    are_fusable,
    are_plain,
    fused_kernels,
    normalization_by_parts,
    those_needed,
)

_LONGEST_ROW = 8192


class _LayerNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list[int], eps: float
    ) -> Tensor:
        out, mean, rstd = torch.ops.aten.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.shape, ctx.eps, ctx.has_bias = shape, eps, bias is not None
        return cast("Tensor", out)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _LayerNormBackward.apply(g, *ctx.saved_tensors, ctx.shape, ctx.eps)
        return *those_needed(ctx, gradients), None, None


class _LayerNormBackward(Function):
    r"""``σ (h - mean(h) - x_hat mean(h x_hat))``, and the sums of ``g x_hat`` and ``g`` over the rows."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, shape: list[int], eps: float
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(g, x, weight, mean, rstd)
        ctx.shape, ctx.eps = shape, eps
        ctx.set_materialize_grads(False)
        has = weight is not None
        # of the bias its shape alone counts
        gradients = torch.ops.aten.native_layer_norm_backward(
            g.contiguous(), x, shape, mean, rstd, weight, weight, [True, has, has]
        )
        return tuple(gradients)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, v_weight: Tensor | None, v_bias: Tensor | None) -> tuple[Any, ...]:
        if v is None and v_weight is None and v_bias is None:
            return (None,) * 7
        g, x, weight, mean, rstd = ctx.saved_tensors
        axes = [*range(-len(ctx.shape), 0)]
        if torch.is_grad_enabled() or v_weight is not None or v_bias is not None:
            vectors = (v, v_weight, v_bias)
            return *normalization_by_parts(g, x, weight, ctx.eps, vectors, axes), *(None,) * 4
        assert v is not None
        if are_fusable(x) and rstd.numel() * _LONGEST_ROW >= x.numel():
            return (*fused_kernels().layer_norm_double_backward(v, g, x, weight, mean, rstd), *(None,) * 4)
        exact = torch.promote_types(x.dtype, torch.float32)
        # linear and symmetric in h: its derivative with respect to h applied to v is the same map of v
        grad_h = torch.ops.aten.native_layer_norm_backward(
            v.contiguous(), x, ctx.shape, mean, rstd, None, None, [True, False, False]
        )[0].to(exact)
        of_weight = None if weight is None else (grad_h * g).sum([*range(x.dim() - len(ctx.shape))]).to(weight.dtype)
        grad_g = grad_h if weight is None else grad_h * weight
        v, g, x_hat = v.to(exact), g.to(exact), (x.to(exact) - mean) * rstd
        h = g if weight is None else g * weight
        mean_v, mean_h = v.mean(axes, True), h.mean(axes, True)
        mean_vx, mean_hx = (v * x_hat).mean(axes, True), (h * x_hat).mean(axes, True)
        inner = (v * h).mean(axes, True) - mean_v * mean_h - 3 * mean_vx * mean_hx
        grad_x = x_hat.mul_(inner).addcmul_(v - mean_v, mean_hx).addcmul_(h - mean_h, mean_vx).mul_(-rstd.square())
        return grad_g.to(g.dtype), grad_x.to(x.dtype), of_weight, None, None, None, None


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    """Layer normalisation, or None if torch should do it."""
    shape, device = list(normalized_shape), input.device.type
    if torch.is_autocast_enabled(device):
        if device != "cuda":
            return None
        # as autocast does there
        short = (t if t is None or t.dtype is torch.float64 else t.float() for t in (input, weight, bias))
        input, weight, bias = cast("tuple[Tensor, Tensor | None, Tensor | None]", tuple(short))
    fits = list(input.shape[-len(shape) :]) == shape and (weight is None) <= (bias is None)
    kinds = {t.dtype for t in (input, weight, bias) if t is not None}
    if not (are_plain(input, weight, bias) and fits and len(kinds) == 1):
        return None
    return cast("Tensor", _LayerNorm.apply(input, weight, bias, shape, eps))
