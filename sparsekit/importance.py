"""What channels are worth, learned from the gradients of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparsekit.penalties import Slots

# Of a running mean, how much the newest step counts: it remembers about fifty steps.
_NEWEST = 0.02


def note_sensitivities_(running: Tensor, tensors: Mapping[str, Tensor], slots: Sequence[Slots]) -> None:
    """Fold the gradients that the tensors have now into `running` (n_channels,), in place.

    A channel's sensitivity is the mean over steps of (sum of weight x gradient over its penalised weights)^2: to first
    order, the square of what the loss of a batch changes by when the channel goes (Molchanov et al., "Importance
    Estimation for Neural Network Pruning", 2019). Its unit is that of the loss, so it compares across layers.
    """
    total = torch.zeros_like(running)
    for slot in slots:
        weight = tensors[slot.parameter]
        if weight.grad is not None:
            total += slot.rows(weight * weight.grad).sum(1)
    running.lerp_(total.square(), _NEWEST)
