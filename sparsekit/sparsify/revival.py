"""Whether channels at zero may come back: how hard the loss pulls at them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsekit.options import Penalty
from sparsekit.sparsify.channel_vectors import OwnedWeights
from sparsekit.sparsify.penalties import distances_to_zero

# The weight of the newest step in a running mean. It remembers about a hundred steps, and nothing revives before.
_NEWEST = 0.01
# This many standard errors of the mean gradient count as noise.
_ERRORS = 3.0


class Revival:
    """Measures how hard the loss pulls at channels at zero, by running means of the gradients of the shrunk weights.

    Zero is the optimum of a channel if a proximal step from there, against the mean gradient, ends there. The pull is
    the largest strength x w_g at which it would not: the Euclidean norm of the mean gradient for penalties on whole
    channels, its largest absolute entry for elementwise ones. Only what exceeds three standard errors of the mean
    counts, so noise revives nothing. For optimizers that divide by the size of the gradients, the unit of a mean
    gradient is its root mean square.

    The means take twice the memory of the shrunk weights. Nothing here waits for the device.
    """

    def __init__(self, shrunk: OwnedWeights, tensors: Mapping[str, Tensor], penalty: Penalty) -> None:
        self._shrunk, self._tensors, self._penalty = shrunk, tensors, penalty
        self._seen = 0
        self._means = {name: torch.zeros_like(tensors[name], dtype=shrunk.dtype) for name in shrunk.names}
        self._squares = {name: torch.zeros_like(mean) for name, mean in self._means.items()}

    @torch.no_grad()
    def observe(self) -> None:
        """Update the means by the present gradients. Those that are missing or not finite count as 0."""
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
        """Return the pull at each channel (n,), `relative` to the size of its gradients or in their own units."""
        if self._seen * _NEWEST < 1:
            return torch.zeros_like(self._shrunk.sizes)
        left = (1 - _NEWEST) ** self._seen  # the weight of the zeros that the means started with
        # The variance of a mean with these weights / the variance of one step.
        share = _NEWEST / (2 - _NEWEST) * (1 - left**2) / (1 - left) ** 2
        pulls = {}
        for name, mean in self._means.items():
            mean, square = mean / (1 - left), self._squares[name] / (1 - left)
            error = ((square - mean.square()).clamp_min(0) * (share / (1 - share))).sqrt()
            certain = mean.sign() * (mean.abs() - _ERRORS * error).clamp_min(0)
            size = square.sqrt().clamp_min(torch.finfo(mean.dtype).tiny)
            pulls[name] = certain / size if relative else certain
        return distances_to_zero(self._shrunk, pulls, self._penalty)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs."""
        return {
            "seen": self._seen,
            "means": {name: mean.clone() for name, mean in self._means.items()},
            "squares": {name: square.clone() for name, square in self._squares.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state that `state_dict` returned."""
        self._seen = state["seen"]
        for mine, theirs in ((self._means, state["means"]), (self._squares, state["squares"])):
            for name, value in mine.items():
                value.copy_(theirs[name])
