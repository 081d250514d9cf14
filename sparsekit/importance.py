"""What channels are worth, learned from the gradients of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparsekit.penalties import Slots

# Of a running mean, how much the newest step counts: it remembers about fifty steps.
_NEWEST = 0.02


def note_sensitivities_(
    running: Mapping[str, Tensor], tensors: Mapping[str, Tensor], slots: Mapping[str, Sequence[Slots]]
) -> None:
    """Fold the gradients that the tensors have now into each group's `running` (n_channels,), in place.

    A channel's sensitivity is the mean over steps of (sum of weight x gradient over its penalised weights)^2: to first
    order, the square of what the loss of a batch changes by when the channel goes (Molchanov et al., "Importance
    Estimation for Neural Network Pruning", 2019). Its unit is that of the loss, so it compares across layers. Gradients
    that are not finite, as a scaler's first ones are, count as 0.
    """
    names = [slot.parameter for group in running for slot in slots[group]]
    given = {name: gradient for name in names if (gradient := tensors[name].grad) is not None}
    products: dict[str, Tensor] = {}
    if given:  # one call for all: most are short vectors, and a call costs more than the work
        weights = [tensors[name].detach() for name in given]
        products.update(zip(given, torch._foreach_mul(weights, list(given.values())), strict=True))
    totals = [
        sum(
            (
                slot.rows(products[slot.parameter]).sum(1)
                for slot in slots[group]
                if slot.parameter in products
            ),
            start=torch.zeros_like(values),
        )
        for group, values in running.items()
    ]
    squares = [total.nan_to_num_(0.0, 0.0, 0.0).square_() for total in totals]
    torch._foreach_lerp_(list(running.values()), squares, _NEWEST)
