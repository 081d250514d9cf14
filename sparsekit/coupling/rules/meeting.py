"""What all rules share: labels that meet, go together, or have to stay."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sparsekit.coupling.labels import aligned, merged_by_span, span
from sparsekit.coupling.observations import Atoms, joined
from sparsekit.coupling.tracer import Known, OperatorCall, Tracer

COMPUTED = (
    "is computed from other tensors (a parametrisation); torch.nn.utils.parametrize.remove_parametrizations makes it "
    "a plain weight, which can be cut"
)
MIXES = "{} mixes channels, so removing one changes all others"


def unknown(tracer: Tracer, call: OperatorCall) -> None:
    """Everything that enters is fixed."""
    weights = bool(call.tensors) and all(tracer.known(tensor).weight for tensor in call.tensors)
    for tensor in call.tensors:  # before the outputs, of which one may be the same tensor
        tracer.read(tensor)
        for labels in tracer.known(tensor).labels:
            tracer.seen.fix(
                labels, f"it passes through {call.name}, which mixes channels in a way of its own"
            )
    for output in call.outputs:
        tracer.learn(output, Known(weight=weights))


def gated(tracer: Tracer, known: Sequence[Known]) -> tuple[Atoms | None, bool]:
    """What feeds the product of these operands, and whether it is squashed.

    An operand that is squashed is a gate: it only scales the others, which alone make the product zero.
    """
    gates = [k for k in known if k.squashed and k.feeds is not None]
    others = [k for k in known if not (k.squashed and k.feeds is not None)]
    if gates and any(not k.weight for k in others):
        for k in gates:
            if k.feeds is not None:
                tracer.seen.note("gate", k.feeds)
        return joined(k.feeds for k in others), any(k.squashed for k in others)
    return joined(k.feeds for k in known), any(k.squashed for k in known)


def combine(
    tracer: Tracer, tensors: Sequence[Tensor], shape: Sequence[int], *, scales: bool = False
) -> tuple[Tensor, ...]:
    """The labels of a result whose operands meet element by element, broadcast to `shape`.

    Labels of the same span are coupled. Labels whose span is part of another's cover it. Where another operand has a
    dimension without labels, everything along this dimension goes together; labels that span no other are fixed.
    `scales`: it is a product, in which a weight is a factor.
    """
    n = len(shape)
    operands = [t for t in tensors if t.dim() <= n]
    # An expanded dimension (stride 0) has whatever size it is asked for.
    present = [{d + n - t.dim() for d in range(t.dim()) if t.shape[d] > 1 and t.stride(d)} for t in operands]
    known = [tracer.known(t) for t in operands]
    arrays = [tuple(aligned(labels, n) for labels in k.labels) for k in known]
    labelled = [{d for labels in own for d in span(labels)} for own in arrays]
    free: list[Tensor] = []
    for i, own in enumerate(arrays):
        if scales and known[i].weight:
            for labels in own:
                tracer.seen.note("factor", labels)
        for labels in own:
            dims = set(span(labels))
            others = [present[j] - labelled[j] for j in range(len(operands)) if j != i]
            sized = sorted(dims & set().union(*others))
            if dims and len(sized) == len(dims):
                tracer.seen.fix(labels, "it meets a tensor whose size is fixed")
            else:
                free.append(together(tracer, labels, sized))
    merged = merged_by_span(free, tracer.seen.couple)
    return finest(tracer, merged)


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
