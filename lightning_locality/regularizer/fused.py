"""Second derivative of batch normalisation on a GPU in three kernels: sums, numbers per channel, one pass.

Legend: n numbers per channel, g gradient at the output, v gradient of the loss at the input gradient, C channels.
"""

from __future__ import annotations

__all__: list[str] = []

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST_BLOCKS = 512


@triton.jit
def _sums(x, v, g, mean, sums, rows, inner, channels, rows_per_block, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Partial sums ``(3, blocks, C)`` of v, v (x - mean) and v g; x, v, g each read once."""
    block = tl.program_id(0)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    known = c < channels
    center = tl.load(mean + c, known, 0.0)
    sum_v = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_vx = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_vg = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rows_per_block, ROWS):
        row = block * rows_per_block + start + tl.arange(0, ROWS)
        inside = (start + tl.arange(0, ROWS) < rows_per_block) & (row < rows)
        row = row.to(tl.int64)
        at = (row // inner * channels * inner + row % inner)[:, None] + (c * inner)[None, :]
        mask = inside[:, None] & known[None, :]
        vs = tl.load(v + at, mask, 0.0).to(tl.float32)
        sum_v += vs
        sum_vx += vs * (tl.load(x + at, mask, 0.0).to(tl.float32) - center[None, :])
        sum_vg += vs * tl.load(g + at, mask, 0.0).to(tl.float32)
    size = tl.num_programs(0) * channels
    at = block * channels + c
    tl.store(sums + at, tl.sum(sum_v, 0), known)
    tl.store(sums + size + at, tl.sum(sum_vx, 0), known)
    tl.store(sums + 2 * size + at, tl.sum(sum_vg, 0), known)


@triton.jit
def _numbers(sums, weight, mean, rstd, sum_gx, sum_g, numbers, n, blocks, channels, BLOCKS: tl.constexpr):
    """Per channel a, b, c, d, p, q, r with grad_x = a x + b v + c g + d and grad_g = p v + q x + r, and grad_weight."""
    channel = tl.program_id(0)
    block = tl.arange(0, BLOCKS)
    at = block * channels + channel
    size = blocks * channels
    sum_v = tl.sum(tl.load(sums + at, block < blocks, 0.0), 0)
    sum_vx = tl.sum(tl.load(sums + size + at, block < blocks, 0.0), 0)
    sum_vg = tl.sum(tl.load(sums + 2 * size + at, block < blocks, 0.0), 0)
    gamma = tl.load(weight + channel).to(tl.float32)
    center = tl.load(mean + channel)
    scale = tl.load(rstd + channel)
    gx = tl.load(sum_gx + channel).to(tl.float32)
    gs = tl.load(sum_g + channel).to(tl.float32)
    sum_vx *= scale
    within = sum_vg - sum_v * gs / n - sum_vx * gx / n
    factor = gamma * scale * scale / n
    a = factor * scale * (2 * sum_vx * gx / n - within)
    b = -factor * gx
    c = -factor * sum_vx
    p = gamma * scale
    q = -factor * sum_vx
    tl.store(numbers + channel, a)
    tl.store(numbers + channels + channel, b)
    tl.store(numbers + 2 * channels + channel, c)
    tl.store(numbers + 3 * channels + channel, -a * center - (b * sum_v + c * gs) / n)
    tl.store(numbers + 4 * channels + channel, p)
    tl.store(numbers + 5 * channels + channel, q)
    tl.store(numbers + 6 * channels + channel, -p * sum_v / n - q * center)
    tl.store(numbers + 7 * channels + channel, within * scale)


@triton.jit
def _apply(x, v, g, numbers, grad_x, grad_g, size, inner, channels, SIZE: tl.constexpr):
    """grad_x and grad_g; x, v, g each read once, both written once."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = at < size
    channel = at // inner % channels
    xs = tl.load(x + at, mask, 0.0).to(tl.float32)
    vs = tl.load(v + at, mask, 0.0).to(tl.float32)
    gs = tl.load(g + at, mask, 0.0).to(tl.float32)
    a = tl.load(numbers + channel, mask, 0.0)
    b = tl.load(numbers + channels + channel, mask, 0.0)
    c = tl.load(numbers + 2 * channels + channel, mask, 0.0)
    d = tl.load(numbers + 3 * channels + channel, mask, 0.0)
    tl.store(grad_x + at, a * xs + b * vs + c * gs + d, mask)
    p = tl.load(numbers + 4 * channels + channel, mask, 0.0)
    q = tl.load(numbers + 5 * channels + channel, mask, 0.0)
    r = tl.load(numbers + 6 * channels + channel, mask, 0.0)
    tl.store(grad_g + at, p * vs + q * xs + r, mask)


def batch_norm_double_backward(
    v: Tensor, g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, sum_gx: Tensor, sum_g: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to g, x and the weight, of the input gradient ``γ σ (g - mean(g) - x_hat mean(g x_hat))``.

    x, v, g ``(B, C, ...)`` of the same type, float32 or shorter; the rest ``(C,)``. Sums and numbers are float32.
    """
    last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    x, v, g = (t.contiguous(memory_format=layout) for t in (x, v, g))
    channels, rows = x.shape[1], x.numel() // x.shape[1]
    inner = 1 if last else rows // len(x)
    columns = min(64, triton.next_power_of_2(channels)) if inner == 1 else 1
    height = 1024 // columns
    across = triton.cdiv(channels, columns)
    blocks = max(1, min(_MOST_BLOCKS, triton.cdiv(rows, 4 * height), triton.cdiv(2048, across)))
    rows_per_block = triton.cdiv(triton.cdiv(rows, blocks), height) * height
    blocks = triton.cdiv(rows, rows_per_block)
    sums = torch.empty(3, blocks, channels, device=x.device)
    numbers = torch.empty(8, channels, device=x.device)
    _sums[blocks, across](x, v, g, mean, sums, rows, inner, channels, rows_per_block, ROWS=height, COLUMNS=columns)
    _numbers[(channels,)](
        sums, weight, mean, rstd, sum_gx, sum_g, numbers, float(rows), blocks, channels,
        BLOCKS=triton.next_power_of_2(blocks),
    )  # fmt: skip
    grad_x, grad_g = torch.empty_like(x), torch.empty_like(x)
    _apply[(triton.cdiv(x.numel(), 1024),)](x, v, g, numbers, grad_x, grad_g, x.numel(), inner, channels, SIZE=1024)
    return grad_g, grad_x, numbers[7].to(weight.dtype)
