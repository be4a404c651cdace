"""Training steps replayed as CUDA graphs, for any loop: one graph of the forward passes, one of the backward pass."""

from __future__ import annotations

__all__ = ["GraphedStep"]

import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Self, cast, final

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

Tensors = Sequence[Tensor]
Inputs = Sequence[Tensor | None]

_MOST_CAPTURES = 8
_MOST_MISSES = 64
# relative difference, in the norm, between a replay and the eager step; both use the same kernels
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}


class _NotCapturedError(Exception):
    """Why a step cannot be replayed."""


@final
class _Replay(Function):
    """Outputs of a captured step, and the gradients that its second graph computes from theirs."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.graph = graph
        ctx.set_materialize_grads(False)
        graph.forward()
        graph.pending = weakref.ref(ctx)
        return tuple(output.clone() for output in graph.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        graph: _Graph = ctx.graph
        if graph.pending is None or graph.pending() is not ctx:
            raise RuntimeError("a captured step was differentiated twice: do it once, or pass cuda_graph=False")
        graph.pending = None
        for static, gradient in zip(graph.cotangents, gradients, strict=True):
            if gradient is None:
                static.zero_()
            else:
                static.copy_(gradient)
        graph.backward()
        # copies: what is handed out may become a parameter's grad, which the next replay must not overwrite
        return None, *torch._foreach_mul(graph.gradients, 1.0)


@contextmanager
def _aliases(model: nn.Module) -> Iterator[dict[nn.Parameter, Tensor]]:
    """Leaves in place of the parameters, with the same memory.

    The parameters themselves may still belong to the last step, on another stream, and may have hooks. (torch's
    functional_call does not restore a module that is registered twice.)
    """
    leaves: dict[nn.Parameter, Tensor] = {p: p.detach().requires_grad_(p.requires_grad) for p in model.parameters()}
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module._parameters.update, dict(module._parameters))
            module._parameters.update({k: leaves[p] for k, p in module._parameters.items() if p is not None})  # type: ignore[misc]
        yield leaves


@final
class _Graph:
    """A captured step: static inputs, outputs, their gradients and those of the parameters, and two replays."""

    def __init__(self, function: Callable[..., Any], model: nn.Module, inputs: Inputs) -> None:
        self.function, self.model = function, model
        self.pending: weakref.ref[Any] | None = cast("Any", None)
        self.inputs = [None if t is None else t.detach().clone() for t in inputs]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        with _unchanged(model, self.inputs):
            eager, leaves = self._step()
            if not all(isinstance(output, Tensor) and output.requires_grad for output in eager):
                raise _NotCapturedError("the model's output has parts other than differentiable tensors")
            generator = torch.Generator().manual_seed(0)
            # one output at a time, so that a small gradient does not hide behind a large one
            weights = [torch.rand(t.shape, generator=generator).to(t) for t in eager]
            gradients = [
                torch.autograd.grad([t], leaves, [w], True, allow_unused=True)
                for t, w in zip(eager, weights, strict=True)
            ]
        used = [k for k in range(len(leaves)) if any(of[k] is not None for of in gradients)]
        self.parameters = [self.parameters[k] for k in used]
        self.outputs, self.gradients = [torch.empty_like(t) for t in eager], [torch.empty_like(leaves[k]) for k in used]
        self.cotangents = [torch.zeros_like(t) for t in eager]
        expected = [output.detach() for output in eager], [[of[k] for k in used] for of in gradients]
        del eager, leaves, gradients
        with _unchanged(model, self.inputs):
            self.forward, self.backward = self._capture() if self.outputs[0].is_cuda else self._emulate()
        for k, weight in enumerate(weights):
            with _unchanged(model, self.inputs):
                self.forward()
                for other in self.cotangents:
                    other.zero_()
                self.cotangents[k].copy_(weight)
                self.backward()
            self._compare(k, expected[0][k], expected[1][k])

    def _step(self) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs, and the leaves that they depend on."""
        with _aliases(self.model) as leaves:
            outputs, self.structure = tree_flatten(self.function(*self.inputs))
        return outputs, [leaves[p] for p in self.parameters]

    def _differentiate(self, outputs: Tensors, leaves: Tensors) -> list[Tensor]:
        return list(torch.autograd.grad(outputs, leaves, self.cotangents))

    def _emulate(self) -> tuple[Callable[[], None], Callable[[], None]]:
        """The eager step in place of both graphs, where there are none."""
        live = list[tuple[list[Tensor], list[Tensor]]]()

        def forward() -> None:
            with torch.enable_grad():
                live[:] = [self._step()]
            for static, output in zip(self.outputs, live[0][0], strict=True):
                static.copy_(output.detach())

        def backward() -> None:
            for static, gradient in zip(self.gradients, self._differentiate(*live.pop()), strict=True):
                static.copy_(gradient)

        return forward, backward

    def _capture(self) -> tuple[Callable[[], None], Callable[[], None]]:
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        # cuDNN's search, handles made on first use and workspaces must not be part of a graph
        with torch.cuda.stream(side):
            self._differentiate(*self._step())
            with _no_synchronization():
                self._differentiate(*self._step())
        current.wait_stream(side)
        first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # thread_local: other threads pin memory or watch NCCL meanwhile
        options: Any = {"pool": torch.cuda.graph_pool_handle(), "stream": side, "capture_error_mode": "thread_local"}
        generator = torch.cuda.default_generators[self.outputs[0].get_device()]
        spare = generator.clone_state()
        try:
            with torch.cuda.graph(first, **options):
                outputs, leaves = self._step()
            with torch.cuda.graph(second, **options):
                self.gradients = self._differentiate(outputs, leaves)
        except RuntimeError:
            # a capture that fails leaves the generator in recording, where it refuses to draw
            generator.graphsafe_set_state(spare)
            raise
        finally:
            # and its own stream as the current one
            torch.cuda.set_stream(current)
        self.outputs = [output.detach() for output in outputs]
        return first.replay, second.replay

    def _compare(self, k: int, output: Tensor, gradients: Sequence[Tensor | None]) -> None:
        """Raise unless output k of a replay, and its gradient, equal those of the eager step."""
        tolerance = _TOLERANCE[_precision(output)]
        known = [torch.zeros_like(b) if a is None else a for a, b in zip(gradients, self.gradients, strict=True)]
        pairs = (("", [output], [self.outputs[k]]), ("the gradient of ", known, self.gradients))
        for name, eager, replayed in pairs:
            norm = torch.stack([t.double().norm() for t in eager]).norm()
            error = torch.stack([(a.double() - b.double()).norm() for a, b in zip(replayed, eager, strict=True)]).norm()
            if not float(error) <= tolerance * float(norm):
                what = f"{name}output {k} of a replay differs by {float(error / norm):.1e} from the eager step"
                raise _NotCapturedError(what)

    def run(self, inputs: Inputs) -> Any:
        """What the step returns for these inputs, differentiable with respect to the parameters."""
        for static, value in zip(self.inputs, inputs, strict=True):
            if static is not None and value is not None:
                static.copy_(value.detach(), non_blocking=True)
        return tree_unflatten(_Replay.apply(self, *self.parameters), self.structure)


@contextmanager
def _no_synchronization() -> Iterator[None]:
    """An error where something waits for the device: it would spoil a capture, and here it does no harm."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # this mode is a prototype, it says
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


def _precision(output: Tensor) -> torch.dtype:
    device = output.device.type
    short = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else output.dtype
    return short if short in _TOLERANCE else torch.float32


@contextmanager
def _unchanged(model: nn.Module, inputs: Inputs) -> Iterator[None]:
    """Leave buffers, inputs and random numbers as they were; no cache of autocast, which a graph must not read."""
    given = [t for t in inputs if t is not None]
    device, kind = given[0].device, given[0].device.type
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if kind == "cuda" else []))
        for tensor in (*model.buffers(), *given):
            stack.callback(_restore, tensor, tensor.clone())
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
        yield


def _restore(tensor: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(value)


@final
class GraphedStep:
    r"""Calls of a step, replayed from CUDA graphs once the same step has been seen twice in succession.

    A step is a function of static shapes that returns tensors differentiable with respect to the parameters of a
    model. What comes back from a replay is differentiable once, as the outputs of the eager step are, so that loss,
    optimizer, gradient accumulation, clipping and the reduction of DistributedDataParallel need not know. Random layers
    draw anew at every replay, and buffers are updated once, as eagerly.

    The first replay is compared with the eager step: outputs and gradients, in the norm, to 2e-3 (float32) or 5e-2
    (bf16). If they differ, or if something cannot be captured (a model that reads numbers back from the device, has
    hooks, or changes its plain attributes at every call), the step is taken eagerly, after one warning with the reason.
    A batch of another shape is taken eagerly; two of them in succession replace the graph.

    On a CPU the same code runs if ``emulate`` is set, with the eager step in place of the replays.
    """

    def __init__(self, emulate: bool = False) -> None:
        self.emulate = emulate
        self._graph: _Graph | None = None
        self._key: Hashable = None
        self._last: Hashable = None
        self._captures = self._misses = 0
        self._refused = False

    def __reduce__(self) -> tuple[type[Self], tuple[bool]]:
        """Copies capture for themselves."""
        return type(self), (self.emulate,)

    @property
    def captured(self) -> bool:
        """Whether there is a graph to replay."""
        return self._graph is not None

    def __call__(self, function: Callable[..., Any], model: Any, inputs: Inputs, version: Hashable = None) -> Any:
        """``function(*inputs)``; ``version`` names everything else that the function depends on."""
        device = next(t.device for t in inputs if t is not None)
        usable = not self._refused and torch.is_grad_enabled() and (self.emulate or device.type == "cuda")
        if not usable or any(t is not None and t.requires_grad for t in inputs):
            return function(*inputs)
        try:
            graph = self._find(function, model, inputs, version)
        except (_NotCapturedError, RuntimeError) as error:
            self._refused, self._graph = True, None
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(f"steps are taken without a CUDA graph, equal but slower: {reason}", stacklevel=3)
            return function(*inputs)
        # while outputs of the last replay wait for their backward pass, another would overwrite what it needs
        waiting = graph is not None and graph.pending is not None and graph.pending() is not None
        return function(*inputs) if graph is None or waiting else graph.run(inputs)

    def _find(self, function: Callable[..., Any], model: Any, inputs: Inputs, version: Hashable) -> _Graph | None:
        """The graph of this step, captured if it is the second of its kind in succession."""
        key = version, *_state(model, inputs)
        if key == self._key:
            self._last, self._misses = key, 0
            return self._graph
        repeated, self._last = key == self._last, key
        if repeated:
            self._graph = self._key = None
            if self._captures == _MOST_CAPTURES:
                raise _NotCapturedError(f"model or batches have changed {_MOST_CAPTURES} times")
            self._captures += 1
            self._graph, self._key = _Graph(function, model, inputs), key
            return self._graph
        self._misses += 1
        if self._misses > _MOST_MISSES:
            raise _NotCapturedError("plain attributes of the model, or the shape of the batches, change at every call")
        return None


def _state(model: Any, inputs: Inputs) -> tuple[Hashable, ...]:
    """Everything that a graph fixes: shapes, addresses, modes and plain attributes of the modules."""
    if not isinstance(model, nn.Module):
        raise _NotCapturedError(f"the model is a {type(model).__name__}, not a module whose parameters are known")
    plain: list[Hashable] = []
    for name, module in model.named_modules():
        if module._forward_hooks or module._backward_hooks or module._backward_pre_hooks:
            raise _NotCapturedError(f"{name or 'the model'} has hooks, whose Python code a graph would not run")
        plain.extend(value for key, value in vars(module).items() if key[0] != "_" and _is_plain(value))
    tensors = [*model.parameters(), *model.buffers()]
    shapes = tuple(None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in inputs)
    kind = next(t.device.type for t in inputs if t is not None)
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    return shapes, autocast, tuple(plain), tuple((t.data_ptr(), t.requires_grad) for t in tensors)


def _is_plain(value: Any) -> bool:
    return (
        value is None or type(value) in (bool, int, float, str) or (type(value) is tuple and all(map(_is_plain, value)))
    )
