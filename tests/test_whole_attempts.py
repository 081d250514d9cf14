"""Whole runs to a budget of accuracy, as a person starts them."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from tiny_run import TINY, WIDE_STEPS, in_this_process, options

import sparsekit as sk
from sparsekit.recipe.reading import load_recipe
from sparsekit.recipe.specs import (
    TargetSpec,
)
from sparsekit.report.schema import read_report

WITHIN = (
    *("cut.target={max_accuracy_drop: 0.9, speedup: 1.2}", "cut.attempts=1"),
    *("sparsify.epochs=2", "finetune.epochs=1", *WIDE_STEPS),
)


def prune(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """How near a speed comes to the one asked for is not looked at, so it is tried twice at most."""
    (folder / "recipe.yaml").write_text(TINY)
    output = ("--output", folder / "run")
    with mock.patch("sparsekit.latency.search._MAX_TRIALS", 2):
        return in_this_process("prune", folder / "recipe.yaml", *output, *options(*WITHIN), *arguments)


@pytest.fixture(scope="module")
def run(made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """One attempt, which may lose nearly everything."""

    def make(folder: Path) -> None:
        done = prune(folder)
        assert done.returncode == 0, done.stderr
        assert "attempt 1" in done.stdout

    return made_once("attempts", make) / "run"


def test_what_is_within_the_budget_becomes_the_run_s_model(run: Path) -> None:
    report = read_report(run / "report.json")
    (attempt,) = report.attempts
    assert attempt.accepted
    assert attempt.taken
    assert report.binds == "cut.target.speedup"
    assert attempt.macs == report.pruned.macs < report.dense.macs
    taken, kept = sk.load(run / "attempts/1/pruned"), sk.load(run / "pruned")
    assert all(bool((a == b).all()) for a, b in zip(taken.parameters(), kept.parameters(), strict=True))


def test_every_attempt_is_left_with_its_recipe_and_says_on_what_it_was_judged(run: Path) -> None:
    for attempt in read_report(run / "report.json").attempts:
        folder = run / "attempts" / str(attempt.number)
        assert load_recipe(folder / "recipe.yaml").cut.target == TargetSpec(**attempt.target)
        info = json.loads((folder / "pruned/structure.json").read_text())["info"]
        assert info["validation_accuracy"] == attempt.accuracy
        assert "test_accuracy" not in info
    assert "test_accuracy" in json.loads((run / "pruned/structure.json").read_text())["info"]


def test_an_attempt_is_not_taken_for_a_run(run: Path) -> None:
    done = in_this_process("report", run / "attempts/1")
    assert done.returncode == 2
    assert "holds an attempt" in done.stderr


def test_accuracies_are_those_of_the_validation_curves(run: Path) -> None:
    report = read_report(run / "report.json")
    last = [point.accuracy for point in report.curves if point.phase == "finetune"][-1]
    dense = [point.accuracy for point in report.curves if point.phase == "baseline"][-1]
    attempt = report.attempts[-1]
    assert attempt.accuracy == last
    assert dense is not None
    assert attempt.drop == pytest.approx(dense - attempt.accuracy)


def interrupted(run: Path, folder: Path) -> Path:
    """A copy of the run as if killed after its first attempt, which had lost more than the budget."""
    copy = folder / "run"
    shutil.copytree(run, copy)
    journal = copy / "checkpoints/journal.json"
    stages = json.loads(journal.read_text())["stages"]
    stages = stages[: [stage["name"] for stage in stages].index("attempts") + 1]
    notes = stages[-1]["result"]
    first = notes["attempts"][0] | {"drop": 0.95, "accepted": False}
    left = {key: notes[key] for key in ("full", "most", "dense_accuracy")} | {"attempts": [first]}
    stages[-1] |= {"status": "running", "result": left}
    journal.write_text(json.dumps({"stages": stages}))
    shutil.rmtree(copy / "attempts/2", ignore_errors=True)
    shutil.rmtree(copy / "pruned")
    # As after a kill in the moment in which the second one's directory is made.
    (copy / "attempts/2/checkpoints").mkdir(parents=True)
    return copy


def test_resuming_goes_on_with_the_next_attempt(run: Path, tmp_path: Path) -> None:
    copy = interrupted(run, tmp_path)
    before = (copy / "attempts/1/pruned/model.safetensors").stat().st_mtime_ns
    other = prune(tmp_path, "--resume", "--set", "cut.target={max_accuracy_drop: 0.8, speedup: 1.2}")
    assert other.returncode == 2
    assert "cut.target.max_accuracy_drop" in other.stderr
    done = prune(tmp_path, "--resume", "--set", "cut.attempts=2")
    assert done.returncode == 0, done.stderr
    assert (copy / "attempts/1/pruned/model.safetensors").stat().st_mtime_ns == before
    report = read_report(copy / "report.json")
    first, second = report.attempts
    assert second.target["speedup"] < first.target["speedup"]
    assert (first.taken, second.taken) == (False, True)
    assert report.binds.startswith("cut.target.max_accuracy_drop")


def test_one_may_go_on_with_a_target_that_takes_no_attempts(run: Path, tmp_path: Path) -> None:
    copy = interrupted(run, tmp_path)
    done = prune(tmp_path, "--resume", "--set", "cut.target={macs: 0.5}")
    assert done.returncode == 0, done.stderr
    report = read_report(copy / "report.json")
    assert (report.attempts, report.binds) == ((), "")
    assert not any("accuracy_drop" in warning for warning in report.warnings)


def test_a_model_that_cannot_get_faster_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    done = prune(
        tmp_path,
        *("--set", "cut.target={max_accuracy_drop: 0.9}", "--set", "cut.attempts=2"),
        *("--set", "sparsify.epochs=0", "--set", "finetune.epochs=0", "--set", "cut.min_channels=4096"),
    )
    assert done.returncode == 2
    assert "too little for a search" in done.stderr
    assert "dense ..." not in done.stderr


def test_a_budget_that_no_attempt_keeps_is_told_and_the_nearest_is_taken(tmp_path: Path) -> None:
    done = prune(
        tmp_path,
        *("--set", "cut.target={max_accuracy_drop: 0.001, macs: 0.2}", "--set", "cut.attempts=1"),
        *("--set", "sparsify.epochs=0", "--set", "finetune.epochs=0", "--set", "dense.epochs=8"),
        *("--set", "cut.round_to=4", "--set", "cut.min_channels=4"),
    )
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path / "run/report.json")
    assert [(a.accepted, a.taken, a.speedup) for a in report.attempts] == [(False, True, None)]
    assert report.binds == "cut.target.max_accuracy_drop and cut.attempts"
    assert any("none of 1 attempts stayed within 0.001" in warning for warning in report.warnings)
    assert any("The validation set has 64 images" in warning for warning in report.warnings)
    assert report.macs_ratio > 4


def test_plan_says_that_it_takes_training(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(TINY)
    done = in_this_process("plan", tmp_path / "recipe.yaml", "--set", "cut.target={max_accuracy_drop: 0.01}")
    assert done.returncode == 2
    assert "found by training" in done.stderr
