"""At which rate an optimizer moves the weights that a penalty shrinks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsekit.errors import InputError
from sparsekit.penalised import PenalisedWeights


class GroupRates:
    """Effective rates of the penalised groups: the mean over each group's tensors, 0 if the optimizer lacks one.

    As one number if they are all the same, else as a vector over channels, written by fills: no copy waits for a GPU.
    """

    def __init__(self, penalised: PenalisedWeights) -> None:
        self._numbers = penalised.numbers
        self._ids = [[id(tensor) for tensor in penalised.parameters(group)] for group in penalised.groups]
        self._by_channel = torch.zeros_like(penalised.shrunk.sizes)
        self._pieces = list(penalised.numbers.split(self._by_channel).values())

    def of(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """By the names of the groups that the optimizer has all weights of. Raises InputError if there are none."""
        rates = _effective_rates(optimizer)
        group_rates = {
            name: sum(rates[one] for one in ids) / len(ids)
            for name, ids in zip(self._numbers.names, self._ids, strict=True)
            if all(one in rates for one in ids)
        }
        if not group_rates:
            raise InputError(
                "the optimizer has none of the penalised weights; build it from the parameters of the model "
                "that was given to the Sparsifier"
            )
        return group_rates

    def by_channel(self, group_rates: Mapping[str, float]) -> Tensor | float:
        """The same for each channel (n,), or the one number that they all have."""
        values = [group_rates.get(name, 0.0) for name in self._numbers.names]
        if len(set(values)) == 1:
            return values[0]
        torch._foreach_zero_(self._pieces)
        torch._foreach_add_(self._pieces, values)
        return self._by_channel


def takes_plain_steps(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its steps are proportional to the gradients, as those of SGD are and those of Adam and its kin not."""
    return all("dampening" in param_group for param_group in optimizer.param_groups)


def _effective_rates(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    """Learning rate by parameter identity, times the length of a steady step with SGD's momentum."""
    rates: dict[int, float] = {}
    for param_group in optimizer.param_groups:
        rate = float(param_group["lr"])
        if "dampening" in param_group:
            momentum = param_group["momentum"]
            rate *= (1 - param_group["dampening"]) / (1 - momentum) if momentum else 1.0
        rates.update((id(parameter), rate) for parameter in param_group["params"])
    return rates
