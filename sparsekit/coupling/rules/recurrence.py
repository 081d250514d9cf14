"""Recurrent layers, told as a whole: a hidden unit is a channel that has a row in every gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.coupling.labels import along, span
from sparsekit.coupling.observations import joined, to_atoms
from sparsekit.coupling.rules.meeting import COMPUTED, MIXES, sized_dims, together, unknown
from sparsekit.coupling.tracer import Known, OperatorCall, Tracer

# The gate that makes values, which the others only scale: g of the gates i, f, g, o of an LSTM, n of r, z, n of a GRU.
# Where its rows and biases are zero the unit is, from a state of zeros on: an LSTM has c = f c +
# i tanh(0) = 0 and h = o tanh(c) = 0, a GRU h = (1 - z) tanh(0) + z h = 0.
_CANDIDATE = 2
_STATE = "its initial state has a fixed size; leave the state out, or make it of an attribute's size"


@dataclass(frozen=True)
class _Cell:
    """The parameters of one layer in one direction; `projection` is None without `proj_size`."""

    reads_input: Tensor
    reads_state: Tensor
    biases: Sequence[Tensor]
    projection: Tensor | None


def recurrent(tracer: Tracer, call: OperatorCall) -> None:
    """LSTM, GRU, RNN and their cells: unit c goes in all gates, layers and directions, because they have one size.

    It owns a row in each gate of the weights, with biases, a column of what reads the state, and a column of the next
    layer for each direction. With a projection its units are those that go, and the hidden units stay: torch tells a
    projection by two different sizes, which a cut could make equal.
    """
    module = call.args[0]
    try:
        layers = _layers(module)
        _follow(tracer, call, layers)
    except ValueError:
        for parameter in module.parameters():
            for one in tracer.known(parameter).labels:
                tracer.seen.note("producer" if span(one) == (0,) else "consumer", one)
                tracer.seen.fix(one, COMPUTED)
        unknown(tracer, call)


def _follow(tracer: Tracer, call: OperatorCall, layers: Sequence[Sequence[_Cell]]) -> None:
    units = states = torch.zeros(0)
    for number, layer in enumerate(layers):
        for cell in layer:
            own, made = _units_of(tracer, cell)
            units, states = (units, states) if len(units) else (own, made)
            tracer.seen.couple(units, own)
            tracer.seen.couple(states, made)
            if number:
                columns = _vector(tracer, cell.reads_input, 1).reshape(len(layer), -1)
                tracer.seen.note("consumer", columns)
                tracer.seen.couple(columns, states)
    fed = call.arg(1, "input")
    _read_input(
        tracer, fed if isinstance(fed, Tensor) else fed.data, [cell.reads_input for cell in layers[0]]
    )
    hx = call.arg(2, "hx")
    for state, wanted in zip(_as_tuple(hx), (states, units), strict=False):
        _read_state(tracer, state, wanted)
    # Of packed sequences come also tensors that count and order the images.
    made_here = [one for one in call.outputs if one.is_floating_point()]
    output, after = made_here[0], made_here[0 if isinstance(call.args[0], nn.RNNCellBase) else 1 :]
    _learn(tracer, output, states.repeat(output.shape[-1] // len(states)))
    for state, wanted in zip(after, (states, units), strict=False):
        _learn(tracer, state, wanted)


def _as_tuple(hx: Any) -> tuple[Tensor, ...]:
    return () if hx is None else (hx,) if isinstance(hx, Tensor) else tuple(hx)


def _layers(module: Any) -> list[list[_Cell]]:
    if isinstance(module, nn.RNNCellBase):
        biases = [b for b in (module.bias_ih, module.bias_hh) if isinstance(b, Tensor)]
        return [[_Cell(module.weight_ih, module.weight_hh, biases, None)]]
    directions = ("", "_reverse") if module.bidirectional else ("",)

    def cell(end: str) -> _Cell:
        biases = [getattr(module, f"bias_{kind}_{end}") for kind in ("ih", "hh") if module.bias]
        projection = getattr(module, f"weight_hr_{end}") if module.proj_size else None
        return _Cell(
            getattr(module, f"weight_ih_{end}"), getattr(module, f"weight_hh_{end}"), biases, projection
        )

    return [[cell(f"l{layer}{way}") for way in directions] for layer in range(module.num_layers)]


def _units_of(tracer: Tracer, cell: _Cell) -> tuple[Tensor, Tensor]:
    """The labels of a cell's hidden units, and of what it puts out: the same, or the rows of the projection."""
    written = [cell.reads_input, cell.reads_state, *cell.biases]
    hidden = cell.reads_state.shape[1] if cell.projection is None else cell.projection.shape[1]
    gates = [_vector(tracer, one, 0).reshape(-1, hidden) for one in written]
    units = gates[0][-1]
    for rows in gates:
        tracer.seen.note("producer", rows)
        tracer.seen.couple(units, rows)
        if len(rows) > 1:
            tracer.seen.note("gate", rows[[i for i in range(len(rows)) if i != _CANDIDATE]])
    states = units
    if cell.projection is not None:
        columns, states = _vector(tracer, cell.projection, 1), _vector(tracer, cell.projection, 0)
        tracer.seen.note("consumer", columns)
        tracer.seen.couple(units, columns)
        tracer.seen.note("producer", states)
        tracer.seen.fix(
            units, "torch tells the projection behind it by its size, which a cut could make equal"
        )
    columns = _vector(tracer, cell.reads_state, 1)
    tracer.seen.note("consumer", columns)
    tracer.seen.couple(states, columns)
    return units, states


def _vector(tracer: Tracer, tensor: Tensor, dim: int) -> Tensor:
    """The labels of a parameter along a dimension. Raises ValueError if it has none: it is computed, or has size 1."""
    for one in tracer.known(tensor).labels:
        if span(one) == (dim,):
            return one.flatten()
    raise ValueError("it has no labels of its own there")


def _read_input(tracer: Tracer, tensor: Tensor, weights: Sequence[Tensor]) -> None:
    """Columns meet the channels that are read, in the last dimension. Other labels are fixed: a step needs the last."""
    tracer.read(tensor)
    last = tensor.dim() - 1
    read = []
    for one in tracer.known(tensor).labels:
        if span(one) == (last,):
            read.append(one.flatten())
        else:
            tracer.seen.fix(one, MIXES.format("a recurrent layer over it"))
    for weight in weights if tensor.shape[last] > 1 else ():
        columns = _vector(tracer, weight, 1)
        tracer.seen.note("consumer", columns)
        if not read:
            tracer.seen.fix(columns, "it reads channels whose number is fixed")
        for other in read:
            tracer.seen.couple(columns, other)


def _read_state(tracer: Tracer, state: Tensor, units: Tensor) -> None:
    """What a first state holds in its last dimension goes with the units."""
    tracer.read(state)
    last = state.dim() - 1
    labels = tracer.known(state).labels
    along_units = [one for one in labels if last in span(one)]
    for one in labels:
        if last not in span(one):
            tracer.seen.fix(one, "it numbers the layers or images of a recurrent layer's state")
    for one in along_units:
        first = together(tracer, one, [d for d in span(one) if d != last])
        tracer.seen.couple(units, first.flatten())
    if not along_units and last in sized_dims(state):
        tracer.seen.fix(units, _STATE)


def _learn(tracer: Tracer, tensor: Tensor, labels: Tensor) -> None:
    feeds = joined([to_atoms(labels)])
    tracer.learn(tensor, Known((along(labels, tensor.dim() - 1, tensor.dim()),), feeds=feeds))


def packing(tracer: Tracer, call: OperatorCall) -> None:
    """pack_padded_sequence and back: steps of several images are put into one dimension, or taken out of it again."""
    tensor, out = call.args[0], call.outputs[0]
    known, moved_by = tracer.known(tensor), out.dim() - tensor.dim()
    tracer.read(tensor)
    labels = []
    for one in known.labels:
        if min(span(one)) + moved_by < (1 if moved_by < 0 else 2):
            tracer.seen.fix(one, MIXES.format("a recurrent layer over it"))
        else:
            labels.append(one.squeeze(0) if moved_by < 0 else one.unsqueeze(0))
    tracer.learn(out, Known(tuple(labels), known.weight, known.feeds, known.squashed))
