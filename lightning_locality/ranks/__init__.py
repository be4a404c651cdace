"""How far modes or regions depend on one another: spectra, ranks and interaction distances."""

from __future__ import annotations

__all__ = [
    "NodeSpectra",
    "dense_spectra",
    "effective_rank",
    "entanglement_entropy",
    "epsilon_rank",
    "numerical_rank",
    "participation_ratio",
    "stable_rank",
]

from lightning_locality.ranks.dense import dense_spectra
from lightning_locality.ranks.quantities import (
    effective_rank,
    entanglement_entropy,
    epsilon_rank,
    numerical_rank,
    participation_ratio,
    stable_rank,
)
from lightning_locality.ranks.spectra import NodeSpectra
