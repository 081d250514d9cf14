"""What `sparsekit plan` shows: how many channels of each group a target keeps, and how fast that is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sparsekit.latency.search import SpeedTrial
from sparsekit.selection.costs import CostShare, kept_share
from sparsekit.structure.groups import ChannelGroups
from sparsekit.structure.masks import Masks


@dataclass(frozen=True)
class DryRun:
    """A model's target, the masks that would meet it, what they leave as shares, and how fast that was.

    `trials` are all that were measured on the way, the last word is `found`'s. `remark` says what the reader should
    know: why the target was not met as asked, or that the weights are those of an untrained model.
    """

    model: str
    target: Mapping[str, float]
    groups: ChannelGroups
    masks: Masks
    found: SpeedTrial
    trials: tuple[SpeedTrial, ...]
    remark: str

    @property
    def left(self) -> CostShare:
        """What stays of the dense model."""
        return kept_share(self.groups, self.masks)

    def to_json(self) -> dict[str, Any]:
        """Plain data: target, groups with their channels, shares left, speed-ups and latencies in ms."""
        left = self.left
        return {
            "model": self.model,
            "target": dict(self.target),
            "groups": [
                {
                    "name": group.name,
                    "channels": group.n_channels,
                    "kept": int(self.masks[group.name].sum())
                    if group.name in self.masks
                    else group.n_channels,
                    "frozen": group.frozen,
                }
                for group in self.groups
            ],
            "left": {key: getattr(left, key) for key in ("macs", "params", "channels", "latency")},
            "found": asdict(self.found),
            "trials": [asdict(trial) for trial in self.trials],
            "remark": self.remark,
        }

    def table(self) -> RenderableType:
        """A row a group that can be cut, and under them what is left, predicted and measured."""
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        table.add_column("group", overflow="fold")
        for column in ("channels", "kept", "share"):
            table.add_column(column, justify="right", no_wrap=True)
        plain = self.to_json()
        for row in plain["groups"]:
            if not row["frozen"]:
                share = f"{row['kept'] / row['channels']:.2f}"
                table.add_row(Text(row["name"]), str(row["channels"]), str(row["kept"]), share)
        found, left = self.found, self.left
        asked = ", ".join(f"{key} {value:g}" for key, value in self.target.items())
        lines = [
            f"{self.model}, target {asked}",
            f"left: {left.macs:.3f} of the MACs, {left.params:.3f} of the parameters",
            f"predicted: {found.predicted:.2f} times as fast",
            f"measured:  {found.measured:.2f} times as fast ({found.low:.2f} to {found.high:.2f}), "
            f"{found.dense_ms:.3g} -> {found.pruned_ms:.3g} ms",
        ]
        if not found.trustworthy:
            lines.append("not trustworthy: the dense model differs from itself; the machine is busy")
        if self.remark:
            lines.append(self.remark)
        return Group(table, Text("\n".join(lines)))
