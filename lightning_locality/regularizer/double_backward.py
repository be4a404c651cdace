"""Convolution and batch normalisation with fast second derivatives, for any unmodified network.

Legend: n numbers per channel, g gradient at a layer's output, v gradient of the loss at the layer's input gradient.
"""

from __future__ import annotations

__all__: list[str] = []

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

_CONVOLUTIONS: dict[Any, int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]) -> Tensor:
    """Geometry: stride, padding, dilation, whether transposed, padding of the output, groups."""
    return cast("Tensor", torch.ops.aten.convolution(x, weight, bias, *geometry))


def _convolve_backward(
    g: Tensor, x: Tensor, weight: Tensor, geometry: tuple[Any, ...], mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients with respect to input, weight and bias, None where the mask is False."""
    return tuple(torch.ops.aten.convolution_backward(g, x, weight, [len(weight)], *geometry, list(mask)))


class _Convolution(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Any, mode: FastDoubleBackward, leaf: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.mode, ctx.leaf = geometry, mode, leaf
        return _convolve(x, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (need_x, need_weight, need_bias), last = ctx.needs_input_grad[:3], not ctx.mode.only_inputs
        # the network's input is our own leaf: its gradient is not read after the input gradients are taken
        mask = (need_x and not (last and ctx.leaf), need_weight and last, need_bias and last)
        return (*_ConvolutionBackward.apply(g, x, weight, ctx.geometry, mask), None, None, None)


class _ConvolutionBackward(Function):
    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor, geometry: Any, mask: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        ctx.save_for_backward(g, x, weight)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        return _convolve_backward(g, x, weight, geometry, mask)

    @staticmethod
    def backward(
        ctx: Any, v: Tensor | None, v_weight: Tensor | None, v_bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        g, x, weight = ctx.saved_tensors
        geometry, (need_g, need_x, need_weight) = ctx.geometry, ctx.needs_input_grad[:3]
        parts = []
        if v is not None:
            parts.append(_convolve(v, weight, None, geometry))
        if v_weight is not None:
            parts.append(_convolve(x, v_weight, None, geometry))
        if v_bias is not None:
            parts.append(v_bias.reshape(-1, *[1] * (g.dim() - 2)).expand_as(g))
        grad_g = sum(parts[1:], parts[0]) if need_g and parts else None
        grad_x = grad_weight = None
        if v_weight is not None and need_x:
            grad_x = _convolve_backward(g, x, v_weight, geometry, (True, False, False))[0]
        if v is not None and need_weight:
            # torch uses a convolution with a kernel as large as the image here; this is the usual weight gradient
            grad_weight = _convolve_backward(g, v, weight, geometry, (False, True, False))[1]
        return grad_g, grad_x, grad_weight, None, None


class _FusedBatchNorm(Function):
    """Kernels of our own for what :class:`_BatchNorm` does; ``ctx.masked`` once a ReLU is known to follow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, options: tuple[Any, ...]) -> Tensor:
        mean, var, momentum, eps = options
        running = None if mean is None or var is None else (mean, var)
        out, numbers = _fused().batch_norm(x, weight, bias, running, momentum, eps)
        ctx.save_for_backward(x, weight, numbers)
        ctx.masked = False
        return cast("Tensor", out)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _FusedBatchNormBackward.apply(g, *ctx.saved_tensors, ctx.masked)
        needed = zip(gradients, ctx.needs_input_grad[:3], strict=True)
        return (*(gradient if need else None for gradient, need in needed), None)


class _FusedBatchNormBackward(Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor, numbers: Tensor, masked: bool) -> tuple[Tensor, ...]:
        grad_x, sum_gx, sum_g = _fused().batch_norm_backward(g, x, weight, numbers, masked)
        ctx.save_for_backward(g, x, weight, numbers, sum_gx, sum_g)
        ctx.masked = masked
        ctx.set_materialize_grads(False)
        return grad_x, sum_gx.to(weight.dtype), sum_g.to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor | None, v_weight: Tensor | None, v_bias: Tensor | None) -> tuple[Any, ...]:
        _check_no_parameter_gradients(v_weight, v_bias)
        if v is None:
            return (None,) * 5
        return *_fused().batch_norm_double_backward(v, *ctx.saved_tensors, ctx.masked), None, None


def _check_no_parameter_gradients(v_weight: Tensor | None, v_bias: Tensor | None) -> None:
    if v_weight is not None or v_bias is not None:
        raise NotImplementedError(
            "second derivatives through the parameter gradients of batch normalisation are not implemented: "
            "pass fast=False to AntiLocality or input_gradient_change"
        )


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
        needed = zip(gradients, ctx.needs_input_grad[:3], strict=True)
        return (*(gradient if need else None for gradient, need in needed), None)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _fused() -> Any:
    from lightning_locality.regularizer import fused

    return fused


def _are_fusable(x: Tensor, *others: Tensor | None) -> bool:
    """Whether Triton's kernels take these tensors; its interpreter, for tests, also takes those of the CPU."""
    known = x.is_cuda or (_has_triton() and os.environ.get("TRITON_INTERPRET") == "1")
    short = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return known and short and _has_triton() and all(t is None or t.dtype is torch.float32 for t in others)


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
    @once_differentiable
    def backward(
        ctx: Any, v: Tensor | None, v_weight: Tensor | None, v_bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        _check_no_parameter_gradients(v_weight, v_bias)
        if v is None:
            return (None,) * 8
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
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return g if ctx.masked else _ReLUBackward.apply(g, *ctx.saved_tensors), None, None


class _ReLUBackward(Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, out: Tensor) -> Tensor:
        ctx.save_for_backward(out)
        return cast("Tensor", torch.ops.aten.threshold_backward(g, out, 0))

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        return _ReLUBackward.apply(v, *ctx.saved_tensors), None


class _MaxPool(Function):
    """Torch's second derivative leaves the memory format of its input, and all that follows pays for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, geometry: tuple[Any, ...]) -> Tensor:
        out, index = torch.ops.aten.max_pool2d_with_indices(x, *geometry)
        ctx.save_for_backward(x, index)
        ctx.geometry = geometry
        return cast("Tensor", out)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return _MaxPoolBackward.apply(g, *ctx.saved_tensors, ctx.geometry), None


class _MaxPoolBackward(Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, index: Tensor, geometry: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(index)
        kernel, stride, padding, dilation, _ = geometry
        if dilation == [1, 1] and _are_fusable(g):
            return cast("Tensor", _fused().max_pool_backward(g, index, x.shape[2:], kernel, stride, padding))
        return cast("Tensor", torch.ops.aten.max_pool2d_with_indices_backward(g, x, *geometry, index))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        if index.is_contiguous():
            return v.flatten(2).gather(2, index.flatten(2)).view_as(index), None, None, None
        # pixels x channels, as they lie in memory
        flat = index.permute(0, 2, 3, 1).flatten(1, 2)
        picked = v.permute(0, 2, 3, 1).flatten(1, 2).gather(1, flat)
        return picked.view(len(index), *index.shape[2:], -1).permute(0, 3, 1, 2), None, None, None


def _max_pool(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | None:
    if return_indices or input.dim() != 4 or not (_are_plain(input) and input.requires_grad):
        return None
    sides = (kernel_size, stride if stride is not None else kernel_size, padding, dilation)
    geometry = [[n, n] if isinstance(n, int) else [*n] * (2 // len(n)) for n in sides]
    return cast("Tensor", _MaxPool.apply(input, (*geometry, ceil_mode)))


@final
class FastDoubleBackward(TorchFunctionMode):
    r"""Make convolutions and train-mode batch normalisations in the context twice differentiable at the usual cost.

    The results equal torch's up to rounding. Torch's second derivative of a convolution uses one with a kernel as
    large as the image, that of batch normalisation some thirty elementwise passes; here they take one weight gradient,
    and two fused and three elementwise passes. Everything else (transposed convolutions, padding given as a word,
    tensor subclasses, other layers) is passed on to torch. If ``x``, the network's input, is a leaf whose gradient is
    read only in :meth:`inputs_only`, that gradient is not computed again in the last backward pass.
    """

    def __init__(self, x: Tensor | None = None) -> None:
        super().__init__()
        self.x, self.only_inputs = x, False
        # what a batch normalisation has returned, until anything else is called
        self._fresh: Tensor | None = None

    @contextmanager
    def inputs_only(self) -> Iterator[None]:
        """Compute input gradients only in backward passes in the context, not those of the weights."""
        self.only_inputs, self._fresh = True, None
        try:
            yield
        finally:
            self.only_inputs = False

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace the known calls, pass on the others."""
        kwargs, out = kwargs or {}, None
        fresh, self._fresh = self._fresh, None
        if func in _CONVOLUTIONS:
            out = self._convolution(*args, **kwargs, axes=_CONVOLUTIONS[func])
        elif func is F.batch_norm:
            out = self._fresh = _batch_norm(*args, **kwargs)
        elif func in (F.relu, torch.relu, Tensor.relu):
            out = _relu(fresh, *args, **kwargs)
        elif func in (torch.relu_, Tensor.relu_):
            out = _relu(fresh, *args, **kwargs | {"inplace": True})
        elif func is F.max_pool2d:
            out = _max_pool(*args, **kwargs)
        return func(*args, **kwargs) if out is None else out

    def _convolution(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        *,
        axes: int,
    ) -> Tensor | None:
        if isinstance(padding, str) or input.dim() != axes + 2 or not _are_plain(input, weight, bias):
            return None
        stride, padding, dilation = (
            [n] * axes if isinstance(n, int) else [*n] * (axes // len(n)) for n in (stride, padding, dilation)
        )
        geometry = (stride, padding, dilation, False, [0] * axes, groups)
        is_input, device = input is self.x, input.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            input, weight, bias = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(device, enabled=False):
            return cast("Tensor", _Convolution.apply(input, weight, bias, geometry, self, is_input))


def _batch_norm(
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
    if not (training and several and weight is not None and _are_plain(input, weight, bias)):
        return None
    fused = bias is not None and _are_fusable(input, weight, bias, running_mean, running_var)
    kind = _FusedBatchNorm if fused else _BatchNorm
    return cast("Tensor", kind.apply(input, weight, bias, (running_mean, running_var, momentum, eps)))


def _relu(fresh: Tensor | None, input: Tensor, inplace: bool = False) -> Tensor | None:
    if not (_are_plain(input) and input.requires_grad):
        return None
    # in place, a normalisation's output has no other use
    node: Any = input.grad_fn
    masked = inplace and input is fresh and hasattr(node, "masked")
    if masked:
        node.masked = True
    return cast("Tensor", _ReLU.apply(input, inplace, masked))


def _are_plain(*tensors: Tensor | None) -> bool:
    plain = all(t is None or (type(t) in (Tensor, Parameter) and t.is_floating_point()) for t in tensors)
    return plain and torch.is_grad_enabled()
