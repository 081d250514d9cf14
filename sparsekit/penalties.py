"""A penalty is a pair: which weights of a channel form a group, and the proximal map that shrinks them.

    penalty             weights of a channel                    proximal map
    group_lasso         all that make it, as one vector         block soft threshold
    l1                  all that make it, one by one            soft threshold
    scale_l1            its BatchNorm scales, one by one        soft threshold
    sparse_group_lasso  all that make it                        soft threshold, then block soft threshold
    group_mcp           all that make it, as one vector         that of MCP: far from zero nothing shrinks

What makes a channel is its `ChannelGroup.penalised` members: with a BatchNorm behind it scale and shift, because there
the size of the filter means nothing, else the filter and bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsekit.groups import ChannelGroup, Member
from sparsekit.prox import block_shrinkage, mcp_shrinkage, soft_threshold

Penalty = Literal["group_lasso", "l1", "scale_l1", "sparse_group_lasso", "group_mcp"]
# Penalties whose map acts on single weights: they need no factor for how many a channel has.
ELEMENTWISE: tuple[Penalty, ...] = ("l1", "scale_l1")
# Penalties whose map does nothing but multiply each channel by a number.
BLOCKWISE: tuple[Penalty, ...] = ("group_lasso", "group_mcp")
# Of a sparse group lasso, the share of the threshold that acts on single weights.
_ELEMENT_SHARE = 0.5


def penalised_members(group: ChannelGroup, penalty: Penalty) -> tuple[Member, ...]:
    """The members of a group that the penalty acts on; none if it has nothing to act on."""
    if penalty == "scale_l1":
        return group.scales
    return group.penalised


def held_members(group: ChannelGroup, penalty: Penalty) -> tuple[Member, ...]:
    """The members that stay at zero once the channel has died: the penalised ones, and with a scale its shift.

    A shift alone makes a constant, which layers that pad can only be given by a channel that carries it.
    """
    if penalty == "scale_l1":
        return group.scales + group.shifts
    return group.penalised


@dataclass(frozen=True)
class Slots:
    """Where one parameter holds the channels of a group: a penalised `Member`, made ready for use in every step.

    `index` are the member's positions along `dim` as a tensor, or None if they are the whole dimension in order.
    """

    parameter: str
    dim: int
    repeat: int
    index: Tensor | None

    def is_vector(self, tensor: Tensor) -> bool:
        """Whether the tensor has one number for each channel, in order, and nothing else: most scales and shifts."""
        return self.index is None and self.repeat == 1 and tensor.dim() == 1

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
        if self.is_vector(tensor):
            return spread
        if self.repeat > 1:
            spread = spread.repeat_interleave(self.repeat)
        if self.index is not None:
            whole = torch.full((tensor.shape[self.dim],), outside, dtype=tensor.dtype, device=tensor.device)
            spread = whole.index_copy(0, self.index.to(tensor.device), spread)
        return spread.view([-1 if dim == self.dim else 1 for dim in range(tensor.dim())])


def penalised_slots(
    tensors: Mapping[str, Tensor], group: ChannelGroup, penalty: Penalty = "group_lasso"
) -> tuple[Slots, ...]:
    """The slots of the members that the penalty acts on, on their tensors' devices."""
    return member_slots(tensors, penalised_members(group, penalty))


def member_slots(tensors: Mapping[str, Tensor], members: Sequence[Member]) -> tuple[Slots, ...]:
    """The members, made ready for use on their tensors' devices."""
    slots = []
    for member in members:
        tensor = tensors[member.tensor]
        whole = member.positions == tuple(range(tensor.shape[member.dim]))
        index = None if whole else torch.tensor(member.positions, device=tensor.device)
        slots.append(Slots(member.tensor, member.dim, member.repeat, index))
    return tuple(slots)


def channel_norms(tensors: Mapping[str, Tensor], slots: Sequence[Slots]) -> Tensor:
    """Euclidean norm (n_channels,) of all penalised weights of each channel, on the tensors' device."""
    total: Tensor | float = 0.0
    for slot in slots:
        tensor = tensors[slot.parameter]
        total = total + (tensor.square() if slot.is_vector(tensor) else slot.rows(tensor).square().sum(1))
    assert isinstance(total, Tensor), "a group without slots has no norms"
    return total.sqrt()


def channel_sizes(tensors: Mapping[str, Tensor], slots: Sequence[Slots]) -> int:
    """Number of penalised weights each channel has (p_g)."""
    return sum(slot.rows(tensors[slot.parameter]).shape[1] for slot in slots)


def distances_to_zero(tensors: Mapping[str, Tensor], slots: Sequence[Slots], penalty: Penalty) -> Tensor:
    """The threshold (n_channels,) up to which one proximal step leaves each channel alive.

    Largest absolute weight for the elementwise penalties, else the channel's Euclidean norm n. For a sparse group
    lasso with half of the threshold on each part it is 2 n / (1 + s / (n sqrt(p))), s the sum of the p absolute
    weights: of the tangent to a convex function, so a lower bound; exact if all weights but zeros are equally large.
    """
    if penalty in ELEMENTWISE:
        return torch.stack([slot.rows(tensors[slot.parameter]).abs().amax(1) for slot in slots]).amax(0)
    norms = channel_norms(tensors, slots)
    if penalty == "sparse_group_lasso":
        sums = torch.stack([slot.rows(tensors[slot.parameter]).abs().sum(1) for slot in slots]).sum(0)
        ratio = sums / (norms * channel_sizes(tensors, slots) ** 0.5).clamp_min(torch.finfo(norms.dtype).tiny)
        norms = norms / ((1 - _ELEMENT_SHARE) + _ELEMENT_SHARE * ratio)
    return norms


def shrink_(
    tensors: Mapping[str, Tensor],
    slots: Sequence[Slots],
    penalty: Penalty,
    thresholds: Tensor,
    *,
    rate: float = 1.0,
) -> None:
    """One proximal step on a group's penalised weights, in place.

    `thresholds` (n_channels,) >= 0 are `rate` x strength x weight of each channel. A sparse group lasso spends half
    of them on single weights, divided by the square root of their number, and half on the channel as one vector.
    """
    if penalty in ELEMENTWISE:
        _soften_(tensors, slots, thresholds)
        return
    if penalty == "sparse_group_lasso":
        _soften_(tensors, slots, thresholds * (_ELEMENT_SHARE / channel_sizes(tensors, slots) ** 0.5))
        thresholds = thresholds * (1 - _ELEMENT_SHARE)
    scale_channels_(tensors, slots, block_factors(penalty, channel_norms(tensors, slots), thresholds, rate))


def block_factors(penalty: Penalty, norms: Tensor, thresholds: Tensor, rate: float) -> Tensor:
    """What a step of a penalty on whole channels multiplies those of these norms by (n_channels,)."""
    if penalty == "group_mcp":
        return mcp_shrinkage(norms, thresholds, rate)
    return block_shrinkage(norms, thresholds)


def _soften_(tensors: Mapping[str, Tensor], slots: Sequence[Slots], thresholds: Tensor) -> None:
    for slot in slots:
        tensor = tensors[slot.parameter]
        tensor.copy_(soft_threshold(tensor, slot.spread(thresholds, tensor, outside=0.0)))


def scale_channels_(tensors: Mapping[str, Tensor], slots: Sequence[Slots], factors: Tensor) -> None:
    """Multiply what each channel owns by its factor (n_channels,), in place."""
    for slot in slots:
        tensor = tensors[slot.parameter]
        tensor.mul_(slot.spread(factors, tensor, outside=1.0))
