"""What `sparsekit plan` shows of several speeds, also of those that leave no numbers."""

from __future__ import annotations

import json
import math

import torch
from models_by_hand import build
from plain import find_groups
from rich.console import Console

from sparsekit.finished.forecast import SpeedForecast
from sparsekit.latency.search import SpeedTrial
from sparsekit.report.dry_run import DryRun
from sparsekit.selection.costs import CostShare

KEPT = CostShare(0.5, 0.6, 0.7, 0.5)


def shown(*kls: float) -> tuple[str, str]:
    """The table, and the JSON."""
    model, example = build("SqueezeExcite")
    groups = find_groups(model, example)
    masks = {group.name: torch.ones(group.n_channels, dtype=torch.bool) for group in groups.free}
    trial = SpeedTrial(2.0, 2.0, 1.9, 2.1, 2.0, 1.0, True)
    speeds = tuple(SpeedForecast(1.5 + i, 1.5 + i, kl, 0.9, KEPT) for i, kl in enumerate(kls))
    dry_run = DryRun("net", {"speedup": 2.0}, groups, masks, trial, (trial,), "", speeds)
    console = Console(width=100, no_color=True)
    with console.capture() as captured:
        console.print(dry_run.table())
    return captured.get(), json.dumps(dry_run.to_json()["speeds"], allow_nan=False)


def test_each_speed_has_a_row_and_a_bar_as_long_as_its_loss() -> None:
    table, _ = shown(0.25, 1.0)
    bars = [line.count("#") for line in table.splitlines() if "#" in line]
    assert bars == [6, 24]
    assert "0.250" in table
    assert "1.50" in table


def test_speeds_that_leave_no_numbers_have_a_full_bar_and_null_in_json() -> None:
    table, text = shown(0.25, math.inf)
    assert [line.count("#") for line in table.splitlines() if "#" in line] == [24, 24]
    assert [one["kl"] for one in json.loads(text)] == [0.25, None]


def test_without_speeds_there_is_no_second_table() -> None:
    table, text = shown()
    assert "nats" not in table
    assert json.loads(text) == []
