"""Evaluation of networks for measurement: a state that is restored, exact arithmetic, rows in chunks."""

from __future__ import annotations

__all__ = ["Evaluation", "measuring"]

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, final

import torch
from torch import Tensor, nn

from lightning_locality.arguments import Checked, checked
from lightning_locality.ranks.conversion import as_tensor
from lightning_locality.regularizer.state import restored

# rows per call by default: the larger of a number and a part of all rows (few calls for many small inputs), as long as
# what goes into a call is no more than this many numbers; a network's activations take a few hundred times as many
_MIN_ROWS, _PARTS, _NUMBERS, _NUMBERS_CPU = 512, 64, 2**27, 2**20


@checked
@contextmanager
def measuring(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[nn.Module]:
    """Yield the model in evaluation mode, without parameter gradients, in exact arithmetic; restore everything on exit.

    Restored, also after an error, are the modules' ``training`` flags, the parameters' ``requires_grad`` and ``grad``,
    all buffers (running statistics), torch's global random generators and its precision settings. Inside, autocast and
    the TF32 and bfloat16 substitutes for float32 are disabled. Hooks stay: they may be part of the model's function.

    Args:
        model: The network to be measured.
        dtype: Of weights and buffers inside; None: the model's own. A copy is yielded if it changes, or if the model
            has tensors made in inference mode, which cannot be differentiated through.

    Example:
        >>> layer = torch.nn.BatchNorm1d(1).float()
        >>> with measuring(layer, torch.float64) as network:
        ...     network.training, network.weight.dtype
        (False, torch.float64)
        >>> layer.training, layer.weight.dtype
        (True, torch.float32)
    """
    training = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    tensors = [*model.parameters(), *model.buffers()]
    with restored(model), _exact_float32():
        try:
            model.eval()
            for parameter in model.parameters():
                # requires_grad cannot be set again on a tensor made in inference mode
                if parameter.requires_grad and not parameter.is_inference():
                    parameter.requires_grad_(False)
            same = dtype is None or all(t.dtype == dtype for t in tensors if t.is_floating_point())
            usable = torch.is_inference_mode_enabled() or not any(t.is_inference() for t in tensors)
            yield model if same and usable else copy.deepcopy(model).to(dtype)
        finally:
            for module, flag in training:
                module.training = flag
            for parameter, required, gradient in gradients:
                if parameter.requires_grad != required:
                    parameter.requires_grad_(required)
                parameter.grad = gradient


@contextmanager
def _exact_float32() -> Iterator[None]:
    """Disable autocast and the TF32 and bfloat16 substitutes for float32."""
    # Torch has an old and a new set of names for these settings and refuses to answer the old ones if the new ones say
    # something else. Both are set, so that a network that reads either gets an answer.
    cuda, cpu, cudnn = torch.backends.cuda.matmul, torch.backends.mkldnn, torch.backends.cudnn
    # names that torch has no types for
    backends: list[Any] = [cuda, cpu.matmul, cpu.conv, cudnn.conv, cudnn.rnn]  # type: ignore[attr-defined]
    with ExitStack() as stack:
        for backend in backends:
            stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
            backend.fp32_precision = "ieee"
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        try:
            convolutions = cudnn.allow_tf32
        except RuntimeError:
            # the old name says True, and the new ones, just set, say False
            convolutions = True
        stack.callback(setattr, cudnn, "allow_tf32", convolutions)
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32 = False
        # again: the old names have set some of them
        for backend in backends:
            backend.fp32_precision = "ieee"
        for kind in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@final
@dataclass(frozen=True)
class Evaluation(Checked):
    """How a network is evaluated at thousands of inputs.

    Args:
        chunk: Rows per call, halved when memory runs out; None: by number, size and device. It changes rounding only.
        dtype: Type of weights and images during the evaluation; None: the model's own, or float32 for 16-bit models,
            whose rounding would drown what is measured. If it differs from the model's, a copy is evaluated.
        progress: Called after every chunk with the number of rows done and the number of all rows.

    Raises:
        ValueError: A chunk below one row, or a type that is not floating.

    Example:
        >>> Evaluation(chunk=2).map(lambda rows: rows.double().square(), 5, torch.device("cpu"))
        tensor([ 0.,  1.,  4.,  9., 16.], dtype=torch.float64)
    """

    chunk: int | None = None
    dtype: torch.dtype | None = None
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk must be at least one row per call, got {self.chunk}")
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating type, got {self.dtype}")

    def prepared(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """Enter :func:`measuring` with the type of this evaluation."""
        half = any(t.dtype in (torch.float16, torch.bfloat16) for t in chain(model.parameters(), model.buffers()))
        return measuring(model, torch.float32 if half and self.dtype is None else self.dtype)

    def placed(self, network: nn.Module, images: Tensor) -> Tensor:
        """Images on the device and of the type of a network; without weights, of the type of this evaluation."""
        tensors = (t for t in chain(network.parameters(), network.buffers()) if t.is_floating_point())
        return images.to(next(tensors, images.to(self.dtype or images.dtype)))

    def map(self, function: Callable[[Tensor], Tensor], count: int, device: torch.device, numbers: int = 1) -> Tensor:
        """Evaluate a function of row numbers at 0, ..., count - 1: ``(count, ...)`` in float64 on ``device``.

        The function takes row numbers ``(n,)``, int64 on ``device``, and gives real numbers ``(n, ...)``; the value of
        a row must not depend on the other rows of the call. ``numbers``, its size, bounds the default chunk. Raises a
        MemoryError if a single row does not fit.
        """
        if count < 1:
            raise ValueError(f"count must be at least one row, got {count}")
        budget = _NUMBERS_CPU if torch.device(device).type == "cpu" else _NUMBERS
        most = max(1, min(max(_MIN_ROWS, count // _PARTS), budget // numbers))
        # a power of two by default
        chunk = self.chunk or 1 << (most.bit_length() - 1)
        values, done = torch.empty(0), 0
        while done < count:
            rows = torch.arange(done, min(done + chunk, count), device=device)
            part = _attempt(function, rows)
            if part is None:
                chunk = (len(rows) + 1) // 2
                if rows.is_cuda:
                    torch.cuda.empty_cache()
                continue
            values = values if done else part.new_empty(count, *part.shape[1:])
            values[done : done + len(rows)] = part
            done += len(rows)
            # freed before the next call
            del part
            if self.progress is not None:
                self.progress(done, count)
        # the sum first, which takes no memory
        if not values.sum().isfinite() and (bad := int((~values.isfinite()).sum())):
            raise ValueError(
                f"model gave {bad} of {values.numel()} results that are not finite: look at its weights and images, or "
                "evaluate it in float64 with Evaluation(dtype=torch.float64)"
            )
        return values


def _attempt(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor | None:
    """Call a function of row numbers; None if memory ran out, by which time the tensors of the call are freed."""
    try:
        result = function(rows)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if len(rows) == 1:
            raise row_too_large(rows.device) from error
        return None
    if result.ndim == 0 or len(result) != len(rows) or result.is_complex():
        raise ValueError(
            f"function must give real numbers for each of {len(rows)} rows, got {tuple(result.shape)} of {result.dtype}"
        )
    return result.detach().to(rows.device, torch.float64)


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether memory ran out: the CPU's allocator and CUDA's libraries raise a plain RuntimeError."""
    words = ("allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


def row_too_large(device: torch.device) -> MemoryError:
    """Return the error for a single row that does not fit."""
    return MemoryError(
        f"one row takes more memory on {device} than there is: use a smaller dtype, smaller images or another device"
    )


def as_images(images: Any) -> Tensor:
    """Return floating-point images ``(N, C, H, W)``, or raise a ValueError."""
    found: Tensor = as_tensor(images, "images")
    if found.dim() != 4 or not found.is_floating_point() or not found.numel():
        raise ValueError(f"images must be floating-point (N, C, H, W), got {found.dtype} {tuple(found.shape)}")
    return found.detach()


def scores(outputs: Tensor) -> Tensor:
    """Return a network's outputs ``(n,)`` or ``(n, C)`` as ``(n, C)``, or raise a ValueError."""
    tensor = isinstance(outputs, Tensor)
    if not (tensor and outputs.ndim in (1, 2) and outputs.is_floating_point() and outputs.numel()):
        got = f"{tuple(outputs.shape)} of {outputs.dtype}" if tensor else type(outputs).__name__
        raise ValueError(
            f"model must give real numbers (n,) or (n, C) for n images, got {got}: wrap it in a module whose forward "
            "returns the logits alone, flattened to (n, C)"
        )
    return outputs[:, None] if outputs.ndim == 1 else outputs
