"""The cost model: MACs, params, channels and latency as functions of how many channels each group keeps.

A cost is a sum of terms, one for each layer or tensor. A term is a function of the sizes of its dimensions. A size is a
constant plus what each kept channel adds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sparsekit.errors import InputError
from sparsekit.options import Quantity
from sparsekit.structure.groups import ChannelGroup, ChannelGroups

Array = NDArray[np.float64]
Counts = Mapping[str, Array | float]
# A dimension: the indices that stay in any case, and how many each kept channel of a group adds.
_Dimension = tuple[float, Mapping[str, float]]


@dataclass(frozen=True)
class CostTerm:
    """One term of a cost: a function `of` the sizes of its dimensions; 0 if one of `gates` (residual blocks) is cut."""

    dimensions: tuple[_Dimension, ...]
    of: Callable[..., Array | float]
    gates: tuple[str, ...] = ()

    @property
    def names(self) -> set[str]:
        """Names of the groups that it depends on."""
        return {*self.gates, *(name for _, brings in self.dimensions for name in brings)}

    def at(self, counts: Counts) -> Array | float:
        """Return its value if so many channels of each group are kept. Counts may be arrays that broadcast."""
        value: Array | float = self.of(*self._sizes(counts))
        for gate in self.gates:
            value = np.multiply(value, np.asarray(counts[gate]) > 0)
        return value

    def per_channel(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Return by group one channel's part of the value: value x what it adds / size, summed over dimensions."""
        value, sizes = float(self.at(counts)), self._sizes(counts)
        parts = dict.fromkeys(self.gates, value)
        for (_, brings), size in zip(self.dimensions, sizes, strict=True):
            for name, each in brings.items():
                parts[name] = parts.get(name, 0.0) + value * each / float(size)
        return parts

    def per_group(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Return by group how much the value falls if all its channels go."""
        value, sizes = float(self.at(counts)), self._sizes(counts)
        falls = dict.fromkeys(self.gates, value)
        for name in self.names - set(self.gates):
            left = [
                size - brings.get(name, 0.0) * counts[name]
                for (_, brings), size in zip(self.dimensions, sizes, strict=True)
            ]
            falls[name] = value - float(self.of(*left))
        return falls

    def _sizes(self, counts: Counts) -> list[Array | float]:
        return [
            base + sum((brings[name] * counts[name] for name in brings), start=0.0)
            for base, brings in self.dimensions
        ]


class CostModel:
    """The costs of one model as functions of how many channels each group keeps.

    Counts are by group name; a group that is not named keeps all channels. With `frozen` the costs of frozen groups can
    be asked for too.
    """

    def __init__(self, groups: ChannelGroups, *, frozen: bool = False) -> None:
        self._groups = groups
        self._counted = groups.groups if frozen else groups.free
        self._all: dict[str, float] = {group.name: float(group.n_channels) for group in self._counted}
        self._terms: dict[Quantity, tuple[CostTerm, ...]] = {}
        self._dense_costs: dict[Quantity, float] = {}

    def terms(self, quantity: Quantity) -> tuple[CostTerm, ...]:
        """Return the terms of a quantity. Raises InputError for a latency that has not been measured."""
        if quantity not in self._terms:
            self._terms[quantity] = tuple(self._make(quantity))
        return self._terms[quantity]

    def of(self, quantity: Quantity, counts: Counts | None = None) -> float:
        """Return the cost of the model with so many channels left."""
        full: Counts = self._all if counts is None else self._all | dict(counts)
        return float(sum(term.at(full) for term in self.terms(quantity)))

    def share(self, quantity: Quantity, masks: Mapping[str, Tensor]) -> float:
        """Return the share of a quantity that keep-masks leave, in [0, 1]; 1 if the model has none of it."""
        dense = self._dense(quantity)
        counts = {name: float(mask.sum()) for name, mask in masks.items() if name in self._all}
        return self.of(quantity, counts) / dense if dense else 1.0

    def per_channel(self, quantity: Quantity) -> dict[str, float]:
        """Return by group name the cost of one channel at the present widths of the model."""
        return self._summed(term.per_channel(self._all) for term in self.terms(quantity))

    def per_group(self, quantity: Quantity) -> dict[str, float]:
        """Return by group name what goes with all its channels, while all others stay."""
        return self._summed(term.per_group(self._all) for term in self.terms(quantity))

    def _summed(self, parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
        total = dict.fromkeys(self._all, 0.0)
        for part in parts:
            for name, cost in part.items():
                total[name] += cost
        return total

    @cached_property
    def is_measured(self) -> bool:
        """Whether every layer has a latency."""
        return all(layer.curve is not None for layer in self._groups.layers)

    def _dense(self, quantity: Quantity) -> float:
        if quantity not in self._dense_costs:
            self._dense_costs[quantity] = self.of(quantity)
        return self._dense_costs[quantity]

    def _make(self, quantity: Quantity) -> list[CostTerm]:
        groups = self._groups
        if quantity == "channels":
            return [self._of_channels(group) for group in self._counted]
        if quantity == "params":
            shapes = groups.tensor_shapes
            return [self._term(name, shapes[name], _product(1)) for name in groups.parameters]
        if quantity == "macs":
            return [self._term(one.weight, one.shape, _product(one.positions)) for one in groups.layers]
        if not self.is_measured:
            raise InputError(
                "the layers' latencies have not been measured; take the groups that sparsekit.measure_layers returns"
            )
        return [self._term(x.weight, x.shape[:2], x.curve.at) for x in groups.layers if x.curve is not None]

    def _of_channels(self, group: ChannelGroup) -> CostTerm:
        gates = (g.name for g in self._blocks if g is not group and group.lies_in(g.bypass))
        return CostTerm(((0.0, {group.name: 1.0}),), _product(1), tuple(gates))

    def _term(self, tensor: str, shape: Sequence[int], of: Callable[..., Array | float]) -> CostTerm:
        dimensions = []
        for dim, size in enumerate(shape):
            brings = self._brought.get((tensor, dim), {})
            base = size - sum(each * self._all[name] for name, each in brings.items())
            dimensions.append((float(base), brings))
        return CostTerm(tuple(dimensions), of, tuple(self._gates.get(tensor, ())))

    @cached_property
    def _blocks(self) -> list[ChannelGroup]:
        return [group for group in self._counted if group.bypass]

    @cached_property
    def _gates(self) -> dict[str, list[str]]:
        """By tensor the residual blocks that it goes with."""
        gates: dict[str, list[str]] = {}
        for block in self._blocks:
            for member in block.members:
                gates.setdefault(member.tensor, []).append(block.name)
        return gates

    @cached_property
    def _brought(self) -> dict[tuple[str, int], dict[str, float]]:
        """By tensor and dimension, how many of its indices one channel of each group owns."""
        brought: dict[tuple[str, int], dict[str, float]] = {}
        for group in self._counted:
            for member in group.members if not group.bypass else ():
                if member.role != "size":
                    dimension = brought.setdefault((member.tensor, member.dim), {})
                    dimension[group.name] = dimension.get(group.name, 0.0) + member.repeat
        return brought


def channel_macs(groups: ChannelGroups) -> dict[str, float]:
    """Return by group name the MACs of one channel, in the layers that make, filter and read it.

    They are those at the present widths of the model. A layer between two groups counts in both.
    """
    return CostModel(groups).per_channel("macs")


def channel_latencies(groups: ChannelGroups) -> dict[str, float]:
    """Return by group name the milliseconds that one channel costs, as `channel_macs` does for MACs.

    Raises InputError for groups that `measure_layers` has not measured.
    """
    return CostModel(groups).per_channel("latency")


@dataclass(frozen=True)
class CostShare:
    """What keep-masks would leave of the dense model, as fractions in [0, 1].

    `latency` is predicted by the curves of the layers, and NaN where they were not measured.
    """

    macs: float
    params: float
    channels: float
    latency: float = math.nan


def kept_share(groups: ChannelGroups, masks: Mapping[str, Tensor]) -> CostShare:
    """Return the shares of MACs, params, free channels and latency that the keep-masks would leave.

    MACs are those of convolutions and linear layers. Products of activations, as in attention, are left out.
    """
    costs = CostModel(groups)
    quantities: tuple[Quantity, ...] = get_args(Quantity)
    return CostShare(
        **{
            q: costs.share(q, masks)
            for q in quantities
            if q != "latency" or (costs.is_measured and groups.layers)
        }
    )


def _product(factor: float) -> Callable[..., Array | float]:
    def product(*sizes: Array | float) -> Array | float:
        value: Array | float = factor
        for size in sizes:
            value = value * size
        return value

    return product
