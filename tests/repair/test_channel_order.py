"""Orders of channels: by what the layers that read them can predict, else by their gates."""

from __future__ import annotations

from dataclasses import replace

import torch
from plain import find_groups
from prepared import prepared
from torch import nn

import sparsekit as sk
from sparsekit.repair.channel_order import channel_order, order_by_gates


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
    model, groups, known, _ = prepared("SqueezeExcite")
    without = replace(known, layers={}, left_out=dict.fromkeys(known.layers, "for the test"))
    for group in groups.free:
        found = channel_order(model, group, without)
        assert found is not None
        order, costs = found
        gates = known.gates[group.name]
        assert torch.equal(gates[order], gates.sort().values)
        assert torch.allclose(costs[1:], gates.sort().values.cumsum(0))
        assert channel_order(model, group, replace(without, gates={})) is None


def test_importance_by_gates_leaves_residual_blocks_whole() -> None:
    _, groups, known, _ = prepared("test_convnext", blocks="all")
    importance = order_by_gates(groups, known.gates)
    blocks = [group for group in groups.free if group.bypass]
    assert blocks
    assert all(bool(importance[group.name].isinf().all()) for group in blocks)
    masks = sk.choose_channels(groups, importance, {"macs": 0.8})
    assert all(bool(masks[group.name].all()) for group in blocks)
