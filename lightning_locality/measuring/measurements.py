"""What is measured of a trained model: which measurements there are, and what determines each."""

from __future__ import annotations

__all__ = ["Measurement", "Settings", "What", "measurements"]

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any, Literal, final

import torch
from torch import Tensor

from lightning_locality.measuring.records import (
    Record,
    component_record,
    cut_record,
    node_record,
    profile_record,
    tree_record,
)
from lightning_locality.measuring.trained import Trained
from lightning_locality.ranks.evaluation import Evaluation
from lightning_locality.ranks.masks import blocks, standard_cuts
from lightning_locality.tensors import Factorization
from lightning_locality.tensors.mode_tree import ModeTree

What = Literal["nodes", "components", "cuts", "profile"]
Compute = Callable[[torch.device, Evaluation], Record]

_FORMAT = 1  # of the records: counted up when they change
_QUADRANTS = 4  # rows and columns of blocks
_STRIPS = 8
_SIZE = 64  # images on each side of a cut
_TREE_SIZE = 16
_SAMPLES = 64
_PATCHES = 49  # about as many as the profile chooses
_PASSES = 3.0  # what a gradient costs, in forward passes


@final
@dataclass(frozen=True)
class Settings:
    """What is measured, and how: all that the numbers depend on beside the checkpoint.

    Args:
        what: Kinds of measurement; None for all that there are for a model.
        images: Number of test images; None for 256, or all where there are fewer.
        size: Images on each side of a cut; None for half the images, at most 64.
        repetitions: Independent draws of them per cut.
        patch: Side in pixels of the patches of the profile; None for one that suits the images.
        samples: Images of the profile; None for 64, or all where there are fewer.
        method: Of the profile.
        pairs: Pairs of patches at a distance that an exact profile takes; None for all.
        tree: Blocks of pixels between whose groups ranks are estimated, if any.
        seed: Of every draw.
        float64: Whether networks are evaluated in float64.
    """

    what: tuple[What, ...] | None = None
    images: int | None = None
    size: int | None = None
    repetitions: int = 1
    patch: int | None = None
    samples: int | None = None
    method: Literal["linear", "exact"] = "linear"
    pairs: int | None = None
    tree: Literal["quadrants", "strips"] | None = None
    seed: int = 0
    float64: bool = False


@final
@dataclass(frozen=True)
class Measurement:
    """One measurement of one model: the unit that is either done or not.

    Args:
        kind: What it belongs to.
        name: For example ``"nodes"`` or ``"cut halves"``.
        digest: Of all that its numbers depend on.
        work: What it costs, roughly, in forward passes of an image.
        compute: Called with the device, and with how networks are evaluated there.
        cost: Of one of its evaluations, likewise.
    """

    kind: What | Literal["tree"]
    name: str
    digest: str
    work: float
    compute: Compute
    cost: float = 1.0


def measurements(trained: Trained, settings: Settings) -> list[Measurement]:
    """What there is to be measured of a trained model.

    A factorisation: its spectra at the nodes and the norms of its components, exactly. A network: the share of its
    variance that crosses each of the standard cuts, the interaction profile and, if asked for, the ranks between
    groups of blocks; of each convolutional arithmetic circuit in it the spectra of every output, exactly.

    Args:
        trained: The model, and its test images.
        settings: What is measured, and how.

    Raises:
        ValueError: Settings that leave nothing to measure, or that the images do not allow.
    """
    model = trained.factorization
    found = list(_of_factorization(trained, model) if model is not None else _of_network(trained, settings))
    wanted = [one for one in found if settings.what is None or one.kind in (*settings.what, "tree")]
    if not wanted:
        what = " ".join(settings.what or ())
        raise ValueError(
            f"--what {what}: there is nothing of that kind to be measured of {trained.path}; there is "
            f"{', '.join(dict.fromkeys(one.kind for one in found))}"
        )
    return wanted


def _of_factorization(trained: Trained, model: Factorization) -> Iterator[Measurement]:
    work = float(sum(weight.numel() for weight in model.parameters()))
    yield _measurement(trained, "nodes", "nodes", work, partial(node_record, model))
    yield _measurement(trained, "components", "components", work, partial(component_record, model))


def _of_network(trained: Trained, settings: Settings) -> Iterator[Measurement]:
    images, network = trained.images(settings.images, settings.seed), trained.network
    height, width = (int(side) for side in images.shape[2:])
    size = min(len(images) // 2, _SIZE) if settings.size is None else settings.size
    samples = min(len(images), _SAMPLES) if settings.samples is None else settings.samples
    _refuse_unfit(len(images), height, width, size, samples, settings)
    for name, circuit in trained.circuits.items():
        root: Any = circuit.groups[-1]
        for output in range(root.weight().shape[-1]):
            which = f"{name} output {output}".strip()
            exact = partial(node_record, circuit.to_factorization(output), within=which)
            yield _measurement(trained, "nodes", f"nodes of {which}", 1.0, exact)
    seed, common = settings.seed, {"images": len(images), "seed": settings.seed, "float64": settings.float64}

    repetitions = settings.repetitions
    for name, mask in standard_cuts(height, width).items():
        cut = partial(cut_record, network, images, name, mask, size=size, repetitions=repetitions, seed=seed)
        own = {**common, "size": size, "repetitions": repetitions}
        yield _measurement(trained, "cuts", f"cut {name}", repetitions * size**2 + 256.0, cut, **own)

    patch, method = settings.patch, settings.method
    asked: dict[str, Any] = {"patch": patch, "samples": samples, "method": method, "pairs": settings.pairs}
    profile = partial(profile_record, network, images, **asked, seed=seed)
    patches = _PATCHES if patch is None else height * width // patch**2
    cost = _PASSES if method == "linear" else 1.0
    # drawn at each of so many distances, as far as a rough guess goes
    pairs = patches * patches / 2 if settings.pairs is None else settings.pairs * patches**0.5
    work = samples * (cost * (1 + patches) if method == "linear" else 1 + patches + pairs)
    yield replace(_measurement(trained, "profile", "profile", work, profile, **common, **asked), cost=cost)

    if settings.tree is not None:
        partition, over = _blocks(settings.tree, height, width)
        size = min(_TREE_SIZE, len(images)) if settings.size is None else size
        tree = partial(tree_record, network, images, partition, over, size=size, seed=seed)
        name, work = f"tree of {settings.tree}", float(len(over) * size**2)
        yield _measurement(trained, "tree", name, work, tree, **common, size=size)


def _refuse_unfit(count: int, height: int, width: int, size: int, samples: int, settings: Settings) -> None:
    """Before anything is measured, what would stop it later."""
    patch = settings.patch
    if not 4 <= size <= count // 2:
        raise ValueError(
            f"--size {size}: a cut takes 4 images at least on either side, others on one than on the other, and there "
            f"are {count}; change it, or --images"
        )
    if not 2 <= samples <= count:
        raise ValueError(f"--samples {samples} must be 2 to {count}, the number of images; change it, or --images")
    if settings.pairs is not None and (settings.method == "linear" or settings.pairs < 1):
        raise ValueError(f"--pairs {settings.pairs} must be 1 or more, and goes with --method exact")
    if patch is not None and (patch < 1 or height % patch or width % patch or patch >= max(height, width)):
        raise ValueError(
            f"--patch {patch}: images of {height} x {width} pixels must be divided into patches, two at least; take a "
            "common divisor of both sides, or leave it out"
        )


def _measurement(
    trained: Trained, kind: What | Literal["tree"], name: str, work: float, compute: Compute, **settings: Any
) -> Measurement:
    depends = {
        "checkpoint": trained.digest,
        "config": trained.config_digest,
        "measurement": name,
        "settings": settings,
        "version": [version("lightning-locality"), _FORMAT],
    }
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
    return Measurement(kind, name, digest, work, compute)


def _blocks(kind: str, height: int, width: int) -> tuple[Tensor, ModeTree]:
    """Blocks of pixels, and the tree that merges neighbours."""
    if kind == "quadrants":
        rows, columns, tree = _QUADRANTS, _QUADRANTS, ModeTree.perfect(_QUADRANTS**2, pattern="quadrant")
    else:
        rows, columns = (1, _STRIPS) if width >= height else (_STRIPS, 1)
        tree = ModeTree.perfect(_STRIPS)
    if height % rows or width % columns:
        raise ValueError(
            f"--tree {kind}: images of {height} x {width} pixels are not divided by {rows} x {columns} equal blocks; "
            "leave it out, or build blocks of your own for tree_separation from Python"
        )
    return blocks(height, width, rows, columns), tree
