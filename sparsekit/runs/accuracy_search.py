"""Which speeds to try for a budget of accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sparsekit.errors import InputError
from sparsekit.runs.arguments import Target

# What is tried first where nothing but the accuracy is asked for.
_FIRST_SPEEDUP = 2.0
# Two attempts whose speeds (or shares) are this much apart are no different worth training for.
_NEAREST = 1.11
_FASTER = 1.5
# A speed near the limit of what is predicted to be possible might turn out not to be.
_SAFE = 0.9


def full_target(target: Target, dense_ms: float, most: float) -> tuple[dict[str, float], float]:
    """The target that pressure 1 stands for, with any latency as a speed-up, and the highest pressure to try.

    `dense_ms` is what the dense model takes, `most` how many times as fast it can get. Raises InputError if that leaves
    nothing to search.
    """
    full = target.besides_accuracy
    if "latency_ms" in full:
        full["speedup"] = dense_ms / full.pop("latency_ms")
    if not full and _SAFE * most < _NEAREST:
        raise InputError(
            f"cut.target.max_accuracy_drop: with the fewest channels allowed the model is predicted to be {most:.3g} "
            "times as fast, which is not worth a search; lower cut.min_channels, or free more with "
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
    """The largest factor that a target asks for: of its speed-up, and of what its shares leave out."""
    return max(value if key == "speedup" else 1 / value for key, value in target.items())


def target_at(full: Mapping[str, float], pressure: float) -> dict[str, float]:
    """A target between nothing (pressure 0) and `full` (1), or beyond: a speed-up and shares, raised to the pressure.

    Rounded to four significant digits.
    """
    return {key: float(f"{value**pressure:.4g}") for key, value in full.items()}


def next_pressure(
    tried: Sequence[tuple[float, float]], budget: float, most: float, factor: float
) -> float | None:
    """The pressure to try after `tried` pairs of pressure and drop, up to `most`; None if no other is worth it.

    First 1; then half as fast again as long as the drop stays within the budget; then between the largest within it and
    the smallest beyond, nearer to the one whose drop is nearer to the budget (regula falsi, kept off the ends).
    `factor` is the largest of the target at pressure 1.
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
    """Of pairs of pressure and drop, the largest pressure within the budget, and the smallest beyond that which is not.

    Nothing was lost at pressure 0. A pressure below one that is within the budget is not beyond, whatever it lost:
    accuracies are noisy.
    """
    within = max(((x, drop) for x, drop in tried if drop <= budget), default=(0.0, 0.0))
    beyond = min(((x, drop) for x, drop in tried if drop > budget and x > within[0]), default=None)
    return within, beyond
