"""Layers are timed once a shape, under their own names; what cannot be asked of unmeasured groups is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsekit as sk
from sparsekit import layer_latency
from sparsekit.complexity import kept_share
from sparsekit.errors import InputError
from sparsekit.latency import Interval, Latency, LatencyComparison

EXAMPLE = torch.zeros(2, 3, 8, 8)


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )


def test_layers_are_really_measured() -> None:
    model = _network()
    groups = sk.find_groups(model, EXAMPLE)
    measured = sk.measure_layers(model, groups, EXAMPLE, rounds=10)
    assert all(layer.ms is not None and layer.ms > 0 for layer in measured.layers)
    assert [layer.weight for layer in measured.layers] == [layer.weight for layer in groups.layers]
    assert measured.groups == groups.groups


def test_a_stopwatch_of_known_readings_gives_known_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three kinds of layer: 2 -> 4 and 4 -> 6 are the same convolution on the same shape."""
    asked: list[Path] = []

    def stopwatch(files: list[Path], **_: Any) -> LatencyComparison:
        asked.extend(files)
        one = Interval(1.0, 1.0, 1.0)
        readings = tuple(Latency(str(f), ms, ms, ms, 2) for f, ms in zip(files, (3.0, 8.0, 1.0), strict=True))
        return LatencyComparison(readings, (), one, 1, 2, 10, True, "")

    monkeypatch.setattr(layer_latency, "compare_latency", stopwatch)
    model = _network()
    groups = sk.measure_layers(model, sk.find_groups(model, EXAMPLE), EXAMPLE)
    assert len(asked) == 3
    assert [layer.ms for layer in groups.layers] == [3.0, 8.0, 8.0, 1.0]
    # Of 8 channels each: the first is made in 3 ms and read in 8, ...
    assert list(sk.channel_latencies(groups).values()) == [11 / 8, 16 / 8, 9 / 8]
    half = {group.name: torch.arange(8) < 4 for group in groups.free}
    assert kept_share(groups, half).latency == (3 / 2 + 8 / 4 + 8 / 4 + 1 / 2) / 20
    masks = sk.keep_masks(model, groups, method="budget", target={"latency": 0.5})
    assert kept_share(groups, masks).latency <= 0.5
    assert kept_share(groups, masks).macs != 0.5


def test_a_layer_that_runs_twice_takes_twice_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.layer(self.layer(x).relu())
            return out

    def stopwatch(files: list[Path], **_: Any) -> LatencyComparison:
        (file,) = files
        reading = Latency(str(file), 3.0, 3.0, 3.0, 2)
        return LatencyComparison((reading,), (), Interval(1.0, 1.0, 1.0), 1, 2, 10, True, "")

    monkeypatch.setattr(layer_latency, "compare_latency", stopwatch)
    model = Twice()
    (layer,) = sk.measure_layers(model, sk.find_groups(model, EXAMPLE), EXAMPLE).layers
    assert layer.ms == 6.0


def test_latencies_that_were_not_measured_are_refused() -> None:
    model = _network()
    groups = sk.find_groups(model, EXAMPLE)
    with pytest.raises(InputError, match="measure_layers"):
        sk.channel_latencies(groups)
    with pytest.raises(InputError, match="measure_layers"):
        sk.keep_masks(model, groups, method="budget", target={"latency": 0.5})
    with pytest.raises(InputError, match="measure_layers"):
        sk.Sparsifier(model, groups, strength="auto", total_steps=10, target={"latency": 0.5})
    with pytest.raises(InputError, match="no layer"):
        sk.measure_layers(nn.Sequential(nn.Conv2d(3, 8, 3)), groups, EXAMPLE)
