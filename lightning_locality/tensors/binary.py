"""Products over many modes of size 2, by matrix products of logarithms."""

from __future__ import annotations

__all__ = ["binary_products"]

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def binary_products(bits: Tensor, weights: Tensor) -> Tensor:
    r"""Products of one of two weights per mode, for every sample and component.

    .. math:: P_{br} = \prod_n w_{n,\, x_{bn},\, r} = (-1)^{s_{br}}\, [z_{br} = 0]\;
        e^{\sum_n \log|w_{n0r}| + \sum_n x_{bn} \log|w_{n1r} / w_{n0r}|}

    with s the number of negative weights and z the number of zeros met, which are matrix products with x as well.
    Nothing overflows or underflows whose result does not, the derivatives included, also those at weights that are
    exactly zero. Rounding errors are those of the logarithm: relative errors of the products of some units in the
    last place times :math:`\max(1, |\log P|)`.

    Args:
        bits: ``(B, N)`` zeros and ones, of any integer type, boolean, or of the weights' type already.
        weights: ``(N, 2, R)``.

    Returns:
        ``(B, R)``, once differentiable in the weights.

    Example:
        >>> weights = torch.tensor([[[2.0], [-3.0]], [[5.0], [7.0]]])
        >>> binary_products(torch.tensor([[0, 0], [1, 1]]), weights).flatten().round().tolist()
        [10.0, -21.0]
    """
    return cast(Tensor, _BinaryProducts.apply(bits, weights))


class _BinaryProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bits: Tensor, weights: Tensor) -> Tensor:
        zero = weights == 0
        # on a GPU asking costs more than counting: the host would wait for the device
        has_zero, has_negative = (
            (True, True) if weights.is_cuda else torch.stack([zero.any(), (weights < 0).any()]).tolist()
        )
        logs = torch.where(zero, 1.0, weights).abs().log() if has_zero else weights.abs().log()
        counted = [logs[:, 1] - logs[:, 0]]
        if has_negative:
            negative = (weights < 0).to(weights.dtype)
            counted.append(negative[:, 1] - negative[:, 0])
        if has_zero:
            counted.append((zero[:, 1] ^ zero[:, 0]).to(weights.dtype) * torch.where(zero[:, 1], 1.0, -1.0))
        # one reading of the bits for all of them
        counts = torch.cat(counted, 1)
        sums = torch.cat([block.to(counts) @ counts for block in _blocks(bits)]).chunk(len(counted), 1)
        # the part common to all samples may be large and cancel: in double precision
        log_products = (logs[:, 0].sum(0, dtype=torch.float64) + sums[0]).to(weights.dtype)
        sign = torch.ones_like(log_products)
        if has_negative:
            sign = 1.0 - 2.0 * (negative[:, 0].sum(0) + sums[1]).remainder(2.0)
        zeros = zero[:, 0].sum(0) + sums[-1] if has_zero else None
        ctx.save_for_backward(bits, weights, logs, log_products, sign, zeros)
        products = sign * log_products.exp()
        return products if zeros is None else torch.where(zeros == 0, products, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        bits, weights, logs, log_products, sign, zeros = ctx.saved_tensors
        # powers relative to the largest product: P / w may be an ordinary number where P is none
        largest = log_products.amax(0)
        share = gradient * sign * (log_products - largest).exp()
        factor = torch.where(weights < 0, -1.0, 1.0) * (largest - logs).exp()
        if zeros is None:
            return None, _sums_by_bit(bits, share) * factor
        # a derivative at a weight that is zero: over the samples that meet no other zero
        met = torch.cat([torch.where(zeros == count, share, 0.0) for count in (0, 1)], 1)
        without, with_one = _sums_by_bit(bits, met).chunk(2, 2)
        return None, torch.where(weights == 0, with_one, without) * factor


def _blocks(values: Tensor) -> tuple[Tensor, ...]:
    """Samples a few at a time, so that what is made of them stays in the processor's cache; on a GPU all at once."""
    return (values,) if values.is_cuda else torch.split(values, 256)


def _sums_by_bit(bits: Tensor, values: Tensor) -> Tensor:
    """Sums of values ``(B, R)`` over the samples with bit 0, and with bit 1, of every mode: ``(N, 2, R)``."""
    sums = values.new_zeros(2, values.shape[1], bits.shape[1])
    for block, part in zip(_blocks(bits), _blocks(values), strict=True):
        ones = block.to(values)
        # the zeros by themselves, not the sum of all less that over the ones: it would leave rounding errors
        sums[0].addmm_(part.T, 1.0 - ones)
        sums[1].addmm_(part.T, ones)
    return sums.permute(2, 0, 1)
