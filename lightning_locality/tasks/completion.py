"""Baselines of tensor completion that are not trained: sum of nuclear norms, alternating least squares."""

from __future__ import annotations

__all__ = ["cp_als_completion", "nuclear_norm_completion"]

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_locality.arguments import checked
from lightning_locality.ranks.dense import tensorly_with_torch
from lightning_locality.tensors.factorization import Entries, Observations


@checked
@torch.no_grad()
def nuclear_norm_completion(
    observed: Observations, shape: Sequence[int], tolerance: float = 1e-6, max_iterations: int = 5000
) -> Tensor:
    r"""Complete a tensor by the least sum of the nuclear norms of its unfoldings; the observed entries stay.

    .. math:: \min_{\mathcal X} \sum_{n=1}^N \lVert X_{(n)} \rVert_* \quad \text{with} \quad
        \mathcal X_i = \mathcal T_i \text{ at the observed entries}

    A convex problem; noise in the observations is not removed. Solved by alternating directions with one copy of the
    tensor per mode: "Tensor Completion for Estimating Missing Values in Visual Data" (Liu, Musialski, Wonka, Ye, 2013),
    whose step size is adapted by the ratio of the two residuals ("Distributed Optimization and Statistical Learning via
    the Alternating Direction Method of Multipliers", Boyd et al., 2011, section 3.4.1).

    Args:
        observed: Entries, such as ``TensorRecovery(...).problem.train``.
        shape: Sizes of the modes.
        tolerance: Of both residuals, relative to the norm of the tensor.
        max_iterations: Iterations after which the last tensor is returned.

    Returns:
        The tensor, in float64 on the device of the observations.

    Raises:
        ValueError: Inner products instead of entries, or entries outside the shape.

    Example:
        >>> indices = torch.ones(4, 4).nonzero()[:-1]  # all but the last
        >>> nuclear_norm_completion(Entries(indices, torch.ones(15)), (4, 4))[3, 3].round(decimals=4).item()
        1.0
    """
    tensor, mask, scale = _zero_filled(observed, shape)
    known, order = tensor[mask], tensor.ndim
    copies = duals = tensor.new_zeros(order, *tensor.shape)
    step = 1.0
    for _ in range(max_iterations):
        copies = torch.stack([_shrunk(tensor - duals[mode], mode, step) for mode in range(order)])
        before, tensor = tensor, (copies + duals).mean(0)
        tensor[mask] = known
        duals = duals + copies - tensor
        primal, dual = (copies - tensor).norm() / math.sqrt(order), (tensor - before).norm()
        if torch.maximum(primal, dual) <= tolerance * tensor.norm():
            break
        # the copies differ too much: shorter steps; the tensor moves too much: longer ones
        factor = 0.5 if primal > 10 * dual else 2.0 if dual > 10 * primal else 1.0
        step, duals = factor * step, factor * duals
    return scale * tensor


@checked
def cp_als_completion(
    observed: Observations, shape: Sequence[int], rank: int, starts: int = 3, max_sweeps: int = 1000, seed: int = 0
) -> Tensor:
    """Complete a tensor by a sum of ``rank`` components, fitted by tensorly's alternating least squares with a mask.

    In every sweep the fit takes the place of the entries not observed (``parafac(mask=...)``). Of several random starts
    that with the smallest error at the observed entries is returned; these are not reproduced exactly. The rank has to
    be known: with more components than the tensor has, the fit does not find it.

    Args:
        observed: Entries, such as ``TensorRecovery(...).problem.train``.
        shape: Sizes of the modes.
        rank: Number of components.
        starts: Random starts.
        max_sweeps: Sweeps over the modes per start.
        seed: Of the starts.

    Returns:
        The tensor, in float64 on the device of the observations.

    Raises:
        ValueError: Inner products instead of entries, entries outside the shape, or a number below 1.
    """
    for name, number in {"rank": rank, "starts": starts, "max_sweeps": max_sweeps}.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    tensor, mask, scale = _zero_filled(observed, shape)
    fits = list[Tensor]()
    with tensorly_with_torch() as tensorly:
        for start in range(starts):
            # singular without a little ridge if there are more components than the tensor has
            fit = tensorly.decomposition.parafac(
                tensor, rank, n_iter_max=max_sweeps, init="random", mask=mask.to(tensor), l2_reg=1e-9,
                random_state=seed + start,
            )  # fmt: skip
            fits.append(fit.to_tensor())
    errors = [float((fit - tensor)[mask].norm()) for fit in fits]
    return scale * fits[min(range(starts), key=errors.__getitem__)]


def _zero_filled(observed: Observations, shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The observed entries divided by their root mean square, zeros elsewhere; where they are; and the divisor."""
    if not isinstance(observed, Entries):
        raise ValueError(f"observed must be entries (task='completion'), got {type(observed).__name__}")
    indices, values = observed.indices.long(), observed.values.double()
    sizes = torch.tensor(tuple(shape), device=indices.device)
    if indices.ndim != 2 or indices.shape[1] != len(sizes) or bool(((indices < 0) | (indices >= sizes)).any()):
        raise ValueError(f"observed must have indices (M, {len(sizes)}) in the shape {tuple(shape)}")
    if not len(values) or not bool(values.isfinite().all()):
        raise ValueError(f"observed must hold finite values, at least one, got {len(values)}")
    scale = values.square().mean().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    tensor = values.new_zeros(tuple(shape))
    mask = torch.zeros(tuple(shape), dtype=torch.bool, device=values.device)
    tensor[tuple(indices.T)], mask[tuple(indices.T)] = values / scale, True
    return tensor, mask, scale


def _shrunk(tensor: Tensor, mode: int, amount: float) -> Tensor:
    """Reduce the singular values of an unfolding, not below zero."""
    front = tensor.movedim(mode, 0)
    left, values, right = torch.linalg.svd(front.flatten(1), full_matrices=False)
    unfolded: Tensor = (left * (values - amount).clamp_min(0)) @ right
    return unfolded.reshape(front.shape).movedim(0, mode)
