"""Choices of a finished model's channels: the nearest wins, and what is out of reach or no number loses."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sparsekit.finished import choice
from sparsekit.finished.choice import Judge, choose_importance
from sparsekit.finished.display import StepDisplay
from sparsekit.finished.preparation import Options, measure
from sparsekit.repair.divergence import Divergence
from sparsekit.selection.knapsack import Knapsack


@pytest.fixture(scope="module")
def measured() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 32, 3, stride=2), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    ).eval()
    options = Options(round_to=4, min_channels=4)
    with StepDisplay(None) as show:
        return measure(
            model, torch.randn(48, 3, 16, 16), options, show, latencies=False, check=lambda groups: None
        )


def test_what_is_no_number_never_wins(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    judge, kls = Judge(measured.prepared), iter((math.inf, 3.0, math.inf))
    monkeypatch.setattr(Judge, "of", lambda self, masks: Divergence(next(kls), 1.0))
    curves: dict[str, Any] = dict(measured.curves)
    first, second, third = (dict(curves) for _ in range(3))
    known, kl = judge.nearest({"macs": 0.6}, first, second, third)
    assert known is second
    assert kl == 3.0


def test_a_limit_just_out_of_reach_measures_nothing_again(measured: Any) -> None:
    """A search may come near enough to it, because latencies are predicted."""
    least = Knapsack(measured.prepared.groups, measured.curves).least("macs")
    show: Any = SimpleNamespace(begin=pytest.fail, share=None)
    assert choose_importance(measured, {"macs": 0.97 * least}, show) is measured.curves


def test_where_much_is_lost_curves_are_measured_again_and_the_choice_is_no_further_away(
    measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "_LITTLE_LOST", 0.0)
    monkeypatch.setattr(choice, "_MUCH_LOST", 0.0)
    begun: list[str] = []
    show: Any = SimpleNamespace(begin=begun.append, share=lambda done, total: None)
    limits: dict[Any, float] = {"macs": 0.3}
    known = choose_importance(measured, limits, show)
    assert begun == ["measuring loss curves half way", "measuring loss curves near the choice"]
    loss = {
        name: Judge(measured.prepared).nearest(limits, one)[1]
        for name, one in (("first", measured.curves), ("now", known))
    }
    assert loss["now"] <= loss["first"]
