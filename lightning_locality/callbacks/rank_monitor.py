"""Ranks and interaction distances during training."""

from __future__ import annotations

__all__ = ["RankMonitor"]

from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any, Literal, final

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.strategies import Strategy
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_locality.arguments import Checked
from lightning_locality.callbacks.anti_locality import (
    IMAGE_NAMES,
    find_network,
    has_whole_model,
    images_and_labels,
    require_forward,
)
from lightning_locality.ranks.cuts import cut_share
from lightning_locality.ranks.evaluation import Evaluation, measuring
from lightning_locality.ranks.masks import standard_cuts
from lightning_locality.ranks.nodes import node_spectra
from lightning_locality.ranks.patch_pairs import PatchGrid
from lightning_locality.ranks.profile import interaction_profile
from lightning_locality.tensors.factorization import Factorization

What = Literal["nodes", "profile", "cuts"]
_QUANTITIES = {"rank": "rank", "effective_rank": "effective rank", "participation_ratio": "participation ratio"}
_SAMPLES = 32


@final
class RankMonitor(Checked, Callback):
    """Logs the ranks of a factorisation, or how far a network sees, at the ends of chosen epochs.

    Training is the same, bit for bit, as without it. The module is called as ``module(x)``, in evaluation mode and in
    the type of its own weights, or float32 if they have 16 bits, always with the same images: the first ones of the
    validation set, or of the training batches if these are too few. docs/measuring.md lists the columns.

    Args:
        what: ``"nodes"`` of a factorisation's tree, the interaction ``"profile"`` of a network on images, or the
            variance that crosses its standard ``"cuts"``. None: nodes if there is a factorisation, else the profile.
        every_n_epochs: Measure after every so many epochs.
        epochs: Measure after these instead, counted from 0 as in the column ``epoch``.
        samples: Images for the profile; as many others are donors. None: 32, or as many as there are.
        patch: Side in pixels of the patches of the profile; None: chosen by the size of the images.
        size: Images on either side of a cut. None: 32, or half of all there are.
        seed: Seed of the samples.
        images: ``(N, C, H, W)`` to measure on instead.
        chunk: Images per call of the network, halved when memory runs out; None: a default for their size.
        float64: Evaluate networks in float64, in a copy; factorisations always are.
        model: The network of images, if it is not the module itself: name of its attribute, or a function of the module
            that returns it.

    Raises:
        ValueError: Numbers out of range, epochs that never come, no factorisation, missing or unsuitable images, or
            weights that are spread over devices.
    """

    def __init__(
        self,
        what: What | None = None,
        every_n_epochs: int = 1,
        epochs: list[int] | None = None,
        samples: int | None = None,
        patch: int | None = None,
        size: int | None = None,
        seed: int = 0,
        images: Tensor | None = None,
        chunk: int | None = None,
        float64: bool = False,
        model: str | Callable[[LightningModule], Callable[[Tensor], Any]] | None = None,
    ) -> None:
        if what not in (None, "nodes", "profile", "cuts"):
            raise ValueError(f"what must be 'nodes', 'profile', 'cuts' or None, got {what!r}")
        numbers = {"every_n_epochs": every_n_epochs, "samples": samples, "patch": patch, "size": size}
        for (name, value), least in zip(numbers.items(), (1, 2, 1, 4), strict=True):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if epochs is not None and (not epochs or min(epochs) < 0):
            raise ValueError(f"epochs must be numbers of epochs, counted from 0, got {epochs}: leave it out for all")
        self.what, self.every_n_epochs, self.epochs = what, every_n_epochs, epochs
        self.samples, self.patch, self.size, self.seed = samples, patch, size, seed
        self.evaluation = Evaluation(chunk, torch.float64 if float64 else None)
        self.given, self.model = images is not None, model
        # two groups of the same size: samples and donors, or the two sides of a cut
        wanted = 2 * ((size if what == "cuts" else samples) or _SAMPLES)
        check = standard_cuts if what == "cuts" else partial(PatchGrid, patch=patch)
        self.buffer = _ImageBuffer(wanted, check)
        if images is not None:
            least = 2 * (size or 4) if what == "cuts" else samples or 2
            self.buffer.images = _find_images(images, check, "images")
            if len(images) < least:
                raise ValueError(
                    f"images must be {least} or more for this measurement, got {len(images)}: give more, or lower "
                    f"{'size' if what == 'cuts' else 'samples'}"
                )

    @property
    def state_key(self) -> str:
        """One for each kind of measurement: a run may have several."""
        settings = {"what": self.what, "samples": self.samples, "patch": self.patch, "size": self.size}
        return self._generate_state_key(**settings, seed=self.seed)

    def state_dict(self) -> dict[str, Any]:
        """Return the images if they were taken from the batches."""
        return {"images": None if self.given else self.buffer.images}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the images."""
        if not self.given and state_dict["images"] is not None:
            self.buffer.images = state_dict["images"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reject what cannot be measured before anything is trained."""
        if stage != "fit":
            return
        if not has_whole_model(trainer.strategy):
            raise ValueError(
                f"RankMonitor needs all weights on every device, which {type(trainer.strategy).__name__} does not "
                "promise: use 'ddp' or one device"
            )
        if self.what == "nodes" and _factorization(pl_module) is None:
            raise ValueError(
                f"what='nodes' needs a factorisation, and {type(pl_module).__name__} holds none: take 'profile' or "
                "'cuts' for a network on images"
            )
        if self._subject(pl_module) != "nodes":
            require_forward(pl_module, self.model, "RankMonitor")
        last = trainer.max_epochs
        # a trial run of one batch ends early whatever the settings
        if last is None or last < 0 or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if late := [epoch for epoch in self.epochs or () if epoch >= last]:
            raise ValueError(f"epochs has {late}, but the last of max_epochs={last} epochs is {last - 1}, from 0")
        if self.epochs is None and self.every_n_epochs > last:
            raise ValueError(f"every_n_epochs={self.every_n_epochs} never comes in max_epochs={last} epochs: lower it")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep images, including those of the sanity check."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting and dataloader_idx == 0 and self._subject(pl_module) != "nodes":
            self.buffer.keep("validation", batch, batch_idx)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep images in case validation gives too few."""
        if self._subject(pl_module) != "nodes":
            self.buffer.keep("training", batch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log if it is time."""
        epoch = trainer.current_epoch
        due = (epoch + 1) % self.every_n_epochs == 0 if self.epochs is None else epoch in self.epochs
        if not due:
            return
        what = self._subject(pl_module)
        values = _nodes(pl_module) if what == "nodes" else self._distances(what, trainer, pl_module)
        iteration = getattr(pl_module, "iteration", None) if _factorization(pl_module) is not None else None
        logged = bool(trainer.loggers) and not isinstance(iteration, int)
        if isinstance(iteration, int):
            # a module that counts iterations of its own, as Recovery: its rows are those of an iteration
            for logger in trainer.loggers:
                logger.log_metrics({"epoch": epoch, "iteration": iteration, **values}, step=iteration)
        # all processes have the same numbers; saying so keeps Lightning from warning
        pl_module.log_dict(values, on_step=False, on_epoch=True, logger=logged, sync_dist=trainer.world_size > 1)

    def _subject(self, module: LightningModule) -> What:
        return self.what or ("profile" if _factorization(module) is None else "nodes")

    def _distances(self, what: What, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        images = self.buffer.chosen(trainer.strategy)
        with measuring(module):
            if trainer.world_size > 1:
                # DDP synchronises the statistics of batch normalisation only at the next forward
                first = trainer.strategy.broadcast([buffer.cpu() for buffer in module.buffers()])
                for buffer, value in zip(module.buffers(), first, strict=True):
                    buffer.copy_(value)
            network = find_network(module, self.model)
            return self._cuts(network, images) if what == "cuts" else self._profile(network, images)

    def _cuts(self, module: nn.Module, images: Tensor) -> dict[str, float]:
        size = self.size or min(_SAMPLES, len(images) // 2)
        values: dict[str, float] = {}
        for name, mask in standard_cuts(*images.shape[-2:]).items():
            cut = cut_share(module, images, mask, size=size, seed=self.seed, evaluation=self.evaluation)
            key = f"cut_share/{name.replace(' ', '_')}"
            values |= {key: cut.share, f"{key}_se": cut.standard_error}
        return values

    def _profile(self, module: nn.Module, images: Tensor) -> dict[str, float]:
        samples = self.samples or min(_SAMPLES, len(images))
        profile = interaction_profile(
            module, images, patch=self.patch, samples=samples, seed=self.seed, bootstraps=0, evaluation=self.evaluation
        )
        values = {"mean_distance": profile.mean_distance, "r50": profile.r50, "r90": profile.r90}
        strengths = zip(profile.distance.tolist(), profile.strength.tolist(), strict=True)
        values |= {f"strength_d{distance:g}": value for distance, value in strengths}
        return {f"interaction/{name}": value for name, value in values.items()}


@final
class _ImageBuffer:
    """Copies of the first ``wanted`` images of validation, or of training if validation has too few."""

    def __init__(self, wanted: int, check: Callable[[int, int], object]) -> None:
        self.wanted, self.check = wanted, check
        self.images: Tensor | None = None  # fixed from the first measurement on
        self._seen: dict[str, list[Tensor]] = {"validation": [], "training": []}

    def keep(self, source: Literal["validation", "training"], batch: Any, number: int) -> None:
        """Copy the images that are still wanted from batch ``number`` of an epoch."""
        if self.images is not None:
            return
        seen = self._seen[source]
        if number == 0 and sum(map(len, seen)) < self.wanted:
            # a new pass repeats the images of the one before
            seen.clear()
        if missing := max(0, self.wanted - sum(map(len, seen))):
            images = _find_images(batch, self.check, f"the {source} batch")
            seen.append(images[:missing].clone().cpu())

    def chosen(self, strategy: Strategy) -> Tensor:
        """Return the images, on the CPU: the same at every call and, broadcast by the strategy, in every process."""
        if self.images is None:
            validation, training = (sum(map(len, images)) for images in self._seen.values())
            chosen = self._seen["validation" if validation >= min(self.wanted, training) else "training"]
            images = strategy.broadcast(torch.cat(chosen) if chosen else None)
            if images is None or len(images) < 2:
                raise ValueError(
                    "RankMonitor has seen fewer than 2 images in all batches: pass images=, a tensor (N, C, H, W)"
                )
            self.images = images
            self._seen.clear()
        return self.images


def _find_images(batch: Any, check: Callable[[int, int], object], name: str) -> Tensor:
    """Return the images of a batch, detached, once ``check`` has accepted their height and width."""
    found, _ = images_and_labels(batch)
    if found is None:
        form = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"batch ({form}) is neither images, nor a tuple that begins with them, nor a mapping that names them "
            f"{', '.join(IMAGE_NAMES)}: pass images=, a tensor (N, C, H, W)"
        )
    if found.ndim != 4 or not found.is_floating_point():
        raise ValueError(
            f"{name} must be floating-point images (B, C, H, W), got {found.dtype} {tuple(found.shape)}: pass images= "
            "as the module takes them"
        )
    check(*found.shape[-2:])
    return found.detach()


def _factorization(module: LightningModule) -> Factorization | None:
    return next((part for part in module.modules() if isinstance(part, Factorization)), None)


def _nodes(module: LightningModule) -> dict[str, float]:
    factorization = _factorization(module)
    assert factorization is not None
    spectra = node_spectra(factorization)
    table = spectra.table()
    if len(table) <= 64:  # one by one; more by their number of modes
        return {f"{name}/node {row['node']}": float(row[key]) for row in table for key, name in _QUANTITIES.items()}
    columns: dict[str, list[float]] = {}
    for node, row in zip(spectra, table, strict=True):
        for key, name in _QUANTITIES.items():
            columns.setdefault(f"{name}/{len(node)} modes", []).append(float(row[key]))
    values: dict[str, float] = {}
    for name, column in columns.items():
        values |= {f"{name} median": median(column), f"{name} largest": max(column)}
    return values
