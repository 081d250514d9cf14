"""A penalty is a pair: the weights of each channel seen as one group, and the proximal map that shrinks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from sparsekit.groups import ChannelGroup, Member
from sparsekit.prox import block_shrinkage, soft_threshold
from sparsekit.scores import rows

Penalty = Literal["group_lasso", "l1"]


def channel_norms(tensors: Mapping[str, Tensor], group: ChannelGroup) -> Tensor:
    """Euclidean norm (n_channels,) of all penalised weights of each channel, on the tensors' device."""
    squares = [rows(tensors[member.tensor], member).square().sum(1) for member in group.penalised]
    return torch.stack(squares).sum(0).sqrt()


def channel_sizes(tensors: Mapping[str, Tensor], group: ChannelGroup) -> int:
    """Number of penalised weights each channel has (p_g)."""
    return sum(rows(tensors[member.tensor], member).shape[1] for member in group.penalised)


def shrink_(tensors: Mapping[str, Tensor], group: ChannelGroup, penalty: Penalty, thresholds: Tensor) -> None:
    """One proximal step on a group's penalised weights, in place.

    `thresholds` (n_channels,) >= 0. group_lasso: each channel's weights, as one vector, by block soft threshold;
    l1: each weight by soft threshold.
    """
    if penalty == "l1":
        for member in group.penalised:
            tensor = tensors[member.tensor]
            tensor.copy_(soft_threshold(tensor, along(member, thresholds, tensor, outside=0.0)))
    else:
        scale_channels_(tensors, group.penalised, block_shrinkage(channel_norms(tensors, group), thresholds))


def scale_channels_(tensors: Mapping[str, Tensor], members: Sequence[Member], factors: Tensor) -> None:
    """Multiply what each channel owns of each member by its factor (n_channels,), in place."""
    for member in members:
        tensor = tensors[member.tensor]
        tensor.mul_(along(member, factors, tensor, outside=1.0))


def along(member: Member, values: Tensor, tensor: Tensor, outside: float) -> Tensor:
    """Spread one value a channel (n_channels,) over the member's dimension, shaped to broadcast against `tensor`.

    Positions that no channel of the group owns get `outside`.
    """
    size = tensor.shape[member.dim]
    spread = (
        values.to(tensor.dtype).repeat_interleave(member.repeat)
        if member.repeat > 1
        else values.to(tensor.dtype)
    )
    if member.positions != tuple(range(size)):
        index = torch.tensor(member.positions, device=tensor.device)
        spread = torch.full((size,), outside, dtype=tensor.dtype, device=tensor.device).index_copy(
            0, index, spread
        )
    shape = [1] * tensor.dim()
    shape[member.dim] = size
    return spread.view(shape)
