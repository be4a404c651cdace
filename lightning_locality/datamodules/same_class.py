"""IsSameClass: do two far-apart images on one canvas show the same class?"""

from __future__ import annotations

__all__ = ["Box", "SameClass"]

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, final

import torch
from torch import Tensor

from lightning_locality.datamodules.base import AbstractImageDataModule, Split, seeded_generator
from lightning_locality.datamodules.images import LabelledImages, Resize, pixel_statistics, stratified_split
from lightning_locality.datamodules.pairs import Pairs, draw_pairs
from lightning_locality.datamodules.sources import (
    Part,
    load_images,
    parse_source,
    prepare_images,
    source_channels,
)

Box = tuple[int, int, int, int]

# as published; of the training images, to three digits
_CIFAR10_MEAN, _CIFAR10_STD = (0.491, 0.482, 0.446), (0.247, 0.243, 0.261)


@final
class SameClass(AbstractImageDataModule):
    r"""Two images at a horizontal distance on an empty canvas; label 1 if they are of the same class.

    A task that needs two far-apart regions: neither image alone tells anything about the label. Training
    and validation pairs are of the source's official training images, which are divided between the two;
    test pairs are of its official test images. Pair i of a split depends on ``seed``, on the split and on i
    alone. The defaults are the published experiment's (CIFAR-10, 32x32 images on 224x224, 5,000 training
    and 10,000 test pairs, normalised and then pasted on zeros), without two of its defects:
    ``distinct=False, validation_is_test=True`` brings them back.

    With images of s pixels and distance d on a canvas of height H and width W, the left image begins at
    column W//2 - s - d//2, the right one at s + d after that, both at row (H - s)//2.

    Source: Implicit Regularization in Hierarchical Tensor Factorization and Deep Convolutional Neural
    Networks (Noam Razin, Asaf Maman, Nadav Cohen, 2022), the experiments on "Is Same Class".

    Args:
        source: ``cifar10``, ``cifar100``, ``mnist``, ``fashion_mnist``, ``svhn``, ``digits`` (needs no
            download) or ``folder:PATH``, a folder of class folders, with or without train/ and test/.
        root: Folder of the image set, as for torchvision; None for ``$LIGHTNING_LOCALITY_DATA``, or ``data``
            where that is not set.
        distance: Pixels between the inner edges of the two images.
        train: Number of training pairs.
        validation: Number of validation pairs.
        test: Number of test pairs.
        canvas: Height and width of the canvas in pixels.
        image_size: Height and width of each of the two images in pixels; the source's are resized.
        resize: How: bilinear, area (mean over blocks) or pad (black around).
        channels: 1 (grey) or 3 (colour); the source's own if not given, 3 for folders.
        classes: Labels to draw images of; all if not given.
        batch_size: Pairs per step and process.
        seed: Seed of the pairs, of the hold-out and of the order of training batches.
        drop_last: Leave out the last, smaller training batch of an epoch.
        download: Let torchvision download a set that is not in ``root``.
        distinct: A positive pair is never the same image twice. Published: false.
        balanced: Exactly half of the pairs are positive. Published: a fair coin for each.
        validation_is_test: The validation pairs are the test pairs. Published: true. Otherwise they come
            from training images of their own.
        holdout: Share of the training images of each class that is kept for the validation pairs.
        background: ``mean``: zero on the normalised canvas, which is the mean colour. Published. ``black``,
            or a number from 0 (black) to 1 (white): that intensity, normalised like the images.
        mean: Mean intensity (0 to 1) of each channel, subtracted. If not given, the published values for
            ``cifar10`` in colour, and those of the official training images for every other source.
        std: Standard deviation of each channel, divided by; if not given, likewise.

    Raises:
        UnknownSourceError: If there is no such source.
        ValueError: If the pair does not fit the canvas, or a number is out of its range.

    Example:
        >>> data = SameClass(source="cifar10", root="data", distance=160)
        >>> data.image_shape, data.num_classes
        ((3, 224, 224), 2)
        >>> data.boxes  # top, left, height, width
        ((96, 0, 32, 32), (96, 192, 32, 32))
    """

    def __init__(
        self,
        source: str = "cifar10",
        root: str | Path | None = None,
        distance: int = 160,
        train: int = 5_000,
        validation: int = 2_000,
        test: int = 10_000,
        canvas: tuple[int, int] = (224, 224),
        image_size: int = 32,
        resize: Resize = "bilinear",
        channels: Literal[1, 3] | None = None,
        classes: Sequence[int] | None = None,
        batch_size: int = 64,
        seed: int = 0,
        drop_last: bool = False,
        download: bool = True,
        distinct: bool = True,
        balanced: bool = False,
        validation_is_test: bool = False,
        holdout: float = 0.1,
        background: Literal["mean", "black"] | float = "mean",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, drop_last=drop_last)
        # checkpoints are read with weights_only, which takes no Path
        root = str(root) if root is not None else os.environ.get("LIGHTNING_LOCALITY_DATA", "data")
        # not logged: Lightning stops when a model has a hyper-parameter of the same name
        self.save_hyperparameters(logger=False)
        name, _ = parse_source(source, root)
        self.source, self.root, self.download = source, root, download
        self.canvas, self.image_size, self.distance = (canvas[0], canvas[1]), image_size, distance
        self.boxes = _place(self.canvas, image_size, distance)
        self.sizes: dict[Split, int] = {
            "train": train,
            "validation": test if validation_is_test else validation,
            "test": test,
        }
        for argument, value in (("train", train), ("validation", validation), ("test", test)):
            if value < 1:
                raise ValueError(f"{argument} must be at least 1 pair, got {value}")
        if classes is not None and len(set(classes)) < 2:
            raise ValueError(f"classes must name at least 2 different classes, got {list(classes)}")
        if not 0 < holdout < 1:
            raise ValueError(f"holdout must be a share between 0 and 1, got {holdout}")
        if channels not in (None, 1, 3):
            raise ValueError(f"channels must be 1 or 3, got {channels}")
        if isinstance(background, str) and background not in ("mean", "black"):
            raise ValueError(f"background must be 'mean', 'black' or a number, got {background!r}")
        self.resize, self.classes, self.holdout = resize, classes, holdout
        self.channels: Literal[1, 3] = source_channels(name) if channels is None else channels
        self.distinct, self.balanced, self.validation_is_test = distinct, balanced, validation_is_test
        self.background = background
        if (mean is None) != (std is None):
            raise ValueError(f"give both of mean and std or neither, got mean={mean}, std={std}")
        if mean is None and name == "cifar10" and self.channels == 3:
            mean, std = _CIFAR10_MEAN, _CIFAR10_STD
        self._given = None if mean is None or std is None else (_row(mean), _row(std))
        for argument, row in zip(("mean", "std"), self._given or (), strict=False):
            if len(row) != self.channels:
                raise ValueError(f"{argument} must have {self.channels} values, got {row.tolist()}")
        if self._given is not None and not bool((self._given[1] > 0).all()):
            raise ValueError(f"std must be positive, got {self._given[1].tolist()}")
        self._parts: dict[Part, LabelledImages] = {}
        self._tables: dict[Split, Tensor] = {}
        self._affine: dict[torch.dtype, Tensor] = {}

    @property
    def class_names(self) -> tuple[str, str]:
        """What the labels 0 and 1 mean."""
        return ("different", "same class")

    @property
    def num_classes(self) -> int:
        """Two: 0 for different classes, 1 for the same class."""
        return 2

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the canvas."""
        return self.channels, *self.canvas

    def size(self, split: Split) -> int:
        """Number of pairs of a split."""
        return self.sizes[split]

    def prepare_data(self) -> None:
        """Let torchvision download the set, where that is allowed and needed."""
        if self.download:
            prepare_images(self.source, self.root)

    def setup(self, stage: str | None = None) -> None:
        """Load the images and draw the pairs that the stage needs and that are not there yet."""
        splits: tuple[Split, ...]
        match stage:
            case "fit":
                splits = ("train", "validation")
            case "validate":
                splits = ("validation",)
            case "test" | "predict":
                splits = ("test",)
            case _:
                splits = ("train", "validation", "test")
        for split in splits:
            if split not in self._tables:
                self._tables[split] = torch.stack(self._draw(split))
        if not self._affine:
            self._affine[torch.float64] = self._normalisation()

    def part(self, split: Split) -> Part:
        """Official part of the source that the images of a split are of."""
        return "test" if split == "test" or (split == "validation" and self.validation_is_test) else "train"

    def images(self, part: Part) -> LabelledImages:
        """The source's official train or test images, ``(N, C, s, s)`` uint8, and their labels."""
        if part not in self._parts:
            self._parts[part] = load_images(
                self.source,
                part,
                self.root,
                image_size=self.image_size,
                resize=self.resize,
                channels=self.channels,
            )
        return self._parts[part]

    def pairs(self, split: Split) -> Pairs:
        """Pairs of a split, as indices into ``images(part(split))``; known after ``setup``."""
        self._check_drawn(split)
        return Pairs(*self._tables[split])

    def compose(self, split: Split, index: Tensor) -> tuple[Tensor, Tensor]:
        """Canvases ``(B, C, H, W)`` and labels ``(B,)`` of the pairs ``index`` ``(B,)``, on its device."""
        part, device, dtype = self.part(split), index.device, torch.get_default_dtype()
        self._check_drawn(split)
        table = self.on_device(f"{split} pairs", self._tables[split], device).index_select(1, index)
        source = self.on_device(f"{part} images", self.images(part).images, device)
        # rounded before it is moved: not every device has float64
        affine = self._affine.setdefault(dtype, self._affine[torch.float64].to(dtype))
        scale, shift, background = self.on_device(f"affine {dtype}", affine, device)
        both = source.index_select(0, table[:2].reshape(-1)).to(dtype).mul_(scale).add_(shift)
        shape = (len(index), *self.image_shape)
        # fresh zeros are the fastest canvas; one kept over the batches would change under its user
        image = both.new_zeros(shape) if self.background == "mean" else background.expand(shape).contiguous()
        for (top, left, height, width), side in zip(self.boxes, both.chunk(2), strict=True):
            image[:, :, top : top + height, left : left + width] = side
        return image, table[2]

    def _check_drawn(self, split: Split) -> None:
        if split not in self._tables:
            raise RuntimeError(f"the {split} pairs are not drawn yet: call setup() first")

    def _draw(self, split: Split) -> Pairs:
        # published: not only the same images but the same pairs
        stream = "test" if self.part(split) == "test" else split
        labels = self.images(self.part(split)).labels
        candidates = torch.arange(len(labels))
        if self.part(split) == "train" and not self.validation_is_test:
            kept, held = stratified_split(labels, self.holdout, self.seed)
            candidates = kept if split == "train" else held
        if self.classes is not None:
            known = torch.unique(labels).tolist()
            missing = sorted(set(self.classes) - set(known))
            if missing:
                raise ValueError(f"classes {missing} are not in {self.source}, which has {known}")
            chosen = torch.tensor(list(self.classes))
            candidates = candidates[torch.isin(labels[candidates], chosen)]
        return draw_pairs(
            labels,
            candidates,
            self.size(split),
            seeded_generator(self.seed, "pairs", stream),
            distinct=self.distinct,
            balanced=self.balanced,
        )

    def _normalisation(self) -> Tensor:
        # rows: factor and offset of a uint8 value, and the background, each (1, C, 1, 1), in float64
        mean, std = self._given or pixel_statistics(self.images("train").images)
        if self.background == "mean":
            level = mean
        else:
            level = torch.full_like(mean, 0.0 if self.background == "black" else float(self.background))
        rows = torch.stack([1 / (255 * std), -mean / std, (level - mean) / std])
        return rows[:, None, :, None, None]


def _row(values: Sequence[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


def _place(canvas: tuple[int, int], size: int, distance: int) -> tuple[Box, Box]:
    height, width = canvas
    if size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {size}")
    if distance < 0:
        raise ValueError(f"distance must be at least 0 pixels, got {distance}")
    if size > height or 2 * size > width:
        raise ValueError(
            f"two images of image_size={size} do not fit a canvas of {height}x{width}: it must be at least "
            f"{size}x{2 * size}, or image_size at most {min(height, width // 2)}"
        )
    if 2 * size + distance > width:
        raise ValueError(
            f"distance={distance} does not fit: two images of image_size={size} on a canvas of width {width} "
            f"can be at most {width - 2 * size} apart"
        )
    top, left = (height - size) // 2, width // 2 - size - distance // 2
    return (top, left, size, size), (top, left + size + distance, size, size)
