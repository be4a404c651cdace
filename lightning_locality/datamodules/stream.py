"""The endless training stream: new samples in every epoch, sampled ahead of the device, and their curriculum."""

from __future__ import annotations

__all__ = ["StreamBatch", "StreamLoader", "StreamSamples"]

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, final

from torch import Tensor

Values = tuple[Tensor, ...]

MAX_EPOCHS = 100_000  # of a curriculum: the settings of each are checked


class StreamSamples(NamedTuple):
    """Samples of one epoch as they are sent to the device, where ``compose_stream`` makes images and labels of them."""

    epoch: int
    values: Values


class StreamBatch(NamedTuple):
    """The samples of a batch, yielded by a loader in place of the indices of a fixed split."""

    split: Literal["train"]
    samples: StreamSamples


@final
class StreamLoader:
    """Batches of an endless stream: every epoch has new samples, determined by seed, epoch and index alone.

    ``ahead`` batches are being sampled while one is used, those of the next epoch included. Without a Trainer, call
    ``loader.sampler.set_epoch(epoch)`` before each epoch.

    Args:
        batches: Indices in the epoch of each batch of this process, the same in every epoch.
        begin: Begins to sample the given indices of an epoch and returns a function that waits for the values.
        ahead: Number of batches.
        fixed: Repeat the samples of the first epoch, as ``overfit_batches`` promises.

    >>> import torch
    >>> loader = StreamLoader([torch.arange(2)], lambda epoch, index: lambda: (10 * epoch + index,), ahead=1)
    >>> loader.sampler.set_epoch(3)
    >>> [(split, samples.epoch, samples.values[0].tolist()) for split, samples in loader]
    [('train', 3, [30, 31])]
    """

    sampler: StreamLoader

    def __init__(
        self,
        batches: Sequence[Tensor],
        begin: Callable[[int, Tensor], Callable[[], Values]],
        ahead: int,
        *,
        fixed: bool = False,
    ) -> None:
        self.batches, self.begin, self.ahead, self.epoch = batches, begin, ahead, 0
        if not fixed:
            self.sampler = self  # where Lightning looks for set_epoch
        self._begun: deque[Callable[[], Values]] = deque()
        self._next = 0  # number of the batch at the head of _begun, counted from the first epoch

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose samples come next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[StreamBatch]:
        steps, epoch = len(self.batches), self.epoch
        for number in range(epoch * steps, (epoch + 1) * steps):
            if number != self._next:
                # another epoch, or an epoch left early
                self._begun.clear()
            while len(self._begun) <= self.ahead:
                later, step = divmod(number + len(self._begun), steps)
                self._begun.append(self.begin(later, self.batches[step]))
            self._next = number + 1
            yield StreamBatch("train", StreamSamples(epoch, self._begun.popleft()()))


@final
class Curriculum:
    r"""Settings that change in equal steps over the first epochs of a stream, and then keep their own values.

    A setting is ``start`` in epoch 0 and ``goal`` from epoch ``epochs`` = n on; before, in epoch e, it is
    start + (goal - start) e / n, rounded if the goal is a whole number.

    Args:
        start: Values in epoch 0 by the names of the settings.
        epochs: Number of epochs that differ from the goal.
        goals: The module's own values of the settings that may change.

    Raises:
        ValueError: A setting that cannot change, a value that is no finite number, or no epoch.

    >>> curriculum = Curriculum({"distance": 10}, 4, {"distance": 20, "distractors": 1})
    >>> [curriculum.at(epoch)["distance"] for epoch in range(6)]
    [10, 12, 15, 18, 20, 20]
    """

    def __init__(self, start: Mapping[str, float], epochs: int, goals: Mapping[str, Any]) -> None:
        if not 1 <= epochs <= MAX_EPOCHS:
            raise ValueError(f"curriculum_epochs must be at least 1 and at most {MAX_EPOCHS:,}, got {epochs}")
        numbers = {name: goal for name, goal in goals.items() if type(goal) in (int, float)}
        for name in start:
            if name not in numbers:
                raise ValueError(f"curriculum cannot change {name!r}, only {', '.join(numbers)}")
        self.start, self.epochs, self.goals = dict(start), epochs, {name: numbers[name] for name in start}

    def at(self, epoch: int) -> dict[str, Any]:
        """Values in an epoch of the settings that change."""
        share = min(epoch / self.epochs, 1.0)
        values = {name: (1 - share) * first + share * self.goals[name] for name, first in self.start.items()}
        return {name: round(value) if isinstance(self.goals[name], int) else value for name, value in values.items()}

    def check(self, build: Callable[[int], object]) -> None:
        """Build the settings of every epoch that differs; ValueError if one is refused."""
        for epoch in range(self.epochs if self.start else 0):
            try:
                build(epoch)
            except ValueError as error:
                raise ValueError(f"curriculum: in epoch {epoch}, with {self.at(epoch)}, {error}") from error
