"""What is asked of a finished model: a speed, shares to keep, or both; and whether they are within reach."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from sparsekit.errors import InputError
from sparsekit.options import Quantity
from sparsekit.selection.importance import all_alike
from sparsekit.selection.knapsack import Knapsack
from sparsekit.structure.groups import ChannelGroups


@dataclass(frozen=True)
class Speed:
    """The speed asked for: a speed-up, a latency, or none."""

    speedup: float | None
    latency_ms: float | None

    @property
    def asked(self) -> bool:
        return self.speedup is not None or self.latency_ms is not None

    def over(self, groups: ChannelGroups) -> float:
        """Return the speed-up over the dense model, as its layers were measured."""
        dense_ms = sum(layer.ms or 0.0 for layer in groups.layers)
        return self.speedup or dense_ms / (self.latency_ms or dense_ms)

    def limit(self, groups: ChannelGroups) -> dict[Quantity, float]:
        """Return the share of the latency to keep; nothing if no speed is asked for."""
        return {"latency": min(1 / self.over(groups), 1.0)} if self.asked else {}


def checked_targets(
    speed: Speed, keep: Mapping[Quantity, float] | None, seconds: float, steps: int | None
) -> dict[Quantity, float]:
    if keep is not None and not isinstance(keep, Mapping):
        raise InputError(f"keep must be fractions by quantity, such as {{'macs': 0.5}}, got {keep!r}")
    for name, number in (
        ("speedup", speed.speedup),
        ("latency_ms", speed.latency_ms),
        ("distill_seconds", seconds),
    ):
        if number is None and name != "distill_seconds":
            continue
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise InputError(f"{name} must be a number, got {number!r}")
    limits = dict(keep or {})
    allowed = [quantity for quantity in get_args(Quantity) if quantity != "latency"]
    if not speed.asked and not limits:
        raise InputError("there is no target: give speedup, latency_ms or keep, such as keep={'macs': 0.5}")
    if speed.speedup is not None and speed.latency_ms is not None:
        raise InputError("give one of speedup and latency_ms, got both")
    for name, value in (("speedup", speed.speedup), ("latency_ms", speed.latency_ms)):
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{name} must be a finite number > 0, got {value}")
    if speed.speedup is not None and speed.speedup <= 1:
        raise InputError(f"speedup {speed.speedup:g} is met already: it must be above 1")
    for quantity, share in limits.items():
        if quantity not in allowed or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise InputError(
                f"keep must be fractions in (0, 1] of {', '.join(allowed)}, got {quantity}: {share}"
            )
    if not seconds >= 0 or (steps is not None and steps < 0):
        raise InputError(
            f"distill_seconds and distill_steps must be >= 0, got {seconds} and {steps}; 0 leaves that step out"
        )
    if math.isinf(seconds) and steps is None:
        raise InputError("distill_seconds is without end; give distill_steps too")
    return limits


def check_reach(groups: ChannelGroups, speed: Speed, limits: Mapping[Quantity, float]) -> None:
    """Refuse targets that are met already or out of reach, before minutes are spent on them."""
    smallest = Knapsack(groups, all_alike(groups))
    smallest.under(limits)
    if not speed.asked:
        return
    asked, dense_ms = speed.over(groups), sum(layer.ms or 0.0 for layer in groups.layers)
    if asked <= 1:
        raise InputError(
            f"latency_ms {speed.latency_ms:g} is met already: the dense model takes {dense_ms:.3g} ms in ONNX Runtime"
        )
    most = 1 / smallest.least("latency")
    # Predictions are a few per cent off, so only a speed-up far beyond is refused.
    if asked > 1.1 * most:
        raise InputError(
            f"a speed-up of {asked:.3g} is out of reach: with the fewest channels allowed it is predicted to be about "
            f"{most:.3g}; ask for less, or lower min_channels or round_to"
        )
