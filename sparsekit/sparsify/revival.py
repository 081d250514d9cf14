"""How hard the loss pulls at channels that are held at zero: what decides whether one may come back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsekit.options import Penalty
from sparsekit.sparsify.channel_vectors import OwnedWeights
from sparsekit.sparsify.penalties import distances_to_zero

# Of a running mean, how much the newest step counts: it remembers about a hundred steps, and waits for as many.
_NEWEST = 0.01
# How many standard errors of the mean gradient count as noise.
_ERRORS = 3.0


class Revival:
    """Running means of the gradients of the penalised weights, and what they say about channels at zero.

    At zero a channel is at its optimum iff a proximal step from there, against the mean gradient, ends there. So it is
    pulled with the largest strength x w_g from which that step would take it away: the Euclidean norm of its mean
    gradient for penalties on whole channels, the largest absolute entry for those on single weights. Of the mean only
    what exceeds three of its standard errors counts, so channels that feel nothing but noise stay where they are. For
    optimizers that divide by the size of the gradients, mean gradients are in units of their root mean square.

    Holds two copies of the penalised weights. Nothing here waits for the device.
    """

    def __init__(self, held: OwnedWeights, tensors: Mapping[str, Tensor], penalty: Penalty) -> None:
        self._held, self._tensors, self._penalty = held, tensors, penalty
        self._seen = 0
        self._means = {name: torch.zeros_like(tensors[name], dtype=held.dtype) for name in held.names}
        self._squares = {name: torch.zeros_like(mean) for name, mean in self._means.items()}

    @torch.no_grad()
    def observe(self) -> None:
        """Fold in the gradients that the weights have now; those that are not finite, or not there, count as 0."""
        gradients = [
            torch.zeros_like(mean)
            if (gradient := self._tensors[name].grad) is None
            else gradient.detach().to(mean.dtype).nan_to_num(0.0, 0.0, 0.0)
            for name, mean in self._means.items()
        ]
        torch._foreach_lerp_(list(self._means.values()), gradients, _NEWEST)
        torch._foreach_lerp_(list(self._squares.values()), torch._foreach_mul(gradients, gradients), _NEWEST)
        self._seen += 1

    @torch.no_grad()
    def of_channels(self, *, relative: bool) -> Tensor:
        """The loss's pull at each channel (n,), `relative` to the size of its gradients or in their own units."""
        if self._seen * _NEWEST < 1:
            return torch.zeros_like(self._held.sizes)
        left = (1 - _NEWEST) ** self._seen  # of the zeros that the means started with
        # Variance of a mean with these weights, over the variance of one step.
        share = _NEWEST / (2 - _NEWEST) * (1 - left**2) / (1 - left) ** 2
        pulls = {}
        for name, mean in self._means.items():
            mean, square = mean / (1 - left), self._squares[name] / (1 - left)
            error = ((square - mean.square()).clamp_min(0) * (share / (1 - share))).sqrt()
            certain = mean.sign() * (mean.abs() - _ERRORS * error).clamp_min(0)
            size = square.sqrt().clamp_min(torch.finfo(mean.dtype).tiny)
            pulls[name] = certain / size if relative else certain
        return distances_to_zero(self._held, pulls, self._penalty)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on."""
        return {
            "seen": self._seen,
            "means": {name: mean.clone() for name, mean in self._means.items()},
            "squares": {name: square.clone() for name, square in self._squares.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._seen = state["seen"]
        for mine, theirs in ((self._means, state["means"]), (self._squares, state["squares"])):
            for name, value in mine.items():
                value.copy_(theirs[name])
