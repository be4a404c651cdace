"""Measurements of a factorisation during training, one row at a time."""

from __future__ import annotations

__all__: list[str] = []

import math
from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from lightning_locality.ranks import dense_spectra, effective_rank
from lightning_locality.tasks.recovery_loss import LARGEST_DENSE, Loss, TrainingSet
from lightning_locality.tensors.factorization import Factorization, RecoveryBatch


@final
class Measurements:
    r"""Rows of numbers about a factorisation and its problem, always with the same names.

    ``train/loss``, ``test/loss``, ``reconstruction_error`` :math:`\lVert W - W^* \rVert_F / \lVert W^* \rVert_F`,
    ``norm``, the scalars of the factorisation, its largest magnitudes as ``component/1``, ``component/2``, ..., the
    effective rank of its matricisations as ``effective rank/0-1`` and single entries as ``entry/0-0``. Quantities that
    need the whole tensor are left out if that has more than four million entries.

    ``chunk`` is the number of observations predicted at once without the whole tensor, None for all; for the other
    arguments see :class:`~lightning_locality.tasks.recovery.Recovery`.
    """

    def __init__(
        self,
        model: Factorization,
        batch: RecoveryBatch,
        train: TrainingSet,
        loss: Loss,
        test_clamp: float | None,
        chunk: int | None,
        top: int,
        groups: int,
        effective_ranks: bool,
        cuts: Sequence[Sequence[int]],
        watch: Sequence[Sequence[int]],
    ) -> None:
        self.model, self.train, self.loss = model, train, loss
        self.test = None if batch.test is None else TrainingSet(model, batch.test)
        self.test_clamp, self.chunk, self.top, self.groups = test_clamp, chunk, top, groups
        self.dense = math.prod(model.shape) <= LARGEST_DENSE
        self.target: Tensor | None = None
        if batch.target is not None:
            if batch.target.shape != model.shape:
                raise ValueError(
                    f"the target has shape {tuple(batch.target.shape)}, but the model has shape {model.shape}: give "
                    "both the same"
                )
            if self.dense:
                self.target = batch.target.to(next(model.parameters()).device, torch.float64)
                self.target_norm = float(self.target.norm())
        self.cuts = self._all_cuts(effective_ranks, cuts) if self.dense else []
        for entry in watch:
            if len(entry) != model.order or any(not 0 <= i < n for i, n in zip(entry, model.shape, strict=True)):
                raise ValueError(f"watch: a tensor of {model.shape} has no entry {list(entry)}")
        self._watched = torch.tensor(watch, dtype=torch.int64).to(train.values.device) if watch else None

    def _all_cuts(self, own: bool, more: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        order = self.model.order
        cuts = list(self.model.cuts()) if own else []
        for cut in more:
            modes = tuple(sorted(set(cut)))
            if not modes or len(modes) == order or len(modes) < len(cut) or not 0 <= modes[0] <= modes[-1] < order:
                raise ValueError(f"cuts asks for the modes {list(cut)}: name some, not all, of 0 to {order - 1} once")
            if modes not in cuts:
                cuts.append(modes)
        return cuts

    @torch.no_grad()
    def row(self) -> dict[str, float]:
        """Measure once."""
        needed = self.train.flat is not None or self.target is not None or bool(self.cuts)
        tensor = self.model.to_tensor() if self.dense and needed else None
        row = {"train/loss": float(self.loss.total(self.train.residual(tensor, self.chunk)))}
        if self.test is not None:
            row["test/loss"] = float(self.loss.total(self.test.residual(tensor, self.chunk), self.test_clamp))
        if tensor is not None and self.target is not None:
            distance = float((tensor.double() - self.target).norm())
            exact = 0.0 if distance == 0 else math.inf
            row["reconstruction_error"] = distance / self.target_norm if self.target_norm else exact
        row["norm"] = float(self.model.norm())
        row |= {name: float(value) for name, value in self.model.scalars().items()}
        magnitudes = dict(list(self.model.magnitudes().items())[-self.groups :])
        for name, values in magnitudes.items():
            row |= {f"{name}/{k}": value for k, value in enumerate(values[: self.top].tolist(), start=1)}
        if tensor is not None and self.cuts:
            spectra = self._spectra(tensor, magnitudes)
            row |= {f"effective rank/{_joined(cut)}": float(effective_rank(values)) for cut, values in spectra.items()}
        if self._watched is not None:
            watched = zip(self._watched.tolist(), self.model.entries(self._watched).tolist(), strict=True)
            row |= {f"entry/{_joined(entry)}": value for entry, value in watched}
        return row

    def _spectra(self, tensor: Tensor, magnitudes: dict[str, Tensor]) -> Mapping[tuple[int, ...], Tensor]:
        if not bool(torch.isfinite(tensor).all()):
            return dict.fromkeys(self.cuts, torch.full((1,), math.nan))
        # a matrix factorisation has its singular values among the magnitudes
        values = magnitudes.get("singular value")
        return dense_spectra(tensor, self.cuts) if values is None else dict.fromkeys(self.cuts, values)


def _joined(modes: Sequence[int]) -> str:
    return "-".join(map(str, modes))
