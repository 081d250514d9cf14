"""The parts of a phase: a pure function of the step number."""

from __future__ import annotations

import pytest

from sparsekit.sparsify.schedules import PhaseShares

SHARES = PhaseShares(warmup=0.1, ramp=0.3, debias=0.25)


def test_the_factor_is_zero_in_warmup_and_debias_and_one_while_holding() -> None:
    assert [SHARES.factor(p) for p in (0.0, 0.05, 0.0999)] == [0.0] * 3
    assert [SHARES.factor(p) for p in (0.4001, 0.5, 0.7499)] == [1.0] * 3
    assert [SHARES.factor(p) for p in (0.75, 0.9, 1.0, 1.5)] == [0.0] * 4


def test_the_ramp_is_a_straight_line_from_zero_to_one() -> None:
    assert [SHARES.factor(0.1 + 0.3 * share) for share in (0.0, 0.25, 0.5, 0.75)] == pytest.approx(
        [0.0, 0.25, 0.5, 0.75]
    )
    assert SHARES.factor(0.4) == pytest.approx(1.0)


def test_without_warmup_ramp_and_debias_the_factor_is_one_throughout() -> None:
    assert {PhaseShares(0.0, 0.0, 0.0).factor(p) for p in (0.0, 0.3, 0.999)} == {1.0}


def test_without_a_ramp_the_factor_jumps_to_one() -> None:
    shares = PhaseShares(warmup=0.5, ramp=0.0, debias=0.2)
    assert [shares.factor(p) for p in (0.49, 0.5, 0.79, 0.8)] == [0.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("shares", [(-0.1, 0.1, 0.1), (0.5, 0.4, 0.2), (0.1, 0.1, -0.01), (1.1, 0.0, 0.0)])
def test_shares_that_fit_no_phase_are_refused(shares: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="sum of at most 1"):
        PhaseShares(*shares)


def test_shares_that_sum_to_one_up_to_rounding_are_accepted() -> None:
    assert PhaseShares(0.1, 0.2, 0.7).factor(0.2) == pytest.approx(0.5)
