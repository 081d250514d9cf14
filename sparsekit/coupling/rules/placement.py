"""Values that are read from, or written to, places in a tensor that other tensors or numbers give."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekit.coupling.labels import aligned, compressed, span
from sparsekit.coupling.observations import joined
from sparsekit.coupling.rules.meeting import PLACES, Operand, apart_from, fix_all, meet, sized_dims
from sparsekit.coupling.rules.movement import PICKED, indexed_dims
from sparsekit.coupling.tracer import Known, OperatorCall, Tracer


def gathering(tracer: Tracer, call: OperatorCall) -> None:
    """gather: along one dimension the index says what is read, so that stays; along the others all go together."""
    whole = call.name == "take_along_dim"
    tensor, index, dim = (call.args[i] for i in ((0, 1, 2) if whole else (0, 2, 1)))
    known = tracer.known(tensor)
    parts = _elementwise(tracer, (tensor, index), [dim % tensor.dim()], call.outputs[0].shape)
    tracer.learn(call.outputs[0], Known(meet(tracer, parts), known.weight, known.feeds, known.squashed))


def scattering(tracer: Tracer, call: OperatorCall) -> None:
    """scatter and its kin: along one dimension the index says what is written; along the others all go together."""
    tensor = call.args[0]
    dim = call.named("dim") % tensor.dim()
    written = call.named("src")
    operands = [tensor, call.args[2], *([written] if isinstance(written, Tensor) else [])]
    parts = _elementwise(tracer, operands, [dim], call.args[2].shape)
    _learn_written(tracer, call, parts, written)


def writing(tracer: Tracer, call: OperatorCall) -> None:
    """index_add, index_copy, slice_scatter and the like: what is written along one dimension stays where it is."""
    tensor = call.args[0]
    dim = call.named("dim") % tensor.dim()
    written = call.named("source", call.named("src"))
    operands = [tensor]
    if isinstance(written, Tensor) and written.dim():
        shown = written.unsqueeze(dim) if call.name == "select_scatter" else written
        tracer.learn(shown, _unsqueezed(tracer.known(written), dim, shown is not written))
        operands.append(shown)
    fix_all(tracer, (t for t in call.tensors if t is not tensor and t is not written), PLACES)
    _learn_written(tracer, call, _elementwise(tracer, operands, [dim], tensor.shape), written)


def _unsqueezed(known: Known, dim: int, needed: bool) -> Known:
    labels = tuple(one.unsqueeze(dim) for one in known.labels) if needed else known.labels
    return Known(labels, known.weight, known.feeds, known.squashed, known.origin)


def _elementwise(
    tracer: Tracer, tensors: Sequence[Tensor], placed: Sequence[int], shape: Sequence[int]
) -> list[Operand]:
    """Operands that meet element by element, apart from the dimensions in which places are given.

    What a tensor holds along a dimension of which only a part is read or written stays, too. An index may have been
    repeated to the size of what it reads: if that size is a number in the code, torch refuses it after any cut.
    """
    found = []
    for tensor in tensors:
        tracer.read(tensor)
        known = tracer.known(tensor)
        parts = {d for d in range(tensor.dim()) if tensor.shape[d] != shape[d]}
        labels = apart_from(tracer, known.labels, {*placed, *parts}, PICKED)
        present = frozenset() if tensor.dtype == torch.int64 else sized_dims(tensor) - set(placed)
        found.append(Operand(labels, present, known.weight))
    return found


def _learn_written(tracer: Tracer, call: OperatorCall, parts: Sequence[Operand], written: object) -> None:
    known = tracer.known(call.args[0])
    others = [tracer.known(written)] if isinstance(written, Tensor) else []
    weight = all(part.weight for part in parts)
    feeds = joined([known.feeds, *(one.feeds for one in others)]) if others else None
    tracer.learn(call.outputs[0], Known(meet(tracer, parts), weight, feeds))


def index_writing(tracer: Tracer, call: OperatorCall) -> None:
    """x[indices] = values: along the indexed dimensions what is there stays; along the others both go together."""
    tensor, indices, values = call.args[:3]
    n = tensor.dim()
    picked = indexed_dims(indices)
    fix_all(tracer, (index for index in indices if index is not None), PLACES)
    kept = [d for d in range(n) if d not in picked]
    # Where each kept dimension lies in x[indices]: labels of its own are moved there by the same indices.
    lies: dict[int, int] = {}
    for d in kept:
        marks = torch.arange(tensor.shape[d], dtype=torch.float32).reshape(
            [-1 if e == d else 1 for e in range(n)]
        )
        read = torch.ops.aten.index(marks.expand(tensor.shape), indices)
        lies |= dict.fromkeys(span(compressed(read)), d)
    known, given = tracer.known(tensor), tracer.known(values)
    own = Operand(apart_from(tracer, known.labels, picked, PICKED), sized_dims(tensor) - picked, known.weight)
    n_read = read.dim() if kept else values.dim()
    theirs = [aligned(one, n_read) for one in given.labels]
    theirs = apart_from(tracer, theirs, set(range(n_read)) - lies.keys(), PICKED)
    placed = [_laid(one, lies, n) for one in theirs]
    present = {
        lies[d + n_read - values.dim()] for d in sized_dims(values) if d + n_read - values.dim() in lies
    }
    for one in (tensor, values):
        tracer.read(one)
    parts = (own, Operand(placed, frozenset(present), given.weight))
    _learn_written(tracer, call, parts, values)


def _laid(labels: Tensor, lies: dict[int, int], n_dims: int) -> Tensor:
    """The labels with their dimensions where `lies` says, in the same order."""
    shape = [1] * n_dims
    for at in span(labels):
        shape[lies[at]] = labels.shape[at]
    return labels.reshape(shape)


def mask_writing(tracer: Tracer, call: OperatorCall) -> None:
    """masked_scatter: last dimensions along which the mask is the same go together with those of what is written."""
    tensor, mask, source = call.args[:3]
    n = tensor.dim()
    tail = 0
    while tail < min(mask.dim(), source.dim()) and not (
        mask.shape[-1 - tail] > 1 and mask.stride(mask.dim() - 1 - tail)
    ):
        if source.shape[-1 - tail] != tensor.shape[-1 - tail]:
            break
        tail += 1
    fix_all(tracer, [mask], PLACES)
    parts = []
    for one in (tensor, source):
        known, first = tracer.known(one), one.dim() - tail
        tracer.read(one)
        labels = apart_from(tracer, known.labels, range(first), PICKED)
        placed = [labels_.reshape(*[1] * (n - tail), *labels_.shape[first:]) for labels_ in labels]
        present = {d - one.dim() + n for d in sized_dims(one) if d >= first}
        parts.append(Operand(placed, frozenset(present), known.weight))
    _learn_written(tracer, call, parts, source)
