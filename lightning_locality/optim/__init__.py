"""Optimisers: one step size for all weights, and gradient flow itself."""

from lightning_locality.optim.gradient_flow import GradientFlow, IntegrationError
from lightning_locality.optim.group_rmsprop import GroupRMSprop

__all__ = ["GradientFlow", "GroupRMSprop", "IntegrationError"]
