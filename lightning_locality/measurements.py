"""Measurements of a trained run: the model rebuilt from its checkpoint, what can be measured of it, and the records."""

from __future__ import annotations

__all__: list[str] = []

import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.cli import LightningArgumentParser
from torch import Tensor, nn

from lightning_locality import ranks
from lightning_locality.callbacks.anti_locality import images_and_labels
from lightning_locality.datamodules.base import AbstractImageDataModule, seeded_generator
from lightning_locality.networks import ConvolutionalArithmeticCircuit
from lightning_locality.results import read_settings, versions
from lightning_locality.tasks.classification import Classification, check_state_dict
from lightning_locality.tensors import CP, Factorization, HierarchicalTensorFactorization
from lightning_locality.tensors.mode_tree import ModeTree, node_name

# a result as a JSON document: "type", "content", and "rows" of quantity, key, value, standard error, low, high
Record = dict[str, Any]

_FORMAT = 1  # of the records: increase it when they change
_CUT_QUANTITIES = ("crossing", "inside", "outside", "participation_ratio", "rank", "noise")
_REMEDY = (
    "a network from elsewhere is measured from Python, with cut_share(model, images, mask) and "
    "interaction_profile(model, images) of lightning_locality"
)


@dataclass
class TrainedRun:
    """A run rebuilt from its checkpoint and config.yaml, on the CPU, in evaluation mode."""

    path: Path
    module: LightningModule
    model: nn.Module  # the factorisation of a recovery, the network of a classification, otherwise the module
    data: LightningDataModule | None
    about: dict[str, str]  # path, class of the model, and digests by which a changed file is noticed


def load_run(path: Path) -> TrainedRun:
    """Rebuild the model and the data module of a run, without touching the data or the global random state."""
    try:
        stored = torch.load(path, weights_only=True, map_location="cpu")
        weights = stored["state_dict"]
    # torch raises a different type for every way in which a file can be something else
    except Exception as error:
        reason = f"not a checkpoint with a state_dict that can be read safely ({error!r:.100})"
        remedy = f"pass a last.ckpt or best.ckpt of lightning-locality fit; {_REMEDY}"
        raise ValueError(f"--checkpoint {path}: {reason}; {remedy}") from error
    settings, config = read_settings(path.parent), path.parent / "config.yaml"
    if not settings.get("model"):
        reason = f"there is no {config} that names a model; only runs of lightning-locality fit can be measured here"
        raise ValueError(f"--checkpoint {path}: {reason}, and {_REMEDY}")
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
            module, data = _build(settings, stored.get("hyper_parameters", {}))
        module.on_load_checkpoint(stored)
        check_state_dict(module, weights)
    # jsonargparse has types of its own, and a constructor may raise anything
    except Exception as error:
        raise ValueError(f"--checkpoint {path}: cannot be rebuilt from {config}: {error}") from error
    # assigned, so that weights keep the type in which they were trained
    module.load_state_dict(weights, strict=module.strict_loading, assign=True)
    module.eval().requires_grad_(False)
    model: nn.Module = module
    if isinstance(module, Classification):
        model = module.network
    elif isinstance(getattr(module, "model", None), Factorization):
        model = module.model
    about = {"path": str(path), "model": f"{type(model).__module__}.{type(model).__qualname__}"}
    for name, file in {"sha256": path, "config_sha256": config}.items():
        about[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return TrainedRun(path, module, model, data, about)


def _build(settings: dict[str, Any], trained: Mapping[str, Any]) -> tuple[Any, Any]:
    """Build module and data module, and prepare them for each other as a Trainer does before it loads a checkpoint."""
    # not load_from_checkpoint, which refuses classes that are not imported yet and rounds weights trained in float64
    parser = LightningArgumentParser(exit_on_error=False)
    given = {name: settings[name] for name in ("model", "data") if settings.get(name)}
    for name in given:
        kind = LightningModule if name == "model" else LightningDataModule
        parser.add_lightning_class_args(kind, name, subclass_mode=True)
    built = parser.instantiate_classes(parser.parse_object(given))
    module, data = built["model"], built.get("data")
    if isinstance(module, Classification):
        # as trained, even if the data have changed since
        module.num_classes = trained.get("num_classes") or module.num_classes
        module.in_channels = trained.get("in_channels") or module.in_channels
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.WARNING)  # a Trainer logs which devices it does not use
    trainer: Any = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    logger.setLevel(level)
    trainer.datamodule = data
    module.trainer = trainer
    module.setup("test")
    module.configure_model()
    # networks are copied, and a trainer must not be copied with them
    module.trainer = None
    return module, data


def sample_images(run: TrainedRun, count: int | None, seed: int) -> Tensor:
    """Distinct test images ``(count, C, H, W)`` on the CPU; None: 256, or all if there are fewer.

    Sampled from the test split of a data module of this package; of any other, the first ones of the test loader.
    """
    data, limit = run.data, 256 if count is None else count
    if isinstance(data, AbstractImageDataModule):
        data.batch("test", torch.arange(1))  # sets the split up
        available = data.size("test")
        order = torch.randperm(available, generator=seeded_generator(seed, "measured images"))
        images, _ = data.batch("test", order[:limit].sort().values)
    else:
        images = _first_images(run, limit)
        available = len(images)
    if count is not None and available < count:
        raise ValueError(f"--images {count}: the test split of {run.path.parent} has {available}; take no more")
    return images


def _first_images(run: TrainedRun, count: int) -> Tensor:
    source: Any = run.module if run.data is None else run.data
    source.prepare_data()
    source.setup("test")
    try:
        loader = source.test_dataloader()
    # Lightning raises a type of its own for a hook that is not implemented
    except Exception as error:
        reason = f"{type(source).__name__} has no test data to measure with ({error}); give it a test_dataloader"
        raise ValueError(f"--checkpoint {run.path}: {reason}; {_REMEDY}") from error
    parts: list[Tensor] = []
    for batch in loader:
        # as a Trainer prepares a batch, except for the device
        batch = source.on_after_batch_transfer(source.on_before_batch_transfer(batch, 0), 0)
        part, _ = images_and_labels(batch)
        if part is None or part.ndim != 4 or not part.is_floating_point():
            found = type(batch).__name__ if part is None else f"{part.dtype} {tuple(part.shape)}"
            reason = f"a test batch must begin with float images (B, C, H, W), or name them image or x, and has {found}"
            raise ValueError(f"--checkpoint {run.path}: {reason}; {_REMEDY}")
        parts.append(part)
        if sum(map(len, parts)) >= count:
            break
    return torch.cat(parts)[:count] if parts else torch.empty(0, 1, 1, 1)


@dataclass(frozen=True)
class Measurement:
    """One measurement of one model: the unit that is cached, and given to a device."""

    label: str
    kind: str
    name: str
    model: nn.Module
    function: Callable[[nn.Module, ranks.Evaluation], Record]
    path: Path

    def result(self) -> Record | None:
        """The cached record, or None if there is none yet."""
        with suppress(FileNotFoundError, json.JSONDecodeError):
            return dict(json.loads(self.path.read_text()))
        return None


def measurements(label: str, run: TrainedRun, settings: Any, folder: Path) -> list[Measurement]:
    """Everything that is to be measured of a run, each with a digest of all that its numbers depend on."""
    found: list[Measurement] = []

    def add(kind: Any, name: str, model: nn.Module, function: Any, **own: Any) -> None:
        depends = {"measurement": name, "settings": own, "version": [versions()["lightning-locality"], _FORMAT]}
        depends |= {"checkpoint": run.about["sha256"], "config": run.about["config_sha256"]}
        digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
        path = folder / f"{name.replace(' ', '_').replace('/', '_')}-{digest[:20]}.json"
        found.append(Measurement(label, kind, name, model, function, path))

    if isinstance(run.model, Factorization):
        add("nodes", "nodes", run.model, _measure_spectra)
        add("components", "components", run.model, _measure_components)
    else:
        _add_network(run, settings, add)
    wanted = [one for one in found if settings.what is None or one.kind in (*settings.what, "tree")]
    if not wanted:
        kinds = ", ".join(dict.fromkeys(one.kind for one in found))
        raise ValueError(
            f"--what {' '.join(settings.what)}: {run.path} has nothing of that kind to measure; there is {kinds}"
        )
    return wanted


def _add_network(run: TrainedRun, settings: Any, add: Callable[..., None]) -> None:
    """Cuts, profile, perhaps a tree of blocks; of every convolutional arithmetic circuit in it the exact spectra."""
    network, seed, patch = run.model, settings.seed, settings.patch
    images = sample_images(run, settings.images, seed)
    count, height, width = (int(images.shape[axis]) for axis in (0, 2, 3))
    size = min(count // 2, 64) if settings.size is None else settings.size
    samples = min(count, 64) if settings.samples is None else settings.samples
    if not 4 <= size <= count // 2:
        reason = f"a cut takes at least 4 images on either side, different ones on each, and there are {count}"
        raise ValueError(f"--size {size}: {reason}; change it, or --images")
    if not 2 <= samples <= count:
        raise ValueError(f"--samples {samples} must be 2 to {count}, the number of images; change it, or --images")
    if settings.pairs is not None and (settings.method == "linear" or settings.pairs < 1):
        raise ValueError(f"--pairs {settings.pairs} must be 1 or more, and goes with --method exact")
    if patch is not None and (patch < 1 or height % patch or width % patch or patch >= max(height, width)):
        raise ValueError(f"--patch {patch} must divide {height} x {width} pixels into two patches or more; or omit it")
    for name, circuit in run.module.named_modules():
        if isinstance(circuit, ConvolutionalArithmeticCircuit):
            root: Any = circuit.groups[-1]
            for output in range(root.weight().shape[-1]):
                which = f"{name} output {output}".strip()
                function = partial(_measure_spectra, within=which)
                add("nodes", f"nodes of {which}", circuit.to_factorization(output), function)
    common = {"images": count, "seed": seed, "float64": settings.float64}
    own: dict[str, Any] = {"size": size, "repetitions": settings.repetitions}
    for name, mask in ranks.standard_cuts(height, width).items():
        function = partial(_measure_cut, images=images, name=name, mask=mask, seed=seed, **own)
        add("cuts", f"cut {name}", network, function, **common, **own)
    own = {"patch": patch, "samples": samples, "method": settings.method, "pairs": settings.pairs}
    add("profile", "profile", network, partial(_measure_profile, images=images, seed=seed, **own), **common, **own)
    if settings.tree is not None:
        partition, tree = _blocks(settings.tree, height, width)
        size = min(16, count) if settings.size is None else size
        function = partial(_measure_spectra, images=images, blocks=partition, tree=tree, size=size, seed=seed)
        add("tree", f"tree of {settings.tree}", network, function, **common, size=size)


def _blocks(kind: str, height: int, width: int) -> tuple[Tensor, ModeTree]:
    """Blocks of pixels, and the tree that merges neighbours."""
    rows, columns = (4, 4) if kind == "quadrants" else (1, 8) if width >= height else (8, 1)
    if height % rows or width % columns:
        reason = f"images of {height} x {width} pixels cannot be divided into {rows} x {columns} equal blocks"
        raise ValueError(f"--tree {kind}: {reason}; leave it out, or call tree_separation with others from Python")
    tree = ModeTree.perfect(16, pattern="quadrant") if kind == "quadrants" else ModeTree.perfect(8)
    return ranks.blocks(height, width, rows, columns), tree


def _measure_spectra(model: nn.Module, evaluation: ranks.Evaluation, within: str = "", **options: Any) -> Record:
    """Exact spectra of a factorisation (``within`` names it if a network holds several), or those between blocks."""
    if isinstance(model, Factorization):
        spectra, prefix = ranks.node_spectra(model), ""
    else:
        spectra, prefix = ranks.tree_separation(model, evaluation=evaluation, **options), "block_"
    before = f"{within}/" if within else ""
    rows = [
        _row(f"{prefix}{quantity}", f"{before}{row['node']}", value)
        for row in spectra.table()
        for quantity, value in row.items()
        if quantity != "node"
    ]
    condition = spectra.condition or {}
    rows += [_row(f"{prefix}condition", f"{before}{node_name(node)}", value) for node, value in condition.items()]
    if spectra.log_scale:
        rows.append(_row(f"{prefix}log_scale", within, spectra.log_scale))
    content = {
        "values": {node_name(node): values.tolist() for node, values in spectra.items()},
        "tolerance": {node_name(node): value for node, value in spectra.tolerance.items()},
        "log_scale": spectra.log_scale,
    }
    return {"type": "spectra", "prefix": prefix, "within": within, "rows": rows, "content": content}


def _measure_components(model: Factorization, _: ranks.Evaluation) -> Record:
    """Norms of components, largest first; of a hierarchical factorisation also balanced, and of their contributions."""
    norms: dict[str, dict[str, Tensor]] = {"magnitude": model.magnitudes()}
    if isinstance(model, HierarchicalTensorFactorization | CP):
        by_node = {"contribution_norm": ranks.contribution_norms(model)}
        if isinstance(model, HierarchicalTensorFactorization):
            by_node["component_norm"] = model.local_component_norms()
            norms.clear()  # the same numbers
        # chains of several matrices have no balanced point of their own
        with suppress(ValueError):
            by_node["balanced_component_norm"] = ranks.balanced_component_norms(model)
        norms |= {name: {node_name(node): norm for node, norm in own.items()} for name, own in by_node.items()}
    content, rows = dict[str, Any](), []
    for name, own in norms.items():
        content[name] = {key: norm.detach().sort(descending=True).values.tolist() for key, norm in own.items()}
        rows += [_row(name, f"{key}/{k}", norm) for key, sizes in content[name].items() for k, norm in enumerate(sizes)]
    return {"type": "components", "rows": rows, "content": content}


def _measure_cut(network: nn.Module, evaluation: ranks.Evaluation, name: str, **options: Any) -> Record:
    """Share of the variance that crosses a cut."""
    content = ranks.cut_share(network, evaluation=evaluation, **options).to_dict()
    rows = [_row("cut_share", name, content["share"], content["standard_error"])]
    rows += [_row(f"cut_{quantity}", name, content[quantity]) for quantity in _CUT_QUANTITIES]
    return {"type": "cut", "name": name, "rows": rows, "content": content}


def _measure_profile(network: nn.Module, evaluation: ranks.Evaluation, pairs: int | None, **options: Any) -> Record:
    """Interaction of patches by their distance."""
    profile = ranks.interaction_profile(network, pairs_per_distance=pairs, evaluation=evaluation, **options)
    content = profile.to_dict()
    mean, *ends = (content[f"mean_distance{end}"] for end in ("", "_low", "_high"))
    rows = [_row("mean_distance", "", mean, None, *ends)]
    rows += [_row(name, "", content[name]) for name in ("r50", "r90", "uniform_mean_distance")]
    for number, distance in enumerate(content["distance"]):
        strength, *band = (content[name][number] for name in ("strength", "low", "high"))
        rows.append(_row("interaction_strength", f"{distance:g}", strength, None, *band))
        for name in ("share", "cumulative", "uniform", "gradient_change", "pairs"):
            quantity = name if name == "gradient_change" else f"interaction_{name}"
            rows.append(_row(quantity, f"{distance:g}", content[name][number]))
    return {"type": "profile", "rows": rows, "content": content}


def _row(quantity: str, key: str, value: Any, error: Any = None, low: Any = None, high: Any = None) -> list[Any]:
    return [quantity, key, value, error, low, high]
