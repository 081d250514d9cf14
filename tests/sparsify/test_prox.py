"""Proximal maps against their definition: numerical minimisation, optimality conditions, and limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from sparsekit.sparsify.prox import block_shrinkage, mcp_shrinkage, soft_threshold_


def soft_threshold(v: torch.Tensor, t: torch.Tensor | float) -> torch.Tensor:
    result = v.clone()
    soft_threshold_([result], [torch.as_tensor(t, dtype=v.dtype)])
    return result


def _prox_group_lasso(v: torch.Tensor, t: float) -> torch.Tensor:
    return v * block_shrinkage(v.norm()[None], t)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("seed", range(8))
def test_no_nearby_point_has_a_smaller_objective(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    v, t = rng.normal(size=size), float(rng.uniform(0.05, 1.5))
    for norm, prox in (
        (lambda x: np.abs(x).sum(), lambda v: soft_threshold(v, t)),
        (lambda x: np.sqrt((x * x).sum()), lambda v: _prox_group_lasso(v, t)),
    ):

        def objective(x: np.ndarray, norm: object = norm) -> float:
            return float(0.5 * ((x - v) ** 2).sum() + t * norm(x))

        ours = prox(torch.tensor(v)).numpy()
        options = {"xatol": 1e-9, "fatol": 1e-13, "maxiter": 4000, "maxfev": 4000}
        starts = [v, np.zeros(size), ours]
        best = min(
            (minimize(objective, x, method="Nelder-Mead", options=options) for x in starts),
            key=lambda found: found.fun,
        )
        assert objective(ours) <= best.fun + 1e-10
        assert np.allclose(ours, best.x, atol=1e-4)


@pytest.mark.parametrize("concavity", [1.5, 3.0])
@pytest.mark.parametrize("rate", [0.01, 0.5, 1.4, 1.5, 2.9, 3.0, 10.0])
def test_the_map_of_mcp_is_the_best_of_a_fine_grid(rate: float, concavity: float) -> None:
    """A point along the ray through v is best, so one dimension says it all."""
    lam, grid = 0.7, np.linspace(0, 4, 40_001)
    penalty = np.where(
        grid <= concavity * lam, lam * grid - grid**2 / (2 * concavity), concavity * lam**2 / 2
    )
    for norm in np.linspace(0.013, 3.9, 61):
        objective = 0.5 * (grid - norm) ** 2 + rate * penalty
        found = norm * float(
            mcp_shrinkage(torch.tensor([norm]), rate * lam, rate, concavity)
        )  # where two points are equally good, either will do
        ours = 0.5 * (found - norm) ** 2 + rate * np.interp(found, grid, penalty)
        assert ours <= objective.min() + 1e-7


def test_mcp_leaves_alone_what_is_far_from_zero_and_is_group_lasso_for_a_large_concavity() -> None:
    norms = torch.tensor([0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 9.0], dtype=torch.float64)
    factors = mcp_shrinkage(norms, 0.1 * 0.1, 0.1)
    assert torch.equal(factors[-2:], torch.ones(2, dtype=torch.float64))
    assert bool((factors[1:-2] <= 1).all())
    large = mcp_shrinkage(norms, 0.1, 1.0, concavity=1e9)
    assert torch.allclose(large, block_shrinkage(norms, 0.1))
    for t in (0.0, torch.zeros(7, dtype=torch.float64)):
        assert torch.equal(
            mcp_shrinkage(norms[1:], t if isinstance(t, float) else t[1:], 0.1), torch.ones(6).double()
        )


@pytest.mark.parametrize("seed", range(6))
def test_soft_threshold_and_then_the_block_is_the_map_of_the_sparse_group_lasso(seed: int) -> None:
    rng = np.random.default_rng(seed)
    v, t1, t2 = rng.normal(size=3), float(rng.uniform(0.05, 0.8)), float(rng.uniform(0.05, 0.8))

    def objective(x: np.ndarray) -> float:
        return float(0.5 * ((x - v) ** 2).sum() + t1 * np.abs(x).sum() + t2 * np.sqrt((x * x).sum()))

    soft = soft_threshold(torch.tensor(v), t1)
    ours = (soft * block_shrinkage(soft.norm()[None], t2)).numpy()
    options = {"xatol": 1e-9, "fatol": 1e-13, "maxiter": 4000, "maxfev": 4000}
    found = [
        minimize(objective, x, method="Nelder-Mead", options=options).fun for x in (v, np.zeros(3), ours)
    ]
    assert objective(ours) <= min(found) + 1e-10


def test_soft_threshold_meets_the_optimality_condition_in_every_coordinate() -> None:
    """v - x is t times a subgradient of the L1 norm at x."""
    v = torch.randn(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = soft_threshold(v, 0.4)
    alive = x != 0
    assert 0 < alive.sum() < len(v)
    assert torch.allclose((v - x)[alive], 0.4 * x[alive].sign())
    assert bool(((v - x)[~alive].abs() <= 0.4).all())


def test_block_shrinkage_meets_the_optimality_condition_in_every_group() -> None:
    """v - x is t times the unit vector along x, or at most t long where x is zero; t differs by group."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(500, 3, generator=generator, dtype=torch.float64)
    t = torch.rand(500, generator=generator, dtype=torch.float64) * 3
    x = v * block_shrinkage(v.norm(dim=1), t)[:, None]
    alive = x.norm(dim=1) > 0
    assert 0 < alive.sum() < len(v)
    unit = x[alive] / x[alive].norm(dim=1, keepdim=True)
    assert torch.allclose((v - x)[alive], t[alive, None] * unit)
    assert bool(((v - x)[~alive].norm(dim=1) <= t[~alive]).all())
    assert bool((x[~alive] == 0).all())


def test_group_lasso_with_groups_of_one_is_l1() -> None:
    v = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(v * block_shrinkage(v.abs(), 0.7), soft_threshold(v, 0.7), atol=1e-15)
    assert torch.equal(v * block_shrinkage(v.abs(), 0.7) == 0, soft_threshold(v, 0.7) == 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_threshold_zero_changes_nothing_zeros_included(dtype: torch.dtype) -> None:
    v = torch.tensor([0.0, -0.0, 1e-30, -2.5, 3e4]).to(dtype)
    assert torch.equal(soft_threshold(v, 0.0), v)
    assert torch.equal(soft_threshold(v, torch.zeros(5, dtype=dtype)), v)
    assert torch.equal(block_shrinkage(v.abs(), 0.0), torch.ones(5, dtype=dtype))
    assert torch.equal(block_shrinkage(v.abs(), torch.zeros(5, dtype=dtype)), torch.ones(5, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zero_groups_stay_zero_and_nothing_becomes_nan(dtype: torch.dtype) -> None:
    norms = torch.tensor([0.0, 1e-30, 0.25, 0.5, 1.0]).to(dtype)
    factors = block_shrinkage(norms, 0.5)
    assert torch.equal(factors, torch.tensor([0.0, 0.0, 0.0, 0.0, 0.5], dtype=dtype))


def test_proximal_maps_are_non_expansive() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        a, b = torch.randn(2, 5, generator=generator, dtype=torch.float64)
        for mapped in (soft_threshold(a, 0.6) - soft_threshold(b, 0.6), _both(a, b)):
            assert mapped.norm() <= (a - b).norm() + 1e-12


def _both(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return _prox_group_lasso(a, 0.6) - _prox_group_lasso(b, 0.6)
