from .callbacks import AntiLocalityCallback, RankMonitor, StopAfter, StopOnceFitted
from .datamodules import (
    BinaryImages,
    DistantHalves,
    IsGreater,
    Pathfinder,
    PermutedImages,
    SameClass,
    SameParity,
    TensorRecovery,
    UnboundedCompletion,
)
from .networks import ConvolutionalArithmeticCircuit, SmallResNet
from .optim import GradientFlow, GroupRMSprop
from .ranks import (
    blocks,
    checkerboard,
    cp_rank,
    cut_share,
    data_spectra,
    halves,
    interaction_profile,
    node_spectra,
)
from .regularizer import (
    AdjacentPatches,
    AntiLocality,
    ContentPatches,
    FarField,
    GivenPatches,
    RandomPatches,
    UniformPatches,
    input_gradient_change,
)
from .tasks import Classification, Recovery
from .tensors import CP, DeepMatrix, HierarchicalTensorFactorization, ModeTree, TensorTrain, Tucker
from .transforms import RandomShift

__all__ = [
    "CP",
    "AdjacentPatches",
    "AntiLocality",
    "AntiLocalityCallback",
    "BinaryImages",
    "Classification",
    "ContentPatches",
    "ConvolutionalArithmeticCircuit",
    "DeepMatrix",
    "DistantHalves",
    "FarField",
    "GivenPatches",
    "GradientFlow",
    "GroupRMSprop",
    "HierarchicalTensorFactorization",
    "IsGreater",
    "ModeTree",
    "Pathfinder",
    "PermutedImages",
    "RandomPatches",
    "RandomShift",
    "RankMonitor",
    "Recovery",
    "SameClass",
    "SameParity",
    "SmallResNet",
    "StopAfter",
    "StopOnceFitted",
    "TensorRecovery",
    "TensorTrain",
    "Tucker",
    "UnboundedCompletion",
    "UniformPatches",
    "blocks",
    "checkerboard",
    "cp_rank",
    "cut_share",
    "data_spectra",
    "halves",
    "input_gradient_change",
    "interaction_profile",
    "node_spectra",
]
__version__: str
