"""Lightning data modules: non-local image tasks and tensor recovery."""

__all__ = [
    "BinaryImages",
    "DistantHalves",
    "IsGreater",
    "Pathfinder",
    "PermutedImages",
    "SameClass",
    "SameParity",
    "TensorRecovery",
    "UnboundedCompletion",
]

from lightning_locality.datamodules.binary_images import BinaryImages
from lightning_locality.datamodules.pair_tasks import DistantHalves, IsGreater, SameClass, SameParity
from lightning_locality.datamodules.pathfinder import Pathfinder
from lightning_locality.datamodules.permuted_images import PermutedImages
from lightning_locality.datamodules.tensor_recovery import TensorRecovery
from lightning_locality.datamodules.unbounded import UnboundedCompletion
