"""How much memory a computation takes at its peak."""

from __future__ import annotations

__all__ = ["OUT_OF_MEMORY", "is_out_of_memory", "peak_bytes", "too_large"]

import math
import weakref
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# among these are errors of other kinds, which is_out_of_memory tells apart
OUT_OF_MEMORY = (MemoryError, RuntimeError)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on any device: the CPU's allocator and CUDA's libraries raise a plain RuntimeError."""
    words = ("allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


def too_large(allowed: str, device: torch.device) -> MemoryError:
    """What to say where a single row does not fit."""
    return MemoryError(
        f"one row takes more memory on {device} than {allowed}: allow more with Evaluation(memory=...), use a smaller "
        "dtype, smaller images or another device"
    )


def peak_bytes(function: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, int]:
    """Result of a computation, and the most bytes that its tensors took at a time, beyond what there was before.

    On CUDA the allocator counts (its peak statistics are reset). Elsewhere the tensors that operations return are
    followed, and the working space of convolutions is added to them.

    Args:
        function: The computation.
        device: Where it takes place.

    Example:
        >>> x = torch.zeros(1000, dtype=torch.float64)
        >>> peak_bytes(lambda: (x + 1) * 2, x.device)[1]
        16000
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return function(), torch.cuda.max_memory_allocated(device) - before
    storages = _LiveStorages()
    with storages:
        result = function()
    return result, storages.peak


@final
class _LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operations create, until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live, self.peak, self._known = 0, 0, set[int]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if _has_storage(t)}
        result = func(*args, **kwargs)
        for tensor in tree_iter(result):
            if not _has_storage(tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in given and key not in self._known:
                self._known.add(key)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        self.peak = max(self.peak, self.live + _working_space(func, args, result))
        return result

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _has_storage(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


def _working_space(func: Any, args: tuple[Any, ...], result: Any) -> int:
    """Bytes that a convolution takes inside, where nothing can follow it."""
    match getattr(func, "_overloadpacket", None):
        case torch.ops.aten.convolution:
            x, weight, y = args[0], args[1], result
        case torch.ops.aten.convolution_backward:
            y, x, weight = args[:3]
        case _:
            return 0
    if x.dtype != torch.float64:
        # both are copied into the library's own order of numbers
        return int((x.numel() + y.numel()) * x.element_size())
    # the windows of the whole batch are written out
    return int(y.numel() // max(1, y.shape[1]) * math.prod(weight.shape[1:]) * x.element_size())
