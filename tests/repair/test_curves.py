"""Loss curves of groups: as measured on masked and repaired copies, and the model comes back as it was."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from prepared import NAMES, prepared
from torch import Tensor

import sparsekit as sk
from sparsekit.repair.closed_form import repair_weights
from sparsekit.repair.curves import curves_around, curves_near, loss_curves
from sparsekit.repair.held_out import HeldOut
from sparsekit.repair.trials import Trials
from sparsekit.selection.costs import CostModel
from sparsekit.selection.knapsack import Knapsack
from sparsekit.surgery.mask import mask_model


@pytest.mark.parametrize("name", [*NAMES, "LayerNormMlp", "SwiGlu"])
def test_curves_pass_through_what_masked_copies_lose(name: str) -> None:
    model, groups, known, apart = prepared(name, blocks="all", through_layer_norm=True)
    before = copy.deepcopy(model.state_dict())
    held_out = HeldOut(model, groups, apart)
    told: list[tuple[int, int]] = []
    curves = loss_curves(model, groups, known, held_out, progress=lambda now, all_: told.append((now, all_)))
    assert all(torch.equal(values, before[key]) for key, values in model.state_dict().items())
    assert told[-1] == (len(groups.free), len(groups.free))
    assert curves.keys() == {group.name for group in groups.free}
    for group in groups.free:
        curve = curves[group.name]
        assert sorted(curve.order.tolist()) == list(range(group.n_channels))
        assert curve.losses.shape == (group.n_channels + 1,)
        assert curve.losses[-1] == 0
        assert (np.diff(curve.losses) <= 1e-12).all()
        kept = 0 if group.bypass else max(round(0.2 * group.n_channels), 1)
        mask = torch.zeros(group.n_channels, dtype=torch.bool)
        mask[curve.order[:kept]] = True
        plan = sk.make_plan(groups, {group.name: mask})
        loss = held_out.of(mask_model(repair_weights(model, plan, known), plan)).kl
        assert curve.losses[kept] >= loss * (1 - 1e-4) - 1e-9


def test_curves_measured_again_allow_a_step_from_where_they_were_measured() -> None:
    model, groups, known, apart = prepared("test_resnet", blocks="all")
    held_out = HeldOut(model, groups, apart)
    curves = loss_curves(model, groups, known, held_out)
    base = Knapsack(groups, curves).under({"macs": 0.6})
    trials = Trials(model, groups, known, held_out, base)
    around, near = curves_around(trials, curves), curves_near(trials, curves, reach=0.25)
    for masks in (
        Knapsack(groups, around).under({"macs": 0.5}),
        Knapsack(groups, near).under({"macs": 0.55}),
    ):
        assert CostModel(groups).share("macs", masks) <= 0.56
    for group in groups.free:
        assert torch.equal(around[group.name].order, curves[group.name].order)
        n, moved = group.n_channels, Knapsack(groups, near).under({"macs": 0.55})[group.name]
        if group.bypass:
            assert torch.equal(moved, base[group.name])
        elif not trials.is_bypassed(group):
            assert abs(int(moved.sum()) - int(base[group.name].sum())) <= 0.25 * n + group.rounding.multiple


def test_groups_of_which_nothing_is_known_stay() -> None:
    model, groups, known, apart = prepared("SqueezeExcite")
    without = replace(known, layers={}, gates={}, left_out=dict.fromkeys(known.layers, "for the test"))
    curves = loss_curves(model, groups, without, HeldOut(model, groups, apart))
    for group in groups.free:  # of which nothing is known: they stay
        values = curves[group.name]
        assert isinstance(values, Tensor)
        assert bool(values.isinf().all())
