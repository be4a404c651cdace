"""Arguments checked against their annotations: one rule for every public constructor and function."""

from __future__ import annotations

__all__ = ["ArgumentError", "Checked", "checked"]

import inspect
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, update_wrapper
from numbers import Integral, Real
from typing import (
    Any,
    Literal,
    ParamSpec,
    Self,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

import numpy as np

P = ParamSpec("P")
T = TypeVar("T")

_WORDS: dict[Any, str] = {
    int: "whole number",
    float: "finite number",
    str: "string",
    Callable: "function",
    Mapping: "dictionary",
    dict: "dictionary",
}
_LISTS = (tuple, list, Sequence, Iterable)


class ArgumentError(ValueError, TypeError):
    """An argument that its annotation does not admit; caught as either, as scikit-learn's error of this kind."""


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """The function, with its arguments checked at every call against its annotations.

    Whole numbers are of any integer type but bool; numbers must be finite, unless the default is not; lists and tuples
    pass for each other, and their items are checked; a string counts as a list nowhere. Tensors are left to the
    function, which may take arrays of other libraries. What cannot be checked, such as type variables and protocols, is
    admitted.

    Args:
        function: Any function.

    Raises:
        ArgumentError: At a call: an argument, its value, and what it must be.

    Example:
        >>> @checked
        ... def slices(count: int, how: Literal["rows", "columns"] = "rows") -> int:
        ...     return count
        >>> slices(2.5)
        Traceback (most recent call last):
        lightning_locality.arguments.ArgumentError: count must be a whole number, got 2.5
    """
    check = _check

    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        check(function, args, kwargs)
        return function(*args, **kwargs)

    # with the globals of the function, by which doctest and jsonargparse find it
    own = types.FunctionType(call.__code__, function.__globals__, closure=call.__closure__)
    return cast(Callable[P, T], update_wrapper(own, function))


class Checked:
    """Base of classes whose constructor checks its arguments as `checked` does, those passed on to a base too.

    In ``__new__``, since a wrapper around ``__init__`` would stand between the frames that Lightning reads
    hyper-parameters from, and hide the source that the command line reads options from.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """An instance whose arguments have been checked; without arguments where a copy is made."""
        given = args
        for base in cls.__mro__:
            if (init := base.__dict__.get("__init__")) and inspect.isfunction(init):
                passed_on = _check(init, (None, *given), kwargs)
                if passed_on is None:
                    break
                given, kwargs = (), passed_on
        return super().__new__(cls)


def _check(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Raise for the first argument that does not fit; return what falls into ``**kwargs``, or None if nothing may."""
    signature, hints = _annotations(function)
    try:
        bound = signature.bind_partial(*args, **kwargs)
    except TypeError:  # an unknown name or too many: Python's own message at the call
        return None
    for name, value in bound.arguments.items():
        parameter = signature.parameters[name]
        if parameter.kind is parameter.VAR_KEYWORD:
            return dict(value)
        hint = hints.get(name, Any)
        values = value if parameter.kind is parameter.VAR_POSITIONAL else [value]
        for one in values:
            # a default may be what its annotation does not say: infinite, or a sentinel
            if one is not parameter.default and not _fits(one, hint) and not _same(one, parameter.default):
                beyond = " (beyond 64 bits)" if isinstance(one, Integral) and not _whole(one) else ""
                raise ArgumentError(f"{name} must be {_described(hint)}, got {_shown(one)}{beyond}")
    return None


@cache
def _annotations(function: Callable[..., Any]) -> tuple[inspect.Signature, dict[str, Any]]:
    try:
        hints = get_type_hints(function)
    except NameError:  # names that a subclass of a user imports for type checkers only
        hints = {}
    return inspect.signature(function), hints


def _same(value: Any, default: Any) -> bool:
    return isinstance(value, float) and isinstance(default, float) and value == default


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return any(value == part for part in parts if type(value) is type(part))
    if hint is None or hint is type(None):
        return value is None
    kind: Any = origin or hint
    if kind is Any or not isinstance(kind, type) or getattr(kind, "_is_protocol", False) or is_typeddict(kind):
        return True
    if kind.__module__ == "torch" and kind.__name__ == "Tensor":  # not imported: figures do without torch
        return True
    if isinstance(value, bool | np.bool_):  # Python counts it among the whole numbers
        return kind in (bool, object)
    if issubclass(kind, int) and kind is not bool:
        return _whole(value)
    if kind is float:
        return _whole(value) or (isinstance(value, Real) and not isinstance(value, Integral) and math.isfinite(value))
    if kind is str:
        return isinstance(value, str)
    if kind in _LISTS:
        return _fits_items(value, kind, parts)
    if issubclass(kind, Mapping):
        keys, values = parts or (Any, Any)
        return isinstance(value, Mapping) and all(_fits(k, keys) and _fits(v, values) for k, v in value.items())
    return callable(value) if kind is Callable else isinstance(value, kind)


def _whole(value: Any) -> bool:
    """Whether a number is whole, and one that torch takes."""
    return isinstance(value, Integral) and -(2**63) <= int(value) < 2**63


def _fits_items(value: Any, kind: type, parts: Sequence[Any]) -> bool:
    """Lists and tuples; of what can only be iterated over, nothing is consumed."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable if kind is Iterable else Sequence):
        return False
    if not isinstance(value, Sequence) or not parts:
        return True
    if kind is tuple and Ellipsis not in parts:
        return len(value) == len(parts) and all(map(_fits, value, parts))
    return all(_fits(item, parts[0]) for item in value)


def _described(hint: Any) -> str:
    return _one_of(_words(hint, many=False))


def _words(hint: Any, many: bool) -> list[str]:
    """The values that an annotation admits, in words, singular or plural."""
    origin, parts = get_origin(hint), get_args(hint)
    kind: Any = origin or hint
    if origin in (Union, types.UnionType):
        return [word for part in parts for word in _words(part, many)]
    if origin is Literal:
        return [repr(value) for value in parts]
    if kind in (None, types.NoneType):
        return ["None"]
    if kind is bool:
        return ["True or False"]
    if kind in _LISTS:
        number = f"{len(parts)} " if kind is tuple and Ellipsis not in parts else ""
        items = _one_of([word for part in parts if part is not Ellipsis for word in _words(part, many=True)])
        return [f"{'lists' if many else 'a list'} of {number}{items}"]
    word = _WORDS[kind] if kind in _WORDS else str(getattr(kind, "__name__", kind))
    if inspect.isabstract(kind) and kind not in _WORDS and kind.__subclasses__():
        word += f" such as {kind.__subclasses__()[0].__name__}"
    article = "an" if word[0] in "AEIOU" else "a"
    return [f"{word}s" if many else f"{article} {word}"]


def _one_of(words: Sequence[str]) -> str:
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]} ... ({type(value).__name__})"
