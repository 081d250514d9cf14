"""What can be cut: coupled channels as plain data, by tensor name and index, never by module object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import gcd, lcm
from typing import Literal

from sparsekit.errors import InputError
from sparsekit.machine import channel_multiple
from sparsekit.options import RoundTo
from sparsekit.structure.latency_curve import LatencyCurve
from sparsekit.structure.places import Place

Role = Literal[
    "producer", "norm", "depthwise", "consumer", "parameter", "response", "layer_norm", "size", "inside"
]


@dataclass(frozen=True)
class Rounding:
    """In multiples of how many channels a group is kept, and how many of them stay at least.

    A group keeps a multiple of `multiple`, or all it has. `least` is 0 for a block, which can go as a whole.
    """

    multiple: int = 1
    least: int = 1


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
    or names the residual block that the group's one channel is: without it the block passes its input on. `rounding`
    says how many channels a cut may keep.
    """

    name: str
    n_channels: int
    members: tuple[Member, ...]
    frozen: str = ""
    rewrites: tuple[Place, ...] = ()
    bypass: str = ""
    rounding: Rounding = Rounding()

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

    def rounded_to(self, multiple: int, min_channels: int) -> ChannelGroup:
        """The group with a rounding that leaves its layers a multiple of `multiple` channels, `min_channels` at least.

        Both count channels of the layers: a head of 64 channels is one of the group's.
        """
        if self.bypass:
            return replace(self, rounding=Rounding(1, 0))
        own = multiple // gcd(multiple, self.width)
        return replace(self, rounding=Rounding(own, max(self.units(min_channels), 1)))

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
    `attributes` the value or values of each integer attribute that some group sizes. `round_to` and `min_channels` are
    what the groups' rounding was made of.
    """

    groups: tuple[ChannelGroup, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    layers: tuple[LayerCost, ...] = ()
    tensor_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    attributes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    round_to: RoundTo = 1
    min_channels: int = 1

    def with_rounding(self, round_to: RoundTo, min_channels: int) -> ChannelGroups:
        """The same groups, kept in multiples of `round_to` channels of their layers, `min_channels` at least.

        "auto" is the step in which a group's layers were measured to get faster (`measure_layers`), and until then the
        step of this processor: 16 channels with AVX-512, else 8. Raises InputError for a number below 1 (0 channels
        may stay).
        """
        if (round_to != "auto" and round_to < 1) or min_channels < 0:
            raise InputError(
                "round_to must be 'auto' or at least 1, and min_channels at least 0, got "
                f"{round_to!r} and {min_channels}"
            )
        steps = self._measured_steps() if round_to == "auto" else {}
        default = channel_multiple() if round_to == "auto" else round_to
        rounded = tuple(g.rounded_to(steps.get(g.name, default), min_channels) for g in self.groups)
        return replace(self, groups=rounded, round_to=round_to, min_channels=min_channels)

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

    def _measured_steps(self) -> dict[str, int]:
        """By group the smallest number of channels that is a whole step of all its layers; {} if not measured."""
        steps: dict[tuple[str, int], int] = {}
        for layer in self.layers:
            if layer.curve is None:
                return {}
            steps |= {(layer.weight, dim): step for dim, step in enumerate(layer.curve.steps)}
        return {g.name: lcm(*(steps.get((m.tensor, m.dim), 1) for m in g.members)) for g in self.groups}
