"""What a named layer of a network gives: maps, tokens on their grid, outputs.

Legend: n images, K channels, H' and W' the places of a map.
"""

from __future__ import annotations

__all__: list[str] = []

from typing import Any

from torch import Tensor, nn

from lightning_locality.ranks.attention import token_grid
from lightning_locality.ranks.evaluation import scores


def check_layer(model: Any, layer: str | None) -> None:
    """Raise a ValueError if a network has no layer of this name; None is the output."""
    if layer is None:
        return
    if not isinstance(model, nn.Module):
        raise ValueError(f"layer={layer!r} needs a model with named layers, an nn.Module, got {type(model).__name__}")
    modules = dict(model.named_modules(remove_duplicate=False))
    if layer not in modules:
        few = ", ".join([name for name in modules if name and "." not in name][:12])
        raise ValueError(f"layer must be a name in model.named_modules(), such as {few}, got {layer!r}")


def layer_output(network: nn.Module, layer: str | None, x: Tensor) -> Tensor:
    """Return a map ``(n, K, H', W')``, tokens ``(n, N, K)`` or outputs ``(n, K)`` of a layer; None: of the network."""
    kept = list[Any]()
    if layer is None:
        kept.append(network(x))
    else:
        handle = network.get_submodule(layer).register_forward_hook(lambda module, given, out: kept.append(out))
        try:
            network(x)
        finally:
            handle.remove()
    # of a layer that is used more than once, the last time
    out = kept[-1] if kept else None
    if isinstance(out, Tensor) and out.dim() in (3, 4) and out.is_floating_point():
        return out
    if layer is not None and not (isinstance(out, Tensor) and out.dim() in (1, 2)):
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"layer {layer!r} must give a map (n, K, H', W') or tokens (n, N, K), got {got}")
    return scores(out)  # type: ignore[arg-type]  # refuses what is no tensor


def as_map(network: nn.Module, out: Tensor) -> Tensor:
    """Return what :func:`layer_output` gave as a map: tokens of patches at their places, outputs as a single place."""
    if out.dim() == 3:
        rows, columns, first = token_grid(network, out.shape[1])
        return out[:, first:].mT.reshape(len(out), -1, rows, columns)
    return out if out.dim() == 4 else out[:, :, None, None]
