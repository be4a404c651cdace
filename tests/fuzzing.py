"""Shared by the fuzzers: hostile values, the rules of annotations, limits, and which errors are clean."""

from __future__ import annotations

import ast
import contextlib
import inspect
import linecache
import math
import os
import random
import re
import resource
import signal
import types
import typing
import warnings
from collections import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import lightning_locality

PACKAGE = str(Path(lightning_locality.__file__).parent)
SECONDS, WALL_SECONDS = 5.0, 180.0  # of processor time, which a busy machine does not stretch; and in all
MEMORY = 3 * 2**30  # bytes that a case may reserve
# a message about damaged input, a missing file or a missing package
CLEAN = (ValueError, TypeError, OSError, ImportError)

NUMBERS: tuple[Any, ...] = (
    *(True, False, 0, -1, 1, 2, 3, 7, 10**9, -(10**9), 10**30, 2**63, -(2**63) - 1),
    *(2.5, 1.0, -0.5, 1e-3, 1e30, math.nan, math.inf, -math.inf),
    *(np.int64(2), np.float64(2.5), np.float32("nan"), np.bool_(True), 1j),
)
OTHERS: tuple[Any, ...] = (
    *(None, "", "typo", "1", "nan", "é\x00\udcff", b"x", Path("absent/x")),
    *([], (), {}, [math.nan], [None], [True], ["a"], [1, 2], (1, 2, 3), [[0, 1], [2, 3]], [[[0], [1]], 2], {"a": 1}),
    *({1: 2}, {0, 1}, range(2), object(), lambda *args, **options: None),
    *(np.array([1, 2]), np.array(math.nan), np.array(["a"]), torch.tensor(2), torch.tensor(math.nan)),
    *(torch.ones(2, 3), torch.zeros(0), torch.ones(4, 1, 8, 8), torch.full((4, 1, 8, 8), math.nan), nn.Identity()),
)


class Hang(BaseException):
    """A case took too long; no ``except Exception`` stops it."""


# ---- what an annotation admits


def parameters(function: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Annotation and default of each parameter; those behind ``**options`` are of the classes above."""
    classes = inspect.getmro(function) if inspect.isclass(function) else ()
    makers = [vars(one)["__init__"] for one in classes if "__init__" in vars(one)] if classes else [function]
    found: dict[str, tuple[Any, Any]] = {}
    for maker in makers:
        hints = typing.get_type_hints(maker)
        own = inspect.signature(maker).parameters.values()
        for one in own:
            if one.name != "self" and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL):
                found.setdefault(one.name, (hints.get(one.name, Any), one.default))
        if not any(one.kind is one.VAR_KEYWORD for one in own):
            break
    return found


def fits(value: Any, hint: Any, infinite: bool = False) -> bool:
    """Whether an annotation admits a value: a truth value is no number, a number neither NaN nor, mostly, infinite."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, one, infinite) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, (bool, np.bool_))
    if hint in (int, float):
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, Integral if hint is int else Real):
            return False
        return hint is int or math.isfinite(value) or (infinite and not math.isnan(value))
    if hint is Tensor:
        return isinstance(value, (Tensor, np.ndarray, list, tuple))  # of which one can be made
    if origin is tuple:
        inner = inner[:1] * len(value) if inner[1:] == (...,) and _is_row(value) else inner
        return _is_row(value) and len(value) == len(inner) and all(map(fits, value, inner))
    if isinstance(origin, type) and issubclass(origin, abc.Mapping):
        pairs = value.items() if isinstance(value, Mapping) else [(None, None)]
        return all(fits(k, inner[0]) and fits(v, inner[1], infinite) for k, v in pairs)
    if origin is abc.Callable:
        return callable(value)
    if isinstance(origin, type) and issubclass(origin, abc.Iterable):
        return _is_row(value) and all(fits(one, inner[0]) for one in value)
    kind = origin or hint
    if isinstance(kind, type) and not getattr(kind, "_is_protocol", False):
        return isinstance(value, kind)
    return True


def _is_row(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


# ---- values


def values(hint: Any, base: Any, seed: str) -> st.SearchStrategy[Any]:
    """Good and bad values of an annotated argument: admitted ones, near misses of the good one, and anything."""
    shuffle = random.Random(seed).shuffle  # or few cases would use the first values of each list only
    own = _admitted(hint)
    if isinstance(base, Tensor):
        own += _tensors(base)
    elif isinstance(base, (list, tuple, dict)) and base:
        own += list(_spoilt(base))
    elif isinstance(base, str) and base:
        own += [base.upper(), base[:-1], base + "x", base.encode()]
    elif isinstance(base, int) and not isinstance(base, bool):
        own += [base + 1, base - 1, -base, float(base), base + 0.5, str(base), [base], np.int64(base)]
    pools = [own, list(NUMBERS), list(OTHERS)]
    for pool in (*pools, pools):
        shuffle(pool)  # type: ignore[arg-type]
    return st.one_of(*map(st.sampled_from, pools))


def _admitted(hint: Any) -> list[Any]:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return [value for one in inner for value in _admitted(one)]
    if origin is Literal:
        return [near for one in inner for near in ((one, one.upper(), one[:-1]) if isinstance(one, str) else (one,))]
    if hint in (None, type(None)):
        return [None]
    known = {bool: [True, False, "false", 0], int: [0, 1, 2, 3, 4, 5, 8], float: [0.0, 0.25, 0.5, 1.0, 2, 1e-6]}
    if origin in (tuple, list, abc.Sequence) and inner and inner[0] in known:
        return [[one, two] for one, two in zip(known[inner[0]], known[inner[0]][1:], strict=False)]
    return list(known.get(hint, ["typo"]))


def _tensors(base: Tensor) -> list[Tensor]:
    spoilt = base.detach().clone()
    if spoilt.is_floating_point() and spoilt.numel():
        spoilt.view(-1)[0] = math.nan
    other = [base.to(kind) for kind in (torch.float16, torch.float64, torch.int64, torch.bool)]
    shapes = [
        base.unsqueeze(0),
        base.flatten(),
        base[:0],
        base[:1],
        base[..., :0],
        base[..., :1],
        base.transpose(0, -1),
    ]
    return [base.clone(), spoilt, base * 0, *other, *shapes]


def _spoilt(base: Any) -> Iterator[Any]:
    """Containers with one value replaced, left out or repeated."""
    hostile = (None, True, -1, 0, 10**9, 2.5, math.nan, math.inf, "typo", [], [[0]])
    if isinstance(base, dict):
        for key, value in base.items():
            yield from ({**base, key: bad} for bad in hostile)
            yield {**{k: v for k, v in base.items() if k != key}, "typo": value}
        return
    kind = type(base)
    for k, value in enumerate(base):
        inner = _spoilt(value) if isinstance(value, (list, tuple)) and value else ()
        yield from (kind([*base[:k], bad, *base[k + 1 :]]) for bad in (*hostile, *inner))
    yield from (kind(base[:-1]), kind([*base, base[-1]]), kind(base[::-1]))


# ---- what a case does


@dataclass
class Findings:
    """Distinct failures: what was called with which argument replaced, and what happened; with the shortest example."""

    found: dict[tuple[str, ...], str] = field(default_factory=dict)
    cases: int = 0

    def add(self, key: tuple[str, ...], example: str) -> None:
        known = self.found.get(key)
        if known is None or len(example) < len(known):
            self.found[key] = example

    def __str__(self) -> str:
        lines = [f"{' | '.join(key)} | {example}" for key, example in sorted(self.found.items())]
        return f"{len(lines)} findings in {self.cases} cases:\n" + "\n".join(lines)


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Bound time and memory, and let warnings pass."""

    def stop(number: int, frame: Any) -> None:
        raise Hang

    before = {one: signal.signal(one, stop) for one in (signal.SIGPROF, signal.SIGALRM)}
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        for one, handler in before.items():
            signal.signal(one, handler)


@cache
def _raises(path: str) -> frozenset[int]:
    """Lines of a file that belong to a ``raise``."""
    nodes = ast.walk(ast.parse("".join(linecache.getlines(path))))
    spans = [range(node.lineno, (node.end_lineno or 0) + 1) for node in nodes if isinstance(node, ast.Raise)]
    return frozenset(line for span in spans for line in span)


def complaint(error: BaseException, words: Sequence[str]) -> tuple[str, str] | None:
    """Describe what is wrong with an error, and its message; None for a clean one, which has one of the words."""
    if isinstance(error, Hang):
        return "hang", ""
    trace, given = error.__traceback__, False
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
        code = trace.tb_frame.f_code
        given |= code.co_name == "forward" and code.co_filename.endswith("fuzz_cases.py")
    assert trace is not None
    path, line = trace.tb_frame.f_code.co_filename, trace.tb_lineno
    if given:
        return None  # of a user's network, which does not take such images
    if isinstance(error, OSError) and error.filename is not None:
        return None  # Python's own, which names the file
    if isinstance(error, TypeError) and re.search(r"got multiple values for argument|positional argument", str(error)):
        return None  # the call itself was wrong, or a given function takes other arguments
    if type(error).__name__ == "MisconfigurationException":
        return None  # Lightning's words for wrong settings
    if path.endswith("torch/optim/optimizer.py") and "params" in words:
        return None  # the base class checks what all optimisers have
    name, message = type(error).__name__, str(error).partition("\n")[0]
    where = f"{path.removeprefix(PACKAGE + '/').rpartition('site-packages/')[2]}:{line}"
    if not isinstance(error, CLEAN) or not path.startswith(PACKAGE) or line not in _raises(path):
        return f"{name} in {where}", message[:150]
    if words and not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", str(error)) for word in words if word):
        return f"names nothing, in {where}", message[:150]
    return None


def shown(value: Any) -> str:
    """A value on one short line."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype)[6:]} tensor {tuple(value.shape)}" + " with NaN" * has_nan(value)
    text = re.sub(r" at 0x\w+", "", " ".join(repr(value).split()))
    return text if len(text) < 60 else f"{text[:60]}..."


def has_nan(value: Any, depth: int = 4) -> bool:
    """Whether there is a NaN in numbers, tensors, containers or fields."""
    if isinstance(value, Tensor):
        floating = value.is_floating_point() and value.layout == torch.strided and value.device.type == "cpu"
        return floating and bool(value.isnan().any())
    if isinstance(value, (float, np.floating)):
        return math.isnan(value)
    if isinstance(value, np.ndarray):
        return value.dtype.kind == "f" and bool(np.isnan(value).any())
    if depth and is_dataclass(value) and not isinstance(value, type):
        return any(has_nan(getattr(value, one.name), depth - 1) for one in fields(value))
    if depth and isinstance(value, Mapping):
        return any(has_nan(one, depth - 1) for pair in value.items() for one in pair)
    return bool(depth) and isinstance(value, (list, tuple)) and any(has_nan(one, depth - 1) for one in value)
