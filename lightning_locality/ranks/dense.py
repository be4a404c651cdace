"""Spectra of the matricisations of a dense tensor."""

from __future__ import annotations

__all__ = ["dense_spectra", "stacked_spectra"]

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_locality.arguments import checked
from lightning_locality.ranks.conversion import as_tensor
from lightning_locality.ranks.spectra import NodeSpectra, singular_values
from lightning_locality.tensors.mode_tree import ModeTree, Node


@checked
def dense_spectra(tensor: Tensor, cuts: ModeTree | Iterable[Node]) -> NodeSpectra:
    r"""Singular values of the matricisations of a tensor, through tensorly and in float64.

    .. math:: \sigma \left( [\![ \mathcal{W}; \nu ]\!] \right), \qquad [\![ \mathcal{W}; \nu ]\!]
        \in \mathbb{R}^{\prod_{n \in \nu} D_n \times \prod_{n \notin \nu} D_n}

    Their tolerance is the usual rule for dense matrices, the rounding of the tensor's own type times the longer side
    of the matricisation, but at most the square root of that rounding: in 16 bits the rule would take every value for
    rounding (ours).

    Args:
        tensor: Of order N, real and finite, of any type.
        cuts: A tree, meaning all its nodes but the root, or groups of modes, counted from 0.

    Raises:
        ValueError: If the tensor is complex, empty or not finite, or if the cuts do not fit it.

    Example:
        >>> tensor = torch.zeros(2, 2, 2)
        >>> tensor[0, 0, 0], tensor[1, 1, 1] = 3.0, 2.0
        >>> dense_spectra(tensor, [(0, 1)])[(0, 1)].round(decimals=6).tolist()
        [3.0, 2.0]
    """
    return stacked_spectra(as_tensor(tensor, "tensor").unsqueeze(0), cuts)[0]


@checked
def stacked_spectra(tensors: Tensor, cuts: ModeTree | Iterable[Node]) -> list[NodeSpectra]:
    """Spectra of several tensors ``(B, D_1, ..., D_N)``, as :func:`dense_spectra`, by one decomposition per cut.

    Example:
        >>> stack = torch.stack([torch.eye(3), torch.ones(3, 3)])
        >>> [spectra.rank((0,)) for spectra in stacked_spectra(stack, [(0,)])]
        [3, 1]
    """
    tensors = as_tensor(tensors, "tensors")
    shape = tuple(tensors.shape[1:])
    if tensors.is_complex() or not tensors.numel():
        raise ValueError(f"tensor must be real and have entries, got {tensors.dtype} {shape}")
    if bad := int((~tensors.isfinite()).sum()):
        raise ValueError(f"tensor must be finite, and {bad} of {tensors.numel()} entries are not")
    groups = mode_groups(cuts, len(shape), "cuts", "tensor")
    measured = tensors.detach().double()
    eps = torch.finfo(tensors.dtype if tensors.is_floating_point() else torch.float64).eps
    values, tolerance = dict[Node, Tensor](), dict[Node, float]()
    with tensorly_with_torch() as tensorly:
        # one group at a time: most matricisations are copies
        for group in groups:
            joined: Tensor = tensorly.base.matricize(measured, (0, *(1 + mode for mode in group)))
            matrices = joined.reshape(len(tensors), -1, joined.shape[1])
            values[group] = singular_values(matrices)
            tolerance[group] = min(max(matrices.shape[1:]) * eps, eps**0.5)
    return [NodeSpectra({group: v[k] for group, v in values.items()}, tolerance) for k in range(len(tensors))]


def mode_groups(cuts: ModeTree | Iterable[Node], order: int, name: str, subject: str) -> tuple[Node, ...]:
    """Nodes of a tree but the root, or groups of modes; raise ValueError unless they cut a subject of this order."""
    if isinstance(cuts, ModeTree):
        if cuts.order != order:
            raise ValueError(f"{name} has order {cuts.order} and the {subject} order {order}")
        return cuts.nodes[:-1]
    try:
        groups = tuple(map(tuple, cuts))
    except TypeError:
        raise ValueError(f"{name} must be a tree, or groups of modes as [(0, 1), (2,)], got {cuts!r}") from None
    for group in groups:
        if not 0 < len(set(group)) == len(group) < order or not set(group) <= set(range(order)):
            raise ValueError(
                f"{name} must be groups of some, not all, of the modes 0 to {order - 1}, each once, got {group}"
            )
    return groups


@contextmanager
def tensorly_with_torch() -> Iterator[Any]:
    """Tensorly with torch as its backend in this thread; its own context manager would set it in all on exit."""
    import tensorly

    before = tensorly.backend.current_backend()
    tensorly.set_backend("pytorch", local_threadsafe=True)
    try:
        yield tensorly
    finally:
        tensorly.set_backend(before, local_threadsafe=True)
