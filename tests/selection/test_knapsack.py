"""The knapsack over steps of channels: against brute force, and its costs against what masks are said to leave."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
import torch
from plain import find_groups

from sparsekit.errors import InputError
from sparsekit.selection.costs import CostModel, kept_share
from sparsekit.selection.knapsack import choose_channels
from sparsekit.structure.groups import ChannelGroup, ChannelGroups, LayerCost, Member
from sparsekit.structure.inputs import InputSpec
from sparsekit.structure.latency_curve import LatencyCurve
from sparsekit.structure.masks import Masks, Scores

MULTIPLE = 4


def _chain(widths: list[int], generator: np.random.Generator) -> ChannelGroups:
    """A chain of linear layers between groups of these widths, from 8 inputs to 10 outputs, with random times.

    Even the times of blocks that stand next to each other differ, and some of them are of no importance.
    """
    members: dict[int, list[Member]] = {i: [] for i in range(len(widths))}
    layers = []
    sizes = [8, *widths, 10]
    for i, (into, out) in enumerate(pairwise(sizes)):
        name = f"{i}.weight"
        grid = [tuple(range(MULTIPLE, n + 1, MULTIPLE)) if n in widths else (n,) for n in (out, into)]
        steps = np.where(generator.random((len(grid[0]), len(grid[1]))) < 0.3, 0.0, 1.0)
        times = (steps * generator.random(steps.shape)).cumsum(0).cumsum(1) + 0.1
        curve = LatencyCurve(
            (grid[0], grid[1]),
            tuple(tuple(float(t) for t in row) for row in times),
            (MULTIPLE, MULTIPLE),
            0.05,
        )
        layers.append(LayerCost(name, (out, into), 1, curve))
        if i < len(widths):
            members[i].append(Member(name, 0, tuple(range(out)), 1, "producer", penalised=True))
        if i > 0:
            members[i - 1].append(Member(name, 1, tuple(range(into)), 1, "consumer"))
    return ChannelGroups(
        tuple(ChannelGroup(f"g{i}", n, tuple(members[i])) for i, n in enumerate(widths)),
        inputs=InputSpec(),
        layers=tuple(layers),
        tensor_shapes={layer.weight: layer.shape for layer in layers},
        parameters=tuple(layer.weight for layer in layers),
    )


def _lost(importance: Scores, masks: Masks) -> float:
    """Sum over groups of W log(W / kept importance)."""
    return sum(float(w.sum() * (w.sum() / w[masks[name]].sum()).log()) for name, w in importance.items())


def _brute_force(groups: ChannelGroups, importance: Scores, limits: dict[str, float]) -> float:
    """The least that any number of steps of each group loses under the limits."""
    best, costs = np.inf, CostModel(groups)
    ways = {}
    for name, w in importance.items():
        least = w.sort(descending=True).values[MULTIPLE - 1 :: MULTIPLE]
        ways[name] = [(w >= one, _lost({name: w}, {name: w >= one})) for one in least]
    for way in product(*ways.values()):
        lost = sum(of_group for _, of_group in way)
        masks = {name: mask for name, (mask, _) in zip(ways, way, strict=True)}
        if lost < best and all(costs.share(quantity, masks) <= limit for quantity, limit in limits.items()):
            best = lost
    return best


@pytest.mark.parametrize("limits", [{"latency": 0.5}, {"macs": 0.4}, {"latency": 0.7, "params": 0.6}])
def test_hardly_more_importance_is_lost_than_by_brute_force(limits: dict[str, float]) -> None:
    ratios = []
    for seed in range(30):
        generator = np.random.default_rng(seed)
        groups = _chain([16, 24, 12, 20], generator)
        importance = {g.name: torch.from_numpy(generator.exponential(size=g.n_channels)) for g in groups.free}
        masks = choose_channels(groups.with_rounding(MULTIPLE, 1), importance, limits)
        share = kept_share(groups, masks)
        assert all(getattr(share, quantity) <= limit + 1e-9 for quantity, limit in limits.items())
        assert all(int(mask.sum()) % MULTIPLE == 0 for mask in masks.values())
        ratios.append(_lost(importance, masks) / _brute_force(groups, importance, limits))
    assert min(ratios) >= 1 - 1e-9
    assert sum(ratio < 1 + 1e-9 for ratio in ratios) >= 20
    assert max(ratios) < 1.1


def _conv_network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.BatchNorm2d(16), torch.nn.ReLU()),
        *(torch.nn.Conv2d(16, 24, 3, padding=1), torch.nn.BatchNorm2d(24), torch.nn.ReLU()),
        *(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(24, 10)),
    )


@pytest.mark.parametrize("quantity", ["macs", "params", "channels"])
def test_a_limit_is_met_as_the_masks_are_counted_elsewhere(quantity: str) -> None:
    groups = find_groups(_conv_network(), torch.zeros(1, 3, 8, 8))
    importance = {group.name: torch.arange(1.0, group.n_channels + 1) for group in groups.free}
    for limit in (0.9, 0.6, 0.35):
        masks = choose_channels(groups, importance, {quantity: limit})
        left = getattr(kept_share(groups, masks), quantity)
        assert limit - 0.08 < left <= limit
        for name, mask in masks.items():  # the most valuable stay
            assert bool(mask[importance[name] >= importance[name][mask].min()].all())


def test_what_costs_nothing_stays_even_if_it_is_of_little_importance() -> None:
    """Time falls with every eighth channel only."""
    curve = LatencyCurve(((8, 16), (8,)), ((1.0,), (2.0,)), (8, 1))
    head = LatencyCurve(((10,), (8, 16)), ((0.0, 0.0),), (1, 8))
    layers = (LayerCost("a.weight", (16, 8), 1, curve), LayerCost("b.weight", (10, 16), 1, head))
    members = (
        Member("a.weight", 0, tuple(range(16)), 1, "producer", penalised=True),
        Member("b.weight", 1, tuple(range(16)), 1, "consumer"),
    )
    groups = ChannelGroups((ChannelGroup("g", 16, members),), (), layers)
    importance = {"g": torch.tensor([1.0] * 12 + [0.0] * 4)}
    for limit, kept in ((1.0, 16), (0.99, 8), (0.5, 8)):
        masks = choose_channels(groups, importance, {"latency": limit})
        assert int(masks["g"].sum()) == kept
    with pytest.raises(InputError, match=r"latency 0\.400 is out of reach.*leaves 0\.500"):
        choose_channels(groups, importance, {"latency": 0.4})


def test_the_least_of_a_group_stays_and_whole_blocks_can_go() -> None:
    """Where a block goes, so does what the layers in it cost."""
    curve = LatencyCurve(((8,), (8,)), ((1.0,),))
    layers = tuple(LayerCost(f"{name}.fc.weight", (8, 8), 1, curve) for name in ("one", "two"))
    blocks = tuple(
        ChannelGroup(name, 1, (Member(f"{name}.fc.weight", 0, tuple(range(8)), 8, "inside"),), bypass=name)
        for name in ("one", "two")
    )
    groups = ChannelGroups(blocks, (), layers).with_rounding(16, 8)
    importance = {"one": torch.tensor([2.0]), "two": torch.tensor([3.0])}
    masks = choose_channels(groups, importance, {"latency": 0.5})
    assert {name: bool(mask) for name, mask in masks.items()} == {"one": False, "two": True}


def test_channels_inside_a_block_that_goes_are_gone_too() -> None:
    curve = LatencyCurve(((8,), (8,)), ((1.0,),))
    inside = ChannelGroup("one.fc", 8, (Member("one.fc.weight", 0, tuple(range(8)), 1, "producer", True),))
    block = ChannelGroup("one", 1, (Member("one.gamma", 0, (0,), 8, "inside", True),), bypass="one")
    groups = ChannelGroups((inside, block), (), (LayerCost("one.fc.weight", (8, 8), 1, curve),))
    importance = {"one.fc": torch.ones(8), "one": torch.ones(1)}
    masks = choose_channels(groups.with_rounding(1, 1), importance, {"channels": 0.1})
    assert not masks["one"].any()
    assert kept_share(groups, masks).channels == 0.0


@pytest.mark.parametrize(
    ("importance", "limits", "message"),
    [
        (
            {},
            {"flops": 0.5},
            r"limits must be shares in \(0, 1\] of macs, params, channels, latency, got flops",
        ),
        ({}, {"macs": float("nan")}, "limits must be shares"),
        ({}, {"macs": 30.0}, "limits must be shares"),
        (
            {"0": torch.ones(3)},
            {"macs": 0.5},
            r"importance must be 16 numbers >= 0 for the group 0, got shape \(3,\)",
        ),
        ({"0": torch.full((16,), -1.0)}, {"macs": 0.5}, "importance must be 16 numbers >= 0"),
        ({"0": None}, {"macs": 0.5}, "got none"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    importance: dict[str, torch.Tensor | None], limits: dict[str, float], message: str
) -> None:
    groups = find_groups(_conv_network(), torch.zeros(1, 3, 8, 8))
    given = {g.name: torch.ones(g.n_channels) for g in groups.free} | importance
    with pytest.raises(InputError, match=message):
        choose_channels(groups, {n: w for n, w in given.items() if w is not None}, limits)


def test_latencies_that_were_not_measured_are_refused() -> None:
    groups = find_groups(_conv_network(), torch.zeros(1, 3, 8, 8))
    importance = {group.name: torch.ones(group.n_channels) for group in groups.free}
    with pytest.raises(InputError, match="measure_layers"):
        choose_channels(groups, importance, {"latency": 0.5})
