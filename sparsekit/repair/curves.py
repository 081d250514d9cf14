"""Loss curves of the groups of a finished model: what a cut costs, measured after the repair."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from sparsekit.options import FinishedImportance
from sparsekit.repair.channel_order import channel_order
from sparsekit.repair.held_out import HeldOut
from sparsekit.repair.statistics import InputStatistics
from sparsekit.repair.trials import Trials
from sparsekit.selection.knapsack import counts_of
from sparsekit.selection.loss_curves import LossCurve
from sparsekit.structure.groups import ChannelGroup, ChannelGroups

# A curve is measured at these shares of the group's width, rounded to what it may keep.
_SHARES = (0.8, 0.6, 0.4, 0.2)
# Near a choice a group is tried with so many of its channels more and fewer.
_REACH = 0.25


def loss_curves(
    model: nn.Module,
    groups: ChannelGroups,
    statistics: InputStatistics,
    held_out: HeldOut,
    *,
    importance: FinishedImportance = "greedy",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, LossCurve | Tensor]:
    """Measure the loss curve of each free group: the divergence from the dense model on images kept apart.

    Each group alone is masked at up to four of its widths and repaired in closed form, and the rest of the network is
    run. Its channels go in the order of `channel_order`. A residual block is tried without. A group of which nothing is
    known has infinite importance in the place of a curve: it stays. `model` is the dense model.
    """
    trials = Trials(model, groups, statistics, held_out)
    curves: dict[str, LossCurve | Tensor] = {}
    for group in _each(groups, progress):
        found = None if group.bypass else channel_order(model, group, statistics, importance)
        if group.bypass:
            order, costs = torch.zeros(1, dtype=torch.int64), torch.tensor([0.0, 1.0])
        elif found is None:
            curves[group.name] = torch.full((group.n_channels,), torch.inf)
            continue
        else:
            order, costs = found[0].cpu(), found[1].cpu()
        measured = {n: trials.loss(group, _first(order.flip(0), n)) for n in _widths(group)}
        curves[group.name] = LossCurve.through(order, costs, measured)
    return curves


def curves_around(
    trials: Trials,
    known: Mapping[str, LossCurve | Tensor],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, LossCurve | Tensor]:
    """Return the means of the known curves and of those measured again with the other groups cut as in the trials.

    Cuts add up to more than each costs alone. Where the others are cut half as far as they will be, a curve says what a
    group costs then; alone it is steep where the others happen to be narrow.
    """
    curves = dict(known)
    for group in _each(trials.groups, progress):
        before = known[group.name]
        if isinstance(before, LossCurve) and not trials.is_bypassed(group):
            whole = trials.loss(group, torch.ones(group.n_channels, dtype=torch.bool))
            if not math.isfinite(whole):
                continue
            measured = {n: trials.loss(group, _first(before.order, n)) - whole for n in _widths(group)}
            shape = torch.from_numpy(before.losses[::-1].copy())
            again = LossCurve.through(before.order.flip(0), shape, measured)
            curves[group.name] = before.mean_with(again)
    return curves


def curves_near(
    trials: Trials,
    known: Mapping[str, LossCurve | Tensor],
    *,
    reach: float = _REACH,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, LossCurve | Tensor]:
    """Measure the curves again near the widths of the trials' base: `reach` of each group's channels more and fewer.

    They are good for one step from there: they forbid widths beyond, and residual blocks stay as they are.
    """
    curves = dict(known)
    for group in _each(trials.groups, progress):
        before = known[group.name]
        if not isinstance(before, LossCurve):
            continue
        now, order = int(trials.base[group.name].sum()), before.order
        # Blocks stay, and no fewer channels than now; what is out costs nothing to leave out.
        if group.bypass or trials.is_bypassed(group):
            curves[group.name] = LossCurve.near(order, {now: 0.0})
        else:
            step = max(int(reach * group.n_channels), 1)
            allowed = [int(n) for n in counts_of(group)]
            fewer = max((n for n in allowed if n <= now - step), default=min(allowed))
            more = min((n for n in allowed if n >= now + step), default=max(allowed))
            losses = {n: trials.loss(group, _first(order, n)) for n in {fewer, more} - {now}}
            curves[group.name] = LossCurve.near(order, {now: trials.base_loss, **losses})
    return curves


def _each(groups: ChannelGroups, progress: Callable[[int, int], None] | None) -> Iterator[ChannelGroup]:
    for number, group in enumerate(groups.free):
        if progress is not None:
            progress(number, len(groups.free))
        yield group
    if progress is not None:
        progress(len(groups.free), len(groups.free))


def _first(order: Tensor, count: int) -> Tensor:
    """A mask that keeps the first channels of an order."""
    mask = torch.zeros(len(order), dtype=torch.bool)
    mask[order[:count]] = True
    return mask


def _widths(group: ChannelGroup) -> list[int]:
    """List at how many channels left a group is measured, from many to few; residual blocks at 0."""
    allowed = [int(n) for n in counts_of(group)][:-1]
    if not allowed:
        return []
    wanted = [share * group.n_channels for share in _SHARES]
    distances = abs(np.array(allowed)[:, None] - np.array(wanted)[None])
    return sorted({allowed[i] for i in distances.argmin(0)}, reverse=True)
