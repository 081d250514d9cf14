"""The weights of one model that a penalty shrinks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsekit.errors import InputError
from sparsekit.options import Penalty
from sparsekit.sparsify.channel_vectors import ChannelNumbers, OwnedWeights, multiply_
from sparsekit.sparsify.penalties import (
    BLOCKWISE,
    ELEMENTWISE,
    block_factors,
    distances_to_zero,
    held_members,
    penalised_members,
    shrink_,
)
from sparsekit.structure.groups import ChannelGroup, ChannelGroups, Member


class PenalisedWeights:
    """What a penalty acts on in `model`: the free groups with weights for it, all of which require gradients.

    `tensors` are all parameters of the model, `groups` the channel groups found, `numbers` how their channels are
    numbered, `shrunk` the weights that are shrunk and `held` those that stay at zero once a channel has died.
    Everything over channels is one vector (n,).
    Raises InputError for groups of another model, with nothing to act on, or on several devices.
    """

    def __init__(self, model: nn.Module, groups: ChannelGroups, penalty: Penalty) -> None:
        self.penalty: Penalty = penalty
        self.tensors: Mapping[str, Tensor] = dict(model.named_parameters())
        self.groups = _trainable(groups, self.tensors, penalty)
        self.numbers = ChannelNumbers(self.groups)

        def held(group: ChannelGroup) -> list[Member]:
            return [m for m in held_members(group, penalty) if self.tensors[m.tensor].requires_grad]

        devices = {self.tensors[member.tensor].device for group in self.groups for member in held(group)}
        if len(devices) > 1:
            raise InputError(
                f"the penalised weights lie on several devices ({', '.join(sorted(map(str, devices)))}); "
                "train the whole model on one, in as many processes as there are devices"
            )
        self.shrunk = OwnedWeights(self.tensors, self.groups, lambda group: penalised_members(group, penalty))
        self.held = OwnedWeights(self.tensors, self.groups, held)

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.shrunk.device

    def parameters(self, group: ChannelGroup) -> list[Tensor]:
        """The tensors that hold a group's shrunk weights."""
        return [self.tensors[member.tensor] for member in penalised_members(group, self.penalty)]

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Euclidean norm of each channel's shrunk weights."""
        return self.shrunk.norms(self.tensors)

    @torch.no_grad()
    def distances(self) -> Tensor:
        """The threshold up to which one proximal step leaves each channel alive."""
        return distances_to_zero(self.shrunk, self.tensors, self.penalty)

    def root_sizes(self) -> Tensor:
        """Square root of the number of weights a channel has; 1 for a penalty on single weights."""
        sizes = self.shrunk.sizes
        return torch.ones_like(sizes) if self.penalty in ELEMENTWISE else sizes.sqrt()

    @torch.no_grad()
    def shrink_(self, thresholds: Tensor, distances: Tensor, alive: Tensor, rate: Tensor | float) -> Tensor:
        """One proximal step, `distances` being what `self.distances` says now; returns factors to hold.

        `alive` is set to 0, in place, for channels that have died; where the rate is 0 none does. The factors are what
        the held weights are still to be multiplied by.
        """
        if self.penalty in BLOCKWISE:  # there `distances` is the norm, which saves a look at the weights
            factors = block_factors(self.penalty, distances, thresholds, rate)
            left = (distances * factors).square() > 0  # squared: a norm that underflows is none
        else:
            shrink_(self.shrunk, self.tensors, self.penalty, thresholds, rate=rate)
            factors, left = torch.ones_like(distances), self.norms() > 0
        alive.mul_(left if isinstance(rate, float) else left | (rate == 0))
        return factors * alive

    @torch.no_grad()
    def hold_(self, factors: Tensor, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Multiply the held weights of each channel by its factor, in place; those of `tensors` where given."""
        self.held.scale_(self.tensors if tensors is None else tensors, factors)

    @torch.no_grad()
    def clear_momenta_(self, optimizer: torch.optim.Optimizer, alive: Tensor) -> None:
        """Clear the optimizer's running averages of channels that are held at zero."""
        values, factors = [], []
        for parameter, factor in zip(self.held.of(self.tensors), self.held.spread(alive, 1.0), strict=True):
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    values.append(value)
                    factors.append(factor)
        multiply_(values, factors)


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


def _trainable(
    groups: ChannelGroups, tensors: Mapping[str, Tensor], penalty: Penalty
) -> tuple[ChannelGroup, ...]:
    """The free groups with weights the penalty acts on, all of which require gradients."""
    active = []
    for group in groups.free:
        members = penalised_members(group, penalty)
        missing = [member.tensor for member in members if member.tensor not in tensors]
        if missing:
            raise InputError(
                f"the model has no parameter {missing[0]}, which its channel groups name; give the model that "
                "find_groups was given, not a wrapper around it"
            )
        if members and all(tensors[member.tensor].requires_grad for member in members):
            active.append(group)
    if not active and penalty == "scale_l1" and groups.free:
        raise InputError(
            "penalty 'scale_l1' acts on the scales of BatchNorms, and no channel group that is free to be cut and "
            "trained has any; take 'group_lasso', which acts on filters where there is no BatchNorm"
        )
    if not active:
        raise InputError(
            "no channel group of the model is free to be sparsified and trained; see `sparsekit inspect`"
        )
    return tuple(active)


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
