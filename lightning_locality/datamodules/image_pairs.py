"""Two images at a distance on one canvas, with or without distractors in between."""

from __future__ import annotations

__all__ = ["AbstractImagePairs", "Pairs"]

from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_locality.datamodules.base import Split, check_counts, seeded_generator
from lightning_locality.datamodules.source_images import MAX_SIDE, AbstractSourceImages, ClassImages
from lightning_locality.datamodules.stream import Curriculum, Values

Box = tuple[int, int, int, int]


class Pairs(NamedTuple):
    """Pairs of images: indices ``(N,)`` of the left and the right image, and labels ``(N,)``."""

    left: Tensor
    right: Tensor
    label: Tensor


class AbstractImagePairs(AbstractSourceImages):
    r"""Two images at a horizontal distance on an empty canvas; the label depends on both.

    Pair i of a split depends on ``seed``, the split and i only. With ``train=None`` every epoch has ``epoch_size`` new
    training pairs, which depend on ``seed``, the epoch and i only; those of epoch 0 are the pairs of
    ``train=epoch_size``. The defaults are those of :class:`SameClass`.

    A distractor is a uniform image of a uniform class, independent of the pair, of its label and of the other
    distractors (ours). data/README.md has the formula of the places.

    Args:
        source: ``cifar10``, ``mnist``, ``digits``, ``folder:PATH``, ..., see :class:`AbstractSourceImages`.
        root: Folder of the image set; by default ``$LIGHTNING_LOCALITY_DATA``, or ``data`` if that is not set.
        distance: Pixels between the inner edges of the two images.
        train: Number of training pairs; None: new ones in every epoch.
        validation: Number of validation pairs.
        test: Number of test pairs.
        canvas: Height and width of the canvas in pixels.
        distinct: A pair from one class is never the same image twice. Published: false.
        balanced: Exactly half of the pairs are positive. Published: a fair coin for each.
        background: ``mean`` (published: the mean colour, 0 once normalised), ``black``, or an intensity from 0 to 1.
        distractors: Number of images between the two that say nothing about the label. Published: 0.
        epoch_size: Number of pairs per epoch if ``train`` is None.
        curriculum: With ``train=None``, values in epoch 0 of ``distance`` or ``distractors``, such as
            ``{"distance": 0}``, which change in equal steps to their own values; validation and test pairs have those.
            If ``distance`` changes, ``boxes`` is None.
        curriculum_epochs: Number of epochs that this takes.
        options: Further arguments of :class:`AbstractSourceImages`.

    Raises:
        ValueError: Unknown source, images that do not fit the canvas, or a number out of range.
    """

    unit = "pair"
    num_classes = 2
    class_names: tuple[str, str]  # meaning of the labels 0 and 1

    def __init__(
        self,
        source: str = "cifar10",
        root: str | Path | None = None,
        distance: int = 160,
        train: int | None = 5_000,
        validation: int = 2_000,
        test: int = 10_000,
        canvas: tuple[int, int] = (224, 224),
        *,
        distinct: bool = True,
        balanced: bool = False,
        background: Literal["mean", "black"] | float = "mean",
        distractors: int = 0,
        epoch_size: int = 5_000,
        curriculum: dict[str, float] | None = None,
        curriculum_epochs: int = 10,
        **options: Any,
    ) -> None:
        super().__init__(source, root, **options)
        if max(canvas) > MAX_SIDE:
            raise ValueError(f"canvas must be at most {MAX_SIDE:,} pixels high and wide, got {tuple(canvas)}")
        self.canvas, self.distance = (canvas[0], canvas[1]), distance
        self.image_shape = (self.channels, *self.canvas)
        self.distractors, self.endless = distractors, train is None
        size = epoch_size if train is None else train
        self.sizes: dict[Split, int] = {"train": size, "validation": validation, "test": test}
        named = {("epoch_size" if self.endless else "train"): size, "validation": validation, "test": test}
        check_counts(named, "pair")
        self.distinct, self.balanced, self.background = distinct, balanced, background
        if curriculum and not self.endless:
            raise ValueError(f"curriculum={curriculum} needs new pairs in every epoch: set train=None")
        goals = {"distance": distance, "distractors": distractors}
        left, right, *_ = self._places(distance, distractors)
        self._curriculum = Curriculum(curriculum or {}, curriculum_epochs, goals)
        self._curriculum.check(self._places_at)
        # None: not in the same places in every epoch
        self.boxes: tuple[Box, Box] | None = None if "distance" in self._curriculum.start else (left, right)
        self._later: tuple[int, Tensor] | None = None

    @property
    def distractor_boxes(self) -> tuple[Box, ...]:
        """Places of the distractors from left to right."""
        return self._places(self.distance, self.distractors)[2:]

    def _places(self, distance: int, distractors: int) -> tuple[Box, ...]:
        """Places of the left and the right image, then of the distractors from left to right."""
        wide = self.columns[0].stop - self.columns[0].start
        return tuple(_boxes(self.canvas, self.image_size, wide, distance, distractors))

    def _settings(self, epoch: int) -> dict[str, Any]:
        return {"distance": self.distance, "distractors": self.distractors} | self._curriculum.at(epoch)

    def _places_at(self, epoch: int) -> tuple[Box, ...]:
        """Places of the images in the training pairs of an epoch."""
        return self._places(**self._settings(epoch))

    @abstractmethod
    def sample_pairs(self, labels: Tensor, candidates: Tensor, size: int, generator: torch.Generator) -> Pairs:
        """Sample ``size`` pairs among ``candidates`` ``(K,)``; pair i uses row i of the generator's stream."""

    def pairs(self, split: Split) -> Pairs:
        """Pairs of a split, as indices into ``images(part(split))``; known after ``setup``."""
        left, right, *_, label = self.table(split)
        return Pairs(left, right, label)

    @property
    def columns(self) -> tuple[slice, slice]:
        """Columns shown of the left and of the right image, equally many; here all."""
        return slice(0, self.image_size), slice(0, self.image_size)

    @property
    def task_distance(self) -> float:
        """Distance of the centres of the two images, in pixels: ``distance`` and the width of one."""
        width = self.columns[0].stop - self.columns[0].start
        return float(self.distance + width)

    def size(self, split: Split) -> int:
        """Number of pairs in a split."""
        return self.sizes[self.origin(split)]

    def sample(self, split: Split, epoch: int = 0) -> Tensor:
        """Sample the pairs of a split, ``(3 + distractors, N)``: left, right, distractors from left to right, label.

        An endless training split has other pairs in every ``epoch``.
        """
        size, stream = self.size(split), self.origin(split)
        labels, candidates = self.images(self.part(split)).labels, self.candidates(split)
        later = (epoch,) if epoch else ()
        generator = seeded_generator(self.seed, "pairs", stream, *later)
        left, right, label = self.sample_pairs(labels, candidates, size, generator)
        number = self._settings(epoch)["distractors"] if split == "train" else self.distractors
        # separate streams: the number of distractors changes neither the pair nor one another
        streams = [seeded_generator(self.seed, "distractor", stream, place, *later) for place in range(number)]
        between = [ClassImages(labels, candidates).sample(size, generator) for generator in streams]
        return torch.stack([left, right, *between, label])

    def compose(self, split: Split, index: Tensor) -> tuple[Tensor, Tensor]:
        """Canvases ``(B, C, H, W)`` and labels ``(B,)`` of the pairs ``index`` ``(B,)``, on its device."""
        table = self.on_device(f"{split} pairs", self.table(split), index.device).index_select(1, index)
        first = split == "train" and self.endless
        return self._compose(
            split, table, self._places_at(0) if first else self._places(self.distance, self.distractors)
        )

    def begin_stream(self, epoch: int, index: Tensor) -> Callable[[], Values]:
        """Select pairs of an epoch, as rows of image indices and, last, labels."""
        if self._later is None or self._later[0] != epoch:
            self._later = epoch, self.sample("train", epoch)
        rows = self._later[1][:, index]
        return lambda: (rows,)

    def compose_stream(self, epoch: int, values: Values) -> tuple[Tensor, Tensor]:
        """Canvases ``(B, C, H, W)`` and labels ``(B,)`` of training pairs of an epoch."""
        return self._compose("train", values[0], self._places_at(epoch))

    def _compose(self, split: Split, table: Tensor, places: tuple[Box, ...]) -> tuple[Tensor, Tensor]:
        part, device, dtype = self.part(split), table.device, torch.get_default_dtype()
        source = self.on_device(f"{part} images", self.images(part).images, device)
        scale, shift, background = self.affine(device)
        shown = source.index_select(0, table[:-1].reshape(-1)).to(dtype).mul_(scale).add_(shift)
        shape = (table.shape[1], *self.image_shape)
        # fresh zeros are the fastest canvas; a reused one would change under its user
        image = shown.new_zeros(shape) if self.background == "mean" else background.expand(shape).contiguous()
        # distractors alternate between the two sides, which matters if only part of an image is shown
        columns = [self.columns[number % 2] for number in range(len(places))]
        for (top, left, height, width), visible, picture in zip(places, columns, shown.chunk(len(places)), strict=True):
            image[:, :, top : top + height, left : left + width] = picture[..., visible]
        return image, table[-1]

    def normalization(self, mean: Tensor, std: Tensor) -> list[Tensor]:
        """Factor and offset of a uint8 value, and the background, each ``(C,)``."""
        if self.background == "mean":
            level = mean
        else:
            level = torch.full_like(mean, 0.0 if self.background == "black" else float(self.background))
        return [*super().normalization(mean, std), (level - mean) / std]


def _boxes(canvas: tuple[int, int], size: int, wide: int, distance: int, distractors: int) -> Iterator[Box]:
    """Places of the left and the right image, then of the distractors from left to right."""
    height, width = canvas
    if distractors < 0:
        raise ValueError(f"distractors must be at least 0 images, got {distractors}")
    if distance < 0:
        raise ValueError(f"distance must be at least 0 pixels, got {distance}")
    if size > height or 2 * wide > width:
        largest = min(height, size * width // (2 * wide))
        raise ValueError(
            f"two images of image_size={size} do not fit a canvas of {height}x{width}: it must be at least "
            f"{size}x{2 * wide}, or image_size at most {largest}"
        )
    if 2 * wide + distance > width:
        raise ValueError(
            f"distance={distance} does not fit: two images of image_size={size} on a canvas of width {width} "
            f"can be at most {width - 2 * wide} apart"
        )
    free = distance - distractors * wide
    if free < 0:
        raise ValueError(
            f"distractors={distractors} do not fit: between two images {distance} pixels apart there is room for "
            f"{distance // wide} images of width {wide}: use fewer or a distance of at least {distractors * wide}"
        )
    left = width // 2 - wide - distance // 2
    between = [left + wide + (j + 1) * free // (distractors + 1) + j * wide for j in range(distractors)]
    return (((height - size) // 2, start, size, wide) for start in (left, left + wide + distance, *between))
