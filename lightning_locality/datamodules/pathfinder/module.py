"""The Pathfinder data module, and the command that generates its pictures ahead of a run."""

from __future__ import annotations

__all__ = ["Pathfinder", "make_pathfinder"]

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning_locality.arguments import checked
from lightning_locality.datamodules.base import Split
from lightning_locality.datamodules.drawn_pictures import AbstractDrawnPictures, write_pictures
from lightning_locality.datamodules.pathfinder.parameters import PathfinderCurves
from lightning_locality.datamodules.pathfinder.store import PATHFINDER


class Pathfinder(AbstractDrawnPictures):
    r"""Pictures of dashed curves and two discs; label 1 if the discs are the two ends of one curve.

    The task of "Implicit Regularization in Hierarchical Tensor Factorization and Deep Convolutional Neural Networks"
    (Razin, Maman, Cohen, 2022), after "Learning long-range spatial dependencies with horizontal gated recurrent units"
    (Linsley, Kim, Veerabadran, Windolf, Serre, 2018), by the published process without the faults of its first program
    (see data/README.md). ``prepare_data`` generates what is missing under ``root``/pathfinder (0.2 to 0.4 ms per
    picture and core) and, with a warning, what is incomplete or altered. A picture depends on ``seed``, its split and
    its number alone. Images are ``(B, channels, size, size)`` in float32, normalised with the mean and standard
    deviation of the training split; labels are int64.

    With ``train=None`` every epoch has ``epoch_size`` new pictures, rendered ahead of the device by ``workers``
    processes and never stored: picture i of epoch e is number e ``epoch_size`` + i of the training pictures, whatever
    the batch size and the number of processes, also if training is resumed. They are normalised with the mean and
    standard deviation of the validation split, which is fixed like the test split.

    Args:
        path_length: Dashes per curve; published: 3, 5, 7 and 9. None: that of ``preset`` or ``curves``, by default 9.
        train: Number of training pictures; None: new ones in every epoch.
        validation: Number of validation pictures.
        test: Number of test pictures.
        seed: Seed of the pictures and of the order of training batches, 0 to 2^32 - 1.
        root: Folder of the data.
        batch_size: Samples per step and process.
        workers: Number of processes that generate pictures; None: one per usable core.
        preset: A published setting by its name instead of ``curves``: ``icml2022``, ``lra32``, ``lra64``, ``lra128``,
            ``lra256``, ``pathx`` or ``linsley300``; see data/README.md.
        curves: All other parameters of the pictures; None: as published.
        targets: Also what is where: a batch of a loader has :meth:`targets` as its third entry. Its ``segmentation`` is
            1 on the curve that starts at the first disc, 2 on the other target curve, 3 on distractors, in pixels at
            least half as bright as their dash. Its ``markers`` are the start of curve 1, and the end of curve 1 for
            label 1, of curve 2 for label 0.
        validation_is_test: Validate on the test pictures (published; a score selected by validation is then worthless).
        drop_last: Leave out the last, smaller training batch of an epoch.
        epoch_size: Number of pictures per epoch if ``train`` is None.
        curriculum: With ``train=None``, values in epoch 0 of parameters of the curves, such as ``{"distractors": 0}``,
            which change in equal steps to their own values; validation and test pictures have those.
        curriculum_epochs: Number of epochs that this takes.
        channels: 1, or 3 equal ones for networks that expect colours.
        mean: Mean intensity (0 to 1) of each channel, subtracted; None: of the pictures. ``imagenet``: mean and
            deviation that most pretrained networks expect, of three channels.
        std: Standard deviation of each channel, divided by; likewise.

    Raises:
        ValueError: A number is out of range, curves do not fit in the picture, or there are both preset and curves.

    >>> Pathfinder(path_length=9, train=10_000, seed=0).image_shape
    (1, 150, 150)
    """

    class_names = ("not connected", "connected")
    process, parameters_option, own_options = PATHFINDER, "curves", ("path_length",)

    def __init__(
        self,
        path_length: int | None = None,
        train: int | None = 10_000,
        validation: int = 2_000,
        test: int = 10_000,
        seed: int = 0,
        root: str | Path = "data",
        batch_size: int = 64,
        workers: int | None = None,
        preset: str | None = None,
        curves: PathfinderCurves | None = None,
        targets: bool = False,
        validation_is_test: bool = False,
        drop_last: bool = False,
        epoch_size: int = 10_000,
        curriculum: dict[str, float] | None = None,
        curriculum_epochs: int = 10,
        channels: Literal[1, 3] = 1,
        mean: Sequence[float] | Literal["imagenet"] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if preset is not None and curves is not None:
            raise ValueError(
                f"give preset or curves, not both: got preset={preset!r}; or curves=PathfinderCurves.preset(...)"
            )
        if curves is None:
            curves = PathfinderCurves.preset(preset or "icml2022", path_length)
        elif path_length is not None:
            curves = dataclasses.replace(curves, path_length=path_length)
        super().__init__(
            curves,
            train=train,
            validation=validation,
            test=test,
            seed=seed,
            root=root,
            batch_size=batch_size,
            workers=workers,
            targets=targets,
            validation_is_test=validation_is_test,
            drop_last=drop_last,
            epoch_size=epoch_size,
            curriculum=curriculum,
            curriculum_epochs=curriculum_epochs,
            channels=channels,
            mean=mean,
            std=std,
        )


@checked
def make_pathfinder(
    format: Literal["npy", "png", "npz", "webdataset", "parquet"] = "npy", out: str | None = None, **options: Any
) -> dict[Split, Path]:
    """Generate the Pathfinder pictures of all splits ahead of a run; print and return the folder of each.

    Args:
        format: ``npy``: the arrays under ROOT/pathfinder that ``fit`` reads. Otherwise these are also written to OUT
            for other programs, as ``png`` files in class folders, one ``npz`` file, ``webdataset`` shards or
            ``parquet`` (``datasets.load_dataset(OUT)``); see data/README.md.
        out: Folder to write, or .npz file, for all formats but ``npy``; it may not exist.
        options: ``path_length``, numbers, ``seed``, ``root``, ``workers``, ``preset``, ``curves`` and ``targets`` of
            :class:`Pathfinder`.
    """
    # what is fixed here is no option of the command
    module = Pathfinder(
        **options,
        batch_size=64,
        validation_is_test=False,
        drop_last=False,
        epoch_size=10_000,
        curriculum=None,
        curriculum_epochs=10,
        channels=1,
        mean=None,
        std=None,
    )
    return write_pictures(module, format, out)
