"""What is added up or compared along a dimension goes together, or stays."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from sparsekit.coupling.labels import aligned, span
from sparsekit.coupling.rules.meeting import MIXES, Operand, apart_from, meet, sized_dims, together, within
from sparsekit.coupling.tracer import Known, OperatorCall, Tracer


def reducing(tracer: Tracer, call: OperatorCall) -> None:
    """Means, maxima and the like: what meets along a dimension goes together, channels that do stay."""
    _reduce(tracer, call, adds_up=False)


def adding_up(tracer: Tracer, call: OperatorCall) -> None:
    """Sums and norms of finite order: as means, but a channel may go once it is zero, which adds nothing.

    Channels of weights stay: no penalty makes the columns of a dead channel zero.
    """
    order = call.named("ord", call.named("p"))
    finite = order is None or (0 < order < math.inf)
    _reduce(tracer, call, adds_up=finite and not tracer.known(call.tensors[0]).weight)


def _reduce(tracer: Tracer, call: OperatorCall, *, adds_up: bool) -> None:
    tensor, out = call.tensors[0], call.outputs[0]
    known = tracer.known(tensor)
    dims = _reduced_dims(call, tensor)
    feeds = known.feeds if call.name not in _NOT_ZERO_OF_ZEROS else None
    rest = []
    for one in known.labels:
        if not span(one) or not set(span(one)) <= dims:
            rest.append(one)
        elif adds_up:
            tracer.seen.note("summed", one)
            feeds = np.zeros(0, np.int64)  # without any one channel the others are left
        else:
            tracer.fix_if_read(out, one, MIXES.format(call.name))
    labels = within(tracer, rest, dims, MIXES.format(call.name))
    for d in sorted(dims, reverse=True) if out.dim() < tensor.dim() else ():
        labels = [one.squeeze(d) for one in labels]
    tracer.read(tensor)
    for output in call.outputs:
        tracer.learn(output, Known(tuple(labels), known.weight, feeds, known.squashed))


_NOT_ZERO_OF_ZEROS = ("var", "std", "var_mean", "std_mean", "logsumexp", "argmax", "argmin")


def _reduced_dims(call: OperatorCall, tensor: Tensor) -> set[int]:
    dims = call.named("dim")
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return set(range(tensor.dim()))
    return {d % tensor.dim() for d in ([dims] if isinstance(dims, int) else dims)}


def softmax_rule(tracer: Tracer, call: OperatorCall) -> None:
    """Softmax: channels that it runs over stay."""
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
    known, dim = tracer.known(tensor), call.named("dim", -1) % tensor.dim()
    labels = tuple(apart_from(tracer, known.labels, [dim], MIXES.format(call.name)))
    tracer.read(tensor)
    for output in call.outputs:
        tracer.learn(output, Known(labels, known.weight))


def distance(tracer: Tracer, call: OperatorCall) -> None:
    """cdist: (..., n, c) and (..., m, c) -> (..., n, m): what is compared stays, the points may go."""
    first, second = call.tensors[:2]
    n = call.outputs[0].dim()
    operands = []
    for tensor, dim in ((first, n - 2), (second, n - 1)):
        known = tracer.known(tensor)
        tracer.read(tensor)
        labels = within(tracer, [aligned(one, n) for one in known.labels], [n - 1], MIXES.format("cdist"))
        present = {d + n - tensor.dim() for d in sized_dims(tensor)} - {n - 1}
        if dim == n - 1:
            labels = [one.transpose(-1, -2) for one in labels]
            present = {dim if d == n - 2 else d for d in present}
        operands.append(Operand(labels, frozenset(present), known.weight))
    weight = all(one.weight for one in operands)
    tracer.learn(call.outputs[0], Known(meet(tracer, operands), weight))
