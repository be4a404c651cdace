from .binary_images import BinaryImages
from .cluttered_abc import ClutteredABC
from .pair_tasks import DistantHalves, IsGreater, SameClass, SameParity
from .pathfinder import Pathfinder
from .permuted_images import PermutedImages
from .rearrangement import feature_correlations, rearrange_features
from .tensor_recovery import TensorRecovery
from .unbounded import UnboundedCompletion

__all__ = [
    "BinaryImages",
    "ClutteredABC",
    "DistantHalves",
    "IsGreater",
    "Pathfinder",
    "PermutedImages",
    "SameClass",
    "SameParity",
    "TensorRecovery",
    "UnboundedCompletion",
    "feature_correlations",
    "rearrange_features",
]
