"""How networks are evaluated to be measured: state, chunks, memory, processes, progress."""

from __future__ import annotations

__all__ = [
    "OUT_OF_MEMORY",
    "Evaluation",
    "Processes",
    "exact_float32",
    "is_out_of_memory",
    "measuring",
    "peak_bytes",
    "scores",
    "too_large",
]

import copy
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn
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


@contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32, no bfloat16 and no autocast in place of float32 inside; afterwards all is as before.

    Torch has two sets of names for TF32 and refuses to answer one when the other says something else, so that inside
    both say the same: whatever a network asks, it gets an answer.
    """
    cuda, cpu, cudnn = torch.backends.cuda.matmul, torch.backends.mkldnn, torch.backends.cudnn
    # names that torch has no types for
    backends: list[Any] = [cuda, cpu.matmul, cpu.conv, cudnn.conv, cudnn.rnn]  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        _exact(backends)
        matmul = torch.get_float32_matmul_precision()
        try:
            convolutions = cudnn.allow_tf32
        except RuntimeError:
            # it says yes, and the new names, just set, say no
            convolutions = True
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32 = False
        _exact(backends)
        try:
            with ExitStack() as stack:
                for kind in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
                    stack.enter_context(torch.autocast(kind, enabled=False))
                yield
        finally:
            cudnn.allow_tf32 = convolutions
            torch.set_float32_matmul_precision(matmul)
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _exact(backends: list[Any]) -> None:
    for backend in backends:
        backend.fp32_precision = "ieee"


GIB = 2**30
# rows per call at most, or a part of all rows: several processes find work, and progress is seen
MOST_ROWS, LEAST_CHUNKS = 512, 64
HALF = (torch.float16, torch.bfloat16)


class Processes(Protocol):
    """Processes that share the work, one device each: a ``Fabric`` of Lightning is one, after ``launch()``."""

    @property
    def global_rank(self) -> int:
        """Number of this process."""

    @property
    def world_size(self) -> int:
        """How many there are."""

    def all_gather(self, data: Any) -> Any:
        """The tensors ``(...)`` of all processes, ``(world_size, ...)``."""


def scores(outputs: Tensor) -> Tensor:
    """A network's outputs as ``(n, C)``, whether it has one or several.

    Args:
        outputs: ``(n,)`` or ``(n, C)``.

    Raises:
        ValueError: Anything else.
    """
    fits = isinstance(outputs, Tensor) and outputs.ndim in (1, 2) and outputs.is_floating_point() and outputs.numel()
    if not fits:
        got = f"{tuple(outputs.shape)} of {outputs.dtype}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"model must give real numbers (n,) or (n, C) for n images, got {got}: wrap it in a module whose forward "
            "returns the logits alone, flattened to (n, C)"
        )
    return outputs[:, None] if outputs.ndim == 1 else outputs


@final
class Evaluation:
    """How a network is evaluated at thousands of inputs.

    Results are the same for any number of processes: the chunks do not depend on it.

    Args:
        chunk: Rows per call; None: as many as the memory allows, found by calls with one and two rows, up to 512
            or a 64th of all rows.
        memory: What a call may take beyond the model and its data, in GiB per process; None: 1 on the CPU, 80 % of
            what is free on CUDA.
        dtype: Of weights and images while evaluating; None: the model's own, or float32 for one of 16 bits, whose
            rounding would drown what is measured. Another one than the model's evaluates a copy.
        processes: Those that share the work, each of which must make the same calls; None: this one alone.
        progress: Called after every chunk with the number of rows done, as far as this process knows, and of all.

    Raises:
        ValueError: A chunk or memory of nothing, or a type that is not floating.

    Example:
        >>> Evaluation(chunk=2).map(lambda rows: rows.double().square(), 5, torch.device("cpu"))
        tensor([ 0.,  1.,  4.,  9., 16.], dtype=torch.float64)
    """

    def __init__(
        self,
        chunk: int | None = None,
        memory: float | None = None,
        dtype: torch.dtype | None = None,
        processes: Processes | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least one row per call, got {chunk}")
        if memory is not None and not memory > 0:
            raise ValueError(f"memory must be above 0 GiB, got {memory}")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating type, got {dtype}")
        self.chunk, self.memory, self.dtype = chunk, memory, dtype
        self.processes = processes if processes is not None and processes.world_size > 1 else None
        self.progress = progress

    @contextmanager
    def prepared(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model as it is evaluated, in this type and :func:`measuring`; a copy where the type is another one.

        Float32 is computed as such inside, neither under autocast nor in TF32 as CUDA does convolutions by default:
        differences of outputs are measured, and what counts as rounding is that of the type.

        Args:
            model: What is measured; as it was afterwards.
        """
        with measuring(model), exact_float32():
            tensors = list(chain(model.parameters(), model.buffers()))
            types = {t.dtype for t in tensors if t.is_floating_point()}
            dtype = torch.float32 if self.dtype is None and types & set(HALF) else self.dtype
            kept = dtype is None or types <= {dtype}
            # what inference mode made cannot be differentiated through, nor changed
            usable = torch.is_inference_mode_enabled() or not any(t.is_inference() for t in tensors)
            yield model if kept and usable else copy.deepcopy(model).to(dtype)

    def map(self, function: Callable[[Tensor], Tensor], count: int, device: torch.device) -> Tensor:
        """Values of a function of row numbers.

        Args:
            function: Takes row numbers ``(n,)``, int64 on ``device``, and gives real numbers ``(n, ...)``; the value
                of a row must not depend on the other rows of the call.
            count: How many rows there are.
            device: Where the function works.

        Returns:
            ``(count, ...)`` in float64 on ``device``; the same on every process.

        Raises:
            ValueError: No rows, results of another shape, or results that are not finite.
            MemoryError: One row takes more than there is, or than ``memory`` gives.
        """
        if count < 1:
            raise ValueError(f"count must be at least one row, got {count}")
        device, failure, done = torch.device(device), None, 0
        rank, world = (0, 1) if self.processes is None else (self.processes.global_rank, self.processes.world_size)
        chunk = self._together(lambda: self._chunk(function, count, device), device)
        numbers = range(0, count, chunk)
        rows = count if world == 1 else -(-len(numbers) // world) * chunk
        own = torch.empty(0)
        try:
            # a process without a chunk of its own learns the shape of the results from the first one
            step = chunk
            for start in numbers[rank::world] or numbers[:1]:
                part, step = _evaluated(function, start, min(start + chunk, count), step, device)
                own = own if done else part.new_zeros(rows, *part.shape[1:])
                own[done : done + len(part)] = part
                done += len(part)
                # not beside the next one
                del part
                if self.progress is not None:
                    self.progress(min(start + world * chunk, count), count)
        except Exception as error:
            failure = error
        values = self._gathered(own, failure, chunk, count, device)
        # the sum first, which takes no memory
        if not values.sum().isfinite() and (bad := int((~values.isfinite()).sum())):
            raise ValueError(
                f"model gave {bad} of {values.numel()} results that are not finite: look at its weights and images, or "
                "evaluate it in float64 with Evaluation(dtype=torch.float64)"
            )
        return values

    def _chunk(self, function: Callable[[Tensor], Tensor], count: int, device: torch.device) -> int:
        """Rows per call: as given, or the power of two that fits."""
        if self.chunk is not None:
            return self.chunk
        budget = self._budget(device)
        peaks = []
        # CUDA's libraries take what they keep with the first call: it does not count
        for rows in [1] * (device.type == "cuda") + list(range(1, min(count, 2) + 1)):
            numbers = torch.arange(rows, device=device)
            try:
                result, peak = peak_bytes(lambda numbers=numbers: _checked(function(numbers), numbers), device)  # type: ignore[misc]
            except OUT_OF_MEMORY as error:
                if not is_out_of_memory(error):
                    raise
                if rows > 1:
                    return 1
                raise too_large("there is", device) from error
            peaks.append(peak)
        peaks = peaks[-min(count, 2) :]
        kept = 8 * count * result[0].numel()
        if peaks[0] + kept > budget and self.memory is not None:
            needed = f"{(peaks[0] + kept) / GIB:.3g} GiB with the results of all rows"
            raise too_large(f"memory = {self.memory:g} GiB allows, namely {needed}", device)
        fitting = 1 + max(0, budget - kept - peaks[0]) // max(1, peaks[-1] - peaks[0]) if count > 1 else 1
        most = min(fitting, max(MOST_ROWS, count // LEAST_CHUNKS))
        # a power of two: results do not hang on a few bytes more or less, which there are on a device in use
        return 1 << (int(most).bit_length() - 1)

    def _budget(self, device: torch.device) -> int:
        if self.memory is not None:
            return int(self.memory * GIB)
        if device.type != "cuda":
            return GIB
        free = torch.cuda.mem_get_info(device)[0]
        return int(0.8 * (free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)))

    def _together(self, number: Callable[[], int], device: torch.device) -> int:
        """The least of all processes' numbers; an error of one is an error of all."""
        if self.processes is None:
            return number()
        failure, value = None, 0
        try:
            value = number()
        except Exception as error:
            failure = error
        least = int(self.processes.all_gather(torch.tensor(value, device=device)).min())
        _raise(failure, least == 0)
        return least

    def _gathered(self, own: Tensor, failure: Exception | None, chunk: int, count: int, device: torch.device) -> Tensor:
        """Results of all processes in the order of the rows."""
        if self.processes is None:
            _raise(failure, False)
            return own
        failed = torch.tensor(int(failure is not None), device=device)
        _raise(failure, bool(self.processes.all_gather(failed).any()))
        everything: Tensor = self.processes.all_gather(own).to(device)
        in_turn = everything.reshape(len(everything), -1, chunk, *own.shape[1:]).transpose(0, 1)
        return in_turn.reshape(-1, *own.shape[1:])[:count]


def _raise(failure: Exception | None, elsewhere: bool) -> None:
    if failure is not None:
        raise failure
    if elsewhere:
        raise RuntimeError("another process failed to evaluate the model: its own message says why")


def _evaluated(
    function: Callable[[Tensor], Tensor], start: int, stop: int, step: int, device: torch.device
) -> tuple[Tensor, int]:
    """Rows from start to stop, in smaller steps where memory does not suffice; and the step that did."""
    while True:
        try:
            parts = (torch.arange(k, min(k + step, stop), device=device) for k in range(start, stop, step))
            results = [_checked(function(rows), rows) for rows in parts]
            return results[0] if len(results) == 1 else torch.cat(results), step
        except OUT_OF_MEMORY as error:
            if not is_out_of_memory(error):
                raise
            if step == 1:
                raise too_large("there is", device) from error
        # outside the handler, which holds on to the tensors of the failed call
        step = (step + 1) // 2
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _checked(result: Tensor, rows: Tensor) -> Tensor:
    if result.ndim == 0 or len(result) != len(rows) or result.is_complex():
        raise ValueError(
            f"function must give real numbers for each of {len(rows)} rows, got {tuple(result.shape)} of {result.dtype}"
        )
    return result.detach().to(rows.device, torch.float64)
