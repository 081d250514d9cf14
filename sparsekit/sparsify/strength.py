"""The strength of a penalty: a constant one, or one that is steered towards a target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from sparsekit.errors import InputError
from sparsekit.options import LearnedImportance, Quantity
from sparsekit.sparsify.schedules import PhaseShares


@dataclass(frozen=True)
class ConstantStrength:
    """A strength that is a number.

    - `total_steps`: with it the phase has the parts of `shares`, by default those of `PhaseShares`. Without it every
      step has the full strength.
    - `adaptive` > 0 shrinks channels by (mean / norm)^adaptive of their filters at the start, so small ones die first
      (adaptive lasso, Zou 2006). 0 shrinks all alike.
    - `costs` of one channel of each group (`channel_macs`, `channel_latencies`) make zeros appear where they save most.
    - `revive` lets a channel at zero come back when the loss pulls at it harder than the penalty. It needs gradients
      when the Sparsifier steps, and some passes over the penalised weights. Where BatchNorm and ReLU follow nothing
      comes back: with scale and shift at zero there is no gradient.

    Raises InputError for a value that is not a finite number >= 0, or fewer than one step.
    """

    value: float
    total_steps: int | None = None
    shares: PhaseShares | None = None
    adaptive: float = 2.0
    costs: Mapping[str, float] | None = None
    revive: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.value, (int, float)) and 0 <= self.value < math.inf):
            raise InputError(
                f"strength must be a finite number >= 0, a ConstantStrength or an AutoStrength, got {self.value!r}"
            )
        _check_steps(self.total_steps)

    @property
    def phase(self) -> PhaseShares:
        """The parts of the phase."""
        return self.shares or (PhaseShares() if self.total_steps else PhaseShares(0.0, 0.0, 0.0))


@dataclass(frozen=True)
class AutoStrength:
    """A strength that is steered so that `target` is met by the end of a phase of `total_steps` optimizer steps.

    Only the steps of channels with the least importance for their cost are shrunk, as many as the target takes, so that
    they are zero when the penalised part of the phase ends. Choice and strength are decided anew a hundred times. Once
    the target is met the strength is 0 and the zeros are held.

    - `target` is one quantity with the share of it that is to be left: {"macs": 0.5} leaves half of the MACs.
    - `importance` is "taylor", the effect on the loss, learned from the gradients, or "magnitude", the size of the
      filters at the start.
    - `costs` of one channel of each group (`channel_macs`, `channel_latencies`) divide the importance.

    Raises InputError for other quantities, no target, or fewer than one step.
    """

    target: Mapping[Quantity, float]
    total_steps: int
    shares: PhaseShares = field(default_factory=PhaseShares)
    importance: LearnedImportance = "taylor"
    costs: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if not self.target:
            raise InputError("AutoStrength needs a target such as {'macs': 0.5}, got none")
        if self.importance not in get_args(LearnedImportance):
            names = ", ".join(get_args(LearnedImportance))
            raise InputError(f"importance must be one of {names}, got {self.importance!r}")
        if self.total_steps is None:
            raise InputError("AutoStrength needs total_steps, the optimizer steps of the phase, got None")
        _check_steps(self.total_steps)

    @property
    def phase(self) -> PhaseShares:
        """The parts of the phase."""
        return self.shares


Strength = float | ConstantStrength | AutoStrength


def as_strength(strength: Strength) -> ConstantStrength | AutoStrength:
    """Return a strength as it is, and a number as a ConstantStrength. Raises InputError for anything else."""
    if isinstance(strength, (ConstantStrength, AutoStrength)):
        return strength
    return ConstantStrength(strength)


def _check_steps(total_steps: int | None) -> None:
    if total_steps is not None and total_steps < 1:
        raise InputError(f"total_steps must be at least 1, got {total_steps}")
