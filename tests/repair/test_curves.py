"""Orders and loss curves of groups: as measured on a masked and repaired copy, and the model comes back as it was."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from models_by_hand import build, random_masks
from plain import find_groups
from torch import Tensor, nn

import sparsekit as sk
from sparsekit.repair.closed_form import repair_weights
from sparsekit.repair.curves import (
    Trials,
    channel_order,
    curves_around,
    curves_near,
    loss_curves,
    masked_in_place,
    order_by_gates,
)
from sparsekit.repair.held_out import HeldOut
from sparsekit.selection.costs import CostModel
from sparsekit.selection.knapsack import Knapsack
from sparsekit.surgery.mask import mask_model


def prepared(
    name: str, **options: Any
) -> tuple[nn.Module, sk.ChannelGroups, sk.InputStatistics, tuple[Tensor, ...]]:
    model, example = build(name)
    groups = find_groups(model, example, **options)
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(40, *x.shape[1:], generator=generator, dtype=torch.float64) for x in example)
    used, apart = tuple(x[:24] for x in inputs), tuple(x[24:] for x in inputs)
    return model, groups, sk.input_statistics(model, groups, [used]), apart


NAMES = ["SqueezeExcite", "Concatenation", "FlattenBeforeLinear", "GroupedConv", "LayerScale", "Transposed"]


@pytest.mark.parametrize("name", [*NAMES, "test_convnext"])
def test_masked_in_place_is_what_a_repaired_copy_is_and_ends_without_a_trace(name: str) -> None:
    model, groups, known, apart = prepared(name, blocks="all")
    blocks = [group.name for group in groups.free if group.bypass]
    masks = random_masks(groups, 0.5, seed=1) | {
        name: torch.zeros(1, dtype=torch.bool) for name in blocks[:1]
    }
    plan = sk.make_plan(groups, masks)
    assert bool(plan.blocks) == (name == "test_convnext")
    before = copy.deepcopy(model.state_dict())
    parameters = {key: id(p) for key, p in model.named_parameters()}
    wanted = mask_model(repair_weights(model, plan, known), plan)(*apart)
    with contextlib.suppress(KeyboardInterrupt), masked_in_place(model, plan, known) as changed:
        found = model(*apart)
        names = {n for n, values in model.state_dict().items() if n in before and not values.equal(before[n])}
        raise KeyboardInterrupt
    assert torch.allclose(found, wanted)
    # All that changed is named, but biases of the layers that are.
    assert {n.rpartition(".")[0] for n in names} <= {n.rpartition(".")[0] for n in changed}
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(values, before[key]) for key, values in model.state_dict().items())
    assert {key: id(p) for key, p in model.named_parameters()} == parameters


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


@pytest.mark.parametrize("name", [*NAMES, "LayerNormMlp", "test_resnet"])
def test_a_trial_among_other_cuts_is_what_a_masked_copy_with_all_of_them_loses(name: str) -> None:
    model, groups, known, apart = prepared(name, blocks="all", through_layer_norm=True)
    base = random_masks(groups, 0.7, seed=3)
    blocks = [group for group in groups.free if group.bypass]
    base |= {group.name: torch.ones(1, dtype=torch.bool) for group in blocks}
    base |= {group.name: torch.zeros(1, dtype=torch.bool) for group in blocks[1:2]}
    held_out = HeldOut(model, groups, apart)
    trials = Trials(model, groups, known, held_out, base)
    before = copy.deepcopy(trials._model.state_dict())
    tried = [group for group in groups.free if not trials.is_bypassed(group)][:6]
    for group in tried:
        for kept in {0 if group.bypass else 1, group.n_channels}:
            mask = torch.arange(group.n_channels) < kept
            plan = sk.make_plan(groups, base | {group.name: mask})
            wanted = held_out.of(mask_model(repair_weights(model, plan, known), plan)).kl
            assert trials.loss(group, mask) == pytest.approx(wanted, rel=1e-4, abs=1e-9), group.name
    after = trials._model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(values, before[key]) for key, values in after.items())


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


def test_channels_that_nothing_depends_on_go_first() -> None:
    """One whose columns are zero, and copies: the second copy of a channel costs what the channel costs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)).double().eval()
    with torch.no_grad():
        model[2].weight[:, 3] = 0
        model[0].weight[6], model[0].bias[6] = model[0].weight[1], model[0].bias[1]
    x = torch.randn(400, 6, dtype=torch.float64)
    groups = find_groups(model, x[:2])
    found = channel_order(model, groups["0"], sk.input_statistics(model, groups, [x]))
    assert found is not None
    order, costs = found
    assert int(order[0]) == 3
    assert int(order[1]) in (1, 6)
    assert float(costs[2]) < 0.02 * float(costs[3])


def test_groups_without_a_layer_that_can_be_repaired_go_by_their_gates() -> None:
    model, groups, known, apart = prepared("SqueezeExcite")
    without = replace(known, layers={}, left_out=dict.fromkeys(known.layers, "for the test"))
    for group in groups.free:
        found = channel_order(model, group, without)
        assert found is not None
        order, costs = found
        gates = known.gates[group.name]
        assert torch.equal(gates[order], gates.sort().values)
        assert torch.allclose(costs[1:], gates.sort().values.cumsum(0))
        assert channel_order(model, group, replace(without, gates={})) is None
    curves = loss_curves(model, groups, replace(without, gates={}), HeldOut(model, groups, apart))
    for group in groups.free:  # of which nothing is known: they stay
        values = curves[group.name]
        assert isinstance(values, Tensor)
        assert bool(values.isinf().all())


def test_importance_by_gates_leaves_residual_blocks_whole() -> None:
    _, groups, known, _ = prepared("test_convnext", blocks="all")
    importance = order_by_gates(groups, known.gates)
    blocks = [group for group in groups.free if group.bypass]
    assert blocks
    assert all(bool(importance[group.name].isinf().all()) for group in blocks)
    masks = sk.choose_channels(groups, importance, {"macs": 0.8})
    assert all(bool(masks[group.name].all()) for group in blocks)
