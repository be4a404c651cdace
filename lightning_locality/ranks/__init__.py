"""Dependence between modes or regions: spectra, ranks and interaction distances."""

from __future__ import annotations

__all__ = [
    "CPRank",
    "CPRankNotFoundError",
    "CutShare",
    "Evaluation",
    "InfluenceProfile",
    "InteractionProfile",
    "NodeSpectra",
    "ReceptiveField",
    "attention_distance",
    "balanced_component_norms",
    "blocks",
    "checkerboard",
    "contribution_norms",
    "cp_epsilon_ranks",
    "cp_rank",
    "cut_share",
    "data_alignment",
    "data_entanglement",
    "data_spectra",
    "dense_spectra",
    "effective_rank",
    "effective_receptive_field",
    "entanglement_entropy",
    "epsilon_rank",
    "grid_tensor",
    "halves",
    "influence_by_distance",
    "interaction_profile",
    "measuring",
    "node_spectra",
    "numerical_rank",
    "pair_moments",
    "participation_ratio",
    "participation_ratios",
    "quad_tree",
    "stable_rank",
    "stacked_spectra",
    "standard_cuts",
    "tree_separation",
    "two_way_table",
    "variance_components",
]

from lightning_locality.ranks.attention import attention_distance
from lightning_locality.ranks.block_tree import grid_tensor, tree_separation
from lightning_locality.ranks.components import balanced_component_norms, contribution_norms
from lightning_locality.ranks.cp_rank import CPRank, CPRankNotFoundError, cp_epsilon_ranks, cp_rank
from lightning_locality.ranks.cuts import CutShare, cut_share, pair_moments, two_way_table, variance_components
from lightning_locality.ranks.data import data_alignment, data_entanglement, data_spectra
from lightning_locality.ranks.dense import dense_spectra, stacked_spectra
from lightning_locality.ranks.evaluation import Evaluation, measuring
from lightning_locality.ranks.influence import InfluenceProfile, influence_by_distance
from lightning_locality.ranks.masks import blocks, checkerboard, halves, quad_tree, standard_cuts
from lightning_locality.ranks.nodes import node_spectra, participation_ratios
from lightning_locality.ranks.patch_pairs import InteractionProfile
from lightning_locality.ranks.profile import interaction_profile
from lightning_locality.ranks.receptive_field import ReceptiveField, effective_receptive_field
from lightning_locality.ranks.spectra import (
    NodeSpectra,
    effective_rank,
    entanglement_entropy,
    epsilon_rank,
    numerical_rank,
    participation_ratio,
    stable_rank,
)
