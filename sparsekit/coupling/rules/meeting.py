"""What all rules share: labels that meet, go together, or have to stay."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sparsekit.coupling.labels import aligned, merged_by_span, span
from sparsekit.coupling.observations import Atoms, joined
from sparsekit.coupling.tracer import Known, OperatorCall, Tracer

COMPUTED = (
    "is computed from other tensors (a parametrisation); torch.nn.utils.parametrize.remove_parametrizations makes it "
    "a plain weight, which can be cut"
)
PLACES = "it says where to read or write"
MIXES = "{} mixes channels, so removing one changes all others"


def unknown(tracer: Tracer, call: OperatorCall) -> None:
    """Everything that enters is fixed."""
    weights = bool(call.tensors) and all(tracer.known(tensor).weight for tensor in call.tensors)
    # Before the outputs, of which one may be the same tensor.
    fix_all(tracer, call.tensors, f"it passes through {call.name}, which mixes channels in a way of its own")
    for output in call.outputs:
        tracer.learn(output, Known(weight=weights))


def gated(tracer: Tracer, known: Sequence[Known]) -> tuple[Atoms | None, bool]:
    """What feeds the product of these operands, and whether it is squashed.

    An operand that is squashed is a gate: it only scales the others, which alone make the product zero. What makes
    both, as in x * sigmoid(x), is no gate: without it the product is zero, too.
    """
    gates = [k for k in known if k.squashed and k.feeds is not None]
    others = [k for k in known if not (k.squashed and k.feeds is not None)]
    if gates and any(not k.weight for k in others):
        scaled = joined(k.feeds for k in others)
        for k in gates:
            if k.feeds is not None:
                alone = k.feeds if scaled is None else np.setdiff1d(k.feeds, scaled)
                tracer.seen.note("gate", alone)
        return scaled, any(k.squashed for k in others)
    return joined(k.feeds for k in known), any(k.squashed for k in known)


@dataclass(frozen=True)
class Operand:
    """What meets others element by element: its labels, and where it has a size of its own.

    labels: along the dimensions of the result. present: dimensions along which it is longer than 1. weight: it is made
    of parameters and buffers alone.
    """

    labels: Sequence[Tensor]
    present: frozenset[int]
    weight: bool = False


def sized_dims(tensor: Tensor) -> frozenset[int]:
    """Dimensions longer than 1. An expanded one (stride 0) has whatever size it is asked for, and does not count."""
    return frozenset(d for d in range(tensor.dim()) if tensor.shape[d] > 1 and tensor.stride(d))


def combine(
    tracer: Tracer, tensors: Sequence[Tensor], shape: Sequence[int], *, scales: bool = False
) -> tuple[Tensor, ...]:
    """The labels of a result whose operands meet element by element, broadcast to `shape`; see `meet`."""
    n = len(shape)
    operands = []
    for tensor in (t for t in tensors if t.dim() <= n):
        known = tracer.known(tensor)
        present = frozenset(d + n - tensor.dim() for d in sized_dims(tensor))
        operands.append(Operand([aligned(labels, n) for labels in known.labels], present, known.weight))
    return meet(tracer, operands, scales=scales)


def meet(tracer: Tracer, operands: Sequence[Operand], *, scales: bool = False) -> tuple[Tensor, ...]:
    """The labels of a result whose operands meet element by element.

    Labels of the same span are coupled. Labels whose span is part of another's cover it. Where another operand has a
    dimension without labels, everything along this dimension goes together; labels that span no other are fixed.
    `scales`: it is a product, in which a weight is a factor.
    """
    labelled = [{d for labels in one.labels for d in span(labels)} for one in operands]
    free: list[Tensor] = []
    for i, own in enumerate(operands):
        if scales and own.weight:
            for labels in own.labels:
                tracer.seen.note("factor", labels)
        others = [one.present - labelled[j] for j, one in enumerate(operands) if j != i]
        for labels in own.labels:
            dims = set(span(labels))
            sized = sorted(dims & set().union(*others))
            if dims and len(sized) == len(dims):
                tracer.seen.fix(labels, "it meets a tensor whose size is fixed")
            else:
                free.append(together(tracer, labels, sized))
    return finest(tracer, merged_by_span(free, tracer.seen.couple))


def apart_from(tracer: Tracer, labels: Sequence[Tensor], dims: Collection[int], reason: str) -> list[Tensor]:
    """The labels that do not run along `dims`. The others are fixed for this reason."""
    kept = []
    for one in labels:
        if set(span(one)) & set(dims):
            tracer.seen.fix(one, reason)
        else:
            kept.append(one)
    return kept


def within(tracer: Tracer, labels: Sequence[Tensor], dims: Collection[int], reason: str) -> list[Tensor]:
    """The labels, one along `dims`: there everything goes together, and labels that run along these alone stay."""
    kept = []
    for one in labels:
        inside = [d for d in span(one) if d in dims]
        if inside and len(inside) == len(span(one)):
            tracer.seen.fix(one, reason)
        else:
            kept.append(together(tracer, one, inside))
    return kept


def fix_all(tracer: Tracer, tensors: Iterable[Tensor], reason: str) -> None:
    """Everything that these tensors hold stays, for this reason."""
    for tensor in tensors:
        tracer.read(tensor)
        for labels in tracer.known(tensor).labels:
            tracer.seen.fix(labels, reason)


def finest(tracer: Tracer, merged: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The arrays that cover no other. A coarser one is noted as a cover: what is left of the finer decides about it."""
    kept = []
    for labels in merged:
        finer = [other for other in merged if set(span(labels)) < set(span(other))]
        for other in finer:
            tracer.seen.cover(labels, other)
        if not finer:
            kept.append(labels)
    return tuple(kept)


def together(tracer: Tracer, labels: Tensor, dims: Sequence[int]) -> Tensor:
    """Couple everything along `dims`, and return the first slice, which stands for all."""
    first = labels
    for dim in dims:
        first = first.narrow(dim, 0, 1)
    tracer.seen.couple(first, labels)
    return first
