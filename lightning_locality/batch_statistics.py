"""Running statistics of batch normalisation, kept from an extra forward pass."""

from __future__ import annotations

__all__ = ["frozen_statistics"]

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def frozen_statistics(model: Callable[..., Any]) -> Iterator[None]:
    """Batch normalisations inside neither update their running statistics nor count the batch."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    # in train mode this flag is read for the update alone, whatever the momentum
    tracking = [m for m in modules if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    try:
        for module in tracking:
            module.track_running_stats = False
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True
