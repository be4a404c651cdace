"""Tasks built from the images of a source: which images a split may use, tables of samples, normalisation."""

from __future__ import annotations

__all__ = ["AbstractSourceImages"]

import os
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_locality.datamodules.base import STAGES, AbstractImageDataModule, Split
from lightning_locality.datamodules.image_sets import (
    LabelledImages,
    Part,
    Resize,
    given_statistics,
    has_validation,
    load_images,
    parse_source,
    pixel_statistics,
    prepare_images,
    stratified_split,
)

MAX_SIDE = 2**14  # of an image, in pixels


class ClassImages:
    """Images ``candidates`` ``(K,)`` grouped by their ``labels`` ``(M,)``; a class is its place among ``classes``."""

    def __init__(self, labels: Tensor, candidates: Tensor) -> None:
        own = labels[candidates]
        self.classes, self.counts = torch.unique(own, return_counts=True)
        self._by_class = candidates[own.argsort(stable=True)]

    def sample(self, size: int, generator: torch.Generator) -> Tensor:
        """Sample ``size`` uniform images of uniform classes."""
        which, where = torch.rand((size, 2), dtype=torch.float64, generator=generator).unbind(1)
        kind = (which * len(self.classes)).long()
        return self._image(kind, (where * self.counts[kind]).long())

    def two(self, left: Tensor, right: Tensor, uniform: tuple[Tensor, Tensor], distinct: bool) -> tuple[Tensor, Tensor]:
        """Pick an image of each class by uniform numbers, all ``(N,)``; if ``distinct``, never the same one twice."""
        place = (uniform[0] * self.counts[left]).long()
        excluded = ((left == right) & distinct).long()
        other = (uniform[1] * (self.counts[right] - excluded)).long()
        other = other + excluded * (other >= place)
        return self._image(left, place), self._image(right, other)

    def require_two_images(self, needed: Tensor) -> None:
        """Raise ValueError if a class that must supply two distinct images, marked in ``(C,)``, has only one."""
        single = self.classes[(self.counts < 2) & needed]
        if len(single):
            raise ValueError(
                f"classes {single.tolist()} have a single image in one of the splits, so no pair of two distinct "
                "images: raise holdout (if it is for validation), exclude them (classes=...), or set distinct=False"
            )

    def _image(self, kind: Tensor, place: Tensor) -> Tensor:
        first = self.counts.cumsum(0) - self.counts
        return self._by_class[first[kind] + place]


class AbstractSourceImages(AbstractImageDataModule):
    """Samples made of the images of a source, stored as a table of indices and labels for each split.

    Training and validation samples use the source's official training images, which are divided between the two
    unless it has validation images of its own; test samples use its official test images.

    Args:
        source: ``cifar10``, ``cifar100``, ``mnist``, ``fashion_mnist``, ``svhn``, ``digits`` (needs no download),
            ``folder:PATH`` (of class folders), ``file:PATH`` (.npz) or ``lra:PATH`` (Pathfinder of the Long Range
            Arena), see data/README.md.
        root: Folder of the image set; by default ``$LIGHTNING_LOCALITY_DATA``, or ``data`` if that is not set.
        image_size: Height and width in pixels that the source's images are resized to.
        resize: How to resize: bilinear, area (mean over blocks) or pad (black around).
        channels: 1 (grey) or 3 (colour); by default the source's own, 3 for folders and files,
            1 for lra.
        classes: Labels of the images to use; all by default.
        batch_size: Samples per step and process.
        seed: Seed of the samples, of the hold-out and of the order of training batches.
        drop_last: Drop the last, incomplete training batch of an epoch.
        download: Let torchvision download a set that is not in ``root``.
        validation_is_test: Validate on the test samples (published for SameClass), not on held-out training images.
        holdout: Share of the training images of each class kept for validation if the source has none for that.
        mean: Mean intensity (0 to 1) of each channel, subtracted. By default the published values for ``cifar10`` in
            colour, and those of the official training images for every other source. ``imagenet``: mean and deviation
            that most pretrained networks expect, of three channels.
        std: Standard deviation of each channel, divided by; by default likewise.

    Raises:
        ValueError: Unknown source (``UnknownSourceError``), or a number out of range.
    """

    unit = "image"  # noun for a sample in messages

    def __init__(
        self,
        source: str = "cifar10",
        root: str | Path | None = None,
        image_size: int = 32,
        resize: Resize = "bilinear",
        channels: Literal[1, 3] | None = None,
        classes: Sequence[int] | None = None,
        batch_size: int = 64,
        seed: int = 0,
        drop_last: bool = False,
        download: bool = True,
        validation_is_test: bool = False,
        holdout: float = 0.1,
        mean: Sequence[float] | Literal["imagenet"] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, drop_last=drop_last)
        root = str(root) if root is not None else os.environ.get("LIGHTNING_LOCALITY_DATA", "data")
        # not logged: Lightning stops if a model has a hyperparameter of the same name
        self.save_hyperparameters(logger=False)
        # as text: checkpoints are read with weights_only, which rejects a Path
        self.hparams.update(root=root)
        name, _ = parse_source(source, root)
        self.source, self.root, self.download = source, root, download
        if image_size < 1:
            raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
        if image_size > MAX_SIDE:
            raise ValueError(f"image_size must be at most {MAX_SIDE:,} pixels, got {image_size}")
        if classes is not None and len(set(classes)) < 2:
            raise ValueError(f"classes must name at least 2 different classes, got {list(classes)}")
        if not 0 < holdout < 1:
            raise ValueError(f"holdout must be a share between 0 and 1, got {holdout}")
        if channels not in (None, 1, 3):
            raise ValueError(f"channels must be 1 or 3, got {channels}")
        self.image_size, self.resize, self.classes, self.holdout = image_size, resize, classes, holdout
        self.channels: Literal[1, 3] = channels or (1 if name in ("mnist", "fashion_mnist", "digits", "lra") else 3)
        self.validation_is_test = validation_is_test
        if mean is None and std is None and name == "cifar10" and self.channels == 3:
            # as published; of the training images, to three digits
            mean, std = (0.491, 0.482, 0.446), (0.247, 0.243, 0.261)
        self._given = given_statistics(mean, std, self.channels)
        self._own_validation: bool | None = None
        self._parts: dict[Part, LabelledImages] = {}
        self._tables: dict[Split, Tensor] = {}
        self._affine: dict[torch.dtype, Tensor] = {}

    @abstractmethod
    def sample(self, split: Split) -> Tensor:
        """Sample a split: ``(R, N)``, int64, rows of image indices and, last, the labels."""

    def parameters(self) -> dict[str, Any]:
        """All arguments but those that only say how the data is loaded."""
        loading = ("root", "batch_size", "download", "drop_last")
        return {name: value for name, value in self.hparams.items() if name not in loading}

    def prepare_data(self) -> None:
        """Let torchvision download the set if allowed and needed."""
        if self.download:
            prepare_images(self.source, self.root)

    def setup(self, stage: str | None = None) -> None:
        """Load the images and sample the splits that the stage needs."""
        for split in STAGES[stage]:
            if split not in self._tables:
                self._tables[split] = self.sample(split)
        if not self._affine:
            mean, std = self._given or pixel_statistics(self.images("train").images)
            rows = torch.stack(self.normalization(mean, std))
            self._affine[torch.float64] = rows[:, None, :, None, None]

    def part(self, split: Split) -> Part:
        """Official part of the source that supplies the images of a split."""
        origin = self.origin(split)
        if origin == "validation" and self._own_validation is None:
            self._own_validation = has_validation(self.source, self.root)
        return origin if origin == "test" or (origin == "validation" and self._own_validation) else "train"

    def images(self, part: Part) -> LabelledImages:
        """The source's official images of a part ``(N, C, s, s)``, uint8, and their labels."""
        if part not in self._parts:
            self._parts[part] = load_images(
                self.source, part, self.root, image_size=self.image_size, resize=self.resize, channels=self.channels
            )
        return self._parts[part]

    def candidates(self, split: Split) -> Tensor:
        """Indices into ``images(part(split))`` that the split may use; training and validation share none."""
        labels = self.images(self.part(split)).labels
        candidates = torch.arange(len(labels))
        if self.part(split) == "train" == self.part("validation"):
            kept, held = stratified_split(labels, self.holdout, self.seed)
            candidates = kept if split == "train" else held
        if self.classes is None:
            return candidates
        known = torch.unique(labels).tolist()
        if missing := sorted(set(self.classes) - set(known)):
            raise ValueError(f"classes {missing} are not in {self.source}, which has {known}")
        return candidates[torch.isin(labels[candidates], torch.tensor(list(self.classes)))]

    def table(self, split: Split) -> Tensor:
        """The samples of a split as returned by :meth:`sample`; RuntimeError before ``setup``."""
        if split not in self._tables:
            raise RuntimeError(f"the {split} {self.unit}s have not been sampled yet: call setup() first")
        return self._tables[split]

    def normalization(self, mean: Tensor, std: Tensor) -> list[Tensor]:
        """Factor and offset ``(C,)`` of a uint8 value, and any further rows for :meth:`affine`."""
        return [1 / (255 * std), -mean / std]

    def to_uint8(self, images: Tensor) -> Tensor:
        """Undo the normalisation of :meth:`compose`, rounded to uint8."""
        scale, shift = self.affine(images.device)[:2]
        return images.sub(shift).div_(scale).round_().clamp_(0, 255).to(torch.uint8)

    def affine(self, device: torch.device) -> Tensor:
        """The rows of :meth:`normalization` ``(R, 1, C, 1, 1)`` on a device, in the default dtype."""
        dtype = torch.get_default_dtype()
        # rounded before the move: not every device has float64
        rows = self._affine.setdefault(dtype, self._affine[torch.float64].to(dtype))
        return self.on_device(f"affine {dtype}", rows, device)
