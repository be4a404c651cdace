"""Lightning callbacks: the term for any module, ranks during training, stopping."""

__all__ = ["AntiLocalityCallback", "RankMonitor", "StopAfter", "StopOnceFitted"]

from lightning_locality.callbacks.anti_locality import AntiLocalityCallback
from lightning_locality.callbacks.rank_monitor import RankMonitor
from lightning_locality.callbacks.stopping import StopAfter, StopOnceFitted
