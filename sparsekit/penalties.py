"""A penalty is a pair: the weights of each channel seen as one group, and the proximal map that shrinks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsekit.groups import ChannelGroup
from sparsekit.prox import block_shrinkage, soft_threshold

Penalty = Literal["group_lasso", "l1"]


@dataclass(frozen=True)
class Slots:
    """Where one parameter holds the channels of a group: a penalised `Member`, made ready for use in every step.

    `index` are the member's positions along `dim` as a tensor, or None if they are the whole dimension in order.
    """

    parameter: str
    dim: int
    repeat: int
    index: Tensor | None

    def rows(self, tensor: Tensor) -> Tensor:
        """Everything of `tensor` that each channel owns, as (n_channels, elements)."""
        moved = tensor.movedim(self.dim, 0)
        if self.index is not None:
            moved = moved.index_select(0, self.index)
        return moved.reshape(moved.shape[0] // self.repeat, -1)

    def spread(self, values: Tensor, tensor: Tensor, outside: float) -> Tensor:
        """One value a channel (n_channels,) laid along `dim`, shaped to broadcast against `tensor`.

        Positions that no channel of the group owns get `outside`.
        """
        spread = values.to(tensor)
        if self.repeat > 1:
            spread = spread.repeat_interleave(self.repeat)
        if self.index is not None:
            whole = torch.full((tensor.shape[self.dim],), outside, dtype=tensor.dtype, device=tensor.device)
            spread = whole.index_copy(0, self.index.to(tensor.device), spread)
        return spread.view([-1 if dim == self.dim else 1 for dim in range(tensor.dim())])


def penalised_slots(tensors: Mapping[str, Tensor], group: ChannelGroup) -> tuple[Slots, ...]:
    """The slots of a group's penalised members, on their tensors' devices."""
    slots = []
    for member in group.penalised:
        tensor = tensors[member.tensor]
        whole = member.positions == tuple(range(tensor.shape[member.dim]))
        index = None if whole else torch.tensor(member.positions, device=tensor.device)
        slots.append(Slots(member.tensor, member.dim, member.repeat, index))
    return tuple(slots)


def channel_norms(tensors: Mapping[str, Tensor], slots: Sequence[Slots]) -> Tensor:
    """Euclidean norm (n_channels,) of all penalised weights of each channel, on the tensors' device."""
    squares = [slot.rows(tensors[slot.parameter]).square().sum(1) for slot in slots]
    return torch.stack(squares).sum(0).sqrt()


def channel_sizes(tensors: Mapping[str, Tensor], slots: Sequence[Slots]) -> int:
    """Number of penalised weights each channel has (p_g)."""
    return sum(slot.rows(tensors[slot.parameter]).shape[1] for slot in slots)


def distances_to_zero(tensors: Mapping[str, Tensor], slots: Sequence[Slots], penalty: Penalty) -> Tensor:
    """The threshold (n_channels,) at which one proximal step makes each channel zero.

    group_lasso: the channel's Euclidean norm; l1: its largest absolute weight.
    """
    if penalty == "group_lasso":
        return channel_norms(tensors, slots)
    return torch.stack([slot.rows(tensors[slot.parameter]).abs().amax(1) for slot in slots]).amax(0)


def shrink_(
    tensors: Mapping[str, Tensor], slots: Sequence[Slots], penalty: Penalty, thresholds: Tensor
) -> None:
    """One proximal step on a group's penalised weights, in place.

    `thresholds` (n_channels,) >= 0. group_lasso: each channel's weights, as one vector, by block soft threshold;
    l1: each weight by soft threshold.
    """
    if penalty == "l1":
        for slot in slots:
            tensor = tensors[slot.parameter]
            tensor.copy_(soft_threshold(tensor, slot.spread(thresholds, tensor, outside=0.0)))
    else:
        scale_channels_(tensors, slots, block_shrinkage(channel_norms(tensors, slots), thresholds))


def scale_channels_(tensors: Mapping[str, Tensor], slots: Sequence[Slots], factors: Tensor) -> None:
    """Multiply what each channel owns by its factor (n_channels,), in place."""
    for slot in slots:
        tensor = tensors[slot.parameter]
        tensor.mul_(slot.spread(factors, tensor, outside=1.0))
