"""PermutedImages: classification of images whose pixels are moved, near or far, by one fixed permutation."""

from __future__ import annotations

__all__ = ["PermutedImages"]

from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from lightning_locality.datamodules.base import Split, seeded_generator
from lightning_locality.datamodules.rearrangement import rearrange_features
from lightning_locality.datamodules.source_images import AbstractSourceImages


def window_permutation(size: int, window: int, generator: torch.Generator) -> Tensor:
    """Sample a uniform permutation of the pixels within each window of an image, cut from the top left corner.

    New pixel k, counted row by row, is the old pixel with number k of the result, ``(size * size,)``, int64.
    """
    number = torch.arange(size * size).reshape(size, size)
    for top, left in product(range(0, size, window), repeat=2):
        block = number[top : top + window, left : left + window]
        order = torch.randperm(block.numel(), generator=generator)
        block[:] = block.reshape(-1)[order].reshape(block.shape)
    return number.reshape(-1)


@final
class PermutedImages(AbstractSourceImages):
    r"""Images of a source with their class labels, all pixels moved by one fixed permutation (ours).

    A permutation takes nothing from a classifier that treats all pixels alike, but takes locality from the task:
    former neighbours are now up to a window apart. With s the image size, the pixels are permuted uniformly within
    windows of side w = 1 + round(scramble (s - 1)), so 0 is the identity and 1 a uniform permutation of the whole image
    (if w does not divide s, the last windows of a row and of a column are smaller). The permutation depends on
    ``seed``, s and w only and is the same for all splits and channels.

    If ``rearranged``, the permuted pixels are laid out anew by :func:`rearrange_features` (Alexander et al., 2023),
    which knows nothing of the permutation: pixels that correlate in the training images come to lie together.

    Args:
        source: ``cifar10``, ``mnist``, ``digits``, ``folder:PATH``, ..., see :class:`AbstractSourceImages`.
        root: Folder of the image set; by default ``$LIGHTNING_LOCALITY_DATA``, or ``data`` if that is not set.
        scramble: 0 (unchanged images) to 1 (no locality left).
        rearranged: Rearrange the permuted pixels by their correlations in the training images in use.
        train: Number of training images, a random choice; all by default.
        validation: Number of validation images, likewise.
        test: Number of test images, likewise.
        options: Further arguments of :class:`AbstractSourceImages`.

    Raises:
        ValueError: Unknown source, or a number out of range or (at ``setup``) above the number of images.

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
        *,
        rearranged: bool = False,
        train: int | None = None,
        validation: int | None = None,
        test: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(source, root, **options)
        if not 0 <= scramble <= 1:
            raise ValueError(f"scramble must be from 0 (unchanged images) to 1 (no locality left), got {scramble}")
        self._wanted: dict[Split, int | None] = {"train": train, "validation": validation, "test": test}
        for argument, value in self._wanted.items():
            if value is not None and value < 1:
                raise ValueError(f"{argument} must be at least 1 image, or None for all, got {value}")
        self.scramble, self.rearranged = scramble, rearranged
        self.image_shape = (self.channels, self.image_size, self.image_size)
        self.window = 1 + round(scramble * (self.image_size - 1))
        generator = seeded_generator(self.seed, "permutation", self.image_size, self.window)
        self.permutation = window_permutation(self.image_size, self.window, generator)

    @cached_property
    def order(self) -> Tensor:
        """The source's pixel at every new place, ``(s * s,)``: the permutation, rearranged or not."""
        if not self.rearranged:
            return self.permutation
        # also of a stage that has sampled no training images
        index = self.sample("train")[0]
        images = self.images("train").images[index].flatten(2)[..., self.permutation].float()
        order = rearrange_features(images.reshape(len(index), *self.image_shape), seed=self.seed)
        return self.permutation[order]

    @property
    def expected_displacement(self) -> float:
        """Mean displacement of a pixel along one axis by the permutation, in pixels, expected over the seeds."""
        full, rest = divmod(self.image_size, self.window)
        # of a window of side w, in which it is (w^2 - 1) / (3w), w rows of the s
        windows = [self.window] * full + [rest] * bool(rest)
        return sum((side**2 - 1) / 3 for side in windows) / self.image_size

    @property
    def num_classes(self) -> int:
        """Number of classes in use; without ``classes`` this loads the images."""
        return len(self._classes())

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class numbers in the source that the labels stand for."""
        return tuple(str(number) for number in self._classes().tolist())

    def size(self, split: Split) -> int:
        """Number of images in a split, known after ``setup``."""
        return self.table(split).shape[1]

    def sample(self, split: Split) -> Tensor:
        """Sample image indices and labels ``(2, N)``; a smaller sample is the beginning of a larger one."""
        candidates, wanted = self.candidates(split), self._wanted[split]
        if wanted is not None and wanted > len(candidates):
            raise ValueError(
                f"{split}={wanted} images requested, but {self.source} has only {len(candidates)}: lower {split}"
            )
        order = torch.randperm(len(candidates), generator=seeded_generator(self.seed, "images", split))
        index, classes = candidates[order[:wanted]], self._classes()
        labels = self.images(self.part(split)).labels[index]
        if unknown := sorted(set(labels.tolist()) - set(classes.tolist())):
            raise ValueError(
                f"the {split} images of {self.source} have classes {unknown}, which its training images lack: "
                f"choose classes={classes.tolist()}"
            )
        return torch.stack([index, torch.searchsorted(classes, labels)])

    def compose(self, split: Split, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images ``(B, C, s, s)`` and labels ``(B,)`` of the samples ``index`` ``(B,)``, on its device."""
        part, device = self.part(split), index.device
        table = self.on_device(f"{split} images chosen", self.table(split), device).index_select(1, index)
        source = self.on_device(f"{part} images", self.images(part).images, device)
        order = self.on_device("order", self.order, device)
        scale, shift = self.affine(device)
        chosen = source.index_select(0, table[0]).flatten(2).index_select(2, order)
        pixels = chosen.reshape(len(index), *self.image_shape).to(scale.dtype)
        return pixels.mul_(scale).add_(shift), table[1]

    def _classes(self) -> Tensor:
        classes = torch.unique(self.images("train").labels).tolist() if self.classes is None else self.classes
        return torch.tensor(sorted(set(classes)))
