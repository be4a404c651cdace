"""What running a model changes apart from its result, restored: its buffers, and torch's random numbers."""

from __future__ import annotations

__all__: list[str] = []

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook


def function_of(model: Callable[..., Any]) -> Callable[..., Any]:
    """A function without the arguments that were fixed."""
    return function_of(model.func) if isinstance(model, partial) else model


def modules_of(model: Callable[..., Any]) -> list[nn.Module]:
    """All modules of a network, also of one given as its method."""
    function = function_of(model)
    owner = getattr(function, "__self__", function)
    return list(owner.modules()) if isinstance(owner, nn.Module) else []


@contextmanager
def restored(model: Callable[..., Any], *tensors: Tensor) -> Iterator[None]:
    """Restore on exit the buffers of a model and the random generators of the CPU, of its devices and the tensors'.

    A model may run networks that are not among its modules: their buffers are kept from their first call on.
    """
    kept: dict[nn.Module, list[tuple[str, Tensor | None, Tensor | None]]] = {}
    modules, thread = modules_of(model), get_ident()

    def keep(module: nn.Module) -> None:
        buffers = module._buffers.items()
        kept[module] = [(name, b, None if b is None else b.detach().clone()) for name, b in buffers]

    def keep_all(root: nn.Module, _: Any) -> None:
        # the hook is called for all threads
        if root not in kept and get_ident() == thread:
            for module in root.modules():
                if module not in kept:
                    keep(module)

    for module in modules:
        keep(module)
        tensors = (*tensors, *module.parameters(recurse=False), *module.buffers(recurse=False))
    # torch.compile, if in use, warns of the hook and cannot trace it
    traceable = torch.compiler.disable(keep_all) if "torch._dynamo" in sys.modules else keep_all  # type: ignore[no-untyped-call]
    compiled = any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in modules)
    hook = None if compiled else register_module_forward_pre_hook(traceable)
    devices = sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        if hook is not None:
            hook.remove()
        for module, buffers in kept.items():
            for name, buffer, value in buffers:
                module._buffers[name] = buffer
                # written only if it changed: a graph built before may still need it
                if buffer is not None and value is not None and not torch.equal(buffer, value):
                    with torch.no_grad():
                        buffer.copy_(value)
