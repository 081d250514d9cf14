"""What can be cut: groups of coupled channels as plain data, by tensor name and index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import gcd, lcm
from typing import Any, Literal

from sparsekit.errors import InputError
from sparsekit.machine import channel_multiple
from sparsekit.options import RoundTo
from sparsekit.structure.inputs import InputSpec
from sparsekit.structure.latency_curve import LatencyCurve
from sparsekit.structure.places import Place

Role = Literal[
    "producer",
    "norm",
    "depthwise",
    "consumer",
    "parameter",
    "response",
    "layer_norm",
    "size",
    "inside",
    "silenced",
]


@dataclass(frozen=True)
class Rounding:
    """The numbers of channels that a group may keep: multiples of `multiple`, at least `least`, or all it has.

    `least` is 0 for a residual block, which can go as a whole.
    """

    multiple: int = 1
    least: int = 1


@dataclass(frozen=True)
class Member:
    """One tensor of a group and the positions along one of its dimensions that the group's channels own.

    Channel `c` owns `positions[c * repeat : (c + 1) * repeat]` along dimension `dim` of the state-dict entry
    `tensor`. `repeat` is 1 for a convolution and the map's height x width for a linear layer after a flatten.

    `penalised` says whether a penalty acts on it. `norm` names the normalisation that directly follows a producer: a
    row before it is scale-invariant, so its magnitude says nothing on its own. The roles:

    - "producer": output side of a layer (rows and bias)
    - "norm": scale, shift and running statistics
    - "depthwise": filters of a depthwise or grouped convolution that channels pass through
    - "consumer": input side of the next layer (columns)
    - "parameter": a bare parameter (position embedding, layer scale, table of relative positions)
    - "response": the scale of a norm that divides by the mean over all channels (RMS, global response); a cut rescales
      it
    - "layer_norm": scale and shift of a layer norm, which counts the channels that a cut takes as zeros
    - "size": `tensor` is an integer attribute that gives the number of positions, or entry `dim` of a tuple of them
    - "inside": all of a tensor of a residual block that goes as a whole
    - "silenced": as "inside", of the last layers of the block's branches: the block passes its input on once they are
      zero
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
        """Name of the module that has the tensor."""
        return self.tensor.rpartition(".")[0]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels coupled across layers: removing one removes it from every member.

    - `n_channels` counts what can go on its own. Indices of a layer that can only go together count as one.
    - `frozen` says why nothing may be removed; empty if something may.
    - `rewrites` are the places in the model's code that have to leave a size to torch once something is removed.
    - `bypass` names the residual block that the group's only channel stands for; without it the block passes its input
      on. Empty for all other groups.
    - `least` is how many channels have to stay at least: two where the model's code cannot do with one.
    - `rounding` says how many channels a cut may keep.
    - `summed`: something adds the channels up, such as a sum, an L2 norm or a layer norm over them. Then only a channel
      that is zero goes without a loss; a constant does not.
    """

    name: str
    n_channels: int
    members: tuple[Member, ...]
    frozen: str = ""
    rewrites: tuple[Place, ...] = ()
    bypass: str = ""
    least: int = 1
    rounding: Rounding = Rounding()
    summed: bool = False

    def of_role(self, role: Role) -> tuple[Member, ...]:
        """Return the members with this role, in model order."""
        return tuple(member for member in self.members if member.role == role)

    @property
    def width(self) -> int:
        """How many channels of its layers one channel of the group is, at least: 64 for a head of 64, mostly 1."""
        return gcd(*(m.repeat for m in self.members if m.role in ("producer", "depthwise", "consumer")))

    def units(self, n: int) -> int:
        """Return how many of the group's channels make up `n` channels of its layers, rounded up."""
        return -(-n // max(self.width, 1))

    def rounded_to(self, multiple: int, min_channels: int) -> ChannelGroup:
        """Return the group with a rounding to `multiple` channels of its layers, `min_channels` at least.

        Both count channels of the layers: a head of 64 channels is one channel of the group.
        """
        if self.bypass:
            return replace(self, rounding=Rounding(1, 0))
        own = multiple // gcd(multiple, self.width)
        return replace(self, rounding=Rounding(own, max(self.units(min_channels), self.least)))

    def lies_in(self, module: str) -> bool:
        """Whether all tensors of the group are inside that module."""
        return all(member.tensor.startswith(f"{module}.") for member in self.members)

    @property
    def penalised(self) -> tuple[Member, ...]:
        """The members that a penalty shrinks. If all are zero the channel is zero for every consumer.

        The exception is a channel that something else adds to, like the bias of a layer over tokens. The change of
        logits in the report shows it.
        """
        return tuple(member for member in self.members if member.penalised)

    @property
    def silenced(self) -> tuple[Member, ...]:
        """The members of a residual block that are zero once it passes its input on; none for all other groups.

        They are the penalised ones, its layer scales, or else those of role "silenced".
        """
        if not self.bypass:
            return ()
        return self.penalised or self.of_role("silenced")

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
    """The cost of one layer: the shape of its weight and the `positions` where it is applied, at batch 1.

    `curve` is its latency in ONNX Runtime; None until `measure_layers` has measured it.
    """

    weight: str
    shape: tuple[int, ...]
    positions: int
    curve: LatencyCurve | None = None

    @property
    def ms(self) -> float | None:
        """Latency of the whole layer in ONNX Runtime; None until it is measured."""
        return None if self.curve is None else self.curve.dense_ms

    @property
    def macs(self) -> int:
        """MACs of one forward pass at batch 1: elements of the weight x positions."""
        n = self.positions
        for size in self.shape:
            n *= size
        return n


@dataclass(frozen=True)
class ChannelGroups:
    """Everything that `find_groups` learned about a model, as plain data. Iterating gives its groups.

    - `inputs` describes the arguments of the example.
    - `layers` has the cost of every convolution and linear layer.
    - `tensor_shapes` has the shape of every parameter and buffer; `parameters` names those that are trained.
    - `attributes` has the value or values of each integer attribute whose size depends on a group.
    - `unread` names the trained tensors that no pass read: those of layers that the examples do not run.
    - `round_to` and `min_channels` are what the groups' rounding was made of.
    """

    groups: tuple[ChannelGroup, ...]
    inputs: InputSpec
    layers: tuple[LayerCost, ...] = ()
    tensor_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    attributes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    round_to: RoundTo = 1
    min_channels: int = 1

    def with_rounding(self, round_to: RoundTo, min_channels: int) -> ChannelGroups:
        """Return the same groups, rounded to `round_to` channels of their layers, `min_channels` at least.

        "auto" is the step that `measure_layers` found for the group's layers, else that of this processor: 16 channels
        with AVX-512, else 8. Raises InputError for `round_to` below 1 or `min_channels` below 0.
        """
        check_rounding(round_to, min_channels)
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
        """Return by group the smallest number of channels that is whole steps of all its layers; {} if not measured."""
        steps: dict[tuple[str, int], int] = {}
        for layer in self.layers:
            if layer.curve is None:
                return {}
            steps |= {(layer.weight, dim): step for dim, step in enumerate(layer.curve.steps)}
        return {g.name: lcm(*(steps.get((m.tensor, m.dim), 1) for m in g.members)) for g in self.groups}


def check_rounding(round_to: Any, min_channels: Any) -> None:
    """Raise InputError unless `round_to` is "auto" or a whole number >= 1, and `min_channels` one >= 0."""
    whole = round_to == "auto" or (type(round_to) is int and round_to >= 1)
    if not whole or type(min_channels) is not int or min_channels < 0:
        raise InputError(
            "round_to must be 'auto' or at least 1, and min_channels at least 0, both whole numbers, got "
            f"{round_to!r} and {min_channels!r}"
        )
