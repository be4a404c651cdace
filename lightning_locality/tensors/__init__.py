"""Tensor factorisations, mode trees, and observations of tensors."""

__all__ = [
    "CP",
    "Chain",
    "DeepMatrix",
    "Entries",
    "Factorization",
    "HierarchicalTensorFactorization",
    "ModeTree",
    "Node",
    "Observations",
    "RankOneMeasurements",
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
    Observations,
    RankOneMeasurements,
    RecoveryBatch,
)
from lightning_locality.tensors.hierarchical import HierarchicalTensorFactorization
from lightning_locality.tensors.mode_tree import ModeTree, Node
from lightning_locality.tensors.tensor_train import TensorTrain
from lightning_locality.tensors.tucker import Tucker
