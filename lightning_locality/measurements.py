"""Measurements of trained models: each rebuilt from its file, what can be measured of it, and the records."""

from __future__ import annotations

__all__: list[str] = []

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pytorch_lightning import LightningDataModule, LightningModule, Trainer, seed_everything
from pytorch_lightning.cli import LightningArgumentParser
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_locality import ranks
from lightning_locality.callbacks.anti_locality import images_and_labels
from lightning_locality.datamodules.base import AbstractImageDataModule, seeded_generator
from lightning_locality.datamodules.image_sets import IMAGENET, given_statistics, sample_source
from lightning_locality.networks import (
    ConvolutionalArithmeticCircuit,
    build_network,
    match_weights,
    plain_arguments,
    read_weights,
)
from lightning_locality.ranks.layers import check_layer
from lightning_locality.results import read_settings, versions
from lightning_locality.tasks.classification import Classification, check_state_dict
from lightning_locality.tensors import CP, Factorization, HierarchicalTensorFactorization
from lightning_locality.tensors.mode_tree import ModeTree, node_name

# a result as a JSON document: "type", "content", and "rows" of quantity, key, value, standard error, low, high
Record = dict[str, Any]

_FORMAT = 1  # of the records: increase it when they change
_CUT_QUANTITIES = ("crossing", "inside", "outside", "participation_ratio", "rank", "noise")
_REMEDY = (
    "a network from elsewhere is measured by --model CLASS --weights FILE --images folder:DIR, or from Python, with "
    "cut_share(model, images, mask) and interaction_profile(model, images) of lightning_locality"
)


@dataclass(frozen=True)
class ImageSource:
    """Images for a network that comes without data: a source of :mod:`~.datamodules.image_sets`, and how to read it."""

    source: str
    image_size: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    def sample(self, network: nn.Module, count: int, seed: int) -> Tensor:
        """Sample ``count`` images, or all if there are fewer, with the channels that the network's first layer takes.

        They are normalised by ``mean`` and ``std``, else by those that timm's networks name, else by ImageNet's; grey
        images by the means over the three channels.
        """
        first = next((m.in_channels for m in network.modules() if isinstance(m, nn.Conv2d)), None)
        channels = cast(Literal[1, 3] | None, first if first in (1, 3) else None)
        root, generator = os.environ.get("LIGHTNING_LOCALITY_DATA", "data"), seeded_generator(seed, "measured images")
        images = sample_source(self.source, count, generator, root, self.image_size, channels)
        mean, std = self.mean, self.std
        if mean is None and std is None:
            own = getattr(network, "pretrained_cfg", None) or {}
            mean, std = own.get("mean", IMAGENET[0]), own.get("std", IMAGENET[1])
            if images.shape[1] == 1:
                mean, std = [sum(mean) / len(mean)], [sum(std) / len(std)]
        shift, scale = given_statistics(mean, std, images.shape[1]) or (torch.zeros(1), torch.ones(1))
        images = ((images / 255 - shift[:, None, None]) / scale[:, None, None]).float()
        try:
            with torch.no_grad(), ranks.Evaluation().prepared(network) as prepared:
                prepared(ranks.Evaluation().placed(prepared, images[:2]))
        # a network may raise anything at images of another size
        except Exception as error:
            shape = " x ".join(map(str, images.shape[1:]))
            reason = f"{type(network).__name__} fails on images of {shape} ({error})"
            raise ValueError(f"--images {self.source}: {reason}; change --image-size, or the network") from error
        return images


@dataclass
class TrainedModel:
    """A model rebuilt from a file, on the CPU, in evaluation mode."""

    name: str  # the path of the file, or how the model was constructed
    module: nn.Module
    model: nn.Module  # the factorisation of a recovery, the network of a classification, otherwise the module
    data: LightningDataModule | ImageSource | None
    about: dict[str, Any]  # path, class of the model, and digests by which a changed file is noticed
    images: Tensor | None = None  # on which it is measured; None until they are sampled from the data


def load_run(path: Path, initial: bool = False) -> TrainedModel:
    """Rebuild the model and the data module of a run, without touching the global random state.

    The data is touched only if the model is to be as it was before the first step of training, ``initial``.
    """
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
    # a resumed run may have another seed than its first part, by which the weights were initialised
    seed = read_settings(path.parent, "config.0.yaml").get("seed_everything", settings.get("seed_everything"))
    if initial and type(seed) is not int:
        raise ValueError(
            f"--untrained: {config} has no seed_everything, so the weights of {path} cannot be drawn again"
        )
    try:
        with _seeded(seed):
            module, data = _build(settings, stored.get("hyper_parameters", {}), "fit" if initial else "test")
        if initial:
            weights = {
                name: value.to(weights[name].dtype) if isinstance(value, Tensor) and name in weights else value
                for name, value in module.state_dict().items()
            }
        else:
            module.on_load_checkpoint(stored)
            check_state_dict(module, weights)
    # jsonargparse has types of its own, and a constructor may raise anything
    except Exception as error:
        raise ValueError(f"--checkpoint {path}: cannot be rebuilt from {config}: {error}") from error
    # assigned, so that weights keep the type in which they were trained
    module.load_state_dict(weights, strict=module.strict_loading, assign=True)
    own = {"config_sha256": hashlib.sha256(config.read_bytes()).hexdigest()}
    if not initial:
        own["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return _frozen(str(path), module, data, own)


def load_model(
    words: Sequence[str], weights: Path | None, data: ImageSource, seed: int, initial: bool = False
) -> TrainedModel:
    """Construct a network by the words of :func:`~lightning_locality.networks.build_network`, and load its weights.

    ``weights`` None, or ``initial``: the weights that it is constructed with under the seed. Nothing in the file is
    executed; of a Lightning checkpoint, hyper-parameters that are plain values become arguments.
    """
    try:
        stored = {} if weights is None else read_weights(weights)
    except ValueError as error:
        raise ValueError(f"--weights {error}") from error
    words = [words[0], *plain_arguments(words[0], stored.get("hyper_parameters")), *words[1:]]
    where = f"--model {' '.join(words)}" + (f" --weights {weights}" if weights else "")
    try:
        with _seeded(seed):
            module = build_network(words)
            if isinstance(module, LightningModule):
                module.configure_model()
        if weights is not None and not initial:
            if isinstance(module, LightningModule) and "state_dict" in stored:
                module.on_load_checkpoint(stored)
            module.load_state_dict(match_weights(module, stored), assign=True)
    # a module of someone else's may raise anything
    except Exception as error:
        raise ValueError(f"{where}: {error}") from error
    return _frozen(where, module, data, {"built": words, "images": vars(data), "seed": seed})


@contextmanager
def _seeded(seed: Any) -> Iterator[None]:
    """Seed everything as a run does, without its warnings, and restore the random states."""
    with isolate_rng(include_cuda=False), warnings.catch_warnings(action="ignore"):
        # not False, which a run has that is not seeded
        if type(seed) is int:
            seed_everything(seed, verbose=False)
        yield


def _frozen(name: str, module: nn.Module, data: Any, own: dict[str, Any]) -> TrainedModel:
    module.eval().requires_grad_(False)
    model = module
    if isinstance(module, Classification):
        model = module.network
    elif isinstance(found := getattr(module, "model", None), Factorization):
        model = found
    about = {"path": name, "model": f"{type(model).__module__}.{type(model).__qualname__}"}
    return TrainedModel(name, module, model, data, about | {"sha256": _digest(module.state_dict())} | own)


def _digest(state: Mapping[str, Any]) -> str:
    """SHA-256 of tensors by name."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(repr((name, value.dtype, value.shape) if isinstance(value, Tensor) else (name, value)).encode())
        if isinstance(value, Tensor):
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _build(settings: dict[str, Any], trained: Mapping[str, Any], stage: str) -> tuple[Any, Any]:
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
    if stage == "fit" and data is not None and not isinstance(data, AbstractImageDataModule):
        # these come before configure_model, and may use the global generator, which the package's own never do
        data.prepare_data()
        data.setup(stage)
    module.setup(stage)
    module.configure_model()
    # networks are copied, and a trainer must not be copied with them
    module.trainer = None
    return module, data


def sample_images(run: TrainedModel, count: int | None, seed: int) -> Tensor:
    """Distinct test images ``(count, C, H, W)`` on the CPU; None: 256, or all if there are fewer.

    Sampled from the test split of a data module of this package, or from a source; of any other data module, the first
    ones of the test loader.
    """
    data, limit = run.data, 256 if count is None else count
    if isinstance(data, AbstractImageDataModule):
        data.batch("test", torch.arange(1))  # sets the split up
        available = data.size("test")
        order = torch.randperm(available, generator=seeded_generator(seed, "measured images"))
        images, _ = data.batch("test", order[:limit].sort().values)
    else:
        images = data.sample(run.model, limit, seed) if isinstance(data, ImageSource) else _first_images(run, limit)
        available = len(images)
    if count is not None and available < count:
        where = data.source if isinstance(data, ImageSource) else f"the test split of {run.name}"
        raise ValueError(f"--number {count}: {where} has {available}; take no more")
    return images


def _first_images(run: TrainedModel, count: int) -> Tensor:
    source: Any = run.module if run.data is None else run.data
    source.prepare_data()
    source.setup("test")
    try:
        loader = source.test_dataloader()
    # Lightning raises a type of its own for a hook that is not implemented
    except Exception as error:
        reason = f"{type(source).__name__} has no test data to measure with ({error}); give it a test_dataloader"
        raise ValueError(f"--checkpoint {run.name}: {reason}; {_REMEDY}") from error
    parts: list[Tensor] = []
    for batch in loader:
        # as a Trainer prepares a batch, except for the device
        batch = source.on_after_batch_transfer(source.on_before_batch_transfer(batch, 0), 0)
        part, _ = images_and_labels(batch)
        if part is None or part.ndim != 4 or not part.is_floating_point():
            found = type(batch).__name__ if part is None else f"{part.dtype} {tuple(part.shape)}"
            reason = f"a test batch must begin with float images (B, C, H, W), or name them image or x, and has {found}"
            raise ValueError(f"--checkpoint {run.name}: {reason}; {_REMEDY}")
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


def measurements(label: str, run: TrainedModel, settings: Any, folder: Path) -> list[Measurement]:
    """Everything that is to be measured of a run, each with a digest of all that its numbers depend on."""
    found: list[Measurement] = []

    def add(kind: Any, name: str, model: nn.Module, function: Any, **own: Any) -> None:
        depends = {"measurement": name, "settings": own, "version": [versions()["lightning-locality"], _FORMAT]}
        depends |= {"checkpoint": run.about["sha256"]}
        if isinstance(run.data, ImageSource):
            depends |= {"built": run.about["built"], "images": _digest({"images": run.images})}
        else:
            depends |= {"config": run.about["config_sha256"]}
        digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
        path = folder / f"{name.replace(' ', '_').replace('/', '_')}-{digest[:20]}.json"
        found.append(Measurement(label, kind, name, model, function, path))

    if isinstance(run.model, Factorization):
        if settings.layer is not None:
            raise ValueError(f"--layer {settings.layer}: {run.name} is a factorisation, which has no layers; omit it")
        add("nodes", "nodes", run.model, _measure_spectra)
        add("components", "components", run.model, _measure_components)
    else:
        _add_network(run, settings, add)
    wanted = [one for one in found if settings.what is None or one.kind in (*settings.what, "tree")]
    if not wanted:
        kinds = ", ".join(dict.fromkeys(one.kind for one in found))
        raise ValueError(
            f"--what {' '.join(settings.what)}: {run.name} has nothing of that kind to measure; there is {kinds}"
        )
    return wanted


def _add_network(run: TrainedModel, settings: Any, add: Callable[..., None]) -> None:
    """Cuts, profile, perhaps a tree of blocks; of every convolutional arithmetic circuit in it the exact spectra."""
    network, seed, patch, layer = run.model, settings.seed, settings.patch, settings.layer
    check_layer(network, layer)
    if layer is not None and settings.tree is not None:
        raise ValueError(f"--tree {settings.tree} is of the output: omit it, or --layer {layer}")
    images = run.images = sample_images(run, settings.number, seed) if run.images is None else run.images
    count, height, width = (int(images.shape[axis]) for axis in (0, 2, 3))
    size = min(count // 2, 64) if settings.size is None else settings.size
    samples = min(count, 64) if settings.samples is None else settings.samples
    if not 4 <= size <= count // 2:
        reason = f"a cut takes at least 4 images on either side, different ones on each, and there are {count}"
        raise ValueError(f"--size {size}: {reason}; change it, or --number")
    if not 2 <= samples <= count:
        raise ValueError(f"--samples {samples} must be 2 to {count}, the number of images; change it, or --number")
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
    # absent, so that what was measured before there were layers is not measured again
    chosen, of_layer = ({}, "") if layer is None else ({"layer": layer}, f" of {layer}")
    own: dict[str, Any] = {"size": size, "repetitions": settings.repetitions} | chosen
    for name, mask in ranks.standard_cuts(height, width).items():
        function = partial(_measure_cut, images=images, name=name, mask=mask, seed=seed, **own)
        add("cuts", f"cut {name}{of_layer}", network, function, **common, **own)
    own = {"patch": patch, "samples": samples, "method": settings.method, "pairs": settings.pairs} | chosen
    add(
        "profile",
        f"profile{of_layer}",
        network,
        partial(_measure_profile, images=images, seed=seed, **own),
        **common,
        **own,
    )
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
