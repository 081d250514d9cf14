"""What channels cost: one model of MACs, parameters, channels and latency for all who ask."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sparsekit.errors import InputError
from sparsekit.options import Quantity
from sparsekit.structure.groups import ChannelGroups, LayerCost

Array = NDArray[np.float64]
# A dimension: the indices that stay in any case, and how many more each kept channel of a group brings.
_Dimension = tuple[float, Mapping[str, float]]


@dataclass(frozen=True)
class CostTerm:
    """One addend of a cost: `of` its dimensions' sizes; 0 where one of `gates` (blocks that go as a whole) is shut."""

    dimensions: tuple[_Dimension, ...]
    of: Callable[..., Array | float]
    gates: tuple[str, ...] = ()

    @property
    def names(self) -> set[str]:
        return {*self.gates, *(name for _, brings in self.dimensions for name in brings)}

    def at(self, counts: Mapping[str, Array | float]) -> Array | float:
        """Its value; counts may be arrays that broadcast against each other."""
        sizes = [
            base + sum((brings[name] * counts[name] for name in brings), start=0.0)
            for base, brings in self.dimensions
        ]
        value: Array | float = self.of(*sizes)
        for gate in self.gates:
            value = np.multiply(value, np.asarray(counts[gate]) > 0)
        return value


def terms_by_group(terms: Sequence[CostTerm]) -> dict[str, list[CostTerm]]:
    touching: dict[str, list[CostTerm]] = {}
    for term in terms:
        for name in term.names:
            touching.setdefault(name, []).append(term)
    return touching


def cost_terms(groups: ChannelGroups, quantity: Quantity) -> list[CostTerm] | None:
    """The addends of a quantity; None for latencies that have not been measured."""
    shapes = {layer.weight: layer.shape for layer in groups.layers} | dict(groups.tensor_shapes)
    brought: dict[tuple[str, int], dict[str, float]] = {}
    for group in groups.free:
        for member in group.members if not group.bypass else ():
            if member.role != "size":
                dimension = brought.setdefault((member.tensor, member.dim), {})
                dimension[group.name] = dimension.get(group.name, 0.0) + member.repeat
    sizes = {group.name: group.n_channels for group in groups.free}
    gates = [group for group in groups.free if group.bypass]

    def term(tensor: str, n_dims: int, of: Callable[..., Array | float]) -> CostTerm:
        dimensions = []
        for dim, size in enumerate(shapes[tensor][:n_dims]):
            brings = brought.get((tensor, dim), {})
            base = size - sum(each * sizes[name] for name, each in brings.items())
            dimensions.append((float(base), brings))
        shut = tuple(gate.name for gate in gates if tensor.startswith(f"{gate.bypass}."))
        return CostTerm(tuple(dimensions), of, shut)

    if quantity == "latency":
        if any(layer.curve is None for layer in groups.layers):
            return None
        return [term(layer.weight, 2, layer.curve.at) for layer in groups.layers if layer.curve is not None]
    if quantity == "channels":
        return [
            CostTerm(
                ((0.0, {group.name: 1.0}),),
                _product(1),
                tuple(g.name for g in gates if g is not group and group.lies_in(g.bypass)),
            )
            for group in groups.free
        ]
    if quantity == "macs":
        return [term(layer.weight, len(layer.shape), _product(layer.positions)) for layer in groups.layers]
    return [term(name, len(shapes[name]), _product(1)) for name in groups.parameters]


def _product(factor: float) -> Callable[..., Array | float]:
    def product(*sizes: Array | float) -> Array | float:
        value: Array | float = factor
        for size in sizes:
            value = value * size
        return value

    return product


def channel_macs(groups: ChannelGroups) -> dict[str, float]:
    """MACs that one channel of each free group costs in the layers that make, filter and read it, by group name.

    At the widths the model has now; a layer between two groups counts in both.
    """
    return _channel_costs(groups, {layer.weight: float(layer.macs) for layer in groups.layers})


def channel_latencies(groups: ChannelGroups) -> dict[str, float]:
    """Milliseconds that one channel of each free group costs, like `channel_macs`.

    Raises InputError for groups that `measure_layers` has not measured.
    """
    return _channel_costs(groups, {layer.weight: _measured(layer) for layer in groups.layers})


def _channel_costs(groups: ChannelGroups, of_layer: Mapping[str, float]) -> dict[str, float]:
    shapes = {layer.weight: layer.shape for layer in groups.layers}
    return {
        group.name: sum(
            of_layer[m.tensor] * m.repeat / shapes[m.tensor][m.dim]
            for m in group.members
            if m.role != "size" and m.tensor in of_layer
        )
        for group in groups.free
    }


def _measured(layer: LayerCost) -> float:
    if layer.ms is None:
        raise InputError(
            "the layers' latencies have not been measured; take the groups that sparsekit.measure_layers returns"
        )
    return layer.ms


@dataclass(frozen=True)
class CostShare:
    """What masks would leave, as fractions in (0, 1] of the dense model's layer MACs, parameters and channels.

    `latency`: of the time that the dense model takes, by the curves of its layers; NaN where it was not measured.
    """

    macs: float
    params: float
    channels: float
    latency: float = math.nan


def kept_share(groups: ChannelGroups, masks: Mapping[str, Tensor]) -> CostShare:
    """Share of MACs, parameters and free channels that the keep-masks (True = keep) would leave.

    MACs are those of convolutions and linear layers: products between activations (attention scores) depend on
    no weight and are left out.
    """
    kept_counts = {name: int(mask.sum()) for name, mask in masks.items()}
    removed: dict[tuple[str, int], int] = {}
    gone_channels = 0
    bypassed = [group.bypass for group in groups.free if group.bypass and kept_counts.get(group.name) == 0]
    for group in groups.free:
        gone = group.n_channels - kept_counts.get(group.name, group.n_channels)
        if any(group.lies_in(block) for block in bypassed):
            gone = group.n_channels
        gone_channels += gone
        for member in group.members if gone else ():
            key = (member.tensor, member.dim)
            removed[key] = removed.get(key, 0) + gone * member.repeat

    def sizes_left(tensor: str, shape: tuple[int, ...]) -> list[int]:
        # A block that goes as a whole may have lost channels as well.
        return [max(size - removed.get((tensor, dim), 0), 0) for dim, size in enumerate(shape)]

    def left(tensor: str, shape: tuple[int, ...]) -> int:
        return prod(sizes_left(tensor, shape))

    dense_macs = sum(layer.macs for layer in groups.layers)
    dense_ms = sum(math.nan if layer.ms is None else layer.ms for layer in groups.layers)
    ms = sum(
        math.nan if layer.curve is None else float(layer.curve.at(*sizes_left(layer.weight, layer.shape)[:2]))
        for layer in groups.layers
    )
    macs = sum(left(layer.weight, layer.shape) * layer.positions for layer in groups.layers)
    dense_params = sum(prod(groups.tensor_shapes[name]) for name in groups.parameters)
    params = sum(left(name, groups.tensor_shapes[name]) for name in groups.parameters)
    channels = sum(group.n_channels for group in groups.free)
    return CostShare(
        macs=macs / dense_macs if dense_macs else 1.0,
        params=params / dense_params if dense_params else 1.0,
        channels=1 - gone_channels / channels if channels else 1.0,
        latency=ms / dense_ms if dense_ms else math.nan,
    )
