"""Arguments against their annotations: what fits, what is said, and that every public callable is checked."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import pickle
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightning_locality
from lightning_locality import CP, AntiLocality, Classification, SameClass, SmallResNet, UniformPatches
from lightning_locality.arguments import ArgumentError, Checked, checked
from lightning_locality.datamodules.image_sets import load_images
from lightning_locality.regularizer.patches import AbstractPatches

nan = float("nan")
# commands, which the command line checks, the checker itself, and what only this package calls
COMMANDS = {"main", "run", "sweep", "rank", "checked", "zeros"}
# results, which are not made by users, and what only this package calls
RESULTS = {
    "AtomicCheckpointIO", "ClassImages", "CorruptImagesError", "CorruptStoreError", "CPRankNotFoundError", "CutShare",
    "DonorCheck", "FastDoubleBackward", "GraphedStep", "ImageSource", "ImagesNotFoundError", "IndexLoader",
    "InfluenceProfile", "IntegrationError", "InteractionProfile", "LocalityCLI", "MetricsFile", "NodeSpectra",
    "NonFiniteLossError", "ReceptiveField", "Run", "SavedConfig", "Stopwatch", "StreamLoader", "SweepFile",
    "UnknownSourceError", "ArgumentError", "Chain", "ProcessWatch",
}  # fmt: skip


def takes(hint: Any) -> Callable[[Any], None]:
    def function(value: Any) -> None:
        return None

    function.__annotations__ = {"value": hint}
    return checked(function)


@pytest.mark.parametrize(
    ("hint", "good", "bad", "words"),
    [
        (int, [3, -1, np.int64(3)], [2.5, 3.0, True, "3", None, nan], "a whole number"),
        (float, [3, 2.5, np.float32(2)], [nan, math.inf, True, "3", None, 1j], "a finite number"),
        (bool, [True, np.bool_(0)], [0, 1, "yes"], "True or False"),
        (str, ["", "a"], [b"a", 1], "a string"),
        (str | None, [None, "a"], [0], "a string or None"),
        (Literal["mse", "l1"], ["l1"], ["mes", None, 1], "'mse' or 'l1'"),
        (Literal[1, 3], [3], [2, True, 1.0, "1"], "1 or 3"),
        (Literal["mean"] | float | None, ["mean", 0], ["grey", nan], "'mean', a finite number or None"),
        (Sequence[int], [[1], (1, 2), [], range(3), torch.Size([2])], ["12", [1.5], 3, {1}], "a list of whole numbers"),
        (tuple[int, int], [(1, 2), [1, 2]], [(1,), (1, nan), 1], "a list of 2 whole numbers"),
        (tuple[int, ...], [(), (1, 2, 3)], [("a",)], "a list of whole numbers"),
        (Sequence[Sequence[int]], [[[1], [2]]], [[1]], "a list of lists of whole numbers"),
        (Mapping[str, float], [{"a": 1}], [{"a": "b"}, {1: 1}, [1]], "a dictionary"),
        (Iterable[int], [iter([1]), [1]], ["ab", ["a"], 1], "a list of whole numbers"),
        (Tensor, [torch.ones(2), np.ones(2), "left to the function"], [], ""),
        (torch.dtype | None, [torch.float32], ["float32"], "a dtype or None"),
        (Callable[[int], int], [abs, nn.Identity()], [1, "abs"], "a function"),
        (AbstractPatches, [UniformPatches(size=2)], [UniformPatches, "far"], "an AbstractPatches such as GivenPatches"),
        (Any, [None, object()], [], ""),
    ],
)
def test_what_fits(hint: Any, good: list[Any], bad: list[Any], words: str) -> None:
    function = takes(hint)
    for value in good:
        function(value)
    for value in bad:
        with pytest.raises(ArgumentError) as caught:
            function(value)
        text = str(caught.value)
        assert text.startswith(f"value must be {words}, got "), text
        assert repr(value)[:20] in text


def test_nothing_is_consumed_and_long_values_are_cut() -> None:
    numbers: Iterator[int] = iter([1, 2])
    takes(Iterable[int])(numbers)
    assert list(numbers) == [1, 2]
    with pytest.raises(ArgumentError, match=r"got array\(.* \.\.\. \(ndarray\)$"):
        takes(str)(np.arange(1000.0))


class Base(Checked):
    def __init__(self, size: int = 1, *, rate: float = math.inf) -> None:
        self.size, self.rate = size, rate


class Passes(Base):
    def __init__(self, name: str, *names: str, **options: Any) -> None:
        super().__init__(**options)
        self.name = name


class Hides(Base):
    def __init__(self, size: str) -> None:
        super().__init__(len(size))


@dataclass(frozen=True)
class Fields(Checked):
    size: int
    shares: tuple[float, ...] = ()


def test_constructors_check_what_they_pass_on() -> None:
    assert Passes("a", "b", size=3).size == 3
    assert Base(rate=math.inf).rate == math.inf  # as the default
    assert Hides("abc").size == 3
    for make, words in (
        (lambda: Base(2.5), "size must be a whole number, got 2.5"),  # type: ignore[arg-type]
        (lambda: Base(rate=nan), "rate must be a finite number, got nan"),
        (lambda: Base(rate=-math.inf), "rate must be a finite number, got -inf"),
        (lambda: Passes("a", size="3"), "size must be a whole number, got '3'"),
        (lambda: Passes("a", "b", 3), "names must be a string, got 3"),  # type: ignore[arg-type]
        (lambda: Fields(1, (0.5, nan)), r"shares must be a list of finite numbers, got \(0.5, nan\)"),
    ):
        with pytest.raises(ArgumentError, match=words):
            make()
    # wrong calls are left to Python's own words
    with pytest.raises(TypeError, match="unexpected keyword argument 'sise'"):
        Base(sise=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        Passes()  # type: ignore[call-arg]
    # copies are made without arguments
    fields = Fields(2, (0.5,))
    assert copy.deepcopy(fields) == fields
    assert pickle.loads(pickle.dumps(fields)) == fields
    assert inspect.signature(Fields).parameters.keys() == {"size", "shares"}


def public() -> Iterator[tuple[str, Any]]:
    for info in pkgutil.walk_packages(lightning_locality.__path__, "lightning_locality."):
        if info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == info.name:
                yield name, value


def test_every_public_callable_is_checked() -> None:
    found = dict(public())
    unchecked = set()
    for name, value in found.items():
        if inspect.isclass(value):
            # tuples are made of what they are given
            if not issubclass(value, Checked) and not issubclass(value, tuple):
                unchecked.add(name)
        elif not hasattr(value, "__wrapped__"):
            unchecked.add(name)
    assert unchecked <= COMMANDS | RESULTS, sorted(unchecked - COMMANDS - RESULTS)
    assert not any(hasattr(lightning_locality, name) and name in RESULTS for name in lightning_locality.__all__)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CP([3, 3], rank=2, init="norml"), "init must be 'normal' or 'balanced', got 'norml'"),
        (lambda: CP([3, 3], rank=2, init_of="weight"), "init_of must be 'weights' or 'product', got 'weight'"),
        (lambda: CP([3, 3], rank=2, seed=2.5), "seed must be a whole number, got 2.5"),
        (lambda: CP([3, 3], rank=2, seed=None), "seed must be a whole number, got None"),
        (lambda: CP([3, 3], rank=2, seed=True), "seed must be a whole number, got True"),
        (lambda: UniformPatches(nan), "size must be a whole number, got nan"),
        (lambda: SameClass("digits", background=nan), "background must be 'mean', 'black' or a finite number, got nan"),
        (lambda: load_images("digits", "tets"), "part must be 'train', 'validation' or 'test', got 'tets'"),
        (
            lambda: Classification(SmallResNet(), penalty=object()),
            "penalty must be an AntiLocality, a dictionary or None, got <object",
        ),
        (lambda: AntiLocality("far"), "patches must be an AbstractPatches such as GivenPatches or None, got 'far'"),
    ],
)
def test_what_was_accepted_before(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        make()
