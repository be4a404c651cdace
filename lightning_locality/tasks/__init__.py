"""Lightning modules: classification with the term, recovery of tensors; and baselines of the latter."""

__all__ = ["Classification", "Recovery", "cp_als_completion", "nuclear_norm_completion"]

from lightning_locality.tasks.classification import Classification
from lightning_locality.tasks.completion import cp_als_completion, nuclear_norm_completion
from lightning_locality.tasks.recovery import Recovery
