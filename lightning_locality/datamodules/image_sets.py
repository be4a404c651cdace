"""Image sets as one uint8 tensor and its labels: torchvision's, scikit-learn's digits, folders of classes."""

from __future__ import annotations

__all__ = ["CorruptImagesError", "ImagesNotFoundError", "LabelledImages", "UnknownSourceError", "load_images"]

import difflib
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torchvision import datasets

from lightning_locality.arguments import checked
from lightning_locality.datamodules.base import seeded_generator
from lightning_locality.datamodules.image_files import (
    CorruptImagesError,
    ImagesNotFoundError,
    array_splits,
    every_picture,
    folder_splits,
    list_pictures,
    read_arrays,
    read_picture,
)
from lightning_locality.datamodules.picture_tree import list_tree

Resize = Literal["bilinear", "area", "pad"]
SourceName = Literal["cifar10", "cifar100", "mnist", "fashion_mnist", "svhn", "digits", "folder", "file", "lra"]
Part = Literal["train", "validation", "test"]

# mean and standard deviation that torchvision's and most of timm's pretrained networks expect
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# of torchvision; the path under root is one whose absence tells a missing set from a damaged one
_TORCHVISION: dict[str, tuple[Any, str]] = {
    "cifar10": (datasets.CIFAR10, "cifar-10-batches-py"),
    "cifar100": (datasets.CIFAR100, "cifar-100-python"),
    "mnist": (datasets.MNIST, "MNIST/raw"),
    "fashion_mnist": (datasets.FashionMNIST, "FashionMNIST/raw"),
    "svhn": (datasets.SVHN, "{part}_32x32.mat"),
}


class LabelledImages(NamedTuple):
    """Images ``(N, C, H, W)``, uint8, and labels ``(N,)``, int64."""

    images: Tensor
    labels: Tensor


def resize_images(images: Tensor, size: int, how: Resize = "bilinear") -> Tensor:
    """Resize uint8 images ``(N, C, H, W)`` to squares; the aspect ratio is kept by ``"pad"`` alone."""
    if size < 1:
        raise ValueError(f"image_size must be at least 1, got {size}")
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    if how == "pad":
        if max(height, width) > size:
            raise ValueError(
                f"image_size={size} is smaller than the images ({height}x{width}), which resize='pad' cannot "
                f"shrink: use resize='area' or 'bilinear', or image_size={max(height, width)}"
            )
        top, left = (size - height) // 2, (size - width) // 2
        return functional.pad(images, (left, size - width - left, top, size - height - top))
    resized = images.new_empty((*images.shape[:2], size, size))
    shrunk = how == "bilinear" and min(height, width) > size
    # chunks bound the memory of the float copies
    for start in range(0, len(images), 4096):
        chunk = images[start : start + 4096].to(torch.float32)
        chunk = functional.interpolate(chunk, size=(size, size), mode=how, antialias=shrunk)
        resized[start : start + 4096] = chunk.round_().clamp_(0, 255).to(torch.uint8)
    return resized


def convert_channels(images: Tensor, channels: Literal[1, 3]) -> Tensor:
    """Convert uint8 images ``(N, 1 or 3, H, W)`` to grey, by the rounded luma, or to colour, by repetition."""
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.repeat(1, 3, 1, 1)
    # ITU-R BT.601 in integers, one channel at a time: exact, and no float copy of the set
    red, green, blue = (images[:, c].to(torch.int32) for c in range(3))
    return ((299 * red + 587 * green + 114 * blue + 500) // 1000).to(torch.uint8)[:, None]


def stratified_split(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split images by their labels ``(N,)`` into those kept and the same share of every class held out, ascending."""
    kept, held = [], []
    for label in torch.unique(labels).tolist():
        members = (labels == label).nonzero().squeeze(1)
        if len(members) < 2:
            raise ValueError(f"class {label} has a single image, which cannot be split: exclude the class")
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        order = torch.randperm(len(members), generator=seeded_generator(seed, "stratified split", label))
        held.append(members[order[:count]])
        kept.append(members[order[count:]])
    return torch.cat(kept).sort().values, torch.cat(held).sort().values


def pixel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Exact mean and standard deviation of the intensities (0 to 1) of each channel of ``(N, C, H, W)``, in float64."""
    # from 256 counts rather than a float copy of the set
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in images.unbind(1):
        share = channel.reshape(-1).bincount(minlength=256).to(torch.float64) / channel.numel()
        means.append((share * values).sum())
        deviations.append((share * (values - means[-1]) ** 2).sum().sqrt())
    if min(deviations) == 0:
        raise ValueError("a channel of the images is constant, its standard deviation is 0: give mean and std")
    return torch.stack(means), torch.stack(deviations)


def given_statistics(
    mean: Sequence[float] | Literal["imagenet"] | None, std: Sequence[float] | None, channels: int
) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation that were given for each channel, float64; None if neither was."""
    if isinstance(mean, str):
        if mean != "imagenet" or std is not None or channels != 3:
            raise ValueError(
                f"mean must be numbers, or 'imagenet' with channels=3 and without std; "
                f"got mean={mean!r}, std={std}, channels={channels}"
            )
        mean, std = IMAGENET
    if (mean is None) != (std is None):
        raise ValueError(f"give both mean and std or neither, got mean={mean}, std={std}")
    if mean is None or std is None:
        return None
    for argument, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise ValueError(f"{argument} must have {channels} values, got {list(values)}")
    if min(std) <= 0:
        raise ValueError(f"std must be positive, got {list(std)}")
    return torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)


class UnknownSourceError(ValueError):
    """Unknown name of an image source."""


def parse_source(source: str, root: str | Path = "data") -> tuple[SourceName, Path]:
    """Split a source into its name and its location; ``"folder:PATH"``, ``"file:PATH"``, ``"lra:PATH"`` give both."""
    names = get_args(SourceName)
    kind, _, path = (source := str(source)).partition(":")
    if path and kind in ("folder", "file", "lra"):
        source, root = kind, path
    elif source not in names:
        near = difflib.get_close_matches(source.lower(), names, n=1)
        if {"/", "\\"} & set(source) or Path(source).suffix or (not near and Path(source).exists()):
            near = [f"{'file' if Path(source).suffix == '.npz' else 'folder'}:{source}"]
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UnknownSourceError(
            f"unknown source {source!r}{hint}; known are {', '.join(names)}, folder:PATH, file:PATH and lra:PATH"
        )
    return cast(SourceName, source), Path(root).expanduser()


@checked
def load_images(
    source: str,
    part: Part,
    root: str | Path = "data",
    *,
    download: bool = False,
    image_size: int | None = None,
    resize: Resize = "bilinear",
    channels: Literal[1, 3] | None = None,
) -> LabelledImages:
    r"""Load the official train or test images of a source as one tensor.

    Args:
        source: ``cifar10``, ``cifar100``, ``mnist``, ``fashion_mnist``, ``svhn``, ``digits``, ``folder:PATH``,
            ``file:PATH`` or ``lra:PATH``; data/README.md describes them.
        part: ``"train"``, ``"test"`` or, if the source has one (:func:`has_validation`), ``"validation"``.
        root: Folder of the set, as for torchvision; of the classes for ``folder``; not used by ``digits``.
        download: Let torchvision download a missing set.
        image_size: Height and width in pixels to resize the images to; None leaves them.
        resize: ``bilinear`` (antialiased when the image shrinks), ``area`` (mean over the block of pixels that becomes
            one) or ``pad`` (centred on black).
        channels: 1 (luma 0.299 R + 0.587 G + 0.114 B) or 3; None leaves them (folders and files are read as
            3, lra as 1).

    Raises:
        UnknownSourceError: Unknown source.
        ImagesNotFoundError: The set is not under ``root`` and is not, or cannot be, downloaded.
        CorruptImagesError: A file is damaged or of a kind that data/README.md excludes.
        ModuleNotFoundError: ``digits`` without scikit-learn installed.
    """
    name, folder = parse_source(source, root)
    if part == "validation" and not has_validation(source, root):
        raise ImagesNotFoundError(f"{source} has no validation images of its own: take a share of its training images")
    match name:
        case "digits":
            found = _part_of(_digits(), part)
        case "folder":
            found = _folder(folder, part, image_size, resize)
        case "lra":
            found = _tree(folder, part, image_size, resize)
        case "file":
            found = LabelledImages(*read_arrays(folder, part))
            channels = channels or 3
        case _:
            found = _torchvision(name, folder, part, download)
    images, labels = found
    if len(images) != len(labels) or len(images) == 0:
        raise CorruptImagesError(f"{source} in {folder} holds {len(images)} images and {len(labels)} labels")
    if image_size is not None:
        images = resize_images(images, image_size, resize)
    if channels is not None:
        images = convert_channels(images, channels)
    return LabelledImages(images.contiguous(), labels)


def sample_source(
    source: str,
    count: int,
    generator: torch.Generator,
    root: str | Path = "data",
    image_size: int | None = None,
    channels: Literal[1, 3] | None = None,
) -> Tensor:
    """Sample distinct test images of a source, uint8 ``(N, C, H, W)``: ``count``, or all if there are fewer.

    The other arguments and the errors are those of :func:`load_images`. Of a folder, which need not hold class folders,
    only the sampled pictures are read.
    """
    name, folder = parse_source(source, root)
    whole = every_picture(folder) if name == "folder" else load_images(source, "test", root).images
    chosen = torch.randperm(len(whole), generator=generator)[:count].sort().values
    if isinstance(whole, Tensor):
        images = whole[chosen] if image_size is None else resize_images(whole[chosen], image_size)
    else:
        images = _read([whole[place] for place in chosen.tolist()], image_size, "bilinear")
    return images if channels is None else convert_channels(images, channels)


def has_validation(source: str, root: str | Path = "data") -> bool:
    """Whether a source has validation images of its own, apart from its training and test images."""
    name, path = parse_source(source, root)
    if name == "lra":
        return True
    splits = folder_splits(path) if name == "folder" else array_splits(path) if name == "file" else ()
    return "validation" in splits


def prepare_images(source: str, root: str | Path = "data") -> None:
    """Let torchvision download a set that is missing under ``root``; other sources need no preparation."""
    name, folder = parse_source(source, root)
    if name in _TORCHVISION:
        if name == "svhn":
            _torchvision(name, folder, "train", download=True)
        # the smaller part: either part of the other sets checks and fetches the files of both
        _torchvision(name, folder, "test", download=True)


def _part_of(whole: LabelledImages, part: Part) -> LabelledImages:
    kept, held = stratified_split(whole.labels, 0.2, seed=0)
    chosen = kept if part == "train" else held
    return LabelledImages(whole.images[chosen], whole.labels[chosen])


def _digits() -> LabelledImages:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "source 'digits' needs scikit-learn: pip install 'lightning-locality[digits]'", name="sklearn"
        ) from error
    bunch = load_digits()
    values = torch.from_numpy(bunch.images.astype(np.int64))[:, None]
    return LabelledImages(((255 * values + 8) // 16).to(torch.uint8), torch.from_numpy(bunch.target).long())


def _torchvision(name: SourceName, root: Path, part: Part, download: bool) -> LabelledImages:
    kind, path = _TORCHVISION[name]
    where = root / path.format(part=part)
    options = {"split": part} if name == "svhn" else {"train": part == "train"}
    try:
        with warnings.catch_warnings():
            # numpy 2.4 complains about the dtype pickled in the CIFAR files
            warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed")
            data = kind(root=str(root), download=download, **options)
    except (RuntimeError, OSError, ValueError, AssertionError, EOFError, pickle.UnpicklingError) as error:
        if not where.exists() or (where.is_dir() and not any(where.iterdir())):
            remedy = (
                f"it could not be downloaded ({error}). Check the connection and the free disk space, "
                "or point root at a folder"
                if download
                else "downloading is off. Pass download=True or point root at the folder"
            )
            raise ImagesNotFoundError(
                f"no {name} in root={str(root)!r} (looked for {where}), and {remedy} that holds {where.name}"
            ) from error
        raise CorruptImagesError(
            f"{where} is damaged or incomplete ({error}): delete it and download the set again (download=True)"
        ) from error
    images = torch.as_tensor(np.ascontiguousarray(data.data))
    if name in ("cifar10", "cifar100"):
        images = images.permute(0, 3, 1, 2)
    labels = torch.as_tensor(data.labels if name == "svhn" else data.targets, dtype=torch.int64)
    return LabelledImages(images if images.ndim == 4 else images[:, None], labels)


def _tree(root: Path, part: Part, size: int | None, resize: Resize) -> LabelledImages:
    rows = list_tree(root)
    labels = torch.tensor([label for _, label in rows])
    # 80, 10 and 10 % of each class
    kept, held = stratified_split(labels, 0.2, seed=0)
    validation, test = (held[half] for half in stratified_split(labels[held], 0.5, seed=0))
    chosen = {"train": kept, "validation": validation, "test": test}[part]
    return LabelledImages(_read([rows[place][0] for place in chosen.tolist()], size, resize, 1), labels[chosen])


def _folder(root: Path, part: Part, size: int | None, resize: Resize) -> LabelledImages:
    paths, labels = zip(*list_pictures(root, part), strict=True)
    whole = LabelledImages(_read(paths, size, resize), torch.tensor(labels))
    return whole if folder_splits(root) else _part_of(whole, part)


def _read(paths: Sequence[Path], size: int | None, resize: Resize, channels: Literal[1, 3] = 3) -> Tensor:
    images = []
    for path in paths:
        image = convert_channels(read_picture(path), channels)
        images.append(image if size is None else resize_images(image, size, resize))
        if images[-1].shape != images[0].shape:
            raise ValueError(f"{path} is {image.shape[-2]}x{image.shape[-1]}, unlike other images: give an image_size")
    return torch.cat(images)
