"""The closed loop: predict, measure, correct; on stopwatches that disagree with the prediction, and on a real one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plain import find_groups, rounded
from torch import nn

import sparsekit as sk
from sparsekit.errors import InputError
from sparsekit.latency import search as speed_search
from sparsekit.latency.search import SpeedTrial, search_speed, time_masks
from sparsekit.latency.table import LatencyTable
from sparsekit.machine import channel_multiple
from sparsekit.selection.costs import kept_share
from sparsekit.structure.groups import ChannelGroups
from sparsekit.structure.latency_curve import LatencyCurve
from sparsekit.structure.masks import Masks

EXAMPLE = torch.zeros(1, 3, 16, 16)
DENSE_MS = 10.0


def _network(width: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)),
    )


def _measured(model: nn.Module) -> ChannelGroups:
    """Groups whose layers take as long as they multiply, 10 ms in all."""
    groups = find_groups(model, EXAMPLE)
    total = sum(layer.macs for layer in groups.layers)

    def curve(out: int, into: int, macs: int) -> LatencyCurve:
        full = DENSE_MS * macs / total
        return LatencyCurve(((1, out), (1, into)), ((full / out / into, full / out), (full / into, full)))

    layers = tuple(replace(layer, curve=curve(*layer.shape[:2], layer.macs)) for layer in groups.layers)
    return replace(groups, layers=layers)


def _stopwatch(
    speed: Callable[[float], float], monkeypatch: pytest.MonkeyPatch, *, trustworthy: bool = True
) -> list[Masks]:
    """Cuts run `speed(predicted speed-up)` times as fast as the dense model; returns the list of what was timed."""
    timed: list[Masks] = []

    class Stopwatch:
        def __init__(self, model: nn.Module, groups: ChannelGroups, *_: object) -> None:
            self._groups = groups

        def of(self, masks: Masks) -> SpeedTrial:
            timed.append(masks)
            predicted = 1 / kept_share(self._groups, masks).latency
            value = speed(predicted)
            return SpeedTrial(predicted, value, value, value, DENSE_MS, DENSE_MS / value, trustworthy)

    monkeypatch.setattr(speed_search, "_Stopwatch", Stopwatch)
    return timed


def _importance(groups: ChannelGroups) -> Masks:
    generator = torch.Generator().manual_seed(0)
    return {g.name: torch.rand(g.n_channels, generator=generator) for g in groups.free}


@pytest.mark.parametrize(
    "truth", [lambda s: s, lambda s: s**0.8, lambda s: 1.2 * s, lambda s: 1 + (s - 1) / 2]
)
@pytest.mark.parametrize("asked", [1.5, 3.0])
def test_the_measured_speed_is_what_was_asked_for_whatever_was_predicted(
    truth: Callable[[float], float], asked: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = _stopwatch(truth, monkeypatch)
    model = _network()
    groups = _measured(model)
    told: list[SpeedTrial] = []
    found = search_speed(model, groups, _importance(groups), EXAMPLE, speedup=asked, progress=told.append)
    assert found.found.measured == pytest.approx(asked, rel=0.03)
    assert found.remark == ""
    assert found.found.measured == pytest.approx(truth(1 / kept_share(groups, found.masks).latency))
    assert found.trials == tuple(told)
    assert len(timed) == len(told) <= 8


def test_a_latency_is_a_speed_up_of_the_dense_model(monkeypatch: pytest.MonkeyPatch) -> None:
    _stopwatch(lambda s: s**0.9, monkeypatch)
    model = _network()
    groups = _measured(model)
    found = search_speed(model, groups, _importance(groups), EXAMPLE, latency_ms=4.0)
    assert found.asked == pytest.approx(2.5)
    assert found.found.pruned_ms == pytest.approx(4.0, rel=0.03)


def test_of_several_limits_the_tightest_binds_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _stopwatch(lambda s: s, monkeypatch)
    model = _network()
    groups = _measured(model)
    found = search_speed(model, groups, _importance(groups), EXAMPLE, speedup=1.5, limits={"params": 0.3})
    assert kept_share(groups, found.masks).params <= 0.3
    assert found.found.measured > 1.5 * 1.03
    assert "the target of params is the tighter one" in found.remark
    loose = search_speed(model, groups, _importance(groups), EXAMPLE, speedup=3.0, limits={"params": 0.9})
    assert loose.remark == ""
    assert loose.found.measured == pytest.approx(3.0, rel=0.03)


@pytest.mark.parametrize(("trustworthy", "reason"), [(True, "whole steps"), (False, "too busy")])
def test_a_speed_between_two_steps_is_missed_with_a_reason(
    trustworthy: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stopwatch(lambda s: s, monkeypatch, trustworthy=trustworthy)
    model = _network()
    groups = _measured(model)
    rounding = {group.name: (32, 1) for group in groups.free}
    found = search_speed(model, rounded(groups, rounding), _importance(groups), EXAMPLE, speedup=1.17)
    assert abs(found.found.measured / 1.17 - 1) > 0.03
    assert f"asked for a speed-up of 1.17, and the nearest of {len(found.trials)}" in found.remark
    assert reason in found.remark


@pytest.mark.parametrize(("share_of_most", "power"), [(5.0, 0.5), (0.97, 0.9)])
def test_a_speed_out_of_reach_is_refused_with_the_one_measured(
    share_of_most: float, power: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By far, or where the prediction says that it can just be had and the stopwatch says no."""
    _stopwatch(lambda s: s**power, monkeypatch)
    model = _network()
    groups = _measured(model)
    rounding = {group.name: (16, 32) for group in groups.free}
    most = 1 / kept_share(groups, {g.name: torch.arange(64) < 32 for g in groups.free}).latency
    asked = share_of_most * most
    message = rf"speed-up of {asked:.3g} is out of reach.* it is {most**power:.3g}; ask"
    with pytest.raises(InputError, match=message):
        search_speed(model, rounded(groups, rounding), _importance(groups), EXAMPLE, speedup=asked)


def test_a_model_that_is_as_fast_already_keeps_all(monkeypatch: pytest.MonkeyPatch) -> None:
    _stopwatch(lambda s: s, monkeypatch)
    model = _network()
    groups = _measured(model)
    found = search_speed(model, groups, _importance(groups), EXAMPLE, latency_ms=20.0)
    assert all(bool(mask.all()) for mask in found.masks.values())
    assert "as fast already" in found.remark


@pytest.mark.parametrize(
    "arguments", [{}, {"speedup": 2, "latency_ms": 3}, {"speedup": -1}, {"latency_ms": float("nan")}]
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, float]) -> None:
    model = _network()
    groups = _measured(model)
    with pytest.raises(InputError, match=r"needs one of|must be a finite number"):
        search_speed(model, groups, _importance(groups), EXAMPLE, **arguments)


def test_the_rounding_is_the_largest_step_of_the_groups_layers() -> None:
    groups = _measured(_network())
    first, *rest = groups.layers
    assert first.curve is not None
    layers = (replace(first, curve=replace(first.curve, steps=(16, 1))), *rest)
    measured = replace(groups, layers=layers).with_rounding("auto", 8)
    assert [g.rounding for g in measured.free] == [sk.Rounding(16, 8), sk.Rounding(1, 8), sk.Rounding(1, 8)]
    unmeasured = find_groups(_network(), EXAMPLE, round_to="auto", min_channels=8)
    assert {g.rounding for g in unmeasured.free} == {sk.Rounding(channel_multiple(), 8)}


def test_a_real_cut_is_really_timed_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    """Three quarters of the channels gone are faster on any machine."""
    model = _network(128)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    groups = find_groups(model, EXAMPLE)
    groups = sk.measure_layers(model, groups, EXAMPLE, table=LatencyTable(cache=tmp_path))
    trial = time_masks(model, groups, {g.name: torch.arange(128) < 32 for g in groups.free}, EXAMPLE)
    assert trial.measured > 1.5
    assert trial.predicted > 1.5
    assert trial.low <= trial.measured <= trial.high
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
