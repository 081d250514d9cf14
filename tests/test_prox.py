"""Proximal maps against their definition: numerical minimisation, optimality conditions, and limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from sparsekit.prox import block_shrinkage, soft_threshold


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
