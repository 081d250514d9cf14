"""Normalisations: which channels one of them sees together."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sparsekit.coupling.labels import aligned, along, merged_by_span, span
from sparsekit.coupling.observations import joined, to_atoms
from sparsekit.coupling.rules.meeting import MIXES, apart_from, finest, together
from sparsekit.coupling.tracer import Known, OperatorCall, Tracer


def batch_norm(tracer: Tracer, call: OperatorCall) -> None:
    """Batch normalisation: each channel by itself, with its scale, shift and statistics."""
    tensor, parameters = call.args[0], [t for t in call.args[1:5] if isinstance(t, Tensor)]
    weight = next((tracer.name_of(t) for t in parameters), None) or _repeated(tracer, call.args[1])
    tracer.read(tensor, weight or "")
    known = tracer.known(tensor)
    labels = list(known.labels)
    feeds = known.feeds if not parameters else None
    for position, parameter in enumerate(call.args[1:5]):
        if isinstance(parameter, Tensor):
            own = [along(one, 1, tensor.dim()) for one in tracer.known(parameter).labels]
            for one in own:
                tracer.seen.note("norm", one)
                if not any(1 in span(other) for other in known.labels):
                    tracer.seen.fix(one, "it normalises the model's input")
                feeds = joined([feeds, to_atoms(one).ravel()]) if position < 2 else feeds
            labels += own
    merged = finest(tracer, merged_by_span(labels, tracer.seen.couple))
    tracer.learn(call.outputs[0], Known(merged, known.weight, feeds, known.squashed))


def _repeated(tracer: Tracer, scale: Tensor | None) -> str | None:
    """The name of the scale of an instance norm, which torch repeats for every image and hands to a batch norm."""
    labels = () if scale is None else tracer.known(scale).labels
    names = {
        tracer.seen.axis_of(int(atom)).tensor for one in labels for atom in to_atoms(one).ravel()[[0, -1]]
    }
    return names.pop() if len(names) == 1 else None


def layer_norm(tracer: Tracer, call: OperatorCall) -> None:
    """Layer normalisation: channels that it runs over stay, unless `through_layer_norm` lets them go."""
    tensor, shape = call.args[0], call.args[1]
    dims = set(range(tensor.dim() - len(shape), tensor.dim()))
    _mixing_norm(tracer, call, dims, [call.arg(2, "weight"), call.arg(3, "bias")], len(shape))


def zero_counting_layer_norm(tracer: Tracer, call: OperatorCall) -> None:
    """A layer norm as a module: `surgery` lets it count channels that are gone as zeros.

    A zero channel comes out as shift - mean x scale / deviation. So it is zero for its readers if scale and shift are.
    """
    tensor, module, form = call.args
    known, dim = tracer.known(tensor), form.dim % tensor.dim()
    for one in () if tracer.through_layer_norm else known.labels:
        if dim in span(one):  # the module is what a cut made of a layer norm
            tracer.seen.fix(one, MIXES.format("a layer norm"))
    labels = [together(tracer, one, [dim]) if span(one) != (dim,) else one for one in known.labels]
    feeds = None
    for name in (form.scale, form.shift):
        for one in () if name is None else tracer.known(getattr(module, name)).labels:
            tracer.seen.note("layer_norm", one)
            if not any(dim in span(other) for other in known.labels):
                tracer.seen.fix(one, "it normalises channels whose number is fixed")
            labels.append(along(one.flatten(), dim, tensor.dim()))
            feeds = joined([feeds, to_atoms(one).ravel()])
    tracer.read(tensor)
    merged = finest(tracer, merged_by_span(labels, tracer.seen.couple))
    tracer.learn(call.outputs[0], Known(merged, known.weight, feeds, known.squashed))


def rms_norm(tracer: Tracer, call: OperatorCall) -> None:
    """Root mean square normalisation: channels that it runs over stay."""
    tensor, shape = call.args[0], call.args[1]
    dims = set(range(tensor.dim() - len(shape), tensor.dim()))
    _mixing_norm(tracer, call, dims, [call.arg(2, "weight")], len(shape))


def group_norm(tracer: Tracer, call: OperatorCall) -> None:
    """Statistics over the channels of each norm group: they go together. What is zero as a whole comes out as shift."""
    tensor, native = call.args[0], call.name.startswith("native")
    scale = call.arg(1, "weight") if native else call.arg(2, "weight")
    shift = call.arg(2, "bias") if native else call.arg(3, "bias")
    norm_groups = int(call.args[6] if native else call.args[1])
    if norm_groups == 1:
        _mixing_norm(tracer, call, {*range(1, tensor.dim())}, [scale, shift], 0)
        return
    known = tracer.known(tensor)
    labels = [_by_norm_group(tracer, one, norm_groups) for one in known.labels]
    feeds = known.feeds if scale is None else None
    for parameter in (scale, shift):
        for one in () if parameter is None else tracer.known(parameter).labels:
            tracer.seen.note("norm", one)
            if not any(1 in span(other) for other in labels):
                tracer.seen.fix(one, "it normalises channels whose number is fixed")
            labels.append(along(one, 1, tensor.dim()))
            feeds = joined([feeds, to_atoms(one).ravel()])
    tracer.read(tensor, tracer.name_of(scale) or "")
    merged = finest(tracer, merged_by_span(labels, tracer.seen.couple))
    tracer.learn(call.outputs[0], Known(merged, known.weight, feeds, known.squashed))


def _by_norm_group(tracer: Tracer, labels: Tensor, norm_groups: int) -> Tensor:
    """Couple the labels that one norm group sees; the labels that are left, which vary along batch and channels."""
    dims = span(labels)
    if dims and min(dims) > 1:
        tracer.seen.fix(labels, MIXES.format("a group norm"))
    labels = together(tracer, labels, [d for d in dims if d > 1])
    if 1 in span(labels):
        rows = labels.reshape(labels.shape[0], norm_groups, -1)
        tracer.seen.couple(rows[..., :1], rows)
    return labels


def _mixing_norm(
    tracer: Tracer,
    call: OperatorCall,
    dims: set[int],
    affine: Sequence[Tensor | None],
    tail: int,
) -> None:
    """Statistics over several channels: these stay, or go together where one norm serves many units.

    dims: those of the statistics. affine: scale and shift. tail: how many trailing dimensions scale and shift lie
    along, 0 for dimension 1.
    """
    tensor = call.args[0]
    known = tracer.known(tensor)
    parameters = [t for t in affine if isinstance(t, Tensor)]
    label = next((tracer.name_of(t) for t in parameters if tracer.name_of(t)), None)
    reason = MIXES.format((label or "").removesuffix(".weight") or "a normalisation")
    labels = list(known.labels)
    for one in known.labels:
        inside = [d for d in span(one) if d in dims]
        if inside and set(inside) == set(span(one)):
            tracer.seen.fix(one, reason)
        elif inside:
            together(tracer, one, inside)
    for t in parameters:
        for one in tracer.known(t).labels:
            labels.append(aligned(one, tensor.dim()) if tail else along(one, 1, tensor.dim()))
            tracer.seen.note("norm", one)
    tracer.read(tensor)
    merged = finest(tracer, merged_by_span(labels, tracer.seen.couple))
    tracer.learn(call.outputs[0], Known(merged, known.weight, None, known.squashed))


def root_mean_square_norm(tracer: Tracer, call: OperatorCall) -> None:
    """y = scale x / sqrt(mean of x^2 + eps): zero channels only lower the mean, and `surgery` makes up for that."""
    tensor, module = call.args
    known, dim = tracer.known(tensor), 1 if "2d" in type(module).__name__ else tensor.dim() - 1
    labels = [together(tracer, one, [dim]) if span(one) != (dim,) else one for one in known.labels]
    labels += [along(one, dim, tensor.dim()) for one in tracer.known(module.weight).labels]
    for one in tracer.known(module.weight).labels:
        tracer.seen.note("response", one)
    tracer.read(tensor)
    merged = finest(tracer, merged_by_span(labels, tracer.seen.couple))
    tracer.learn(call.outputs[0], Known(merged, known.weight, known.feeds, known.squashed))


def local_response_norm(tracer: Tracer, call: OperatorCall) -> None:
    """Local response normalisation: a channel is divided by its neighbours, and without one has others; so all stay."""
    tensor = call.args[0]
    known = tracer.known(tensor)
    labels = apart_from(tracer, known.labels, [1], MIXES.format("local_response_norm"))
    tracer.read(tensor)
    tracer.learn(call.outputs[0], Known(tuple(labels), known.weight, known.feeds, known.squashed))


def response_norm(tracer: Tracer, call: OperatorCall) -> None:
    """Global response norm: y = x + shift + scale x n(x), where n divides a channel's norm by the mean of all norms.

    Only the mean sees several channels. Zero channels only lower it, and `surgery` makes up for that.
    """
    tensor, module = call.args
    known, dim = tracer.known(tensor), module.channel_dim % tensor.dim()
    labels = list(known.labels)
    for parameter in (module.weight, module.bias):
        labels += [along(one, dim, tensor.dim()) for one in tracer.known(parameter).labels]
    for one in tracer.known(module.weight).labels:
        tracer.seen.note("response", one)
    tracer.read(tensor)
    merged = finest(tracer, merged_by_span(labels, tracer.seen.couple))
    tracer.learn(call.outputs[0], Known(merged, known.weight, known.feeds, known.squashed))
