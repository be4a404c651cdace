"""Lightning's argument parser, with the name that was probably meant in its messages."""

from __future__ import annotations

__all__ = ["SuggestingParser"]

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any, NoReturn

from pytorch_lightning import LightningDataModule, LightningModule
from pytorch_lightning.cli import LightningArgumentParser
from torch import nn

from lightning_locality.regularizer.patches import AbstractPatches
from lightning_locality.suggest import nearest

_OPTION = re.compile(r"does not accept (?:option|nested key) '(?:\w+\.)*?([\w.]+)'")
# jsonargparse 4.39 says "Validation failed: Key 'x' is not expected", 4.53 "Option 'x' is not accepted"
_ARGUMENT = re.compile(r"class_path '([\w.]+)':\s+(?:Validation failed: )?(?:Option|Key) '(\w+)' is not")
_CLASS = re.compile(r"Expected a dot import path string: (\w+)")


class SuggestingParser(LightningArgumentParser):
    """Lightning's parser, which also says which key, argument or class was probably meant."""

    def error(self, message: str, *args: Any, **kwargs: Any) -> NoReturn:
        """Add the nearest known names to the message about a wrong one."""
        super().error(f"{message}{self._hints(str(message))}", *args, **kwargs)

    def _hints(self, message: str) -> str:
        hints = [nearest(name, self._options()) for name in _OPTION.findall(message)]
        for path, name in _ARGUMENT.findall(message):
            module, _, cls = path.rpartition(".")
            hints.append(nearest(name, inspect.signature(getattr(import_module(module), cls)).parameters))
        known = {
            cls.__name__
            for base in (LightningModule, LightningDataModule, nn.Module, AbstractPatches)
            for cls in _subclasses(base)
        }
        hints += [nearest(name, known) for name in _CLASS.findall(message)]
        return "".join("\nD" + hint.strip(" ()d") for hint in dict.fromkeys(hints) if hint)

    def _options(self) -> set[str]:
        """Dotted names of the options, of the subcommands too, and the words they consist of."""
        parsers: list[Any] = [self]
        for action in self._actions:
            choices = getattr(action, "choices", None)
            parsers += [choices[name] for name in choices] if isinstance(choices, dict) else []
        names = {action.dest for parser in parsers for action in parser._actions}
        return names | {name.rpartition(".")[0] for name in names if "." in name}


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)
