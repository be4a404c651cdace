"""Train convolutional networks that see far, and measure how far any network sees."""

import sys

import lazy_loader

# names are listed once, in __init__.pyi, and imported on first use
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.2.0.dev0"

# modules of version 0.1 that its checkpoints and configurations name: their classes are found in the public face
_FORMER_MODULES = (
    "augmentation",
    "circuit",
    "datamodules.distant_halves",
    "datamodules.is_greater",
    "datamodules.recovery",
    "datamodules.same_class",
    "datamodules.same_parity",
    "datamodules.two_by_two",
    "optim.gradient_flow",
    "optim.group_rmsprop",
    "patches",
    "tasks.anti_locality_callback",
    "tasks.callbacks",
    "tasks.rank_monitor",
)
sys.modules.update({f"{__name__}.{former}": sys.modules[__name__] for former in _FORMER_MODULES})
