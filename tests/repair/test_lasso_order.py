"""The LASSO on channels against one on the rows themselves, at one strength after the other."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from plain import find_groups
from rows_by_hand import correlated, layers, moments, weights
from sklearn.linear_model import Lasso
from torch import Tensor, nn

import sparsekit as sk
from sparsekit.repair.channel_order import channel_order
from sparsekit.repair.lasso_order import lasso_order
from sparsekit.repair.least_squares import Columns, costs_of_order


def contributions(layer: Columns, x: Tensor) -> Tensor:
    """What each channel brings to each output in each row, (rows x outputs, channels)."""
    return torch.einsum("rcq,ocq->roc", (x - x.mean(0))[:, layer.own], layer.weight[:, layer.own]).flatten(
        0, 1
    )


@pytest.mark.parametrize(("q", "readers"), [(1, 1), (1, 2), (3, 1), (2, 2)])
def test_the_last_to_go_are_those_that_a_lasso_on_the_rows_keeps(q: int, readers: int) -> None:
    """On the rows of all readers, one below the other."""
    known, rows = layers(7, q, readers)
    z = torch.cat([contributions(c, x) for c, x in zip(known, rows, strict=True)]).numpy()
    y = z.sum(1)
    order, costs = lasso_order(known)
    largest = abs(z.T @ y).max() / len(z)
    sizes = set()
    for strength in largest * np.geomspace(0.999, 1e-4, 40):
        factors = Lasso(alpha=strength, fit_intercept=False, tol=1e-10, max_iter=10**5).fit(z, y).coef_
        kept = set(np.flatnonzero(factors).tolist())
        assert kept == set(order.flip(0)[: len(kept)].tolist())
        sizes.add(len(kept))
    assert {1, 7} < sizes
    assert len(sizes) >= 5
    assert torch.equal(costs, costs_of_order(known, order))


def test_channels_that_bring_nothing_of_their_own_go_first() -> None:
    """Zero weights, a constant, and affine functions of a channel that is read in the same direction."""
    x, weight = correlated(200, 8, 1), weights(1, 3, 8)[0]
    weight[:, 2] = 0
    x[:, 5] = 3.0
    x[:, 6], weight[:, 6] = 0.25 * x[:, 0] - 1, weight[:, 0]
    x[:, 3], weight[:, 3] = x[:, 1], -0.5 * weight[:, 1]
    order, costs = lasso_order([Columns(weight, moments(x), torch.arange(8)[:, None])])
    assert set(order[:2].tolist()) == {2, 5}
    assert set(order[2:4].tolist()) == {6, 3}
    assert float(costs[4]) < 0.02 * float(costs[5])


def test_the_first_of_equal_channels_is_the_one_that_stays() -> None:
    x, weight = correlated(200, 4, 1), weights(1, 3, 4)[0]
    x[:, 3], weight[:, 3] = x[:, 1], weight[:, 1]
    assert int(lasso_order([Columns(weight, moments(x), torch.arange(4)[:, None])])[0][0]) == 3


def test_the_order_does_not_depend_on_how_channels_are_numbered() -> None:
    known, _ = layers(9, 2, 2)
    order, costs = lasso_order(known)
    number = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    again, same_costs = lasso_order([replace(layer, own=layer.own[number]) for layer in known])
    assert torch.equal(number[again], order)
    assert torch.allclose(same_costs, costs, rtol=1e-9)


@pytest.mark.parametrize("size", [1e-160, 1e-9, 1e9])
def test_the_order_does_not_depend_on_the_unit_of_the_outputs(size: float) -> None:
    (layer,), _ = layers(9, 1, 1)
    assert torch.equal(lasso_order([replace(layer, weight=size * layer.weight)])[0], lasso_order([layer])[0])


def test_channels_of_nothing_at_all_are_no_error() -> None:
    nothing = Columns(
        weights(1, 2, 4)[0], moments(torch.zeros(50, 4, dtype=torch.float64)), torch.arange(4)[:, None]
    )
    order, costs = lasso_order([nothing])
    assert order.tolist() == [0, 1, 2, 3]
    assert costs.isfinite().all()


def test_fewer_rows_than_channels_are_no_error() -> None:
    """One output and 12 rows: what 30 channels bring has at most 11 dimensions."""
    x = correlated(12, 30, 0)
    layer = Columns(weights(1, 1, 30)[0], moments(x), torch.arange(30)[:, None])
    order, costs = lasso_order([layer])
    assert sorted(order.tolist()) == list(range(30))
    assert bool((costs.diff() >= 0).all())
    assert int(torch.linalg.matrix_rank(contributions(layer, x)[:, order[19:]])) == 11


def test_a_group_is_ordered_by_the_path_where_it_is_asked_for() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 5)).double().eval()
    x = torch.randn(400, 6, dtype=torch.float64)
    groups = find_groups(model, x[:2])
    known = sk.input_statistics(model, groups, [x])
    before = copy.deepcopy(known.layers["2.weight"].moments.covariance)
    greedy, path = (channel_order(model, groups["0"], known, name) for name in ("greedy", "lasso"))
    assert greedy is not None
    assert path is not None
    assert torch.equal(known.layers["2.weight"].moments.covariance, before)
    assert not torch.equal(greedy[0], path[0])
    # In one unit: what both cost in the end is the same, and the greedy order is seldom dearer on the way.
    assert float(path[1][-1]) == pytest.approx(float(greedy[1][-1]), rel=1e-9)
    assert float(path[1][12]) > 0.9 * float(greedy[1][12])
