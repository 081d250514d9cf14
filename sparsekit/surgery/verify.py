"""Prove a cut: the masked and the cut model give the same outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from sparsekit.errors import VerificationError, first_line
from sparsekit.evaluation import Arguments, comparing, copied, flat_tensors
from sparsekit.structure.inputs import InputSpec
from sparsekit.structure.plan import PrunePlan
from sparsekit.surgery.mask import mask_model
from sparsekit.surgery.unstable_outputs import largest_difference_of_layers

# An output that is smaller than this share of the largest one is taken for that large: it may be rounding alone.
_SMALLEST_SCALE = 1e-6


@dataclass(frozen=True)
class Agreement:
    """How far two models' outputs are apart: the largest absolute difference, and the largest absolute value.

    Of several outputs both are of the one that differs most for its size: boxes in pixels must not hide scores.
    """

    max_abs: float
    scale: float

    @property
    def max_rel(self) -> float:
        """`max_abs` relative to the largest value of that output."""
        return self.max_abs / self.scale if self.scale > 0 else self.max_abs


def verify_cut(model: nn.Module, pruned: nn.Module, plan: PrunePlan, *, tolerance: float = 1e-4) -> Agreement:
    """Prove that the masked and the cut model agree within `tolerance`, each output relative to its largest value.

    If they do not, they are compared in float64: some networks amplify rounding, and a wrong index stays wrong. Where
    noise of rounding size moves the outputs as much, as with a detector that sorts boxes which are as good, the layers
    are compared instead, relative to their largest outputs (`unstable_outputs`).
    Raises VerificationError if they disagree in all that, or if the cut model does not run.
    """
    masked = mask_model(model, plan)
    try:
        found, failure = _compared(masked, pruned, plan.inputs)
        if found is None or not found.max_rel <= tolerance:
            exact = _compared_in_float64(masked, pruned, plan)
            found = exact if exact is not None and exact.max_rel <= tolerance else found
        if found is None or not found.max_rel <= tolerance:
            found = _layers_compared(masked, pruned, plan, tolerance) or found
    except Exception as error:
        raise VerificationError(
            f"the cut model does not run: {first_line(error)}; nothing was written"
        ) from error
    if found is None:
        raise VerificationError(failure)
    if not found.max_rel <= tolerance:
        raise VerificationError(
            f"the cut model differs from the masked one by {found.max_abs:.3g} (largest value "
            f"{found.scale:.3g}, tolerance {tolerance:g}); nothing was written"
        )
    return found


def _compared(masked: nn.Module, pruned: nn.Module, spec: InputSpec) -> tuple[Agreement | None, str]:
    """The agreement, or None and why the outputs cannot be compared."""
    try:
        return compare_outputs(masked, pruned, spec), ""
    except VerificationError as error:
        return None, str(error)


def _layers_compared(
    masked: nn.Module, pruned: nn.Module, plan: PrunePlan, tolerance: float
) -> Agreement | None:
    """None unless the outputs jump at noise of rounding size, in each way to call the model."""
    differences = [
        largest_difference_of_layers(masked, pruned, plan, way.draw(1, masked), tolerance)
        for way in plan.inputs.ways
    ]
    jumping = [one for one in differences if one is not None]
    return Agreement(max(jumping), 1.0) if len(jumping) == len(differences) else None


def _compared_in_float64(masked: nn.Module, pruned: nn.Module, plan: PrunePlan) -> Agreement | None:
    """None if one of them does not run in float64, as where the code or the device has only float32."""
    try:
        return compare_outputs(copied(masked).double(), copied(pruned).double(), plan.inputs)
    except Exception:
        return None


def compare_outputs(
    first: nn.Module,
    second: nn.Module,
    spec: InputSpec,
    *,
    batches: tuple[int, ...] = (1, 3),
    seed: int = 0,
) -> Agreement:
    """Largest difference of two models on trial inputs of several batch sizes, in eval mode.

    Raises VerificationError if the outputs differ in number, in shape or in being finite.
    """
    found = []
    for way in spec.ways:
        for batch in batches:
            inputs = way.draw(seed + batch, first, batch)
            found.append(agreement(outputs(first, inputs), outputs(second, inputs)))
    return max(found, key=lambda one: one.max_rel)


def agreement(ours: list[Tensor], theirs: list[Tensor]) -> Agreement:
    """How far two models' outputs on the same inputs are apart, for that which differs most for its size.

    Raises VerificationError if they differ in number, in shape or in being finite.
    """
    shapes = [tuple(t.shape) for t in ours], [tuple(t.shape) for t in theirs]
    if shapes[0] != shapes[1]:
        raise VerificationError(f"outputs have different shapes: {shapes[0]} and {shapes[1]}")
    pairs = [
        (_as_numbers(mine), _as_numbers(other))
        for mine, other in zip(ours, theirs, strict=True)
        if mine.numel()
    ]
    scales = [float(mine.abs().max()) for mine, _ in pairs]
    least = _SMALLEST_SCALE * max(scales, default=0.0)
    worst = Agreement(0.0, max(scales, default=0.0))
    for (mine, other), scale in zip(pairs, scales, strict=True):
        difference = float((mine - other).abs().max())
        if not math.isfinite(difference):
            raise VerificationError("an output is not a finite number")
        worst = max(worst, Agreement(difference, max(scale, least)), key=lambda one: one.max_rel)
    return worst


def _as_numbers(values: Tensor) -> Tensor:
    """Whole numbers and truth values as float64: truth values have no difference."""
    return values if values.is_floating_point() or values.is_complex() else values.double()


def outputs(model: nn.Module, inputs: Arguments) -> list[Tensor]:
    """All tensors the model returns, in eval mode and true float32."""
    with comparing(model):
        return flat_tensors(inputs.call(model))
