"""Train convolutional networks that see far, and measure how far any network sees."""

import importlib
import sys
import types

import lazy_loader

# names are listed once, in __init__.pyi, and imported on first use
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.2.0.dev0"


class _Former(types.ModuleType):
    """A module of version 0.1 that checkpoints, configurations or users' code may name; leads to where it is now."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(importlib.import_module(f"{__package__}.{_FORMER[self.__name__]}"), name)


_TASKS = ("distant_halves", "is_greater", "same_class", "same_parity")
_FORMER = {f"{__name__}.datamodules.{task}": "datamodules.pair_tasks" for task in _TASKS} | {
    f"{__name__}.augmentation": "transforms",
    f"{__name__}.circuit": "networks",
    f"{__name__}.datamodules.curves": "datamodules.pathfinder.parameters",
    f"{__name__}.datamodules.recovery": "datamodules.tensor_recovery",
    f"{__name__}.datamodules.sources": "datamodules.image_sets",
    f"{__name__}.datamodules.two_by_two": "datamodules.unbounded",
    f"{__name__}.optim.gradient_flow": "optim",
    f"{__name__}.optim.group_rmsprop": "optim",
    f"{__name__}.patches": "regularizer.patches",
    f"{__name__}.tasks.anti_locality_callback": "callbacks.anti_locality",
    f"{__name__}.tasks.callbacks": "callbacks.stopping",
    f"{__name__}.tasks.rank_monitor": "callbacks.rank_monitor",
}
sys.modules.update({former: _Former(former) for former in _FORMER})
