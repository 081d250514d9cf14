"""What `sparsekit plan` shows: how many channels of each group a target keeps, and how fast that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sparsekit.finished.forecast import SpeedForecast
from sparsekit.latency.search import SpeedTrial
from sparsekit.selection.costs import CostShare, kept_share
from sparsekit.structure.groups import ChannelGroups
from sparsekit.structure.masks import Masks

# The longest bar, in characters.
_BAR = 24


@dataclass(frozen=True)
class DryRun:
    """A target of a model, the keep-masks that would meet it, and the speed-up that they give.

    `found` is the trial of these masks and `trials` are all that were measured. `remark` says what the reader should
    know: why the target was not met, or that the weights are random. `speeds` says what several speeds would cost, if
    the model is repaired after the cut.
    """

    model: str
    target: Mapping[str, float]
    groups: ChannelGroups
    masks: Masks
    found: SpeedTrial
    trials: tuple[SpeedTrial, ...]
    remark: str
    speeds: tuple[SpeedForecast, ...] = ()

    @property
    def left(self) -> CostShare:
        """The shares of the dense model that the masks keep."""
        return kept_share(self.groups, self.masks)

    def to_json(self) -> dict[str, Any]:
        """Return plain data: target, groups with their channels, shares left, speed-ups, latencies in ms."""
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
            "speeds": [_finite(asdict(speed)) for speed in self.speeds],
        }

    def table(self) -> RenderableType:
        """Return a table: one row for each group that can be cut, then the shares left and the speed-ups."""
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
            f"left: {left.macs:.3f} of the MACs, {left.params:.3f} of the params",
            f"predicted: a speed-up of {found.predicted:.2f}",
            f"measured:  a speed-up of {found.measured:.2f} ({found.low:.2f} to {found.high:.2f}), "
            f"{found.dense_ms:.3g} -> {found.pruned_ms:.3g} ms",
        ]
        if not found.trustworthy:
            lines.append("not trustworthy: two runs of the dense model differ, because the machine is busy")
        if self.remark:
            lines.append(self.remark)
        below: list[Text | Table] = [Text(""), _forecast_table(self.speeds)] if self.speeds else []
        return Group(table, Text("\n".join(lines)), *below)


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no word for what is not a number: null."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}


def _forecast_table(speeds: Sequence[SpeedForecast]) -> Table:
    """What several speeds would cost, before any fine-tuning: a row each, with a bar for the divergence."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for column in ("speed-up", "MACs left", "params left", "same answers", "nats lost"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    most = max((speed.kl for speed in speeds if math.isfinite(speed.kl)), default=0.0)
    for speed in speeds:
        answers = f"{speed.agreement:.3f}" if math.isfinite(speed.agreement) else ""
        share = min(speed.kl / most, 1.0) if most > 0 and math.isfinite(speed.kl) else 1.0
        bar = "#" * max(round(_BAR * share), 1)
        table.add_row(
            f"{speed.speedup:.2f}",
            f"{speed.kept.macs:.3f}",
            f"{speed.kept.params:.3f}",
            answers,
            f"{speed.kl:.3f}",
            bar,
        )
    table.caption = "predicted, after the repair in closed form; the other steps bring the outputs nearer"
    table.caption_justify = "left"
    return table
