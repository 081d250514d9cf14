"""Times of operators: measured in ONNX Runtime, kept on disk under what they depend on, and where blocks end."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sparsekit.latency import table as latency_table
from sparsekit.latency.operators import Operator, time_operators
from sparsekit.latency.table import LatencyTable, step_width

CONV = Operator((1, 8, 6, 6), (12, 8, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
DEPTHWISE = Operator((1, 8, 6, 6), (8, 1, 3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 8)
LINE = Operator((2, 8, 20), (4, 8, 5), (1,), (2, 2), (1,))
PRODUCT = Operator((5, 8), (8, 12))


def test_every_kind_of_operator_is_timed() -> None:
    """A product of a thousand times as many numbers takes longer than one of a few."""
    large = Operator((256, 256), (256, 256))
    done: list[tuple[int, int]] = []
    times = time_operators(
        [CONV, large, DEPTHWISE, LINE, PRODUCT], max_rounds=16, progress=lambda *n: done.append(n)
    )
    assert len(times) == 5
    assert all(0 <= ms < 1000 for ms in times)
    assert times[1] == max(times) > 0
    assert done[-1][1] == 16
    assert time_operators([]) == []


def test_operators_of_many_graphs_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsekit.latency.operators._MAX_BYTES", 1)
    products = [Operator((64, 64), (64, 64)), Operator((512, 512), (512, 512)), Operator((64, 64), (64, 64))]
    times = time_operators(products, max_rounds=8)
    assert times[1] == max(times)


def test_operators_are_told_apart_by_all_they_depend_on() -> None:
    others = [
        Operator((2, 8, 6, 6), (12, 8, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
        Operator((1, 8, 6, 6), (12, 8, 3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
        Operator((1, 8, 6, 6), (12, 8, 3, 3), (1, 1), (0, 0, 0, 0), (1, 1)),
        Operator((1, 8, 6, 6), (12, 8, 3, 3), (1, 1), (1, 1, 1, 1), (2, 2)),
        Operator((1, 8, 6, 6), (12, 4, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 2),
    ]
    assert len({operator.key for operator in (CONV, DEPTHWISE, LINE, PRODUCT, *others)}) == 9


class Stopwatch:
    """In the place of ONNX Runtime: the n-th operator it is shown takes n ms."""

    def __init__(self) -> None:
        self.shown: list[Operator] = []

    def __call__(self, operators: Sequence[Operator], **_: Any) -> list[float]:
        self.shown += operators
        return [float(n) for n in range(len(self.shown) - len(operators) + 1, len(self.shown) + 1)]


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> Stopwatch:
    watch = Stopwatch()
    monkeypatch.setattr(latency_table, "time_operators", watch)
    return watch


def test_what_was_measured_once_is_not_measured_again(stopwatch: Stopwatch, tmp_path: Path) -> None:
    table = LatencyTable(cache=tmp_path)
    assert table.ms([CONV, PRODUCT, CONV]) == [1.0, 2.0, 1.0]
    assert LatencyTable(cache=tmp_path).ms([PRODUCT, DEPTHWISE, CONV]) == [2.0, 3.0, 1.0]
    assert stopwatch.shown == [CONV, PRODUCT, DEPTHWISE]
    content = json.loads(table.path.read_text())
    assert content["machine"]["threads"] == 1
    assert content["machine"]["cpu"]


def test_two_runs_at_once_keep_what_both_measured(stopwatch: Stopwatch, tmp_path: Path) -> None:
    first, second = LatencyTable(cache=tmp_path), LatencyTable(cache=tmp_path)
    first.ms([CONV])
    second.ms([PRODUCT])
    LatencyTable(cache=tmp_path).ms([CONV, PRODUCT])
    assert stopwatch.shown == [CONV, PRODUCT]


def test_other_machines_versions_and_threads_have_tables_of_their_own(
    stopwatch: Stopwatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {LatencyTable(cache=tmp_path).path, LatencyTable(threads=2, cache=tmp_path).path}
    monkeypatch.setattr(latency_table.onnxruntime, "__version__", "0.1")
    paths.add(LatencyTable(cache=tmp_path).path)
    monkeypatch.setattr(
        latency_table, "describe_machine",
        lambda: {"cpu": "abacus", "physical_cores": 1, "logical_cores": 1, "simd": []},
    )  # fmt: skip
    paths.add(LatencyTable(cache=tmp_path).path)
    assert len(paths) == 4


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"format": 1}', '{"format": 1, "machine": {"cpu": "abacus"}, "ms": {}}', "\x00\xff"],
)
def test_a_damaged_or_foreign_table_is_left_out_with_a_warning(
    content: str, stopwatch: Stopwatch, tmp_path: Path
) -> None:
    path = LatencyTable(cache=tmp_path).path
    path.write_text(content)
    with pytest.warns(UserWarning, match=r"latency table .* is left out .*measuring anew"):
        table = LatencyTable(cache=tmp_path)
    assert table.ms([CONV]) == [1.0]
    assert LatencyTable(cache=tmp_path).ms([CONV]) == [1.0]


def test_a_cache_that_cannot_be_written_costs_a_warning_and_no_run(
    stopwatch: Stopwatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    table = LatencyTable(cache=tmp_path / "file")
    with pytest.warns(UserWarning, match="SPARSEKIT_CACHE"):
        assert table.ms([CONV]) == [1.0]
    assert table.ms([CONV]) == [1.0]
    assert stopwatch.shown == [CONV]


def test_a_full_disk_costs_a_warning_and_no_run(
    stopwatch: Stopwatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(old: object, new: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.replace", replace)
    with pytest.warns(UserWarning, match="no space is left on its disk"):
        assert LatencyTable(cache=tmp_path).ms([CONV]) == [1.0]


def test_the_folder_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / "mine"))
    assert LatencyTable().path.parent == tmp_path / "mine"
    monkeypatch.delenv("SPARSEKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert "sparsekit" in LatencyTable().path.parts


@pytest.mark.parametrize("block", [4, 8, 16, 32])
def test_the_block_of_a_staircase_is_found(block: int) -> None:
    """With a dearer path for what is no multiple of four, as convolutions have."""
    widths = (64, 63, 60, 56, 52, 48, 44, 40, 36, 32)
    ms = {n: (-(-n // block) * block) ** 2 * (1.0 if n % 4 == 0 else 1.3) for n in widths}
    assert step_width(ms) == block


def test_a_straight_line_has_no_blocks() -> None:
    widths = (256, 254, 252, 248, 244, 240, 236, 232, 228, 224, 192)
    assert step_width({n: float(n * n) for n in widths}) == 1
    assert step_width(dict.fromkeys(widths, 1.0)) == 1
    assert step_width({}) == 1


def test_blocks_are_measured_once(stopwatch: Stopwatch, tmp_path: Path) -> None:
    """Here the later an operator is shown the longer it takes: fewer channels take longer, which is no staircase."""
    assert LatencyTable(cache=tmp_path).conv_step() == LatencyTable(cache=tmp_path).product_step() == 1
    shown = len(stopwatch.shown)
    assert shown > 10
    assert LatencyTable(cache=tmp_path).conv_step() == LatencyTable(cache=tmp_path).product_step() == 1
    assert len(stopwatch.shown) == shown
