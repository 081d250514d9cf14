"""What `sparsekit inspect` shows: the channel groups of a model, what each costs, and why some stay whole."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from sparsekit.coupling.find_groups import find_groups
from sparsekit.options import Blocks
from sparsekit.selection.costs import CostModel
from sparsekit.structure.counting import count_macs, count_params
from sparsekit.structure.groups import ChannelGroup, ChannelGroups, Role

# The table names the members by what they do, in this order. Members of role "size" are in the JSON only.
_PARTS: dict[str, tuple[Role, ...]] = {
    "made by": ("producer",),
    "filtered by": ("depthwise",),
    "normalised by": ("norm", "response", "layer_norm"),
    "along with": ("parameter",),
    "read by": ("consumer",),
}


@dataclass(frozen=True)
class Inspection:
    """A model: its name, input shape, MACs (at batch 1), params and channel groups."""

    model: str
    input_shape: tuple[int, ...]
    macs: int
    params: int
    groups: ChannelGroups

    def to_json(self) -> dict[str, Any]:
        """Return plain data: the totals, and for each group its cost, its members and why it stays whole.

        `channels` counts what can go on its own. `rows_per_channel` counts the rows of each in the first layer that
        makes it: more than 1 for an attention head. The shares are those of all that goes with the group; a layer
        between two groups counts in both. A member owns `per_channel` positions along `dim`. Of a `summed` group only
        zeros go without a loss, no constants. `unread` names the parameters that no pass read.
        """
        costs = CostModel(self.groups, frozen=True)
        macs, params = costs.per_group("macs"), costs.per_group("params")
        return {
            "model": self.model,
            "input_shape": list(self.input_shape),
            "macs": self.macs,
            "params": self.params,
            "groups": [self._row(group, macs, params) for group in self.groups],
            "unread": list(self.groups.unread),
        }

    def table(self) -> RenderableType:
        """Return a table: each group with its units, cost and members, or why it stays whole; then the totals."""
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        table.add_column("group", overflow="fold")
        for column in ("units", "MACs", "params"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in self.to_json()["groups"]:
            shares = (f"{row['macs_share']:.3f}", f"{row['params_share']:.3f}")
            details = (Padding(line, (0, 0, 0, 2)) for line in _details(row))
            table.add_row(Group(Text(row["name"]), *details), str(row["channels"]), *shares)
        shape = "x".join(map(str, self.input_shape))
        totals = (
            f"{self.model}, input {shape}: {self.macs / 1e6:.1f} M MACs, {self.params / 1e6:.2f} M params"
        )
        legend = (
            f"{len(self.groups.free)} of {len(self.groups)} groups can be cut. A unit goes or stays as a whole. It is "
            "one channel unless its rows are given. MACs, params: the share of the model that the group owns. A layer "
            "between two groups counts in both, a product of activations in none."
        )
        lines = [totals, legend]
        if self.groups.unread:
            lines.append(
                f"No pass of the model read {_compact(self.groups.unread)}: layers that it does not run keep their "
                "width, and fail if they are used with fewer channels."
            )
        return Group(table, *map(Text, lines))

    def _row(
        self, group: ChannelGroup, macs: Mapping[str, float], params: Mapping[str, float]
    ) -> dict[str, Any]:
        return {
            "name": group.name,
            "channels": group.n_channels,
            "rows_per_channel": _rows_per_channel(group),
            "layers": list(dict.fromkeys(member.module for member in group.of_role("producer"))),
            "macs_share": macs[group.name] / self.macs if self.macs else 0.0,
            "params_share": params[group.name] / self.params if self.params else 0.0,
            "members": _members(group),
            "block": bool(group.bypass),
            "summed": group.summed,
            "frozen": group.frozen,
        }


def inspect_module(
    name: str,
    model: nn.Module,
    example_input: Tensor,
    ignore: tuple[str, ...] = (),
    *,
    through_layer_norm: bool = False,
    blocks: Blocks = False,
) -> Inspection:
    """Inspect a model on one example input (1, channels, height, width)."""
    groups = find_groups(
        model, example_input, ignore=ignore, through_layer_norm=through_layer_norm, blocks=blocks
    )
    shape = tuple(example_input.shape[1:])
    return Inspection(name, shape, count_macs(model, example_input), count_params(model), groups)


def _rows_per_channel(group: ChannelGroup) -> int:
    """Count the rows of a channel in the first layer that makes it: 1, or 3 x width for an attention head.

    0 for a residual block, which no single layer makes.
    """
    if group.bypass:
        return 0
    makers = [member for member in group.members if member.role in ("producer", "depthwise")]
    first = (makers[0].tensor, makers[0].dim)
    return sum(member.repeat for member in makers if (member.tensor, member.dim) == first)


def _members(group: ChannelGroup) -> list[dict[str, Any]]:
    """List each tensor and dimension once, even where a group has several members in it."""
    counts: dict[tuple[str, int, str], int] = defaultdict(int)
    for member in group.members:
        counts[member.tensor, member.dim, member.role] += member.repeat
    return [
        {"tensor": tensor, "dim": dim, "role": role, "per_channel": count}
        for (tensor, dim, role), count in counts.items()
    ]


def _details(row: Mapping[str, Any]) -> Iterator[Text]:
    """Yield the lines under the name of a group: why it stays whole, and its members."""
    if row["frozen"]:
        yield Text(f"stays whole: {row['frozen']}", style="italic")
    if row["block"]:
        scales = [m["tensor"] for m in row["members"] if m["role"] in ("parameter", "silenced")]
        yield Text(f"the whole block, once {_compact(scales)} is zero", style="dim")
        return
    parts = [f"units of {row['rows_per_channel']} rows"] if row["rows_per_channel"] > 1 else []
    for phrase, roles in _PARTS.items():
        tensors = [member["tensor"] for member in row["members"] if member["role"] in roles]
        held = tensors if "parameter" in roles else [tensor.rpartition(".")[0] for tensor in tensors]
        if any(name != row["name"] for name in held):
            parts.append(f"{phrase} {_compact(held)}")
    if row["summed"] and not row["frozen"]:
        parts.append("added up, so that only zeros go without a loss")
    if parts:
        yield Text("; ".join(parts), style="dim")


def _compact(names: Iterable[str]) -> str:
    """Join names that differ in one number only: blocks.0.fc, blocks.1.fc and blocks.2.fc become blocks.0-2.fc."""
    found = [name.split(".") for name in dict.fromkeys(names)]
    for place in range(max(map(len, found), default=0)):
        alike: dict[str, list[list[str]]] = defaultdict(list)
        for parts in found:
            numbered = len(parts) > place and parts[place].isdecimal()
            alike[".".join([*parts[:place], "#", *parts[place + 1 :]] if numbered else parts)].append(parts)
        found = [merged for group in alike.values() for merged in _merged(group, place)]
    return ", ".join(".".join(parts) for parts in found)


def _merged(names: list[list[str]], place: int) -> Iterator[list[str]]:
    """Join names that differ in the number at `place` only, one name for each run of numbers."""
    if len(names) == 1:
        yield names[0]
        return
    numbers = sorted(int(parts[place]) for parts in names)
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    for start, end in zip(starts, ends, strict=True):
        run = str(start) if start == end else f"{start}-{end}"
        yield [*names[0][:place], run, *names[0][place + 1 :]]
