"""Keep-masks from exact zeros, from a threshold, from a gap, or from a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import get_args

import torch
from torch import nn

from sparsekit.errors import InputError
from sparsekit.options import MaskMethod, Quantity
from sparsekit.selection.bisection import (
    kept_above,
    over_group_mean,
    relative_importance,
    step_importance,
    threshold_for_share,
)
from sparsekit.selection.carriers import keep_carriers
from sparsekit.selection.costs import CostModel
from sparsekit.selection.importance import filter_norms, zero_channels
from sparsekit.selection.rounding import round_up
from sparsekit.structure.groups import ChannelGroups, Rounding
from sparsekit.structure.masks import Masks, Scores

# A gap in the sorted logarithms has to be this wide, and to remove a share of the channels between these.
_SMALLEST_GAP_DECADES = 0.5
_GAP_REMOVES = (0.01, 0.95)


def keep_masks(
    model: nn.Module,
    groups: ChannelGroups,
    *,
    method: MaskMethod = "auto",
    threshold: float | None = None,
    relative: bool = True,
    target: Mapping[Quantity, float] | None = None,
    importance: Scores | None = None,
) -> Masks:
    """Return a keep-mask (bool (n_channels,), True = keep) for every free group.

    `importance` (n_channels,) of each free group ranks its channels; by default it is the norm of their filters
    (`sparsekit.importance` weighs that by MACs). Groups of infinite importance keep all channels that are not zero. The
    methods:

    - "zeros" removes channels whose penalised weights are all exactly 0.
    - "threshold" removes those whose importance is below `threshold` (times the group's largest, if `relative`).
    - "gap" removes those below the largest gap in the logarithms of importance, if it spans half a decade.
    - "budget" removes the steps of channels with the lowest mean of (importance / mean of the group)^2 until at most
      the share `target`, such as {"macs": 0.5}, is left ("latency" needs groups from `measure_layers`).
    - "auto" removes exact zeros, then more until `target` is met if one is given. Without zeros and target it takes the
      gap.

    The number kept is rounded up to the group's `rounding`: the most important of the removed channels come back. So
    does a channel that has to carry the constants of others (`keep_carriers`).
    Raises InputError for a method without what it needs, an unknown quantity, or a target out of reach.
    """
    if method not in get_args(MaskMethod):
        raise InputError(f"method must be one of {', '.join(get_args(MaskMethod))}, got {method!r}")
    check_target(groups, target)
    masks = _chosen(model, groups, method, threshold, relative, target, importance)
    return keep_carriers(model, groups, masks)


def _chosen(
    model: nn.Module,
    groups: ChannelGroups,
    method: MaskMethod,
    threshold: float | None,
    relative: bool,
    target: Mapping[Quantity, float] | None,
    importance: Scores | None,
) -> Masks:
    """The masks by themselves, without carriers."""
    zeros = zero_channels(model, groups)
    given = filter_norms(model, groups) if importance is None else _checked(groups, importance)
    # Exact zeros rank below everything else, whatever their filters are.
    ranked = {name: torch.where(dead, -1.0, given[name]) for name, dead in zeros.items()}

    rounding = {group.name: group.rounding for group in groups.free}
    # Nothing ranks residual blocks, which have no filters, and groups of infinite importance: of these only zeros go.
    unranked = {
        group.name: zeros[group.name]
        for group in groups.free
        if group.bypass or not bool(ranked[group.name].isfinite().all())
    }
    for name, dead in unranked.items():
        least = max(int((~dead).sum()), 0 if groups[name].bypass else rounding[name].least)
        rounding[name] = replace(rounding[name], least=least)
        ranked[name] = torch.where(dead, -1.0, 1.0).double()

    def finish(masks: Masks) -> Masks:
        return {name: round_up(masks[name], ranked[name], rounding[name]) for name in rounding}

    without_zeros = finish({name: ~dead for name, dead in zeros.items()})
    if method == "zeros":
        return without_zeros
    if method == "threshold":
        if threshold is None:
            raise InputError("the mask method 'threshold' needs a threshold >= 0, got none")
        return finish(_above(ranked, threshold, relative))
    if method == "gap":
        return finish(_above_gap(ranked, unranked))
    if method == "budget" and not target:
        raise InputError("the mask method 'budget' needs a target such as {'macs': 0.5}, got none")
    if target:
        start = without_zeros if method == "auto" else None
        return _within_budget(groups, ranked, target, finish, start, rounding)
    some = any(bool(dead.any()) for dead in zeros.values())
    return without_zeros if some else finish(_above_gap(ranked, unranked))


def check_target(groups: ChannelGroups, target: Mapping[Quantity, float] | None) -> None:
    """Raise InputError for a target that is not one quantity, or a latency that was not measured."""
    if target and (len(target) != 1 or not set(target) <= set(get_args(Quantity))):
        raise InputError(
            f"target must name one of {', '.join(get_args(Quantity))} with its share, got {dict(target)}"
        )
    if target and "latency" in target and any(layer.ms is None for layer in groups.layers):
        raise InputError(
            "a target of latency needs the layers' latencies; take the groups that sparsekit.measure_layers returns"
        )


def _checked(groups: ChannelGroups, importance: Scores) -> Scores:
    """Return importance in float64, on the CPU. Raises InputError if it is of other groups."""
    for group in groups.free:
        values = importance.get(group.name)
        if values is None or values.shape != (group.n_channels,):
            got = "none" if values is None else f"shape {tuple(values.shape)}"
            raise InputError(
                f"importance must be {group.n_channels} numbers for the group {group.name}, got {got}; make it of the "
                "same groups"
            )
    return {name: values.detach().double().cpu() for name, values in importance.items()}


def _above(ranked: Scores, threshold: float, relative: bool) -> Masks:
    return {
        name: values >= (threshold * float(values.max().clamp_min(0)) if relative else threshold)
        for name, values in ranked.items()
    }


def _above_gap(ranked: Scores, unranked: Masks) -> Masks:
    """Keep all above the widest gap in the sorted log10 of importance, or everything if there is no clear gap.

    Of the groups that nothing ranks (`unranked`, True = zero), the channels that are not zero stay.
    """
    normalised = {name: values for name, values in over_group_mean(ranked).items() if name not in unranked}
    keep_all = {name: torch.ones_like(values, dtype=torch.bool) for name, values in ranked.items()}
    keep_all |= {name: ~dead for name, dead in unranked.items()}
    if not normalised:
        return keep_all
    logs = torch.cat([values.clamp_min(1e-12).log10() for values in normalised.values()]).sort().values
    n = len(logs)
    first, last = max(int(_GAP_REMOVES[0] * n), 1), max(int(_GAP_REMOVES[1] * n), 1)
    gaps = (logs[1:] - logs[:-1])[first - 1 : last]
    if not len(gaps) or float(gaps.max()) < _SMALLEST_GAP_DECADES:
        return keep_all
    below = first - 1 + int(gaps.argmax())
    middle = float(logs[below] + logs[below + 1]) / 2
    return keep_all | {n: values.clamp_min(1e-12).log10() > middle for n, values in normalised.items()}


def _within_budget(
    groups: ChannelGroups,
    ranked: Scores,
    target: Mapping[Quantity, float],
    finish: Callable[[Masks], Masks],
    start: Masks | None,
    rounding: Mapping[str, Rounding],
) -> Masks:
    """Return the masks of the smallest global threshold that meets the target, or `start` if it does already."""
    ((quantity, wanted),) = target.items()
    costs = CostModel(groups)
    if start is not None and costs.share(quantity, start) <= wanted:
        return start
    importance = step_importance(relative_importance(ranked), rounding)
    threshold = threshold_for_share(costs, groups, importance, target, finish)
    return finish(kept_above(importance, threshold))
