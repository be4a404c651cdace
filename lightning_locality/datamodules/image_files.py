"""Pictures in class folders and arrays in .npz files, read and written as uint8.

Every exception of a reader is caught: Pillow, NumPy and zlib raise almost anything at a damaged file.
"""

from __future__ import annotations

__all__ = ["CorruptImagesError", "ImagesNotFoundError"]

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

# names of the splits, in any case
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
_SYSTEM = frozenset(
    {"__macosx", "__pycache__", "@eadir", "@recycle", "#recycle", "$recycle.bin", "lost+found"}
    | {"system volume information", "thumbs.db", "desktop.ini"}
)
# registered, but opened only with other programs, or not at all
_UNREADABLE = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
# formats whose 16 bits are a grey value from 0 to 65535
_SIXTEEN = frozenset({"JPEG2000", "PNG", "PPM", "TIFF"})
Array: TypeAlias = np.ndarray[Any, Any]
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")

# a message about the same folder is of interest once, not for each part and module
_say = cache(rank_zero_info)


class ImagesNotFoundError(FileNotFoundError):
    """The image set is missing and may not, or cannot, be downloaded."""


class CorruptImagesError(ValueError):
    """A file of an image set is damaged, altered, missing or cannot be read unambiguously."""


def in_order(names: Iterable[str]) -> list[str]:
    """Names of classes in the order of their labels: as numbers if all are numbers, else as text."""
    names = list(names)
    numeric = all(map(_NUMBER.fullmatch, names))
    return sorted(names, key=lambda name: (Decimal(name) if numeric else Decimal(0), name))


def split_of(name: str) -> str | None:
    """The split that a folder or array is usually named after: Train, training_set, val, TESTING, ..."""
    stem = re.sub(r"[ _-]?(set|data|images)$", "", name.lower())
    return next((split for split, words in _SPLITS.items() if stem in words), None)


def _splits(where: Path, names: Iterable[str]) -> dict[str, str]:
    """Names of the splits that there are; without test images, those for validation take their place."""
    found: dict[str, str] = {}
    for name in names:
        if split := split_of(name):
            if split in found:
                raise CorruptImagesError(
                    f"{where}: {found[split]} and {name} are both names of {split} images: rename or move one"
                )
            found[split] = name
    if "test" not in found and "validation" in found:
        found["test"] = found.pop("validation")
        _say(f"{where} has no test images: {found['test']} is used for testing")
    return found


def folder_splits(root: Path) -> dict[str, Path]:
    """The folders of the splits of a set of class folders; none if the classes are in ``root`` itself."""
    if not root.is_dir():
        hint = f": for a file of arrays write file:{root}" if root.is_file() else ""
        raise ImagesNotFoundError(f"no folder {root}{hint or ': source folder needs class folders in it'}")
    folders = _folders(root)
    if {"imgs", "metadata"} <= {folder.name for folder in folders}:
        raise CorruptImagesError(f"{root} holds imgs and metadata, not class folders: use lra:{root}")
    named = [folder for folder in folders if split_of(folder.name)]
    # "valid" and "invalid", or "train" and "bus", are classes if they hold pictures and nothing else
    if not named or not (len(named) == len(folders) or any(map(_folders, named))):
        return {}
    splits = {split: root / name for split, name in _splits(root, [folder.name for folder in named]).items()}
    if "train" not in splits:
        raise ImagesNotFoundError(
            f"{root} holds {', '.join(folder.name for folder in named)} but no folder of training images: add train"
        )
    return splits


def list_pictures(root: Path, part: str) -> list[tuple[Path, int]]:
    """Pictures of a part and their labels; of all parts if ``root`` is not divided. Says what is left out."""
    splits = folder_splits(root)
    first, top = splits.get("train", root), splits.get(part) if splits else root
    if top is None:
        raise ImagesNotFoundError(
            f"no folder {root / part}: {root} holds {', '.join(path.name for path in splits.values())} alone; add it, "
            f"or use folder:{first}, a fifth of which is then held out for testing"
        )
    left: Counter[str] = Counter()
    # the training part names the classes, so that all parts have the same labels
    found = _classes(top, left)
    names = in_order(found if top == first else _classes(first, Counter()))
    if unknown := sorted(set(found) - set(names)):
        raise CorruptImagesError(f"{top} has classes that {first} lacks: {unknown}")
    if part == "train":
        left.update(f"{path.name}/" for path in _folders(root) if splits and path not in splits.values())
    left = +left  # those that occur
    if left:
        shown = [f"{what} ({count})" for what, count in sorted(left.items())]
        more = f" and {len(shown) - 12} more" if len(shown) > 12 else ""
        _say(f"{top}: left out {', '.join(shown[:12])}{more}")
    if len(names) == 1 and _folders(first / names[0]):
        _say(f"{first} has a single class: if the class folders are in {names[0]}, use folder:{first / names[0]}")
    if not found:
        raise ImagesNotFoundError(f"no images in class folders of {top}: put them in one folder for each class")
    return [(path, label) for label, name in enumerate(names) for path in found.get(name, [])]


def _entries(folder: Path, left: Counter[str]) -> Iterator[tuple[Path, bool]]:
    """Entries of a folder by name, each with whether it is a folder; hidden and system ones are left out."""
    with os.scandir(folder) as entries:
        found = sorted((entry.name, entry.is_dir()) for entry in entries)
    for name, is_folder in found:
        if name.startswith(".") or name.lower() in _SYSTEM:
            left[f"{name}/"] += is_folder
        else:
            yield folder / name, is_folder


def _folders(folder: Path) -> list[Path]:
    return [path for path, is_folder in _entries(folder, Counter()) if is_folder]


def _classes(top: Path, left: Counter[str]) -> dict[str, list[Path]]:
    """Pictures of the class folders in ``top``; what is left out is counted in ``left``."""
    classes = {}
    for path, is_folder in _entries(top, left):
        if not is_folder:
            left["pictures outside the class folders"] += path.suffix.lower() in _suffixes()
        elif pictures := list(_walk(path, left)):
            classes[path.name] = pictures
        else:
            left[f"{path.name}/ without a picture"] += 1
    return classes


def _walk(folder: Path, left: Counter[str]) -> Iterator[Path]:
    entries = list(_entries(folder, left))
    within = [path.name for path, is_folder in entries if is_folder]
    if "train" in map(split_of, within) and all(map(split_of, within)):
        raise CorruptImagesError(
            f"{folder} holds {', '.join(within)}: put the class folders into these and not these into the class "
            f"folders, or use folder:{folder} if that is no class"
        )
    for path, is_folder in entries:
        if is_folder:
            yield from _walk(path, left)
        elif path.suffix.lower() in _suffixes():
            yield path
        else:
            left[f"*{path.suffix.lower()}"] += 1


def every_picture(root: Path) -> list[Path]:
    """Test pictures of a folder, or all if it is not divided; there need be no class folders."""
    splits = folder_splits(root)
    top = splits.get("test", splits.get("train", root))
    if found := list(_walk(top, Counter())):
        return found
    raise ImagesNotFoundError(f"no images in {top}")


@cache
def _suffixes() -> frozenset[str]:
    """Suffixes of the pictures that Pillow, with the plugins that are registered, can read."""
    formats = Image.registered_extensions()
    return frozenset(suffix for suffix, name in formats.items() if name in Image.OPEN and name not in _UNREADABLE)


def read_picture(path: Path) -> Tensor:
    """Read a picture as uint8 ``(1, 3, H, W)``; data/README.md says how each kind is read or that it is refused."""
    try:
        with Image.open(path) as picture:
            ImageOps.exif_transpose(picture, in_place=True)
            pixels = np.array(_eight_bits(picture).convert("RGB"))
    except Image.DecompressionBombError as error:
        raise CorruptImagesError(
            f"{path} is too large ({error}): shrink it or, if you trust it, raise PIL.Image.MAX_IMAGE_PIXELS in Python"
        ) from error
    except Exception as error:
        raise CorruptImagesError(
            f"{path} cannot be read as an image ({error}): repair it, save it with 8 bits a channel or delete it"
        ) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def _eight_bits(picture: Image.Image) -> Image.Image:
    """The picture with 8 bits a channel and without transparency; ValueError if its range of values is unknown."""
    mode, kind, tags = picture.mode, picture.format, getattr(picture, "tag_v2", {})
    clear = picture.info.get("transparency")
    # of TIFF: bits a value, other than unsigned integers, white as 0
    bits, special, inverted = tags.get(258, (16,))[0], tags.get(339, (1,))[0] != 1, tags.get(262) == 0
    if deep := mode.startswith(("I", "F")) or special:
        # Pillow opens PGM of more than 8 bits, and before version 11 PNG, as mode I
        known = kind in _SIXTEEN and (mode.startswith("I;16") or (mode == "I" and kind in ("PNG", "PPM")))
        if not known or special or inverted:
            raise ValueError(f"{kind} of mode {mode}, whose values have no known range from black to white")
    if (deep and clear is not None) or (isinstance(clear, tuple) and max(clear) > 255):
        raise ValueError("16 bits with a transparent colour")
    if deep:
        # the upper 8 bits, which Pillow also takes of colours
        return Image.fromarray((np.asarray(picture).astype(np.int32) >> (bits - 8)).astype(np.uint8))
    if clear is None and not mode.endswith(("A", "a")):
        return picture
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture.convert("RGBA"))
    return white


def array_splits(path: Path) -> dict[str, str]:
    """Beginnings of the names of the arrays of each split: ``train`` of ``train_images`` and ``train_labels``."""
    if not path.is_file():
        hint = f": for class folders write folder:{path}" if path.is_dir() else ""
        raise ImagesNotFoundError(f"no file {path}{hint or ': source file needs an .npz file of images and labels'}")
    try:
        with np.load(path) as arrays:
            names = [name.removesuffix("_images") for name in arrays.files if name.endswith("_images")]
    except Exception as error:
        raise CorruptImagesError(f"{path} cannot be read as an .npz file of arrays ({error})") from error
    return _splits(path, names)


def read_arrays(path: Path, part: str) -> tuple[Tensor, Tensor]:
    """Read the images of a part of an .npz file as uint8 ``(N, 1 or 3, H, W)``, and their labels."""
    splits = array_splits(path)
    prefix, first = splits.get(part, part), splits.get("train", "train")
    try:
        with np.load(path) as arrays:
            if missing := {f"{prefix}_images", f"{prefix}_labels"} - set(arrays.files):
                raise ValueError(f"no {' and no '.join(sorted(missing))} among {', '.join(arrays.files)}")
            images, labels = arrays[f"{prefix}_images"], arrays[f"{prefix}_labels"]
            known = arrays.get(f"{first}_labels", labels)
    except Exception as error:
        raise CorruptImagesError(
            f"{path} cannot be read ({error}): it needs the arrays {prefix}_images and {prefix}_labels, of numbers "
            "or text and not of objects"
        ) from error
    shape = images.shape
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and shape[1] not in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise CorruptImagesError(
            f"{path}: {prefix}_images must be uint8 (N, H, W), (N, H, W, 1 or 3) or (N, 1 or 3, H, W), "
            f"got {images.dtype} {shape}"
        )
    try:
        return torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(_numbers(labels, known))
    except ValueError as error:
        raise CorruptImagesError(f"{path}: {prefix}_labels must be {error}") from error


def _numbers(labels: Array, known: Array) -> Array:
    """Labels ``(N,)`` or ``(N, 1)`` as int64: texts as places among the classes of the training labels ``known``."""
    if labels.ndim != 1 and labels.shape[1:] != (1,):
        raise ValueError(f"(N,) or (N, 1), one label an image, got {labels.shape}; if they are one-hot, use argmax(1)")
    labels = labels.reshape(-1)
    if "U" in (labels := _text(labels)).dtype.kind + (known := _text(known)).dtype.kind:
        names = in_order(set(known.reshape(-1).tolist()) if known.dtype.kind == "U" else ())
        if unknown := set(labels.tolist()) - set(names):
            raise ValueError(f"classes of the training images, {names}, got {sorted(unknown)}")
        places = {name: place for place, name in enumerate(names)}
        return np.array([places[name] for name in labels.tolist()], dtype=np.int64)
    if labels.dtype.kind not in "biuf":
        raise ValueError(f"whole numbers or text, got {labels.dtype}")
    values = labels.astype(np.float64)
    # written so that NaN is rejected
    wrong = ~(np.abs(values) < 2**63) | (values != np.floor(values))
    if wrong.any():
        raise ValueError(f"whole numbers or text, got {labels[wrong][0]}")
    return labels.astype(np.int64)


def _text(labels: Array) -> Array:
    return np.char.decode(labels, "utf-8") if labels.dtype.kind == "S" else labels


@contextmanager
def new_output(out: Path) -> Iterator[Path]:
    """Yield a temporary name for a file or folder, which is renamed to ``out`` at the end and removed if that fails."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} exists: delete it or choose another name")
    part = out.with_name(f".part-{out.name}")
    _remove(part)  # left by a process that was killed, or planted there
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        part.replace(out)
    finally:
        _remove(part)


def _remove(path: Path) -> None:
    """Remove a folder, or a file or link; what a link points to stays."""
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def write_images(out: Path, splits: Mapping[str, Iterable[tuple[Tensor, Tensor]]], names: Sequence[str]) -> None:
    """Write uint8 images ``(B, 1 or 3, H, W)`` and labels ``(B,)`` as PNG in class folders, or as arrays in an .npz."""
    with new_output(out) as part:
        if out.suffix == ".npz":
            arrays: dict[str, Array] = {}
            for split, batches in splits.items():
                both = zip(("images", "labels"), zip(*batches, strict=True), strict=True)
                arrays |= {f"{_SPLITS[split][0]}_{name}": torch.cat(parts).numpy() for name, parts in both}
            with part.open("xb") as file:
                np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
            return
        part.mkdir()
        digits = len(str(len(names) - 1))
        # in the order of the labels, and told by their names
        classes = [re.sub(r"\W+", "_", f"{label:0{digits}} {name}") for label, name in enumerate(names)]
        for split, batches in splits.items():
            for name in classes:
                (part / split / name).mkdir(parents=True)
            samples = (sample for batch in batches for sample in zip(*batch, strict=True))
            for number, (image, label) in enumerate(samples):
                to_pil_image(image).save(part / split / classes[int(label)] / f"{number:06}.png")
        # an empty folder would name no class to who reads them
        if empty := [name for name in classes if not any((part / "train" / name).iterdir())]:
            raise ValueError(f"{out} would have no training image of {', '.join(empty)}: raise train, or write .npz")
