from .binary_images import BinaryImages
from .pair_tasks import DistantHalves, IsGreater, SameClass, SameParity
from .pathfinder import Pathfinder
from .permuted_images import PermutedImages
from .tensor_recovery import TensorRecovery
from .unbounded import UnboundedCompletion

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
