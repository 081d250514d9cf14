"""Least squares against numpy: what stays takes over what goes, and the cheapest channel goes first."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from rows_by_hand import correlated, layers, moments, true_cost, weights
from torch import Tensor

from sparsekit.repair.least_squares import Columns, Moments, absorb, costs_of_order, greedy_order


def ridge_regression(x: Tensor, target: Tensor, ridge: float) -> np.ndarray:
    """Coefficients of the best affine prediction whose slopes are held small, by an ordinary lstsq with more rows."""
    n, k = x.shape
    centred, wanted = (x - x.mean(0)).numpy(), (target - target.mean(0)).numpy()
    more = np.concatenate([centred, np.sqrt(ridge * n) * np.eye(k)])
    found: np.ndarray = np.linalg.lstsq(
        more, np.concatenate([wanted, np.zeros((k, wanted.shape[1]))]), rcond=None
    )[0]
    return found


def test_what_stays_takes_over_as_in_a_ridge_regression_of_what_is_lost() -> None:
    rows = [correlated(200, 7, seed) for seed in (0, 1)]
    kept = torch.tensor(
        [[True, False, True, True, False, True, True], [False, True, True] + [True] * 3 + [False]]
    )
    weight, known = weights(2, 3, 7), moments(*rows)
    new, shift = absorb(weight, kept, known)
    for g, x in enumerate(rows):
        lost = x[:, ~kept[g]] @ weight[g][:, ~kept[g]].T
        slopes = ridge_regression(x[:, kept[g]], lost, float(known.ridge[g]))
        assert not new[g][:, ~kept[g]].any()
        assert torch.allclose(
            new[g][:, kept[g]], weight[g][:, kept[g]] + torch.from_numpy(slopes).T, rtol=1e-8
        )
        # The mean of the output does not change.
        assert torch.allclose(x.mean(0) @ new[g].T + shift[g], x.mean(0) @ weight[g].T)


def test_no_other_weights_change_the_output_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsekit.repair.least_squares._RIDGE", 1e-13)
    x, weight = correlated(300, 6, 2), weights(1, 4, 6)
    kept = torch.tensor([[True, True, False, True, False, False]])
    new, shift = absorb(weight, kept, moments(x))
    change = (x @ new[0].T + shift[0] - x @ weight[0].T).square().sum()
    design = np.concatenate([x[:, kept[0]].numpy(), np.ones((300, 1))], 1)
    residual = np.linalg.lstsq(design, (x @ weight[0].T).numpy(), rcond=None)[1].sum()
    assert float(change) == pytest.approx(residual, rel=1e-8)


def test_columns_that_never_vary_become_a_bias() -> None:
    x = correlated(100, 5, 3)
    x[:, [1, 4]] = torch.tensor([2.0, -3.0], dtype=torch.float64)
    weight = weights(1, 3, 5)
    kept = torch.tensor([[True, False, True, True, False]])
    new, shift = absorb(weight, kept, moments(x))
    assert torch.allclose(new[0][:, kept[0]], weight[0][:, kept[0]], atol=1e-12)
    assert torch.allclose(shift[0], weight[0] @ torch.tensor([0, 2.0, 0, 0, -3.0], dtype=torch.float64))


def test_columns_of_nothing_at_all_are_no_error() -> None:
    x = torch.zeros(50, 4, dtype=torch.float64)
    new, shift = absorb(weights(1, 2, 4), torch.tensor([[True, False, True, False]]), moments(x))
    assert new.isfinite().all()
    assert not shift.any()
    order, costs = greedy_order([Columns(weights(1, 2, 4)[0], moments(x), torch.arange(4)[:, None])])
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    assert costs.isfinite().all()


def test_few_rows_are_trusted_less() -> None:
    x = correlated(400, 10, 4)
    known = moments(x)
    few = Moments(known.mean, known.covariance, 49)
    assert float(few.ridge) == pytest.approx(100 * float(known.ridge))


@pytest.mark.parametrize(("q", "readers"), [(1, 1), (1, 2), (3, 1), (2, 2)])
def test_the_channel_that_costs_least_goes_first_as_by_brute_force(q: int, readers: int) -> None:
    known, rows = layers(5, q, readers)
    order, costs = greedy_order(known)
    gone: list[int] = []

    def cost_of(channels: list[int]) -> float:
        return sum(
            true_cost(x, c.weight, c.own[channels].flatten().tolist(), float(c.moments.ridge[0]))
            for c, x in zip(known, rows, strict=True)
        )

    for step, channel in enumerate(order.tolist()):
        trials = {c: cost_of([*gone, c]) for c in range(5) if c not in gone}
        assert channel == min(trials, key=trials.__getitem__)
        gone.append(channel)
        assert float(costs[step + 1]) == pytest.approx(trials[channel], rel=1e-6)
    assert float(costs[0]) == 0.0


@pytest.mark.parametrize("q", [1, 2])
def test_several_at_once_cost_what_they_cost_together(q: int) -> None:
    known, rows = layers(6, q, 2)
    order, costs = greedy_order(known, at_once=4)
    assert sorted(order.tolist()) == list(range(6))
    assert all(a <= b for a, b in itertools.pairwise(costs.tolist()))
    for count in (4, 6):
        together = sum(
            true_cost(x, c.weight, c.own[order[:count]].flatten().tolist(), float(c.moments.ridge[0]))
            for c, x in zip(known, rows, strict=True)
        )
        assert float(costs[count]) == pytest.approx(together, rel=1e-6)


@pytest.mark.parametrize(("q", "readers"), [(1, 2), (3, 1)])
def test_an_order_costs_what_its_first_channels_cost_together(q: int, readers: int) -> None:
    known, rows = layers(5, q, readers)
    order, greedy_costs = greedy_order(known)
    assert torch.allclose(costs_of_order(known, order), greedy_costs, rtol=1e-8)
    order = torch.tensor([3, 0, 4, 1, 2])
    for count, cost in enumerate(costs_of_order(known, order).tolist()):
        together = sum(
            true_cost(x, c.weight, c.own[order[:count]].flatten().tolist(), float(c.moments.ridge[0]))
            for c, x in zip(known, rows, strict=True)
        )
        assert cost == pytest.approx(together, rel=1e-6, abs=1e-12)
