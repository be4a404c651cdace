"""Two images at a distance on one canvas, with or without others in between: what the pair tasks share."""

from __future__ import annotations

__all__ = ["AbstractImagePairs", "Box", "Pairs", "draw_pairs"]

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_locality.datamodules.base import Split, seeded_generator
from lightning_locality.datamodules.image_sets import Resize
from lightning_locality.datamodules.source_images import AbstractSourceImages, ClassImages


class Pairs(NamedTuple):
    """Pairs of images: indices ``(N,)`` of the left and the right one, and whether their class is the same."""

    left: Tensor
    right: Tensor
    same: Tensor


def draw_pairs(
    labels: Tensor,
    candidates: Tensor,
    size: int,
    generator: torch.Generator,
    *,
    distinct: bool = True,
    balanced: bool = False,
) -> Pairs:
    """Random pairs of images of the same class or of two classes.

    A positive pair: the class uniform, then two images of it. A negative pair: the first class uniform, the
    second uniform among the others, then an image of each. Pair i takes row i of the generator's stream, so
    more pairs begin with the same pairs.

    Args:
        labels: Class of every image ``(M,)``.
        candidates: Indices of the images that may be drawn ``(K,)``.
        size: Number of pairs.
        generator: Source of randomness, on the CPU.
        distinct: The two images of a positive pair are two images; if not, they may be the same one.
        balanced: Of pairs 0 and 1, 2 and 3, and so on exactly one is positive; if not, each by a fair coin.

    Raises:
        ValueError: If there are fewer than two classes, or ``distinct`` and a class has a single image.
    """
    images = ClassImages.of(labels, candidates)
    number = len(images.classes)
    if number < 2:
        raise ValueError(f"pairs need at least 2 classes, got {images.classes.tolist()}")
    if distinct:
        images.refuse_lonely(torch.ones(number, dtype=torch.bool))
    # columns: coin, left class, right class, left image, right image; float64 resolves every image index
    uniform = torch.rand((size, 5), dtype=torch.float64, generator=generator).unbind(1)
    positive = uniform[0] < 0.5
    if balanced:
        positive[1::2] = ~positive[::2][: size // 2]
    left = (uniform[1] * number).long()
    other = (uniform[2] * (number - 1)).long()
    other = other + (other >= left)
    right = torch.where(positive, left, other)
    return Pairs(*images.two((left, right), (uniform[3], uniform[4]), distinct), positive.long())


Box = tuple[int, int, int, int]


class AbstractImagePairs(AbstractSourceImages):
    r"""Two images at a horizontal distance on an empty canvas; the label depends on both.

    Training and validation pairs are of the source's official training images, which are divided between the
    two; test pairs are of its official test images. Pair i of a split depends on ``seed``, on the split and on
    i alone. The defaults are those of :class:`SameClass`.

    With pictures of height s and width w (both the image size, unless only a part of the image is shown) and
    distance d on a canvas of height H and width W, the left picture begins at column W//2 - w - d//2, the right
    one at w + d after that, both at row (H - s)//2. Of k distractors, number j = 0..k-1 begins at column
    (j + 1)(d - kw)//(k + 1) + jw of the space between the two. A distractor is a uniform image of a uniform
    class, independent of the pair, of its label and of the other distractors (ours).

    Args:
        source: ``cifar10``, ``cifar100``, ``mnist``, ``fashion_mnist``, ``svhn``, ``digits`` (needs no
            download), ``folder:PATH``, a folder of class folders, with or without train/ and test/, or
            ``file:PATH``, an .npz file (see :func:`~lightning_locality.datamodules.image_sets.load_images`).
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
        distinct: A pair from one class is never the same image twice. Published: false.
        balanced: Exactly half of the pairs are positive. Published: a fair coin for each.
        validation_is_test: The validation pairs are the test pairs. Published: true. Otherwise they come
            from training images of their own.
        holdout: Share of the training images of each class that is kept for the validation pairs.
        background: ``mean``: zero on the normalised canvas, which is the mean colour. Published. ``black``,
            or a number from 0 (black) to 1 (white): that intensity, normalised like the images.
        mean: Mean intensity (0 to 1) of each channel, subtracted. If not given, the published values for
            ``cifar10`` in colour, and those of the official training images for every other source.
        std: Standard deviation of each channel, divided by; if not given, likewise.
        distractors: Number of images between the two that say nothing about the label. Published: 0.

    Raises:
        UnknownSourceError: If there is no such source.
        ValueError: If the images do not fit the canvas, or a number is out of its range.
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
        distractors: int = 0,
    ) -> None:
        super().__init__(
            source=source,
            root=root,
            image_size=image_size,
            resize=resize,
            channels=channels,
            classes=classes,
            batch_size=batch_size,
            seed=seed,
            drop_last=drop_last,
            download=download,
            validation_is_test=validation_is_test,
            holdout=holdout,
            mean=mean,
            std=std,
        )
        self.canvas, self.distance = (canvas[0], canvas[1]), distance
        if distractors < 0:
            raise ValueError(f"distractors must be at least 0 images, got {distractors}")
        self.distractors = distractors
        self.sizes: dict[Split, int] = {
            "train": train,
            "validation": test if validation_is_test else validation,
            "test": test,
        }
        for argument, value in (("train", train), ("validation", validation), ("test", test)):
            if value < 1:
                raise ValueError(f"{argument} must be at least 1 pair, got {value}")
        if isinstance(background, str) and background not in ("mean", "black"):
            raise ValueError(f"background must be 'mean', 'black' or a number, got {background!r}")
        self.distinct, self.balanced, self.background = distinct, balanced, background
        width = self.columns[0].stop - self.columns[0].start
        self.boxes = _place(self.canvas, image_size, width, distance)
        self.distractor_boxes = _between(self.boxes, distractors)

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, str]:
        """What the labels 0 and 1 mean."""

    @abstractmethod
    def draw_labelled(
        self, labels: Tensor, candidates: Tensor, size: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Indices of the left and the right images and labels, each ``(size,)``; row i of the stream for pair i."""

    @property
    def columns(self) -> tuple[slice, slice]:
        """Columns of the left and of the right image that are shown, equally many; all of them here."""
        return slice(0, self.image_size), slice(0, self.image_size)

    @property
    def num_classes(self) -> int:
        """Two: 0 and 1."""
        return 2

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the canvas."""
        return self.channels, *self.canvas

    @property
    def unit(self) -> str:
        """What a sample is called in messages."""
        return "pair"

    def size(self, split: Split) -> int:
        """Number of pairs of a split."""
        return self.sizes[split]

    def draw(self, split: Split) -> Tensor:
        """The pairs of a split ``(3 + distractors, N)``: left, right, distractors from left to right, label."""
        stream, size = self.stream(split), self.size(split)
        labels, candidates = self.images(self.part(split)).labels, self.candidates(split)
        generator = seeded_generator(self.seed, "pairs", stream)
        left, right, label = self.draw_labelled(labels, candidates, size, generator)
        # streams of their own: neither their number nor the pair changes what the others are
        between = [
            _any_image(labels, candidates, size, seeded_generator(self.seed, "distractor", stream, number))
            for number in range(self.distractors)
        ]
        return torch.stack([left, right, *between, label])

    def compose(self, split: Split, index: Tensor) -> tuple[Tensor, Tensor]:
        """Canvases ``(B, C, H, W)`` and labels ``(B,)`` of the pairs ``index`` ``(B,)``, on its device."""
        part, device, dtype = self.part(split), index.device, torch.get_default_dtype()
        table = self.on_device(f"{split} pairs", self.table(split), device).index_select(1, index)
        source = self.on_device(f"{part} images", self.images(part).images, device)
        scale, shift, background = self.affine(device)
        shown = source.index_select(0, table[:-1].reshape(-1)).to(dtype).mul_(scale).add_(shift)
        shape = (len(index), *self.image_shape)
        # fresh zeros are the fastest canvas; one kept over the batches would change under its user
        image = shown.new_zeros(shape) if self.background == "mean" else background.expand(shape).contiguous()
        boxes = (*self.boxes, *self.distractor_boxes)
        # distractors show their two sides in turn, for where only one is shown
        columns = (*self.columns, *(self.columns[number % 2] for number in range(self.distractors)))
        for (top, left, height, width), part_of, one in zip(boxes, columns, shown.chunk(len(boxes)), strict=True):
            image[:, :, top : top + height, left : left + width] = one[..., part_of]
        return image, table[-1]

    def normalisation(self, mean: Tensor, std: Tensor) -> list[Tensor]:
        """Factor and offset of a uint8 value, and the background, each ``(C,)``."""
        if self.background == "mean":
            level = mean
        else:
            level = torch.full_like(mean, 0.0 if self.background == "black" else float(self.background))
        return [*super().normalisation(mean, std), (level - mean) / std]


def _any_image(labels: Tensor, candidates: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Uniform images of uniform classes, ``(size,)`` indices."""
    images = ClassImages.of(labels, candidates)
    uniform = torch.rand((size, 2), dtype=torch.float64, generator=generator)
    return images.one((uniform[:, 0] * len(images.classes)).long(), uniform[:, 1])


def _place(canvas: tuple[int, int], size: int, wide: int, distance: int) -> tuple[Box, Box]:
    height, width = canvas
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
    top, left = (height - size) // 2, width // 2 - wide - distance // 2
    return (top, left, size, wide), (top, left + wide + distance, size, wide)


def _between(boxes: tuple[Box, Box], count: int) -> tuple[Box, ...]:
    (top, left, height, width), (_, right, _, _) = boxes
    distance = right - left - width
    free = distance - count * width
    if free < 0:
        raise ValueError(
            f"distractors={count} do not fit: between two images {distance} pixels apart there is room for "
            f"{distance // width} images of width {width}; take fewer or a distance of at least {count * width}"
        )
    starts = (left + width + (j + 1) * free // (count + 1) + j * width for j in range(count))
    return tuple((top, start, height, width) for start in starts)
