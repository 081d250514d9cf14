"""What `sparsekit inspect` shows: a model's channel groups, what each costs, and why some must stay whole."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from sparsekit.analysis import find_groups
from sparsekit.complexity import count_macs, count_params
from sparsekit.groups import ChannelGroup, ChannelGroups


@dataclass(frozen=True)
class Inspection:
    """A model's name, input shape, MACs (batch 1) and parameters, and its groups."""

    model: str
    input_shape: tuple[int, ...]
    macs: int
    params: int
    groups: ChannelGroups

    def to_json(self) -> dict[str, Any]:
        """Plain data: the totals and, for each group, what `table` shows."""
        return {
            "model": self.model,
            "input_shape": list(self.input_shape),
            "macs": self.macs,
            "params": self.params,
            "groups": [self._row(group) for group in self.groups],
        }

    def _row(self, group: ChannelGroup) -> dict[str, Any]:
        """Shares are those of all that shrinks with the group; a layer between two groups counts in both."""
        touched = {member.tensor for member in group.members}
        macs = sum(layer.macs for layer in self.groups.layers if layer.weight in touched)
        params = sum(
            prod(self.groups.tensor_shapes[name]) for name in touched if name in self.groups.parameters
        )
        layers = list(dict.fromkeys(member.module for member in group.members if member.role == "producer"))
        return {
            "name": group.name,
            "channels": group.n_channels,
            "layers": layers,
            "macs_share": macs / self.macs if self.macs else 0.0,
            "params_share": params / self.params if self.params else 0.0,
            "frozen": group.frozen,
        }

    def table(self) -> RenderableType:
        """One row a group, and under it the totals."""
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        table.add_column("group", overflow="fold", min_width=20)
        for column in ("channels", "layers", "MACs", "params"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("frozen because", overflow="fold")
        for row in self.to_json()["groups"]:
            shares = (f"{row['macs_share']:.3f}", f"{row['params_share']:.3f}")
            name, reason = Text(row["name"]), Text(row["frozen"])
            table.add_row(name, str(row["channels"]), str(len(row["layers"])), *shares, reason)
        free = len(self.groups.free)
        shape = "x".join(map(str, self.input_shape))
        totals = (
            f"{self.model}, input {shape}: {self.macs / 1e6:.1f} M MACs, {self.params / 1e6:.2f} M parameters"
        )
        legend = (
            "Layers: those that produce the\n"
            "group's channels together. MACs, params: share of the layers that shrink with it; a\n"
            "layer between two groups counts in both."
        )
        return Group(table, Text(f"{totals}\n{free} of {len(self.groups)} groups can be cut. {legend}"))


def inspect_module(
    name: str, model: nn.Module, example_input: Tensor, ignore: tuple[str, ...] = ()
) -> Inspection:
    """Analyse a model on one example input (1, channels, height, width)."""
    groups = find_groups(model, example_input, ignore=ignore)
    shape = tuple(example_input.shape[1:])
    return Inspection(name, shape, count_macs(model, example_input), count_params(model), groups)
