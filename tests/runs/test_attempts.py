"""The fastest model within a budget of accuracy: which speeds are tried, and what a run makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from accelerate import Accelerator
from rich.console import Console

from sparsekit.errors import InputError
from sparsekit.recipe.recipe import Recipe
from sparsekit.recipe.specs import (
    CutSpec,
    DataSpec,
    DenseSpec,
    FinetuneSpec,
    ModelSpec,
    SparsifySpec,
    TargetSpec,
)
from sparsekit.runs import attempts, prune_stages
from sparsekit.runs.accuracy_search import full_target, largest_factor, next_pressure, target_at
from sparsekit.runs.arguments import Target
from sparsekit.runs.attempts import _binding
from sparsekit.runs.rehearsal import Inputs
from sparsekit.runs.results import Attempt, AttemptFinetuned, AttemptsResult, CutResult
from sparsekit.runs.run import Run
from sparsekit.runs.run_directory import RunDirectory
from sparsekit.runs.stages import Stage


def search(
    drop_at: float, budget: float = 0.01, most: float = 3.0, slope: float = 2.0, full: float = 2.0
) -> list[float]:
    """Pressures that are tried if the drop is (pressure / drop_at)^slope of the budget."""
    tried: list[tuple[float, float]] = []
    while len(tried) < 30:
        pressure = next_pressure(tried, budget, most, full)
        if pressure is None:
            return [x for x, _ in tried]
        tried.append((pressure, budget * (pressure / drop_at) ** slope))
    raise AssertionError("the search does not end")


@pytest.mark.parametrize("full", [1.5, 2.0, 8.0])
@pytest.mark.parametrize("slope", [0.5, 1.0, 2.0, 6.0])
@pytest.mark.parametrize("drop_at", [0.2, 0.5, 0.99, 1.0, 1.3, 2.5])
def test_the_search_closes_in_on_the_fastest_within_the_budget(
    drop_at: float, slope: float, full: float
) -> None:
    """To a factor of 1.11 in speed, whatever full speed is."""
    tried = search(drop_at, slope=slope, full=full)
    assert tried[0] == 1
    assert all(0 < x <= 3 for x in tried)
    assert len(set(tried)) == len(tried)
    within = max((x for x in tried if x <= drop_at), default=0.0)
    assert full**drop_at / full**within <= 1.112
    assert len(tried) <= 12


def test_what_loses_nothing_is_pushed_to_the_limit_and_no_further() -> None:
    assert search(100.0, most=1.0) == [1.0]
    assert search(100.0, most=2.0)[-1] == 2.0
    assert search(100.0, most=0.4) == [0.4]


def test_nothing_within_the_budget_ends_at_small_speeds() -> None:
    tried = search(1e-6)
    assert tried == sorted(tried, reverse=True)
    assert 2 ** tried[-1] <= 1.112


def test_drops_that_do_not_grow_steadily_do_not_confuse_it() -> None:
    """Accuracy is noisy: a higher pressure may lose less. What is slower than the best within is not tried again."""
    x = next_pressure([(1.0, 0.02), (0.5, 0.03), (0.25, -0.01)], 0.01, 3.0, 2.0)
    assert x is not None
    assert 0.25 < x < 0.5
    x = next_pressure([(1.0, 0.02), (0.5, 0.015), (0.75, -0.01)], 0.01, 3.0, 2.0)
    assert x is not None
    assert 0.75 < x < 1


def test_a_target_between_nothing_and_all_of_it() -> None:
    full = {"speedup": 4.0, "macs": 0.25}
    assert target_at(full, 1.0) == full
    assert target_at(full, 0.5) == {"speedup": 2.0, "macs": 0.5}
    assert target_at(full, 0.0) == {"speedup": 1.0, "macs": 1.0}
    assert largest_factor(full) == 4
    assert largest_factor({"speedup": 2.0, "macs": 0.25}) == 4


def recipe(**target: float) -> Recipe:
    return Recipe(
        model=ModelSpec(name="test_resnet"),
        data=DataSpec(name="digits"),
        dense=DenseSpec(epochs=1),
        sparsify=SparsifySpec(epochs=1),
        cut=CutSpec(target=TargetSpec(max_accuracy_drop=0.01, **target)),
        finetune=FinetuneSpec(epochs=1),
    )


def target_of(**target: float) -> Target:
    return Target.of(recipe(**target).cut.target)


def test_what_the_search_starts_from() -> None:
    full, most = full_target(target_of(), dense_ms=4.0, most=8.0)
    assert full == {"speedup": 2.0}
    assert full["speedup"] ** most == pytest.approx(0.9 * 8)
    assert full_target(target_of(speedup=3.0, macs=0.3), 4.0, 8.0) == ({"speedup": 3.0, "macs": 0.3}, 1.0)
    assert full_target(target_of(latency_ms=1.0), 4.0, 8.0) == ({"speedup": 4.0}, 1.0)


@pytest.mark.parametrize(
    ("target", "most", "message"),
    [
        ({}, 1.2, "too little for a search"),
        ({"latency_ms": 3.9}, 8.0, "cut.target.latency_ms ask for so little"),
    ],
)
def test_what_leaves_nothing_to_search_is_refused(
    target: dict[str, float], most: float, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        full_target(target_of(**target), dense_ms=4.0, most=most)


def attempt(pressure: float, drop: float, failure: str = "") -> Attempt:
    return Attempt(1, pressure, {}, drop, drop <= 0.01, failure=failure)


@pytest.mark.parametrize(
    ("target", "tried", "most", "binds"),
    [
        ({}, [attempt(1, 0.02), attempt(0.9, 0.005)], 3, "cut.target.max_accuracy_drop"),
        ({}, [attempt(1, 0.02), attempt(0.5, 0.005)], 3, "cut.target.max_accuracy_drop and cut.attempts"),
        ({}, [attempt(1, 0.005)], 3, "cut.attempts"),
        ({}, [attempt(3, 0.005)], 3, "cut.min_channels"),
        ({}, [attempt(1, 1.0, "out of reach"), attempt(0.9, 0.005)], 3, "cut.min_channels"),
        ({"speedup": 2.0}, [attempt(1, 0.005)], 1, "cut.target.speedup"),
        ({"macs": 0.5, "params": 0.5}, [attempt(1, 0.005)], 1, "cut.target.macs and cut.target.params"),
    ],
)
def test_what_limits_the_speed_is_named(
    target: dict[str, float], tried: list[Attempt], most: float, binds: str
) -> None:
    found = AttemptsResult(target or {"speedup": 2.0}, most, 0.9, tuple(tried))
    assert _binding(target_of(**target), tried[-1], found) == binds


def made(
    run: Run, monkeypatch: pytest.MonkeyPatch, outcome: Callable[[float], float | InputError]
) -> AttemptsResult:
    """What attempts find if the validation accuracy (or the failure) at a speed is `outcome`; nothing is trained."""

    def run_stage(inner: Run, stage: Stage, *, also: Callable[[], None]) -> None:
        target = inner.recipe.cut.target
        assert target is not None
        assert target.speedup is not None
        found = outcome(target.speedup)
        if isinstance(found, InputError):
            raise found
        record = inner.files.begin(stage.name, {})
        cut = CutResult(0.0, 8, 16, 8, 0, None, ())
        inner.files.finish(record, cut if stage.name == "cut" else AttemptFinetuned(found, 7))

    first = AttemptsResult({"speedup": 2.0}, 2.0, 0.9)
    monkeypatch.setattr(attempts, "_first_result", lambda run: first)
    monkeypatch.setattr(attempts, "run_stage", run_stage)
    return attempts.make_attempts(run, lambda: None)


@pytest.fixture
def bare_run(tmp_path: Path) -> Run:
    files = RunDirectory(tmp_path / "run")
    files.open(resume=False)
    files.begin("attempts", {})
    inputs = cast("Inputs", None)
    return Run(recipe(), inputs, files, Accelerator(cpu=True), Console(quiet=True))


def test_what_cannot_be_made_counts_as_too_fast(bare_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = made(bare_run, monkeypatch, lambda speed: InputError("out of reach") if speed > 1.7 else 0.9)
    first, second, *_ = found.attempts
    assert (first.failure, first.accuracy) == ("out of reach", None)
    assert second.accepted
    assert found.taken == max(found.attempts, key=lambda one: (one.accepted, one.pressure)).number
    assert found.binds.startswith("cut.min_channels")
    # The journal has them all, so that a resumed run would go on behind them.
    again = RunDirectory(bare_run.files.path)
    again.open(resume=True)
    assert again.result("attempts", AttemptsResult).attempts == found.attempts


def test_a_speed_at_which_nothing_can_go_loses_nothing(
    bare_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = made(
        bare_run,
        monkeypatch,
        lambda speed: prune_stages.NothingToCutError("nothing to remove") if speed < 1.6 else 0.8,
    )
    assert [one.failure != "" for one in found.attempts] == [
        one.target["speedup"] < 1.6 for one in found.attempts
    ]
    assert found.taken == 1
    assert "none of" in found.remark


def test_if_nothing_can_be_made_that_is_told(bare_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"none of \d attempts could be made: out of reach"):
        made(bare_run, monkeypatch, lambda speed: InputError("out of reach"))
