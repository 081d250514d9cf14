"""Which speed-ups to try for a budget of accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sparsekit.errors import InputError
from sparsekit.runs.arguments import Target

# The first speed-up to try where only an accuracy is asked for.
_FIRST_SPEEDUP = 2.0
# Attempts whose speed-ups (or shares) differ by less than this factor are not both trained.
_NEAREST = 1.11
_FASTER = 1.5
# The highest predicted speed-up may turn out to be out of reach, so the search stays below it.
_SAFE = 0.9


def full_target(target: Target, dense_ms: float, most: float) -> tuple[dict[str, float], float]:
    """Return the target at pressure 1, with a latency as a speed-up, and the highest pressure to try.

    `dense_ms` is the latency of the dense model, `most` the largest speed-up predicted for it. Raises InputError if
    there is nothing to search.
    """
    full = target.besides_accuracy
    if "latency_ms" in full:
        full["speedup"] = dense_ms / full.pop("latency_ms")
    if not full and _SAFE * most < _NEAREST:
        raise InputError(
            f"cut.target.max_accuracy_drop: with the fewest channels allowed the model is predicted to have a "
            f"speed-up of {most:.3g}, too little for a search; lower cut.min_channels, or free more with "
            "cut.through_layer_norm or cut.blocks"
        )
    if full and largest_factor(full) < _NEAREST:
        asked = " and ".join(f"cut.target.{key}" for key in target.besides_accuracy)
        raise InputError(
            f"{asked} ask for so little that there is nothing to search between that and the dense model; ask for "
            "more, or leave max_accuracy_drop out"
        )
    return (full, 1.0) if full else ({"speedup": _FIRST_SPEEDUP}, math.log(_SAFE * most, _FIRST_SPEEDUP))


def largest_factor(target: Mapping[str, float]) -> float:
    """Return the largest factor that a target asks for: its speed-up, or 1 / one of its shares."""
    return max(value if key == "speedup" else 1 / value for key, value in target.items())


def target_at(full: Mapping[str, float], pressure: float) -> dict[str, float]:
    """Return the speed-up and shares of `full`, raised to the pressure and rounded to four significant digits.

    Pressure 0 asks for nothing, 1 for `full`; it may be more.
    """
    return {key: float(f"{value**pressure:.4g}") for key, value in full.items()}


def next_pressure(
    tried: Sequence[tuple[float, float]], budget: float, most: float, factor: float
) -> float | None:
    """Return the next pressure to try, at most `most`; None if another one would tell nothing new.

    `tried` are pairs of pressure and drop in accuracy. The first pressure is 1. Then the speed-up grows by half as long
    as the drop is within the budget. Then comes a pressure between the largest within the budget and the smallest
    beyond it, by regula falsi kept off the ends. `factor` is the `largest_factor` of the target at pressure 1.
    """
    within, beyond = bracket(tried, budget)
    nearest, faster = (math.log(step) / math.log(factor) for step in (_NEAREST, _FASTER))
    if not tried:
        return min(1.0, most)
    if beyond is None:
        pressure = min(within[0] + faster, most)
        return pressure if pressure > within[0] else None
    (low, low_drop), (high, high_drop) = within, beyond
    if high - low <= 1.001 * nearest:
        return None
    share = (budget - low_drop) / (high_drop - low_drop)
    return low + max(min(max(share, 0.3), 0.7) * (high - low), min(nearest, (high - low) / 2))


def bracket(
    tried: Sequence[tuple[float, float]], budget: float
) -> tuple[tuple[float, float], tuple[float, float] | None]:
    """Return the pair of the largest pressure within the budget, and the next larger pair, which is beyond it.

    `tried` are pairs of pressure and drop in accuracy. At pressure 0 the drop is 0. A pressure below the first of the
    two is not counted as beyond, whatever its drop: accuracies are noisy.
    """
    within = max(((x, drop) for x, drop in tried if drop <= budget), default=(0.0, 0.0))
    beyond = min(((x, drop) for x, drop in tried if drop > budget and x > within[0]), default=None)
    return within, beyond
