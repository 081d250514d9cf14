"""Choosing the strength so that a target is met: the shrink budget, planned anew as training goes. Pure floats."""

from __future__ import annotations


def shrink_budget_strength(distance: float, steps: float, learning_rate: float) -> float:
    """Strength at which a channel that is `distance` from zero and has no gradient dies in `steps` steps.

    Each step takes strength x learning_rate off a channel's norm in units of its weight, so
    strength = distance / (steps x learning_rate). `learning_rate` is the effective one: divided by
    (1 - momentum) for SGD with momentum. Planned anew every few steps with the steps that are left, it makes up
    for gradients that push back. Returns 0 when nothing can be shrunk.

    >>> shrink_budget_strength(distance=1.0, steps=100, learning_rate=0.1)
    0.1
    """
    reach = steps * learning_rate
    return distance / reach if reach > 0 else 0.0
