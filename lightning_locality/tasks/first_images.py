"""The images that a run is measured on: the first ones of its own batches."""

from __future__ import annotations

__all__ = ["FirstImages", "checked_images"]

from collections.abc import Callable, Mapping
from typing import Any, Literal, final

import torch
from pytorch_lightning.strategies import Strategy
from torch import Tensor

_KEYS = ("image", "x")


@final
class FirstImages:
    """Copies images as batches pass, and stays with them: those of validation, or of training where it has too few.

    Args:
        wanted: How many images.
        check: Takes their height and width, and raises a ValueError where they cannot be measured.
    """

    def __init__(self, wanted: int, check: Callable[[int, int], object]) -> None:
        self.wanted, self.check = wanted, check
        # fixed from the first measurement on
        self.images: Tensor | None = None
        self._seen: dict[str, list[Tensor]] = {"validation": [], "training": []}

    def keep(self, source: Literal["validation", "training"], batch: Any, number: int) -> None:
        """Copy the images of a batch that are still wanted.

        Args:
            source: Where the batch is from.
            batch: Images, a tuple or list that begins with them, or a mapping with "image" or "x".
            number: Of the batch in its epoch, from 0.

        Raises:
            ValueError: A batch without images ``(B, C, H, W)``, or images of a size that cannot be measured.
        """
        if self.images is not None:
            return
        seen = self._seen[source]
        missing = self.wanted - sum(map(len, seen))
        if missing > 0 and number == 0:
            # a new pass has the images of the one before again
            seen.clear()
            missing = self.wanted
        if missing > 0:
            images = checked_images(_images(batch), self.check, f"the {source} batch")
            seen.append(images.detach()[:missing].clone().cpu())

    def chosen(self, strategy: Strategy) -> Tensor:
        """The images, on the CPU: the same at every call and on every process.

        Args:
            strategy: By which the first process tells the others.

        Raises:
            ValueError: Fewer than two images have passed.
        """
        if self.images is None:
            validation, training = (sum(map(len, self._seen[source])) for source in ("validation", "training"))
            chosen = self._seen["validation" if validation >= min(self.wanted, training) else "training"]
            images = strategy.broadcast(torch.cat(chosen) if chosen else None)
            if images is None or len(images) < 2:
                raise ValueError(
                    "RankMonitor has seen fewer than 2 images in the batches of this run: pass images=, a tensor "
                    "(N, C, H, W)"
                )
            self.images = images
            self._seen = {"validation": [], "training": []}
        return self.images


def checked_images(images: Tensor, check: Callable[[int, int], object], name: str) -> Tensor:
    """The images, after a look at their type and shape.

    Args:
        images: What was given.
        check: As in :class:`FirstImages`.
        name: Of the images in the message.

    Raises:
        ValueError: Not floating-point ``(B, C, H, W)``, or of a size that cannot be measured.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"{name} must be floating-point images (B, C, H, W), got {images.dtype} {tuple(images.shape)}: pass "
            "images= as the module takes them"
        )
    check(*images.shape[-2:])
    return images


def _images(batch: Any) -> Tensor:
    found = batch
    if isinstance(batch, (tuple, list)) and batch:
        found = batch[0]
    elif isinstance(batch, Mapping):
        found = next((batch[key] for key in _KEYS if key in batch), None)
    if not isinstance(found, Tensor):
        form = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"batch ({form}) is neither images, nor a tuple that begins with them, nor a mapping with 'image' or 'x': "
            "pass images=, a tensor (N, C, H, W)"
        )
    return found
