"""What becomes of channel labels in each of torch's operators: a rule for every kind, and a safe answer to the rest.

Kinds: pointwise (labels of all operands meet), moving (labels move as values do), reductions and norms (what is
added up goes together or stays), contractions (a weight's columns meet what they read, its rows are new channels).
An operator without a rule fixes everything that enters it, under its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekit.facts import Atoms, joined, to_atoms
from sparsekit.labels import FIXED, aligned, along, compressed, merged_by_span, moved, span
from sparsekit.tracing import Call, Known, Tracer

_COMPUTED = "the weight of a layer it runs through is computed from other tensors (a parametrisation)"
_MIXES = "{} mixes channels, so removing one changes all others"


def apply_rule(tracer: Tracer, call: Call) -> None:
    """Tell `tracer` what is known of the outputs of one call."""
    name = call.name.rstrip("_") if call.name.endswith("_") else call.name
    rule = _RULES.get(name)
    if rule is None and torch.Tag.pointwise in call.operator.tags:
        rule = _pointwise
    if rule is None and call.operator.is_view:
        rule = _moving
    if not call.outputs:  # a look at a value: `item`, or an assertion
        return
    try:
        (rule or _unknown)(tracer, call)
    except Exception:  # an unusual form of a known operator: safe is to treat it as one that is not known
        _unknown(tracer, call)


def _unknown(tracer: Tracer, call: Call) -> None:
    weights = bool(call.tensors) and all(tracer.known(tensor).weight for tensor in call.tensors)
    for tensor in call.tensors:  # before the outputs, of which one may be the same tensor
        tracer.read(tensor)
        for labels in tracer.known(tensor).labels:
            tracer.facts.fix(
                labels, f"it passes through {call.name}, which mixes channels in a way of its own"
            )
    for output in call.outputs:
        tracer.learn(output, Known(weight=weights))


def _nothing(tracer: Tracer, call: Call) -> None:
    """The result has sizes of its own."""


# ---------------------------------------------------------------------------------------------- pointwise


def _pointwise(tracer: Tracer, call: Call) -> None:
    name, tensors = call.name.rstrip("_"), call.tensors
    combined = combine(tracer, tensors, call.outputs[0].shape, scales=name in _SCALING)
    known = [tracer.known(tensor) for tensor in tensors]
    feeds, squashed = joined(k.feeds for k in known), name in _SQUASHING or any(k.squashed for k in known)
    if name in _SCALING and len(tensors) > 1:
        feeds, squashed = _gated(tracer, known)
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


def _gated(tracer: Tracer, known: Sequence[Known]) -> tuple[Atoms | None, bool]:
    """Of a product: what has been squashed only scales the rest, which alone decides whether the result is zero."""
    gates = [k for k in known if k.squashed and k.feeds is not None]
    others = [k for k in known if not (k.squashed and k.feeds is not None)]
    if gates and any(not k.weight for k in others):
        for k in gates:
            if k.feeds is not None:
                tracer.facts.mark("gates", k.feeds)
        return joined(k.feeds for k in others), any(k.squashed for k in others)
    return joined(k.feeds for k in known), any(k.squashed for k in known)


def combine(
    tracer: Tracer, tensors: Sequence[Tensor], shape: Sequence[int], *, scales: bool = False
) -> tuple[Tensor, ...]:
    """Labels of what comes of operands that meet element by element, broadcast to `shape`.

    Labels over the same dimensions are coupled. Labels over some of another's dimensions are covered by it. Along a
    dimension where another operand has a size of its own, without labels, everything goes together; labels along
    nothing else are fixed. `scales`: it is a product, in which a weight is a factor.
    """
    n = len(shape)
    operands = [t for t in tensors if t.dim() <= n]
    # An expanded dimension (stride 0) has whatever size it is asked for.
    present = [{d + n - t.dim() for d in range(t.dim()) if t.shape[d] > 1 and t.stride(d)} for t in operands]
    known = [tracer.known(t) for t in operands]
    arrays = [tuple(aligned(labels, n) for labels in k.labels) for k in known]
    labelled = [{d for labels in group for d in span(labels)} for group in arrays]
    free: list[Tensor] = []
    for i, group in enumerate(arrays):
        if scales and known[i].weight:
            for labels in group:
                tracer.facts.mark("multiplies", labels)
        for labels in group:
            dims = set(span(labels))
            others = [present[j] - labelled[j] for j in range(len(operands)) if j != i]
            sized = sorted(dims & set().union(*others))
            if dims and len(sized) == len(dims):
                tracer.facts.fix(labels, "it meets a tensor whose size is fixed")
            else:
                free.append(_together(tracer, labels, sized))
    merged = merged_by_span(free, tracer.facts.couple)
    return _uncovered(tracer, merged)


def _uncovered(tracer: Tracer, merged: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Without arrays over some of another's dimensions: what is left of the finer decides about the coarser."""
    kept = []
    for labels in merged:
        finer = [other for other in merged if set(span(labels)) < set(span(other))]
        for other in finer:
            tracer.facts.cover(labels, other)
        if not finer:
            kept.append(labels)
    return tuple(kept)


# ------------------------------------------------------------------------------------------------- moving


def _moving(tracer: Tracer, call: Call) -> None:
    tensor = call.tensors[0]
    known = tracer.known(tensor)
    operator = _AS_RESHAPE.get(call.name, call.operator)

    def run(labels: Tensor) -> Any:
        return operator(labels, *call.args[1:], **call.kwargs)

    results = [moved(labels, tensor.shape, run) for labels in known.labels]
    for i, output in enumerate(call.outputs):
        labels = merged_by_span([result[i] for result in results], tracer.facts.couple)
        if call.name not in _KEEP_DIMENSIONS:
            for one in labels:
                tracer.facts.grid(one)
        if output.numel() == tensor.numel():
            tracer.learn(output, replace(known, labels=labels))
        else:
            tracer.read(tensor)
            feeds = _held(known.feeds, labels)
            tracer.learn(output, Known(labels, known.weight, feeds, known.squashed))


def _held(feeds: Atoms | None, labels: Sequence[Tensor]) -> Atoms | None:
    """Of what feeds a tensor, that which a part of it still holds."""
    atoms = joined(to_atoms(one) for one in labels)
    return feeds if feeds is None or atoms is None else np.intersect1d(feeds, atoms)


# What these leave of labels over several dimensions is what was there before.
_KEEP_DIMENSIONS = {"permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "slice", "select"}
_AS_RESHAPE = dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), torch.reshape)


def _striding(tracer: Tracer, call: Call) -> None:
    """Torch itself restrides what it pooled to one place, in place: nothing moves where there is one dimension."""
    out = call.outputs[0]
    long = [dim for dim, size in enumerate(out.shape) if size > 1]
    whole = out.untyped_storage().nbytes() == out.numel() * out.element_size()
    if not (call.name == "as_strided_" and out is call.args[0] and whole and len(long) == 1):
        _unknown(tracer, call)


def _padding(tracer: Tracer, call: Call) -> None:
    """Padding leaves labels alone, except along a padded dimension: what is added there has a size of its own."""
    tensor, pads = call.args[0], call.args[1]
    known = tracer.known(tensor)
    padded = {tensor.dim() - 1 - i // 2 for i, amount in enumerate(pads) if amount}
    labels = []
    for one in known.labels:
        if padded & set(span(one)):
            tracer.facts.fix(one, "it is padded to a fixed size")
        else:
            labels.append(one)
    tracer.read(tensor)
    tracer.learn(call.outputs[0], Known(tuple(labels), known.weight, known.feeds, known.squashed))


def _concatenating(tracer: Tracer, call: Call) -> None:
    tensors = [t for t in call.args[0] if t.numel()] if call.args else list(call.tensors)
    dim = call.arg(1, "dim", 0)
    n = call.outputs[0].dim()
    stacks = call.name == "stack"
    dim = dim % n
    known = [tracer.known(t) for t in tensors]
    for t in tensors:
        tracer.read(t)
    groups = [[labels.unsqueeze(dim) if stacks else labels for labels in k.labels] for k in known]
    shapes = [list(t.unsqueeze(dim).shape if stacks else t.shape) for t in tensors]
    labels = concatenated(tracer, groups, shapes, dim)
    tracer.learn(call.outputs[0], Known(labels, all(k.weight for k in known), joined(k.feeds for k in known)))


def concatenated(
    tracer: Tracer, groups: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[int]], dim: int
) -> tuple[Tensor, ...]:
    """Labels of parts one behind another along `dim`; other dimensions of the parts go together."""
    others: dict[tuple[int, ...], None] = {}
    for group in groups:
        others.update((tuple(d for d in span(labels) if d != dim), None) for labels in group)
    results = []
    for rest in others:
        found = [
            {tuple(d for d in span(labels) if d != dim): labels for labels in group}.get(rest)
            for group in groups
        ]
        varies = any(one is not None and one.shape[dim] > 1 for one in found) or not rest
        if not varies:
            present = [one for one in found if one is not None]
            for other in present[1:]:
                tracer.facts.couple(present[0], other)
            if len(present) < len(found):
                tracer.facts.fix(present[0], "it is joined with a tensor whose size is fixed")
            results.append(present[0])
            continue
        parts = []
        for one, shape in zip(found, shapes, strict=True):
            target = [size if d in rest or d == dim else 1 for d, size in enumerate(shape)]
            parts.append((torch.full((1,) * len(shape), float(FIXED)) if one is None else one).expand(target))
        results.append(compressed(torch.cat(parts, dim)))
    merged = merged_by_span(results, tracer.facts.couple)
    for one in merged:
        tracer.facts.grid(one)
    return merged


def _unfolding(tracer: Tracer, call: Call) -> None:
    """im2col: (n, c, h, w) -> (n, c x kernel, places); every channel owns a run of kernel-many positions."""
    tensor, out = call.args[0], call.outputs[0]
    known = tracer.known(tensor)
    channel, repeat = tensor.dim() - 3, out.shape[-2] // tensor.shape[-3]
    labels = []
    for one in known.labels:
        if set(span(one)) & {tensor.dim() - 1, tensor.dim() - 2}:
            tracer.facts.fix(one, _MIXES.format(call.name))
            continue
        flat = one.flatten(-2)
        labels.append(flat.repeat_interleave(repeat, channel) if one.shape[channel] > 1 else flat)
    tracer.read(tensor)
    tracer.learn(out, Known(tuple(labels), known.weight, known.feeds, known.squashed))


def _folding(tracer: Tracer, call: Call) -> None:
    """col2im: (n, c x kernel, places) -> (n, c, h, w); positions of one channel are added up."""
    tensor, out = call.args[0], call.outputs[0]
    known = tracer.known(tensor)
    channel = tensor.dim() - 2
    labels = []
    for one in known.labels:
        if one.shape[-1] > 1:
            tracer.facts.fix(one, _MIXES.format(call.name))
            continue
        if one.shape[channel] > 1:
            parts = one.reshape(*one.shape[:channel], out.shape[-3], -1, one.shape[-1])
            tracer.facts.couple(parts.narrow(channel + 1, 0, 1), parts)
            one = parts.select(channel + 1, 0)
        labels.append(one.unsqueeze(-1))
    tracer.read(tensor)
    tracer.learn(out, Known(tuple(labels), known.weight, known.feeds, known.squashed))


def _per_map(tracer: Tracer, call: Call) -> None:
    """Pooling and resizing: each map by itself; its last dimensions change."""
    tensor = call.tensors[0]
    known = tracer.known(tensor)
    changed = [d for d in range(tensor.dim()) if call.outputs[0].shape[d] != tensor.shape[d]]
    spatial = set(range(min(changed, default=tensor.dim() - 2), tensor.dim()))
    labels = []
    for one in known.labels:
        inside = sorted(spatial & set(span(one)))
        if inside and len(inside) == len(span(one)):
            tracer.facts.fix(one, _MIXES.format(call.name))
        else:
            labels.append(_together(tracer, one, inside))
    tracer.read(tensor)
    for output in call.outputs:
        tracer.learn(output, Known(tuple(labels), known.weight, known.feeds, known.squashed))


# --------------------------------------------------------------------------------------------- reductions


def _together(tracer: Tracer, labels: Tensor, dims: Sequence[int]) -> Tensor:
    """Everything along `dims` goes together; the first of it stands for all."""
    first = labels
    for dim in dims:
        first = first.narrow(dim, 0, 1)
    tracer.facts.couple(first, labels)
    return first


def _reducing(tracer: Tracer, call: Call) -> None:
    tensor, out = call.tensors[0], call.outputs[0]
    known = tracer.known(tensor)
    dims = _reduced_dims(call, tensor)
    labels = []
    for one in known.labels:
        inside = [d for d in span(one) if d in dims]
        if inside and set(inside) == set(span(one)):
            tracer.facts.fix(one, _MIXES.format(call.name))
            continue
        first = _together(tracer, one, inside)
        if out.dim() < tensor.dim():
            for d in sorted(dims, reverse=True):
                first = first.squeeze(d)
        labels.append(first)
    tracer.read(tensor)
    feeds = known.feeds if call.name not in ("var", "std", "var_mean") else None
    for output in call.outputs:
        tracer.learn(output, Known(tuple(labels), known.weight, feeds, known.squashed))


def _reduced_dims(call: Call, tensor: Tensor) -> set[int]:
    position = 2 if call.name in ("linalg_vector_norm", "norm") else 1
    dims = call.arg(position, "dim")
    if dims is None or isinstance(dims, bool) or (isinstance(dims, (list, tuple)) and not dims):
        return set(range(tensor.dim()))
    return {d % tensor.dim() for d in ([dims] if isinstance(dims, int) else dims)}


def _softmax(tracer: Tracer, call: Call) -> None:
    tensor = call.tensors[0]
    known, dim = tracer.known(tensor), call.arg(1, "dim") % tensor.dim()
    for one in known.labels:
        if span(one) == (dim,):
            tracer.facts.fix(one, _MIXES.format("softmax"))
        elif dim in span(one):
            _together(tracer, one, [dim])
    tracer.read(tensor)
    tracer.learn(call.outputs[0], Known(known.labels, known.weight, known.feeds, True))


def _along_dim(tracer: Tracer, call: Call) -> None:
    """Cumulative sums, sorting and the like: shape kept, everything along one dimension depends on the rest."""
    tensor = call.tensors[0]
    known = tracer.known(tensor)
    dim = next((a for a in call.args[1:] if isinstance(a, int)), call.kwargs.get("dim", -1)) % tensor.dim()
    for one in known.labels:
        if dim in span(one):
            tracer.facts.fix(one, _MIXES.format(call.name))
    tracer.read(tensor)
    for output in call.outputs:
        tracer.learn(output, Known(tuple(one for one in known.labels if dim not in span(one)), known.weight))


# ------------------------------------------------------------------------------------------------- norms


def _batch_norm(tracer: Tracer, call: Call) -> None:
    tensor, parameters = call.args[0], [t for t in call.args[1:5] if isinstance(t, Tensor)]
    weight = next((tracer.name_of(t) for t in parameters), None)
    tracer.read(tensor, weight or "")
    known = tracer.known(tensor)
    labels = list(known.labels)
    feeds = known.feeds if not parameters else None
    for position, parameter in enumerate(call.args[1:5]):
        if isinstance(parameter, Tensor):
            own = [along(one, 1, tensor.dim()) for one in tracer.known(parameter).labels]
            for one in own:
                tracer.facts.mark("normalises", one)
                if not any(1 in span(other) for other in known.labels):
                    tracer.facts.fix(one, "it normalises the model's input")
                feeds = joined([feeds, to_atoms(one).ravel()]) if position < 2 else feeds
            labels += own
    merged = _uncovered(tracer, merged_by_span(labels, tracer.facts.couple))
    tracer.learn(call.outputs[0], Known(merged, known.weight, feeds, known.squashed))


def _layer_norm(tracer: Tracer, call: Call) -> None:
    tensor, shape = call.args[0], call.args[1]
    dims = set(range(tensor.dim() - len(shape), tensor.dim()))
    weight = call.arg(2, "weight")
    # Whoever computes the scale or has none gives a cut nothing to hold on to.
    lets_through = tracer.through_layer_norm and len(shape) == 1 and tracer.name_of(weight) is not None
    _mixing_norm(tracer, call, dims, [weight, call.arg(3, "bias")], len(shape), lets_through=lets_through)


def _rms_norm(tracer: Tracer, call: Call) -> None:
    tensor, shape = call.args[0], call.args[1]
    dims = set(range(tensor.dim() - len(shape), tensor.dim()))
    _mixing_norm(tracer, call, dims, [call.arg(2, "weight")], len(shape))


def _group_norm(tracer: Tracer, call: Call) -> None:
    tensor = call.args[0]
    _mixing_norm(tracer, call, {*range(1, tensor.dim())}, [call.arg(1, "weight"), call.arg(2, "bias")], 0)


def _mixing_norm(
    tracer: Tracer,
    call: Call,
    dims: set[int],
    affine: Sequence[Tensor | None],
    tail: int,
    *,
    lets_through: bool = False,
) -> None:
    """Statistics over several channels: those stay, or go together where one norm serves many units.

    `tail`: how many trailing dimensions scale and shift lie along; 0 for dimension 1. `lets_through`: channels may
    go all the same, the statistics being those of what stays.
    """
    tensor = call.args[0]
    known = tracer.known(tensor)
    parameters = [t for t in affine if isinstance(t, Tensor)]
    label = next((tracer.name_of(t) for t in parameters if tracer.name_of(t)), None)
    reason = _MIXES.format((label or "").removesuffix(".weight") or "a normalisation")
    labels, through = list(known.labels), False
    for one in known.labels:
        inside = [d for d in span(one) if d in dims]
        if inside and set(inside) == set(span(one)):
            through = lets_through or through
            if not lets_through:
                tracer.facts.fix(one, reason)
        elif inside:
            _together(tracer, one, inside)
    for t in parameters:
        for one in tracer.known(t).labels:
            labels.append(aligned(one, tensor.dim()) if tail else along(one, 1, tensor.dim()))
            tracer.facts.mark("shifts" if through else "normalises", one)
    tracer.read(tensor)
    merged = _uncovered(tracer, merged_by_span(labels, tracer.facts.couple))
    tracer.learn(call.outputs[0], Known(merged, known.weight, None, known.squashed))


def _root_mean_square_norm(tracer: Tracer, call: Call) -> None:
    """y = scale x / sqrt(mean of x^2 + eps): zero channels only lower the mean, and `surgery` makes up for that."""
    tensor, module = call.args
    known, dim = tracer.known(tensor), 1 if "2d" in type(module).__name__ else tensor.dim() - 1
    labels = [_together(tracer, one, [dim]) if span(one) != (dim,) else one for one in known.labels]
    labels += [along(one, dim, tensor.dim()) for one in tracer.known(module.weight).labels]
    for one in tracer.known(module.weight).labels:
        tracer.facts.mark("responds", one)
    tracer.read(tensor)
    merged = _uncovered(tracer, merged_by_span(labels, tracer.facts.couple))
    tracer.learn(call.outputs[0], Known(merged, known.weight, known.feeds, known.squashed))


def _response_norm(tracer: Tracer, call: Call) -> None:
    """Global response norm: y = x + shift + scale x n(x), n dividing a channel's norm by the mean of all channels'.

    The mean is the only thing that sees several channels, and zero channels only lower it: `surgery` makes up for that.
    """
    tensor, module = call.args
    known, dim = tracer.known(tensor), module.channel_dim % tensor.dim()
    labels = list(known.labels)
    for parameter in (module.weight, module.bias):
        labels += [along(one, dim, tensor.dim()) for one in tracer.known(parameter).labels]
    for one in tracer.known(module.weight).labels:
        tracer.facts.mark("responds", one)
    tracer.read(tensor)
    merged = _uncovered(tracer, merged_by_span(labels, tracer.facts.couple))
    tracer.learn(call.outputs[0], Known(merged, known.weight, known.feeds, known.squashed))


# ------------------------------------------------------------------------------------------- contractions


def _matrix_product(tracer: Tracer, call: Call) -> None:
    """mm, addmm, bmm, baddbmm: (batch,) rows x inner times (batch,) inner x columns."""
    first, second = call.tensors[-2:] if call.name.endswith("mm") and "add" in call.name else call.tensors[:2]
    if call.name == "addmm":
        first, second = call.args[1], call.args[2]
    bias = call.args[0] if call.name in ("addmm", "baddbmm") else None
    _product(tracer, first, second, call.outputs[0], bias)


def _linear(tracer: Tracer, call: Call) -> None:
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
    _meet(tracer, (lefts, left), (rights, right), inner)
    labels = []
    for one in (*lefts, *rights):
        rest = [d for d in span(one) if d != inner]
        if rest:
            labels.append(_together(tracer, one, [inner]).squeeze(inner))
    if attends:
        feeds, squashed = _gated(tracer, [left, right])
        origin = None
    else:
        weight_side = second if right.weight else first
        feeds, origin = None, _as_parameter(tracer, right if right.weight else left, weight_side)
        squashed = False
        produced = [
            one for one in (rights if right.weight else lefts) if span(one) and inner not in span(one)
        ]
        for one in produced:
            tracer.facts.mark("produced", one)
            feeds = joined([feeds, to_atoms(one).ravel()])
    if bias is not None:
        own = [aligned(one, n) for one in tracer.known(bias).labels]
        for one in own:
            tracer.facts.mark("produced", one)
            feeds = joined([feeds, to_atoms(one).ravel()])
        labels += own
    merged = _uncovered(tracer, merged_by_span(labels, tracer.facts.couple))
    tracer.learn(out, Known(merged, left.weight and right.weight, feeds, squashed, origin))


def _as_parameter(tracer: Tracer, known: Known, tensor: Tensor) -> str | None:
    """Name of the parameter a weight operand is a view of."""
    atoms = joined(to_atoms(one).ravel() for one in known.labels)
    if atoms is None:
        return tracer.name_of(tensor)
    names = {tracer.facts.axis_of(int(atom)).tensor for atom in (atoms[0], atoms[-1])}
    return names.pop() if len(names) == 1 else None


def _by_unit(tracer: Tracer, arrays: Sequence[Tensor], inner: int) -> list[Tensor]:
    """In a product of activations: channels that lie in one entry of the batch dimensions (a head) go together."""
    for one in arrays:
        batch = [d for d in span(one) if d < inner - 1]
        if batch and len(span(one)) > len(batch):
            _together(tracer, one, [d for d in span(one) if d >= inner - 1])
    return list(arrays)


def _meet(tracer: Tracer, left: Any, right: Any, inner: int) -> None:
    """Couple two operands' labels along the dimensions they share (batch and inner)."""
    (lefts, left_known), (rights, right_known) = left, right
    for arrays, others in ((lefts, rights), (rights, lefts)):
        for one in arrays:
            if inner in span(one) and not any(inner in span(other) for other in others):
                tracer.facts.fix(one, "it is multiplied by something whose size is fixed")
    for known, arrays in ((left_known, lefts), (right_known, rights)):
        if known.weight:
            for one in arrays:
                if span(one) == (inner,):
                    tracer.facts.mark("consumed", one)
    for one in lefts:
        for other in rights:
            mine, theirs = set(span(one)), set(span(other))
            shared = {d for d in mine & theirs if d <= inner and d != inner - 1}
            if not shared:
                continue
            if mine == theirs:
                tracer.facts.couple(one, other)
            elif not left_known.weight and not right_known.weight:
                _meet_partly(tracer, one, other, shared)
            elif theirs < mine:
                tracer.facts.cover(other, one)
            elif mine < theirs:
                tracer.facts.cover(one, other)
            else:
                _meet_partly(tracer, one, other, shared)


def _meet_partly(tracer: Tracer, one: Tensor, other: Tensor, shared: set[int]) -> None:
    """Both run along `shared` (the batch) and along something of their own: unit by unit they go together."""
    first = _together(tracer, one, [d for d in span(one) if d not in shared])
    second = _together(tracer, other, [d for d in span(other) if d not in shared])
    tracer.facts.couple(first, second)


def _convolution(tracer: Tracer, call: Call) -> None:
    tensor, weight, bias = call.args[0], call.args[1], call.args[2]
    _convolve(tracer, tensor, weight, bias, call.outputs[0], bool(call.args[6]), int(call.args[8]))


def _standardised_convolution(tracer: Tracer, call: Call) -> None:
    """Its filters are computed from the weight one by one: rows and columns mean what they mean in a plain one."""
    tensor, module = call.args
    gain = getattr(module, "gain", None)
    if isinstance(gain, Tensor):
        for one in tracer.known(gain).labels:
            tracer.facts.mark("multiplies", one)
            for rows in tracer.known(module.weight).labels:
                if span(rows) == (0,):
                    tracer.facts.couple(one, rows)
    _convolve(tracer, tensor, module.weight, module.bias, call.outputs[0], False, int(module.groups))


def _convolve(
    tracer: Tracer,
    tensor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    transposed: bool,
    groups: int,
) -> None:
    """Columns meet the channels that are read; rows are new channels, or, in blocks, the same ones once more."""
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
        tracer, known, depthwise=groups > 1 and groups == tensor.shape[1] == out.shape[1]
    )
    computed = filters.weight and not filters.labels and min(weight.shape[:2]) > 1
    for one in filters.labels:
        if len(span(one)) > 1:
            tracer.facts.fix(one, _COMPUTED)
    for one in (*read, *produced) if computed else ():
        tracer.facts.fix(one, _COMPUTED)
    channels = [one.flatten() for one in read]
    if groups == 1:
        _meet_columns(tracer, channels, columns)
        for one in produced:
            tracer.facts.mark("produced", one)
    elif produced:
        _convolve_blocks(tracer, channels, columns, produced, groups, fixed=not read and not passed)
    # A depthwise filter over (unit, channel) is shared by all units: it goes with what all of them lose.
    merged = _uncovered(tracer, merged_by_span([*passed, *produced], tracer.facts.couple))
    feeds = joined(to_atoms(one).ravel() for one in produced)
    origin = _as_parameter(tracer, filters, weight)
    tracer.learn(out, Known(merged, known.weight and filters.weight, feeds, False, origin))


def _maps_read(tracer: Tracer, known: Known, *, depthwise: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Labels of the channels that are read, and those that are passed on: of the batch, or of (unit, channel).

    Labels along the map go together with all their neighbours, so they stay.
    """
    read, passed = [], []
    for one in known.labels:
        dims = set(span(one))
        if dims == {1}:
            read.append(one)
        elif dims <= {0} or (dims == {0, 1} and depthwise):
            passed.append(one)
        elif dims == {0, 1}:
            passed.append(_together(tracer, one, [1]))
        elif 1 in dims and 0 not in dims:
            read.append(_together(tracer, one, sorted(dims - {1})))
        else:
            tracer.facts.fix(one, _MIXES.format("a convolution over it"))
    return read, passed


def _meet_columns(tracer: Tracer, channels: Sequence[Tensor], columns: Sequence[Tensor]) -> None:
    for one in columns:
        tracer.facts.mark("consumed", one)
        if not channels:
            tracer.facts.fix(one, "it reads channels whose number is fixed")
        for other in channels:
            tracer.facts.couple(one, other)


def _convolve_blocks(
    tracer: Tracer,
    channels: Sequence[Tensor],
    columns: Sequence[Tensor],
    produced: Sequence[Tensor],
    groups: int,
    *,
    fixed: bool,
) -> None:
    """Grouped convolution: whole blocks go, with what they read, or else the same place goes in every block.

    Whichever leaves more to choose from: 32 blocks of 4 go as blocks, 2 blocks of 32 lose places.
    """
    in_places = bool(columns) and bool(channels) and len(columns[0]) > groups
    for one in columns:
        if not in_places:  # every block has them
            tracer.facts.fix(one, "blocks of a grouped convolution have equal sizes")
    theirs = [other.reshape(groups, -1) for other in channels]
    for other in theirs if in_places else ():
        tracer.facts.couple(other[:1], other)
        _meet_columns(tracer, [other[0]], columns)
    for one in produced:
        blocks = one.flatten().reshape(groups, -1)
        tracer.facts.mark("produced" if in_places else "grouped", one)
        tracer.facts.couple(blocks[:1] if in_places else blocks[:, :1], blocks)
        if fixed:
            tracer.facts.fix(one, "it reads channels whose number is fixed")
        for other in theirs if not in_places else ():
            tracer.facts.couple(blocks[:, :1], other)


# ------------------------------------------------------------------------------------------------- table

Rule = Callable[[Tracer, Call], None]
_KINDS: dict[Rule, str] = {
    _pointwise: "hardswish hardsigmoid dropout native_dropout detach alias lift_fresh zeros_like ones_like empty_like "
    "full_like rand_like randn_like new_empty_strided feature_dropout prelu _prelu_kernel softplus fill copy "
    "clone _to_copy contiguous where masked_fill leaky_relu elu gelu silu mish clamp maximum minimum bernoulli "
    "hardtanh nan_to_num log_sigmoid_forward rsub addcmul addcdiv lerp pow",
    _moving: "view _unsafe_view reshape _reshape_alias roll flip repeat index index_select repeat_interleave "
    "pixel_shuffle pixel_unshuffle channel_shuffle rot90 tril triu slice select permute transpose t expand split "
    "split_with_sizes unbind unsqueeze squeeze unfold narrow diagonal movedim unsafe_split unsafe_split_with_sizes "
    "split_copy split_with_sizes_copy unsafe_chunk native_channel_shuffle embedding",
    _padding: "pad constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d",
    _concatenating: "cat stack concat",
    _unfolding: "im2col",
    _folding: "col2im",
    _per_map: "max_pool2d_with_indices max_pool2d avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d "
    "adaptive_max_pool2d avg_pool1d max_pool1d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d "
    "_upsample_bicubic2d_aa _upsample_bilinear2d_aa upsample_nearest1d avg_pool3d max_pool3d_with_indices "
    "mkldnn_max_pool2d upsample_linear1d _upsample_nearest_exact2d",
    _reducing: "mean sum amax amin max min argmax argmin norm linalg_vector_norm var std var_mean logsumexp prod "
    "all any",
    _softmax: "_softmax _log_softmax _safe_softmax softmax",
    _along_dim: "cumsum sort topk argsort cumprod",
    _batch_norm: "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
    "miopen_batch_norm batch_norm",
    _layer_norm: "native_layer_norm layer_norm",
    _rms_norm: "_fused_rms_norm rms_norm",
    _group_norm: "native_group_norm group_norm",
    _response_norm: "global_response_norm",
    _root_mean_square_norm: "root_mean_square_norm",
    _matrix_product: "mm addmm bmm baddbmm",
    _linear: "linear",
    _convolution: "convolution _convolution",
    _standardised_convolution: "standardised_convolution",
    _striding: "as_strided",
    _unknown: "view_as_real view_as_complex",
    _nothing: "arange zeros ones empty full new_zeros new_ones new_empty new_full rand randn eye linspace "
    "scalar_tensor empty_strided empty_permuted",
}
_RULES: dict[str, Rule] = {name: rule for rule, names in _KINDS.items() for name in names.split()}
