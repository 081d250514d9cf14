"""The weights of one model that a penalty shrinks, by channel group."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsekit.errors import InputError
from sparsekit.groups import ChannelGroup, ChannelGroups
from sparsekit.penalties import (
    BLOCKWISE,
    ELEMENTWISE,
    Penalty,
    Slots,
    block_factors,
    channel_norms,
    channel_sizes,
    distances_to_zero,
    held_members,
    member_slots,
    penalised_members,
    penalised_slots,
    scale_channels_,
    shrink_,
)


class PenalisedWeights:
    """What a penalty acts on in `model`: the free groups with weights for it, all of which require gradients.

    `tensors` are all parameters of the model, `groups` the channel groups found, and by a group's name `slots` the
    weights that are shrunk and `held` those that stay at zero once a channel has died.
    Raises InputError for groups of another model, or with nothing to act on.
    """

    def __init__(self, model: nn.Module, groups: ChannelGroups, penalty: Penalty) -> None:
        self.penalty: Penalty = penalty
        self.tensors: Mapping[str, Tensor] = dict(model.named_parameters())
        self.groups = _trainable(groups, self.tensors, penalty)
        self.slots = {g.name: penalised_slots(self.tensors, g, penalty) for g in self.groups}
        self.held: dict[str, tuple[Slots, ...]] = {}
        for group in self.groups:
            members = [m for m in held_members(group, penalty) if self.tensors[m.tensor].requires_grad]
            self.held[group.name] = member_slots(self.tensors, members)

    def parameters(self, group: str) -> list[Tensor]:
        """The tensors that hold a group's shrunk weights."""
        return [self.tensors[slot.parameter] for slot in self.slots[group]]

    def norms(self, group: str) -> Tensor:
        """Euclidean norm (n_channels,) of each channel's shrunk weights."""
        return channel_norms(self.tensors, self.slots[group])

    @torch.no_grad()
    def reach(self, group: str) -> Tensor:
        """The threshold (n_channels,) up to which one proximal step leaves each channel alive."""
        return distances_to_zero(self.tensors, self.slots[group], self.penalty)

    def root_size(self, group: str) -> float:
        """Square root of the number of weights a channel has; 1 for a penalty on single weights."""
        return 1.0 if self.penalty in ELEMENTWISE else channel_sizes(self.tensors, self.slots[group]) ** 0.5

    def shrink_(self, group: str, thresholds: Tensor, reach: Tensor, alive: Tensor, rate: float) -> Tensor:
        """One proximal step, `reach` being what `self.reach` says now; returns factors (n_channels,) to hold.

        `alive` (n_channels,) is set to 0, in place, for channels that have died. The factors are what the held weights
        are still to be multiplied by.
        """
        if self.penalty in BLOCKWISE:  # there `reach` is the norm, which saves a look at the weights
            factors = block_factors(self.penalty, reach, thresholds, rate)
            alive.mul_((reach * factors).square() > 0)  # squared: a norm that underflows is none
            return factors * alive
        shrink_(self.tensors, self.slots[group], self.penalty, thresholds, rate=rate)
        alive.mul_(self.norms(group) > 0)
        return alive

    def hold_(self, group: str, factors: Tensor, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Multiply the held weights of each channel by its factor, in place; those of `tensors` where given."""
        scale_channels_(self.tensors if tensors is None else tensors, self.held[group], factors)

    @torch.no_grad()
    def clear_momenta_(self, group: str, optimizer: torch.optim.Optimizer, alive: Tensor) -> None:
        """Clear the optimizer's running averages of channels that are held at zero."""
        for slot in self.held[group]:
            parameter = self.tensors[slot.parameter]
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    scale_channels_({slot.parameter: value}, [slot], alive)


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
