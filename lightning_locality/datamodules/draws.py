"""Random numbers that belong to a picture, whatever else is drawn beside it."""

from __future__ import annotations

__all__ = ["Draws"]

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BLOCK = 256


class Draws:
    """A stream of random numbers for each of ``B`` pictures, from the counter-based generator Philox 4x64.

    "Parallel random numbers: as easy as 1, 2, 3" (Salmon, Moraes, Dror, Shaw, 2011). The key of a stream is
    (``seed``, ``stream`` 2^56 + picture number), so streams of different splits are disjoint; of each 64-bit word
    the upper half is used.

    Args:
        seed: 0 to 2^64 - 1.
        stream: Number of the split, 0 to 255.
        index: Picture numbers ``(B,)``, below 2^56.

    >>> one, both = Draws(3, 0, [7]), Draws(3, 0, [5, 7])
    >>> one.below(np.array([0]), 10**6) == both.below(np.array([1]), 10**6)
    array([ True])
    """

    def __init__(self, seed: int, stream: int, index: Sequence[int]) -> None:
        self.sources = [np.random.Philox(key=[seed, (stream << 56) | int(number)]) for number in index]
        self.words = self._block()
        self.used = np.zeros(len(self.sources), dtype=np.int64)

    def _block(self) -> NDArray[np.uint64]:
        words = np.empty((len(self.sources), BLOCK), dtype=np.uint64)
        for row, source in zip(words, self.sources, strict=True):
            row[:] = source.random_raw(BLOCK)
        return words >> np.uint64(32)

    def below(self, rows: NDArray[np.int64], bound: NDArray[np.int64] | int) -> NDArray[np.int64]:
        """The next number of each of ``rows``, uniform in 0..bound-1 (bound at most 2^32)."""
        at = self.used[rows]
        if rows.size and int(at.max()) >= self.words.shape[1]:
            self.words = np.concatenate([self.words, self._block()], axis=1)
        self.used[rows] = at + 1
        words = self.words[rows, at] * np.asarray(bound, dtype=np.uint64)
        return (words >> np.uint64(32)).astype(np.int64)
