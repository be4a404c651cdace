"""Batch normalisation, and derivatives of other layers, as Triton kernels.

Every tensor of full size is read and written as often as the formulas demand, once per kernel, in its own type; sums
and numbers per channel are float32. The eager twins are beside what calls them.

Legend: x input, g gradient at the output, v gradient of the loss at the input gradient, n numbers per channel, C
channels. A tensor is addressed as rows x C with ``inner`` rows beside each other in memory: 1 if channels come last.
"""

from __future__ import annotations

__all__: list[str] = []

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
Pair = tuple[int, int]
_ELEMENTS = 1024


@triton.jit
def _at(row, c, inner, channels):
    """Where the numbers of these rows and channels lie in memory."""
    return (row // inner * channels * inner + row % inner)[:, None] + (c * inner)[None, :]


@triton.jit
def _sums(x, u, g, center, affine, sums, rows, inner, channels, rows_per_block, WHAT: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip  # noqa: E501
    """Partial sums ``(2 or 3, blocks, C)``.

    WHAT 0: of x - center and its square, and, third, the center, here the mean of the first rows, so that squares do
    not cancel; 1: of g and g (x - center), u being g; 2: of v, v (x - center) and v g, u being v. MASKED: g counts
    where the affine map of x is positive.
    """
    block = tl.program_id(0)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    known = c < channels
    if WHAT == 0:
        row = tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & known[None, :]
        middle = tl.sum(tl.load(x + _at(row, c, inner, channels), mask, 0.0).to(tl.float32), 0) / tl.minimum(rows, ROWS)
    else:
        middle = tl.load(center + c, known, 0.0)
    if MASKED:
        scale = tl.load(affine + c, known, 0.0)
        shift = tl.load(affine + channels + c, known, 0.0)
    first = tl.zeros((ROWS, COLUMNS), tl.float32)
    second = tl.zeros((ROWS, COLUMNS), tl.float32)
    third = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rows_per_block, ROWS):
        row = block * rows_per_block + start + tl.arange(0, ROWS)
        at = _at(row, c, inner, channels)
        mask = (row < rows)[:, None] & known[None, :]
        xs = tl.load(x + at, mask, 0.0).to(tl.float32)
        if WHAT == 0:
            centred = tl.where(mask, xs - middle[None, :], 0.0)
            first += centred
            second += centred * centred
        else:
            us = tl.load(u + at, mask, 0.0).to(tl.float32)
            if WHAT == 1:
                if MASKED:
                    us = tl.where(xs * scale[None, :] + shift[None, :] > 0, us, 0.0)
            else:
                gs = tl.load(g + at, mask, 0.0).to(tl.float32)
                if MASKED:
                    gs = tl.where(xs * scale[None, :] + shift[None, :] > 0, gs, 0.0)
                third += us * gs
            first += us
            second += us * (xs - middle[None, :])
    size = tl.num_programs(0) * channels
    at = block * channels + c
    tl.store(sums + at, tl.sum(first, 0), known)
    tl.store(sums + size + at, tl.sum(second, 0), known)
    if WHAT == 0:
        tl.store(sums + 2 * size + at, middle, known)
    if WHAT == 2:
        tl.store(sums + 2 * size + at, tl.sum(third, 0), known)


@triton.jit
def _normalization(sums, weight, bias, running_mean, running_var, out, n, momentum, eps, blocks, channels, TRACKED: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip  # noqa: E501
    """Mean, 1 / deviation, scale and shift per channel ``(4, C)``; the running statistics are updated."""
    channel = tl.program_id(0)
    block = tl.arange(0, BLOCKS)
    at = block * channels + channel
    first = tl.sum(tl.load(sums + at, block < blocks, 0.0), 0) / n
    second = tl.sum(tl.load(sums + blocks * channels + at, block < blocks, 0.0), 0) / n
    mean = tl.load(sums + 2 * blocks * channels + channel) + first
    var = tl.maximum(second - first * first, 0.0)
    rstd = 1 / tl.sqrt(var + eps)
    scale = tl.load(weight + channel).to(tl.float32) * rstd
    tl.store(out + channel, mean)
    tl.store(out + channels + channel, rstd)
    tl.store(out + 2 * channels + channel, scale)
    tl.store(out + 3 * channels + channel, tl.load(bias + channel).to(tl.float32) - mean * scale)
    if TRACKED:
        old_mean, old_var = tl.load(running_mean + channel), tl.load(running_var + channel)
        tl.store(running_mean + channel, (1 - momentum) * old_mean + momentum * mean)
        tl.store(running_var + channel, (1 - momentum) * old_var + momentum * var * n / (n - 1))


@triton.jit
def _gradient_numbers(sums, weight, mean, rstd, out, n, blocks, channels, BLOCKS: tl.constexpr):
    """Per channel p, q, r with grad_x = p g + q x + r, and the sums of g x_hat and g: ``(5, C)``."""
    channel = tl.program_id(0)
    block = tl.arange(0, BLOCKS)
    at = block * channels + channel
    sum_g = tl.sum(tl.load(sums + at, block < blocks, 0.0), 0)
    center = tl.load(mean + channel)
    scale = tl.load(rstd + channel)
    sum_gx = tl.sum(tl.load(sums + blocks * channels + at, block < blocks, 0.0), 0) * scale
    p = tl.load(weight + channel).to(tl.float32) * scale
    q = -p * scale * sum_gx / n
    tl.store(out + channel, p)
    tl.store(out + channels + channel, q)
    tl.store(out + 2 * channels + channel, -p * sum_g / n - q * center)
    tl.store(out + 3 * channels + channel, sum_gx)
    tl.store(out + 4 * channels + channel, sum_g)


@triton.jit
def _second_numbers(sums, weight, mean, rstd, sum_gx, sum_g, out, n, blocks, channels, BLOCKS: tl.constexpr):
    """Per channel p, q, r, a, b, c, d with grad_g = p v + q x + r and grad_x = a x + b v + c g + d, and grad_weight."""
    channel = tl.program_id(0)
    block = tl.arange(0, BLOCKS)
    at = block * channels + channel
    size = blocks * channels
    center = tl.load(mean + channel)
    scale = tl.load(rstd + channel)
    gamma = tl.load(weight + channel).to(tl.float32)
    gx = tl.load(sum_gx + channel).to(tl.float32)
    gs = tl.load(sum_g + channel).to(tl.float32)
    sum_v = tl.sum(tl.load(sums + at, block < blocks, 0.0), 0)
    sum_vx = tl.sum(tl.load(sums + size + at, block < blocks, 0.0), 0) * scale
    sum_vg = tl.sum(tl.load(sums + 2 * size + at, block < blocks, 0.0), 0)
    within = sum_vg - sum_v * gs / n - sum_vx * gx / n
    factor = gamma * scale * scale / n
    p, q = gamma * scale, -factor * sum_vx
    a, b, c = factor * scale * (2 * sum_vx * gx / n - within), -factor * gx, -factor * sum_vx
    tl.store(out + channel, p)
    tl.store(out + channels + channel, q)
    tl.store(out + 2 * channels + channel, -p * sum_v / n - q * center)
    tl.store(out + 3 * channels + channel, a)
    tl.store(out + 4 * channels + channel, b)
    tl.store(out + 5 * channels + channel, c)
    tl.store(out + 6 * channels + channel, -a * center - (b * sum_v + c * gs) / n)
    tl.store(out + 7 * channels + channel, within * scale)


@triton.jit
def _apply(x, u, g, numbers, affine, first, second, rows, inner, channels, rows_per_block, WHAT: tl.constexpr, MASKED: tl.constexpr, ADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip  # noqa: E501
    """WHAT 0: first = scale x + shift; 1: first = grad_x, u being g; 2: first = grad_g, second = grad_x, u being v.

    ADDED: the last argument g of 1 is added to the result.
    """
    block = tl.program_id(0)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    known = c < channels
    if MASKED or WHAT == 0:
        scale = tl.load(affine + c, known, 0.0)[None, :]
        shift = tl.load(affine + channels + c, known, 0.0)[None, :]
    if WHAT > 0:
        p = tl.load(numbers + c, known, 0.0)[None, :]
        q = tl.load(numbers + channels + c, known, 0.0)[None, :]
        r = tl.load(numbers + 2 * channels + c, known, 0.0)[None, :]
    if WHAT == 2:
        a = tl.load(numbers + 3 * channels + c, known, 0.0)[None, :]
        b = tl.load(numbers + 4 * channels + c, known, 0.0)[None, :]
        d = tl.load(numbers + 5 * channels + c, known, 0.0)[None, :]
        e = tl.load(numbers + 6 * channels + c, known, 0.0)[None, :]
    for start in range(0, rows_per_block, ROWS):
        row = block * rows_per_block + start + tl.arange(0, ROWS)
        at = _at(row, c, inner, channels)
        mask = (row < rows)[:, None] & known[None, :]
        xs = tl.load(x + at, mask, 0.0).to(tl.float32)
        if MASKED or WHAT == 0:
            moved = xs * scale + shift
        if WHAT == 0:
            tl.store(first + at, moved, mask)
        else:
            us = tl.load(u + at, mask, 0.0).to(tl.float32)
            if MASKED and WHAT == 1:
                us = tl.where(moved > 0, us, 0.0)
            linear = p * us + q * xs + r
            if MASKED and WHAT == 2:
                linear = tl.where(moved > 0, linear, 0.0)
            if ADDED:
                linear += tl.load(g + at, mask, 0.0).to(tl.float32)
            tl.store(first + at, linear, mask)
            if WHAT == 2:
                gs = tl.load(g + at, mask, 0.0).to(tl.float32)
                if MASKED:
                    gs = tl.where(moved > 0, gs, 0.0)
                tl.store(second + at, a * xs + b * us + d * gs + e, mask)


@triton.jit
def _pool(x, won, out, height, width, depth, down, across, WHAT: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr):  # fmt: skip  # noqa: E501
    """WHAT 0: out = the largest of every window of x, won = its number in the window; 1: out = x where that was.

    A program does part of a row of windows of ``depth`` channels that lie beside each other.
    """
    plane, y = tl.program_id(0) // down, tl.program_id(0) % down
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    channel = tl.program_id(2) * DEPTH + tl.arange(0, DEPTH)
    mask = (column < across)[:, None] & (channel < depth)[None, :]
    window = ((plane * down + y) * across + column)[:, None] * depth + channel[None, :]
    top, left = y * S0 - P0, (column * S1 - P1)[:, None]
    if WHAT == 1:
        code = tl.load(won + window, mask, 0).to(tl.int32)
        pixel = (plane * height + top + code // K1) * width + left + code % K1
        tl.store(out + window, tl.load(x + pixel * depth + channel[None, :], mask, 0.0), mask)
    else:
        best = tl.full((WIDTH, DEPTH), float("-inf"), tl.float32)
        # the first pixel inside, should nothing be larger
        code = tl.maximum(-top, 0) * K1 + tl.maximum(-left, 0) + tl.zeros((WIDTH, DEPTH), tl.int32)
        for i in tl.static_range(K0):
            for j in tl.static_range(K1):
                inside = mask & (top + i >= 0) & (top + i < height) & (left + j >= 0) & (left + j < width)
                pixel = (plane * height + top + i) * width + left + j
                value = tl.load(x + pixel * depth + channel[None, :], inside, float("-inf")).to(tl.float32)
                # as torch does, a NaN is larger than all
                larger = (value > best) | (value != value)
                best = tl.where(larger, value, best)
                code = tl.where(larger, i * K1 + j, code)
        tl.store(out + window, best, mask)
        tl.store(won + window, code.to(tl.uint8), mask)


@triton.jit
def _unpool(g, won, out, height, width, depth, down, across, WHAT: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr):  # fmt: skip  # noqa: E501
    """Gradient at the input of a max pooling: every pixel gathers from the windows ``(down, across)`` it has won."""
    plane, row = tl.program_id(0) // height, tl.program_id(0) % height
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    channel = tl.program_id(2) * DEPTH + tl.arange(0, DEPTH)
    mask = (column < width)[:, None] & (channel < depth)[None, :]
    total = tl.zeros((WIDTH, DEPTH), tl.float32)
    for i in tl.static_range((K0 + S0 - 1) // S0):
        y, down_by = (row + P0) // S0 - i, (row + P0) % S0 + i * S0
        for j in tl.static_range((K1 + S1 - 1) // S1):
            x, right_by = (column + P1) // S1 - j, (column + P1) % S1 + j * S1
            inside = ((x >= 0) & (x < across) & (right_by < K1))[:, None] & mask
            inside = inside & (y >= 0) & (y < down) & (down_by < K0)
            window = (((plane * down + y) * across + x) * depth)[:, None] + channel[None, :]
            mine = tl.load(won + window, inside, 255).to(tl.int32) == (down_by * K1 + right_by)[:, None]
            total += tl.load(g + window, inside & mine, 0.0).to(tl.float32)
    tl.store(out + ((plane * height + row) * width + column)[:, None] * depth + channel[None, :], total, mask)


@triton.jit
def _smooth(v, g, x, grad_g, grad_x, size, KIND: tl.constexpr, SIZE: tl.constexpr):
    """grad_g = v f'(x) and grad_x = v g f''(x) of GELU (0), its approximation by tanh (1) or SiLU (2)."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = at < size
    xs = tl.load(x + at, mask, 0.0).to(tl.float32)
    vs = tl.load(v + at, mask, 0.0).to(tl.float32)
    gs = tl.load(g + at, mask, 0.0).to(tl.float32)
    if KIND == 0:
        density = tl.exp(-0.5 * xs * xs) * 0.3989422804014327
        first = 0.5 * (1 + tl.erf(xs * 0.7071067811865476)) + xs * density
        second = density * (2 - xs * xs)
    elif KIND == 1:
        slope = 0.7978845608028654 * (1 + 3 * 0.044715 * xs * xs)
        t = 2 * tl.sigmoid(2 * 0.7978845608028654 * (xs + 0.044715 * xs * xs * xs)) - 1
        s = 1 - t * t
        first = 0.5 * (1 + t) + 0.5 * xs * s * slope
        second = s * slope + 0.5 * xs * s * (6 * 0.7978845608028654 * 0.044715 * xs - 2 * t * slope * slope)
    else:
        s = tl.sigmoid(xs)
        first = s * (1 + xs * (1 - s))
        second = s * (1 - s) * (2 + xs * (1 - 2 * s))
    tl.store(grad_g + at, vs * first, mask)
    tl.store(grad_x + at, vs * gs * second, mask)


@triton.jit
def _layer_norm_second(v, g, x, weight, mean, rstd, grad_g, grad_x, sums, rows, n, rows_per_block, WEIGHTED: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip  # noqa: E501
    """grad_g and grad_x of the rows of a block, and their sum of g M(v), M the map of the first derivative."""
    column = tl.arange(0, SIZE)
    inside = column < n
    gamma = tl.load(weight + column, inside, 0.0).to(tl.float32) if WEIGHTED else tl.where(inside, 1.0, 0.0)
    total = tl.zeros((SIZE,), tl.float32)
    for k in range(rows_per_block):
        row = tl.program_id(0) * rows_per_block + k
        mask = inside & (row < rows)
        at = row * n + column
        center = tl.load(mean + row, row < rows, 0.0).to(tl.float32)
        scale = tl.load(rstd + row, row < rows, 0.0).to(tl.float32)
        xs = tl.where(mask, (tl.load(x + at, mask, 0.0).to(tl.float32) - center) * scale, 0.0)
        vs = tl.load(v + at, mask, 0.0).to(tl.float32)
        gs = tl.load(g + at, mask, 0.0).to(tl.float32)
        hs = gs * gamma
        mean_v, mean_h = tl.sum(vs, 0) / n, tl.sum(hs, 0) / n
        mean_vx, mean_hx, mean_vh = tl.sum(vs * xs, 0) / n, tl.sum(hs * xs, 0) / n, tl.sum(vs * hs, 0) / n
        image = scale * (vs - mean_v - xs * mean_vx)
        total += tl.where(mask, gs * image, 0.0)
        tl.store(grad_g + at, gamma * image, mask)
        within = mean_vh - mean_v * mean_h - 3 * mean_vx * mean_hx
        moved = within * xs + mean_hx * (vs - mean_v) + mean_vx * (hs - mean_h)
        tl.store(grad_x + at, -scale * scale * moved, mask)
    if WEIGHTED:
        tl.store(sums + tl.program_id(0) * n + column, total, inside)


def _on_its_device(function: Callable[P, R]) -> Callable[P, R]:
    """Launch kernels on the device of the first tensor, whatever the current one is."""

    @wraps(function)
    def on_its_device(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(args[0]):
            return function(*args, **kwargs)

    return on_its_device


def layout(x: Tensor) -> torch.memory_format:
    """Format in which the kernels address a tensor."""
    last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _tiles(x: Tensor, tiles: int, most: int) -> tuple[tuple[int, int], tuple[int, ...], dict[str, int]]:
    """Grid, sizes and tile of a kernel whose blocks do at least so many tiles; more, lest there be too many blocks."""
    channels, rows = x.shape[1], x.numel() // x.shape[1]
    inner = 1 if layout(x) is torch.channels_last else rows // len(x)
    width = min(64, triton.next_power_of_2(channels)) if inner == 1 else 1
    height = _ELEMENTS // width
    across = triton.cdiv(channels, width)
    blocks = max(1, min(triton.cdiv(rows, tiles * height), triton.cdiv(most, across)))
    rows_per_block = triton.cdiv(triton.cdiv(rows, blocks), height) * height
    sizes = (rows, inner, channels, rows_per_block)
    return (triton.cdiv(rows, rows_per_block), across), sizes, {"ROWS": height, "COLUMNS": width}


def _reduce(what: int, x: Tensor, u: Tensor, g: Tensor, center: Tensor, affine: Tensor, masked: bool) -> Tensor:
    # enough blocks for every multiprocessor, few enough that their sums are soon added
    grid, sizes, tile = _tiles(x, 2, 1024)
    sums = torch.empty(3, grid[0], x.shape[1], dtype=torch.float32, device=x.device)
    _sums[grid](x, u, g, center, affine, sums, *sizes, WHAT=what, MASKED=masked, **tile)
    return sums


def _map(what: int, x: Tensor, u: Tensor, g: Tensor, numbers: Tensor, affine: Tensor, masked: bool, added: bool = False) -> list[Tensor]:  # fmt: skip  # noqa: E501
    grid, sizes, tile = _tiles(x, 1, 4096)
    out = [torch.empty_like(x) for _ in range(2 if what == 2 else 1)]
    _apply[grid](x, u, g, numbers, affine, out[0], out[-1], *sizes, WHAT=what, MASKED=masked, ADDED=added, **tile)
    return out


@_on_its_device
def batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, running: tuple[Tensor, Tensor] | None, momentum: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Normalised ``(B, C, ...)``; mean, 1 / deviation, scale, shift ``(4, C)``; updates the running statistics."""
    x = x.contiguous(memory_format=layout(x))
    channels, n = x.shape[1], x.numel() // x.shape[1]
    numbers = torch.empty(4, channels, dtype=torch.float32, device=x.device)
    sums = _reduce(0, x, x, x, x, numbers, False)
    mean, var = running or (numbers, numbers)
    _normalization[(channels,)](
        sums, weight, bias, mean, var, numbers, float(n), float(momentum), float(eps), sums.shape[1], channels,
        TRACKED=running is not None, BLOCKS=triton.next_power_of_2(sums.shape[1]),
    )  # fmt: skip
    return _map(0, x, x, x, numbers, numbers[2:], False)[0], numbers


@_on_its_device
def batch_norm_backward(
    g: Tensor, x: Tensor, weight: Tensor, numbers: Tensor, masked: bool, added: Tensor | None
) -> tuple[Tensor, ...]:
    """Gradient at x, and the sums ``(C,)`` of ``g x_hat`` and ``g``; masked: g is that behind a ReLU."""
    x = x.contiguous(memory_format=layout(x))
    g = g.contiguous(memory_format=layout(x))
    plus = g if added is None else added.contiguous(memory_format=layout(x))
    channels, n = x.shape[1], x.numel() // x.shape[1]
    sums = _reduce(1, x, g, g, numbers, numbers[2:], masked)
    own = torch.empty(5, channels, dtype=torch.float32, device=x.device)
    _gradient_numbers[(channels,)](
        sums, weight, numbers, numbers[1:], own, float(n), sums.shape[1], channels,
        BLOCKS=triton.next_power_of_2(sums.shape[1]),
    )  # fmt: skip
    return _map(1, x, g, plus, own, numbers[2:], masked, added is not None)[0], own[3], own[4]


@_on_its_device
def batch_norm_double_backward(
    v: Tensor, g: Tensor, x: Tensor, weight: Tensor, numbers: Tensor, sum_gx: Tensor, sum_g: Tensor, masked: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at g, x and the weight of the gradient at x, ``γ σ (g - mean(g) - x_hat mean(g x_hat))``."""
    x = x.contiguous(memory_format=layout(x))
    v, g = (t.contiguous(memory_format=layout(x)) for t in (v, g))
    channels, n = x.shape[1], x.numel() // x.shape[1]
    sums = _reduce(2, x, v, g, numbers, numbers[2:], masked)
    own = torch.empty(8, channels, dtype=torch.float32, device=x.device)
    _second_numbers[(channels,)](
        sums, weight, numbers, numbers[1:], sum_gx, sum_g, own, float(n), sums.shape[1], channels,
        BLOCKS=triton.next_power_of_2(sums.shape[1]),
    )  # fmt: skip
    grad_g, grad_x = _map(2, x, v, g, own, numbers[2:], masked)
    return grad_g, grad_x, own[7]


class Windows(NamedTuple):
    """Geometry of a max pooling without dilation, of at most 255 pixels a window."""

    kernel: Pair
    stride: Pair
    padding: Pair
    size: Pair
    pooled: Pair


def _windows(
    kernel: Any, x: Tensor, won: Tensor | None, w: Windows, onto: Pair, what: int = 0
) -> tuple[Tensor, Tensor]:
    form = layout(x if won is None else won)
    x = x.contiguous(memory_format=form)
    batch, channels = x.shape[:2]
    planes, depth = (batch, channels) if form is torch.channels_last else (batch * channels, 1)
    out = torch.empty(batch, channels, *onto, dtype=x.dtype, device=x.device, memory_format=form)
    won = torch.empty_like(out, dtype=torch.uint8) if won is None else won.contiguous(memory_format=form)
    deep = min(64, triton.next_power_of_2(depth))
    wide = min(_ELEMENTS // deep, triton.next_power_of_2(onto[1]))
    kernel[planes * onto[0], triton.cdiv(onto[1], wide), triton.cdiv(depth, deep)](
        x, won, out, *w.size, depth, *w.pooled, WHAT=what, K0=w.kernel[0], K1=w.kernel[1],
        S0=w.stride[0], S1=w.stride[1], P0=w.padding[0], P1=w.padding[1], WIDTH=wide, DEPTH=deep,
    )  # fmt: skip
    return out, won


@_on_its_device
def max_pool(x: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Largest number of every window of ``(B, C, H, W)``, and which of its pixels that was, uint8."""
    return _windows(_pool, x, None, windows, windows.pooled)


@_on_its_device
def max_pool_backward(g: Tensor, won: Tensor, windows: Windows) -> Tensor:
    """Gradient ``(B, C, H, W)`` at the input."""
    return _windows(_unpool, g, won, windows, windows.size)[0]


@_on_its_device
def max_pool_pick(v: Tensor, won: Tensor, windows: Windows) -> Tensor:
    """The numbers of ``v`` ``(B, C, H, W)`` at the pixels that won, the transposed map of the gradient."""
    return _windows(_pool, v, won, windows, windows.pooled, 1)[0]


@_on_its_device
def smooth_double_backward(v: Tensor, g: Tensor, x: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """Gradients at g and x of ``g f'(x)``."""
    x = x.contiguous(memory_format=layout(x))
    v, g = (t.contiguous(memory_format=layout(x)) for t in (v, g))
    grad_g, grad_x = torch.empty_like(g), torch.empty_like(x)
    grid = (triton.cdiv(x.numel(), _ELEMENTS),)
    _smooth[grid](v, g, x, grad_g, grad_x, x.numel(), KIND=kind, SIZE=_ELEMENTS)
    return grad_g, grad_x


@_on_its_device
def layer_norm_double_backward(
    v: Tensor, g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients at g, x and the weight of the gradient at x; a row of x is what one mean belongs to."""
    v, g, x = v.contiguous(), g.contiguous(), x.contiguous()
    rows = mean.numel()
    n = x.numel() // rows
    blocks = min(rows, 512)
    rows_per_block = triton.cdiv(rows, blocks)
    blocks = triton.cdiv(rows, rows_per_block)
    sums = torch.empty(blocks, n, dtype=torch.float32, device=x.device)
    grad_g, grad_x = torch.empty_like(g), torch.empty_like(x)
    _layer_norm_second[(blocks,)](
        v, g, x, x if weight is None else weight, mean, rstd, grad_g, grad_x, sums, rows, n, rows_per_block,
        WEIGHTED=weight is not None, SIZE=triton.next_power_of_2(n),
    )  # fmt: skip
    return grad_g, grad_x, None if weight is None else sums.sum(0).view_as(weight).to(weight.dtype)
