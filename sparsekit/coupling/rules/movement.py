"""Values that are moved, joined, padded or pooled: labels move as they do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekit.coupling.labels import FIXED, along, compressed, divided, merged_by_span, moved, span
from sparsekit.coupling.named_integers import MultipleInt, NamedInt, PartInt
from sparsekit.coupling.observations import MADE, Atoms, SizeUse, joined, to_atoms
from sparsekit.coupling.rules.meeting import MIXES, PLACES, apart_from, combine, fix_all, gated, unknown
from sparsekit.coupling.tracer import Known, OperatorCall, Tracer

PICKED = "it is picked, or moved along, by a fixed number of places"


def moving(tracer: Tracer, call: OperatorCall) -> None:
    """Views, permutations, repeats and the like: labels move as values do."""
    _move(tracer, call, tracer.known(call.tensors[0]))


def picking(tracer: Tracer, call: OperatorCall) -> None:
    """Indexing: labels move as values do, but what is picked by number stays: the numbers fit no other size."""
    tensor = call.args[0]
    known = tracer.known(tensor)
    picked = _picked_dims(call)
    fix_all(tracer, (t for t in call.tensors if t is not tensor), PLACES)
    _move(tracer, call, replace(known, labels=tuple(apart_from(tracer, known.labels, picked, PICKED))))


def _picked_dims(call: OperatorCall) -> set[int]:
    n = call.args[0].dim()
    if "indices" not in {argument.name for argument in call.operator._schema.arguments}:
        return {call.named("dim") % n}
    return indexed_dims(call.named("indices"))


def indexed_dims(indices: Sequence[Tensor | None]) -> set[int]:
    """The dimensions that x[indices] indexes: a boolean index takes as many as it has itself."""
    found: set[int] = set()
    dim = 0
    for index in indices:
        taken = index.dim() if index is not None and index.dtype in (torch.bool, torch.uint8) else 1
        found |= set(range(dim, dim + taken)) if index is not None else set()
        dim += taken
    return found


def rolling(tracer: Tracer, call: OperatorCall) -> None:
    """roll: labels stay where they are; what is rolled itself stays: by so many places only this size is rolled so."""
    tensor = call.args[0]
    known, rolled = tracer.known(tensor), call.named("dims") or range(tensor.dim())
    labels = tuple(apart_from(tracer, known.labels, [d % tensor.dim() for d in rolled], PICKED))
    tracer.read(tensor)
    tracer.learn(call.outputs[0], replace(known, labels=labels, origin=None))


def shuffling(tracer: Tracer, call: OperatorCall) -> None:
    """channel_shuffle: the same place goes in every part, because their number is written in the code."""
    parts = int(call.named("groups"))
    for one in tracer.known(call.args[0]).labels:
        if one.shape[1] > 1:
            split = divided(one, 1, parts)
            tracer.seen.couple(split.narrow(1, 0, 1), split)
    moving(tracer, call)


def halving(tracer: Tracer, call: OperatorCall) -> None:
    """glu: the first half of a dimension times the sigmoid of the second, which is a gate."""
    tensor = call.args[0]
    known = tracer.known(tensor)
    halves = tensor.chunk(2, call.named("dim", -1))
    moves = [
        moved(labels, tensor.shape, lambda x: x.chunk(2, call.named("dim", -1))) for labels in known.labels
    ]
    tracer.read(tensor)
    for i, half in enumerate(halves):
        labels = merged_by_span([move[i] for move in moves], tracer.seen.couple)
        tracer.learn(half, Known(labels, known.weight, _held(known.feeds, labels), bool(i)))
    merged = combine(tracer, halves, call.outputs[0].shape, scales=True)
    feeds, squashed = gated(tracer, [tracer.known(half) for half in halves])
    tracer.learn(call.outputs[0], Known(merged, known.weight, feeds, squashed))


def _move(tracer: Tracer, call: OperatorCall, known: Known) -> None:
    tensor = call.tensors[0]
    operator: Callable[..., Any] = _AS_RESHAPE.get(call.name, call.operator)

    def run(labels: Tensor) -> Any:
        return operator(labels, *call.args[1:], **call.kwargs)

    results = [moved(labels, tensor.shape, run) for labels in known.labels]
    for i, output in enumerate(call.outputs):
        labels = merged_by_span([result[i] for result in results], tracer.seen.couple)
        if call.name not in _KEEP_DIMENSIONS:
            for one in labels:
                tracer.seen.grid(one)
        if output.numel() == tensor.numel():
            tracer.learn(output, replace(known, labels=labels))
        else:
            tracer.read(tensor)
            feeds = _held(known.feeds, labels)
            tracer.learn(output, Known(labels, known.weight, feeds, known.squashed))


def _held(feeds: Atoms | None, labels: Sequence[Tensor]) -> Atoms | None:
    """Those of `feeds` that a part of the tensor with these labels still holds."""
    atoms = joined(to_atoms(one) for one in labels)
    return feeds if feeds is None or atoms is None else np.intersect1d(feeds, atoms)


# These make no new grids: they leave slices of those that were there before.
_KEEP_DIMENSIONS = {"permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "slice", "select"}
_AS_RESHAPE = dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), torch.reshape)


def striding(tracer: Tracer, call: OperatorCall) -> None:
    """Torch restrides what it pooled, in place; where one dimension alone is longer than 1, nothing moves."""
    out = call.outputs[0]
    long = [dim for dim, size in enumerate(out.shape) if size > 1]
    whole = out.untyped_storage().nbytes() == out.numel() * out.element_size()
    if not (call.name == "as_strided_" and out is call.args[0] and whole and len(long) == 1):
        unknown(tracer, call)


def padding(tracer: Tracer, call: OperatorCall) -> None:
    """Constants beside channels: those stay, or shrink with the attribute that counts them; channels move along.

    Anything else along a padded dimension stays: what is added there mirrors or repeats what is there, or its size is
    written in the code. That goes for cropping, too.
    """
    tensor, pads = call.args[:2]
    known = tracer.known(tensor)
    amounts = {
        tensor.dim() - 1 - i // 2: pads[i : i + 2] for i in range(0, len(pads), 2) if any(pads[i : i + 2])
    }
    constant = (
        call.name.rstrip("_") in ("pad", "constant_pad_nd") and call.named("mode", "constant") == "constant"
    )
    labels = list(known.labels)
    for dim, (before, after) in amounts.items():
        if not constant or min(before, after) < 0:
            labels = apart_from(tracer, labels, [dim], "it is padded by what is beside it, or cropped")
            continue
        if any(dim in span(one) for one in labels):
            beside = [_constants(tracer, amount) for amount in (before, after)]
            labels = [_padded(one, dim, beside) for one in labels]
    for one in labels:
        tracer.seen.grid(one)
    tracer.read(tensor)
    feeds = None if call.named("value") else known.feeds
    tracer.learn(call.outputs[0], Known(tuple(labels), known.weight, feeds, known.squashed))


def _constants(tracer: Tracer, amount: int) -> Tensor:
    """Labels of channels that a pad adds. An attribute that is their number shrinks with them; else they stay."""
    if not amount:
        return torch.zeros(0)
    first = tracer.seen.add_axis(MADE, 0, int(amount)).first
    atoms = torch.arange(first, first + int(amount), dtype=torch.float32)
    if isinstance(amount, NamedInt):
        tracer.seen.sizes.append(SizeUse(amount.attribute, to_atoms(atoms)[:, None]))
        return atoms
    tracer.seen.fix(atoms, "constants are padded opposite to it, and the code says how many")
    if isinstance(amount, (MultipleInt, PartInt)):
        attribute = amount.attribute if isinstance(amount, MultipleInt) else amount.whole.attribute
        tracer.seen.sizes.append(SizeUse(attribute, None))
    return atoms


def _padded(labels: Tensor, dim: int, beside: Sequence[Tensor]) -> Tensor:
    """Labels between those of the constants before and after them along `dim`, if they run along it."""
    if labels.shape[dim] == 1:
        return labels
    shape = [*labels.shape]
    parts = [
        along(one, dim, labels.dim()).expand([-1 if d == dim else n for d, n in enumerate(shape)])
        for one in beside
    ]
    return torch.cat([parts[0], labels, parts[1]], dim)


def concatenating(tracer: Tracer, call: OperatorCall) -> None:
    """cat and stack: labels are joined as values are; along other dimensions the parts go together."""
    tensors = [t for t in call.args[0] if t.numel()] if call.args else list(call.tensors)
    dim = call.arg(1, "dim", 0)
    n = call.outputs[0].dim()
    stacks = call.name == "stack"
    dim = dim % n
    known = [tracer.known(t) for t in tensors]
    for t in tensors:
        tracer.read(t)
    arrays = [[labels.unsqueeze(dim) if stacks else labels for labels in k.labels] for k in known]
    shapes = [list(t.unsqueeze(dim).shape if stacks else t.shape) for t in tensors]
    labels = concatenated(tracer, arrays, shapes, dim)
    tracer.learn(call.outputs[0], Known(labels, all(k.weight for k in known), joined(k.feeds for k in known)))


def concatenated(
    tracer: Tracer, arrays: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[int]], dim: int
) -> tuple[Tensor, ...]:
    """The labels of parts that are joined along `dim`; along other dimensions the parts go together.

    `arrays` has the labels of each part, `shapes` its shape.
    """
    others: dict[tuple[int, ...], None] = {}
    for own in arrays:
        others.update((tuple(d for d in span(labels) if d != dim), None) for labels in own)
    results = []
    for rest in others:
        found = [
            {tuple(d for d in span(labels) if d != dim): labels for labels in own}.get(rest) for own in arrays
        ]
        varies = any(one is not None and one.shape[dim] > 1 for one in found) or not rest
        if not varies:
            present = [one for one in found if one is not None]
            for other in present[1:]:
                tracer.seen.couple(present[0], other)
            if len(present) < len(found):
                tracer.seen.fix(present[0], "it is joined with a tensor whose size is fixed")
            results.append(present[0])
            continue
        parts = []
        for one, shape in zip(found, shapes, strict=True):
            target = [size if d in rest or d == dim else 1 for d, size in enumerate(shape)]
            parts.append((torch.full((1,) * len(shape), float(FIXED)) if one is None else one).expand(target))
        results.append(compressed(torch.cat(parts, dim)))
    merged = merged_by_span(results, tracer.seen.couple)
    for one in merged:
        tracer.seen.grid(one)
    return merged


def unfolding(tracer: Tracer, call: OperatorCall) -> None:
    """im2col: (n, c, h, w) -> (n, c x kernel, patches); every channel owns `kernel` positions in a row."""
    tensor, out = call.args[0], call.outputs[0]
    known = tracer.known(tensor)
    channel, repeat = tensor.dim() - 3, out.shape[-2] // tensor.shape[-3]
    labels = []
    for one in known.labels:
        if set(span(one)) & {tensor.dim() - 1, tensor.dim() - 2}:
            tracer.seen.fix(one, MIXES.format(call.name))
            continue
        flat = one.flatten(-2)
        labels.append(flat.repeat_interleave(repeat, channel) if one.shape[channel] > 1 else flat)
    tracer.read(tensor)
    tracer.learn(out, Known(tuple(labels), known.weight, known.feeds, known.squashed))


def folding(tracer: Tracer, call: OperatorCall) -> None:
    """col2im: (n, c x kernel, patches) -> (n, c, h, w); the positions of one channel are added up."""
    tensor, out = call.args[0], call.outputs[0]
    known = tracer.known(tensor)
    channel = tensor.dim() - 2
    labels = []
    for one in known.labels:
        if one.shape[-1] > 1:
            tracer.seen.fix(one, MIXES.format(call.name))
            continue
        if one.shape[channel] > 1:
            parts = one.reshape(*one.shape[:channel], out.shape[-3], -1, one.shape[-1])
            tracer.seen.couple(parts.narrow(channel + 1, 0, 1), parts)
            one = parts.select(channel + 1, 0)
        labels.append(one.unsqueeze(-1))
    tracer.read(tensor)
    tracer.learn(out, Known(tuple(labels), known.weight, known.feeds, known.squashed))
