"""What a configuration may call by its bare class name: every class that is imported here."""

from __future__ import annotations

__all__ = ["NAMED"]

from lightning_locality import augmentation, optim, patches, regularizer, tensors
from lightning_locality.datamodules.binary_images import BinaryImages
from lightning_locality.datamodules.distant_halves import DistantHalves
from lightning_locality.datamodules.is_greater import IsGreater
from lightning_locality.datamodules.pathfinder import Pathfinder
from lightning_locality.datamodules.permuted_images import PermutedImages
from lightning_locality.datamodules.recovery import TensorRecovery
from lightning_locality.datamodules.same_class import SameClass
from lightning_locality.datamodules.same_parity import SameParity
from lightning_locality.datamodules.two_by_two import UnboundedCompletion
from lightning_locality.networks import SmallResNet
from lightning_locality.tasks.anti_locality_callback import AntiLocalityCallback
from lightning_locality.tasks.callbacks import StopAfter, StopOnceFitted
from lightning_locality.tasks.classification import Classification
from lightning_locality.tasks.rank_monitor import RankMonitor
from lightning_locality.tasks.recovery import Recovery

NAMED = (
    augmentation,
    optim,
    patches,
    regularizer,
    tensors,
    BinaryImages,
    DistantHalves,
    IsGreater,
    Pathfinder,
    PermutedImages,
    SameClass,
    SameParity,
    TensorRecovery,
    UnboundedCompletion,
    SmallResNet,
    Classification,
    Recovery,
    AntiLocalityCallback,
    RankMonitor,
    StopAfter,
    StopOnceFitted,
)
