"""Which channels stay: keep-masks from exact zeros, from a threshold, from a gap, or from a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import get_args

import torch
from torch import nn

from sparsekit.errors import InputError
from sparsekit.options import Method, Quantity
from sparsekit.selection.costs import kept_share
from sparsekit.selection.importance import channel_scores, zero_channels
from sparsekit.selection.rounding import round_up
from sparsekit.selection.threshold import (
    block_worth,
    budget_threshold,
    over_group_mean,
    ranked_above,
    relative_worth,
)
from sparsekit.structure.groups import ChannelGroups
from sparsekit.structure.masks import Masks

# A gap in the sorted log-norms counts as one when it spans half a decade and splits off a sensible share.
_SMALLEST_GAP_DECADES = 0.5
_GAP_REMOVES = (0.01, 0.95)


def keep_masks(
    model: nn.Module,
    groups: ChannelGroups,
    *,
    method: Method = "auto",
    threshold: float | None = None,
    relative: bool = True,
    target: Mapping[Quantity, float] | None = None,
    round_to: int = 1,
    min_channels: int = 1,
) -> Masks:
    """Keep-mask (bool (n_channels,), True = keep) for every free group.

    "zeros" removes channels whose penalised weights are all exactly 0. "threshold" removes those with a score
    below `threshold` (times the group's largest score if `relative`). "gap" removes what lies below the largest
    gap in the log-scores, if it spans half a decade. "budget" removes the blocks of `round_to` channels with the
    lowest mean of (score / mean score of the group)^2 until at most the share `target`, for example {"macs": 0.5},
    is left ("latency" needs groups that `measure_layers` has measured). "auto" takes exact zeros,
    then lowers what is left to `target` if one is given; without zeros and target it takes the gap.

    The number kept is rounded up to a multiple of `round_to`, the best of the removed coming back, and never
    falls below `min_channels` (or the group's size). Raises InputError for a method without what it needs, an
    unknown quantity, or a target out of reach.
    """
    check_target(groups, target)
    scores = channel_scores(model, groups)
    zeros = zero_channels(model, groups)
    # Exact zeros rank below everything else, whatever their rows (which no gradient has moved since) say.
    ranks = {name: torch.where(zeros[name], -1.0, score) for name, score in scores.items()}

    rounding = {group.name: group.rounding(round_to, min_channels) for group in groups.free}
    # Whole blocks have no score. Those whose scales are zero go, whatever the method; the others stay.
    blocks = {group.name: zeros[group.name] for group in groups.free if group.bypass}
    for name, dead in blocks.items():
        rounding[name] = (1, 0 if bool(dead) else 1)
        ranks[name] = torch.where(dead, -1.0, 1.0).double()

    def finish(masks: Masks) -> Masks:
        return {name: round_up(masks[name], ranks[name], *rounding[name]) for name in rounding}

    without_zeros = finish({name: ~dead for name, dead in zeros.items()})
    if method == "zeros":
        return without_zeros
    if method == "threshold":
        if threshold is None:
            raise InputError("the mask method 'threshold' needs a threshold >= 0, got none")
        return finish(_above(ranks, threshold, relative))
    if method == "gap":
        return finish(_above_gap(ranks, blocks))
    if method == "budget" and not target:
        raise InputError("the mask method 'budget' needs a target such as {'macs': 0.5}, got none")
    if target:
        start = without_zeros if method == "auto" else None
        return _within_budget(groups, ranks, target, finish, start, rounding)
    some = any(bool(dead.any()) for dead in zeros.values())
    return without_zeros if some else finish(_above_gap(ranks, blocks))


def check_target(groups: ChannelGroups, target: Mapping[Quantity, float] | None) -> None:
    """Raises InputError for a target that names no quantity, several, or one that was not measured."""
    if target and (len(target) != 1 or not set(target) <= set(get_args(Quantity))):
        raise InputError(
            f"target must name one of {', '.join(get_args(Quantity))} with its share, got {dict(target)}"
        )
    if target and "latency" in target and any(layer.ms is None for layer in groups.layers):
        raise InputError(
            "a target of latency needs the layers' latencies; take the groups that sparsekit.measure_layers returns"
        )


def _above(ranks: Masks, threshold: float, relative: bool) -> Masks:
    return {
        name: rank >= (threshold * float(rank.max().clamp_min(0)) if relative else threshold)
        for name, rank in ranks.items()
    }


def _above_gap(ranks: Masks, blocks: Masks) -> Masks:
    """Everything above the widest gap in the sorted log10 scores; everything if there is no clear gap.

    Of `blocks` (True = all zero), which have no scores, those that are not zero.
    """
    normalised = {name: rank for name, rank in over_group_mean(ranks).items() if name not in blocks}
    keep_all = {name: torch.ones_like(rank, dtype=torch.bool) for name, rank in ranks.items()}
    keep_all |= {name: ~dead for name, dead in blocks.items()}
    if not normalised:
        return keep_all
    logs = torch.cat([rank.clamp_min(1e-12).log10() for rank in normalised.values()]).sort().values
    n = len(logs)
    first, last = max(int(_GAP_REMOVES[0] * n), 1), max(int(_GAP_REMOVES[1] * n), 1)
    gaps = (logs[1:] - logs[:-1])[first - 1 : last]
    if not len(gaps) or float(gaps.max()) < _SMALLEST_GAP_DECADES:
        return keep_all
    below = first - 1 + int(gaps.argmax())
    cut = float(logs[below] + logs[below + 1]) / 2
    return keep_all | {name: rank.clamp_min(1e-12).log10() > cut for name, rank in normalised.items()}


def _within_budget(
    groups: ChannelGroups,
    ranks: Masks,
    target: Mapping[Quantity, float],
    finish: Callable[[Masks], Masks],
    start: Masks | None,
    rounding: Mapping[str, tuple[int, int]],
) -> Masks:
    """The masks of the smallest global threshold that meets the target, or `start` if that meets it already."""
    ((quantity, wanted),) = target.items()
    if start is not None and getattr(kept_share(groups, start), quantity) <= wanted:
        return start
    worth = block_worth(relative_worth(ranks), rounding)
    cut = budget_threshold(groups, worth, target, finish)
    return finish(ranked_above(worth, cut))
