"""Choices of a finished model's channels: the nearest wins, and what is out of reach or no number loses."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sparsekit.finished.choice import Judge, choose_importance
from sparsekit.finished.display import StepDisplay
from sparsekit.finished.preparation import Options, prepare
from sparsekit.repair.divergence import Divergence
from sparsekit.selection.knapsack import Knapsack


@pytest.fixture(scope="module")
def prepared() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 32, 3, stride=2), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    ).eval()
    options = Options((), 1, 1, True, False, 4, 4, 512, 0)
    with StepDisplay(None) as show:
        return prepare(
            model, torch.randn(48, 3, 16, 16), options, show, latencies=False, check=lambda groups: None
        )


def test_what_is_no_number_never_wins(prepared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    judge, kls = Judge(prepared), iter((math.nan, 3.0, math.inf))
    monkeypatch.setattr(Judge, "of", lambda self, masks: Divergence(next(kls), 1.0))
    curves: dict[str, Any] = dict(prepared.curves)
    first, second, third = (dict(curves) for _ in range(3))
    known, kl = judge.nearest({"macs": 0.6}, first, second, third)
    assert known is second
    assert kl == 3.0


def test_a_limit_just_out_of_reach_measures_nothing_again(prepared: Any) -> None:
    """A search may come near enough to it, because latencies are predicted."""
    least = Knapsack(prepared.groups, prepared.curves).least("macs")
    show: Any = SimpleNamespace(begin=pytest.fail, share=None)
    assert choose_importance(prepared, {"macs": 0.97 * least}, show) is prepared.curves


def test_where_much_is_lost_the_choice_is_at_least_as_near_as_by_the_first_curves(prepared: Any) -> None:
    limits: dict[Any, float] = {"macs": 0.3}
    judge = Judge(prepared)
    with StepDisplay(None) as show:
        known = choose_importance(prepared, limits, show)
    (_, first), (_, chosen) = judge.nearest(limits, prepared.curves), judge.nearest(limits, known)
    assert chosen <= first
