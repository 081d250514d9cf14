"""Maps that change one by one: pooled, resized, sampled at points, transformed; every channel by itself."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

from sparsekit.coupling.labels import divided, span
from sparsekit.coupling.rules.meeting import (
    MIXES,
    PLACES,
    Operand,
    apart_from,
    combine,
    fix_all,
    meet,
    sized_dims,
    together,
    within,
)
from sparsekit.coupling.tracer import Known, OperatorCall, Tracer


def per_map(tracer: Tracer, call: OperatorCall) -> None:
    """Pooling and resizing: each map changes by itself, in its last dimensions (1d, 2d, 3d)."""
    tensor = call.args[0]
    known = tracer.known(tensor)
    fix_all(tracer, (t for t in call.tensors if t is not tensor), PLACES)
    labels = within(tracer, known.labels, _map_dims(call, tensor), MIXES.format(call.name))
    tracer.read(tensor)
    for output in call.outputs:
        tracer.learn(output, Known(tuple(labels), known.weight, known.feeds, known.squashed))


def _map_dims(call: OperatorCall, tensor: Tensor) -> range:
    """The dimensions of a map: as many of the last ones as the operator's name says."""
    found = re.search(r"([123])d", call.name)
    return range(tensor.dim() - int(found[1]) if found else 2, tensor.dim())


def drawn_pooling(tracer: Tracer, call: OperatorCall) -> None:
    """fractional_max_pool: regions are drawn channel by channel, with fewer channels others; so all stay."""
    fix_all(tracer, call.tensors, f"{call.name} draws regions for each channel, and others once one is gone")
    for output in call.outputs:
        tracer.learn(output, Known())


def unpooling(tracer: Tracer, call: OperatorCall) -> None:
    """max_unpool: values go where the indices say, each map by itself; so maps and those of the indices go together."""
    tensor, indices = call.args[:2]
    known = tracer.known(tensor)
    labels = combine(tracer, (tensor, indices), tensor.shape)
    labels = tuple(within(tracer, labels, _map_dims(call, tensor), MIXES.format(call.name)))
    for read in (tensor, indices):
        tracer.read(read)
    tracer.learn(call.outputs[0], Known(labels, known.weight, known.feeds, known.squashed))


def sampling(tracer: Tracer, call: OperatorCall) -> None:
    """grid_sample: each map is sampled at the points of a grid, whose numbers stay; entries of the batch meet."""
    tensor, grid = call.args[:2]
    known = tracer.known(tensor)
    maps = range(2, tensor.dim())
    labels = within(tracer, known.labels, maps, MIXES.format(call.name))
    for read in (tensor, grid):
        tracer.read(read)
    maps_read = Operand(labels, sized_dims(tensor) - set(maps), known.weight)
    points = Operand(_by_entry(tracer, grid, tensor.dim()), sized_dims(grid) & {0})
    merged = meet(tracer, (maps_read, points))
    tracer.learn(call.outputs[0], Known(merged, known.weight, known.feeds, known.squashed))


def grid_making(tracer: Tracer, call: OperatorCall) -> None:
    """affine_grid: one grid for each entry of the batch; the numbers of its matrix stay."""
    theta, grid = call.args[0], call.outputs[0]
    tracer.read(theta)
    tracer.learn(grid, Known(tuple(_by_entry(tracer, theta, grid.dim())), tracer.known(theta).weight))


def _by_entry(tracer: Tracer, tensor: Tensor, n_dims: int) -> list[Tensor]:
    """The labels along the batch, laid along dimension 0 of `n_dims`; what lies in one entry goes together or stays."""
    labels = within(tracer, tracer.known(tensor).labels, range(1, tensor.dim()), PLACES)
    return [one.reshape(-1, *[1] * (n_dims - 1)) for one in labels]


def region_pooling(tracer: Tracer, call: OperatorCall) -> None:
    """roi_align, roi_pool: each map is pooled in boxes of its own; boxes and the batch that they number stay."""
    _pool_regions(tracer, call, tracer.known(call.args[0]).labels)


def position_pooling(tracer: Tracer, call: OperatorCall) -> None:
    """ps_roi_align, ps_roi_pool: the maps of one output channel, one for each bin, go together."""
    n_bins = call.outputs[0].shape[-2] * call.outputs[0].shape[-1]
    labels = []
    for one in tracer.known(call.args[0]).labels:
        if one.shape[1] > 1:
            bins = divided(one, 1, one.shape[1] // n_bins)
            one = together(tracer, bins, [2]).squeeze(2)
        labels.append(one)
    _pool_regions(tracer, call, labels)


def _pool_regions(tracer: Tracer, call: OperatorCall, labels: Sequence[Tensor]) -> None:
    tensor, boxes = call.args[:2]
    known = tracer.known(tensor)
    fix_all(tracer, [boxes], PLACES)
    labels = within(tracer, labels, (2, 3), MIXES.format(call.name))
    labels = apart_from(tracer, labels, [0], "boxes give its number in the batch")
    tracer.read(tensor)
    for output in call.outputs:
        tracer.learn(output, Known(tuple(labels), known.weight, known.feeds, known.squashed))


def transforming(tracer: Tracer, call: OperatorCall) -> None:
    """Fourier transforms: each map by itself, along the dimensions that the call gives."""
    tensor = call.args[0]
    known = tracer.known(tensor)
    dims = {d % tensor.dim() for d in call.named("dim")}
    labels = within(tracer, known.labels, dims, MIXES.format("a Fourier transform over it"))
    tracer.read(tensor)
    tracer.learn(call.outputs[0], Known(tuple(labels), known.weight, known.feeds))


def complex_parts(tracer: Tracer, call: OperatorCall) -> None:
    """view_as_real, view_as_complex: a complex number is two entries of a last dimension, which stay."""
    tensor = call.args[0]
    known = tracer.known(tensor)
    if call.name == "view_as_real":
        labels = [one.unsqueeze(-1) for one in known.labels]
    else:
        last = [tensor.dim() - 1]
        labels = within(tracer, known.labels, last, "it is a part of a complex number")
        labels = [one.squeeze(-1) for one in labels]
    tracer.read(tensor)
    merged = tuple(one for one in labels if span(one))
    tracer.learn(call.outputs[0], Known(merged, known.weight, known.feeds, known.squashed))
