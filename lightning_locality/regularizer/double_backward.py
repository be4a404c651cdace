"""Layers with fast second derivatives, for any unmodified network.

Legend: n numbers per channel, g gradient at a layer's output, v gradient of the loss at the layer's input gradient.
"""

from __future__ import annotations

__all__: list[str] = []

import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _BatchNorm as BatchNormModule
from torch.overrides import TorchFunctionMode

from lightning_locality.regularizer.activation import SMOOTH, relu, smooth
from lightning_locality.regularizer.batch_norm import are_fusable, are_plain, batch_norm, fused_kernels
from lightning_locality.regularizer.layer_norm import layer_norm

_CONVOLUTIONS: dict[Any, int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_OWN = ("weight", "bias", "running_mean", "running_var")
# arguments in order; in training, running statistics are only written
_NORMALIZATIONS: dict[Any, tuple[str, ...]] = {
    F.batch_norm: ("input", *_OWN[2:], *_OWN[:2], "training"),
    F.instance_norm: ("input", *_OWN[2:], *_OWN[:2], "use_input_stats"),
    torch.batch_norm: ("input", *_OWN, "training", "momentum", "eps", "cudnn_enabled"),
    torch.instance_norm: ("input", *_OWN, "use_input_stats", "momentum", "eps", "cudnn_enabled"),
}
_RECURRENT = frozenset((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu))
# torch 2.11 differentiates them once only
_GRID_SAMPLERS = ("CudnnGridSampler", "GridSampler2D", "GridSampler3D")
# what torch differentiates once only, and this module does not help: a test compares with torch's own table
_ONCE = frozenset(
    f"{name}Backward{n}"
    for n in (0, 1)
    for name in (
        *("CtcLoss", "CudnnAffineGridGenerator", "CudnnRnn", "EmbeddingBag", "FakeQuantizeLearnablePerChannelAffine"),
        *("FakeQuantizeLearnablePerTensorAffine", "MaskedSoftmax", "MkldnnAdaptiveAvgPool2D", "MkldnnLinear"),
        *("MkldnnMaxPool2D", "MkldnnMaxPool3D", "MpsConvolutionTranspose", "MultiMarginLoss", "MultilabelMarginLoss"),
        *("SegmentReduce", "SparseLogSoftmax", "SparseMmReduceImpl", "SparseSoftmax", "SparseSum"),
        *(() if hasattr(torch._C._functions, "GridSampler2DBackwardBackward0") else _GRID_SAMPLERS),
    )
)


def _hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    """The same function of operations with second derivatives."""
    out = F.relu6((x.clone() if inplace else x) + 3) / 6
    return x.copy_(out) if inplace else out


_SUPPLIED: dict[Any, Callable[..., Tensor]] = {
    F.hardsigmoid: _hardsigmoid,
    torch._C._nn.hardsigmoid: _hardsigmoid,
    torch._C._nn.hardsigmoid_: lambda x: _hardsigmoid(x, inplace=True),
}


def _needed(node: Node | None) -> bool:
    """Whether the backward pass that is running goes through a node, which a Function is not told."""
    try:
        return node is not None and torch._C._will_engine_execute_node(node)
    except RuntimeError:
        # a leaf whose gradient is asked for
        return True


def _per_axis(number: Any, axes: int) -> list[int]:
    """One integer per axis, from one for all or a sequence."""
    numbers = [number] if hasattr(number, "__index__") else [*number]
    return [operator.index(n) for n in numbers * (axes // len(numbers))]


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
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Any, mode: FastDoubleBackward | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.mode = geometry, mode
        return _convolve(x, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needed = [_needed(node) for node, _ in ctx.next_functions]
        if ctx.mode is not None and ctx.mode.nobody_reads_input_gradient():
            needed[0] = False
        mask = (needed[0], needed[1], len(needed) > 2 and needed[2])
        return (*_ConvolutionBackward.apply(g, x, weight, ctx.geometry, mask), None, None)


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


class _MaxPool(Function):
    """Keeps one byte per window where torch keeps eight, and the memory format in its second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, windows: Any) -> Tensor:
        out, won = fused_kernels().max_pool(x, windows)
        ctx.save_for_backward(won)
        ctx.windows = windows
        ctx.set_materialize_grads(False)
        return cast("Tensor", out)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        return None if g is None else _MaxPoolMap.apply(g, *ctx.saved_tensors, ctx.windows, False), None


class _MaxPoolMap(Function):
    """The gradient of a max pooling as a linear map, or its transpose; each is the derivative of the other."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, won: Tensor, windows: Any, transposed: bool) -> Tensor:
        ctx.save_for_backward(won)
        ctx.windows, ctx.transposed = windows, transposed
        kernels = fused_kernels()
        return cast("Tensor", (kernels.max_pool_pick if transposed else kernels.max_pool_backward)(g, won, windows))

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        return _MaxPoolMap.apply(v, *ctx.saved_tensors, ctx.windows, not ctx.transposed), None, None, None


def _max_pool(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | None:
    known = not return_indices and input.dim() == 4 and are_plain(input) and input.requires_grad
    if not (known and are_fusable(input)):
        return None
    stride = kernel_size if stride is None or (isinstance(stride, (list, tuple)) and not stride) else stride
    geometry = [_per_axis(n, 2) for n in (kernel_size, stride, padding, dilation)]
    (high, wide), *_, dilation = geometry
    if dilation != [1, 1] or high * wide > 255:
        return None
    pooled = torch.ops.aten.max_pool2d(input.detach().to("meta"), *geometry, ceil_mode).shape[2:]
    windows = fused_kernels().Windows(*(tuple(n) for n in (*geometry[:3], input.shape[2:], pooled)))
    return cast("Tensor", _MaxPool.apply(input, windows))


@final
class FastDoubleBackward(TorchFunctionMode):
    r"""Make the layers called in the context twice differentiable, at the usual cost.

    The results equal torch's up to rounding. Torch's second derivative of a convolution uses one with a kernel as large
    as the image, those of batch and layer normalisation, GELU and SiLU some ten to thirty elementwise passes, that of
    ReLU a tensor of zeros; here a convolution takes one weight gradient, and the others as many passes as their
    formulas demand, on CUDA in kernels of their own. Everything else (transposed convolutions, padding given as a word,
    tensor subclasses, transforms of torch.func, other layers) is passed on to torch, or refused by name if torch has no
    second derivative.

    A ReLU that works in place, directly after a batch normalisation, is taken for its only use: so it is, unless the
    output was given to compiled code (TorchScript, C++ extensions) in between, which Python does not see.

    Args:
        x: The network's input, neither a leaf nor changed in place before the context.
        leaf: Whether ``x`` is a clone of a leaf whose gradient nobody reads: the last backward pass leaves it out.
        fast: Whether to replace what torch can do more slowly.
        update_statistics: Whether normalisations in training may update their running statistics and count the batch.

    Raises:
        ValueError: A layer that torch can differentiate once only, or under gradient checkpointing.
    """

    def __init__(
        self, x: Tensor | None = None, leaf: bool = False, *, fast: bool = True, update_statistics: bool = True
    ) -> None:
        super().__init__()
        self.x, self.node, self.closed = x, None if x is None else x.grad_fn, False
        self.leaf, self.fast, self.update_statistics = leaf, fast, update_statistics
        self.counted: list[Tensor] = []
        # what a fused batch normalisation has returned, until anything else is called
        self.fresh: Tensor | None = None

    def __exit__(self, *error: Any) -> None:
        """The network has run, and so have the gradients that it takes inside."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.closed, self.fresh = True, None
        while self.counted:
            self.counted.pop().sub_(1)

    def nobody_reads_input_gradient(self) -> bool:
        """Whether this is a pass to the leaf behind ``x`` that only accumulates there."""
        x = cast("Tensor", self.x)
        if not (self.leaf and self.closed) or x._backward_hooks or x.retains_grad:
            return False
        return _needed(cast("Node", self.node).next_functions[0][0])

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace the known calls, pass on the others."""
        kwargs, out = kwargs or {}, None
        fresh, self.fresh = self.fresh, None
        if func in _NORMALIZATIONS:
            out = self._normalization(func, dict(zip(_NORMALIZATIONS[func], args, strict=False)) | kwargs)
        elif func is Tensor.add_ and not self.update_statistics and (norm := _counting(args[0], sys._getframe(1))):
            # a cumulative average divides by the count
            if norm.momentum is not None:
                return args[0]
            self.counted.append(args[0])
        elif self.fast and func in _CONVOLUTIONS:
            out = self._convolution(*args, **kwargs, axes=_CONVOLUTIONS[func])
        elif self.fast and func in (F.relu, torch.relu, Tensor.relu):
            out = relu(fresh, *args, **kwargs)
        elif self.fast and func in (torch.relu_, Tensor.relu_):
            out = relu(fresh, *args, **kwargs | {"inplace": True})
        elif self.fast and func is F.max_pool2d:
            out = _max_pool(*args, **kwargs)
        elif self.fast and func in SMOOTH:
            out = smooth(func, *args, **kwargs)
        elif self.fast and func is F.layer_norm:
            out = layer_norm(*args, **kwargs)
        elif func in _SUPPLIED or func is F.scaled_dot_product_attention:
            _refuse_checkpoint()
            out = _SUPPLIED[func](*args, **kwargs) if func in _SUPPLIED else None
        elif func in _RECURRENT:
            # cuDNN has no second derivative
            with torch.backends.cudnn.flags(enabled=False):
                return func(*args, **kwargs)
        if out is None:
            out = func(*args, **kwargs)
            self._refuse_once(func, out)
        return out

    def _normalization(self, func: Any, arguments: dict[str, Any]) -> Tensor:
        training = arguments.get("training", arguments.get("use_input_stats", True))
        if training and arguments.get("running_mean") is not None:
            _refuse_checkpoint()
            if not self.update_statistics:
                arguments |= {"running_mean": None, "running_var": None}
        fast = func is F.batch_norm and self.fast and not _checkpointed()
        out = self.fresh = batch_norm(**arguments) if fast else None
        return func(**arguments) if out is None else out

    def _refuse_once(self, func: Any, out: Any) -> None:
        node = getattr(out, "grad_fn", None)
        name = "" if node is None else node.name()
        # the last is torchvision 0.26
        once = name in _ONCE or name.startswith("GeneratedBackwardFor_torchvision") or "vision::ops::" in name
        if node is not None and once and any(behind is self.node for behind in nodes_behind(node)):
            operation = getattr(func, "__name__", str(func))
            raise ValueError(
                f"{_layer(operation)}: torch has no second derivative of {operation}, which the term needs: replace it"
            )

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
        if isinstance(padding, str) or input.dim() != axes + 2 or not are_plain(input, weight, bias):
            return None
        stride, padding, dilation = (_per_axis(n, axes) for n in (stride, padding, dilation))
        geometry = (stride, padding, dilation, False, [0] * axes, groups)
        # a view or a change in place would put something else between this layer and the leaf
        mode = self if self.leaf and input is self.x and input.grad_fn is self.node else None
        device = input.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            input, weight, bias = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(device, enabled=False):
            return cast("Tensor", _Convolution.apply(input, weight, bias, geometry, mode))


def _counting(counter: Any, frame: FrameType) -> BatchNormModule | None:
    """The batch normalisation that is about to count a batch in this frame, if that is what it does."""
    if not isinstance(counter, Tensor) or counter.dim():
        return None
    owner = frame.f_locals.get("self")
    return owner if isinstance(owner, BatchNormModule) and owner.num_batches_tracked is counter else None


def _checkpointed() -> bool:
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def _refuse_checkpoint() -> None:
    if _checkpointed():
        raise ValueError(
            f"{_layer('a layer')}: gradient checkpointing runs it again after the term, with other derivatives and "
            "another update of its statistics: switch checkpointing off there"
        )


def _layer(otherwise: str) -> str:
    """Name of the innermost module that is running."""
    frame: FrameType | None = sys._getframe()
    running: list[nn.Module] = []
    while frame is not None and frame.f_code.co_name != "_with_output":
        owner = frame.f_locals.get("self")
        running += [owner] if isinstance(owner, nn.Module) else []
        frame = frame.f_back
    names = {module: name for outer in running for name, module in outer.named_modules()}
    # the outermost network has the longest names
    return f"{names[running[0]] or 'model'} ({type(running[0]).__name__})" if running else otherwise


def nodes_behind(*nodes: Node) -> Iterator[Node]:
    """These nodes of a graph and all that they depend on."""
    seen, waiting = set(nodes), [*nodes]
    while waiting:
        yield (last := waiting.pop())
        new = {behind for behind, _ in last.next_functions if behind is not None} - seen
        seen |= new
        waiting += new
