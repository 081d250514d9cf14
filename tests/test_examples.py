"""The examples run as a reader would run them: as programs, most in a process of their own."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_training_loop_prunes_saves_exports_and_measures(tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLES / "own_training_loop.py", "--output", tmp_path, "--steps", "30"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240
    )
    assert finished.returncode == 0, finished.stderr
    rows = dict(re.findall(r"^(dense|pruned) +0\.\d{3} +([\d,]+) +\d+\.\d+$", finished.stdout, re.MULTILINE))
    dense, pruned = (int(rows[name].replace(",", "")) for name in ("dense", "pruned"))
    assert pruned < 0.6 * dense
    assert re.search(r"^speed-up \d+\.\d\d in ONNX Runtime", finished.stdout, re.MULTILINE)
    differ = re.search(r"differ by (\S+) of the largest logit", finished.stdout)
    assert differ is not None
    assert float(differ[1]) < 1e-4
    for name in ("dense", "pruned"):
        onnx.checker.check_model(onnx.load(tmp_path / f"{name}.onnx"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense.onnx", "pruned", "pruned.onnx"]


def test_the_loop_to_a_speed_cuts_and_says_what_was_asked_and_measured(tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLES / "speed_in_your_loop.py", "--output", tmp_path, "--steps", "30"]
    # Not the default of 1.5: on a busy machine so small a model may look as if it could not get that fast.
    command += ["--speedup", "1.2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=280
    )
    assert finished.returncode == 0, finished.stderr
    assert re.search(r"^found after \d trials: \d+\.\d\d times as fast$", finished.stdout, re.MULTILINE)
    assert "all that was to go is zero" in finished.stdout
    rows = dict(
        re.findall(r"^(dense|pruned): accuracy 0\.\d{3}, ([\d,]+) parameters$", finished.stdout, re.MULTILINE)
    )
    dense, pruned = (int(rows[name].replace(",", "")) for name in ("dense", "pruned"))
    assert pruned < dense
    assert re.search(r"^speed-up asked 1\.20, measured \d+\.\d\d, ", finished.stdout, re.MULTILINE)
    for name in ("dense", "pruned"):
        onnx.checker.check_model(onnx.load(tmp_path / f"{name}.onnx"))


@pytest.fixture
def to_a_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str, str], tuple[str, list[float]]]:
    """Run an example with few steps, in this process, and measured in a hurry: no figure of speed is looked at.

    Returns what it printed, and the metric of the dense and the pruned model.
    """
    monkeypatch.setattr("sparsekit.latency.search._MAX_TRIALS", 1)
    monkeypatch.setattr("sparsekit.latency.search._ROUNDS", 10)
    monkeypatch.setattr("sparsekit.latency.layers._ROUNDS", 10)
    monkeypatch.setattr("sparsekit.latency.operators._NARROW", 1.0)

    def run(name: str, metric: str) -> tuple[str, list[float]]:
        line = [name, "--output", str(tmp_path), "--steps", "12", "--speedup", "1.2"]
        monkeypatch.setattr(sys, "argv", line)
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        printed = capsys.readouterr().out
        assert re.search(r"^found after 1 trials: \d+\.\d\d times as fast$", printed, re.MULTILINE)
        assert "all that was to go is zero" in printed
        differ = re.search(
            r"^masked and cut model differ by (\S+) of the largest output$", printed, re.MULTILINE
        )
        assert differ is not None
        assert float(differ[1]) < 1e-4
        row = rf"^(dense|pruned): {metric} ([01]\.\d{{3}}), ([\d,]+) parameters$"
        dense, pruned = re.findall(row, printed, re.MULTILINE)
        assert (dense[0], pruned[0]) == ("dense", "pruned")
        assert int(pruned[2].replace(",", "")) < int(dense[2].replace(",", ""))
        assert re.search(r"^speed-up asked 1\.20, measured \d+\.\d\d, ", printed, re.MULTILINE)
        for file in ("dense.onnx", "pruned.onnx"):
            onnx.checker.check_model(onnx.load(tmp_path / file))
        return printed, [float(dense[1]), float(pruned[1])]

    return run


def test_the_detector_gets_to_a_speed_and_its_file_finds_the_same_boxes(
    to_a_speed: Callable[[str, str], tuple[str, list[float]]],
) -> None:
    printed, (_, pruned) = to_a_speed("detector.py", "average precision")
    in_file = re.search(r"^pruned in ONNX Runtime: average precision (\S+)$", printed, re.MULTILINE)
    assert in_file is not None
    assert float(in_file[1]) == pytest.approx(pruned, abs=0.01)


def test_the_segmentation_gets_to_a_speed_and_its_file_gives_the_same_classes(
    to_a_speed: Callable[[str, str], tuple[str, list[float]]],
) -> None:
    printed, metrics = to_a_speed("segmentation.py", "mean IoU")
    assert min(metrics) > 0.1
    same = re.search(r"^in ONNX Runtime (\S+)% of the pixels are of the same class$", printed, re.MULTILINE)
    assert same is not None
    assert float(same[1]) > 99.5


@pytest.mark.parametrize("name", ["lightning_trainer.py", "hugging_face_trainer.py"])
def test_the_trainers_of_others_leave_zeros_that_can_be_cut(tmp_path: Path, name: str) -> None:
    finished = subprocess.run(
        [sys.executable, EXAMPLES / name, "--epochs", "2"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=240,
    )
    assert finished.returncode == 0, finished.stderr
    found = re.search(
        r"parameters ([\d,]+) -> ([\d,]+); masked and cut model differ by (\S+)", finished.stdout
    )
    assert found is not None
    before, after = (int(found[i].replace(",", "")) for i in (1, 2))
    assert after < 0.8 * before
    assert float(found[3]) < 1e-4
    assert list(tmp_path.iterdir()) == []


def test_every_example_is_run_by_a_test() -> None:
    tests = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{path.name}"' in tests for path in EXAMPLES.glob("*.py"))
