"""Loss curves: monotone, through what was measured; and the knapsack that takes the sum of their losses least."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
import torch

from sparsekit.selection.costs import CostModel
from sparsekit.selection.knapsack import Knapsack
from sparsekit.selection.loss_curves import LossCurve
from sparsekit.structure.groups import ChannelGroup, ChannelGroups, LayerCost, Member


def drawn(n: int, generator: np.random.Generator, measured: dict[int, float]) -> LossCurve:
    costs = torch.from_numpy(np.concatenate([[0.0], generator.exponential(size=n).cumsum()]))
    return LossCurve.through(torch.from_numpy(generator.permutation(n)), costs, measured)


@pytest.mark.parametrize("seed", range(5))
def test_a_curve_rises_towards_fewer_channels_through_what_was_measured(seed: int) -> None:
    generator = np.random.default_rng(seed)
    n = 20
    counts = sorted(generator.choice(np.arange(1, n), 4, replace=False).tolist(), reverse=True)
    measured = dict(zip(counts, generator.exponential(size=4).cumsum().tolist(), strict=True))
    curve = drawn(n, generator, measured)
    assert curve.losses.shape == (n + 1,)
    assert curve.losses[n] == 0
    assert (np.diff(curve.losses) <= 0).all()
    for count, loss in measured.items():
        assert curve.losses[count] == pytest.approx(loss)


def test_the_last_to_go_is_ranked_first() -> None:
    order = torch.tensor([2, 0, 3, 1])
    curve = LossCurve.through(order, torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]), {2: 1.0})
    assert curve.order.tolist() == [1, 3, 0, 2]


def test_between_measurements_the_prediction_shapes_the_curve() -> None:
    """Twice the predicted cost is twice the loss above the measurement before."""
    costs = torch.tensor([0.0, 1.0, 4.0, 5.0, 9.0, 20.0])
    curve = LossCurve.through(torch.arange(5), costs, {3: 0.4, 1: 1.4})
    np.testing.assert_allclose(curve.losses[[5, 4, 3]], [0.0, 0.1, 0.4])
    np.testing.assert_allclose(curve.losses[[2, 1]], [0.4 + 1 / 5, 1.4])
    np.testing.assert_allclose(curve.losses[0], 1.4 * 20 / 9)


def test_a_prediction_of_nothing_gives_straight_lines() -> None:
    curve = LossCurve.through(torch.arange(4), torch.zeros(5), {2: 1.0})
    np.testing.assert_allclose(curve.losses, [1.0, 1.0, 1.0, 0.5, 0.0])


def test_a_curve_near_a_choice_is_straight_between_and_forbids_fewer() -> None:
    curve = LossCurve.near(torch.arange(6), {2: 3.0, 3: 1.5, 5: 0.5})
    np.testing.assert_allclose(curve.losses[2:], [2.5, 1.0, 0.5, 0.0, 0.0])
    assert (curve.losses[:2] > 100).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_outputs_that_are_no_numbers_are_as_bad_as_can_be(bad: float) -> None:
    for curve in (
        LossCurve.near(torch.arange(6), {2: bad, 3: 1.5, 5: 0.5}),
        LossCurve.through(torch.arange(6), torch.arange(7.0), {2: bad, 3: 1.0}),
    ):
        assert np.isfinite(curve.losses).all()
        assert curve.losses[2] > 100 > curve.losses[3]


def test_the_mean_of_two_curves_is_that_of_their_losses() -> None:
    one, other = (
        LossCurve(torch.arange(2), np.array(losses)) for losses in ([4.0, 1.0, 0.0], [2.0, 2.0, 0.0])
    )
    np.testing.assert_allclose(one.mean_with(other).losses, [3.0, 1.5, 0.0])


def test_measurements_that_fall_count_as_the_largest_before() -> None:
    curve = LossCurve.through(torch.arange(6), torch.arange(7.0), {4: 2.0, 2: 1.0})
    assert (np.diff(curve.losses) <= 0).all()
    assert curve.losses[4] == curve.losses[2] == 2.0


def test_nothing_measured_is_no_loss() -> None:
    assert not LossCurve.through(torch.arange(3), torch.arange(4.0), {}).losses.any()


def test_a_residual_block_has_two_losses() -> None:
    curve = LossCurve.through(torch.zeros(1, dtype=torch.int64), torch.tensor([0.0, 1.0]), {0: 0.7})
    assert curve.losses.tolist() == [0.7, 0.0]


def chain(widths: list[int]) -> ChannelGroups:
    """Linear layers between groups of these widths, from 8 inputs to 10 outputs."""
    sizes = [8, *widths, 10]
    layers = tuple(LayerCost(f"{i}.weight", (out, into), 1) for i, (into, out) in enumerate(pairwise(sizes)))
    groups = tuple(
        ChannelGroup(
            f"g{i}",
            n,
            (
                Member(f"{i}.weight", 0, tuple(range(n)), 1, "producer"),
                Member(f"{i + 1}.weight", 1, tuple(range(n)), 1, "consumer"),
            ),
        )
        for i, n in enumerate(widths)
    )
    shapes = {layer.weight: layer.shape for layer in layers}
    return ChannelGroups(groups, (), layers, shapes, tuple(shapes)).with_rounding(4, 4)


def least_loss(groups: ChannelGroups, curves: dict[str, LossCurve], limit: float) -> float:
    """By trying all widths."""
    best, costs = np.inf, CostModel(groups)
    for counts in product(*(range(4, group.n_channels + 1, 4) for group in groups.free)):
        masks = {g.name: torch.arange(g.n_channels) < n for g, n in zip(groups.free, counts, strict=True)}
        if costs.share("macs", masks) <= limit:
            loss = sum(curves[g.name].losses[n] for g, n in zip(groups.free, counts, strict=True))
            best = min(best, float(loss))
    return best


@pytest.mark.parametrize("limit", [0.3, 0.5, 0.8])
def test_hardly_more_is_lost_than_by_trying_all_widths(limit: float) -> None:
    ratios = []
    for seed in range(20):
        generator = np.random.default_rng(seed)
        groups = chain([16, 24, 12, 20])
        curves = {
            group.name: drawn(
                group.n_channels,
                generator,
                {
                    n: float(generator.exponential() * (group.n_channels - n))
                    for n in (4, 8, group.n_channels - 4)
                },
            )
            for group in groups.free
        }
        masks = Knapsack(groups, curves).under({"macs": limit})
        assert CostModel(groups).share("macs", masks) <= limit + 1e-9
        for name, mask in masks.items():  # the ones that go last stay
            assert mask.nonzero()[:, 0].tolist() == sorted(curves[name].order[: int(mask.sum())].tolist())
        lost = sum(curves[name].losses[int(mask.sum())] for name, mask in masks.items())
        ratios.append(lost / least_loss(groups, curves, limit))
    assert min(ratios) >= 1 - 1e-9
    assert sum(ratio < 1 + 1e-9 for ratio in ratios) >= 12
    assert max(ratios) < 1.5
    assert float(np.mean(ratios)) < 1.06


def test_groups_of_infinite_importance_stay_whole_beside_curves() -> None:
    groups = chain([16, 16])
    curve = LossCurve.through(torch.arange(16), torch.arange(17.0), {4: 1.0})
    masks = Knapsack(groups, {"g0": torch.full((16,), torch.inf), "g1": curve}).under({"macs": 0.7})
    assert masks["g0"].all()
    assert not masks["g1"].all()


def test_what_loses_nothing_goes_only_as_far_as_is_asked_for() -> None:
    groups = chain([16])
    free = LossCurve.through(torch.arange(16), torch.arange(17.0), {4: 0.0})
    assert int(Knapsack(groups, {"g0": free}).under({"macs": 1.0})["g0"].sum()) == 16
    assert int(Knapsack(groups, {"g0": free}).under({"macs": 0.5})["g0"].sum()) <= 8
