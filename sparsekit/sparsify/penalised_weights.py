"""The weights of one model that a penalty shrinks, and the learning rates they have in an optimizer."""

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
    """The weights of `model` that a penalty shrinks, and those that it holds at zero.

    `groups` are the free groups whose penalised weights all require gradients; `numbers` numbers their channels.
    `shrunk` are the weights that are shrunk, `held` those that stay at zero once a channel has died. `tensors` are all
    parameters of the model. Everything over channels is one vector (n,).

    Raises InputError for groups of another model, nothing to penalise, or weights on several devices.
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
        """The device of the weights."""
        return self.shrunk.device

    def parameters(self, group: ChannelGroup) -> list[Tensor]:
        """Return the tensors that have a group's shrunk weights."""
        return [self.tensors[member.tensor] for member in penalised_members(group, self.penalty)]

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Return the Euclidean norm of each channel's shrunk weights."""
        return self.shrunk.norms(self.tensors)

    @torch.no_grad()
    def distances(self) -> Tensor:
        """Return the threshold up to which one proximal step leaves each channel alive."""
        return distances_to_zero(self.shrunk, self.tensors, self.penalty)

    def root_sizes(self) -> Tensor:
        """Return the square root of the number of each channel's shrunk weights; 1 for elementwise penalties."""
        sizes = self.shrunk.sizes
        return torch.ones_like(sizes) if self.penalty in ELEMENTWISE else sizes.sqrt()

    @torch.no_grad()
    def shrink_(self, thresholds: Tensor, distances: Tensor, alive: Tensor, rate: Tensor | float) -> Tensor:
        """Take one proximal step; returns the factors by which `hold_` still has to multiply the held weights.

        `distances` are those that `self.distances()` gives now. `alive` is set to 0, in place, for channels that have
        died; where the rate is 0 none dies.
        """
        if self.penalty in BLOCKWISE:  # `distances` are the norms then, so the weights need not be read
            factors = block_factors(self.penalty, distances, thresholds, rate)
            left = (distances * factors).square() > 0  # squared, because a norm that underflows is zero
        else:
            shrink_(self.shrunk, self.tensors, self.penalty, thresholds, rate=rate)
            factors, left = torch.ones_like(distances), self.norms() > 0
        alive.mul_(left if isinstance(rate, float) else left | (rate == 0))
        return factors * alive

    @torch.no_grad()
    def hold_(self, factors: Tensor, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Multiply the held weights of each channel, in the model or in `tensors`, by its factor, in place."""
        self.held.scale_(self.tensors if tensors is None else tensors, factors)

    @torch.no_grad()
    def clear_momenta_(self, optimizer: torch.optim.Optimizer, alive: Tensor) -> None:
        """Clear the optimizer's running averages of the channels that are not alive."""
        values, factors = [], []
        for parameter, factor in zip(self.held.of(self.tensors), self.held.spread(alive, 1.0), strict=True):
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    values.append(value)
                    factors.append(factor)
        multiply_(values, factors)


class GroupRates:
    """Effective learning rates of the penalised groups: the mean over each group's tensors.

    The rate of a group is 0 if the optimizer lacks one of its tensors. Nothing here waits for the device.
    """

    def __init__(self, penalised: PenalisedWeights) -> None:
        self._numbers = penalised.numbers
        self._ids = [[id(tensor) for tensor in penalised.parameters(group)] for group in penalised.groups]
        self._by_channel = torch.zeros_like(penalised.shrunk.sizes)
        self._pieces = list(penalised.numbers.split(self._by_channel).values())

    def of(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Return the rates by group name, where the optimizer has all weights. Raises InputError if it has none."""
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
        """Return the rate of each channel (n,), or one number if all are equal."""
        values = [group_rates.get(name, 0.0) for name in self._numbers.names]
        if len(set(values)) == 1:
            return values[0]
        torch._foreach_zero_(self._pieces)
        torch._foreach_add_(self._pieces, values)
        return self._by_channel


def takes_plain_steps(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer's steps are proportional to the gradients, as SGD's are and Adam's are not."""
    return all("dampening" in param_group for param_group in optimizer.param_groups)


def _trainable(
    groups: ChannelGroups, tensors: Mapping[str, Tensor], penalty: Penalty
) -> tuple[ChannelGroup, ...]:
    """Return the free groups that have weights for the penalty, all of which require gradients."""
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
        raise InputError(_why_none(groups, tensors, penalty))
    return tuple(active)


def _why_none(groups: ChannelGroups, tensors: Mapping[str, Tensor], penalty: Penalty) -> str:
    """Why no group can be sparsified: all are frozen, their weights are not trained, or nothing in them can shrink."""
    if not groups.free:
        reasons = "; ".join(f"{group.name}: {group.frozen}" for group in groups.groups[:3])
        return f"no channel group of the model is free to be sparsified ({reasons or 'it has none'})"
    shrunk = [member.tensor for group in groups.free for member in penalised_members(group, penalty)]
    fixed = [name for name in shrunk if not tensors[name].requires_grad]
    if fixed:
        return (
            f"the weights of all free channel groups are frozen: {fixed[0]} and {len(fixed) - 1} others have "
            "requires_grad=False; train those that are to shrink"
        )
    return f"no weight of the free channel groups can be shrunk; the first is {groups.free[0].name}"


def _effective_rates(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    """Return learning rates by the `id` of the parameter, for SGD times (1 - dampening) / (1 - momentum)."""
    rates: dict[int, float] = {}
    for param_group in optimizer.param_groups:
        rate = float(param_group["lr"])
        if "dampening" in param_group:
            momentum = param_group["momentum"]
            rate *= (1 - param_group["dampening"]) / (1 - momentum) if momentum else 1.0
        rates.update((id(parameter), rate) for parameter in param_group["params"])
    return rates
