"""PermutedImages: classification of images whose pixels are moved, near or far, by one fixed permutation."""

from __future__ import annotations

__all__ = ["PermutedImages", "window_permutation"]

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Literal, final

import torch
from torch import Tensor

from lightning_locality.datamodules.base import Split, seeded_generator
from lightning_locality.datamodules.image_sets import Resize
from lightning_locality.datamodules.source_images import AbstractSourceImages


def window_permutation(size: int, window: int, generator: torch.Generator) -> Tensor:
    """A uniform permutation of the pixels within each window of an image.

    The image is cut into windows from the top left corner; those at the right and the lower edge are smaller where
    ``window`` does not divide ``size``.

    Args:
        size: Height and width of the image in pixels.
        window: Height and width of a window in pixels, 1 (identity) to ``size`` (uniform over all permutations).
        generator: Source of randomness, on the CPU.

    Returns:
        ``(size * size,)``, int64: new pixel k, row by row, is old pixel number k of this.

    Raises:
        ValueError: If a window is smaller than a pixel or larger than the image.

    Example:
        >>> window_permutation(2, 1, torch.Generator()).tolist()
        [0, 1, 2, 3]
    """
    if not 1 <= window <= size:
        raise ValueError(f"window must be from 1 to the image's {size} pixels, got {window}")
    number = torch.arange(size * size).reshape(size, size)
    moved = torch.empty_like(number)
    corners = range(0, size, window)
    for top, left in product(corners, corners):
        block = number[top : top + window, left : left + window]
        order = torch.randperm(block.numel(), generator=generator)
        moved[top : top + window, left : left + window] = block.reshape(-1)[order].reshape(block.shape)
    return moved.reshape(-1)


@final
class PermutedImages(AbstractSourceImages):
    r"""Images of a source with their class labels, all pixels moved by one fixed permutation (ours).

    A permutation takes nothing from a classifier that reads all pixels alike, and takes locality from the task: what
    were neighbours are now up to a window apart. With s the image size, the pixels are permuted uniformly within
    windows of side

        w = 1 + round(scramble (s - 1)),

    so 0 is the identity and 1 a uniform permutation of the whole image (where w does not divide s, the last windows
    of a row and of a column are smaller). Within a window of side w the mean
    displacement along an axis is (w^2 - 1) / (3w) pixels in expectation; :attr:`expected_displacement` is its mean
    over the image, which grows with ``scramble``. The permutation depends on ``seed``, s and w alone and is the same
    for all splits and channels.

    Training and validation images are of the source's official training images, which are divided between the two.

    Args:
        source: As for :class:`SameClass`.
        root: Folder of the image set, likewise.
        scramble: The dial of locality, 0 (images as they are) to 1 (no locality left).
        train: Number of training images, drawn from those there are; all if not given.
        validation: Number of validation images, likewise.
        test: Number of test images, likewise.
        image_size: Height and width of the images in pixels; the source's are resized.
        resize: How: bilinear, area (mean over blocks) or pad (black around).
        channels: 1 (grey) or 3 (colour); the source's own if not given, 3 for folders.
        classes: Labels to use the images of, which become 0, 1, ... in ascending order; all if not given.
        batch_size: Images per step and process.
        seed: Seed of the permutation, of the choice of images, of the hold-out and of the order of training batches.
        drop_last: Leave out the last, smaller training batch of an epoch.
        download: Let torchvision download a set that is not in ``root``.
        holdout: Share of the training images of each class that is kept for validation.
        mean: Mean intensity (0 to 1) of each channel, subtracted, as for :class:`SameClass`.
        std: Standard deviation of each channel, divided by, likewise.

    Raises:
        UnknownSourceError: If there is no such source.
        ValueError: If a number is out of its range, or (at ``setup``) more images are asked for than there are.

    Example:
        >>> data = PermutedImages(source="digits", scramble=3 / 7, image_size=8)
        >>> data.window, data.expected_displacement
        (4, 1.25)
    """

    def __init__(
        self,
        source: str = "cifar10",
        root: str | Path | None = None,
        scramble: float = 1.0,
        train: int | None = None,
        validation: int | None = None,
        test: int | None = None,
        image_size: int = 32,
        resize: Resize = "bilinear",
        channels: Literal[1, 3] | None = None,
        classes: Sequence[int] | None = None,
        batch_size: int = 64,
        seed: int = 0,
        drop_last: bool = False,
        download: bool = True,
        holdout: float = 0.1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
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
            validation_is_test=False,
            holdout=holdout,
            mean=mean,
            std=std,
        )
        if not 0 <= scramble <= 1:
            raise ValueError(f"scramble must be from 0 (images as they are) to 1 (no locality left), got {scramble}")
        self._wanted: dict[Split, int | None] = {"train": train, "validation": validation, "test": test}
        for argument, value in self._wanted.items():
            if value is not None and value < 1:
                raise ValueError(f"{argument} must be at least 1 image, or None for all, got {value}")
        self.scramble = scramble
        self.window = 1 + round(scramble * (image_size - 1))
        generator = seeded_generator(seed, "permutation", image_size, self.window)
        self.permutation = window_permutation(image_size, self.window, generator)

    @property
    def expected_displacement(self) -> float:
        """Mean displacement of a pixel along one axis, in pixels, expected over the seeds."""
        full, rest = divmod(self.image_size, self.window)
        # of a window of side w, w rows of the s: w/s times (w^2 - 1) / (3w)
        windows = [self.window] * full + [rest] * bool(rest)
        return sum((side**2 - 1) / 3 for side in windows) / self.image_size

    @property
    def num_classes(self) -> int:
        """Number of classes that are used; the images are loaded for it where ``classes`` is not given."""
        return len(self._classes())

    @property
    def class_names(self) -> tuple[str, ...]:
        """The source's class numbers that the labels stand for."""
        return tuple(str(number) for number in self._classes().tolist())

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.channels, self.image_size, self.image_size

    def size(self, split: Split) -> int:
        """Number of images of a split, known after ``setup``."""
        return self.table(split).shape[1]

    def draw(self, split: Split) -> Tensor:
        """Image indices and labels ``(2, N)``; fewer images are the first of more.

        Raises:
            ValueError: If there are fewer images than asked for, or of classes that the training images lack.
        """
        candidates, wanted = self.candidates(split), self._wanted[split]
        if wanted is not None and wanted > len(candidates):
            raise ValueError(
                f"{split}={wanted} images asked for, but {self.source} has {len(candidates)} for it: lower it"
            )
        order = torch.randperm(len(candidates), generator=seeded_generator(self.seed, "images", split))
        index, classes = candidates[order[:wanted]], self._classes()
        labels = self.images(self.part(split)).labels[index]
        if strangers := sorted(set(labels.tolist()) - set(classes.tolist())):
            raise ValueError(
                f"the {split} images of {self.source} have classes {strangers}, which its training images lack: "
                f"choose classes={classes.tolist()}"
            )
        return torch.stack([index, torch.searchsorted(classes, labels)])

    def compose(self, split: Split, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images ``(B, C, s, s)`` and labels ``(B,)`` of the samples ``index`` ``(B,)``, on its device."""
        part, device = self.part(split), index.device
        table = self.on_device(f"{split} images chosen", self.table(split), device).index_select(1, index)
        source = self.on_device(f"{part} images", self.images(part).images, device)
        permutation = self.on_device("permutation", self.permutation, device)
        scale, shift = self.affine(device)
        chosen = source.index_select(0, table[0]).flatten(2).index_select(2, permutation)
        pixels = chosen.reshape(len(index), *self.image_shape).to(scale.dtype)
        return pixels.mul_(scale).add_(shift), table[1]

    def _classes(self) -> Tensor:
        if self.classes is not None:
            return torch.tensor(sorted(set(self.classes)))
        present: Tensor = torch.unique(self.images("train").labels)
        return present
