"""The importance of channels, learned from the gradients of training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsekit.sparsify.channel_vectors import OwnedWeights

# The weight of the newest step in a running mean, which thus remembers about fifty steps.
_NEWEST = 0.02


def note_effects_(running: Tensor, tensors: Mapping[str, Tensor], shrunk: OwnedWeights) -> None:
    """Update the running mean of importance `running` (n,) by the present gradients, in place.

    importance = mean over steps of (sum of weight x gradient over the channel's shrunk weights)^2

    To first order this is the squared change of a batch's loss when the channel goes (Molchanov et al., "Importance
    Estimation for Neural Network Pruning", 2019), so it compares across layers. Gradients that are not finite, as a
    scaler's first ones, count as 0.
    """
    weights = [tensor.detach() for tensor in shrunk.of(tensors)]
    gradients = [tensor.grad for tensor in shrunk.of(tensors)]
    given = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]
    sums = shrunk.sums(torch._foreach_mul(weights, given))
    running.lerp_(sums.nan_to_num_(0.0, 0.0, 0.0).square_().to(running), _NEWEST)
