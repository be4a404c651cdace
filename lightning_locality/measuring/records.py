"""Measurements as records: rows of a table, and everything as JSON knows it."""

from __future__ import annotations

__all__ = [
    "Record",
    "component_record",
    "cut_record",
    "node_record",
    "profile_record",
    "restored_spectra",
    "tree_record",
]

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_locality.ranks.block_tree import tree_separation
from lightning_locality.ranks.components import balanced_component_norms, contribution_norms
from lightning_locality.ranks.cuts import cut_share
from lightning_locality.ranks.evaluation import Evaluation
from lightning_locality.ranks.nodes import node_spectra
from lightning_locality.ranks.profile import interaction_profile
from lightning_locality.ranks.spectra import NodeSpectra
from lightning_locality.tensors import CP, Factorization, HierarchicalTensorFactorization
from lightning_locality.tensors.mode_tree import ModeTree, node_name

# "type" of the content; "rows": (quantity, key, value, standard error, low, high); "content": everything
Record = dict[str, Any]
_OF_CUTS = ("crossing", "inside", "outside", "participation_ratio", "rank", "noise")
_OF_PROFILES = ("share", "cumulative", "uniform", "gradient_change", "pairs")


def node_record(model: Factorization, device: torch.device, _: Evaluation, *, within: str = "") -> Record:
    """Spectra of a factorisation at its nodes.

    Args:
        model: The factorisation.
        device: Where it is measured.
        within: Where a model has several: which one it is.
    """
    return _of_spectra(node_spectra(model.to(device)), within=within)


def tree_record(
    network: nn.Module,
    images: Tensor,
    partition: Tensor,
    tree: ModeTree,
    device: torch.device,
    evaluation: Evaluation,
    *,
    size: int,
    seed: int,
) -> Record:
    """Spectra of a network between groups of blocks of pixels.

    Args:
        network: The network.
        images: Test images ``(n, C, H, W)``.
        partition: The blocks, bool ``(P, H, W)``.
        tree: Over the blocks.
        device: Where it is measured.
        evaluation: How it is evaluated.
        size: Rows and columns of the matrix at each node.
        seed: Of the draw of images.
    """
    network = network.to(device)
    return _of_spectra(
        tree_separation(network, images, partition, tree, size, seed=seed, evaluation=evaluation), prefix="block_"
    )


def _of_spectra(spectra: NodeSpectra, prefix: str = "", within: str = "") -> Record:
    before = f"{within}/" if within else ""
    rows = [
        _row(f"{prefix}{quantity}", f"{before}{row['node']}", value)
        for row in spectra.table()
        for quantity, value in row.items()
        if quantity != "node"
    ]
    condition = {} if spectra.condition is None else spectra.condition
    rows += [_row(f"{prefix}condition", f"{before}{node_name(node)}", value) for node, value in condition.items()]
    if spectra.log_scale:
        rows.append(_row(f"{prefix}log_scale", within, spectra.log_scale))
    content = {
        "values": {node_name(node): values.tolist() for node, values in spectra.items()},
        "tolerance": {node_name(node): value for node, value in spectra.tolerance.items()},
        "log_scale": spectra.log_scale,
    }
    return {"type": "spectra", "prefix": prefix, "within": within, "rows": rows, "content": content}


def restored_spectra(content: Mapping[str, Any]) -> NodeSpectra:
    """The spectra that a record was made of.

    Args:
        content: Of a record of type ``spectra``.

    Example:
        >>> restored_spectra({"values": {"0-1": [2.0, 1.0]}, "tolerance": {"0-1": 1e-12}, "log_scale": 0.0}).ranks()
        {(0, 1): 2}
    """
    node_of = {name: tuple(map(int, name.split("-"))) for name in content["values"]}
    values = {node_of[name]: torch.tensor(values).double() for name, values in content["values"].items()}
    tolerance = {node_of[name]: value for name, value in content["tolerance"].items()}
    return NodeSpectra(values, tolerance, content["log_scale"])


def component_record(model: Factorization, device: torch.device, _: Evaluation) -> Record:
    """Norms of the components of a factorisation: of a hierarchical one also balanced, and of their contributions.

    Args:
        model: The factorisation.
        device: Where it is measured.
    """
    model = model.to(device)
    norms = {"magnitude": model.magnitudes()}
    if isinstance(model, (HierarchicalTensorFactorization, CP)):
        by_node = {"contribution_norm": contribution_norms(model)}
        if isinstance(model, HierarchicalTensorFactorization):
            by_node["component_norm"] = model.local_component_norms()
            norms.clear()  # the same
        # chains of several matrices have no balanced point of their own
        with suppress(ValueError):
            by_node["balanced_component_norm"] = balanced_component_norms(model)
        norms |= {name: {node_name(node): norm for node, norm in of.items()} for name, of in by_node.items()}
    content = {
        name: {key: norm.detach().sort(descending=True).values.tolist() for key, norm in by_key.items()}
        for name, by_key in norms.items()
    }
    rows = [
        _row(name, f"{key}/{number}", value)
        for name, by_key in content.items()
        for key, values in by_key.items()
        for number, value in enumerate(values)
    ]
    return {"type": "components", "rows": rows, "content": content}


def cut_record(
    network: nn.Module,
    images: Tensor,
    name: str,
    mask: Tensor,
    device: torch.device,
    evaluation: Evaluation,
    *,
    size: int,
    repetitions: int,
    seed: int,
) -> Record:
    """Share of a network's variance that crosses a cut.

    Args:
        network: The network.
        images: Test images ``(n, C, H, W)``.
        name: Of the cut.
        mask: Its first block, bool ``(H, W)``.
        device: Where it is measured.
        evaluation: How it is evaluated.
        size: Images on each side.
        repetitions: Independent draws of them.
        seed: Of the draws.
    """
    network = network.to(device)
    share = cut_share(network, images, mask, size=size, repetitions=repetitions, seed=seed, evaluation=evaluation)
    content = share.to_dict()
    rows = [_row("cut_share", name, content["share"], content["standard_error"])]
    rows += [_row(f"cut_{quantity}", name, content[quantity]) for quantity in _OF_CUTS]
    return {"type": "cut", "name": name, "rows": rows, "content": content}


def profile_record(
    network: nn.Module,
    images: Tensor,
    device: torch.device,
    evaluation: Evaluation,
    *,
    patch: int | None,
    samples: int,
    method: Literal["linear", "exact"],
    pairs: int | None,
    seed: int,
) -> Record:
    """Interaction of patches by their distance.

    Args:
        network: The network.
        images: Test images ``(n, C, H, W)``.
        device: Where it is measured.
        evaluation: How it is evaluated.
        patch: Side of a patch in pixels; None for one that suits the images.
        samples: Number of images that are used.
        method: Linearised, or exact.
        pairs: Pairs of patches at a distance that are drawn where it is exact; None for all.
        seed: Of the draw of donors.
    """
    profile = interaction_profile(
        network.to(device),
        images,
        patch=patch,
        samples=samples,
        method=method,
        pairs_per_distance=pairs,
        seed=seed,
        evaluation=evaluation,
    )
    content = profile.to_dict()
    ends = (content["mean_distance_low"], content["mean_distance_high"])
    rows = [_row("mean_distance", "", content["mean_distance"], None, *ends)]
    rows += [_row(name, "", content[name]) for name in ("r50", "r90", "uniform_mean_distance")]
    for number, distance in enumerate(content["distance"]):
        key, band = f"{distance:g}", (content["low"][number], content["high"][number])
        rows.append(_row("interaction_strength", key, content["strength"][number], None, *band))
        for name in _OF_PROFILES:
            quantity = name if name == "gradient_change" else f"interaction_{name}"
            rows.append(_row(quantity, key, content[name][number]))
    return {"type": "profile", "rows": rows, "content": content}


def _row(quantity: str, key: str, value: Any, error: Any = None, low: Any = None, high: Any = None) -> list[Any]:
    return [quantity, key, value, error, low, high]
