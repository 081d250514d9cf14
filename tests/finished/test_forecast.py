"""The forecast of a finished model: what several speeds would cost, as made by hand from its own curves."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsekit as sk
from sparsekit.errors import DataError, InputError
from sparsekit.finished.preparation import split
from sparsekit.repair.divergence import divergence
from sparsekit.selection.costs import kept_share
from sparsekit.selection.knapsack import Knapsack


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 64, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(64, 10),
    ).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(60, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_a_forecast_is_what_the_cut_and_repaired_model_loses_on_images_kept_apart(images: Tensor) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    found = sk.forecast(model, images, speedups=(2.0, 1.3, 1e6), round_to=4, seed=3)
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    assert [one.asked for one in found.speeds] == [1.3, 2.0]
    assert "out of reach: 1e+06" in found.remark
    assert all(slow.kl < fast.kl for slow, fast in pairwise(found.speeds))
    used, apart = split(images, 3)
    statistics = sk.input_statistics(
        model, found.groups, used.split(16), gradients=False, most_positions=10**6
    )
    for one in found.speeds:
        assert one.speedup >= one.asked
        masks = Knapsack(found.groups, found.known).under({"latency": 1 / one.asked})
        assert kept_share(found.groups, masks) == one.kept
        plan = sk.make_plan(found.groups, masks)
        pruned = sk.apply_plan(sk.repair_weights(model, plan, statistics), plan)
        with torch.no_grad():
            lost = divergence([model(apart)], [pruned(apart)])
        assert one.kl == pytest.approx(lost.kl, rel=0.3)  # from other positions of the same images


@pytest.mark.parametrize("speedups", [(1.0,), (0.5,), ("2",), (True,), (float("nan"),), (float("inf"), 2.0)])
def test_speeds_that_are_none_are_refused(images: Tensor, speedups: tuple[Any, ...]) -> None:
    with pytest.raises(InputError, match="speedups must be finite numbers above 1, got"):
        sk.forecast(network(), images, speedups=speedups)


def test_what_prune_refuses_is_refused(images: Tensor) -> None:
    with pytest.raises(DataError, match="too few"):
        sk.forecast(network(), images[:8])
    with pytest.raises(InputError, match="threads must be a whole number >= 1, got 0"):
        sk.forecast(network(), images, threads=0)
