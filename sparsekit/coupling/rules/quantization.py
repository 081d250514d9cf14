"""Fake quantisation, as training for fewer bits has it: values are rounded one by one, by scales of their own."""

from __future__ import annotations

from torch import Tensor

from sparsekit.coupling.labels import along, merged_by_span, span
from sparsekit.coupling.rules.meeting import finest
from sparsekit.coupling.tracer import Known, OperatorCall, Tracer

_OBSERVED = (
    "the range of its fake quantisation is still observed, over all channels; call "
    "torch.ao.quantization.disable_observer on the model first"
)


def fake_quantising(tracer: Tracer, call: OperatorCall) -> None:
    """Fake quantisation: each value by itself; a scale for each channel goes with its channel."""
    _quantise(tracer, call, call.named("axis"))


def observed_quantising(tracer: Tracer, call: OperatorCall) -> None:
    """As fake quantisation; while its observer is on, one range for all channels makes them stay."""
    tensor, by_channel = call.args[0], bool(call.named("per_row_fake_quant"))
    if not by_channel and bool(call.named("observer_on").any()):
        for one in tracer.known(tensor).labels:
            tracer.seen.fix(one, _OBSERVED)
    _quantise(tracer, call, call.named("ch_axis") if by_channel else None)


def _quantise(tracer: Tracer, call: OperatorCall, axis: int | None) -> None:
    tensor = call.args[0]
    known = tracer.known(tensor)
    tracer.read(tensor)
    scales = [t for name in ("scale", "zero_point") if isinstance(t := call.named(name), Tensor)]
    scales += [t for name in ("running_min", "running_max") if isinstance(t := call.named(name), Tensor)]
    scales += tracer.beside(scales[0], "activation_post_process.min_val", "activation_post_process.max_val")
    own = []
    for scale in scales if axis is not None else ():
        own += [along(one, axis % tensor.dim(), tensor.dim()) for one in tracer.known(scale).labels]
    for one in own:
        tracer.seen.note("factor", one)
        if not any(set(span(one)) & set(span(other)) for other in known.labels):
            tracer.seen.fix(one, "it quantises channels whose number is fixed")
    merged = finest(tracer, merged_by_span([*known.labels, *own], tracer.seen.couple))
    for output in call.outputs:
        tracer.learn(output, Known(merged, known.weight, known.feeds, known.squashed))
