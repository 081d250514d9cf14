"""Element by element: labels of all operands meet."""

from __future__ import annotations

from sparsekit.coupling.observations import joined
from sparsekit.coupling.rules.meeting import combine, gated
from sparsekit.coupling.tracer import Known, OperatorCall, Tracer


def pointwise(tracer: Tracer, call: OperatorCall) -> None:
    """Element by element: labels of all operands meet."""
    name, tensors = call.name.rstrip("_"), call.tensors
    combined = combine(tracer, tensors, call.outputs[0].shape, scales=name in _SCALING)
    known = [tracer.known(tensor) for tensor in tensors]
    feeds, squashed = joined(k.feeds for k in known), name in _SQUASHING or any(k.squashed for k in known)
    if name in _SCALING and len(tensors) > 1:
        feeds, squashed = gated(tracer, known)
    elif len(tensors) > 1 and any(k.squashed for k in known if k.feeds is not None):
        feeds = None  # 1 - gate, gate + gate: neither a gate nor what it came from
    origin = known[0].origin if name in _COPYING and known else None
    if origin is None:
        for tensor in tensors:
            tracer.read(tensor)
    weight = bool(known) and all(k.weight for k in known)
    for output in call.outputs:
        tracer.learn(output, Known(combined, weight, feeds, squashed, origin))


_SCALING = {"mul", "div"}
_COPYING = {"clone", "detach", "alias", "_to_copy", "contiguous", "lift_fresh"}
_SQUASHING = {"sigmoid", "hardsigmoid", "tanh"}
