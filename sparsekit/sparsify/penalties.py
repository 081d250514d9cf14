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

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsekit.options import Penalty
from sparsekit.sparsify.channel_vectors import OwnedWeights
from sparsekit.sparsify.prox import block_shrinkage, mcp_shrinkage
from sparsekit.structure.groups import ChannelGroup, Member

# Penalties whose map acts on single weights: they need no factor for how many a channel has.
ELEMENTWISE: tuple[Penalty, ...] = ("l1", "scale_l1")
# Penalties whose map does nothing but multiply each channel by a number.
BLOCKWISE: tuple[Penalty, ...] = ("group_lasso", "group_mcp")
# Of a sparse group lasso, the share of the threshold that acts on single weights.
_ELEMENT_SHARE = 0.5


def penalised_members(group: ChannelGroup, penalty: Penalty) -> tuple[Member, ...]:
    """The members of a group that the penalty acts on; none if it has nothing to act on."""
    if penalty == "scale_l1" and not group.bypass:  # of a block the penalised weights are scales
        return group.scales
    return group.penalised


def held_members(group: ChannelGroup, penalty: Penalty) -> tuple[Member, ...]:
    """The members that stay at zero once the channel has died: the penalised ones, and with a scale its shift.

    A shift alone makes a constant, which layers that pad can only be given by a channel that carries it.
    """
    if penalty == "scale_l1" and not group.bypass:
        return group.scales + group.shifts
    return group.penalised


def distances_to_zero(held: OwnedWeights, tensors: Mapping[str, Tensor], penalty: Penalty) -> Tensor:
    """The threshold (n,) up to which one proximal step leaves each channel alive.

    Largest absolute weight for the elementwise penalties, else the channel's Euclidean norm v. For a sparse group
    lasso with half of the threshold on each part it is 2 v / (1 + s / (v sqrt(p))), s the sum of the p absolute
    weights: of the tangent to a convex function, so a lower bound; exact if all weights but zeros are equally large.
    """
    if penalty in ELEMENTWISE:
        return held.largest(tensors)
    norms = held.norms(tensors)
    if penalty == "sparse_group_lasso":
        smallest = torch.finfo(norms.dtype).tiny
        ratio = held.absolute_sums(tensors) / (norms * held.sizes.sqrt()).clamp_min(smallest)
        norms = norms / ((1 - _ELEMENT_SHARE) + _ELEMENT_SHARE * ratio)
    return norms


def shrink_(
    held: OwnedWeights,
    tensors: Mapping[str, Tensor],
    penalty: Penalty,
    thresholds: Tensor,
    *,
    rate: Tensor | float = 1.0,
) -> None:
    """One proximal step on the penalised weights, in place.

    `thresholds` (n,) >= 0 are `rate` (a number, or (n,)) x strength x weight of each channel. A sparse group lasso
    spends half of them on single weights, divided by the square root of their number, and half on the channel as one
    vector.
    """
    if penalty in ELEMENTWISE:
        held.soften_(tensors, thresholds)
        return
    if penalty == "sparse_group_lasso":
        held.soften_(tensors, thresholds * _ELEMENT_SHARE / held.sizes.sqrt())
        thresholds = thresholds * (1 - _ELEMENT_SHARE)
    held.scale_(tensors, block_factors(penalty, held.norms(tensors), thresholds, rate))


def block_factors(penalty: Penalty, norms: Tensor, thresholds: Tensor, rate: Tensor | float) -> Tensor:
    """What a step of a penalty on whole channels multiplies those of these norms by (n,)."""
    if penalty == "group_mcp":
        return mcp_shrinkage(norms, thresholds, rate)
    return block_shrinkage(norms, thresholds)
