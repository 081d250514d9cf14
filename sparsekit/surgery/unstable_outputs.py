"""Compare two models layer by layer, where their outputs jump at the smallest noise.

A detector sorts its boxes and drops those that overlap. Where two of them are as good, the last digit decides which one
stays, and rounding alone changes the outputs. What lies before that choice still has to agree, and each layer behind it
has to compute the same from the same inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparsekit.evaluation import Arguments, comparing, copied, flat_tensors
from sparsekit.structure.counting import CONVOLUTIONS, TRANSPOSED
from sparsekit.structure.plan import PrunePlan
from sparsekit.surgery.constants import channel_dim

_LAYERS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
# Rounding of a sum of a few hundred products, relative to its size, in units of the last digit.
_NOISE = 16.0
# A layer whose outputs change by more than this under such noise lies behind a choice.
_STEADY = 1e-3


@dataclass(frozen=True)
class _Passed:
    """What went through a model: its outputs, and the input and output of each call of each layer, by name."""

    outputs: list[Tensor]
    calls: Mapping[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)


def largest_difference_of_layers(
    masked: nn.Module, cut: nn.Module, plan: PrunePlan, inputs: Arguments, tolerance: float
) -> float | None:
    """How far the layers of the cut model are from those of the masked one, relative to their largest output.

    None if noise of rounding size moves the outputs of the masked model by less than `tolerance`: then these decide.
    Infinite if no layer lies before the choice that makes them jump.
    """
    quiet, noisy = _pass(masked, inputs), _pass(_with_noise(masked), inputs)
    if _relative(quiet.outputs, noisy.outputs) <= tolerance:
        return None
    theirs = _pass(cut, inputs)
    rows = {(one.tensor, one.dim): one.keep for one in plan.cuts}
    modules = dict(cut.named_modules())
    steady = [
        name
        for name, calls in quiet.calls.items()
        if _relative([out for _, out in calls], [out for _, out in noisy.calls.get(name, ())]) <= _STEADY
    ]
    if not steady:
        return float("inf")
    found = [0.0]
    for name in (name for name in quiet.calls if name in modules):
        layer = modules[name]
        expected = [_kept(layer, name, rows, out, out=True) for _, out in quiet.calls[name]]
        if name in steady:
            made = [out for _, out in theirs.calls.get(name, ())]
        else:  # the same inputs for both
            made = _outputs_of(
                layer, [_kept(layer, name, rows, into, out=False) for into, _ in quiet.calls[name]]
            )
        found.append(_relative(expected, made))
    return max(found)


def _outputs_of(layer: nn.Module, read: list[Tensor]) -> list[Tensor]:
    """What a layer makes of these inputs; nothing if it does not take them."""
    try:
        with comparing(layer):
            return [layer(one) for one in read]
    except Exception:
        return []


def _pass(model: nn.Module, inputs: Arguments) -> _Passed:
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
    handles = [
        module.register_forward_hook(
            lambda m, args, out, name=name: calls.setdefault(name, []).append((args[0].clone(), out.clone()))
        )
        for name, module in model.named_modules()
        if isinstance(module, _LAYERS)
    ]
    try:
        with comparing(model):
            return _Passed(flat_tensors(inputs.call(model)), calls)
    finally:
        for handle in handles:
            handle.remove()


def _with_noise(model: nn.Module) -> nn.Module:
    """A copy whose weights are changed by a few units of their last digit."""
    noisy, generator = copied(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in noisy.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                size = _NOISE * torch.finfo(parameter.dtype).eps
                parameter.mul_((1 + size * noise).to(parameter))
    return noisy


def _kept(
    layer: nn.Module, name: str, rows: Mapping[tuple[str, int], tuple[int, ...]], values: Tensor, *, out: bool
) -> Tensor:
    """The channels of a layer's output or input that the plan keeps."""
    dim = 0 if out != isinstance(layer, TRANSPOSED) else 1
    if not out and getattr(layer, "groups", 1) > 1:
        dim = 0  # what a grouped layer reads goes with what it makes
    keep = rows.get((f"{name}.weight" if name else "weight", dim))
    at = channel_dim(layer)
    return values if keep is None else values.index_select(at, torch.tensor(keep, device=values.device))


def _relative(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference of two lists of tensors, relative to the largest value; infinite for other shapes."""
    if [one.shape for one in ours] != [one.shape for one in theirs]:
        return float("inf")
    found = 0.0
    for one, other in _pairs(ours, theirs):
        scale = float(one.abs().max())
        difference = float((one - other).abs().max())
        found = max(found, difference / scale if scale > 0 else difference)
    return found if found == found else float("inf")


def _pairs(ours: list[Tensor], theirs: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    for one, other in zip(ours, theirs, strict=True):
        if one.numel():
            yield (one, other) if one.is_floating_point() else (one.double(), other.double())
