"""Tensors given by factorisations, and what is observed of them."""

from __future__ import annotations

__all__ = [
    "CP",
    "Chain",
    "DeepMatrix",
    "Entries",
    "Factorization",
    "HierarchicalTensorFactorization",
    "InitLaw",
    "InitOf",
    "ModeTree",
    "Node",
    "Observations",
    "RankOne",
    "RecoveryBatch",
    "TensorTrain",
    "Tucker",
]

from lightning_locality.tensors.chain import Chain
from lightning_locality.tensors.cp import CP
from lightning_locality.tensors.deep_matrix import DeepMatrix
from lightning_locality.tensors.factorization import (
    Entries,
    Factorization,
    InitLaw,
    InitOf,
    Observations,
    RankOne,
    RecoveryBatch,
)
from lightning_locality.tensors.hierarchical import HierarchicalTensorFactorization
from lightning_locality.tensors.mode_tree import ModeTree, Node
from lightning_locality.tensors.tensor_train import TensorTrain
from lightning_locality.tensors.tucker import Tucker
