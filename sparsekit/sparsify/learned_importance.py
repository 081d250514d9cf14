"""How important channels are, learned from the gradients of training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsekit.sparsify.channel_vectors import OwnedWeights

# Of a running mean, how much the newest step counts: it remembers about fifty steps.
_NEWEST = 0.02


def note_effects_(running: Tensor, tensors: Mapping[str, Tensor], owned: OwnedWeights) -> None:
    """Fold the gradients that the tensors have now into `running` (n,), in place.

    A channel's importance is the mean over steps of (sum of weight x gradient over its penalised weights)^2: to first
    order, the square of what the loss of a batch changes by when the channel goes (Molchanov et al., "Importance
    Estimation for Neural Network Pruning", 2019). Its unit is that of the loss, so it compares across layers. Gradients
    that are not finite, as a scaler's first ones are, count as 0.
    """
    weights = [tensor.detach() for tensor in owned.of(tensors)]
    gradients = [tensor.grad for tensor in owned.of(tensors)]
    given = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]
    sums = owned.sums(torch._foreach_mul(weights, given))
    running.lerp_(sums.nan_to_num_(0.0, 0.0, 0.0).square_().to(running), _NEWEST)
