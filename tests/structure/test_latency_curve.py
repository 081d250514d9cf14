"""The time of a layer between the widths at which it was measured."""

from __future__ import annotations

import numpy as np
import pytest

from sparsekit.structure.latency_curve import LatencyCurve


def test_measured_times_come_back_and_between_them_time_is_a_straight_line() -> None:
    curve = LatencyCurve(((8, 16, 64), (4, 12)), ((1.0, 3.0), (2.0, 5.0), (9.0, 20.0)))
    assert float(curve.at(8, 4)) == 1.0
    assert float(curve.at(64, 12)) == curve.dense_ms == 20.0
    assert float(curve.at(16, 8)) == pytest.approx(3.5)
    assert float(curve.at(40, 4)) == pytest.approx(2 + 7 / 2)
    assert float(curve.at(40, 8)) == pytest.approx((2 + 5 + 9 + 20) / 4)
    assert float(curve.at(4, 4)) == pytest.approx(0.5)  # below the smallest the line goes on
    assert float(curve.at(0, 12)) == float(curve.at(8, 0)) == 0.0


def test_a_begun_block_costs_as_much_as_a_whole_one() -> None:
    curve = LatencyCurve(((16, 64), (3,)), ((1.0,), (4.0,)), (16, 1))
    assert [float(curve.at(n, 3)) for n in (64, 63, 49, 48, 33, 32, 17, 16)] == [4, 4, 4, 3, 3, 2, 2, 1]


def test_a_width_that_is_no_multiple_of_the_block_is_its_own_end() -> None:
    curve = LatencyCurve(((16, 40), (3,)), ((1.0,), (4.0,)), (16, 1))
    assert float(curve.at(40, 3)) == float(curve.at(33, 3)) == 4.0
    assert float(curve.at(32, 3)) == pytest.approx(3.0)


def test_a_dimension_measured_at_one_size_counts_in_proportion() -> None:
    curve = LatencyCurve(((64,), (8, 16)), ((2.0, 4.0),))
    assert float(curve.at(32, 16)) == pytest.approx(2.0)
    assert float(curve.at(32, 8)) == pytest.approx(1.0)


@pytest.mark.parametrize(("outputs", "expected"), [(0, 4 / 2 + 1 / 2), (1, 4 / 2 + 1)])
def test_what_stands_beside_the_layer_follows_its_outputs(outputs: int, expected: float) -> None:
    curve = LatencyCurve(((32, 64), (16,)), ((2.0,), (4.0,)), beside_ms=1.0, outputs=outputs)
    assert curve.dense_ms == 5.0
    assert float(curve.at(32, 16)) == pytest.approx(expected)


def test_arrays_broadcast_to_what_single_sizes_give() -> None:
    generator = np.random.default_rng(0)
    curve = LatencyCurve(
        ((8, 24, 40), (16, 32)), tuple(tuple(row) for row in generator.random((3, 2)).tolist()), (8, 16), 0.3
    )
    rows, columns = np.arange(1, 41)[:, None], np.arange(1, 33)[None]
    table = curve.at(rows, columns)
    assert table.shape == (40, 32)
    for r, c in generator.integers(1, (41, 33), (50, 2)):
        assert table[r - 1, c - 1] == float(curve.at(r, c))
