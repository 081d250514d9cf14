"""One threshold of importance for all groups, found by bisection so that the share of one quantity is met.

It is fast, so the automatic strength can choose again and again while importance changes. `knapsack` takes longer,
keeps more importance, and takes several limits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from sparsekit.errors import InputError
from sparsekit.options import Quantity
from sparsekit.selection.costs import CostModel
from sparsekit.structure.groups import ChannelGroups, Rounding
from sparsekit.structure.masks import Masks, Scores


def over_group_mean(importance: Scores) -> Scores:
    """Divide importance by the mean over its group's channels that are not zero, so that groups compare."""
    return {
        name: values / values[values > 0].mean() if bool((values > 0).any()) else values
        for name, values in importance.items()
    }


def relative_importance(importance: Scores) -> Scores:
    """Return (importance / mean of its group)^2, comparable across groups; 0 for zeros."""
    return {name: values.clamp_min(0).square() for name, values in over_group_mean(importance).items()}


def step_importance(importance: Scores, rounding: Mapping[str, Rounding]) -> Scores:
    """Return for each channel the mean importance of its step; infinite for steps that stay in any case.

    A cut keeps whole steps, so a channel that goes alone saves nothing. Steps are counted from the most important
    channel of a group down. Each has `multiple` channels (the last may have fewer); `least` channels stay.
    """
    found = {}
    for name, values in importance.items():
        multiple, least = rounding[name].multiple, rounding[name].least
        order = values.argsort(descending=True, stable=True)
        ordered = values[order]
        full = len(values) // multiple * multiple
        whole, rest = ordered[:full], ordered[full:]
        means = [whole.view(-1, multiple).mean(1).repeat_interleave(multiple)]
        if len(rest):
            means.append(rest.mean().expand(len(rest)))
        found[name] = torch.empty_like(values)
        found[name][order] = torch.cat(means)
        found[name][order[: -(-least // multiple) * multiple]] = torch.inf
    return found


def threshold_for_share(
    costs: CostModel,
    groups: ChannelGroups,
    importance: Scores,
    target: Mapping[Quantity, float],
    finish: Callable[[Masks], Masks],
) -> float:
    """Return the smallest threshold such that keeping all channels of more importance meets the target.

    `importance` is comparable across groups, `target` is one quantity with its share, `finish` rounds masks as the cut
    will. The cost falls as the threshold rises, so bisection finds it. Raises InputError if no threshold meets the
    target.
    """
    ((quantity, wanted),) = target.items()

    def share_at(threshold: float) -> float:
        return costs.share(quantity, finish(kept_above(importance, threshold)))

    # At -inf nothing goes: a target that the whole model meets costs no channel.
    thresholds: list[float] = [
        -math.inf,
        *sorted({v for values in importance.values() for v in values.tolist()}),
    ]
    least = share_at(thresholds[-1])
    if least > wanted:
        raise InputError(
            f"a target of {quantity} {wanted} is out of reach: keeping the fewest channels allowed leaves "
            f"{least:.3f}. {_frozen_note(groups)} Raise the target, lower min_channels or round_to."
        )
    low, high = -1, len(thresholds) - 1  # share_at(thresholds[high]) meets the target throughout
    while high - low > 1:
        middle = (low + high) // 2
        if share_at(thresholds[middle]) <= wanted:
            high = middle
        else:
            low = middle
    return thresholds[high]


def kept_above(importance: Scores, threshold: float) -> Masks:
    """Return keep-masks of the channels whose importance is above the threshold."""
    return {name: values > threshold for name, values in importance.items()}


def _frozen_note(groups: ChannelGroups) -> str:
    frozen = [group for group in groups if group.frozen]
    return f"{len(frozen)} of {len(groups)} groups are frozen." if frozen else ""
