"""Arrays and factorised tensors of other libraries, as tensors and factorisations."""

from __future__ import annotations

__all__: list[str] = []

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_locality.tensors import CP, Factorization, TensorTrain, Tucker


def as_tensor(values: Any, name: str) -> Tensor:
    """A tensor of what can be one: an array, nested lists, a list of tensors, a factorised tensor (tensorly's too)."""
    if isinstance(values, Tensor):
        return values
    if (model := as_factorization(values, name)) is not None:
        return model.to_tensor()
    if callable(getattr(values, "to_tensor", None)):
        return as_tensor(values.to_tensor(), name)
    try:
        if isinstance(values, (list, tuple)) and any(isinstance(value, Tensor) for value in values):
            return torch.stack([torch.as_tensor(value) for value in values])
        array = np.asarray(values)
        # a copy in the machine's own byte order, without negative strides
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
    except (TypeError, ValueError, RuntimeError):
        kind = f"{type(values).__module__}.{type(values).__qualname__}"
        raise ValueError(
            f"{name} must be a tensor or an array of numbers, got {kind}: pass torch.as_tensor(...)"
        ) from None


@torch.no_grad()
def as_factorization(values: Any, name: str) -> Factorization | None:
    """A factorisation of one, or of tensorly's CPTensor, TuckerTensor or TTTensor in float64; None of anything else.

    The weights of tensorly's backend, whichever that is, are copied; the tensor is not formed.
    """
    if isinstance(values, Factorization):
        return values
    # its classes cannot occur before it is imported, which takes a while
    if "tensorly" not in sys.modules:
        return None
    from tensorly.cp_tensor import CPTensor
    from tensorly.tt_tensor import TTTensor
    from tensorly.tucker_tensor import TuckerTensor

    if not isinstance(values, (CPTensor, TuckerTensor, TTTensor)):
        return None
    factors = _in_float64(values.factors, name)
    shape, device = [int(factor.shape[-2]) for factor in factors], factors[0].device
    model: Factorization
    # in the order of the parameters
    weights = factors
    if isinstance(values, TTTensor):
        model = TensorTrain(shape, [len(core) for core in factors[1:]], dtype=torch.float64, device=device)
    elif isinstance(values, TuckerTensor):
        weights = [*_in_float64([values.core], name), *factors]
        model = Tucker(shape, weights[0].shape, dtype=torch.float64, device=device)
    else:
        if values.weights is not None:
            factors[0] = factors[0] * _in_float64([values.weights], name)[0]
        # modes of equal size share one
        weights = [torch.stack([f for f in factors if len(f) == size]) for size in dict.fromkeys(shape)]
        model = CP(shape, int(factors[0].shape[1]), dtype=torch.float64, device=device)
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        parameter.copy_(weight)
    return model


def _in_float64(values: Sequence[Any], name: str) -> list[Tensor]:
    tensors = [as_tensor(value, name) for value in values]
    if any(tensor.is_complex() for tensor in tensors):
        raise ValueError(f"{name} must be real, and has complex factors: pass those of a real tensor")
    return [tensor.double() for tensor in tensors]
