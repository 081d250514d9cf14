"""What is added up or compared along a dimension goes together, or stays."""

from __future__ import annotations

from torch import Tensor

from sparsekit.coupling.labels import span
from sparsekit.coupling.rules.meeting import MIXES, together
from sparsekit.coupling.tracer import Known, OperatorCall, Tracer


def reducing(tracer: Tracer, call: OperatorCall) -> None:
    tensor, out = call.tensors[0], call.outputs[0]
    known = tracer.known(tensor)
    dims = _reduced_dims(call, tensor)
    labels = []
    for one in known.labels:
        inside = [d for d in span(one) if d in dims]
        if inside and set(inside) == set(span(one)):
            tracer.fix_if_read(out, one, MIXES.format(call.name))
            continue
        first = together(tracer, one, inside)
        if out.dim() < tensor.dim():
            for d in sorted(dims, reverse=True):
                first = first.squeeze(d)
        labels.append(first)
    tracer.read(tensor)
    feeds = known.feeds if call.name not in ("var", "std", "var_mean") else None
    for output in call.outputs:
        tracer.learn(output, Known(tuple(labels), known.weight, feeds, known.squashed))


def _reduced_dims(call: OperatorCall, tensor: Tensor) -> set[int]:
    position = 2 if call.name in ("linalg_vector_norm", "norm") else 1
    dims = call.arg(position, "dim")
    if dims is None or isinstance(dims, bool) or (isinstance(dims, (list, tuple)) and not dims):
        return set(range(tensor.dim()))
    return {d % tensor.dim() for d in ([dims] if isinstance(dims, int) else dims)}


def softmax_rule(tracer: Tracer, call: OperatorCall) -> None:
    tensor = call.tensors[0]
    known, dim = tracer.known(tensor), call.arg(1, "dim") % tensor.dim()
    for one in known.labels:
        if span(one) == (dim,):
            tracer.seen.fix(one, MIXES.format("softmax"))
        elif dim in span(one):
            together(tracer, one, [dim])
    tracer.read(tensor)
    tracer.learn(call.outputs[0], Known(known.labels, known.weight, known.feeds, True))


def along_dim(tracer: Tracer, call: OperatorCall) -> None:
    """Cumulative sums, sorting and the like: along one dimension everything depends on the rest, and is fixed."""
    tensor = call.tensors[0]
    known = tracer.known(tensor)
    dim = next((a for a in call.args[1:] if isinstance(a, int)), call.kwargs.get("dim", -1)) % tensor.dim()
    for one in known.labels:
        if dim in span(one):
            tracer.seen.fix(one, MIXES.format(call.name))
    tracer.read(tensor)
    for output in call.outputs:
        tracer.learn(output, Known(tuple(one for one in known.labels if dim not in span(one)), known.weight))
