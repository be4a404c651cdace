"""The Cluttered ABC data module, and the command that generates its pictures ahead of a run."""

from __future__ import annotations

__all__ = ["ClutteredABC", "make_cluttered_abc"]

import dataclasses
from pathlib import Path
from typing import Any, Literal

from lightning_locality.arguments import checked
from lightning_locality.datamodules.base import Split
from lightning_locality.datamodules.cluttered_abc.parameters import ClutteredLetters
from lightning_locality.datamodules.cluttered_abc.placement import CLUTTERED_ABC
from lightning_locality.datamodules.drawn_pictures import AbstractDrawnPictures, write_pictures


class ClutteredABC(AbstractDrawnPictures):
    r"""Pictures of two letters in pieces and two ring-shaped markers; label 1 if both markers lie on one letter.

    The task cABC of "Disentangling neural mechanisms for perceptual grouping" (Kim, Linsley, Thakkar, Serre, 2020),
    with the parameters of its authors' program. **The letters look otherwise than the published ones**, whose two
    fonts cannot be shipped: they are of DejaVu Sans and DejaVu Sans Mono, which come with matplotlib, unless
    ``letters`` names other fonts. data/README.md says what else is not as published. Pictures are generated, stored,
    streamed and normalised as those of :class:`Pathfinder`, in ``root``/cluttered_abc (about 11 ms per picture and
    core).

    Args:
        preset: A published setting: ``easy`` (default), ``intermediate`` or ``hard``.
        size: Side of the pictures in pixels, 350 (published), 175, 70 or 50; None: that of the setting.
        letters: All parameters of the pictures instead of ``preset``, see :class:`ClutteredLetters`.
        options: Arguments of :class:`AbstractDrawnPictures`. In ``targets``, ``segmentation`` is 1 on the letter of
            the first marker, 2 on the other one, 3 where both are.

    Raises:
        ValueError: A number is out of range, letters do not fit in the picture, or there are both preset and letters.

    >>> ClutteredABC(preset="hard", size=175).image_shape
    (1, 175, 175)
    """

    class_names = ("different letters", "same letter")
    process, parameters_option = CLUTTERED_ABC, "letters"

    def __init__(
        self,
        preset: str | None = None,
        size: int | None = None,
        letters: ClutteredLetters | None = None,
        **options: Any,
    ) -> None:
        if preset is not None and letters is not None:
            raise ValueError(
                f"give preset or letters, not both: got preset={preset!r}; or letters=ClutteredLetters.preset(...)"
            )
        chosen = ClutteredLetters.preset(preset or "easy") if letters is None else letters
        super().__init__(chosen if size is None else dataclasses.replace(chosen, size=size), **options)


@checked
def make_cluttered_abc(
    format: Literal["npy", "png", "npz", "webdataset", "parquet"] = "npy", out: str | None = None, **options: Any
) -> dict[Split, Path]:
    """Generate the Cluttered ABC pictures of all splits ahead of a run; print and return the folder of each.

    Args:
        format: ``npy``: the arrays under ROOT/cluttered_abc that ``fit`` reads. Otherwise these are also written to OUT
            for other programs, as ``png`` files in class folders, one ``npz`` file, ``webdataset`` shards or
            ``parquet``; see data/README.md.
        out: Folder to write, or .npz file, for all formats but ``npy``; it may not exist.
        options: ``preset``, numbers, ``seed``, ``root``, ``workers``, ``size``, ``letters`` and ``targets`` of
            :class:`ClutteredABC`.
    """
    # what is fixed here is no option of the command
    module = ClutteredABC(
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
