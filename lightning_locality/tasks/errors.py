"""What stops a training."""

from __future__ import annotations

__all__ = ["NonFiniteLossError"]


class NonFiniteLossError(ValueError):
    """Training has been stopped because the loss is infinite or not a number."""
