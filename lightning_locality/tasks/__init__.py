"""Lightning modules: classification with the term, recovery of tensors."""

__all__ = ["Classification", "Recovery"]

from lightning_locality.tasks.classification import Classification
from lightning_locality.tasks.recovery import Recovery
