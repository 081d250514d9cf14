"""The fastest model within a budget of accuracy: which speeds are tried, and what a run makes of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import sparsekit as sk
from sparsekit.attempts import next_pressure, target_at
from sparsekit.report import read_report

RECIPE = """
model: {name: test_resnet}
data:
  name: digits
  image_size: 32
  batch_size: 32
  train_limit: 256
  validation_limit: 64
  test_limit: 96
  augment: null
training: {lr: 0.05}
dense: {epochs: 1}
sparsify: {epochs: 2}
cut: {target: {max_accuracy_drop: 0.9}, round_to: 4, min_channels: 4, attempts: 2}
finetune: {epochs: 1}
benchmark: {rounds: 20, warmup: 2}
"""


def search(drop_at: float, budget: float = 0.01, most: float = 3.0, slope: float = 2.0) -> list[float]:
    """Pressures that are tried if the drop is (pressure / drop_at)^slope of the budget."""
    tried: list[tuple[float, float]] = []
    while len(tried) < 30:
        pressure = next_pressure(tried, budget, most)
        if pressure is None:
            return [x for x, _ in tried]
        tried.append((pressure, budget * (pressure / drop_at) ** slope))
    raise AssertionError("the search does not end")


@pytest.mark.parametrize("slope", [0.5, 1.0, 2.0, 6.0])
@pytest.mark.parametrize("drop_at", [0.2, 0.5, 0.99, 1.0, 1.3, 2.5])
def test_the_search_closes_in_on_the_highest_pressure_within_the_budget(drop_at: float, slope: float) -> None:
    tried = search(drop_at, slope=slope)
    assert tried[0] == 1
    assert all(0 < x <= 3 for x in tried)
    assert len(set(tried)) == len(tried)
    within = max((x for x in tried if x <= drop_at), default=0.0)
    assert drop_at - within <= 0.15 + 1e-9
    assert len(tried) <= 8


def test_what_loses_nothing_is_pushed_to_the_limit_and_no_further() -> None:
    assert search(100.0, most=1.0) == [1.0]
    assert search(100.0, most=2.0)[-1] == 2.0
    assert search(100.0, most=0.4) == [0.4]


def test_nothing_within_the_budget_ends_at_small_pressures() -> None:
    tried = search(1e-6)
    assert tried == sorted(tried, reverse=True)
    assert tried[-1] <= 0.15 + 1e-9


def test_drops_that_do_not_grow_steadily_do_not_confuse_it() -> None:
    """Accuracy is noisy: a higher pressure may lose less. What is slower than the best within is not tried again."""
    x = next_pressure([(1.0, 0.02), (0.5, 0.03), (0.25, -0.01)], 0.01, 3.0)
    assert x is not None
    assert 0.25 < x < 0.5
    x = next_pressure([(1.0, 0.02), (0.5, 0.005), (0.75, -0.01)], 0.01, 3.0)
    assert x is not None
    assert 0.75 < x < 1


def test_a_target_between_nothing_and_all_of_it() -> None:
    base = {"speedup": 4.0, "macs": 0.25}
    assert target_at(base, 1.0) == base
    assert target_at(base, 0.5) == {"speedup": 2.0, "macs": 0.5}
    assert target_at(base, 0.0) == {"speedup": 1.0, "macs": 1.0}


def prune(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE)
    return subprocess.run(
        [sys.executable, "-m", "sparsekit", "prune", str(path), "--output", str(folder / "run"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two attempts that may lose nearly everything: the second is faster."""
    folder = tmp_path_factory.mktemp("within")
    done = prune(folder)
    assert done.returncode == 0, done.stderr
    assert "attempt 2" in done.stdout
    return folder / "run"


def test_the_fastest_within_the_budget_becomes_the_run_s_model(run: Path) -> None:
    report = read_report(run / "report.json")
    assert [attempt.target for attempt in report.attempts] == [{"speedup": 2.0}, {"speedup": 3.0}]
    assert all(attempt.accepted for attempt in report.attempts)
    assert [attempt.taken for attempt in report.attempts] == [False, True]
    assert report.binds == "cut.attempts"
    assert report.attempts[1].macs == report.pruned.macs < report.attempts[0].macs
    taken, kept = sk.load(run / "attempts/2/pruned"), sk.load(run / "pruned")
    assert all(bool((a == b).all()) for a, b in zip(taken.parameters(), kept.parameters(), strict=True))


def test_every_attempt_is_left_with_its_recipe_and_says_on_what_it_was_judged(run: Path) -> None:
    for number, speed in ((1, 2.0), (2, 3.0)):
        folder = run / "attempts" / str(number)
        assert yaml.safe_load((folder / "recipe.yaml").read_text())["cut"]["target"]["speedup"] == speed
        info = json.loads((folder / "pruned/structure.json").read_text())["info"]
        assert "validation_accuracy" in info
        assert "test_accuracy" not in info
    assert "test_accuracy" in json.loads((run / "pruned/structure.json").read_text())["info"]


def test_accuracies_are_those_of_the_validation_curves(run: Path) -> None:
    report = read_report(run / "report.json")
    last = [point.accuracy for point in report.curves if point.phase == "finetune"][-1]
    dense = [point.accuracy for point in report.curves if point.phase == "baseline"][-1]
    attempt = report.attempts[1]
    assert attempt.accuracy == last
    assert dense is not None
    assert attempt.drop == pytest.approx(dense - attempt.accuracy)


def test_resuming_goes_on_with_the_attempt_that_was_not_finished(run: Path, tmp_path: Path) -> None:
    """As if killed after the first attempt: the second is made again, to the same speed; the first is not touched."""
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    journal = copy / "checkpoints/journal.json"
    stages = json.loads(journal.read_text())["stages"]
    stages = stages[: [stage["name"] for stage in stages].index("attempts") + 1]
    notes = stages[-1]["result"]
    stages[-1] |= {
        "status": "running",
        "result": {key: notes[key] for key in ("base", "most", "dense_accuracy")}
        | {"attempts": notes["attempts"][:1]},
    }
    journal.write_text(json.dumps({"stages": stages}))
    shutil.rmtree(copy / "attempts/2")
    shutil.rmtree(copy / "pruned")
    before = (copy / "attempts/1/pruned/model.safetensors").stat().st_mtime_ns
    other = prune(tmp_path, "--resume", "--set", "cut.target={max_accuracy_drop: 0.8}")
    assert other.returncode == 2
    assert "cut.target.max_accuracy_drop" in other.stderr
    done = prune(tmp_path, "--resume")
    assert done.returncode == 0, done.stderr
    assert (copy / "attempts/1/pruned/model.safetensors").stat().st_mtime_ns == before
    report = read_report(copy / "report.json")
    assert [attempt.target for attempt in report.attempts] == [{"speedup": 2.0}, {"speedup": 3.0}]


def test_a_budget_that_no_attempt_keeps_is_told_and_the_nearest_is_taken(tmp_path: Path) -> None:
    done = prune(
        tmp_path,
        *("--set", "cut.target={max_accuracy_drop: 0.001, macs: 0.2}", "--set", "cut.attempts=1"),
        *("--set", "sparsify.epochs=0", "--set", "finetune.epochs=0", "--set", "dense.epochs=8"),
    )
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path / "run/report.json")
    assert [(a.accepted, a.taken, a.speedup) for a in report.attempts] == [(False, True, None)]
    assert report.binds == "cut.target.max_accuracy_drop"
    assert any("no attempt stayed within 0.001" in warning for warning in report.warnings)
    assert any("The validation set has 64 images" in warning for warning in report.warnings)
    assert report.macs_ratio > 4


def test_plan_says_that_it_takes_training(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    command = [sys.executable, "-m", "sparsekit", "plan", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "found by training" in done.stderr
