"""One threshold for all groups, found so that a share is met."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from sparsekit.errors import InputError
from sparsekit.options import Quantity
from sparsekit.selection.costs import kept_share
from sparsekit.structure.groups import ChannelGroup, ChannelGroups
from sparsekit.structure.masks import Masks


def over_group_mean(ranks: Masks) -> Masks:
    """Scores divided by their group's mean over live channels, so that groups can be ranked together."""
    return {
        name: rank / rank[rank > 0].mean() if bool((rank > 0).any()) else rank for name, rank in ranks.items()
    }


def relative_worth(ranks: Masks) -> Masks:
    """Squared scores over their group's mean, so that groups can be ranked together; 0 for zeros."""
    return {name: rank.clamp_min(0).square() for name, rank in over_group_mean(ranks).items()}


def block_worth(worth: Masks, rounding: Mapping[str, tuple[int, int]]) -> Masks:
    """For each channel the mean worth of its block; infinite for blocks that stay in any case.

    A cut keeps whole blocks of channels, so one that goes alone saves nothing. Blocks are counted from the most
    valuable channel of a group down and have as many channels as `rounding`'s first number (the last may have fewer);
    at least as many as its second stay.
    """
    ranked = {}
    for name, values in worth.items():
        multiple, least = rounding[name]
        order = values.argsort(descending=True, stable=True)
        sorted_values = values[order]
        full = len(values) // multiple * multiple
        whole, rest = sorted_values[:full], sorted_values[full:]
        means = [whole.view(-1, multiple).mean(1).repeat_interleave(multiple)]
        if len(rest):
            means.append(rest.mean().expand(len(rest)))
        ranked[name] = torch.empty_like(values)
        ranked[name][order] = torch.cat(means)
        ranked[name][order[: -(-least // multiple) * multiple]] = torch.inf
    return ranked


def budget_threshold(
    groups: ChannelGroups, ranks: Masks, target: Mapping[Quantity, float], finish: Callable[[Masks], Masks]
) -> float:
    """The smallest number such that keeping every channel ranked above it meets the target.

    `ranks` are comparable across groups; `finish` rounds masks as the cut will. The cost falls as the threshold
    rises, so bisection over the ranks finds it. Raises InputError if even the largest does not meet the target.
    """
    ((quantity, wanted),) = target.items()

    def share_at(cut: float) -> float:
        return float(getattr(kept_share(groups, finish(ranked_above(ranks, cut))), quantity))

    # Below the lowest rank nothing goes: a target that the whole model meets costs no channel.
    cuts: list[float] = [-math.inf, *sorted({cut for rank in ranks.values() for cut in rank.tolist()})]
    least = share_at(cuts[-1])
    if least > wanted:
        raise InputError(
            f"a target of {quantity} {wanted} is out of reach: keeping the fewest channels allowed leaves "
            f"{least:.3f}. {_limits(groups.groups)} Raise the target, lower min_channels or round_to."
        )
    low, high = -1, len(cuts) - 1  # share_at(cuts[high]) meets the target throughout
    while high - low > 1:
        middle = (low + high) // 2
        if share_at(cuts[middle]) <= wanted:
            high = middle
        else:
            low = middle
    return cuts[high]


def ranked_above(ranks: Masks, cut: float) -> Masks:
    return {name: rank > cut for name, rank in ranks.items()}


def _limits(groups: tuple[ChannelGroup, ...]) -> str:
    frozen = [group for group in groups if group.frozen]
    return f"{len(frozen)} of {len(groups)} groups are frozen." if frozen else ""
