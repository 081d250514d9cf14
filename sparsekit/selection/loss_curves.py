"""The loss curve of a group: what a model loses, measured, with so many of its channels left."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["LossCurve"]


_UNUSABLE = 1e3


@dataclass(frozen=True)
class LossCurve:
    """What the loss of a group's channels costs.

    - `order` (n_channels,) ranks them, the last to go first.
    - `losses` (n_channels + 1,) are those with so many channels left; the last is 0, and none is smaller than the next.
    """

    order: Tensor
    losses: NDArray[np.float64]

    @staticmethod
    def through(order: Tensor, costs: Tensor, measured: dict[int, float]) -> LossCurve:
        """Draw a curve through the losses `measured` at some numbers of channels left.

        `order` is that of removal, the first to go first. `costs` (n_channels + 1,) are predicted with the first so
        many gone, and shape the curve between two measurements, and below the last.
        """
        n = len(order)
        predicted = costs.flip(0).numpy().astype(np.float64)  # by how many are left
        losses = np.zeros(n + 1)
        known = sorted({n: 0.0, **_finite(measured)}.items(), reverse=True)
        for (more, above), (fewer, below) in itertools.pairwise(known):
            rise = predicted[fewer] - predicted[more]
            counts = np.arange(fewer, more + 1)
            share = (
                (predicted[counts] - predicted[more]) / rise if rise > 0 else (more - counts) / (more - fewer)
            )
            losses[counts] = above + (below - above) * share
        fewest, loss = known[-1]
        if fewest and loss > 0 and predicted[fewest] > 0:
            losses[:fewest] = loss * np.maximum(predicted[:fewest] / predicted[fewest], 1.0)
        elif fewest:
            losses[:fewest] = loss
        # Noise must not make fewer channels look better than more.
        rising = np.maximum.accumulate(np.maximum(losses[::-1], 0.0))[::-1]
        return LossCurve(order.flip(0), rising)

    @staticmethod
    def near(order: Tensor, losses: Mapping[int, float]) -> LossCurve:
        """Draw a curve that is straight between losses at some numbers of channels left, and forbids fewer than these.

        `order` ranks the channels, the last to go first. Losses are relative to that of the most channels; more than
        these bring nothing.
        """
        counts, losses = sorted(losses), _finite(losses)
        every = np.interp(np.arange(len(order) + 1), counts, [losses[n] - losses[counts[-1]] for n in counts])
        every[: counts[0]] = _UNUSABLE
        return LossCurve(order, np.maximum.accumulate(np.maximum(every[::-1], 0.0))[::-1])

    def mean_with(self, other: LossCurve) -> LossCurve:
        """Return the mean of two curves of one order."""
        return LossCurve(self.order, (self.losses + other.losses) / 2)


def _finite(losses: Mapping[int, float]) -> dict[int, float]:
    """What is not a number is as bad as can be: outputs that nobody can use."""
    return {count: loss if math.isfinite(loss) else _UNUSABLE for count, loss in losses.items()}
