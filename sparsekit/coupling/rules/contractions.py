"""Products with a weight: its columns meet what they read, its rows are new channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sparsekit.coupling.labels import aligned, along, divided, merged_by_span, span
from sparsekit.coupling.observations import joined, to_atoms
from sparsekit.coupling.rules.meeting import COMPUTED, MIXES, PLACES, finest, fix_all, gated, together
from sparsekit.coupling.tracer import Known, OperatorCall, Tracer


def matrix_product(tracer: Tracer, call: OperatorCall) -> None:
    """mm, addmm, bmm, baddbmm: (batch,) rows x inner times (batch,) inner x columns."""
    first, second = call.tensors[-2:] if call.name.endswith("mm") and "add" in call.name else call.tensors[:2]
    if call.name == "addmm":
        first, second = call.args[1], call.args[2]
    bias = call.args[0] if call.name in ("addmm", "baddbmm") else None
    _product(tracer, first, second, call.outputs[0], bias)


def linear_layer(tracer: Tracer, call: OperatorCall) -> None:
    """linear: as a product with the transposed weight."""
    weight = call.args[1]
    bias = call.arg(2, "bias")
    transposed = weight.t()
    known = tracer.known(weight)
    tracer.learn(transposed, Known(tuple(one.t() for one in known.labels), known.weight))
    _product(tracer, call.args[0], transposed, call.outputs[0], bias)


def _product(tracer: Tracer, first: Tensor, second: Tensor, out: Tensor, bias: Tensor | None) -> None:
    n = out.dim()
    left, right = tracer.known(first), tracer.known(second)
    for t in (first, second):
        tracer.read(t)
    # Both with the dimensions (..., rows, inner, columns), as if they met element by element and were added up.
    lefts = [aligned(one.unsqueeze(-1), n + 1) for one in left.labels]
    rights = [
        aligned(one.unsqueeze(-3) if one.dim() > 1 else one.unsqueeze(-1), n + 1) for one in right.labels
    ]
    inner = n - 1
    attends = not left.weight and not right.weight
    if attends:
        lefts, rights = _by_unit(tracer, lefts, inner), _by_unit(tracer, rights, inner)
    _meet(tracer, _Operand(lefts, left.weight), _Operand(rights, right.weight), inner)
    labels = []
    for one in (*lefts, *rights):
        rest = [d for d in span(one) if d != inner]
        if rest:
            labels.append(together(tracer, one, [inner]).squeeze(inner))
    if attends:
        feeds, squashed = gated(tracer, [left, right])
        origin = None
    else:
        weight_side = second if right.weight else first
        feeds, origin = None, _as_parameter(tracer, right if right.weight else left, weight_side)
        squashed = False
        produced = [
            one for one in (rights if right.weight else lefts) if span(one) and inner not in span(one)
        ]
        for one in produced:
            tracer.seen.note("producer", one)
            feeds = joined([feeds, to_atoms(one).ravel()])
    if bias is not None:
        own = [aligned(one, n) for one in tracer.known(bias).labels]
        for one in own:
            tracer.seen.note("producer", one)
            feeds = joined([feeds, to_atoms(one).ravel()])
        labels += own
    merged = finest(tracer, merged_by_span(labels, tracer.seen.couple))
    tracer.learn(out, Known(merged, left.weight and right.weight, feeds, squashed, origin))


def _as_parameter(tracer: Tracer, known: Known, tensor: Tensor) -> str | None:
    """The name of the parameter that a weight operand is a view of, if it is one."""
    atoms = joined(to_atoms(one).ravel() for one in known.labels)
    if atoms is None:
        return tracer.name_of(tensor)
    names = {tracer.seen.axis_of(int(atom)).tensor for atom in (atoms[0], atoms[-1])}
    return names.pop() if len(names) == 1 else None


def _by_unit(tracer: Tracer, arrays: Sequence[Tensor], inner: int) -> list[Tensor]:
    """In a product of activations: channels that lie in one entry of the batch dimensions (a head) go together."""
    for one in arrays:
        batch = [d for d in span(one) if d < inner - 1]
        if batch and len(span(one)) > len(batch):
            together(tracer, one, [d for d in span(one) if d >= inner - 1])
    return list(arrays)


@dataclass(frozen=True)
class _Operand:
    """One side of a product: its labels along (..., rows, inner, columns), and whether it is a weight."""

    labels: Sequence[Tensor]
    weight: bool


def _meet(tracer: Tracer, left: _Operand, right: _Operand, inner: int) -> None:
    """Couple two operands' labels along the dimensions they share (batch and inner)."""
    for own, others in ((left, right), (right, left)):
        for one in own.labels:
            if inner in span(one) and not any(inner in span(other) for other in others.labels):
                tracer.seen.fix(one, "it is multiplied by something whose size is fixed")
    for operand in (left, right):
        for one in operand.labels if operand.weight else ():
            if span(one) == (inner,):
                tracer.seen.note("consumer", one)
    for one in left.labels:
        for other in right.labels:
            mine, theirs = set(span(one)), set(span(other))
            shared = {d for d in mine & theirs if d <= inner and d != inner - 1}
            if not shared:
                continue
            if mine == theirs:
                tracer.seen.couple(one, other)
            elif not left.weight and not right.weight:
                _meet_partly(tracer, one, other, shared)
            elif theirs < mine:
                tracer.seen.cover(other, one)
            elif mine < theirs:
                tracer.seen.cover(one, other)
            else:
                _meet_partly(tracer, one, other, shared)


def _meet_partly(tracer: Tracer, one: Tensor, other: Tensor, shared: set[int]) -> None:
    """Couple unit by unit: both span `shared` (the batch) and something of their own."""
    first = together(tracer, one, [d for d in span(one) if d not in shared])
    second = together(tracer, other, [d for d in span(other) if d not in shared])
    tracer.seen.couple(first, second)


def convolution(tracer: Tracer, call: OperatorCall) -> None:
    """Convolutions, transposed ones too: columns meet the channels that are read, rows are new channels."""
    tensor, weight, bias = call.args[0], call.args[1], call.args[2]
    _convolve(tracer, tensor, weight, bias, call.outputs[0], bool(call.args[6]), int(call.args[8]))


def deformable_convolution(tracer: Tracer, call: OperatorCall) -> None:
    """As a convolution. Offsets and modulation stay; parts with offsets of their own lose equally many channels."""
    tensor, weight, offset, mask, bias = call.args[:5]
    conv_groups, n_offsets = int(call.named("groups")), int(call.named("offset_groups"))
    fix_all(tracer, (offset, mask), PLACES)
    for one in tracer.known(tensor).labels if n_offsets > 1 else ():
        if 1 in span(one):
            parts = divided(one, 1, n_offsets)
            tracer.seen.couple(parts.narrow(1, 0, 1), parts)
            if conv_groups > 1:
                tracer.seen.fix(one, "its offsets and its conv groups divide the channels in two ways")
    _convolve(tracer, tensor, weight, bias, call.outputs[0], False, conv_groups)


def standardised_convolution(tracer: Tracer, call: OperatorCall) -> None:
    """Each filter is computed from its own weights: rows and columns mean what they mean in a plain convolution."""
    tensor, module = call.args
    gain = getattr(module, "gain", None)
    if isinstance(gain, Tensor):
        for one in tracer.known(gain).labels:
            tracer.seen.note("factor", one)
            for rows in tracer.known(module.weight).labels:
                if span(rows) == (0,):
                    tracer.seen.couple(one, rows)
    _convolve(tracer, tensor, module.weight, module.bias, call.outputs[0], False, int(module.groups))


def _convolve(
    tracer: Tracer,
    tensor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    transposed: bool,
    conv_groups: int,
) -> None:
    """Columns meet the channels that are read. Rows are new channels, or go with what their conv group reads."""
    known, filters = tracer.known(tensor), tracer.known(weight)
    tracer.read(tensor)
    tracer.read(weight)
    n = out.dim()
    rows_dim, columns_dim = (1, 0) if transposed else (0, 1)
    produced = [along(one.flatten(), 1, n) for one in filters.labels if span(one) == (rows_dim,)]
    columns = [one.flatten() for one in filters.labels if span(one) == (columns_dim,)]
    if bias is not None:
        produced += [along(one.flatten(), 1, n) for one in tracer.known(bias).labels]
    read, passed = _maps_read(
        tracer, known, depthwise=conv_groups > 1 and conv_groups == tensor.shape[1] == out.shape[1]
    )
    computed = filters.weight and not filters.labels and min(weight.shape[:2]) > 1
    for one in filters.labels:
        if len(span(one)) > 1:
            tracer.seen.fix(one, f"the weight of a layer it runs through {COMPUTED}")
    for one in (*read, *produced) if computed else ():
        tracer.seen.fix(one, f"the weight of a layer it runs through {COMPUTED}")
    channels = [one.flatten() for one in read]
    if conv_groups == 1:
        _meet_columns(tracer, channels, columns)
        for one in produced:
            tracer.seen.note("producer", one)
    elif produced:
        _grouped_convolution(tracer, channels, columns, produced, conv_groups, fixed=not read and not passed)
    # A depthwise filter over (unit, channel) is shared by all units: it goes with what all of them lose.
    merged = finest(tracer, merged_by_span([*passed, *produced], tracer.seen.couple))
    feeds = joined(to_atoms(one).ravel() for one in produced)
    origin = _as_parameter(tracer, filters, weight)
    tracer.learn(out, Known(merged, known.weight and filters.weight, feeds, False, origin))


def _maps_read(tracer: Tracer, known: Known, *, depthwise: bool) -> tuple[list[Tensor], list[Tensor]]:
    """The labels that are read, along the channels, and those that are passed on, along the batch or (unit, channel).

    Along the map everything goes together. Other labels are fixed.
    """
    read, passed = [], []
    for one in known.labels:
        dims = set(span(one))
        if dims == {1}:
            read.append(one)
        elif dims <= {0} or (dims == {0, 1} and depthwise):
            passed.append(one)
        elif dims == {0, 1}:
            passed.append(together(tracer, one, [1]))
        elif 1 in dims and 0 not in dims:
            read.append(together(tracer, one, sorted(dims - {1})))
        else:
            tracer.seen.fix(one, MIXES.format("a convolution over it"))
    return read, passed


def _meet_columns(tracer: Tracer, channels: Sequence[Tensor], columns: Sequence[Tensor]) -> None:
    for one in columns:
        tracer.seen.note("consumer", one)
        if not channels:
            tracer.seen.fix(one, "it reads channels whose number is fixed")
        for other in channels:
            tracer.seen.couple(one, other)


def _grouped_convolution(
    tracer: Tracer,
    channels: Sequence[Tensor],
    columns: Sequence[Tensor],
    produced: Sequence[Tensor],
    conv_groups: int,
    *,
    fixed: bool,
) -> None:
    """Whole conv groups go, with what they read, or else the same place goes in every conv group.

    Whichever leaves more to choose from: 32 conv groups of 4 go as wholes, 2 conv groups of 32 lose places.
    """
    in_places = bool(columns) and bool(channels) and len(columns[0]) > conv_groups
    for one in columns:
        if not in_places:  # every conv group has them
            tracer.seen.fix(one, "the groups of a grouped convolution have equal sizes")
    read = [other.reshape(conv_groups, -1) for other in channels]
    for other in read if in_places else ():
        tracer.seen.couple(other[:1], other)
        _meet_columns(tracer, [other[0]], columns)
    for one in produced:
        made = one.flatten().reshape(conv_groups, -1)
        tracer.seen.note("producer" if in_places else "depthwise", one)
        tracer.seen.couple(made[:1] if in_places else made[:, :1], made)
        if fixed:
            tracer.seen.fix(one, "it reads channels whose number is fixed")
        for other in read if not in_places else ():
            tracer.seen.couple(made[:, :1], other)
