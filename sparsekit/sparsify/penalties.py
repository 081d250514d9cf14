"""The penalties. Each is a pair: the weights of a channel that it acts on, and the proximal map that shrinks them.

    penalty             weights of a channel                    proximal map
    group_lasso         all that make it, as one vector         block soft threshold
    l1                  all that make it, one by one            soft threshold
    scale_l1            its BatchNorm scales, one by one        soft threshold
    sparse_group_lasso  all that make it                        soft threshold, then block soft threshold
    group_mcp           all that make it, as one vector         that of MCP: far from zero nothing shrinks

The weights that make a channel are its `ChannelGroup.penalised` members: the scale and shift of a BatchNorm that
follows, because the size of the filter means nothing then, else filter and bias.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsekit.options import Penalty
from sparsekit.sparsify.channel_vectors import OwnedWeights
from sparsekit.sparsify.prox import block_shrinkage, mcp_shrinkage
from sparsekit.structure.groups import ChannelGroup, Member

# Penalties that act on single weights, so that the number of a channel's weights does not matter.
ELEMENTWISE: tuple[Penalty, ...] = ("l1", "scale_l1")
# Penalties whose map multiplies each channel by a number.
BLOCKWISE: tuple[Penalty, ...] = ("group_lasso", "group_mcp")
# The share of a sparse group lasso's threshold that acts on single weights.
_ELEMENT_SHARE = 0.5


def penalised_members(group: ChannelGroup, penalty: Penalty) -> tuple[Member, ...]:
    """Return the members of a group that the penalty shrinks; none if the group has no weights for it."""
    if penalty == "scale_l1" and not group.bypass:  # the penalised weights of a residual block are scales
        return group.scales
    return group.penalised


def held_members(group: ChannelGroup, penalty: Penalty) -> tuple[Member, ...]:
    """Return the members that stay at zero once a channel has died: the penalised ones, and with a scale its shift.

    A shift alone would make the channel a constant, and a padded layer needs another channel that carries it.
    """
    if penalty == "scale_l1" and not group.bypass:
        return group.scales + group.shifts
    return group.penalised


def distances_to_zero(shrunk: OwnedWeights, tensors: Mapping[str, Tensor], penalty: Penalty) -> Tensor:
    """Return the threshold (n,) up to which one proximal step leaves each channel alive.

    It is the largest absolute weight for an elementwise penalty, else the channel's Euclidean norm v. For a sparse
    group lasso it is 2 v / (1 + s / (v sqrt(p))), with s the sum of the p absolute weights. That is a lower bound, the
    zero of a tangent to a convex function, and exact if all weights that are not 0 are equally large.
    """
    if penalty in ELEMENTWISE:
        return shrunk.largest(tensors)
    norms = shrunk.norms(tensors)
    if penalty == "sparse_group_lasso":
        smallest = torch.finfo(norms.dtype).tiny
        ratio = shrunk.absolute_sums(tensors) / (norms * shrunk.sizes.sqrt()).clamp_min(smallest)
        norms = norms / ((1 - _ELEMENT_SHARE) + _ELEMENT_SHARE * ratio)
    return norms


def shrink_(
    shrunk: OwnedWeights,
    tensors: Mapping[str, Tensor],
    penalty: Penalty,
    thresholds: Tensor,
    *,
    rate: Tensor | float = 1.0,
) -> None:
    """Take one proximal step on the shrunk weights, in place.

    `thresholds` (n,) >= 0 are rate x strength x multiplier of each channel; `rate` is a number or (n,). A sparse group
    lasso spends half of each threshold on single weights, divided by the square root of their number, and half on the
    channel as one vector.
    """
    if penalty in ELEMENTWISE:
        shrunk.soften_(tensors, thresholds)
        return
    if penalty == "sparse_group_lasso":
        shrunk.soften_(tensors, thresholds * _ELEMENT_SHARE / shrunk.sizes.sqrt())
        thresholds = thresholds * (1 - _ELEMENT_SHARE)
    shrunk.scale_(tensors, block_factors(penalty, shrunk.norms(tensors), thresholds, rate))


def block_factors(penalty: Penalty, norms: Tensor, thresholds: Tensor, rate: Tensor | float) -> Tensor:
    """Return the factors (n,) by which a penalty on whole channels multiplies channels of these norms."""
    if penalty == "group_mcp":
        return mcp_shrinkage(norms, thresholds, rate)
    return block_shrinkage(norms, thresholds)
