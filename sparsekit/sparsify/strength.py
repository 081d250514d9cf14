"""How strong a penalty is: a constant strength, or one that is steered towards a target."""

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

    With `total_steps` the phase has the parts of `shares` (by default those of `PhaseShares`); without, every step has
    the full strength. With `adaptive` > 0 channels are shrunk faster the smaller their filters were at the start, by
    (mean / norm) to this power (adaptive lasso, Zou 2006); 0 shrinks all alike. `costs` (what one channel of each group
    costs: `channel_macs`, `channel_latencies`) make zeros appear where they save most.

    With `revive` zeros are not for good: a channel that fell early, or in a noisy step, comes back when the loss pulls
    at it harder than the penalty holds it there. That needs gradients when the Sparsifier steps, and costs some passes
    over the penalised weights in every step. Behind BatchNorm and ReLU nothing comes back: with scale and shift at zero
    there is no gradient.

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

    `target` is one quantity with the share of it that is to be left: {"macs": 0.5} is half of the multiply-accumulates.
    The steps of channels that are least important for what they cost are chosen, as many as the target takes, and only
    they are shrunk, evenly, so that they are zero when the penalised part of the phase ends. Choice and strength are
    made anew a hundred times. Once the target is met the strength is 0 and the zeros are held.

    `importance` is "taylor", the channels' effect on the loss, learned from the gradients, or "magnitude", the size of
    their filters at the start. `costs` (what one channel of each group costs: `channel_macs`, `channel_latencies`)
    divide it.

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
        _check_steps(self.total_steps)

    @property
    def phase(self) -> PhaseShares:
        """The parts of the phase."""
        return self.shares


Strength = float | ConstantStrength | AutoStrength


def as_strength(strength: Strength) -> ConstantStrength | AutoStrength:
    """A number as the constant strength that it stands for. Raises InputError for anything else."""
    if isinstance(strength, (ConstantStrength, AutoStrength)):
        return strength
    return ConstantStrength(strength)


def _check_steps(total_steps: int | None) -> None:
    if total_steps is not None and total_steps < 1:
        raise InputError(f"total_steps must be at least 1, got {total_steps}")
