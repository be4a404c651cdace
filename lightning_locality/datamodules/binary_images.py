"""Binary images as entries of a tensor with one mode of size 2 per pixel."""

from __future__ import annotations

__all__ = ["BinaryImages"]

import os
from pathlib import Path
from typing import Literal, final

import torch

from lightning_locality.datamodules.base import seeded_generator
from lightning_locality.datamodules.image_sets import Part, load_images, parse_source, prepare_images
from lightning_locality.datamodules.tensor_recovery import AbstractRecoveryDataModule
from lightning_locality.tensors.factorization import Entries, RecoveryBatch

Variant = Literal["original", "random_images", "random_labels"]


@final
class BinaryImages(AbstractRecoveryDataModule):
    r"""One class of an image set against the others, as the completion of a tensor of order 784.

    A pixel rounded to 0 or 1 is the index of a mode of size 2, so an image is an entry of a tensor with one mode per
    pixel (row by row), whose value is given by the label. How well a factorisation of small rank fits the training
    images and predicts the test images shows how low the rank of the tensor is. The values are 0 and 2, whereas
    published errors refer to labels 0 and 1: the squared error of an image, clamped at 4, divided by 4. Predicting the
    mean of the labels gives :attr:`trivial_error`.

    Source: Implicit Regularization in Tensor Factorization (Noam Razin, Asaf Maman, Nadav Cohen, 2021), the
    experiments on tensor rank as a measure of complexity (MNIST and Fashion-MNIST). ``digits``, other sources and
    smaller sets are ours.

    Args:
        source: ``mnist``, ``fashion_mnist``, ``digits`` (8x8, no download) or another of :class:`SameClass`, as grey.
        root: Folder of the image set; None for ``$LIGHTNING_LOCALITY_DATA``, or ``data`` if that is not set.
        positive: Label of the positive images, which have the second of ``values``.
        variant: ``original``; ``random_images``: every bit a fair coin; ``random_labels``: permuted within each split.
        train: Number of training images, sampled from the official ones; None for all.
        test: Number of test images, likewise.
        values: Values of the tensor at negative and at positive images.
        image_size: Height and width in pixels to resize the images to; None for the source's own.
        seed: Seed of the choice of images, random bits and permutations.
        download: Whether torchvision may download a set that is not in ``root``.
        epoch_length: Training steps per epoch of Lightning.

    Raises:
        ValueError: Unknown source, more images than available, a label that does not occur, or equal values.

    Example:
        >>> train = BinaryImages(source="digits", positive=6).problem.train
        >>> train.indices.shape, train.indices.dtype, train.values.unique().tolist()
        (torch.Size([1438, 64]), torch.uint8, [0.0, 2.0])
    """

    def __init__(
        self,
        source: str = "mnist",
        root: str | Path | None = None,
        positive: int = 6,
        variant: Variant = "original",
        train: int | None = None,
        test: int | None = None,
        values: tuple[float, float] = (0.0, 2.0),
        image_size: int | None = None,
        seed: int = 0,
        download: bool = True,
        epoch_length: int = 40,
    ) -> None:
        super().__init__(epoch_length)
        # checkpoints are loaded with weights_only, which accepts no Path
        root = str(root) if root is not None else os.environ.get("LIGHTNING_LOCALITY_DATA", "data")
        # not logged: Lightning rejects a hyper-parameter that the model has under the same name
        self.save_hyperparameters(logger=False)
        parse_source(source, root)
        for argument, count in (("train", train), ("test", test)):
            if count is not None and count < 1:
                raise ValueError(f"{argument} must be at least 1 image, or None for all, got {count}")
        if values[0] == values[1]:
            raise ValueError(f"values must be two different numbers, for negative and positive images, got {values}")
        self.source, self.root, self.download, self.image_size = source, root, download, image_size
        self.positive, self.variant, self.seed = positive, variant, seed
        self.values = (values[0], values[1])
        self.sizes: dict[Part, int | None] = {"train": train, "test": test}

    def prepare_data(self) -> None:
        """Let torchvision download the set if allowed and needed."""
        if self.download:
            prepare_images(self.source, self.root)

    @property
    def trivial_error(self) -> float:
        """Variance of the training labels as 0 and 1, the error of predicting their mean: 0.09 for one digit of ten."""
        share = (self.problem.train.values == self.values[1]).to(torch.float64).mean().item()
        return share * (1 - share)

    def build(self) -> RecoveryBatch:
        """Build bits ``(M, pixels)``, uint8, and a value per image; the tensor itself is never formed."""
        return RecoveryBatch(self._entries("train"), self._entries("test"), None)

    def _entries(self, part: Part) -> Entries:
        images, labels = load_images(self.source, part, self.root, image_size=self.image_size, channels=1)
        known = torch.unique(labels).tolist()
        if self.positive not in known:
            raise ValueError(f"positive={self.positive} is no label of {self.source}, which has {known}")
        size = self.sizes[part]
        if size is not None:
            if size > len(labels):
                raise ValueError(f"{part}={size} is more than the {len(labels)} images of {self.source}: lower it")
            order = torch.randperm(len(labels), generator=seeded_generator(self.seed, "images", part))
            kept = order[:size].sort().values
            images, labels = images[kept], labels[kept]
        if self.variant == "random_images":
            generator = seeded_generator(self.seed, "bits", part)
            bits = torch.randint(2, images.shape, dtype=torch.uint8, generator=generator)
        else:
            # rounded to black or white; 127.5 does not occur
            bits = (images >= 128).to(torch.uint8)
        positive = labels == self.positive
        if self.variant == "random_labels":
            positive = positive[torch.randperm(len(labels), generator=seeded_generator(self.seed, "labels", part))]
        low, high = self.values
        return Entries(bits.flatten(1).contiguous(), torch.where(positive, high, low).to(torch.float64))
