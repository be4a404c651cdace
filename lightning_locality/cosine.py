"""Absolute cosine of two gradients on a mask, right for gradients of any size.

Legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

__all__ = ["AbsoluteCosine"]

from typing import Any, final

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


@final
class AbsoluteCosine(Function):
    """Absolute cosine ``(B,)`` of two gradients ``(B, C, H, W)`` on a mask; 0 with zero gradient where one vanishes.

    Each gradient is divided by its largest entry first, so that the value is right down to denormal numbers. Its
    own gradient, which grows as one over their size, is set to zero before it could overflow (1e-31 in float32).

    >>> u, v = torch.tensor([3e-40, 4e-40]), torch.tensor([4e20, 3e20])
    >>> AbsoluteCosine.apply(u.reshape(1, 1, 1, 2), v.reshape(1, 1, 1, 2), torch.ones(1, 1, 1, 2, dtype=torch.bool))
    tensor([0.9600])
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Cosines ``(B,)`` of ``u`` and ``v`` ``(B, C, H, W)`` on ``mask`` ``(1 or B, 1, H, W)``."""
        unit_u, norm_u, zero_u = _normalized(u, mask)
        unit_v, norm_v, zero_v = _normalized(v, mask)
        cosine = (unit_u * unit_v).sum((1, 2, 3), keepdim=True).masked_fill(zero_u | zero_v, 0.0)
        ctx.save_for_backward(u, v, mask, norm_u, norm_v, cosine)
        return cosine.abs().flatten()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients by ``u`` and ``v``."""
        u, v, mask, norm_u, norm_v, cosine = ctx.saved_tensors
        (unit_u, _, _), (unit_v, _, _) = _normalized(u, mask), _normalized(v, mask)
        number = torch.finfo(cosine.dtype)
        floor = number.tiny / number.eps
        factor = gradient.view_as(cosine) * cosine.sign()
        factor = factor.masked_fill((norm_u < floor) | (norm_v < floor), 0.0)
        by_u = (unit_v - cosine * unit_u) * (factor / norm_u.clamp(min=floor))
        by_v = (unit_u - cosine * unit_v) * (factor / norm_v.clamp(min=floor))
        return by_u.to(u.dtype), by_v.to(v.dtype), None


def _normalized(u: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Masked and divided by its norm, the norm, and where that is zero; in float32 at least."""
    masked = u.to(torch.promote_types(u.dtype, torch.float32)) * mask
    largest = masked.abs().amax((1, 2, 3), keepdim=True)
    zero = largest == 0
    masked = masked / largest.masked_fill(zero, 1.0)
    norm = masked.square().sum((1, 2, 3), keepdim=True).sqrt()
    return masked / norm.masked_fill(zero, 1.0), norm * largest, zero
