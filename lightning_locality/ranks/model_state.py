"""A model's state: what measuring leaves as it was."""

from __future__ import annotations

__all__ = ["measuring"]

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and parameters without gradients inside; afterwards all is as it was, also after an error.

    Put back are every module's ``training`` flag, the parameters' ``requires_grad`` and ``grad``, buffers, and the
    state of torch's random generators. Hooks stay in place: they may be a part of what the model computes.

    Args:
        model: What is measured.
    """
    modules, parameters = list(model.modules()), list(model.parameters())
    training = [module.training for module in modules]
    gradients = [(parameter.requires_grad, parameter.grad) for parameter in parameters]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in modules
        for name, buffer in module._buffers.items()
    ]
    cuda = sorted({tensor.device.index for tensor in chain(parameters, model.buffers()) if tensor.is_cuda})
    with torch.random.fork_rng(devices=cuda):
        try:
            model.eval()
            for parameter in parameters:
                # what inference mode made would keep it ever after
                if parameter.requires_grad and not parameter.is_inference():
                    parameter.requires_grad_(False)
            yield
        finally:
            for module, flag in zip(modules, training, strict=True):
                module.training = flag
            for parameter, (required, gradient) in zip(parameters, gradients, strict=True):
                if parameter.requires_grad != required:
                    parameter.requires_grad_(required)
                parameter.grad = gradient
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                # written only where it changed: a graph that was built before may still need it
                if buffer is not None and value is not None and not torch.equal(buffer, value):
                    with torch.no_grad():
                        buffer.copy_(value)
