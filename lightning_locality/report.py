"""What a finished run leaves in its folder: a summary and figures."""

from __future__ import annotations

__all__ = ["write_figures", "write_json", "write_predictions"]

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningDataModule, LightningModule
from torch import distributed

from lightning_locality.callbacks.history import written_whole
from lightning_locality.datamodules.base import AbstractImageDataModule
from lightning_locality.plotting.recovery import component_curves, magnitude_groups
from lightning_locality.plotting.style import save_figure
from lightning_locality.plotting.training import example_inputs, training_curves
from lightning_locality.regularizer.anti_locality import AntiLocality
from lightning_locality.results import history

_EXAMPLES = 4


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    with written_whole(path) as file:
        file.write(json.dumps(content, indent=2) + "\n")


def write_predictions(path: Path, batches: Sequence[Any]) -> None:
    """Write class probabilities, one row per sample in the order of the test images; all processes call it together.

    Args:
        path: CSV file to write.
        batches: Probabilities ``(B, K)`` of the batches of this process, which has every W-th sample of W processes.
    """
    parts = [[row for batch in batches for row in batch.tolist()]]
    if distributed.is_available() and distributed.is_initialized():
        mine, parts = parts[0], [[] for _ in range(distributed.get_world_size())]
        distributed.all_gather_object(parts, mine)
        if distributed.get_rank() != 0:
            return
    rows = sorted(
        (place * len(parts) + rank, *row) for rank, part in enumerate(parts) for place, row in enumerate(part)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        writer = csv.writer(file)
        writer.writerow(["index", *(f"probability_{k}" for k in range(len(rows[0]) - 1 if rows else 0))])
        writer.writerows(rows)


def write_figures(folder: Path, model: LightningModule, data: LightningDataModule | None) -> None:
    """Draw the curves and example inputs of a run into ``FOLDER/figures``.

    A recovery run leaves ``dynamics``, another one ``training``.

    Args:
        folder: Folder of the run, with its ``metrics.csv``.
        model: The task; the patches of its ``penalty`` are outlined on the examples.
        data: The data module; examples are drawn for the image data modules of this package.
    """
    metrics = folder / "metrics.csv"
    if metrics.exists():
        measurements = history(folder, "iteration")
        if magnitude_groups(measurements.columns):
            save_figure(component_curves({folder.name: measurements}), folder / "figures" / "dynamics")
        else:
            save_figure(training_curves(history(folder)), folder / "figures" / "training")
    if not isinstance(data, AbstractImageDataModule):
        return
    penalty = getattr(model, "penalty", None)
    images, labels = data.batch("validation", torch.arange(min(_EXAMPLES, data.size("validation"))))
    masks = None
    if isinstance(penalty, AntiLocality) and len(images) > 1:
        generator = torch.Generator().manual_seed(penalty.seed)
        pair = penalty.patches.draw(images, images.roll(-1, 0), generator)
        shape = (len(images), *images.shape[2:])
        i, j = (mask.squeeze(1).expand(shape).cpu().numpy() for mask in pair)
        masks = (i, j)
    names = getattr(data, "class_names", None)
    titles = [names[label] if names else f"label {label}" for label in labels.tolist()]
    figure = example_inputs(np.asarray(images.cpu()), titles, masks)
    save_figure(figure, folder / "figures" / "examples")
