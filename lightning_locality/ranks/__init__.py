"""How far modes or regions depend on one another: spectra, ranks and interaction distances."""

from __future__ import annotations

__all__ = ["effective_rank", "node_spectra"]

from lightning_locality.ranks.dense import effective_rank, node_spectra
