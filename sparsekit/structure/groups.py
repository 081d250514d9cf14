"""What can be cut: coupled channels as plain data, by tensor name and index, never by module object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import gcd
from typing import Literal

from sparsekit.structure.latency_curve import LatencyCurve
from sparsekit.structure.places import Place

Role = Literal[
    "producer", "norm", "depthwise", "consumer", "parameter", "response", "layer_norm", "size", "inside"
]


@dataclass(frozen=True)
class Member:
    """One tensor of a group and the positions along one of its dimensions that the group's channels own.

    Channel `c` owns `positions[c * repeat : (c + 1) * repeat]` along dimension `dim` of the state-dict entry
    `tensor`. `repeat` is 1 for a convolution and the map's height x width for a linear layer behind a flatten.

    Roles: "producer" (output side: rows and bias), "norm" (scale, shift and running statistics), "depthwise"
    (one filter a channel or a block of them, passed through), "consumer" (input side of the next layer: columns),
    "parameter" (a bare one: position embedding, layer scale, a table of relative positions), "response" (the scale
    of a norm that divides by the mean over all channels (RMS, global response) and is made up for it when some go),
    "layer_norm" (scale and shift of a layer norm, whose statistics change with a cut: it is not lossless), "size"
    (`tensor` is an integer attribute that gives the number of positions; `dim` is its place in a tuple of them),
    "inside" (all of a tensor of a block that goes as a whole).
    `penalised` says whether a penalty acts on it; `norm` names the normalisation that directly follows a
    producer, because a row before it is scale-invariant and its magnitude says nothing on its own.
    """

    tensor: str
    dim: int
    positions: tuple[int, ...]
    repeat: int
    role: Role
    penalised: bool = False
    norm: str | None = None

    @property
    def module(self) -> str:
        """Name of the module that holds the tensor."""
        return self.tensor.rpartition(".")[0]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels coupled across layers: removing one removes it from every member.

    `n_channels` counts what can go on its own; where several indices of a layer can only go together (a chunk
    multiplied by another chunk), they count as one. `frozen` is empty, or says why nothing may be removed. `rewrites`
    are the places in the model's code that have to leave a size to torch once something is removed. `bypass` is empty,
    or names the residual block that the group's one channel is: without it the block passes its input on.
    """

    name: str
    n_channels: int
    members: tuple[Member, ...]
    frozen: str = ""
    rewrites: tuple[Place, ...] = ()
    bypass: str = ""

    def of_role(self, role: Role) -> tuple[Member, ...]:
        """The members with this role, in model order."""
        return tuple(member for member in self.members if member.role == role)

    @property
    def width(self) -> int:
        """How many channels of a layer go with one of the group's (at least): 64 for a head of 64, else mostly 1."""
        return gcd(*(m.repeat for m in self.members if m.role in ("producer", "depthwise", "consumer")))

    def units(self, n: int) -> int:
        """How many of the group's channels make up `n` channels of its layers, rounded up."""
        return -(-n // max(self.width, 1))

    def multiple(self, round_to: int) -> int:
        """Of which multiples of the group's channels are the layers' channels multiples of `round_to`."""
        return round_to // gcd(round_to, self.width)

    def rounding(self, round_to: int, min_channels: int) -> tuple[int, int]:
        """In multiples of how many of its channels the group is cut, and how many stay at least: 0 of a block."""
        if self.bypass:
            return 1, 0
        return self.multiple(round_to), max(self.units(min_channels), 1)

    def lies_in(self, module: str) -> bool:
        """Whether all tensors of the group are of that module, or of what it holds."""
        return all(member.tensor.startswith(f"{module}.") for member in self.members)

    @property
    def lossless(self) -> bool:
        """Whether removing channels that are zero changes nothing else: not where a layer norm runs over them."""
        return not self.of_role("layer_norm")

    @property
    def penalised(self) -> tuple[Member, ...]:
        """The members a penalty shrinks. All of them zero makes the channel exactly zero for every consumer.

        Unless something adds to it that is not its own, like the bias of a layer over tokens: the report's logit
        change at the cut shows that.
        """
        return tuple(member for member in self.members if member.penalised)

    @property
    def scales(self) -> tuple[Member, ...]:
        """The penalised members that are scales of norms."""
        return tuple(m for m in self.penalised if m.role == "norm" and m.tensor.endswith("weight"))

    @property
    def shifts(self) -> tuple[Member, ...]:
        """The penalised members that are shifts of norms."""
        return tuple(m for m in self.penalised if m.role == "norm" and not m.tensor.endswith("weight"))


@dataclass(frozen=True)
class LayerCost:
    """MACs of one layer: elements of its weight times the positions the weight is applied at (batch 1).

    `curve` is what it takes in ONNX Runtime, None until `measure_layers` has measured it.
    """

    weight: str
    shape: tuple[int, ...]
    positions: int
    curve: LatencyCurve | None = None

    @property
    def ms(self) -> float | None:
        """What the whole layer takes in ONNX Runtime, None until that has been measured."""
        return None if self.curve is None else self.curve.dense_ms

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one forward pass at batch 1."""
        n = self.positions
        for size in self.shape:
            n *= size
        return n


@dataclass(frozen=True)
class ChannelGroups:
    """Everything `find_groups` learned about a model, as plain data. Iterates over its groups.

    `input_shapes` are those of the example inputs; `layers` has a cost for every convolution and linear layer;
    `tensor_shapes` has the shape of every parameter and buffer, `parameters` the names of those that are trained,
    `attributes` the value or values of each integer attribute that some group sizes.
    """

    groups: tuple[ChannelGroup, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    layers: tuple[LayerCost, ...] = ()
    tensor_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    attributes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[ChannelGroup]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def free(self) -> tuple[ChannelGroup, ...]:
        """The groups that may be cut."""
        return tuple(group for group in self.groups if not group.frozen)

    def __getitem__(self, name: str) -> ChannelGroup:
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(name)
