"""Which channels of a finished model go: by measured loss curves, judged by what the repair leaves of the outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sparsekit.errors import InputError
from sparsekit.finished.display import StepDisplay
from sparsekit.finished.preparation import Measured, Prepared, float_on_cpu
from sparsekit.finished.targets import Speed
from sparsekit.latency.search import SpeedSearch, search_speed
from sparsekit.options import Quantity
from sparsekit.repair.channel_order import order_by_gates
from sparsekit.repair.closed_form import repair_weights
from sparsekit.repair.curves import curves_around, curves_near
from sparsekit.repair.divergence import Divergence
from sparsekit.repair.trials import Trials
from sparsekit.selection.knapsack import Knapsack
from sparsekit.selection.loss_curves import LossCurve
from sparsekit.structure.masks import Masks
from sparsekit.structure.plan import make_plan
from sparsekit.surgery.cut import apply_plan

# By group, the importance of its channels or its measured loss curve.
Known = Mapping[str, Tensor | LossCurve]
Limits = Mapping[Quantity, float]
# If a choice loses more nats than these, curves are measured again near it, and half way to it as well.
_LITTLE_LOST, _MUCH_LOST = 0.05, 0.5


@dataclass(frozen=True)
class Judge:
    """Compares choices by what is left of the outputs after the cut and the repair."""

    prepared: Prepared

    def nearest(self, limits: Limits, *known: Known) -> tuple[Known, float]:
        """Return the importance whose masks leave the outputs nearest to the dense model's, and how near: the KL."""
        found = [(one, self._kl(one, limits)) for one in known]
        return min(found, key=lambda pair: pair[1])

    def _kl(self, known: Known, limits: Limits) -> float:
        try:
            return self.of(Knapsack(self.prepared.groups, known).under(limits)).kl
        except InputError:
            return math.inf

    def of(self, masks: Masks) -> Divergence:
        """Return what masks leave of the outputs, after the repair in closed form."""
        plan = make_plan(self.prepared.groups, masks)
        repaired = repair_weights(self.prepared.dense, plan, self.prepared.statistics)
        return self.prepared.held_out.of(apply_plan(repaired, plan))

    def trials(self, known: Known, limits: Limits) -> Trials:
        """Return trials around the choice under these limits."""
        one = self.prepared
        base = Knapsack(one.groups, known).under(limits)
        return Trials(one.dense, one.groups, one.statistics, one.held_out, base)


def choose_importance(measured: Measured, limits: Limits, show: StepDisplay) -> Known:
    """Return what channels are chosen by: the curves, measured again among the other cuts where much is lost."""
    prepared, curves = measured.prepared, measured.curves
    judge = Judge(prepared)
    gates = order_by_gates(prepared.groups, prepared.statistics.gates)
    # Who asks for another order is not to get that of the gates.
    offered = (curves, gates) if measured.importance == "greedy" else (curves,)
    known, kl = judge.nearest(limits, *offered)
    if _MUCH_LOST < kl < math.inf and known is curves:
        show.begin("measuring loss curves half way")
        half = {quantity: share**0.5 for quantity, share in limits.items()}
        again = curves_around(judge.trials(known, half), known, progress=show.share)
        known, kl = judge.nearest(limits, known, again)
    if _LITTLE_LOST < kl < math.inf and known is not gates:
        show.begin("measuring loss curves near the choice")
        near = curves_near(judge.trials(known, limits), known, progress=show.share)
        known, kl = judge.nearest(limits, known, near)
    return known


def choose_masks(
    known: Known, measured: Measured, speed: Speed, limits: Limits
) -> tuple[Masks, SpeedSearch | None]:
    """Return keep-masks under the limits and, if one is asked for, at the speed, with its search."""
    groups = measured.prepared.groups
    if not speed.asked:
        return Knapsack(groups, known).under(limits), None
    search = search_speed(
        float_on_cpu(measured.model),
        groups,
        known,
        measured.timed,
        speedup=speed.speedup,
        latency_ms=speed.latency_ms,
        limits=limits,
        threads=measured.threads,
    )
    return search.masks, search
