"""Tensor factorisations, mode trees, and observations of tensors."""

# names for users are listed once, in the `__all__` of their modules
# ruff: noqa: F403

from lightning_locality.tensors.chain import *
from lightning_locality.tensors.cp import *
from lightning_locality.tensors.deep_matrix import *
from lightning_locality.tensors.factorization import *
from lightning_locality.tensors.hierarchical import *
from lightning_locality.tensors.mode_tree import *
from lightning_locality.tensors.tensor_train import *
from lightning_locality.tensors.tucker import *
