"""The latency of one layer as a function of its channels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["LatencyCurve"]


@dataclass(frozen=True)
class LatencyCurve:
    """Milliseconds of a layer, measured at some sizes of the first two dimensions of its weight.

    - `sizes` are those of each dimension, ascending; the last is the whole. `ms` has a row for each of the first, a
      column for each of the second. Between two sizes the time is a straight line. In a dimension with one size it is
      proportional to the size.
    - `steps` are those of each dimension: part of a step costs as much as the whole step.
    - `beside_ms` is the layer's part of the time of other operators (norms, activations, attention). It is proportional
      to the size of dimension `outputs`.
    """

    sizes: tuple[tuple[int, ...], tuple[int, ...]]
    ms: tuple[tuple[float, ...], ...]
    steps: tuple[int, int] = (1, 1)
    beside_ms: float = 0.0
    outputs: int = 0

    @property
    def dense_ms(self) -> float:
        """Milliseconds of the whole layer, with its part of other operators."""
        return self.ms[-1][-1] + self.beside_ms

    def at(self, first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
        """Return the milliseconds with so many indices left in the two dimensions, elementwise; 0 with none."""
        counts = np.broadcast_arrays(np.asarray(first, float), np.asarray(second, float))
        rows, row_share, row_scale = self._between(0, counts[0])
        columns, column_share, column_scale = self._between(1, counts[1])
        table = self._table
        own = (1 - row_share) * (
            (1 - column_share) * table[rows, columns] + column_share * table[rows, columns + 1]
        ) + row_share * (
            (1 - column_share) * table[rows + 1, columns] + column_share * table[rows + 1, columns + 1]
        )
        own = np.maximum(own * row_scale * column_scale, 0.0)
        beside = self.beside_ms * counts[self.outputs] / self.sizes[self.outputs][-1]
        time: NDArray[np.float64] = np.where((counts[0] > 0) & (counts[1] > 0), own + beside, 0.0)
        return time

    @cached_property
    def _table(self) -> NDArray[np.float64]:
        # One more row and column of weight 0, so that every interval has an end.
        return np.pad(np.array(self.ms), ((0, 1), (0, 1)), mode="edge")

    def _between(self, dim: int, counts: NDArray[np.float64]) -> tuple[NDArray[np.intp], Any, Any]:
        """Return the interval that each count lies in, how far into it (a share), and a factor for the time."""
        sizes, step = np.array(self.sizes[dim], float), self.steps[dim]
        if len(sizes) == 1:
            return np.zeros(counts.shape, np.intp), 0.0, counts / sizes[0]
        rounded = np.minimum(np.ceil(counts / step) * step, sizes[-1])
        index = np.clip(np.searchsorted(sizes, rounded, side="left") - 1, 0, len(sizes) - 2)
        share = (rounded - sizes[index]) / (sizes[index + 1] - sizes[index])
        return index, share, 1.0
