"""Sets of uint8 images as tensors: their size, their channels, a stratified split."""

from __future__ import annotations

__all__ = ["LabelledImages", "Resize", "convert_channels", "pixel_statistics", "resize_images", "stratified_split"]

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional

from lightning_locality.datamodules.base import seeded_generator

Resize = Literal["bilinear", "area", "pad"]


class LabelledImages(NamedTuple):
    """Images ``(N, C, H, W)``, uint8, and labels ``(N,)``, int64."""

    images: Tensor
    labels: Tensor


def resize_images(images: Tensor, size: int, how: Resize = "bilinear") -> Tensor:
    """Images as squares of another size, rounded to uint8; other shapes are squeezed.

    Args:
        images: ``(N, C, H, W)``, uint8.
        size: New height and width in pixels.
        how: ``"bilinear"``: interpolated, with antialiasing where the image shrinks. ``"area"``: mean over
            the block of pixels that becomes one. ``"pad"``: the image is kept as it is in the middle, with
            black around it (28x28 to 32x32: 2 pixels on every side).

    Raises:
        ValueError: If ``how`` is not one of these, or ``size`` is below 1, or below the images' size for ``"pad"``.

    Example:
        >>> resize_images(torch.tensor([[[[10, 20], [30, 40]]]], dtype=torch.uint8), 1, "area").item()
        25
    """
    if size < 1:
        raise ValueError(f"image_size must be at least 1, got {size}")
    if how not in get_args(Resize):
        raise ValueError(f"resize must be one of {', '.join(get_args(Resize))}, got {how!r}")
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    if how == "pad":
        if max(height, width) > size:
            raise ValueError(
                f"image_size={size} is smaller than the images ({height}x{width}), which resize='pad' cannot "
                f"do: take resize='area' or 'bilinear', or image_size={max(height, width)}"
            )
        top, left = (size - height) // 2, (size - width) // 2
        return functional.pad(images, (left, size - width - left, top, size - height - top))
    resized = images.new_empty((*images.shape[:2], size, size))
    # chunks bound the memory of the float copies
    for start in range(0, len(images), 4096):
        chunk = images[start : start + 4096].to(torch.float32)
        if how == "area":
            chunk = functional.interpolate(chunk, size=(size, size), mode="area")
        else:
            chunk = functional.interpolate(
                chunk, size=(size, size), mode="bilinear", antialias=min(height, width) > size
            )
        resized[start : start + 4096] = chunk.round_().clamp_(0, 255).to(torch.uint8)
    return resized


def convert_channels(images: Tensor, channels: Literal[1, 3]) -> Tensor:
    """Images in grey or in colour.

    Args:
        images: ``(N, 1, H, W)`` or ``(N, 3, H, W)``, uint8.
        channels: 3 repeats the grey channel; 1 takes the luma 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601),
            rounded.

    Raises:
        ValueError: If ``channels`` is neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.repeat(1, 3, 1, 1)
    # whole numbers, a channel at a time: exact and without a float copy of the set
    red, green, blue = (images[:, c].to(torch.int32) for c in range(3))
    return ((299 * red + 587 * green + 114 * blue + 500) // 1000).to(torch.uint8)[:, None]


def stratified_split(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Seeded split that takes the same share of every class.

    Args:
        labels: ``(N,)``.
        share: Share of each class that is held out, rounded to whole images; at least one image.
        seed: Seed of the draw; classes are drawn independently of one another.

    Returns:
        Indices kept and indices held out, each ascending.

    Raises:
        ValueError: If ``share`` is not between 0 and 1 or a class has a single image.

    Example:
        >>> kept, held = stratified_split(torch.tensor([0] * 10 + [1] * 20), share=0.1, seed=0)
        >>> len(kept), len(held)
        (27, 3)
    """
    if not 0 < share < 1:
        raise ValueError(f"the share held out must be between 0 and 1, got {share}")
    kept, held = [], []
    for label in torch.unique(labels).tolist():
        members = (labels == label).nonzero().squeeze(1)
        if len(members) < 2:
            raise ValueError(f"class {label} has a single image, which cannot be split: leave the class out")
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        order = torch.randperm(len(members), generator=seeded_generator(seed, "stratified split", label))
        held.append(members[order[:count]])
        kept.append(members[order[count:]])
    return torch.cat(kept).sort().values, torch.cat(held).sort().values


def pixel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the intensities (0 to 1) by channel, exact, in float64.

    Args:
        images: ``(N, C, H, W)``, uint8.

    Raises:
        ValueError: If a channel is constant.
    """
    # from 256 counts instead of a float copy of the set
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in images.unbind(1):
        share = channel.reshape(-1).bincount(minlength=256).to(torch.float64) / channel.numel()
        means.append((share * values).sum())
        deviations.append((share * (values - means[-1]) ** 2).sum().sqrt())
    if min(deviations) == 0:
        raise ValueError("a channel of the images is constant, its standard deviation is 0: give mean and std")
    return torch.stack(means), torch.stack(deviations)
