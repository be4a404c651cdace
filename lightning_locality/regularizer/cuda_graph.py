"""Training steps replayed as CUDA graphs, for any loop: one graph of the forward passes, one of the backward pass."""

from __future__ import annotations

__all__ = ["GraphedStep"]

import pickle
import random
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import Enum
from types import MethodType
from typing import Any, NamedTuple, Self, cast, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_locality.regularizer.batch_norm import launches_cost_nothing
from lightning_locality.regularizer.double_backward import nodes_behind
from lightning_locality.regularizer.state import restored

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
        eager = [self._eager() for _ in range(2)]
        used = [k for k in range(len(self.parameters)) if any(of[k] is not None for of in eager[0][1])]
        self.outputs = [torch.empty_like(t) for t in eager[0][0]]
        self.parameters = [self.parameters[k] for k in used]
        self.gradients = [torch.empty_like(p) for p in self.parameters]
        self.cotangents = [torch.zeros_like(t) for t in self.outputs]
        with _unchanged(model, self.inputs):
            self.forward, self.backward = self._capture() if self.outputs[0].is_cuda else self._emulate()
        for k, output in enumerate(self.outputs):
            with _unchanged(model, self.inputs):
                self.forward()
                for cotangent in self.cotangents:
                    cotangent.zero_()
                self.cotangents[k].copy_(_cotangent(output))
                self.backward()
            name = f"output {k} of a replay"
            _compare(name, [eager[0][0][k]], [eager[0][0][k]], [self.outputs[k]])
            first, again = (
                [_or_zero(of[k][j], p) for j, p in zip(used, self.parameters, strict=True)] for _, of in eager
            )
            _compare(f"the gradient of {name}", first, again, self.gradients)

    def _eager(self) -> tuple[list[Tensor], list[Sequence[Tensor | None]]]:
        """Outputs, and the gradients of each, so that a small one does not hide behind a large one."""
        with _unchanged(self.model, self.inputs):
            before = _numbers_of_the_host(self.inputs)
            outputs, leaves = self._step()
            if _numbers_of_the_host(self.inputs) != before:
                raise _NotCapturedError("the model draws random numbers on the processor, which a graph would repeat")
            if not all(isinstance(output, Tensor) and output.requires_grad for output in outputs):
                raise _NotCapturedError("the model's output has parts other than differentiable tensors")
            nodes = nodes_behind(*(output.grad_fn for output in outputs if output.grad_fn is not None))
            if any(isinstance(getattr(node, "variable", None), nn.Parameter) for node in nodes):
                raise _NotCapturedError("the output depends on parameters that are not among those of the model")
            gradients: list[Sequence[Tensor | None]] = [
                torch.autograd.grad([t], leaves, [_cotangent(t)], retain_graph=True, allow_unused=True) for t in outputs
            ]
        return [output.detach() for output in outputs], gradients

    def _step(self) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs, and the leaves that they depend on."""
        token = launches_cost_nothing.set(True)
        try:
            with _aliases(self.model) as leaves:
                outputs, self.structure = tree_flatten(self.function(*self.inputs))
        finally:
            launches_cost_nothing.reset(token)
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

    def run(self, inputs: Inputs) -> Any:
        """Replay the step for these inputs; what it returns is differentiable with respect to the parameters."""
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


def _cotangent(output: Tensor) -> Tensor:
    """A fixed random tensor of this form."""
    return torch.rand(output.shape, generator=torch.Generator().manual_seed(0)).to(output)


def _or_zero(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if gradient is None else gradient


def _distance(a: Tensors, b: Tensors) -> Tensor:
    distance: Tensor = torch.stack([(s.double() - t.double()).norm() for s, t in zip(a, b, strict=True)]).norm()
    return distance


def _compare(name: str, eager: Tensors, again: Tensors, replayed: Tensors) -> None:
    """Raise unless a replay equals the eager step, up to rounding or to what the eager step itself varies by."""
    norm = torch.stack([t.double().norm() for t in eager]).norm()
    tolerance = max(_TOLERANCE[_precision(t)] for t in eager)
    error, noise = _distance(eager, replayed), _distance(eager, again)
    if not float(error) <= float(tolerance * norm + 10 * noise):
        raise _NotCapturedError(f"{name} differs by {float(error / norm):.1e} from the eager step")


def _precision(output: Tensor) -> torch.dtype:
    device = output.device.type
    short = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else output.dtype
    return short if short in _TOLERANCE else torch.float32


@contextmanager
def _unchanged(model: nn.Module, inputs: Inputs) -> Iterator[None]:
    """Leave buffers, inputs and random numbers as they were; no cache of autocast, which a graph must not read."""
    given = [t for t in inputs if t is not None]
    kind, copies = given[0].device.type, [t.clone() for t in given]
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    with restored(model, *given), torch.autocast(kind, dtype, enabled, cache_enabled=False):
        try:
            yield
        finally:
            for tensor, copied in zip(given, copies, strict=True):
                tensor.copy_(copied)


def _numbers_of_the_host(inputs: Inputs) -> tuple[Hashable, ...]:
    """States of the generators that a replay does not advance."""
    own = torch.get_rng_state().numpy().tobytes() if any(t is not None and t.is_cuda for t in inputs) else b""
    return own, random.getstate(), pickle.dumps(np.random.get_state())  # noqa: NPY002


@final
class GraphedStep:
    r"""Calls of a step, replayed from CUDA graphs once the same step has been seen twice in succession.

    A step is a function of static shapes that returns tensors differentiable with respect to the parameters of a
    model. What comes back from a replay is differentiable once, as the outputs of the eager step are, so that loss,
    optimizer, gradient accumulation, clipping and the reduction of DistributedDataParallel need not know. Random layers
    draw anew at every replay, and buffers are updated once, as eagerly.

    The first replay is compared with the eager step: every output and its gradient, in the norm, to 2e-3 (float32) or
    5e-2 (bf16), a gradient also to ten times what it varies by where the eager step is not deterministic. If they
    differ, or if something cannot be captured (a model that reads numbers back from the device, has hooks, draws random
    numbers on the processor, uses parameters that are not its own, or changes its attributes at every call), the step
    is taken eagerly, after one warning with the reason. A batch of another shape is taken eagerly; two of them in
    succession replace the graph.

    A graph holds as long as the modules, their parameters and buffers, modes and public attributes (lists and
    dictionaries included) stay the same. It does not see private attributes, what is inside objects, closures or
    globals. A parameter that the outputs used do not depend on has a gradient of zeros in place of None.

    On a CPU the same code runs if ``emulate`` is set, with the eager step in place of the replays.
    """

    def __init__(self, emulate: bool = False) -> None:
        self.emulate = emulate
        self._graph: _Graph | None = None
        self._key: _Key | None = None
        self._last: _Key | None = None
        self._captures = self._misses = self._failures = 0
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
            with torch.cuda.device_of(next(t for t in inputs if t is not None)):  # type: ignore[no-untyped-call]
                graph = self._find(function, model, inputs, version)
        except (_NotCapturedError, RuntimeError) as error:
            self._graph = self._key = None
            # a device may fail once: cuDNN under the load of other processes, too little memory for a moment
            self._failures += 1
            self._refused = isinstance(error, _NotCapturedError) or self._failures > 1
            if self._refused:
                reason = str(error).strip().partition("\n")[0]
                warnings.warn(f"steps are taken without a CUDA graph, equal but slower: {reason}", stacklevel=3)
            return function(*inputs)
        # while outputs of the last replay wait for their backward pass, another would overwrite what it needs
        waiting = graph is not None and graph.pending is not None and graph.pending() is not None
        return function(*inputs) if graph is None or waiting else graph.run(inputs)

    def _find(self, function: Callable[..., Any], model: Any, inputs: Inputs, version: Hashable) -> _Graph | None:
        """The graph of this step, captured if it is the second of its kind in succession."""
        key = _key(model, inputs, version)
        if self._key is not None and key.values == self._key.values:
            self._last, self._misses = key, 0
            return self._graph
        # objects are known by their ids: the last ones are kept, lest new ones take their places
        last, self._last = self._last, key
        if last is not None and key.values == last.values:
            self._graph = self._key = None
            if self._captures == _MOST_CAPTURES:
                raise _NotCapturedError(f"model or batches have changed {_MOST_CAPTURES} times")
            self._captures += 1
            self._graph, self._key = _Graph(function, model, inputs), key
            return self._graph
        self._misses += 1
        if last is not None and self._misses > _MOST_MISSES:
            changed = next((name for name, value in key.values.items() if last.values.get(name) != value), "the model")
            raise _NotCapturedError(f"{changed} is another at every call")
        return None


class _Key(NamedTuple):
    """Everything that a graph fixes, by name, and the objects that are known by their ids."""

    values: dict[str, Any]
    objects: list[Any]


def _key(model: Any, inputs: Inputs, version: Hashable) -> _Key:
    if not isinstance(model, nn.Module):
        raise _NotCapturedError(f"the model is a {type(model).__name__}, not a module whose parameters are known")
    objects: list[Any] = [version]
    kind = next(t.device.type for t in inputs if t is not None)
    values: dict[str, Any] = {
        "the batch": tuple(None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in inputs),
        "the step": (version, torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)),
    }
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            raise _NotCapturedError(f"{name or 'the model'} has hooks, whose Python code a graph would not run")
        values[f"{name} (module)"] = type(module)
        for key, value in vars(module).items():
            if key[0] != "_":
                values[f"{name}.{key}"] = _fingerprint(value, objects)
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            values[f"{name}.{key}"] = _fingerprint(tensor, objects)
    return _Key(values, objects)


def _fingerprint(value: Any, objects: list[Any]) -> Hashable:
    if value is None or isinstance(value, (bool, int, float, str, bytes, np.generic, Enum, torch.dtype)):
        return type(value), value
    if isinstance(value, Tensor):
        # an address says all of a buffer, but a parameter is also who gets the gradient
        objects += [value] if isinstance(value, nn.Parameter) else []
        own = id(value) if isinstance(value, nn.Parameter) else 0
        return own, value.data_ptr(), value.shape, value.stride(), value.dtype, value.requires_grad
    if isinstance(value, (list, tuple)):
        return type(value), tuple(_fingerprint(one, objects) for one in value)
    if isinstance(value, dict):
        return tuple((key, _fingerprint(one, objects)) for key, one in value.items())
    if isinstance(value, MethodType):
        return _fingerprint(value.__self__, objects), _fingerprint(value.__func__, objects)
    objects.append(value)
    return id(value)
