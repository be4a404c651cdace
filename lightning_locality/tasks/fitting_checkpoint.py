"""Whether a checkpoint fits a model, said in one line."""

from __future__ import annotations

__all__ = ["refuse_other_model"]

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def refuse_other_model(model: nn.Module, stored: Mapping[str, Any]) -> None:
    """Refuse the weights of another model, with what differs instead of a page of keys.

    Args:
        model: What they are to be loaded into.
        stored: State of the checkpoint.

    Raises:
        ValueError: Other tensors, or other shapes.
    """
    own = _shapes(model.state_dict())
    others = _shapes(stored)
    differ = [name for name in sorted(own.keys() | others.keys()) if own.get(name) != others.get(name)]
    if differ:
        name = differ[0]
        raise ValueError(
            f"the checkpoint does not fit this model: {len(differ)} of {len(own)} tensors differ, first "
            f"{name} (checkpoint {_text(others.get(name))}, model {_text(own.get(name))}); load it with the "
            "config.yaml of the run that wrote it"
        )


def _shapes(state: Mapping[str, Any]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items() if isinstance(value, Tensor)}


def _text(shape: torch.Size | None) -> str:
    return "none" if shape is None else str(tuple(shape))
